# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Vision Transformer and DeiT of mmpretrain.

The library's attention is fused; here its two products are written out, so that its output agrees to rounding, and with
the library's own unfused fallback to the last bit wherever the square root of a head's width is a power of two (64 in
every zoo model).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.models.adapters.edges import add_residual_edges, mark_ffn, mark_norm, quantize_outputs
from psaq_mm.models.adapters.match import Architecture, class_named
from psaq_mm.quantization import adopt, apply_edge, attention_products, register_adapter

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
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dims).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]

        # Given a qk_scale, whatever its value, the library divides by head_dims ** -0.5.
        divisor = getattr(self.scaled_dot_product_attention, 'keywords', {}).get('scale', self.head_dims**0.5)
        attn = self.matmul_qk(q / divisor, k.transpose(-2, -1)).softmax(dim=-1)
        attn = F.dropout(attn, self.attn_drop, self.training)

        x = self.matmul_av(attn, v).transpose(1, 2).reshape(B, N, self.embed_dims)
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


def _convert_attention(module: nn.Module, name: str, spec) -> nn.Module:
    module = adopt(module, QuantMultiheadAttentionMixin)
    module.matmul_qk, module.matmul_av = attention_products(spec, name)
    return module


def _convert_layer(module: nn.Module, name: str, spec) -> nn.Module:
    if class_named(module, _DEIT3_LAYER):
        # ln1 feeds two layers, so that its scales cannot be folded into either.
        module = adopt(module, QuantDeiT3EncoderLayerMixin)
        mark_ffn(module.ffn)
    else:
        module = adopt(module, QuantEncoderLayerMixin)
        mark_norm(module.ln1, module.attn.qkv)
        mark_ffn(module.ffn, module.ln2)
    return add_residual_edges(module, name, spec)


def _convert_backbone(module: nn.Module, name: str, spec) -> nn.Module:
    quantize_outputs(module, name, spec, ('patch_embed.norm', 'drop_after_pos', 'pre_norm'))
    return module


register_adapter(lambda m: class_named(m, _ATTENTION) is not None, _convert_attention)
register_adapter(lambda m: class_named(m, _LAYER + _DEIT3_LAYER) is not None, _convert_layer)
register_adapter(lambda m: class_named(m, _BACKBONES) is not None, _convert_backbone)
