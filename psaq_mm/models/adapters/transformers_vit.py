# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""ViT, DeiT and DINOv2 of the library ``transformers``.

Queries, keys and values are three layers there, and a block returns a tuple. With every quantizer off, the output is
that of the library's eager attention to the last bit, and that of its fused one to rounding.
"""

import math
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.models.adapters.attention import attend_heads
from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, Feed, Writer, layer_scale
from psaq_mm.models.adapters.streams import NamedStreams, Stream, need, stream
from psaq_mm.quantization import AdapterSpec, AttentionParts, Projection, StreamReader, adopt, apply_edge

__all__ = ['Dinov2', 'QuantSplitAttentionMixin', 'TransformersVit', 'returns_attention', 'split_parts']

_VIT, _DEIT, _DINOV2 = (
    f'transformers.models.{name}.modeling_{name}.{title}'
    for name, title in (('vit', 'ViT'), ('deit', 'DeiT'), ('dinov2', 'Dinov2'))
)


def split_parts(inner: nn.Module, proj: nn.Module) -> AttentionParts:
    """Parts of attention with the layers ``query``, ``key`` and ``value``.

    Args:
        inner: Holds the three layers.
        proj: Output projection.
    """
    queries, keys, values = (
        Projection(layer, 0, layer.weight.shape[0]) for layer in (inner.query, inner.key, inner.value)
    )
    return AttentionParts(inner.num_attention_heads, queries, keys, values, proj)


class QuantSplitAttentionMixin:
    """Self-attention with three projections, whose two products are :class:`QuantMatMul`."""

    def attention_parts(self) -> AttentionParts:
        """See :func:`psaq_mm.quantization.attention_parts`."""
        return split_parts(self.attention, self.output.dense)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tuple[Tensor]:
        """(B, N, C) to a tuple with (B, N, C). Head masks are not taken, and attention weights not returned."""
        inner = self.attention
        q, k, v = (
            layer(hidden_states).unflatten(-1, (inner.num_attention_heads, -1)).transpose(1, 2)
            for layer in (inner.query, inner.key, inner.value)
        )
        root = math.sqrt(inner.attention_head_size)
        rate = getattr(inner.dropout, 'p', 0.0) if hasattr(inner, 'dropout') else 0.0

        def weights(scores: Tensor) -> Tensor:
            return F.dropout((scores / root).softmax(dim=-1), rate, self.training)

        return (self.output(attend_heads(self, q, k, v, weights), hidden_states),)


class QuantVitLayerMixin:
    """A layer of ViT and DeiT whose two residual sums are edges."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tuple[Tensor]:
        """(B, N, C) to a tuple with (B, N, C)."""
        x = self.attention(self.layernorm_before(hidden_states))[0] + hidden_states
        x = apply_edge(self.residual1_quantizer, x)
        # The second sum stands in `output`.
        x = self.output(self.intermediate(self.layernorm_after(x)), x)
        return (apply_edge(self.residual2_quantizer, x),)


class QuantDinov2LayerMixin:
    """A layer of DINOv2 whose two residual sums are edges."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tuple[Tensor]:
        """(B, N, C) to a tuple with (B, N, C)."""
        x = self.layer_scale1(self.attention(self.norm1(hidden_states))[0])
        x = apply_edge(self.residual1_quantizer, self.drop_path(x) + hidden_states)
        y = self.layer_scale2(self.mlp(self.norm2(x)))
        return (apply_edge(self.residual2_quantizer, self.drop_path(y) + x),)


class KeptPositionsMixin:
    """DINOv2's embeddings, whose positions are a constant of the graph in an export.

    The library resizes them anew in each trace, to the size that they have already. An export runs a model before it
    traces it: what that run had is kept.
    """

    kept_positions: Tuple[Tuple[int, int], Optional[Tensor]] = ((0, 0), None)

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Positions (1, N, C) for a picture of a size, in pixels."""
        size, (kept_size, kept) = (int(height), int(width)), self.kept_positions
        if torch.jit.is_tracing() and kept is not None and kept_size == size:
            return kept
        positions = super().interpolate_pos_encoding(embeddings, height, width)
        self.kept_positions = size, positions.detach()
        return positions


def _keep_positions(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    return adopt(module, KeptPositionsMixin)


def returns_attention(net: nn.Module) -> Optional[str]:
    """Why a network of transformers is not supported that returns attention weights; None for one that does not."""
    if getattr(net.config, 'output_attentions', False):
        return 'its config has output_attentions=True, and a quantized layer returns no attention weights'
    return None


class _WithEmbeddings(Backbone):
    """What the networks here share: ``embeddings`` with patches, a list of layers, one norm behind them."""

    block_path = r'encoder\.layer\.\d+'
    edges = ('embeddings.dropout',)

    def attention_of(self, block: nn.Module) -> Tuple[nn.Module, ...]:
        """See :meth:`.Backbone.attention_of`."""
        return (block.attention,)

    def unsupported(self, net: nn.Module) -> Optional[str]:
        """See :meth:`.Backbone.unsupported`."""
        return returns_attention(net)

    def prefix_tokens(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.prefix_tokens`."""
        return sum(getattr(net.embeddings, name, None) is not None for name in ('cls_token', 'distillation_token'))

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [('the stream', lambda: self._stream(model, net))]

    def _stream(self, model: nn.Module, net: nn.Module) -> Stream:
        need(getattr(net, 'pooler', None) is None and model is not net, 'its tokens are read by a pooler')
        names = ('classifier', 'cls_classifier', 'distillation_classifier')
        found = [getattr(model, name, None) for name in names]
        heads = tuple(head for head in found if isinstance(head, nn.Linear))
        need(heads, 'no linear head that reads it')
        embeddings = net.embeddings
        tokens = [
            getattr(embeddings, name, None) for name in ('position_embeddings', 'cls_token', 'distillation_token')
        ]
        width = net.layernorm.weight.shape[0]
        need(heads[0].in_features == width, 'a head that reads two tokens side by side')
        reader = StreamReader(net.layernorm, heads)
        return stream(embeddings.patch_embeddings.projection, map(self.parts, net.encoder.layer), [reader], tokens)


@register_backbone
class TransformersVit(_WithEmbeddings):
    """ViTModel and DeiTModel."""

    names = (f'{_VIT}Model', f'{_DEIT}Model')
    blocks = {f'{name}Layer': QuantVitLayerMixin for name in (_VIT, _DEIT)}
    attention = {f'{name}Attention': QuantSplitAttentionMixin for name in (_VIT, _DEIT)}

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        attention, first = block.attention, block.intermediate.dense
        projections = (attention.attention.query, attention.attention.key, attention.attention.value)
        return BlockParts(
            (Feed(block.layernorm_before, projections), Feed(block.layernorm_after, (first,))),
            (Writer(attention.output.dense), Writer(block.output.dense)),
            (first,),
        )

    def fixed_size(self, net: nn.Module) -> Optional[Tuple[int, int]]:
        """See :meth:`.Backbone.fixed_size`; positions are resized only where a call asks for it."""
        height, width = net.embeddings.patch_embeddings.image_size
        return int(height), int(width)


@register_backbone
class Dinov2(_WithEmbeddings):
    """Dinov2Model, which resizes its positions to every picture."""

    names = (f'{_DINOV2}Model',)
    blocks = {f'{_DINOV2}Layer': QuantDinov2LayerMixin}
    attention = {f'{_DINOV2}Attention': QuantSplitAttentionMixin}
    others = {f'{_DINOV2}Embeddings': _keep_positions}

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        attention, mlp = block.attention, block.mlp
        gated = hasattr(mlp, 'weights_in')
        first, last = (mlp.weights_in, mlp.weights_out) if gated else (mlp.fc1, mlp.fc2)
        projections = (attention.attention.query, attention.attention.key, attention.attention.value)
        return BlockParts(
            (Feed(block.norm1, projections), Feed(block.norm2, (first,))),
            (
                Writer(attention.output.dense, layer_scale(block.layer_scale1)),
                Writer(last, layer_scale(block.layer_scale2)),
            ),
            () if gated else (first,),
        )
