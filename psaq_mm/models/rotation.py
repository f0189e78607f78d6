# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Rotation of a model: its heads, and the residual streams whose readers are all known."""

from contextlib import contextmanager
from typing import Iterator, List, NamedTuple, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.calibration import find_attention
from psaq_mm.errors import DataError, UnsupportedModelError
from psaq_mm.models.adapters import Backbone, backbone_of
from psaq_mm.models.adapters.streams import Stream, Unrotatable
from psaq_mm.models.scope import find_backbone, network_of
from psaq_mm.models.task import TaskModel
from psaq_mm.quantization import (
    attention_parts,
    full_float32,
    in_mode,
    quantizers,
    random_rotation,
    rotate_heads_,
    rotate_stream_,
)

__all__ = ['RotationReport', 'rotate_model_', 'streams_of']

TOLERANCE = 1e-3
"""Greatest change of an output relative to its spread: float32 alone gives 1e-6 to 1e-5, and TF32, which is off here,
up to 2e-3."""


class RotationReport(NamedTuple):
    """What :func:`rotate_model_` did.

    Attributes:
        heads: Heads whose queries, keys or values were rotated.
        streams: Names and widths of the residual streams that were.
        left: Why others were not, one line each.
    """

    heads: int
    streams: List[Tuple[str, int]]
    left: List[str]

    def __str__(self) -> str:
        streams = ', '.join(f'{name} ({width} channels)' for name, width in self.streams)
        left = f'; left as they are: {"; ".join(self.left)}' if self.left else ''
        return f'{self.heads} heads{" and " + streams if streams else ""}{left}'


@torch.no_grad()
def rotate_model_(model: nn.Module, size: Tuple[int, int], seed: int = 0) -> RotationReport:
    """Rotate heads and residual streams of a model, in place, before calibration: the same function in full precision.

    Rotations are random and depend on ``seed`` alone: every rank gets the same. The gains of norms that read a rotated
    stream become 1. The maps that a backbone gives to a known neck or head are rotated too, with the convolutions that
    read them.

    Args:
        model: Detector, segmentor, classifier or backbone with full-precision weights, its layers quantized already or
            not.
        size: (height, width) of the noise that it is checked with.
        seed: Seed of the rotations.

    Returns:
        What was rotated, and what was not and why.

    Raises:
        UnsupportedModelError: The outputs changed. The model has its old weights then, as after any other error.
    """
    backbone, heads = find_backbone(model), 0
    description = backbone_of(network_of(backbone)) or Backbone()
    streams, left = streams_of(model, network_of(backbone))
    seen = _parts(model) if streams else ('backbone',)
    outputs = _outputs(model, seen, size)
    generator = torch.Generator().manual_seed(seed)
    done = []
    with _undone_on_error(model, streams):
        for _, attention in find_attention(backbone):
            parts, (scores, values) = attention_parts(attention), description.rotates_heads(attention)
            if scores or values:
                rotate_heads_(parts, generator, scores=scores, values=values)
                heads += parts.heads
        for name, stream in streams:
            rotation = random_rotation(stream.channels, generator, keep_mean=True)
            _fold_scales(stream)
            try:
                rotate_stream_(rotation, [writer.layer for writer in stream.writers], stream.tokens, stream.readers)
            except DataError as error:
                left.append(f'{name}: {error}')
            else:
                done.append((name, stream.channels))
        change = max((_change(old, new) for old, new in zip(outputs, _outputs(model, seen, size))), default=0.0)
        if not change <= TOLERANCE:
            raise UnsupportedModelError(
                f'rotating {type(model).__name__} changed its outputs by {change:.1%} of their spread, so something '
                'reads its tokens that is not known here: set dfq.rotate=False'
            )
    return RotationReport(heads, done, left)


def streams_of(model: nn.Module, net: nn.Module) -> Tuple[List[Tuple[str, Stream]], List[str]]:
    """Streams of a model that may be rotated, each with its title, and a reason for each that may not.

    Args:
        model: Detector, segmentor or classifier.
        net: Its network that does the work.
    """
    backbone = backbone_of(net)
    titled = backbone.streams(model, net) if backbone else []
    if not titled:
        return [], [f'the stream of {type(net).__name__}: its parts are not told']
    streams, left = [], []
    for name, look in titled:
        try:
            streams.append((name, look()))
        except Unrotatable as reason:
            left.append(f'{name}: {reason}')
    return streams, left


def _fold_scales(stream: Stream) -> None:
    """Move each LayerScale into the layer before it, in place: the factors belong to channels, which a rotation mixes.

    The function stays the same. The factors become 1.
    """
    for layer, scale in stream.writers:
        if scale is None:
            continue
        for value in (layer.weight,) if layer.bias is None else (layer.weight, layer.bias):
            factors = scale.double().view(-1, *[1] * (value.dim() - 1))
            value.copy_(value.double() * factors)
        scale.fill_(1)


@contextmanager
def _undone_on_error(model: nn.Module, streams: List[Tuple[str, Stream]]) -> Iterator[None]:
    """Parameters and tokens get their old values back if the block raises an error. Positions may be a buffer."""
    tokens = (token for _, stream in streams for token in stream.tokens)
    before = [(parameter, parameter.detach().clone()) for parameter in {*model.parameters(), *tokens}]
    try:
        yield
    except BaseException:
        for parameter, values in before:
            parameter.copy_(values)
        raise


def _parts(model: nn.Module) -> Tuple[str, ...]:
    """What lies behind everything that reads a rotated stream: a detector's neck, any other model's head."""
    return ('neck',) if any(hasattr(model, name) for name in ('rpn_head', 'bbox_head')) else ('head',)


def _outputs(model: nn.Module, parts: Tuple[str, ...], size: Tuple[int, int]) -> List[Tensor]:
    """What parts of a model give in full precision for an image of noise."""
    view = TaskModel(model, parts)
    noise = torch.randn(1, view.image_spec.channels, *size, generator=torch.Generator().manual_seed(0))
    with full_float32(), in_mode([quantizer for _, quantizer in quantizers(model)], 'off'):
        return [out.float().clone() for out in view.outputs(noise.to(next(model.parameters()).device))]


def _change(old: Tensor, new: Tensor) -> float:
    return float((new - old).abs().max() / old.std(correction=0).clamp_min(torch.finfo(torch.float32).tiny))
