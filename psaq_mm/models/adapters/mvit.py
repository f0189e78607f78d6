# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""MViT version 2 of mmpretrain: queries, keys and values are pooled by depthwise convolutions (arXiv 2112.01526).

What a relative position adds to a score is a product of the query with an embedding of the vertical distance, and one
of the horizontal distance (section 4.1). These products with parameters stay in floating point, as in SAM's encoder.
"""

from typing import Tuple

from torch import Tensor, nn

from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, Feed, Writer, quantize_outputs
from psaq_mm.models.adapters.products import QuantProductsMixin
from psaq_mm.models.adapters.streams import NamedStreams, need
from psaq_mm.quantization import AdapterSpec, apply_edge, computes_in_float, feeds_activation

__all__ = ['MViT', 'QuantMultiScaleAttentionMixin', 'QuantMultiScaleBlockMixin']

_MODULE = 'mmpretrain.models.backbones.mvit'


class QuantMultiScaleAttentionMixin(QuantProductsMixin):
    """Attention of pooled queries to pooled keys and values."""


class QuantMultiScaleBlockMixin:
    """A block whose two residual sums are edges."""

    def forward(self, x: Tensor, in_size: Tuple[int, int]) -> Tuple[Tensor, Tuple[int, int]]:
        """Tokens (B, H * W, C) of a map to those of another map, and its size."""
        from mmpretrain.models.backbones.mvit import attention_pool

        normed = self.norm1(x)
        branch, out_size = self.attn(normed, in_size)
        skip = self.proj(normed) if self.proj is not None and self.dim_mul_in_attention else x
        if self.pool_skip is not None:
            skip, _ = attention_pool(skip, self.pool_skip, in_size)
        x = apply_edge(self.residual1_quantizer, skip + self.drop_path(branch))
        normed = self.norm2(x)
        skip = self.proj(normed) if self.proj is not None and not self.dim_mul_in_attention else x
        return apply_edge(self.residual2_quantizer, skip + self.drop_path(self.mlp(normed))), out_size


@register_backbone
class MViT(Backbone):
    """MViT of mmpretrain."""

    names = (f'{_MODULE}.MViT',)
    block_path = r'blocks\.\d+'
    blocks = {f'{_MODULE}.MultiScaleBlock': QuantMultiScaleBlockMixin}
    attention = {f'{_MODULE}.MultiScaleAttention': QuantMultiScaleAttentionMixin}

    def convert_attention(self, attention: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_attention`. A norm reads each pooling; what it gives is an edge."""
        for pool in (attention.pool_q, attention.pool_k, attention.pool_v):
            feeds_activation(pool)
        quantize_outputs(attention, name, spec, ['norm_q', 'norm_k', 'norm_v'])
        attention = super().convert_attention(attention, name, spec)
        if attention.rel_pos_spatial:
            computes_in_float(attention, 'products of queries and position embeddings are in floating point')
        return attention

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`. A block that widens the stream projects what one of its norms gives."""
        wider = () if block.proj is None else (block.proj,)
        first, second = (wider, ()) if block.dim_mul_in_attention else ((), wider)
        feeds = Feed(block.norm1, (block.attn.qkv, *first)), Feed(block.norm2, (block.mlp.fc1, *second))
        return BlockParts(feeds, (Writer(block.attn.proj), Writer(block.mlp.fc2)), (block.mlp.fc1,))

    def rotates_heads(self, attention: nn.Module) -> Tuple[bool, bool]:
        """See :meth:`.Backbone.rotates_heads`: depthwise convolutions and norms stand behind the projections."""
        return False, False

    def min_side(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.min_side`: one position of the last map."""
        return self.patch(net) * 2 ** len(net.downscale_indices)

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [('the stream of each scale', lambda: need(False, 'it is pooled to its greatest values'))]
