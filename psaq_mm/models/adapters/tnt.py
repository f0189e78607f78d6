# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""TNT of mmpretrain: in each layer one transformer block over the pixels of each patch, one over the patches.

The pixels of a patch are joined, projected and added to the token of their patch (Transformer in Transformer, arXiv
2103.00112, section 2.2). Patch similarity is measured in the outer blocks alone: the tokens of an inner block are parts
of one patch.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import (
    BlockParts,
    Feed,
    feed_forward,
    join,
    mark_norm,
    outputs_are_edges,
    standard_parts,
)
from psaq_mm.models.adapters.packed_attention import QuantPackedAttentionMixin, adopt_packed
from psaq_mm.models.adapters.streams import BEHIND_A_NORM, NamedStreams, need
from psaq_mm.quantization import AdapterSpec, adopt, apply_edge, edge_quantizer

__all__ = ['QuantTNTBlockMixin', 'QuantTNTLayerMixin', 'TNT']

_EDGES = outputs_are_edges('pixel_embed', 'norm2_proj', 'drop_after_pos')


class QuantTNTBlockMixin:
    """A transformer block whose two residual sums are edges."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        x = apply_edge(self.residual1_quantizer, self.attn(self.norm_attn(x), identity=x))
        return apply_edge(self.residual2_quantizer, self.ffn(self.norm_ffn(x), identity=x))


class QuantTNTLayerMixin:
    """A layer whose sum of patches and projected pixels is an edge. It leaves its inputs as they are, where the
    library's adds to them in place: calibration reads them again.
    """

    def forward(self, pixels: Tensor, patches: Tensor) -> Tuple[Tensor, Tensor]:
        """Pixels (B * N, pixels of a patch, inner C) and tokens (B, 1 + N, outer C), of the same shapes."""
        pixels = self.inner_block(pixels)
        joined = self.norm_proj(pixels).reshape(patches.shape[0], patches.shape[1] - 1, -1)
        patches = torch.cat((patches[:, :1], patches[:, 1:] + self.projection(joined)), dim=1)
        return pixels, self.outer_block(apply_edge(self.sum_quantizer, patches))


class _InnerAttentionMixin(QuantPackedAttentionMixin):
    """Attention over the pixels of one patch: it has no part in patch similarity."""

    def attention_parts(self) -> None:
        """See :func:`psaq_mm.quantization.attention_parts`."""
        return None


def _convert_layer(layer: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    layer = adopt(layer, QuantTNTLayerMixin)
    layer.sum_quantizer = edge_quantizer(spec, join(name, 'sum'))
    return layer


def _convert_network(net: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    mark_norm(net.norm1_proj, net.projection)
    return _EDGES(net, name, spec)


@register_backbone
class TNT(Backbone):
    """TNT of mmpretrain."""

    names = ('mmpretrain.models.backbones.tnt.TNT',)
    block_path = r'layers\.\d+\.(inner|outer)_block'
    blocks = {'mmpretrain.models.backbones.tnt.TransformerBlock': QuantTNTBlockMixin}
    attention = {'mmcv.cnn.bricks.transformer.MultiheadAttention': None}  # converted with its block
    others = {
        'mmpretrain.models.backbones.tnt.TnTLayer': _convert_layer,
        'mmpretrain.models.backbones.tnt.TNT': _convert_network,
    }

    def convert_block(self, block: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_block`."""
        mixin = _InnerAttentionMixin if name.endswith('inner_block') else QuantPackedAttentionMixin
        adopt_packed(block.attn.attn, join(name, 'attn.attn'), spec, ('qkv',), mixin)
        return super().convert_block(block, name, spec)

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        attention = block.attn.attn
        if not isinstance(attention, _InnerAttentionMixin):
            return standard_parts(block.norm_attn, attention, block.norm_ffn, block.ffn)
        network = feed_forward(block.ffn)
        feeds = (Feed(block.norm_attn, (attention.qkv,)), Feed(block.norm_ffn, network.first))
        return BlockParts(feeds, (), network.hidden)

    def prefix_tokens(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.prefix_tokens`."""
        return 1

    def patch(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.patch`."""
        return net.pixel_embed.proj.stride[0] * net.pixel_embed.new_patch_size[0]

    def fixed_size(self, net: nn.Module) -> Optional[Tuple[int, int]]:
        """See :meth:`.Backbone.fixed_size`."""
        return tuple(net.pixel_embed.img_size)

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [
            ('the stream of patches', lambda: need(False, BEHIND_A_NORM)),
            ('the stream of pixels', lambda: need(False, 'its tokens are normalized one by one and read joined')),
        ]
