# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""MViT of mmpretrain (MViTv2, arXiv 2112.01526, section 4): convolutions pool queries, keys and values of each head.

What a relative position adds to a score is a product of the query with an embedding of the vertical distance, and one
of the horizontal distance. These products with parameters stay in floating point, as for SAM's encoder.
"""

from typing import Tuple

from torch import nn

from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, Feed, Writer
from psaq_mm.models.adapters.products import QuantProductsMixin
from psaq_mm.models.adapters.streams import NamedStreams, need
from psaq_mm.quantization import AdapterSpec, computes_in_float

__all__ = ['MViT', 'QuantPooledAttentionMixin']

_MODULE = 'mmpretrain.models.backbones.mvit'


class QuantPooledAttentionMixin(QuantProductsMixin):
    """Attention of pooled tokens."""


@register_backbone
class MViT(Backbone):
    """MViT of mmpretrain."""

    names = (f'{_MODULE}.MViT',)
    block_path = r'blocks\.\d+'
    blocks = {f'{_MODULE}.MultiScaleBlock': None}
    attention = {f'{_MODULE}.MultiScaleAttention': QuantPooledAttentionMixin}

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`. Where the width changes, a projection of the shortcut reads a norm as well."""
        attention, mlp = block.attn, block.mlp
        shortcut = () if block.proj is None else (block.proj,)
        first, second = (shortcut, ()) if block.dim_mul_in_attention else ((), shortcut)
        feeds = Feed(block.norm1, (attention.qkv, *first)), Feed(block.norm2, (mlp.fc1, *second))
        return BlockParts(feeds, (Writer(attention.proj), Writer(mlp.fc2)), (mlp.fc1,))

    def convert_attention(self, attention: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_attention`."""
        attention = super().convert_attention(attention, name, spec)
        if attention.rel_pos_spatial:
            computes_in_float(attention, 'products of queries with embeddings of distances stay in floating point')
        return attention

    def rotates_heads(self, attention: nn.Module) -> Tuple[bool, bool]:
        """See :meth:`.Backbone.rotates_heads`: depthwise convolutions pool the channels of a head one by one."""
        return False, False

    def min_side(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.min_side`: one position of the last map."""
        return self.patch(net) * 2 ** len(net.downscale_indices)

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [
            ('the stream of each stage', lambda: need(False, 'a pooling of the shortcut reads its channels one by one'))
        ]
