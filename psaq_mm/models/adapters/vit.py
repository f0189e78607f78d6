# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Vision Transformer and DeiT of mmpretrain.

The library's attention is fused; here its two products are explicit. The output is equal to rounding, and to the
library's own unfused fallback to the last bit where the square root of a head's width is a power of two (64 in every
zoo model).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.models.adapters.attention import adopt_attention, attend
from psaq_mm.models.adapters.edges import BlockParts, add_residual_edges, adopt_block, mark_ffn, outputs_are_edges
from psaq_mm.models.adapters.match import Architecture, adapt
from psaq_mm.quantization import AdapterSpec, adopt, apply_edge

__all__ = ['VIT_ARCHITECTURES', 'QuantMultiheadAttentionMixin', 'QuantEncoderLayerMixin', 'QuantDeiT3EncoderLayerMixin']

_BACKBONES = tuple(
    f'mmpretrain.models.backbones.{name}'
    for name in ('vision_transformer.VisionTransformer', 'deit.DistilledVisionTransformer', 'deit3.DeiT3')
)
_ATTENTION = ('mmpretrain.models.utils.attention.MultiheadAttention',)
_LAYER = ('mmpretrain.models.backbones.vision_transformer.TransformerEncoderLayer',)
_DEIT3_LAYER = ('mmpretrain.models.backbones.deit3.DeiT3TransformerEncoderLayer',)

VIT_ARCHITECTURES = (Architecture(_BACKBONES, r'layers\.\d+', _LAYER + _DEIT3_LAYER, _ATTENTION),)


class QuantMultiheadAttentionMixin:
    """Self-attention whose two matrix products are :class:`QuantMatMul`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, input_dims) to (B, N, embed_dims)."""
        # Given a qk_scale, whatever its value, the library divides by head_dims ** -0.5.
        divisor = getattr(self.scaled_dot_product_attention, 'keywords', {}).get('scale', self.head_dims**0.5)
        x, v = attend(
            self,
            x,
            lambda q, k: (q / divisor, k),
            lambda scores: F.dropout(scores.softmax(dim=-1), self.attn_drop, self.training),
        )
        x = self.out_drop(self.gamma1(self.proj_drop(self.proj(x))))
        return v.squeeze(1) + x if self.v_shortcut else x


class QuantEncoderLayerMixin:
    """A transformer layer whose two residual sums are edges."""

    ffn_norm = 'ln2'

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        x = apply_edge(self.residual1_quantizer, x + self.attn(self.ln1(x)))
        return apply_edge(self.residual2_quantizer, self.ffn(getattr(self, self.ffn_norm)(x), identity=x))


class QuantDeiT3EncoderLayerMixin(QuantEncoderLayerMixin):
    """mmpretrain's DeiT3 layer, which normalizes before the feed-forward network with ``ln1`` once more, never with
    ``ln2``.
    """

    ffn_norm = 'ln1'


def block_parts(layer: nn.Module) -> BlockParts:
    """Parts of a layer of mmpretrain's VisionTransformer."""
    return BlockParts(layer.ln1, layer.attn, layer.ln2, layer.ffn)


def _convert_attention(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    return adopt_attention(module, QuantMultiheadAttentionMixin, name, spec)


def _convert_layer(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    return adopt_block(module, QuantEncoderLayerMixin, block_parts(module), name, spec)


def _convert_deit3_layer(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    # ln1 feeds two layers, so that its scales cannot be folded into either.
    mark_ffn(module.ffn)
    return add_residual_edges(adopt(module, QuantDeiT3EncoderLayerMixin), name, spec)


adapt(_ATTENTION, _convert_attention)
adapt(_LAYER, _convert_layer)
adapt(_DEIT3_LAYER, _convert_deit3_layer)
adapt(_BACKBONES, outputs_are_edges('patch_embed.norm', 'drop_after_pos', 'pre_norm'))
