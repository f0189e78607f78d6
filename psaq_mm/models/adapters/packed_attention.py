# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""``torch.nn.MultiheadAttention``, of one tensor or of several, as layers and products that can be quantized.

It holds its three input projections in one parameter, ``in_proj_weight``, which belongs to no layer, and reads the
weight of ``out_proj`` without calling it. Here all of them are layers that are called, so that they are quantized,
calibrated and tapped as any other. Every parameter keeps its place and its key.

Parts of the packed projection that read one tensor are one layer, with one range for it. Which they are depends on the
module around the attention, so its adapter tells it to :func:`adopt_packed`:

===================  ==============================================================
inputs               used by
===================  ==============================================================
``('qkv',)``         self-attention: Vision Transformer
``('q', 'kv')``      keys and values of another tensor: spatial reduction (PVT, MiT)
``('q', 'k', 'v')``  anything: positions are added to queries and keys alone (DETR)
===================  ==============================================================
"""

from typing import Dict, List, Optional, Sequence, Tuple, Type

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models.adapters.attention import adopt_attention, attend_heads
from psaq_mm.quantization import AdapterSpec, AttentionParts, Projection, is_quantized_layer

__all__ = ['PackedProjection', 'QuantPackedAttentionMixin', 'adopt_packed']


class PackedProjection(nn.Linear):
    """A part of the packed query, key and value projection of an ``nn.MultiheadAttention``, as a layer.

    It owns no parameter: ``weight`` and ``bias`` are rows of the attention's ``in_proj_weight`` and ``in_proj_bias``,
    looked up at each use, so that loading, moving or averaging may replace them. Where keys or values have a width of
    their own (``kdim``, ``vdim``), the weight is the attention's ``q_proj_weight``, ``k_proj_weight`` or
    ``v_proj_weight``. Its only state-dict keys are its quantizers'.

    Args:
        attention: Whose projection it is.
        parts: Neighbours out of ``'qkv'``, for example ``'kv'``.

    Attributes:
        weight_name: Of the attention's parameter.
    """

    def __init__(self, attention: nn.MultiheadAttention, parts: str = 'qkv'):
        nn.Module.__init__(self)
        first = 'qkv'.index(parts) * attention.embed_dim
        self.in_features = dict(k=attention.kdim, v=attention.vdim).get(parts, attention.embed_dim)
        self.out_features = len(parts) * attention.embed_dim
        self._rows = slice(first, first + self.out_features)
        self.weight_name = 'in_proj_weight' if attention.in_proj_weight is not None else f'{parts}_proj_weight'
        # In a tuple: as an attribute of its own, the parent would become a child of its child.
        self._attention = (attention,)

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features); a view, unless the layer has all rows."""
        return self._part(getattr(self._attention[0], self.weight_name))

    @property
    def bias(self) -> Optional[Tensor]:
        """(out_features,), or None."""
        bias = self._attention[0].in_proj_bias
        return None if bias is None else self._part(bias)

    def _part(self, packed: Tensor) -> Tensor:
        return packed if self.out_features == len(packed) else packed[self._rows]


class QuantPackedAttentionMixin:
    """Attention of ``nn.MultiheadAttention`` as explicit products, made by :func:`adopt_packed`.

    The projections read their input as the library's do, positions first, so that the output is the library's to the
    last bit; the output projection reads it batch first, as other attention does and as taps want it.

    Attributes:
        inputs: Names of its :class:`PackedProjection` children: the letters are what each of them gives.
        of_head: Whether it was taken for attention outside of a backbone.
    """

    inputs: Tuple[str, ...]
    of_head = False

    @property
    def proj(self) -> nn.Linear:
        """The output projection, under the name that attention has elsewhere."""
        return self.out_proj

    def attention_parts(self) -> AttentionParts:
        """See :func:`psaq_mm.quantization.attention_parts`."""
        width = self.embed_dim
        queries, keys, values = (
            Projection(getattr(self, parts), parts.index(part) * width, width)
            for part in 'qkv'
            for parts in self.inputs
            if part in parts
        )
        return AttentionParts(self.num_heads, queries, keys, values, self.out_proj)

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
        """Attention, with the arguments of ``nn.MultiheadAttention`` in their order.

        Args:
            query: (N, B, C), or (B, N, C) with ``batch_first``.
            key: (M, B, C) or (B, M, C). None: ``query``.
            value: Shaped as ``key``. None: ``key``.
            key_padding_mask: Keys that are left out, (B, M): bool with True for those, or added to the scores.
            need_weights: Whether the attention weights are returned.
            attn_mask: (N, M) or (B * heads, N, M): bool with True for pairs that are left out, or added to the scores.
            average_attn_weights: Whether they are the mean over the heads.
            is_causal: Not read: it says of ``attn_mask`` what it is.

        Returns:
            Output, shaped as ``query``, and the attention weights (B, N, M) or (B, heads, N, M), or None.

        Raises:
            UnsupportedModelError: Two inputs differ that one projection reads, or there is no batch.
        """
        if query.dim() != 3:
            raise UnsupportedModelError(
                f'the quantized attention got queries of shape {tuple(query.shape)}: give it a batch, three dimensions'
            )
        key = query if key is None else key
        q, k, v = self._projected(dict(q=query, k=key, v=key if value is None else value))

        kept: List[Tensor] = []

        def weights(scores: Tensor) -> Tensor:
            # After the scores' quantizer: the range must not reach to what the masks add.
            for mask in self._masks(scores, key_padding_mask, attn_mask):
                scores = scores + mask
            kept.append(F.dropout(scores.softmax(dim=-1), self.dropout, self.training))
            return kept[0]

        x = self.out_proj(attend_heads(self, q / self.head_dim**0.5, k, v, weights))
        x = x if self.batch_first else x.transpose(0, 1)
        if not need_weights:
            return x, None
        return x, kept[0].mean(1) if average_attn_weights else kept[0]

    def _projected(self, inputs: Dict[str, Tensor]) -> Tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, heads, N or M, head_dim), of what each is projected from."""
        heads = {}
        for parts in self.inputs:
            x = inputs[parts[0]]
            other = next((part for part in parts if not _is_same(inputs[part], x)), None)
            if other is not None:
                raise UnsupportedModelError(
                    f'the quantized attention projects {" and ".join(parts)} from one tensor, and got another one for '
                    f"{other!r}: adapt it with inputs=('q', 'k', 'v')"
                )
            x = getattr(self, parts)(x.transpose(0, 1) if self.batch_first else x)
            # Each part in its own memory, as in the library: the last bit of the products depends on it.
            x = x.unflatten(-1, (len(parts), self.num_heads, -1)).permute(2, 0, 1, 3, 4).contiguous()
            heads.update(zip(parts, x.permute(0, 2, 3, 1, 4).unbind(0)))
        return heads['q'], heads['k'], heads['v']

    def _masks(self, scores: Tensor, keys: Optional[Tensor], pairs: Optional[Tensor]) -> Sequence[Tensor]:
        """The masks that are given, each to be added to the scores (B, heads, N, M)."""
        masks = []
        if keys is not None:
            masks.append(_additive(keys, scores)[:, None, None])
        if pairs is not None:
            pairs = _additive(pairs, scores)
            masks.append(pairs if pairs.dim() == 2 else pairs.unflatten(0, (-1, self.num_heads)))
        return masks

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # A projection cannot tell by itself that full-precision weights are loaded: their key is not its own.
        for parts in self.inputs:
            layer = getattr(self, parts)
            weight, fill = f'{prefix}{layer.weight_name}', f'{prefix}{parts}.input_quantizer.fill'
            if is_quantized_layer(layer) and weight in state_dict and fill not in state_dict:
                layer.input_quantizer.forget_folding()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, or equal views of one: mmcv's wrapper transposes each input by itself."""
    return a is b or (a.shape == b.shape and a.stride() == b.stride() and a.data_ptr() == b.data_ptr())


def _additive(mask: Tensor, scores: Tensor) -> Tensor:
    """A mask as what is added to scores: -inf where a bool mask is True."""
    return scores.new_zeros(mask.shape).masked_fill(mask, float('-inf')) if mask.dtype == torch.bool else mask


def adopt_packed(
    attention: nn.MultiheadAttention,
    name: str,
    spec: AdapterSpec,
    inputs: Tuple[str, ...] = ('q', 'k', 'v'),
    mixin: Type[QuantPackedAttentionMixin] = QuantPackedAttentionMixin,
) -> nn.MultiheadAttention:
    """Give an ``nn.MultiheadAttention`` its projections as layers and its products; the module.

    Args:
        attention: Converted in place; one that is converted already stays as it is, unless it was taken for that of a
            head: adapters come to children before their parents, and a backbone knows its attention better.
        name: Its dotted name.
        spec: As an adapter gets it.
        inputs: Which of queries, keys and values are projected from one tensor, see the top of this file. Each name
            becomes a layer of the attention. The tensors are compared when the attention runs.
        mixin: With the forward.

    Raises:
        UnsupportedModelError: It adds a key and a value of its own; or parts of several widths are to be one layer.
    """
    if isinstance(attention, QuantPackedAttentionMixin):
        if not attention.of_head:
            return attention
        for parts in attention.inputs:
            delattr(attention, parts)
        attention.__class__ = attention._adopted_from[1]
    problem = ''
    if attention.bias_k is not None or attention.add_zero_attn:
        problem = 'adds a key of its own (add_bias_kv or add_zero_attn)'
    elif attention.in_proj_weight is None and max(map(len, inputs)) > 1:
        problem = f'has keys or values of another width (kdim or vdim), so that {inputs} is no set of layers'
    if problem:
        raise UnsupportedModelError(
            f'{name}, a torch.nn.MultiheadAttention, {problem}, which is not known here: build the model without it'
        )
    attention = adopt_attention(attention, mixin, name, spec)
    attention.inputs = tuple(inputs)
    for parts in attention.inputs:
        setattr(attention, parts, PackedProjection(attention, parts))
    # torch's own class for it is a Linear in all but name: the name keeps torch's converters away, as nobody calls it.
    attention.out_proj.__class__ = nn.Linear
    return attention
