# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Swin and SegFormer of the library ``transformers``: attention in windows, and attention to a reduced map.

With every quantizer off, the outputs are the library's to the last bit.
"""

import math
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.models.adapters.attention import attend_heads
from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, Feed, Writer, quantize_outputs
from psaq_mm.models.adapters.streams import BEHIND_A_NORM, NamedStreams, Stream, need, stream
from psaq_mm.models.adapters.swin import convert_merging
from psaq_mm.models.adapters.transformers_vit import returns_attention, split_parts
from psaq_mm.models.adapters.windows import Cut, add_scores_edge
from psaq_mm.quantization import (
    AdapterSpec,
    AttentionParts,
    StreamReader,
    apply_edge,
    apply_layer,
    padded,
    row_mask_of,
)

__all__ = ['TransformersSegformer', 'TransformersSwin']

_SWIN, _SEGFORMER = (
    f'transformers.models.{name}.modeling_{name}.{title}'
    for name, title in (('swin', 'Swin'), ('segformer', 'Segformer'))
)


class _SelfMixin:
    """Attention whose three projections stand in its child ``self``."""

    @property
    def inner(self) -> nn.Module:
        """The child ``self``."""
        return self.self

    def attention_parts(self) -> AttentionParts:
        """See :func:`psaq_mm.quantization.attention_parts`."""
        return split_parts(self.inner, self.output.dense)

    def _heads(self, layer: nn.Module, x: Tensor, valid: Optional[Tensor] = None) -> Tensor:
        """(B, N, C) to (B, heads, N, D)."""
        return apply_layer(layer, x, valid).unflatten(-1, (self.inner.num_attention_heads, -1)).transpose(1, 2)


# ---------------------------------------------------------------------- Swin
class QuantSwinAttentionMixin(_SelfMixin):
    """Window attention with three projections, whose two products are :class:`QuantMatMul`."""

    def forward(self, hidden_states: Tensor, attention_mask: Optional[Tensor] = None, *args: Any, **kwargs: Any):
        """Tokens of windows (windows * B, N, C) to a tuple with the same.

        Args:
            hidden_states: Tokens.
            attention_mask: Additive mask of shifted windows, (windows, N, N), or None.
            *args: Head masks are not taken, and attention weights not returned.
            **kwargs: The same.
        """
        inner, padding = self.inner, row_mask_of(self)
        valid = None if padding is None else padding.rows(hidden_states)
        q, k, v = (self._heads(layer, hidden_states, valid) for layer in (inner.query, inner.key, inner.value))
        root = math.sqrt(inner.attention_head_size)

        def weights(scores: Tensor) -> Tensor:
            tokens, index = scores.shape[-1], inner.relative_position_index.flatten()
            bias = inner.relative_position_bias_table[index].view(tokens, tokens, -1).permute(2, 0, 1)
            scores = scores / root + bias.contiguous()[None]
            # Before the mask: its -100 would stretch the range over nothing.
            scores = apply_edge(self.scores_quantizer, scores, None if valid is None else valid[:, None])
            if attention_mask is not None:
                shape = (-1, attention_mask.shape[0])
                scores = (scores.unflatten(0, shape) + attention_mask[None, :, None]).flatten(0, 1)
            return inner.dropout(scores.softmax(dim=-1))

        x = attend_heads(self, q, k, v, weights, valid)
        return (self.output.dropout(apply_layer(self.output.dense, x, valid)),)


class QuantSwinLayerMixin:
    """A Swin layer whose two residual sums are edges, and which tells its attention which rows are padding.

    The library changes window and shift of a layer for good where a map is no larger than a window; here it is asked
    for each map.
    """

    kept_mask: Tuple[Any, Optional[Tensor]] = (None, None)

    def forward(self, hidden_states: Tensor, input_dimensions: Tuple[int, int], *args: Any, **kwargs: Any):
        """(B, H * W, C), and (H, W), to a tuple with (B, H * W, C)."""
        height, width = (int(side) for side in input_dimensions)
        channels, window = hidden_states.shape[2], self.window_size
        shift = int(self.shift_size) if min(height, width) > window else 0
        x = self.layernorm_before(hidden_states).view(-1, height, width, channels)
        x, _ = self.maybe_pad(x, height, width)
        high, wide = height + -height % window, width + -width % window
        x = torch.roll(x, shifts=(-shift, -shift), dims=(1, 2)) if shift else x
        x = x.view(-1, high // window, window, wide // window, window, channels).transpose(2, 3)
        x = x.reshape(-1, window * window, channels)
        mask = self._mask(high, wide, x) if shift else None
        cut = Cut((window, window), (shift, shift))
        with padded(self.attention, cut.valid_rows(height, width, x.device)):
            x = self.attention(x, mask)[0]
        x = x.view(-1, high // window, wide // window, window, window, channels).transpose(2, 3)
        x = x.reshape(-1, high, wide, channels)
        x = torch.roll(x, shifts=(shift, shift), dims=(1, 2)) if shift else x
        x = x[:, :height, :width].reshape(-1, height * width, channels)
        x = apply_edge(self.residual1_quantizer, hidden_states + self.drop_path(x))
        y = self.output(self.intermediate(self.layernorm_after(x)))
        return (apply_edge(self.residual2_quantizer, x + y),)

    def _mask(self, height: int, width: int, like: Tensor) -> Tensor:
        """The library's mask of shifted windows. In an export it is a constant, that of the run before the trace."""
        key, (kept, mask) = (height, width, like.dtype, like.device), self.kept_mask
        if mask is None or kept != key:
            mask = self.get_attn_mask(height, width, like.dtype, like.device)
            self.kept_mask = key, mask
        return mask


@register_backbone
class TransformersSwin(Backbone):
    """SwinModel, and SwinBackbone inside of other models."""

    names = (f'{_SWIN}Model', f'{_SWIN}Backbone')
    block_path = r'encoder\.layers\.\d+\.blocks\.\d+'
    blocks = {f'{_SWIN}Layer': QuantSwinLayerMixin}
    attention = {f'{_SWIN}Attention': QuantSwinAttentionMixin}
    edges = ('embeddings.dropout',)
    others = {f'{_SWIN}PatchMerging': convert_merging}

    def attention_of(self, block: nn.Module) -> Tuple[nn.Module, ...]:
        """See :meth:`.Backbone.attention_of`."""
        return (block.attention,)

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        inner, first = block.attention.self, block.intermediate.dense
        projections = (inner.query, inner.key, inner.value)
        return BlockParts(
            (Feed(block.layernorm_before, projections, padded=True), Feed(block.layernorm_after, (first,))),
            (Writer(block.attention.output.dense), Writer(block.output.dense)),
            (first,),
        )

    def unsupported(self, net: nn.Module) -> Optional[str]:
        """See :meth:`.Backbone.unsupported`."""
        return returns_attention(net)

    def convert_attention(self, attention: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_attention`; its scores are an edge."""
        return add_scores_edge(super().convert_attention(attention, name, spec), name, spec)

    def fixed_size(self, net: nn.Module) -> Optional[Tuple[int, int]]:
        """See :meth:`.Backbone.fixed_size`: absolute positions are not resized."""
        if net.embeddings.position_embeddings is None:
            return None
        height, width = net.embeddings.patch_embeddings.image_size
        return int(height), int(width)

    def min_side(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.min_side`: the map of the last stage is no smaller than a window."""
        stages = net.encoder.layers
        return self.patch(net) * stages[0].blocks[0].window_size * 2 ** (len(stages) - 1)

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        stages = range(len(net.encoder.layers))
        return [(f'the stream of stage {i + 1}', lambda i=i: self._stage(model, net, i)) for i in stages]

    def _stage(self, model: nn.Module, net: nn.Module, number: int) -> Stream:
        need(number > 0, BEHIND_A_NORM)
        stages = net.encoder.layers
        if number + 1 < len(stages):
            merging = stages[number].downsample
            reader = StreamReader(merging.norm, (merging.reduction,), tokens=4)
        else:
            head = getattr(model, 'classifier', None)
            need(isinstance(head, nn.Linear) and hasattr(net, 'layernorm'), 'no linear head that reads it')
            reader = StreamReader(net.layernorm, (head,))
        return stream(stages[number - 1].downsample.reduction, map(self.parts, stages[number].blocks), [reader])


# ---------------------------------------------------------------------- SegFormer
class QuantReducedAttentionMixin(_SelfMixin):
    """Attention to a reduced map, whose two products are :class:`QuantMatMul`."""

    def forward(self, hidden_states: Tensor, height: int, width: int, *args: Any, **kwargs: Any) -> Tuple[Tensor]:
        """(B, H * W, C) to a tuple with (B, H * W, C). Attention weights are not returned."""
        inner, read = self.inner, hidden_states
        if inner.sr_ratio > 1:
            read = inner.sr(read.transpose(1, 2).unflatten(2, (int(height), int(width))))
            read = inner.layer_norm(read.flatten(2).transpose(1, 2))
        q, k, v = self._heads(inner.query, hidden_states), self._heads(inner.key, read), self._heads(inner.value, read)
        root = math.sqrt(inner.attention_head_size)
        x = attend_heads(self, q, k, v, lambda scores: inner.dropout((scores / root).softmax(dim=-1)))
        return (self.output(x, hidden_states),)


class QuantSegformerLayerMixin:
    """A layer of SegFormer whose two residual sums are edges."""

    def forward(self, hidden_states: Tensor, height: int, width: int, *args: Any, **kwargs: Any) -> Tuple[Tensor]:
        """(B, H * W, C) to a tuple with (B, H * W, C)."""
        x = self.drop_path(self.attention(self.layer_norm_1(hidden_states), height, width)[0])
        x = apply_edge(self.residual1_quantizer, x + hidden_states)
        y = self.drop_path(self.mlp(self.layer_norm_2(x), height, width))
        return (apply_edge(self.residual2_quantizer, y + x),)


def _embeddings_are_edges(net: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    paths: List[str] = [f'encoder.patch_embeddings.{i}.layer_norm' for i in range(len(net.encoder.patch_embeddings))]
    quantize_outputs(net, name, spec, paths)
    return net


@register_backbone
class TransformersSegformer(Backbone):
    """SegformerModel."""

    names = (f'{_SEGFORMER}Model',)
    block_path = r'encoder\.block\.\d+\.\d+'
    blocks = {f'{_SEGFORMER}Layer': QuantSegformerLayerMixin}
    attention = {f'{_SEGFORMER}Attention': QuantReducedAttentionMixin}
    others = {f'{_SEGFORMER}Model': _embeddings_are_edges}

    def attention_of(self, block: nn.Module) -> Tuple[nn.Module, ...]:
        """See :meth:`.Backbone.attention_of`."""
        return (block.attention,)

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`. The activation is behind the depthwise convolution."""
        inner, mlp = block.attention.self, block.mlp
        reduces = inner.sr_ratio > 1
        read = (inner.query, inner.sr) if reduces else (inner.query, inner.key, inner.value)
        return BlockParts(
            (Feed(block.layer_norm_1, read), Feed(block.layer_norm_2, (mlp.dense1,))),
            (Writer(block.attention.output.dense), Writer(mlp.dense2)),
            (mlp.dwconv.dwconv,),
            (Feed(inner.layer_norm, (inner.key, inner.value)),) if reduces else (),
        )

    def unsupported(self, net: nn.Module) -> Optional[str]:
        """See :meth:`.Backbone.unsupported`."""
        return returns_attention(net)

    def min_side(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.min_side`: every reduced map has a position."""
        strides, ratios = net.config.strides, net.config.sr_ratios
        return max(math.prod(strides[: i + 1]) * ratio for i, ratio in enumerate(ratios))

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`: each stage begins behind a LayerNorm."""
        stages = range(len(net.encoder.block))
        return [(f'the stream of stage {i + 1}', lambda: need(False, BEHIND_A_NORM)) for i in stages]
