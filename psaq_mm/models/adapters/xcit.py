# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""XCiT of mmpretrain: attention among channels, convolutions among neighbours, and attention of the class token.

In cross-covariance attention (XCiT, arXiv 2106.09681, section 3.2) the scores are products of normalized queries and
keys over all tokens, one for each pair of channels of a head. The last blocks have attention whose only query is the
class token (CaiT, arXiv 2103.17239, section 3.2).
"""

from typing import Tuple

from torch import Tensor, nn

from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import (
    BlockParts,
    Feed,
    Writer,
    feed_forward,
    join,
    layer_scale,
    quantize_outputs,
    standard_parts,
)
from psaq_mm.models.adapters.match import class_named
from psaq_mm.models.adapters.products import QuantProductsMixin
from psaq_mm.models.adapters.streams import NamedStreams, need
from psaq_mm.quantization import AdapterSpec, apply_edge, edge_quantizer, keep_float

__all__ = ['QuantClassAttentionMixin', 'QuantCrossCovarianceMixin', 'QuantXCABlockMixin', 'XCiT']

_MODULE = 'mmpretrain.models.backbones.xcit'
_CLASS_BLOCK = f'{_MODULE}.ClassAttentionBlock'


class QuantCrossCovarianceMixin(QuantProductsMixin):
    """Cross-covariance attention: ``q @ k.T`` is over tokens, and the weights multiply channels."""


class QuantClassAttentionMixin(QuantProductsMixin):
    """Attention of the class token to all tokens. It has one query: patch similarity cannot be measured in it."""


class QuantXCABlockMixin:
    """A block whose three residual sums are edges."""

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        """(B, H * W, C) to (B, H * W, C)."""
        x = apply_edge(self.residual1_quantizer, x + self.drop_path(self.gamma1 * self.attn(self.norm1(x))))
        x = x + self.drop_path(self.gamma3 * self.local_mp(self.norm3(x), H, W))
        x = apply_edge(self.residual3_quantizer, x)
        x = x + self.drop_path(self.gamma2 * self.ffn(self.norm2(x), identity=0))
        return apply_edge(self.residual2_quantizer, x)


def _convert_network(net: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    quantize_outputs(net, name, spec, ['pos_drop'])
    if net.use_pos_embed:
        keep_float(net.pos_embed, 'a constant of the size')
    return net


@register_backbone
class XCiT(Backbone):
    """XCiT of mmpretrain."""

    names = (f'{_MODULE}.XCiT',)
    block_path = r'(xca|ca)_layers\.\d+'
    blocks = {f'{_MODULE}.XCABlock': QuantXCABlockMixin, _CLASS_BLOCK: None}
    attention = {
        f'{_MODULE}.XCA': QuantCrossCovarianceMixin,
        f'{_MODULE}.ClassAttntion': QuantClassAttentionMixin,
    }
    others = dict.fromkeys(names, _convert_network)

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`. The norms of class blocks are read by the stream as well: nothing is folded."""
        scale1, scale2 = (gamma if isinstance(gamma, nn.Parameter) else None for gamma in (block.gamma1, block.gamma2))
        if class_named(block, (_CLASS_BLOCK,)):
            network, attention = feed_forward(block.ffn), block.attn
            feeds = (Feed(block.norm1, (attention.q, attention.k, attention.v)),)
            return BlockParts(feeds, (Writer(attention.proj, scale1), Writer(network.last, scale2)), network.hidden)
        parts = standard_parts(block.norm1, block.attn, block.norm2, block.ffn, scale1, scale2)
        local = block.local_mp
        return parts._replace(
            feeds=(*parts.feeds, Feed(block.norm3, (local.conv1.conv,))),
            writers=(*parts.writers, Writer(local.conv2.conv, layer_scale(block.gamma3))),
        )

    def convert_block(self, block: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_block`; a block of cross-covariance attention has a third residual sum."""
        block = super().convert_block(block, name, spec)
        if isinstance(block, QuantXCABlockMixin):
            block.residual3_quantizer = edge_quantizer(spec, join(name, 'residual3'))
        return block

    def rotates_heads(self, attention: nn.Module) -> Tuple[bool, bool]:
        """See :meth:`.Backbone.rotates_heads`: a rotation would mix the channels that are attended to."""
        return False, False

    def patch(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.patch`: a patch is embedded by several convolutions."""
        return net.patch_embed.patch_size

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [('the stream', lambda: need(False, 'depthwise convolutions read its channels one by one'))]
