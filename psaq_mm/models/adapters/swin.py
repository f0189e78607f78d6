# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Swin Transformer of mmdet, mmseg and mmpretrain: window attention, its padding, and activation checkpointing.

The three libraries share one computation under three module paths. What differs (mmpretrain's ``pad_small_map``) is
handled where it matters. With every quantizer off, each forward below runs the library's own operations in the
library's own order, so that its output is the library's to the last bit.
"""

import math
from typing import Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.models.adapters.attention import CheckpointedBlockMixin, attend
from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, join, mark_norm, standard_parts
from psaq_mm.models.adapters.streams import BEHIND_A_NORM, NamedStreams, Stream, need, output_reader, stream
from psaq_mm.quantization import (
    AdapterSpec,
    StreamReader,
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
    'QuantShiftWindowMSAMixin',
    'QuantSwinBlockMixin',
    'QuantWindowMSAMixin',
    'Swin',
    'add_scores_edge',
    'convert_merging',
    'fill_padding',
    'valid_query_rows',
]

_MODULES = ('mmdet.models.backbones.swin', 'mmseg.models.backbones.swin')
_MMPRETRAIN = 'mmpretrain.models.backbones.swin_transformer'
_ATTENTION_MODULES = (*_MODULES, 'mmpretrain.models.utils.attention')
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


def add_scores_edge(attention: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    """Give window attention a quantizer of its scores, None where the spec quantizes none; the attention."""
    attention.scores_quantizer = edge_quantizer(spec, join(name, 'scores'))
    return attention


def _convert_shift(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    return adopt(module, QuantShiftWindowMSAMixin)


def convert_merging(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    """Patch merging: its LayerNorm feeds its reduction."""
    mark_norm(module.norm, module.reduction)
    return module


@register_backbone
class Swin(Backbone):
    """Swin Transformer of mmdet, mmseg and mmpretrain."""

    names = (*(f'{module}.SwinTransformer' for module in _MODULES), f'{_MMPRETRAIN}.SwinTransformer')
    block_path = r'stages\.\d+\.blocks\.\d+'
    blocks = dict.fromkeys(
        (*(f'{module}.SwinBlock' for module in _MODULES), f'{_MMPRETRAIN}.SwinBlock'), QuantSwinBlockMixin
    )
    attention = dict.fromkeys((f'{module}.WindowMSA' for module in _ATTENTION_MODULES), QuantWindowMSAMixin)
    # What the first block reads: the patch embedding after its LayerNorm, with the position embedding where there is
    # one.
    edges = ('drop_after_pos',)
    others = {
        **dict.fromkeys((f'{module}.ShiftWindowMSA' for module in _ATTENTION_MODULES), _convert_shift),
        **dict.fromkeys(PATCH_MERGING, convert_merging),
    }

    def attention_of(self, block: nn.Module) -> Tuple[nn.Module, ...]:
        """See :meth:`.Backbone.attention_of`."""
        return (block.attn.w_msa,)

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        return standard_parts(block.norm1, block.attn.w_msa, block.norm2, block.ffn, padded=True)

    def convert_attention(self, attention: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_attention`; its scores are an edge."""
        return add_scores_edge(super().convert_attention(attention, name, spec), name, spec)

    def fixed_size(self, net: nn.Module) -> Optional[Tuple[int, int]]:
        """See :meth:`.Backbone.fixed_size`: mmdet and mmseg add an absolute position embedding without resizing it."""
        absolute = getattr(net, 'absolute_pos_embed', None)
        if not getattr(net, 'use_abs_pos_embed', False) or hasattr(net, 'interpolate_mode'):
            return None
        side = math.isqrt(absolute.shape[1]) * self.patch(net)  # a square: pretrain_img_size is not kept
        return side, side

    def dynamic_size(self, net: nn.Module) -> bool:
        """See :meth:`.Backbone.dynamic_size`. Without ``pad_small_map``, whether mmpretrain shifts depends on the
        size.
        """
        return all(getattr(module, 'pad_small_map', True) for module in net.modules())

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [
            (f'the stream of stage {i + 1}', lambda i=i: self._stage(model, net, i)) for i in range(len(net.stages))
        ]

    def _stage(self, model: nn.Module, net: nn.Module, number: int) -> Stream:
        need(number > 0, BEHIND_A_NORM)
        need(not getattr(net, 'out_after_downsample', False), 'outputs after the patch merging')
        stage, readers = net.stages[number], []
        if stage.downsample is not None:
            merging = stage.downsample
            readers.append(StreamReader(merging.norm, (merging.reduction,), tokens=4, interleaved=True))
        if number in net.out_indices:
            level = list(net.out_indices).index(number)
            readers.append(output_reader(model, getattr(net, f'norm{number}'), level, len(net.out_indices)))
        return stream(net.stages[number - 1].downsample.reduction, map(self.parts, stage.blocks), readers)
