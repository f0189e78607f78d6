# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Swin Transformer of timm, as mmpretrain's ``TimmClassifier`` and ``TIMMBackbone`` build it.

It differs from OpenMMLab's in the order of two steps: timm shifts the token map first and pads it afterwards, so that
the padding is at the right and at the bottom whatever the shift. With every quantizer off, the output is that of timm's
own unfused attention to the last bit.
"""

from torch import Tensor, nn

from psaq_mm.models.adapters.edges import adopt_block
from psaq_mm.models.adapters.match import Architecture, adapt, class_named
from psaq_mm.models.adapters.swin import (
    QuantWindowMSAMixin,
    convert_merging,
    convert_window_attention,
    valid_query_rows,
)
from psaq_mm.models.adapters.timm_vit import block_parts
from psaq_mm.quantization import AdapterSpec, apply_edge, padded, register_adapter

__all__ = ['TIMM_SWIN', 'TIMM_SWIN_ARCHITECTURES', 'QuantTimmWindowAttentionMixin', 'QuantTimmSwinBlockMixin']

TIMM_SWIN = ('timm.models.swin_transformer.SwinTransformer',)
_ATTENTION = ('timm.models.swin_transformer.WindowAttention',)
_BLOCK = ('timm.models.swin_transformer.SwinTransformerBlock',)
_PATCH_MERGING = ('timm.models.swin_transformer.PatchMerging',)

# With features_only=True, timm takes the model apart: only its stages are left, as layers_0, layers_1, ...
TIMM_SWIN_ARCHITECTURES = (
    Architecture(
        TIMM_SWIN + ('timm.models._features.FeatureListNet',), r'layers[._]\d+\.blocks\.\d+', _BLOCK, _ATTENTION
    ),
)


class QuantTimmWindowAttentionMixin(QuantWindowMSAMixin):
    """Window attention as OpenMMLab's, whatever ``fused_attn`` says."""

    def _position_bias(self) -> Tensor:
        return self._get_rel_pos_bias()


class QuantTimmSwinBlockMixin:
    """A Swin block whose two residual sums are edges, and which tells its attention which rows are padding."""

    def _attn(self, x: Tensor) -> Tensor:
        with padded(self.attn, valid_query_rows(x.shape[1], x.shape[2], self.window_size, device=x.device)):
            return super()._attn(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        B, H, W, C = x.shape
        x = apply_edge(self.residual1_quantizer, x + self.drop_path1(self._attn(self.norm1(x))))
        x = x.reshape(B, -1, C)
        x = apply_edge(self.residual2_quantizer, x + self.drop_path2(self.mlp(self.norm2(x))))
        return x.reshape(B, H, W, C)


def _convert_attention(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    return convert_window_attention(module, name, spec, QuantTimmWindowAttentionMixin)


def _convert_block(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    return adopt_block(module, QuantTimmSwinBlockMixin, block_parts(module), name, spec)


def _is_block(module: nn.Module) -> bool:
    return class_named(module, _BLOCK) is not None and class_named(module, _BLOCK, '_attn') is not None


adapt(_ATTENTION, _convert_attention)
register_adapter(_is_block, _convert_block)
adapt(_PATCH_MERGING, convert_merging)
