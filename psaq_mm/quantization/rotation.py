"""Rotations inside a transformer: the same function in full precision, with weights that fewer bits represent well.

The output of a transformer does not depend on the axes of its residual stream, nor on those of a head's queries, keys
and values. An orthogonal matrix may be folded into the weights of every layer that writes there and every layer that
reads there. An outlier on one axis is then spread over all axes, so that ranges and steps get smaller (QuaRot, Ashkboos
et al., arXiv 2404.00456, section 3; SliceGPT, arXiv 2401.15024, section 3, for why the norms allow it). LayerNorm
removes the mean, which is the direction (1, ..., 1). Rotations of a stream keep that direction fixed, so LayerNorm of
rotated tokens is the rotated LayerNorm.

A token is a row x here, and x R is the rotated token.
"""

import math
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.errors import DataError
from psaq_mm.quantization.attention import AttentionParts, Projection

__all__ = ['StreamReader', 'random_rotation', 'rotate_heads_', 'rotate_stream_']

MIN_GAIN = 1e-3
"""Least gain of a LayerNorm relative to its greatest, where its output is padded and offsets are divided by gains."""


class StreamReader(NamedTuple):
    """A LayerNorm that reads a residual stream, and the layers that read the LayerNorm.

    Attributes:
        norm: With gain and offset.
        layers: All Linear layers and convolutions that read ``norm``. One that reads more channels has those of
            ``norm`` first.
        tokens: How many tokens of the stream the norm spans: 4 in Swin's patch merging.
        interleaved: Whether these tokens are interleaved channel by channel, as by ``nn.Unfold``, instead of
            concatenated.
        padded: Whether the output is padded with zeros as tokens or positions, by a window or a convolution: they have
            to stay zeros.
    """

    norm: nn.LayerNorm
    layers: Tuple[nn.Module, ...]
    tokens: int = 1
    interleaved: bool = False
    padded: bool = False


def random_rotation(size: int, generator: Optional[torch.Generator] = None, keep_mean: bool = False) -> Tensor:
    """An orthogonal matrix, uniformly distributed (Haar measure; Mezzadri, arXiv math-ph/0609050, section 5).

    Args:
        size: Its width, at least 1.
        generator: Source of randomness, on the CPU.
        keep_mean: Only among those that map (1, ..., 1) onto itself, with which LayerNorm commutes.

    Returns:
        (size, size), float64, on the CPU.
    """
    if size < 1:
        raise DataError(f'size={size} of a rotation must be at least 1')
    if not keep_mean:
        return _haar(size, generator)
    first = torch.zeros(size, size, dtype=torch.float64)
    first[:, 0] = 1 / math.sqrt(size)
    first[:, 1:] = torch.randn(size, size - 1, generator=generator, dtype=torch.float64)
    basis, _ = torch.linalg.qr(first)
    inner = torch.eye(size, dtype=torch.float64)
    inner[1:, 1:] = _haar(size - 1, generator)
    return basis @ inner @ basis.T


def _haar(size: int, generator: Optional[torch.Generator]) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * torch.sign(r.diagonal())  # without the signs, qr's own choice of them would show


@torch.no_grad()
def rotate_heads_(
    parts: AttentionParts, generator: Optional[torch.Generator] = None, *, scores: bool = True, values: bool = True
) -> None:
    """Rotate the queries with the keys, and the values with what reads them, in place.

    All heads get the same rotation: the mean of their outputs is then rotated too, and the similarity of its patches,
    which PSAQ-ViT uses, stays.

    Args:
        parts: Layers of the attention.
        generator: Source of randomness, on the CPU.
        scores: Whether queries and keys are rotated; not where an operation such as a norm is between them and their
            product.
        values: The same for values and output projection.

    Raises:
        DataError: The layers' widths do not fit.
    """
    queries, keys, valued, proj = parts.queries, parts.keys, parts.values, parts.proj
    inner = proj.weight.shape[1]
    for name, projection, rows in (('queries', queries, keys.rows), ('values', valued, inner)):
        if projection.rows != rows or rows % parts.heads or projection.first + rows > len(projection.layer.weight):
            raise DataError(
                f'{projection.rows} rows of {name} and a proj of {inner} inputs are not those of {parts.heads} heads '
                'of one width'
            )
    if scores:
        rotation = random_rotation(queries.rows // parts.heads, generator)
        _rotate_rows(queries, parts.heads, rotation)
        _rotate_rows(keys, parts.heads, rotation)
    if values:
        width = inner // parts.heads
        rotation = random_rotation(width, generator)
        _rotate_rows(valued, parts.heads, rotation)
        proj.weight.copy_((proj.weight.double().cpu().unflatten(1, (parts.heads, width)) @ rotation).flatten(1))


def _rotate_rows(projection: Projection, heads: int, rotation: Tensor) -> None:
    """Rotate the outputs (heads, width) of a projection, in place."""
    layer, rows = projection.layer, slice(projection.first, projection.first + projection.rows)
    values = [layer.weight[rows]]
    if projection.bias is not None:
        values.append(projection.bias)
    elif layer.bias is not None:
        values.append(layer.bias[rows])
    for value in values:
        part = value.double().cpu().reshape(heads, len(rotation), -1)  # a bias as a single input
        value.copy_((rotation.T @ part).reshape(value.shape))


@torch.no_grad()
def rotate_stream_(
    rotation: Tensor, writers: Sequence[nn.Module], tokens: Sequence[Tensor], readers: Sequence[StreamReader]
) -> None:
    """Rotate a residual stream, in place: everything that writes to it, and everything that reads it.

    The gains of LayerNorms that read the stream become 1. Their offsets move into the layers after them, or stay,
    rotated, where such a layer has no bias or zeros are padded between the two.

    Args:
        rotation: (channels, channels), orthogonal, with (1, ..., 1) as a fixed point: :func:`random_rotation` with
            ``keep_mean``.
        writers: Linear layers and convolutions whose outputs are added to the stream.
        tokens: Parameters that are added to it, (..., channels).
        readers: Every LayerNorm that reads it. Nothing else may.

    Raises:
        DataError: Shapes do not fit, the rotation is not orthogonal or moves (1, ..., 1), something is named twice, or
            an offset has to stay beside a gain of 0. Nothing is changed then.
    """
    size = len(rotation)
    rotation = rotation.double().cpu()
    ones = torch.ones(size, dtype=torch.float64)
    if rotation.shape != (size, size) or not torch.allclose(ones @ rotation, ones, atol=1e-9):
        raise DataError(
            'The rotation of a residual stream has to be square and keep (1, ..., 1) where it is: the mean that '
            'LayerNorm takes out'
        )
    if not torch.allclose(rotation @ rotation.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-5):
        raise DataError(
            'The rotation of a residual stream is not orthogonal: its readers would not get back what its writers wrote'
        )
    _check_named_once(writers, tokens, readers)
    for layer in writers:
        if layer.weight.shape[0] != size:
            raise DataError(f'A layer of {layer.weight.shape[0]} outputs does not write to a stream of {size} channels')
    for reader in readers:
        _check_reader(reader, size)
    for layer in writers:
        layer.weight.copy_(torch.einsum('oc,o...->c...', rotation, layer.weight.double().cpu()))
        if layer.bias is not None:
            layer.bias.copy_(layer.bias.double().cpu() @ rotation)
    for token in tokens:
        token.copy_(token.double().cpu() @ rotation)
    for reader in readers:
        _turn_reader(reader, rotation)


def _check_named_once(writers: Sequence[nn.Module], tokens: Sequence[Tensor], readers: Sequence[StreamReader]) -> None:
    """Refuse a parameter that would be rotated twice; two modules may share one."""
    norms, layers = (
        [getattr(reader.norm, 'weight', None) for reader in readers],
        [layer for reader in readers for layer in reader.layers],
    )
    for what, parts in (
        ('writer', [layer.weight for layer in writers]),
        ('token', tokens),
        ('LayerNorm', norms),
        ('layer behind a LayerNorm', [layer.weight for layer in layers]),
    ):
        parts = [part for part in parts if part is not None]
        if len({id(part) for part in parts}) < len(parts):
            raise DataError(
                f'A {what} of the residual stream is named twice, or shares its weight with another: name each once'
            )


def _offset_stays(reader: StreamReader) -> bool:
    offset = bool((reader.norm.bias != 0).any())
    # A bias that is no parameter is put together from others: nothing can be added to it.
    return offset and (reader.padded or any(not isinstance(layer.bias, nn.Parameter) for layer in reader.layers))


def _check_reader(reader: StreamReader, size: int) -> None:
    norm, wide = reader.norm, size * reader.tokens
    if getattr(norm, 'weight', None) is None or getattr(norm, 'bias', None) is None or norm.weight.shape != (wide,):
        raise DataError(
            f'A reader of {reader.tokens} tokens of {size} channels has to be a LayerNorm of {wide}, with gain and '
            f'offset'
        )
    if any(layer.weight.shape[1] < wide for layer in reader.layers):
        raise DataError(f'A layer behind a LayerNorm of {wide} channels reads fewer')
    gain = norm.weight.abs()
    if _offset_stays(reader) and bool(((gain <= MIN_GAIN * gain.max()) & (norm.bias != 0)).any()):
        raise DataError('A LayerNorm has a gain of 0 beside an offset that has to stay in it')


def _turn_reader(reader: StreamReader, rotation: Tensor) -> None:
    norm, wide = reader.norm, len(rotation) * reader.tokens
    several = torch.eye(reader.tokens, dtype=torch.float64)
    full = torch.kron(rotation, several) if reader.interleaved else torch.kron(several, rotation)
    gain, offset = norm.weight.double().cpu(), norm.bias.double().cpu()
    stays = _offset_stays(reader)
    for layer in reader.layers:
        weight = layer.weight.double().cpu()
        part = weight[:, :wide]
        if not stays and layer.bias is not None:
            layer.bias.copy_(layer.bias.double().cpu() + torch.einsum('oi...,i->o', part, offset))
        scaled = torch.einsum('oi...,i->oi...', part, gain)
        weight[:, :wide] = torch.einsum('oi...,ij->oj...', scaled, full)
        layer.weight.copy_(weight)
    norm.weight.fill_(1)
    norm.bias.copy_(torch.where(offset != 0, offset / gain, offset) @ full if stays else torch.zeros_like(offset))
