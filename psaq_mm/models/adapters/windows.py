# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Attention inside of windows, as all backbones have it: padding, shift, position bias.

A library's module is adopted by two mixins. One is for the attention itself, :class:`WindowAttentionMixin`. The other
one, :class:`CutMixin`, is for the module that cuts a map of tokens into windows and joins them again. The export reads
from these two all that it needs, so that a backbone of its own needs no change there.
"""

from typing import ContextManager, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.models.adapters.attention import attend
from psaq_mm.models.adapters.blocks import join
from psaq_mm.quantization import (
    AdapterSpec,
    apply_edge,
    apply_layer,
    edge_quantizer,
    is_quantized_layer,
    padded,
    row_mask_of,
)

__all__ = [
    'Cut',
    'CutMixin',
    'PositionBias',
    'WindowAttentionMixin',
    'add_scores_edge',
    'fill_padding',
    'valid_query_rows',
]


def valid_query_rows(
    height: int,
    width: int,
    window: Union[int, Tuple[int, int]],
    shift: Union[int, Tuple[int, int]] = 0,
    device=None,
) -> Optional[Tensor]:
    """Which rows of each window are tokens of the image, and not window padding.

    Swin pads the token map on the right and at the bottom to a multiple of the window, rolls it by ``-shift`` and cuts
    it into windows (Swin, arXiv 2103.14030, section 3.2). The padded queries are thrown away after attention: they are
    no image, and take no part in patch similarity or in calibration. Padded keys and values do: real tokens see them.

    Args:
        height: Rows of the token map.
        width: Columns of the token map.
        window: Side of a window, or its height and width, in tokens.
        shift: Cyclic shift after the padding, in tokens, or down and across; timm shifts before it, which moves no
            padding.
        device: Where the mask is made.

    Returns:
        bool (windows, tokens of a window), row-major windows, or None where nothing is padded.
    """
    (rows, columns), (down, across) = ((x, x) if isinstance(x, int) else x for x in (window, shift))
    pad_right, pad_bottom = -width % columns, -height % rows
    if not pad_right and not pad_bottom:
        return None
    valid = torch.ones(height, width, dtype=torch.bool, device=device)
    valid = F.pad(valid, (0, pad_right, 0, pad_bottom))
    if down or across:
        valid = torch.roll(valid, shifts=(-down, -across), dims=(0, 1))
    high, wide = valid.shape[0] // rows, valid.shape[1] // columns
    return valid.view(high, rows, wide, columns).transpose(1, 2).reshape(high * wide, rows * columns)


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


def add_scores_edge(attention: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    """Give window attention a quantizer of its scores, None where the spec quantizes none; the attention."""
    attention.scores_quantizer = edge_quantizer(spec, join(name, 'scores'))
    return attention


class PositionBias(NamedTuple):
    """A position bias that depends on the relative position of two tokens of a window.

    Attributes:
        table: (heads, relative positions).
        index: int64 (N, N), the relative position of each pair of tokens.
    """

    table: Tensor
    index: Tensor


class Cut(NamedTuple):
    """How a token map is cut into windows.

    Attributes:
        window: Height and width of a window, in tokens.
        shift: Cyclic shift up and to the left, in tokens.
        pad_first: Whether the map is padded before the shift, as in OpenMMLab; timm shifts first.
    """

    window: Tuple[int, int]
    shift: Tuple[int, int] = (0, 0)
    pad_first: bool = True

    def valid_rows(self, height: int, width: int, device=None) -> Optional[Tensor]:
        """As :func:`valid_query_rows`."""
        return valid_query_rows(height, width, self.window, self.shift if self.pad_first else (0, 0), device)


class WindowAttentionMixin:
    """Window attention whose two matrix products are :class:`QuantMatMul`, and which knows its padded rows.

    It has ``qkv``, ``proj`` and ``num_heads``, a module ``softmax`` and two dropouts. What differs from Swin's is told
    by overriding :meth:`scaled`, :meth:`scaled_scores`, :meth:`position_bias` and :meth:`position_values`.
    """

    @property
    def query_factor(self) -> Optional[float]:
        """The factor of the queries where :meth:`scaled` does nothing else; the export puts it into the projection.
        None: it does something else.
        """
        return float(self.scale)

    def scaled(self, q: Tensor, k: Tensor) -> Tuple[Tensor, Tensor]:
        """Queries and keys whose products are the scores. It works on the last axis, D, whatever the others are."""
        return q * self.scale, k

    def scaled_scores(self, scores: Tensor) -> Tensor:
        """Scores (windows * B, heads, N, N) before the position bias. At most a factor of each head."""
        return scores

    def position_bias(self) -> Optional[PositionBias]:
        """Position bias before :meth:`position_values`; None without one."""
        return PositionBias(self.relative_position_bias_table.t(), self.relative_position_index)

    def position_values(self, table: Tensor) -> Tensor:
        """An element-wise function of the position bias."""
        return table

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
        x, _ = attend(self, x, self.scaled, lambda scores: self._attention_weights(scores, mask, valid), valid)
        return self.proj_drop(apply_layer(self.proj, x, valid))

    def _attention_weights(self, scores: Tensor, mask: Optional[Tensor], valid: Optional[Tensor]) -> Tensor:
        """Softmax of the scores (windows * B, heads, N, N) with position bias and mask."""
        scores, bias = self.scaled_scores(scores), self.position_bias()
        if bias is not None:
            # Looked up before the function: on the CPU its last bit depends on the layout, and this one is the
            # library's.
            scores = scores + self.position_values(bias.table[:, bias.index.flatten()].reshape(1, *scores.shape[1:]))
        # Before the mask: its -100 would stretch the range over nothing.
        scores = apply_edge(self.scores_quantizer, scores, None if valid is None else valid[:, None])
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[None, :, None]).flatten(0, 1)
        return self.attn_drop(self.softmax(scores))


class CutMixin:
    """A module that cuts a token map into windows, runs attention in each, and joins them.

    Its method ``cut_method`` does that: tokens (B, H * W, C), and with them the size (H, W), to tokens; or a map (B, H,
    W, C) to a map. The export replaces it.
    """

    cut_method = 'forward'

    def window_attention(self) -> nn.Module:
        """The attention that runs in each window."""
        raise NotImplementedError

    def cut(self, height: int, width: int) -> Cut:
        """How a map of this size is cut."""
        raise NotImplementedError

    def cutting(self, height: int, width: int, device: torch.device) -> ContextManager[None]:
        """Inside the ``with`` block, where the library cuts a map of this size, the attention knows which rows are
        padding.
        """
        return padded(self.window_attention(), self.cut(height, width).valid_rows(height, width, device))
