# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""EdgeNeXt of mmpretrain (arXiv 2206.10589, section 3.1): blocks of ConvNeXt, and at the end of most stages one with
attention among channels behind depthwise convolutions of groups of channels.
"""

from typing import Tuple

from torch import nn

from psaq_mm.models.adapters.backbone import register_backbone
from psaq_mm.models.adapters.blocks import (
    BlockParts,
    Feed,
    Writer,
    mark_norm,
    mark_parts,
    quantize_outputs,
)
from psaq_mm.models.adapters.convnext import ConvNeXt
from psaq_mm.models.adapters.match import class_named
from psaq_mm.models.adapters.xcit import QuantCrossCovarianceMixin
from psaq_mm.quantization import AdapterSpec, feeds_activation, keep_float, quantize_output_

__all__ = ['EdgeNeXt']

_MODULE = 'mmpretrain.models.backbones.edgenext'
_ENCODER = f'{_MODULE}.SDTAEncoder'


def _convert_network(net: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    """The stem ends in a LayerNorm, which the first block reads, and each later stage begins with one."""
    stem, *others = net.downsample_layers
    feeds_activation(stem[0])
    quantize_outputs(net, name, spec, ['downsample_layers.0.1'])
    for downsample in others:
        mark_norm(*downsample)
    return net


def _convert_positions(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    keep_float(module, 'a constant of the size')
    return module


@register_backbone
class EdgeNeXt(ConvNeXt):
    """EdgeNeXt of mmpretrain."""

    names = (f'{_MODULE}.EdgeNeXt',)
    block_path = r'stages\.\d+\.\d+'
    blocks = {**ConvNeXt.blocks, _ENCODER: None}
    attention = {'mmpretrain.models.utils.attention.ChannelMultiheadAttention': QuantCrossCovarianceMixin}
    others = {
        **dict.fromkeys(names, _convert_network),
        'mmpretrain.models.utils.position_encoding.PositionEncodingFourier': _convert_positions,
    }

    def describes(self, net: nn.Module) -> bool:
        """See :meth:`.Backbone.describes`."""
        return class_named(net, self.names) is not None

    def attention_of(self, block: nn.Module) -> Tuple[nn.Module, ...]:
        """See :meth:`.Backbone.attention_of`."""
        return (block.csa,) if class_named(block, (_ENCODER,)) else ()

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`. The norms read a branch, not the stream."""
        if not class_named(block, (_ENCODER,)):
            return super().parts(block)
        inner = Feed(block.norm_csa, (block.csa.qkv,)), Feed(block.norm, (block.pointwise_conv1,))
        return BlockParts((), (Writer(block.pointwise_conv2, block.gamma),), (block.pointwise_conv1,), inner)

    def convert_block(self, block: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_block`; its last sum is an edge."""
        if not class_named(block, (_ENCODER,)):
            return super().convert_block(block, name, spec)
        mark_parts(self.parts(block))
        return quantize_output_(block, name, spec)

    def rotates_heads(self, attention: nn.Module) -> Tuple[bool, bool]:
        """See :meth:`.Backbone.rotates_heads`: a rotation would mix the channels that are attended to."""
        return False, False
