# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""SAM's image encoder of mmpretrain: windowed attention with padding, and decomposed relative positions.

What a relative position adds to a score is a product of the query with an embedding of the vertical distance, and one
of the horizontal distance (MViTv2, arXiv 2112.01526, section 4.1). These products with parameters stay in floating
point: they are short, and no runtime has an integer kernel for them.
"""

from typing import List, Tuple

from torch import Tensor, nn

from psaq_mm.models.adapters.attention import attend
from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, standard_parts
from psaq_mm.models.adapters.streams import NamedStreams, need
from psaq_mm.models.adapters.windows import add_scores_edge, fill_padding, valid_query_rows
from psaq_mm.quantization import AdapterSpec, apply_edge, apply_layer, computes_in_float, padded, row_mask_of

__all__ = ['QuantSAMAttentionMixin', 'QuantSAMLayerMixin', 'ViTSAM']

_MODULE = 'mmpretrain.models.backbones.vit_sam'


class QuantSAMAttentionMixin:
    """Attention of a map or of windows, whose two matrix products are :class:`QuantMatMul`, and which knows its padded
    rows.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        batch, height, width, _ = x.shape
        padding, unscaled = row_mask_of(self), []
        x = x.reshape(batch, height * width, -1)
        valid = None if padding is None else padding.rows(x)
        if valid is not None:
            x = fill_padding(x, valid, self.qkv)

        def scaled(q: Tensor, k: Tensor) -> Tuple[Tensor, Tensor]:
            unscaled.append(q)
            return q * self.scale, k

        def weights(scores: Tensor) -> Tensor:
            scores = self._add_positions(scores, unscaled, (height, width))
            return apply_edge(self.scores_quantizer, scores, None if valid is None else valid[:, None]).softmax(dim=-1)

        x, _ = attend(self, x, scaled, weights, valid)
        return apply_layer(self.proj, x, valid).reshape(batch, height, width, -1)

    def _add_positions(self, scores: Tensor, queries: List[Tensor], size: Tuple[int, int]) -> Tensor:
        """Scores (B, heads, N, N) with what the relative positions add, for queries (B, heads, N, D)."""
        if not self.use_rel_pos:
            return scores
        from mmpretrain.models.backbones.vit_sam import add_decomposed_rel_pos

        (q,) = queries
        added = add_decomposed_rel_pos(
            scores.flatten(0, 1), q.flatten(0, 1), self.rel_pos_h, self.rel_pos_w, size, size
        )
        return added.reshape(scores.shape)


class QuantSAMLayerMixin:
    """A layer whose two residual sums are edges, and which tells its attention which rows are padding."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        x = apply_edge(self.residual1_quantizer, x + self._attend(self.ln1(x)))
        return apply_edge(self.residual2_quantizer, self.ffn(self.ln2(x), identity=x))

    def _attend(self, x: Tensor) -> Tensor:
        if not self.window_size:
            return self.attn(x)
        from mmpretrain.models.backbones.vit_sam import window_partition, window_unpartition

        size = tuple(int(side) for side in x.shape[1:3])  # plain numbers also in a trace
        windows, padded_size = window_partition(x, self.window_size)
        with padded(self.attn, valid_query_rows(*size, self.window_size, device=x.device)):
            windows = self.attn(windows)
        return window_unpartition(windows, self.window_size, padded_size, size)


@register_backbone
class ViTSAM(Backbone):
    """ViTSAM of mmpretrain."""

    names = (f'{_MODULE}.ViTSAM',)
    block_path = r'layers\.\d+'
    blocks = {f'{_MODULE}.TransformerEncoderLayer': QuantSAMLayerMixin}
    attention = {f'{_MODULE}.Attention': QuantSAMAttentionMixin}
    edges = ('drop_after_pos',)

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        return standard_parts(block.ln1, block.attn, block.ln2, block.ffn, padded=block.window_size > 0)

    def convert_attention(self, attention: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_attention`; its scores are an edge."""
        attention = add_scores_edge(super().convert_attention(attention, name, spec), name, spec)
        if attention.use_rel_pos:
            computes_in_float(attention, 'products of queries with embeddings of distances stay in floating point')
        return attention

    def min_side(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.min_side`: one patch, as windows are padded and some layers have none."""
        return self.patch(net)

    def rotates_heads(self, attention: nn.Module) -> Tuple[bool, bool]:
        """See :meth:`.Backbone.rotates_heads`: relative positions read the queries."""
        return not attention.use_rel_pos, True

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [('the stream', lambda: need(False, 'it is an output of the backbone, which no LayerNorm reads'))]
