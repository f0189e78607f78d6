# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Residual streams: which layers write to one and which norms read it, in the backbones and behind them.

A ViT has one from its patch embedding to its head. A Swin has one in each stage; the first is left as it is, because it
begins after a LayerNorm, whose gain belongs to single channels. Stages end in norms that a neck or a head reads: where
its class is known here, the stream may be rotated up to its convolutions.
"""

from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

from torch import nn

from psaq_mm.models.adapters import swin, timm_vit, vit
from psaq_mm.models.adapters.edges import SEQUENTIAL_FFN, TIMM_MLP, BlockParts, first_layers
from psaq_mm.models.adapters.match import class_named
from psaq_mm.models.adapters.timm_swin import TIMM_SWIN
from psaq_mm.quantization import StreamReader

__all__ = ['Stream', 'is_identity', 'streams_of']

_VITS = tuple(
    f'mmpretrain.models.backbones.{name}'
    for name in ('vision_transformer.VisionTransformer', 'deit.DistilledVisionTransformer')
)
_VIT_HEADS = tuple(
    f'mmpretrain.models.heads.{name}'
    for name in ('vision_transformer_head.VisionTransformerClsHead', 'deit_head.DeiTClsHead')
)
_POOLS = ('mmpretrain.models.necks.gap.GlobalAveragePooling',)
_LINEAR_HEADS = ('mmpretrain.models.heads.linear_head.LinearClsHead',)
_FPN = ('mmdet.models.necks.fpn.FPN',)
_UPER_HEADS = ('mmseg.models.decode_heads.uper_head.UPerHead',)
_FCN_HEADS = ('mmseg.models.decode_heads.fcn_head.FCNHead',)
_BEHIND_A_NORM = 'it begins behind the LayerNorm of the patch embedding'


class Stream(NamedTuple):
    """A residual stream, as :func:`psaq_mm.quantization.rotate_stream_` wants it.

    Attributes:
        name: For people.
        channels: Its width.
        writers: Layers whose outputs are added.
        tokens: Parameters that are added, (..., channels).
        readers: Every norm that reads it.
    """

    name: str
    channels: int
    writers: List[nn.Module]
    tokens: List[nn.Parameter]
    readers: List[StreamReader]


class _Unknown(Exception):
    """Why a stream cannot be rotated."""


def streams_of(model: nn.Module, backbone: nn.Module) -> Tuple[List[Stream], List[str]]:
    """Streams of a model that may be rotated, and a reason for each that may not.

    Args:
        model: Detector, segmentor or classifier.
        backbone: Its network that does the work.
    """
    if class_named(backbone, timm_vit.TIMM_VIT_BACKBONES):
        parts = [('the stream', lambda: _timm_vit(backbone))]
    elif class_named(backbone, _VITS):
        parts = [('the stream', lambda: _vit(model, backbone))]
    elif class_named(backbone, swin.SWIN_BACKBONES):
        parts = [
            (f'the stream of stage {i + 1}', lambda i=i: _swin_stage(model, backbone, i))
            for i in range(len(backbone.stages))
        ]
    elif class_named(backbone, TIMM_SWIN):
        parts = [
            (f'the stream of stage {i + 1}', lambda i=i: _timm_swin_stage(backbone, i))
            for i in range(len(backbone.layers))
        ]
    else:
        return [], [f'the stream of {type(backbone).__name__}: its parts are not told']
    streams, left = [], []
    for name, look in parts:
        try:
            streams.append(look()._replace(name=name))
        except _Unknown as reason:
            left.append(f'{name}: {reason}')
    return streams, left


def _need(condition: object, reason: str) -> None:
    if not condition:
        raise _Unknown(reason)


def is_identity(*modules: object) -> bool:
    """Whether nothing is computed there: None or Identity."""
    return all(module is None or isinstance(module, nn.Identity) for module in modules)


def _last_layer(ffn: nn.Module) -> nn.Module:
    """The layer of a feed-forward network whose output is added to the stream."""
    if class_named(ffn, TIMM_MLP):
        return ffn.fc2
    _need(
        class_named(ffn, SEQUENTIAL_FFN) and is_identity(getattr(ffn, 'gamma2', None)),
        'a feed-forward network of another kind, or with a LayerScale',
    )
    return [layer for layer in ffn.layers.modules() if isinstance(layer, nn.Linear)][-1]


def _add_block(writers: List[nn.Module], readers: List[StreamReader], parts: BlockParts, padded: bool = False) -> None:
    """Add the writers and readers of a block; ``padded``: its windows are, between the first norm and ``qkv``."""
    writers += [parts.attention.proj, _last_layer(parts.ffn)]
    readers += [
        StreamReader(parts.norm1, (parts.attention.qkv,), padded=padded),
        StreamReader(parts.norm2, (first_layers(parts.ffn)[0],)),
    ]


def _stream(channels: int, writers: List[nn.Module], tokens: List[nn.Parameter], readers: List[StreamReader]) -> Stream:
    for reader in readers:
        _need(isinstance(reader.norm, nn.LayerNorm), 'a norm that is no LayerNorm')
        _need(
            all(
                isinstance(layer, (nn.Linear, nn.Conv2d)) and getattr(layer, 'groups', 1) == 1
                for layer in reader.layers
            ),
            'a norm that is read by no Linear or Conv2d',
        )
    return Stream('', channels, writers, tokens, readers)


# ---------------------------------------------------------------------- ViT
def _timm_vit(net: nn.Module) -> Stream:
    _need(is_identity(net.norm_pre, net.patch_embed.norm), 'a LayerNorm before the first block')
    _need(
        is_identity(getattr(net, 'attn_pool', None)) and isinstance(net.head, nn.Linear), 'no linear head that reads it'
    )
    norms = [norm for norm in (net.norm, net.fc_norm) if not is_identity(norm)]
    _need(len(norms) == 1, 'not one LayerNorm before the head')
    heads = tuple(head for head in (net.head, getattr(net, 'head_dist', None)) if isinstance(head, nn.Linear))
    writers, readers = [net.patch_embed.proj], [StreamReader(norms[0], heads)]
    for block in net.blocks:
        _need(is_identity(block.ls1, block.ls2), 'a LayerScale')
        _add_block(writers, readers, timm_vit.block_parts(block))
    tokens = [getattr(net, name, None) for name in ('pos_embed', 'cls_token', 'dist_token', 'reg_token')]
    return _stream(net.embed_dim, writers, [token for token in tokens if token is not None], readers)


def _vit(model: nn.Module, net: nn.Module) -> Stream:
    head = getattr(model, 'head', None)
    _need(
        class_named(head, _VIT_HEADS)
        and getattr(model, 'neck', None) is None
        and net.out_type == 'cls_token'
        and net.final_norm
        and list(net.out_indices) == [len(net.layers) - 1],
        'its tokens are read by more than a known head of class tokens',
    )
    _need(is_identity(getattr(net, 'pre_norm', None), net.patch_embed.norm), 'a LayerNorm before the first block')
    linears = [getattr(head.layers, name, None) for name in ('pre_logits', 'head', 'head_dist')]
    behind = linears[:1] if linears[0] is not None else [layer for layer in linears if layer is not None]
    writers, readers = [net.patch_embed.projection], [StreamReader(net.ln1, tuple(behind))]
    for layer in net.layers:
        _need(
            is_identity(layer.attn.gamma1) and not layer.attn.v_shortcut,
            'a LayerScale or a shortcut around the attention',
        )
        _add_block(writers, readers, vit.block_parts(layer))
    tokens = [getattr(net, name, None) for name in ('pos_embed', 'cls_token', 'dist_token')]
    return _stream(net.embed_dims, writers, [token for token in tokens if token is not None], readers)


# ---------------------------------------------------------------------- Swin
def _swin_stage(model: nn.Module, net: nn.Module, number: int) -> Stream:
    _need(number > 0, _BEHIND_A_NORM)
    _need(not getattr(net, 'out_after_downsample', False), 'outputs after the patch merging')
    stage, writers, readers = net.stages[number], [net.stages[number - 1].downsample.reduction], []
    for block in stage.blocks:
        _add_block(writers, readers, swin.block_parts(block), padded=True)
    if stage.downsample is not None:
        readers.append(StreamReader(stage.downsample.norm, (stage.downsample.reduction,), tokens=4, interleaved=True))
    if number in net.out_indices:
        readers.append(
            _output(model, getattr(net, f'norm{number}'), list(net.out_indices).index(number), len(net.out_indices))
        )
    return _stream(writers[0].weight.shape[0], writers, [], readers)


def _timm_swin_stage(net: nn.Module, number: int) -> Stream:
    _need(number > 0, _BEHIND_A_NORM)
    stage, readers = net.layers[number], []
    writers = [stage.downsample.reduction]
    for block in stage.blocks:
        _add_block(writers, readers, timm_vit.block_parts(block), padded=True)
    if number + 1 < len(net.layers):
        merging = net.layers[number + 1].downsample
        readers.append(StreamReader(merging.norm, (merging.reduction,), tokens=4))
    else:
        _need(
            isinstance(getattr(net.head, 'fc', None), nn.Linear) and is_identity(getattr(net.head, 'norm', None)),
            'no linear head that reads it',
        )
        readers.append(StreamReader(net.norm, (net.head.fc,)))
    return _stream(writers[0].weight.shape[0], writers, [], readers)


def _output(model: nn.Module, norm: nn.Module, level: int, levels: int) -> StreamReader:
    """The norm of a stage's output, and who reads the map."""
    neck = getattr(model, 'neck', None)
    if class_named(neck, _FPN):
        _need(neck.add_extra_convs != 'on_input', 'the neck makes further levels of its inputs')
        place = level - neck.start_level
        read = neck.lateral_convs[place : place + 1] if place >= 0 else ()
        return StreamReader(norm, tuple(module.conv for module in read))
    if class_named(neck, _POOLS) and class_named(getattr(model, 'head', None), _LINEAR_HEADS) and levels == 1:
        return StreamReader(norm, (model.head.fc,))
    heads = [getattr(model, 'decode_head', None), *_listed(getattr(model, 'auxiliary_head', None))]
    _need(
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
    _need(
        class_named(head, _FCN_HEADS) and len(read) == 1 and head.num_convs,
        'its output is read by a head that is not known here',
    )
    yield head.convs[0].conv
    if head.concat_input:
        yield head.conv_cat.conv


def _indices(given: Union[int, Sequence[int]], levels: int) -> List[int]:
    return [index % levels for index in ([given] if isinstance(given, int) else given)]
