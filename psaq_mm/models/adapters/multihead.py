# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""PyTorch's ``nn.MultiheadAttention``, alone or inside mmcv's wrapper: self-attention and cross-attention.

``nn.MultiheadAttention`` holds its three input projections in one parameter, ``in_proj_weight``, which belongs to no
layer, and reads the weight of ``out_proj`` without calling it. Here all of them are layers that are called, so that
they are quantized, calibrated and tapped as any other. Every parameter keeps its place and its key.
"""

import math
from typing import Callable, Optional, Tuple, Type

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.models.adapters.attention import adopt_attention, attend, attend_heads
from psaq_mm.models.adapters.match import class_named
from psaq_mm.quantization import AdapterSpec, AttentionParts, Projection, is_quantized_layer, register_adapter

__all__ = ['PackedProjection', 'QuantHeadAttentionMixin', 'QuantTorchAttentionMixin', 'adopt_multihead']

_ATTENTION = ('torch.nn.modules.activation.MultiheadAttention',)
_LETTERS = 'qkv'


class PackedProjection(nn.Linear):
    """A part of the packed query, key and value projection of an ``nn.MultiheadAttention``, as a layer.

    It owns no parameter: ``weight`` and ``bias`` are rows of the attention's ``in_proj_weight`` and ``in_proj_bias``,
    looked up at each use, so that loading, moving or averaging may replace them. Where keys or values have a width of
    their own, the weight is the attention's ``q_proj_weight``, ``k_proj_weight`` or ``v_proj_weight``. Its only
    state-dict keys are its quantizers'.

    Args:
        attention: Whose projection it is.
        part: Letters of ``'qkv'`` in a row: which of the three it computes.
    """

    def __init__(self, attention: nn.MultiheadAttention, part: str = _LETTERS):
        nn.Module.__init__(self)
        width = attention.embed_dim
        self.in_features = dict(k=attention.kdim, v=attention.vdim).get(part, width)
        self.out_features = len(part) * width
        self._first = _LETTERS.index(part) * width
        self._own = None if attention.in_proj_weight is not None else f'{part}_proj_weight'
        # In a tuple: as an attribute of its own, the parent would become a child of its child.
        self._attention = (attention,)

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features)."""
        attention = self._attention[0]
        return self._rows(attention.in_proj_weight) if self._own is None else getattr(attention, self._own)

    @property
    def bias(self) -> Optional[Tensor]:
        """(out_features), or None."""
        bias = self._attention[0].in_proj_bias
        return None if bias is None else self._rows(bias)

    def _rows(self, packed: Tensor) -> Tensor:
        whole = self.out_features == len(packed)  # then the parameter itself, and no view of it
        return packed if whole else packed[self._first : self._first + self.out_features]


class QuantTorchAttentionMixin:
    """``nn.MultiheadAttention`` whose projections are layers and whose two products are :class:`QuantMatMul`.

    With ``qkv`` (:class:`PackedProjection`) it is self-attention of one tensor. With ``q_proj``, ``k_proj`` and
    ``v_proj`` queries, keys and values are tensors of their own, each with its range: a decoder of queries adds
    positions to queries and keys, and none to values. The output is then the library's; with ``qkv`` it is computed
    batch first, and equal to rounding.
    """

    @property
    def proj(self) -> nn.Linear:
        """The output projection, under the name that attention has elsewhere."""
        return self.out_proj

    def attention_parts(self) -> AttentionParts:
        """See :func:`psaq_mm.quantization.attention_parts`."""
        if hasattr(self, 'qkv'):
            return AttentionParts.packed(self.qkv, self.out_proj, self.num_heads)
        projections = (Projection(layer, 0, self.embed_dim) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return AttentionParts(self.num_heads, *projections, self.out_proj)

    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor] = None,
        value: Optional[Tensor] = None,
        key_padding_mask: Optional[Tensor] = None,
        need_weights: bool = True,
        attn_mask: Optional[Tensor] = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Attention of ``query`` to ``key``; B pictures, L queries, S keys, C channels.

        Args:
            query: (L, B, C), or (B, L, C) with ``batch_first``.
            key: (S, B, kdim), or (B, S, kdim). None, or anything with a packed ``qkv``: ``query`` itself.
            value: (S, B, vdim), or (B, S, vdim); as ``key``.
            key_padding_mask: (B, S): bool, True for keys that no query attends to, or what is added to the scores.
            need_weights: Whether the attention weights are returned.
            attn_mask: (L, S), or (B * heads, L, S): bool, True for pairs that do not attend, or what is added.
            average_attn_weights: Whether the weights returned are the mean over the heads.
            is_causal: A hint of PyTorch, not needed beside ``attn_mask``.

        Returns:
            Output, shaped as ``query``, and the attention weights (B, L, S) or (B, heads, L, S), or None.
        """
        mask = _additive(attn_mask, key_padding_mask, self.num_heads, query.dtype)
        weights: list = []

        def attention_weights(scores: Tensor) -> Tensor:
            # After the product: -inf would stretch its range over nothing.
            scores = scores if mask is None else scores + mask
            weights.append(F.dropout(scores.softmax(dim=-1), self.dropout, self.training))
            return weights[0]

        out = self._attend(query, key, value, attention_weights)
        if not need_weights:
            return out, None
        return out, weights[0].mean(1) if average_attn_weights else weights[0]

    def _attend(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        weights: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The output, in the layout of ``query``."""
        if hasattr(self, 'qkv'):
            tokens = query if self.batch_first else query.transpose(0, 1)
            out, _ = attend(self, tokens, lambda q, k: (q / math.sqrt(self.head_dim), k), weights)
            out = self.out_proj(out)
            return out if self.batch_first else out.transpose(0, 1)
        key = query if key is None else key
        value = key if value is None else value
        if self.batch_first:  # as the library: its products then have the same memory layout, and the same last bit
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))
        out = attend_heads(self, q / math.sqrt(self.head_dim), k, v, weights)
        out = self.out_proj(out)  # batch first, as taps read it
        return out if self.batch_first else out.transpose(0, 1)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # The projection cannot tell by itself that full-precision weights are loaded: their key is not its own.
        qkv = getattr(self, 'qkv', None)
        if f'{prefix}in_proj_weight' in state_dict and f'{prefix}qkv.input_quantizer.fill' not in state_dict:
            if qkv is not None and is_quantized_layer(qkv):
                qkv.input_quantizer.forget_folding()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class QuantHeadAttentionMixin(QuantTorchAttentionMixin):
    """Attention outside of a backbone: its tokens are queries or levels, and no patches of one map."""

    def attention_parts(self) -> None:
        """None: patch similarity does not tap it, nor is it rotated."""


def _additive(
    attn_mask: Optional[Tensor], padding: Optional[Tensor], heads: int, dtype: torch.dtype
) -> Optional[Tensor]:
    """What both masks add to the scores, in a shape that broadcasts to (B, heads, L, S); None without masks."""
    terms = []
    if attn_mask is not None:
        mask = _float_mask(attn_mask, dtype)
        terms.append(mask if mask.dim() == 2 else mask.unflatten(0, (-1, heads)))
    if padding is not None:
        terms.append(_float_mask(padding, dtype)[:, None, None, :])
    return sum(terms[1:], terms[0]) if terms else None


def _float_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.bool(), float('-inf'))


def adopt_multihead(
    attention: nn.Module,
    name: str,
    spec: AdapterSpec,
    packed: bool = False,
    mixin: Type[QuantTorchAttentionMixin] = QuantTorchAttentionMixin,
) -> nn.Module:
    """Convert an ``nn.MultiheadAttention``.

    Inside of a backbone, the adapter of heads has converted it before: adapters come to children before parents. What
    the backbone says of it counts.

    Args:
        attention: The module.
        name: Its dotted name.
        spec: As an adapter gets it.
        packed: Whether queries, keys and values are one tensor in every call: then they are one projection, ``qkv``,
            with one range. If not, there are three.
        mixin: With the forward.
    """
    if isinstance(attention, QuantHeadAttentionMixin):
        _undo(attention)
    attention = adopt_attention(attention, mixin, name, spec)
    if packed:
        attention.qkv = PackedProjection(attention)
    else:
        for part in _LETTERS:
            attention.add_module(f'{part}_proj', PackedProjection(attention, part))
    # torch's own class for it is a Linear in all but name: the name keeps torch's converters away, as nobody calls it.
    attention.out_proj.__class__ = nn.Linear
    return attention


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is torch's attention, without the keys and values that it can add of its own."""
    return class_named(module, _ATTENTION) is not None and module.bias_k is None and not module.add_zero_attn


def _undo(attention: nn.Module) -> None:
    """Make converted attention what it was. Its layers are not quantized yet: composite modules come first."""
    attention.__class__ = attention._adopted_from[1]
    for part in _LETTERS:
        delattr(attention, f'{part}_proj')


def _convert(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    return adopt_multihead(module, name, spec, mixin=QuantHeadAttentionMixin)


register_adapter(_is_plain, _convert)
