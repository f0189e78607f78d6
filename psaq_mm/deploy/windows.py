# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Window attention of Swin in a form that exports well: for one image of a known size, with a mask that stays small on disk."""
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from psaq_mm.quantization import apply_edge, quantize

from . import symbols

__all__ = ['IntegerAttention', 'Windows', 'attend_integer', 'attend_windows', 'merge_patches', 'shift_attention', 'timm_attention',
           'window_attention']

MASKED = -100.0  # as the libraries have it


def _pad(x: Tensor, bottom: int, right: int, value: Optional[Tensor] = None) -> Tensor:
    """``value`` (C,), or zeros, around (1, H, W, C); as a Concat, where the exporter makes some fifteen nodes of a pad."""
    _, height, width, channels = (int(s) for s in x.shape)
    value = torch.zeros(channels, dtype=x.dtype) if value is None else value
    if right:
        x = torch.cat([x, value.expand(1, height, right, channels)], dim=2)
    if bottom:
        x = torch.cat([x, value.expand(1, bottom, width + right, channels)], dim=1)
    return x


class Windows(NamedTuple):
    """How a token map is cut into shifted windows.

    Attributes:
        height, width: Of the token map.
        window, shift: In tokens, down and across.
        pad_first: Pad, then shift, as OpenMMLab does; timm shifts first.
    """
    height: int
    width: int
    window: Tuple[int, int]
    shift: Tuple[int, int]
    pad_first: bool

    @property
    def padded(self) -> Tuple[int, int]:
        """Height and width after padding."""
        return self.height + -self.height % self.window[0], self.width + -self.width % self.window[1]

    @property
    def shifted(self) -> Optional[Tuple[int, ...]]:
        """What :func:`.symbols.window_mask` wants to know; None where nothing is shifted."""
        return (*self.padded, *self.window, *self.shift) if any(self.shift) else None

    def _roll(self, x: Tensor, sign: int) -> Tensor:
        return torch.roll(x, (sign * self.shift[0], sign * self.shift[1]), (1, 2)) if any(self.shift) else x

    def cut(self, x: Tensor, padding: Optional[Tensor] = None) -> Tensor:
        """(1, H, W, C) to (windows, tokens, C), with ``padding`` (C,) or zeros where there is no token."""
        height, width = self.padded
        x = x if self.pad_first else self._roll(x, -1)
        x = _pad(x, height - self.height, width - self.width, padding)
        x = self._roll(x, -1) if self.pad_first else x
        (rows, columns), channels = self.window, int(x.shape[-1])
        x = x.reshape(height // rows, rows, width // columns, columns, channels).transpose(1, 2)
        return x.reshape(-1, rows * columns, channels)

    def join(self, x: Tensor) -> Tensor:
        """Inverse of :meth:`cut`, without the padding."""
        (height, width), (rows, columns), channels = self.padded, self.window, int(x.shape[-1])
        x = x.reshape(height // rows, width // columns, rows, columns, channels).transpose(1, 2)
        x = x.reshape(1, height, width, channels)
        x = self._roll(x, 1) if self.pad_first else x
        x = x[:, :self.height, :self.width] if (height, width) != (self.height, self.width) else x
        return x if self.pad_first else self._roll(x, 1)


    def look_up(self, x: Tensor, padding: Tensor) -> Tensor:
        """As :meth:`cut`, each token looked up by its place: one operation, where moving rows and columns around takes six."""
        (height, width), (rows, columns) = self.padded, self.window
        count, channels = self.height * self.width, int(x.shape[-1])
        down = np.array([count if i is None else i * self.width for i in self._sources(self.height, height, self.shift[0])])
        across = np.array([count if i is None else i for i in self._sources(self.width, width, self.shift[1])])
        x = x.reshape(count, channels)
        padded = count != height * width
        x = torch.cat([x, padding.reshape(1, channels)]) if padded else x
        tables = down.reshape(-1, 1, rows, 1), across.reshape(1, -1, 1, columns)
        return symbols.look_up(x, tables, count if padded else None).reshape(-1, rows * columns, channels)

    def look_back(self, x: Tensor) -> Tensor:
        """(windows, heads, tokens, channels) to (H * W, heads * channels): the inverse of :meth:`look_up`, and heads side by side."""
        (height, width), (rows, columns) = self.padded, self.window
        heads, tokens, channels = (int(s) for s in x.shape[1:])
        down, across = (np.array([self._place(i, *ends) for i in range(ends[0])])
                        for ends in ((self.height, height, self.shift[0]), (self.width, width, self.shift[1])))
        tables = (down // rows * (width // columns * heads * tokens) + down % rows * columns,
                  across // columns * (heads * tokens) + across % columns, np.arange(heads) * tokens)
        shaped = [table.reshape([-1 if i == axis else 1 for i in range(3)]) for axis, table in enumerate(tables)]
        return symbols.look_up(x.reshape(-1, channels), shaped, None).reshape(self.height * self.width, heads * channels)

    def _sources(self, size: int, padded: int, shift: int) -> List[Optional[int]]:
        """Of each place along an axis of the padded, shifted map, where its token comes from; None: padding."""
        if self.pad_first:
            places = [(i + shift) % padded for i in range(padded)]
            return [i if i < size else None for i in places]
        return [(i + shift) % size if i < size else None for i in range(padded)]

    def _place(self, i: int, size: int, padded: int, shift: int) -> int:
        return (i - shift) % (padded if self.pad_first else size)


def _padding(qkv: nn.Module) -> Optional[Tensor]:
    """What stands for 0 after reparameterization, (C,); None where it is 0."""
    fill = getattr(getattr(qkv, 'input_quantizer', None), 'fill', None)
    return fill if fill is not None and bool(fill.any()) else None


def attend_windows(x: Tensor, attention: nn.Module, windows: Windows) -> Tensor:
    """Attention inside shifted windows, of a token map after the LayerNorm: ``windows.height * windows.width`` tokens in any shape."""
    shape = x.shape
    plain = 1, windows.height, windows.width, int(shape[-1])
    if not isinstance(attention.export, IntegerAttention):
        return windows.join(attention(windows.cut(x.reshape(plain), _padding(attention.qkv)), windows.shifted)).reshape(shape)
    # What is moved around are codes, a quarter of the bytes; and each row of the projection has a token for its own, so that it may as
    # well come after the windows are joined, where nothing is padding any more.
    tokens, out = attention.qkv.input_quantizer, attention.proj.input_quantizer
    attention.export.layouts[tokens.export_name] = lambda rows: windows.join(rows).reshape(shape)
    heads = attention.num_heads
    attention.export.layouts[out.export_name] = lambda rows: rows.reshape(*rows.shape[:2], heads, -1).transpose(1, 2)
    codes = windows.look_up(symbols.codes(x, tokens.export_name, torch.uint8), _padding_codes(attention.qkv))
    x = attend_integer(attention, symbols.values(codes, tokens.export_name, centred=True), windows.shifted)
    codes = windows.look_back(symbols.codes(x, out.export_name, torch.uint8)).reshape(shape)
    return attention.proj.export_product(symbols.values(codes, out.export_name, centred=True))


def _padding_codes(qkv: nn.Module) -> Tensor:
    quantizer, value = qkv.input_quantizer, _padding(qkv)
    value = torch.zeros(qkv.in_features) if value is None else value
    return quantize(value, quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax).to(torch.uint8)


class IntegerAttention(NamedTuple):
    """What a window attention is exported with whose products are all of codes.

    Attributes:
        products: By ``'q'``, ``'k'`` and ``'v'``, the third of ``qkv`` that makes it, from dequantized tokens (windows, N, C).
        key_sums: Codes of keys, dequantized as they are, (windows, N, C) to what :func:`attend_integer` adds to the scores
            (windows, N, heads); None where that is 0.
        layouts: By quantizer, how its input in the model's own attention becomes that of the graph.
    """
    products: Dict[str, Callable]
    key_sums: Optional[Callable]
    layouts: Dict[str, Callable]


def attend_integer(attention: nn.Module, x: Tensor, shifted: Optional[Tuple[int, ...]]) -> Tensor:
    """Window attention up to its projection, whose scores are a product of int8 codes without zero points, which runtimes have a kernel
    for: dequantized tokens (windows, N, C) to (windows, heads, N, C / heads).

    The scores are s (q - a) (k - b), with codes q and k and their zero points a and b. Of the four terms of that, those with b are the
    same for all keys of a query, and softmax does not see them. What is left beside s q k is -s a sum(k), a number a key.
    """
    export, heads = attention.export, attention.num_heads
    windows, tokens, channels = (int(s) for s in x.shape)
    quantizers = dict(q=attention.matmul_qk.lhs_quantizer, k=attention.matmul_qk.rhs_quantizer, v=attention.matmul_av.rhs_quantizer)
    back = dict(q=(0, 2, 1, 3), k=(0, 3, 1, 2), v=(0, 2, 1, 3))
    found = {}
    for part, quantizer in quantizers.items():
        name = quantizer.export_name
        dtype = torch.uint8 if quantizer.export_shift is None else torch.int8
        # Dequantized before the heads part: OpenVINO finds the integer product so.
        found[part] = symbols.values(symbols.codes(export.products[part](x), name, dtype), name, centred=part != 'v')
        export.layouts[name] = lambda rows, part=part: rows.permute(back[part]).reshape(windows, tokens, channels)
    q = found['q'].reshape(windows, tokens, heads, channels // heads).transpose(1, 2)
    k, v = (_heads_first(found[part], heads) for part in 'kv')
    scores = torch.matmul(q, k.transpose(2, 3))
    if export.key_sums is not None:
        scores = scores + export.key_sums(found['k']).transpose(1, 2).unsqueeze(2)
    scores = symbols.position_bias(scores, attention.export_name)
    if shifted is not None:
        scores = symbols.window_mask(scores, shifted, MASKED)
    weights = apply_edge(attention.matmul_av.lhs_quantizer, attention.softmax(scores))
    return torch.matmul(weights, v)


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """(windows, N, C) to (windows, heads, N, C / heads), by looking rows up: a transpose of codes goes byte by byte in OpenVINO. (One
    of queries is none there, it becomes the stride of their product.)"""
    windows, tokens, channels = (int(s) for s in x.shape)
    rows = torch.arange(tokens * heads).reshape(tokens, heads).t().reshape(-1)
    return x.reshape(windows, tokens * heads, channels // heads)[:, rows].reshape(windows, heads, tokens, channels // heads)


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
    return attend_windows(query, self.w_msa, Windows(height, width, (window, window), (shift, shift), pad_first=True))


def timm_attention(self, x: Tensor) -> Tensor:
    """``_attn`` of timm's ``SwinTransformerBlock``: (1, H, W, C) to (1, H, W, C)."""
    height, width = (int(s) for s in x.shape[1:3])
    return attend_windows(x, self.attn, Windows(height, width, tuple(self.window_size), tuple(self.shift_size), pad_first=False))


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
