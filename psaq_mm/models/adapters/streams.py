# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Residual streams: which layers write to one and which norms read it, in the backbones and behind them.

A ViT has one from its patch embedding to its head. A Swin has one in each stage; the first is left as it is, because it
begins after a LayerNorm, whose gain belongs to single channels. Stages end in norms that a neck or a head reads: where
its class is known here, the stream may be rotated up to its convolutions.
"""

from typing import Callable, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

from torch import nn

from psaq_mm.models.adapters.blocks import BlockParts, Writer
from psaq_mm.models.adapters.match import class_named
from psaq_mm.quantization import StreamReader

__all__ = ['BEHIND_A_NORM', 'LINEAR_HEADS', 'NamedStreams', 'Stream', 'Unrotatable', 'need', 'output_reader', 'stream']

_POOLS = ('mmpretrain.models.necks.gap.GlobalAveragePooling',)
LINEAR_HEADS = ('mmpretrain.models.heads.linear_head.LinearClsHead',)
_FPN = ('mmdet.models.necks.fpn.FPN',)
_UPER_HEADS = ('mmseg.models.decode_heads.uper_head.UPerHead',)
_FCN_HEADS = ('mmseg.models.decode_heads.fcn_head.FCNHead',)

BEHIND_A_NORM = 'it begins behind the LayerNorm of the patch embedding'


class Stream(NamedTuple):
    """A residual stream, as :func:`psaq_mm.quantization.rotate_stream_` wants it.

    Attributes:
        channels: Its width.
        writers: Layers whose outputs are added.
        tokens: Parameters that are added, (..., channels).
        readers: Every norm that reads it.
    """

    channels: int
    writers: List[Writer]
    tokens: List[nn.Parameter]
    readers: List[StreamReader]


class Unrotatable(Exception):
    """Why a stream cannot be rotated."""


NamedStreams = List[Tuple[str, Callable[[], Stream]]]
"""A title for people, and what gives the stream or raises :class:`Unrotatable`."""


def need(condition: object, reason: str) -> None:
    """Raises :class:`Unrotatable` with ``reason`` where ``condition`` does not hold."""
    if not condition:
        raise Unrotatable(reason)


def stream(
    first: nn.Module,
    blocks: Iterable[BlockParts],
    readers: Sequence[StreamReader],
    tokens: Iterable[Optional[nn.Parameter]] = (),
) -> Stream:
    """The stream of several blocks.

    Args:
        first: Layer that begins it: the patch embedding, or the reduction of a patch merging.
        blocks: All blocks that read and write it.
        readers: The norms behind the blocks.
        tokens: Parameters that are added to it; None is left out.

    Raises:
        Unrotatable: Something reads or writes it in a way that does not allow for a rotation.
    """
    writers, norms = [Writer(first)], []
    for parts in blocks:
        need(len(parts.writers) == 2, 'an attention or a feed-forward network of another kind')
        writers += parts.writers
        norms += [StreamReader(feed.norm, feed.layers, padded=feed.padded) for feed in parts.feeds]
    norms += readers
    for reader in norms:
        need(isinstance(reader.norm, nn.LayerNorm), 'a norm that is no LayerNorm')
        need(
            reader.layers
            and all(
                isinstance(layer, (nn.Linear, nn.Conv2d)) and getattr(layer, 'groups', 1) == 1
                for layer in reader.layers
            ),
            'a norm that is read by no Linear or Conv2d',
        )
    return Stream(first.weight.shape[0], writers, [token for token in tokens if token is not None], norms)


def output_reader(model: nn.Module, norm: nn.Module, level: int, levels: int) -> StreamReader:
    """The norm of a stage's output, and the layers of neck or head that read the map.

    Args:
        model: The detector, segmentor or classifier.
        norm: LayerNorm of the output.
        level: Its place among the outputs of the backbone.
        levels: Their number.

    Raises:
        Unrotatable: It is read by a neck or head that is not known here.
    """
    neck = getattr(model, 'neck', None)
    if class_named(neck, _FPN):
        need(neck.add_extra_convs != 'on_input', 'the neck makes further levels of its inputs')
        place = level - neck.start_level
        read = neck.lateral_convs[place : place + 1] if place >= 0 else ()
        return StreamReader(norm, tuple(module.conv for module in read))
    if class_named(neck, _POOLS) and class_named(getattr(model, 'head', None), LINEAR_HEADS) and levels == 1:
        return StreamReader(norm, (model.head.fc,))
    heads = [getattr(model, 'decode_head', None), *_listed(getattr(model, 'auxiliary_head', None))]
    need(
        neck is None and class_named(heads[0], _UPER_HEADS),
        'its output is read by a neck or head that is not known here',
    )
    layers = [layer for head in heads for layer in _seen_by(head, level, levels)]
    return StreamReader(norm, tuple(layers), padded=any(layer.padding not in (0, (0, 0)) for layer in layers))


def _listed(module: Optional[nn.Module]) -> List[nn.Module]:
    return list(module) if isinstance(module, nn.ModuleList) else [] if module is None else [module]


def _seen_by(head: nn.Module, level: int, levels: int) -> Iterator[nn.Module]:
    """Convolutions of a head that read one level of the backbone."""
    read = _indices(head.in_index, levels)
    if level not in read:
        return
    if class_named(head, _UPER_HEADS):
        place = read.index(level)
        if place < len(read) - 1:
            yield head.lateral_convs[place].conv
        else:
            yield from (scale[1].conv for scale in head.psp_modules)
            yield head.bottleneck.conv
        return
    need(
        class_named(head, _FCN_HEADS) and len(read) == 1 and head.num_convs,
        'its output is read by a head that is not known here',
    )
    yield head.convs[0].conv
    if head.concat_input:
        yield head.conv_cat.conv


def _indices(given: Union[int, Sequence[int]], levels: int) -> List[int]:
    return [index % levels for index in ([given] if isinstance(given, int) else given)]
