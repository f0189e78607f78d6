# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Swin Transformer of mmdet, mmseg and mmpretrain: window attention, its padding, and activation checkpointing.

The three libraries share one computation under three module paths. What differs (mmpretrain's ``pad_small_map``) is
handled where it matters. With every quantizer off, each forward below runs the library's own operations in the
library's own order, so that its output is the library's to the last bit.
"""

from typing import Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as cp
from torch import Tensor, nn

from psaq_mm.models.adapters.edges import add_residual_edges, join, mark_ffn, mark_norm
from psaq_mm.models.adapters.match import class_named
from psaq_mm.quantization import (
    adopt,
    apply_edge,
    attention_products,
    edge_quantizer,
    quantize_output_,
    register_adapter,
)

__all__ = [
    'PATCH_MERGING',
    'SWIN_BACKBONES',
    'valid_query_rows',
    'QuantWindowMSAMixin',
    'QuantShiftWindowMSAMixin',
    'QuantSwinBlockMixin',
    'convert_window_attention',
    'fill_padding',
]

_SWIN_MODULES = ('mmdet.models.backbones.swin', 'mmseg.models.backbones.swin')

SWIN_BACKBONES = tuple(f'{m}.SwinTransformer' for m in _SWIN_MODULES) + (
    'mmpretrain.models.backbones.swin_transformer.SwinTransformer',
)
_WINDOW_MSA = tuple(f'{m}.WindowMSA' for m in _SWIN_MODULES) + ('mmpretrain.models.utils.attention.WindowMSA',)
_SHIFT_WINDOW_MSA = tuple(f'{m}.ShiftWindowMSA' for m in _SWIN_MODULES) + (
    'mmpretrain.models.utils.attention.ShiftWindowMSA',
)
_SWIN_BLOCK = tuple(f'{m}.SwinBlock' for m in _SWIN_MODULES) + (
    'mmpretrain.models.backbones.swin_transformer.SwinBlock',
)
PATCH_MERGING = (
    'mmdet.models.layers.transformer.utils.PatchMerging',
    'mmseg.models.utils.embed.PatchMerging',
    'mmcv.cnn.bricks.transformer.PatchMerging',
)


def valid_query_rows(
    height: int, width: int, window: Union[int, Tuple[int, int]], shift: int = 0, device=None
) -> Optional[Tensor]:
    """Which rows of each window are tokens of the image, and not window padding.

    Swin pads the token map on the right and at the bottom to a multiple of the window, rolls it by ``-shift`` and cuts
    it into windows (Swin, arXiv 2103.14030, section 3.2). The padded queries are thrown away after attention: they are
    no image, and take no part in patch similarity or in calibration. Padded keys and values do: real tokens see them.

    Args:
        height: Rows of the token map.
        width: Columns of the token map.
        window: Side of a window, or its height and width, in tokens.
        shift: Cyclic shift after the padding, in tokens; timm shifts before it, which moves no padding.
        device: Where the mask is made.

    Returns:
        bool (windows, tokens of a window), row-major windows, or None where nothing is padded.
    """
    rows, columns = (window, window) if isinstance(window, int) else window
    pad_right, pad_bottom = -width % columns, -height % rows
    if not pad_right and not pad_bottom:
        return None
    valid = torch.ones(height, width, dtype=torch.bool, device=device)
    valid = F.pad(valid, (0, pad_right, 0, pad_bottom))
    if shift:
        valid = torch.roll(valid, shifts=(-shift, -shift), dims=(0, 1))
    down, across = valid.shape[0] // rows, valid.shape[1] // columns
    return valid.view(down, rows, across, columns).transpose(1, 2).reshape(down * across, rows * columns)


def fill_padding(x: Tensor, valid: Tensor, qkv: nn.Module) -> Tensor:
    """Window padding as the projection expects it: 0, or after reparameterization the image of 0.

    Swin pads with zeros *after* the LayerNorm. Once scales and offsets of the channels are folded into that, 0 stands
    for something else.

    Args:
        x: Tokens of windows, (windows * B, N, C).
        valid: bool (windows * B, N), False for padding.
        qkv: The projection that reads them.
    """
    fill = getattr(getattr(qkv, 'input_quantizer', None), 'fill', None)
    return x if fill is None else torch.where(valid.unsqueeze(-1), x, fill.to(x.dtype))


class QuantWindowMSAMixin:
    """Window attention whose two matrix products are :class:`QuantMatMul`, and which knows its padded rows."""

    valid_rows: Optional[Tensor] = None
    """bool (windows, tokens) of the current input, or None: set by the shifting module around it."""

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Attention inside windows.

        Args:
            x: Tokens, (windows * B, N, C).
            mask: Additive attention mask of shifted windows, (windows, N, N), or None.

        Returns:
            (windows * B, N, C).
        """
        B, N, _ = x.shape
        valid = self.valid_rows
        if valid is not None:
            valid = valid.repeat(B // valid.shape[0], 1)
            x = fill_padding(x, valid, self.qkv)
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

        heads_valid = None if valid is None else valid[:, None]
        self.proj.valid_rows = valid

        attn = self.matmul_qk(q * self.scale, k.transpose(-2, -1), valid_rows=heads_valid)
        # Before the mask: its -100 would stretch the range over nothing.
        attn = apply_edge(self.scores_quantizer, attn + self._position_bias(), heads_valid)
        if mask is not None:
            windows = mask.shape[0]
            attn = attn.view(B // windows, windows, self.num_heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, N, N)
        attn = self.attn_drop(self.softmax(attn))

        x = self.matmul_av(attn, v, valid_rows=heads_valid).transpose(1, 2).reshape(B, N, -1)
        return self.proj_drop(self.proj(x))

    def _position_bias(self) -> Tensor:
        """What is added to the scores for the relative position of two tokens, (1, heads, N, N)."""
        tokens = self.window_size[0] * self.window_size[1]
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(tokens, tokens, -1)
        return bias.permute(2, 0, 1).contiguous().unsqueeze(0)


class QuantShiftWindowMSAMixin:
    """The library's own shifting and padding, which also tells the attention inside which rows are padding."""

    def forward(self, query: Tensor, hw_shape: Sequence[int]) -> Tensor:
        """As the library's: ``query`` (B, H * W, C) to (B, H * W, C)."""
        height, width = hw_shape
        shift = self.shift_size
        # mmpretrain does not shift where one window holds the whole map; mmdet and mmseg always do.
        if not getattr(self, 'pad_small_map', True) and min(height, width) == self.window_size:
            shift = 0
        self.w_msa.valid_rows = valid_query_rows(height, width, self.window_size, shift, query.device)
        return super().forward(query, hw_shape)


class QuantSwinBlockMixin:
    """A Swin block whose activation checkpointing keeps the graph of what hooks see inside it.

    The libraries' ``with_cp`` uses reentrant checkpointing, under which a tapped attention output arrives detached, and
    twice: the gradient of the patch similarity entropy would vanish silently.
    """

    def _block(self, x: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
        identity = x
        x = self.norm1(x)
        x = self.attn(x, hw_shape)
        x = apply_edge(self.residual1_quantizer, x + identity)
        identity = x
        x = self.norm2(x)
        return apply_edge(self.residual2_quantizer, self.ffn(x, identity=identity))

    def forward(self, x: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
        """(B, H * W, C) to (B, H * W, C)."""
        if self.with_cp and x.requires_grad:
            return cp.checkpoint(self._block, x, hw_shape, use_reentrant=False)
        return self._block(x, hw_shape)


def convert_window_attention(module: nn.Module, name: str, spec, mixin: type = QuantWindowMSAMixin) -> nn.Module:
    """Adopt window attention as ``mixin``, with its products and the edge of its scores."""
    module = adopt(module, mixin)
    module.matmul_qk, module.matmul_av = attention_products(spec, name)
    module.scores_quantizer = edge_quantizer(spec, join(name, 'scores'))
    return module


def _convert_block(module: nn.Module, name: str, spec) -> nn.Module:
    module = adopt(module, QuantSwinBlockMixin)
    mark_norm(module.norm1, module.attn.w_msa.qkv)
    mark_ffn(module.ffn, module.norm2)
    return add_residual_edges(module, name, spec)


def _convert_merging(module: nn.Module, name: str, spec) -> nn.Module:
    mark_norm(module.norm, module.reduction)
    return module


def _convert_backbone(module: nn.Module, name: str, spec) -> nn.Module:
    # What the first block reads: the patch embedding after its LayerNorm, with the position embedding where there is
    # one.
    quantize_output_(module.drop_after_pos, join(name, 'drop_after_pos'), spec)
    return module


register_adapter(lambda m: class_named(m, _WINDOW_MSA) is not None, convert_window_attention)
register_adapter(
    lambda m: class_named(m, _SHIFT_WINDOW_MSA) is not None, lambda m, name, spec: adopt(m, QuantShiftWindowMSAMixin)
)
register_adapter(lambda m: class_named(m, _SWIN_BLOCK) is not None, _convert_block)
register_adapter(lambda m: class_named(m, PATCH_MERGING) is not None, _convert_merging)
register_adapter(lambda m: class_named(m, SWIN_BACKBONES) is not None, _convert_backbone)
