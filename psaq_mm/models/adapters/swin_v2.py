# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Swin Transformer V2 of mmpretrain: cosine attention, a position bias that an MLP computes, norms behind the layers.

Swin V2 (arXiv 2111.09883) differs from Swin in three things that matter here. Queries and keys are normalized before
their product, which is scaled by a learned factor of each head (section 3.3). The position bias is what a small MLP
gives for the logarithm of a distance (section 3.3): it depends on the window's size alone, is a constant of it, and
stays in floating point. Each LayerNorm comes at the end of its branch (res-post-norm, section 3.2), so that none feeds
a layer.
"""

import math
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.models.adapters.attention import CheckpointedBlockMixin
from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, feed_forward, quantize_outputs
from psaq_mm.models.adapters.split_bias import SplitBiasProjection
from psaq_mm.models.adapters.streams import NamedStreams, need
from psaq_mm.models.adapters.swin import convert_merging, convert_shift, cuts_any_size, smallest_side
from psaq_mm.models.adapters.windows import PositionBias, WindowAttentionMixin, add_scores_edge
from psaq_mm.quantization import AdapterSpec, apply_edge, keep_float

__all__ = [
    'CosineWindowAttentionMixin',
    'QuantSwinBlockV2Mixin',
    'SwinV2',
    'convert_cosine_attention',
    'post_norm_parts',
    'post_norm_streams',
]

GREATEST_SCALE = math.log(1 / 0.01)  # of the scores, as a logarithm


class CosineWindowAttentionMixin(WindowAttentionMixin):
    """Window attention of Swin V2, with ``logit_scale`` and ``cpb_mlp``; ``qkv`` is a :class:`.SplitBiasProjection`."""

    query_factor = None

    def scaled(self, q: Tensor, k: Tensor) -> Tuple[Tensor, Tensor]:
        """See :meth:`.WindowAttentionMixin.scaled`. A rotation of queries and keys keeps their lengths."""
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1)

    def scaled_scores(self, scores: Tensor) -> Tensor:
        """See :meth:`.WindowAttentionMixin.scaled_scores`."""
        return scores * torch.clamp(self.logit_scale, max=GREATEST_SCALE).exp()

    def position_bias(self) -> PositionBias:
        """See :meth:`.WindowAttentionMixin.position_bias`."""
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        return PositionBias(table.t(), self.relative_position_index)

    def position_values(self, table: Tensor) -> Tensor:
        """See :meth:`.WindowAttentionMixin.position_values`."""
        return 16 * torch.sigmoid(table)


class QuantSwinBlockV2Mixin(CheckpointedBlockMixin):
    """A Swin V2 block whose two residual sums are edges."""

    def _block(self, x: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
        x = apply_edge(self.residual1_quantizer, self.norm1(self.attn(x, hw_shape)) + x)
        x = apply_edge(self.residual2_quantizer, self.norm2(self.ffn(x)) + x)
        return self.norm3(x) if self.extra_norm else x


def convert_cosine_attention(attention: nn.Module) -> nn.Module:
    """Finish the conversion of cosine attention: its projection becomes a layer that is called, its MLP stays float."""
    attention.qkv = SplitBiasProjection(attention)
    keep_float(attention.cpb_mlp, "position bias: a constant of the window's size")
    return attention


def post_norm_parts(ffn: nn.Module) -> BlockParts:
    """Parts of a block whose norms come behind its layers: none feeds one, and none reads the stream."""
    return BlockParts((), (), feed_forward(ffn).hidden)


def post_norm_streams() -> NamedStreams:
    """The streams of such blocks."""
    return [('the streams', lambda: need(False, 'a LayerNorm stands between each branch and the stream'))]


@register_backbone
class SwinV2(Backbone):
    """SwinTransformerV2 of mmpretrain."""

    names = ('mmpretrain.models.backbones.swin_transformer_v2.SwinTransformerV2',)
    post_norm = True
    block_path = r'stages\.\d+\.blocks\.\d+'
    blocks = {'mmpretrain.models.backbones.swin_transformer_v2.SwinBlockV2': QuantSwinBlockV2Mixin}
    attention = {'mmpretrain.models.utils.attention.WindowMSAV2': CosineWindowAttentionMixin}
    edges = ('drop_after_pos',)
    others = {
        'mmpretrain.models.utils.attention.ShiftWindowMSA': convert_shift,
        'mmpretrain.models.utils.embed.PatchMerging': convert_merging,
    }

    def attention_of(self, block: nn.Module) -> Tuple[nn.Module, ...]:
        """See :meth:`.Backbone.attention_of`."""
        return (block.attn.w_msa,)

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        return post_norm_parts(block.ffn)

    def convert_block(self, block: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_block`; the outputs of the norms are edges."""
        quantize_outputs(block, name, spec, ('norm1', 'norm2', 'norm3'))
        return super().convert_block(block, name, spec)

    def convert_attention(self, attention: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_attention`; its scores are an edge."""
        attention = add_scores_edge(super().convert_attention(attention, name, spec), name, spec)
        return convert_cosine_attention(attention)

    def min_side(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.min_side`."""
        return smallest_side(net, self.patch(net)) or super().min_side(net)

    def dynamic_size(self, net: nn.Module) -> bool:
        """See :meth:`.Backbone.dynamic_size`."""
        return cuts_any_size(net)

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return post_norm_streams()
