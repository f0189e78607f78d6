# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Swin Transformer of mmdet, mmseg and mmpretrain: window attention, its padding, and activation checkpointing.

The three libraries share one computation under three module paths. What differs (mmpretrain's ``pad_small_map``) is
handled where it matters. With every quantizer off, each forward below runs the library's own operations in the
library's own order, so that its output is the library's to the last bit.
"""

from typing import Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.models.adapters.attention import CheckpointedBlockMixin, adopt_attention, attend
from psaq_mm.models.adapters.edges import BlockParts, adopt_block, join, mark_norm, outputs_are_edges
from psaq_mm.models.adapters.match import adapt
from psaq_mm.quantization import (
    AdapterSpec,
    adopt,
    apply_edge,
    apply_layer,
    edge_quantizer,
    is_quantized_layer,
    padded,
    row_mask_of,
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
    return qkv.input_quantizer.fill_padding(x, valid) if is_quantized_layer(qkv) else x


class QuantWindowMSAMixin:
    """Window attention whose two matrix products are :class:`QuantMatMul`, and which knows its padded rows."""

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Attention inside windows.

        Args:
            x: Tokens, (windows * B, N, C).
            mask: Additive attention mask of shifted windows, (windows, N, N), or None.

        Returns:
            (windows * B, N, C).
        """
        padding = row_mask_of(self)
        valid = None if padding is None else padding.rows(x)
        if valid is not None:
            x = fill_padding(x, valid, self.qkv)
        x, _ = attend(
            self,
            x,
            lambda q, k: (q * self.scale, k),
            lambda scores: self._attention_weights(scores, mask, valid),
            valid,
        )
        return self.proj_drop(apply_layer(self.proj, x, valid))

    def _attention_weights(self, scores: Tensor, mask: Optional[Tensor], valid: Optional[Tensor]) -> Tensor:
        """Softmax of the scores (windows * B, heads, N, N) with position bias and mask."""
        # Before the mask: its -100 would stretch the range over nothing.
        scores = scores + self._position_bias()
        scores = apply_edge(self.scores_quantizer, scores, None if valid is None else valid[:, None])
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[None, :, None]).flatten(0, 1)
        return self.attn_drop(self.softmax(scores))

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
        with padded(self.w_msa, valid_query_rows(height, width, self.window_size, shift, query.device)):
            return super().forward(query, hw_shape)


class QuantSwinBlockMixin(CheckpointedBlockMixin):
    """A Swin block whose two residual sums are edges."""

    def _block(self, x: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
        x = apply_edge(self.residual1_quantizer, self.attn(self.norm1(x), hw_shape) + x)
        return apply_edge(self.residual2_quantizer, self.ffn(self.norm2(x), identity=x))


def block_parts(block: nn.Module) -> BlockParts:
    """Parts of a Swin block."""
    return BlockParts(block.norm1, block.attn.w_msa, block.norm2, block.ffn)


def convert_window_attention(
    module: nn.Module, name: str, spec: AdapterSpec, mixin: type = QuantWindowMSAMixin
) -> nn.Module:
    """Adopt window attention as ``mixin``, with its products and the edge of its scores."""
    module = adopt_attention(module, mixin, name, spec)
    module.scores_quantizer = edge_quantizer(spec, join(name, 'scores'))
    return module


def convert_merging(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    """Patch merging: its LayerNorm feeds its reduction."""
    mark_norm(module.norm, module.reduction)
    return module


def _convert_block(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    return adopt_block(module, QuantSwinBlockMixin, block_parts(module), name, spec)


adapt(_WINDOW_MSA, convert_window_attention)
adapt(_SHIFT_WINDOW_MSA, lambda module, name, spec: adopt(module, QuantShiftWindowMSAMixin))
adapt(_SWIN_BLOCK, _convert_block)
adapt(PATCH_MERGING, convert_merging)
# What the first block reads: the patch embedding after its LayerNorm, with the position embedding where there is one.
adapt(SWIN_BACKBONES, outputs_are_edges('drop_after_pos'))
