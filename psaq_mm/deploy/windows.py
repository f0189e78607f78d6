# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Window attention of Swin in a form that exports well: for one image of a known size, with a mask that stays small on disk."""
from typing import Callable, Optional, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.models.adapters.swin import valid_query_rows
from psaq_mm.quantization import apply_edge

from . import symbols

__all__ = ['attend_windows', 'merge_patches', 'shift_attention', 'timm_attention', 'window_attention']

MASKED = -100.0  # as the libraries have it


def _pad(x: Tensor, bottom: int, right: int) -> Tensor:
    """Zeros around (1, H, W, C); as a Concat, where the exporter makes some fifteen nodes of a pad."""
    _, height, width, channels = (int(s) for s in x.shape)
    if right:
        x = torch.cat([x, torch.zeros(1, height, right, channels)], dim=2)
    if bottom:
        x = torch.cat([x, torch.zeros(1, bottom, width + right, channels)], dim=1)
    return x


def _cut(x: Tensor, window: Tuple[int, int]) -> Tensor:
    """(1, H, W, C) to (windows, tokens, C)."""
    _, height, width, channels = (int(s) for s in x.shape)
    down, across = height // window[0], width // window[1]
    x = x.reshape(down, window[0], across, window[1], channels).transpose(1, 2)
    return x.reshape(down * across, window[0] * window[1], channels)


def _join(x: Tensor, height: int, width: int, window: Tuple[int, int]) -> Tensor:
    """Inverse of :func:`_cut`."""
    channels = int(x.shape[-1])
    x = x.reshape(height // window[0], width // window[1], window[0], window[1], channels).transpose(1, 2)
    return x.reshape(1, height, width, channels)


def attend_windows(x: Tensor, attention: Callable, qkv: nn.Module, window: Tuple[int, int], shift: Tuple[int, int],
                   pad_first: bool) -> Tensor:
    """Attention inside shifted windows.

    Args:
        x: Token map after the LayerNorm, (1, H, W, C).
        attention: Called with tokens of windows (windows, N, C), and what :func:`.symbols.window_mask` wants to know or None.
        qkv: The projection that reads the tokens; it knows what 0 stands for after reparameterization.
        window, shift: In tokens, down and across.
        pad_first: Pad, then shift, as OpenMMLab does; timm shifts first.
    """
    _, height, width, _ = (int(s) for s in x.shape)
    bottom, right = -height % window[0], -width % window[1]
    moved = any(shift)

    def roll(t: Tensor, sign: int) -> Tensor:
        return torch.roll(t, (sign * shift[0], sign * shift[1]), (1, 2)) if moved else t

    x = x if pad_first else roll(x, -1)
    if bottom or right:
        x = _fill(_pad(x, bottom, right), height, width, qkv)
    x = roll(x, -1) if pad_first else x
    full = height + bottom, width + right
    x = _join(attention(_cut(x, window), (*full, *window, *shift) if moved else None), *full, window)
    x = roll(x, 1) if pad_first else x
    x = x[:, :height, :width] if bottom or right else x
    return x if pad_first else roll(x, 1)


def _fill(x: Tensor, height: int, width: int, qkv: nn.Module) -> Tensor:
    fill = getattr(getattr(qkv, 'input_quantizer', None), 'fill', None)
    if fill is None or not bool(fill.any()):
        return x
    valid = valid_query_rows(height, width, (int(x.shape[1]), int(x.shape[2])))
    return torch.where(valid.reshape(1, *x.shape[1:3], 1), x, fill)


def window_attention(self, x: Tensor, shifted: Optional[Tuple[int, ...]] = None) -> Tensor:
    """Forward of a quantized window attention; ``x`` (windows, N, C), ``shifted`` as for :func:`.symbols.window_mask`.

    ``export_name`` is what the export keeps its table of positions under.
    """
    windows, tokens, _ = (int(s) for s in x.shape)
    q, k, v = self.qkv(x).reshape(windows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    scores = self.matmul_qk(q * self.scale, k.transpose(-2, -1))
    scores = apply_edge(self.scores_quantizer, symbols.position_bias(scores, self.export_name))
    if shifted is not None:
        scores = symbols.window_mask(scores, shifted, MASKED)
    x = self.matmul_av(self.softmax(scores), v).transpose(1, 2).reshape(windows, tokens, -1)
    return self.proj(x)


def shift_attention(self, query: Tensor, hw_shape) -> Tensor:
    """Forward of OpenMMLab's ``ShiftWindowMSA``: (1, H * W, C) to (1, H * W, C)."""
    height, width = (int(s) for s in hw_shape)
    shift, window = self.shift_size, self.window_size
    # mmpretrain does not shift where one window holds the whole map.
    if not getattr(self, 'pad_small_map', True) and min(height, width) == window:
        shift = 0
    x = query.reshape(1, height, width, int(query.shape[-1]))
    x = attend_windows(x, self.w_msa, self.w_msa.qkv, (window, window), (shift, shift), pad_first=True)
    return x.reshape(1, height * width, int(query.shape[-1]))


def timm_attention(self, x: Tensor) -> Tensor:
    """``_attn`` of timm's ``SwinTransformerBlock``: (1, H, W, C) to (1, H, W, C)."""
    return attend_windows(x, self.attn, self.attn.qkv, tuple(self.window_size), tuple(self.shift_size), pad_first=False)


def merge_patches(self, x: Tensor, input_size) -> Tuple[Tensor, Tuple[int, int]]:
    """Forward of OpenMMLab's ``PatchMerging`` of 2 x 2 patches, with the channels of one patch side by side.

    The library's goes through ``nn.Unfold``, which becomes gathers in ONNX, and puts the four values of one channel side by side.
    Whoever uses this reorders LayerNorm and reduction as :func:`patch_order` says.
    """
    height, width = (int(s) for s in input_size)
    channels = int(x.shape[-1])
    x = x.reshape(1, height, width, channels)
    if height % 2 or width % 2:
        x = _pad(x, height % 2, width % 2)
    height, width = -(-height // 2), -(-width // 2)
    x = x.reshape(1, height, 2, width, 2, channels).transpose(2, 3).reshape(1, height * width, 4 * channels)
    x = self.norm(x) if self.norm is not None else x
    return self.reduction(x), (height, width)


def patch_order(channels: int) -> Tensor:
    """Where the library keeps each channel of :func:`merge_patches`: int64 (4 * channels,)."""
    return torch.arange(4 * channels).reshape(channels, 4).t().reshape(-1)
