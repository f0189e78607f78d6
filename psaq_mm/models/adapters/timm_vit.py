# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Vision Transformer and DeiT of timm, as mmpretrain's ``TimmClassifier`` and ``TIMMBackbone`` build them.

With every quantizer off, the output is that of timm's own unfused attention to the last bit, and that of its fused one
to rounding.
"""

from typing import Optional

from torch import Tensor, nn

from psaq_mm.models.adapters.attention import adopt_attention, attend
from psaq_mm.models.adapters.edges import BlockParts, adopt_block, outputs_are_edges, quantize_outputs
from psaq_mm.models.adapters.match import Architecture, adapt
from psaq_mm.quantization import AdapterSpec, apply_edge

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
        x, _ = attend(
            self,
            x,
            lambda q, k: (self.q_norm(q) * self.scale, self.k_norm(k)),
            lambda scores: self.attn_drop((scores if attn_mask is None else scores + attn_mask).softmax(dim=-1)),
        )
        norm = getattr(self, 'norm', None)  # newer versions of timm
        return self.proj_drop(self.proj(x if norm is None else norm(x)))


class QuantTimmBlockMixin:
    """A transformer block whose two residual sums are edges."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(B, N, C) to (B, N, C); what else is given (newer versions of timm) goes to the attention."""
        x = apply_edge(
            self.residual1_quantizer, x + self.drop_path1(self.ls1(self.attn(self.norm1(x), *args, **kwargs)))
        )
        return apply_edge(self.residual2_quantizer, x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))


def block_parts(block: nn.Module) -> BlockParts:
    """Parts of a block of timm's VisionTransformer or SwinTransformer."""
    return BlockParts(block.norm1, block.attn, block.norm2, block.mlp)


def _convert_attention(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    quantize_outputs(module, name, spec, ('q_norm', 'k_norm'))
    return adopt_attention(module, QuantTimmAttentionMixin, name, spec)


def _convert_block(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    return adopt_block(module, QuantTimmBlockMixin, block_parts(module), name, spec)


adapt(_ATTENTION, _convert_attention)
adapt(_BLOCK, _convert_block)
adapt(TIMM_VIT_BACKBONES, outputs_are_edges('pos_drop', 'norm_pre'))
adapt(_PATCH_EMBED, outputs_are_edges('norm'))
