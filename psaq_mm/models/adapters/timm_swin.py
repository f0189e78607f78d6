# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Swin Transformer of timm, as mmpretrain's ``TimmClassifier`` and ``TIMMBackbone`` build it.

It differs from OpenMMLab's in the order of things: timm shifts the token map first and pads it afterwards, so that the padding
lies at the right and at the bottom whatever the shift. With every quantizer off, the output is that of timm's own unfused
attention to the last bit.
"""
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.quantization import adopt, apply_edge, attention_products, edge_quantizer, register_adapter

from .edges import join, mark_ffn, mark_norm
from .match import Architecture, class_named
from .swin import fill_padding

__all__ = ['TIMM_SWIN_ARCHITECTURES', 'valid_window_rows', 'QuantTimmWindowAttentionMixin', 'QuantTimmSwinBlockMixin']

_BACKBONE = ('timm.models.swin_transformer.SwinTransformer', )
_ATTENTION = ('timm.models.swin_transformer.WindowAttention', )
_BLOCK = ('timm.models.swin_transformer.SwinTransformerBlock', )
_PATCH_MERGING = ('timm.models.swin_transformer.PatchMerging', )

# With features_only=True, timm takes the model apart: only its stages are left, as layers_0, layers_1, ...
TIMM_SWIN_ARCHITECTURES = (
    Architecture(_BACKBONE + ('timm.models._features.FeatureListNet', ), r'layers[._]\d+\.blocks\.\d+', _BLOCK, _ATTENTION), )


def valid_window_rows(height: int, width: int, window: Tuple[int, int], device=None) -> Optional[Tensor]:
    """Which rows of each window are tokens of the image, where the map is padded on the right and at the bottom.

    Args:
        height: Rows of the token map.
        width: Columns of the token map.
        window: Height and width of a window, in tokens.
        device: Where the mask is made.

    Returns:
        bool (windows, rows * columns of a window), row-major windows, or None where nothing is padded.
    """
    pad_bottom, pad_right = -height % window[0], -width % window[1]
    if not pad_right and not pad_bottom:
        return None
    valid = F.pad(torch.ones(height, width, dtype=torch.bool, device=device), (0, pad_right, 0, pad_bottom))
    rows, columns = valid.shape[0] // window[0], valid.shape[1] // window[1]
    return valid.view(rows, window[0], columns, window[1]).transpose(1, 2).reshape(rows * columns, -1)


class QuantTimmWindowAttentionMixin:
    """Window attention whose two matrix products are :class:`QuantMatMul`, and which knows its padded rows."""

    valid_rows: Optional[Tensor] = None
    """bool (windows, tokens) of the current input, or None: set by the block around it."""

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Attention inside windows.

        Args:
            x: Tokens, (B * windows, N, C).
            mask: Additive attention mask of shifted windows, (windows, N, N), or None.

        Returns:
            (B * windows, N, C).
        """
        B, N, _ = x.shape
        valid = self.valid_rows
        if valid is not None:
            valid = valid.repeat(B // valid.shape[0], 1)
            x = fill_padding(x, valid, self.qkv)
        heads_valid = None if valid is None else valid[:, None]
        self.proj.valid_rows = valid

        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

        attn = self.matmul_qk(q * self.scale, k.transpose(-2, -1), valid_rows=heads_valid)
        # Before the mask: its -100 would stretch the range over nothing.
        attn = apply_edge(self.scores_quantizer, attn + self._get_rel_pos_bias(), heads_valid)
        if mask is not None:
            attn = attn.view(-1, mask.shape[0], self.num_heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, N, N)
        attn = self.attn_drop(self.softmax(attn))

        x = self.matmul_av(attn, v, valid_rows=heads_valid).transpose(1, 2).reshape(B, N, -1)
        return self.proj_drop(self.proj(x))


class QuantTimmSwinBlockMixin:
    """A Swin block whose two residual sums are edges, and which tells its attention which rows are padding."""

    def _attn(self, x: Tensor) -> Tensor:
        self.attn.valid_rows = valid_window_rows(x.shape[1], x.shape[2], self.window_size, x.device)
        return super()._attn(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        B, H, W, C = x.shape
        x = apply_edge(self.residual1_quantizer, x + self.drop_path1(self._attn(self.norm1(x))))
        x = x.reshape(B, -1, C)
        x = apply_edge(self.residual2_quantizer, x + self.drop_path2(self.mlp(self.norm2(x))))
        return x.reshape(B, H, W, C)


def _convert_attention(module: nn.Module, name: str, spec) -> nn.Module:
    module = adopt(module, QuantTimmWindowAttentionMixin)
    module.matmul_qk, module.matmul_av = attention_products(spec, name)
    module.scores_quantizer = edge_quantizer(spec, join(name, 'scores'))
    return module


def _convert_block(module: nn.Module, name: str, spec) -> nn.Module:
    module = adopt(module, QuantTimmSwinBlockMixin)
    mark_norm(module.norm1, module.attn.qkv)
    mark_ffn(module.mlp, module.norm2)
    module.residual1_quantizer = edge_quantizer(spec, join(name, 'residual1'))
    module.residual2_quantizer = edge_quantizer(spec, join(name, 'residual2'))
    return module


def _convert_patch_merging(module: nn.Module, name: str, spec) -> nn.Module:
    mark_norm(module.norm, module.reduction)
    return module


def _is_block(module: nn.Module) -> bool:
    return class_named(module, _BLOCK) is not None and class_named(module, _BLOCK, '_attn') is not None


register_adapter(lambda m: class_named(m, _ATTENTION) is not None, _convert_attention)
register_adapter(_is_block, _convert_block)
register_adapter(lambda m: class_named(m, _PATCH_MERGING) is not None, _convert_patch_merging)
