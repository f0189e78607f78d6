# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Vision Transformer and DeiT of timm, as mmpretrain's ``TimmClassifier`` and ``TIMMBackbone`` build them.

With every quantizer off, the output is that of timm's own unfused attention to the last bit, and that of its fused one
to rounding.
"""

from typing import Optional

from torch import Tensor, nn

from psaq_mm.models.adapters.edges import add_residual_edges, mark_ffn, mark_norm, quantize_outputs
from psaq_mm.models.adapters.match import Architecture, class_named
from psaq_mm.quantization import adopt, apply_edge, attention_products, register_adapter

__all__ = ['TIMM_VIT_ARCHITECTURES', 'TIMM_VIT_BACKBONES', 'QuantTimmAttentionMixin', 'QuantTimmBlockMixin']

TIMM_VIT_BACKBONES = ('timm.models.vision_transformer.VisionTransformer', 'timm.models.deit.VisionTransformerDistilled')
# Newer versions of timm have moved the attention among the layers.
_ATTENTION = ('timm.models.vision_transformer.Attention', 'timm.layers.attention.Attention')
_BLOCK = ('timm.models.vision_transformer.Block',)
_PATCH_EMBED = ('timm.layers.patch_embed.PatchEmbed',)

TIMM_VIT_ARCHITECTURES = (Architecture(TIMM_VIT_BACKBONES, r'blocks\.\d+', _BLOCK, _ATTENTION),)


class QuantTimmAttentionMixin:
    """Self-attention whose two matrix products are :class:`QuantMatMul`, whatever ``fused_attn`` says."""

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None) -> Tensor:
        """Self-attention.

        Args:
            x: (B, N, C).
            attn_mask: None, or an additive mask that broadcasts to (B, heads, N, N) (newer versions of timm).

        Returns:
            (B, N, C).
        """
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)

        attn = self.matmul_qk(q * self.scale, k.transpose(-2, -1))
        if attn_mask is not None:
            attn = attn + attn_mask
        attn = self.attn_drop(attn.softmax(dim=-1))

        x = self.matmul_av(attn, v).transpose(1, 2).reshape(B, N, -1)
        norm = getattr(self, 'norm', None)  # newer versions of timm
        if norm is not None:
            x = norm(x)
        return self.proj_drop(self.proj(x))


class QuantTimmBlockMixin:
    """A transformer block whose two residual sums are edges."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(B, N, C) to (B, N, C); what else is given (newer versions of timm) goes to the attention."""
        x = apply_edge(
            self.residual1_quantizer, x + self.drop_path1(self.ls1(self.attn(self.norm1(x), *args, **kwargs)))
        )
        return apply_edge(self.residual2_quantizer, x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))


def _convert_attention(module: nn.Module, name: str, spec) -> nn.Module:
    module = adopt(module, QuantTimmAttentionMixin)
    module.matmul_qk, module.matmul_av = attention_products(spec, name)
    quantize_outputs(module, name, spec, ('q_norm', 'k_norm'))
    return module


def _convert_block(module: nn.Module, name: str, spec) -> nn.Module:
    module = adopt(module, QuantTimmBlockMixin)
    mark_norm(module.norm1, module.attn.qkv)
    mark_ffn(module.mlp, module.norm2)
    return add_residual_edges(module, name, spec)


def _convert_backbone(module: nn.Module, name: str, spec) -> nn.Module:
    quantize_outputs(module, name, spec, ('pos_drop', 'norm_pre'))
    return module


def _convert_patch_embed(module: nn.Module, name: str, spec) -> nn.Module:
    quantize_outputs(module, name, spec, ('norm',))
    return module


register_adapter(lambda m: class_named(m, _ATTENTION) is not None, _convert_attention)
register_adapter(lambda m: class_named(m, _BLOCK) is not None, _convert_block)
register_adapter(lambda m: class_named(m, TIMM_VIT_BACKBONES) is not None, _convert_backbone)
register_adapter(lambda m: class_named(m, _PATCH_EMBED) is not None, _convert_patch_embed)
