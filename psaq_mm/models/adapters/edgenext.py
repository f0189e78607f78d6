# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""EdgeNeXt of mmpretrain: blocks of ConvNeXt, and in the later stages attention among channels.

The block with attention (SDTA, arXiv 2206.10589, section 3.1) has depthwise convolutions of groups of channels, one
after the other, cross-covariance attention, and the feed-forward network of ConvNeXt.
"""

from typing import Dict, Optional, Tuple

from torch import nn

from psaq_mm.models.adapters.backbone import register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, Feed, Writer
from psaq_mm.models.adapters.convnext import ConvNeXt, QuantConvNeXtBlockMixin
from psaq_mm.models.adapters.match import class_named
from psaq_mm.models.adapters.products import QuantProductsMixin
from psaq_mm.quantization import AdapterSpec, ConvertFn, keep_float

__all__ = ['EdgeNeXt', 'QuantChannelAttentionMixin']

_MODULE = 'mmpretrain.models.backbones.edgenext'
_CONVOLUTIONS = 'mmpretrain.models.backbones.convnext.ConvNeXtBlock'


class QuantChannelAttentionMixin(QuantProductsMixin):
    """Attention of each channel of a head to the channels of that head."""


def _convert_positions(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    keep_float(module, 'position encoding: a constant of the size')
    return module


@register_backbone
class EdgeNeXt(ConvNeXt):
    """EdgeNeXt of mmpretrain."""

    names = (f'{_MODULE}.EdgeNeXt',)
    blocks = dict.fromkeys((_CONVOLUTIONS, f'{_MODULE}.SDTAEncoder'), QuantConvNeXtBlockMixin)
    attention = {'mmpretrain.models.utils.attention.ChannelMultiheadAttention': QuantChannelAttentionMixin}
    others: Dict[str, ConvertFn] = {
        names[0]: ConvNeXt.others[ConvNeXt.names[0]],
        'mmpretrain.models.utils.position_encoding.PositionEncodingFourier': _convert_positions,
    }

    def describes(self, net: nn.Module) -> bool:
        """See :meth:`.Backbone.describes`."""
        return class_named(net, self.names) is not None

    def unsupported(self, net: nn.Module) -> Optional[str]:
        """See :meth:`.Backbone.unsupported`. Its first layer would not be the one that reads the picture."""
        if net.use_pos_embd_global:
            return 'it encodes positions before its first stage; build it with use_pos_embd_global=False'
        return None

    def attention_of(self, block: nn.Module) -> Tuple[nn.Module, ...]:
        """See :meth:`.Backbone.attention_of`."""
        return (block.csa,) if hasattr(block, 'csa') else ()

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`. The norms read a branch, not the stream."""
        if not hasattr(block, 'csa'):
            return super().parts(block)
        inner = Feed(block.norm_csa, (block.csa.qkv,)), Feed(block.norm, (block.pointwise_conv1,))
        return BlockParts((), (Writer(block.pointwise_conv2, block.gamma),), (block.pointwise_conv1,), inner)

    def rotates_heads(self, attention: nn.Module) -> Tuple[bool, bool]:
        """See :meth:`.Backbone.rotates_heads`: a rotation would mix the channels that are attended to."""
        return False, False
