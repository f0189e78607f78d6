# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Window attention of Swin for one image, in a form that exports well: windows, masks and heads are look-ups, whose
tables are small on disk.
"""

from dataclasses import dataclass, field
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.deploy import symbols
from psaq_mm.quantization import apply_edge, quantize

__all__ = [
    'AttentionExport',
    'Operand',
    'TracedWindows',
    'Tracing',
    'Windows',
    'attend_integer',
    'attend_windows',
    'cut_attention',
    'merge_patches',
    'window_attention',
]

MASKED = -100.0  # as the libraries have it


@dataclass
class Tracing:
    """State of one trace of a model.

    Attributes:
        dynamic: Whether the graph finds out height and width when it runs.
        layouts: By quantizer whose input in the graph has another layout than in the model: the function from the
            model's to the graph's.
        cache: Tensors that several layers read, by what they are computed from. That is kept with them, because its
            identity is the key.
    """

    dynamic: bool = False
    layouts: Dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    cache: Dict[Tuple, Tuple] = field(default_factory=dict)

    def begin(self, dynamic: bool) -> None:
        """Start a trace; the state of the last one is dropped."""
        self.dynamic = dynamic
        self.layouts.clear()
        self.cache.clear()


@dataclass
class Windows:
    """How a token map is cut into shifted windows. Tokens are looked up by their places: this is one operation, and
    moving rows and columns around would be six.

    Attributes:
        height: Of the token map.
        width: Of the token map.
        window: Height and width of a window, in tokens.
        shift: Down and across, in tokens.
        pad_first: Whether padding comes before the shift, as in OpenMMLab; timm shifts first.
    """

    height: int
    width: int
    window: Tuple[int, int]
    shift: Tuple[int, int]
    pad_first: bool

    @property
    def plain(self) -> 'Windows':
        """Windows of the size in this trace, as constants."""
        return self

    @property
    def padded(self) -> Tuple[int, int]:
        """Height and width after padding."""
        return self.height + -self.height % self.window[0], self.width + -self.width % self.window[1]

    def cut(self, x: Tensor, padding: Tensor) -> Tensor:
        """Tokens (H * W, C) to (windows, tokens, C), with ``padding`` (C,) where there is no token."""
        (height, width), (rows, columns) = self.padded, self.window
        count, channels = self.height * self.width, int(x.shape[-1])
        down = np.array(
            [count if i is None else i * self.width for i in self._sources(self.height, height, self.shift[0])]
        )
        across = np.array([count if i is None else i for i in self._sources(self.width, width, self.shift[1])])
        padded = count != height * width
        x = torch.cat([x, padding.reshape(1, channels)]) if padded else x
        tables = down.reshape(-1, 1, rows, 1), across.reshape(1, -1, 1, columns)
        return symbols.look_up(x, tables, count if padded else None).reshape(-1, rows * columns, channels)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`cut`, with heads side by side: (windows, heads, tokens, channels) to
        (H * W, heads * channels).
        """
        (height, width), (rows, columns) = self.padded, self.window
        heads, tokens, channels = (int(s) for s in x.shape[1:])
        down, across = (
            np.array([self._place(i, *ends) for i in range(ends[0])])
            for ends in ((self.height, height, self.shift[0]), (self.width, width, self.shift[1]))
        )
        tables = (
            down // rows * (width // columns * heads * tokens) + down % rows * columns,
            across // columns * (heads * tokens) + across % columns,
            np.arange(heads) * tokens,
        )
        shaped = [table.reshape([-1 if i == axis else 1 for i in range(3)]) for axis, table in enumerate(tables)]
        return symbols.look_up(x.reshape(-1, channels), shaped, None).reshape(
            self.height * self.width, heads * channels
        )

    def valid(self) -> Optional[Tensor]:
        """1 for tokens and 0 for padding, float (windows, tokens, 1); None where nothing is padded."""
        (height, width), (rows, columns) = self.padded, self.window
        if (height, width) == (self.height, self.width):
            return None
        down, across = (
            np.array([i is not None for i in self._sources(*ends)])
            for ends in ((self.height, height, self.shift[0]), (self.width, width, self.shift[1]))
        )
        valid = down.reshape(-1, 1, rows, 1) & across.reshape(1, -1, 1, columns)
        return torch.from_numpy(valid.reshape(-1, rows * columns, 1)).float()

    def mask(self, scores: Tensor) -> Tensor:
        """Scores (windows, heads, tokens, tokens) with :data:`MASKED` added between tokens that are in one window only
        because of the shift.
        """
        if not any(self.shift):
            return scores
        return symbols.window_mask(scores, (*self.padded, *self.window, *self.shift), MASKED)

    def _sources(self, size: int, padded: int, shift: int) -> List[Optional[int]]:
        """For each place along an axis of the padded, shifted map, the place of its token; None: padding."""
        if self.pad_first:
            places = [(i + shift) % padded for i in range(padded)]
            return [i if i < size else None for i in places]
        return [(i + shift) % size if i < size else None for i in range(padded)]

    def _place(self, i: int, size: int, padded: int, shift: int) -> int:
        return (i - shift) % (padded if self.pad_first else size)


@dataclass
class TracedWindows(Windows):
    """Windows of a token map whose size the graph finds out when it runs: their places are computed in the graph.
    Padding comes first.

    Attributes:
        size: Height and width in the trace.
        cache: See :class:`Tracing`.
    """

    size: Tuple[Tensor, Tensor] = ()
    cache: Dict[Tuple, Tuple] = field(default_factory=dict)

    @property
    def plain(self) -> Windows:
        """As :attr:`Windows.plain`."""
        return Windows(self.height, self.width, self.window, self.shift, self.pad_first)

    def _once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        key = name, self.window, self.shift, *map(id, self.size)
        if key not in self.cache:
            self.cache[key] = make(), self.size
        return self.cache[key][0]

    def _axes(self) -> List[Tuple[Tensor, Tensor, int, int]]:
        """For each axis: size, padded size, side of a window, shift."""
        return [
            (size, torch.div(size + side - 1, side, rounding_mode='floor') * side, side, shift)
            for size, side, shift in zip(self.size, self.window, self.shift)
        ]

    def cut(self, x: Tensor, padding: Tensor) -> Tensor:
        """As :meth:`Windows.cut`."""
        channels = int(x.shape[-1])

        def places() -> Tensor:
            (height, width), axes = self.size, []
            for size, padded, _, shift in self._axes():
                source = torch.remainder(torch.arange(padded) + shift, padded)
                axes.append(torch.where(source < size, source if axes else source * width, height * width))
            down, across = axes[0].reshape(-1, 1, self.window[0], 1), axes[1].reshape(1, -1, 1, self.window[1])
            return torch.minimum(down + across, height * width).reshape(-1)

        x = torch.cat([x, padding.reshape(1, channels)])
        return x.index_select(0, self._once('sources', places)).reshape(-1, self.window[0] * self.window[1], channels)

    def join(self, x: Tensor) -> Tensor:
        """As :meth:`Windows.join`."""
        heads, tokens, channels = (int(s) for s in x.shape[1:])

        def places() -> Tensor:
            (height, padded_height, rows, down), (width, padded_width, columns, across) = self._axes()
            y = torch.remainder(torch.arange(height) - down + padded_height, padded_height)
            x = torch.remainder(torch.arange(width) - across + padded_width, padded_width)
            row, column = (torch.div(i, side, rounding_mode='floor') for i, side in ((y, rows), (x, columns)))
            across = torch.div(padded_width, columns, rounding_mode='floor')
            y = row * across * (heads * tokens) + torch.remainder(y, rows) * columns
            x = column * (heads * tokens) + torch.remainder(x, columns)
            return (
                y.reshape(-1, 1, 1) + x.reshape(1, -1, 1) + (torch.arange(heads) * tokens).reshape(1, 1, -1)
            ).reshape(-1)

        return (
            x.reshape(-1, channels).index_select(0, self._once(f'places {heads}', places)).reshape(-1, heads * channels)
        )

    def valid(self) -> Tensor:
        """As :meth:`Windows.valid`."""

        def valid() -> Tensor:
            down, across = (
                torch.remainder(torch.arange(padded) + shift, padded) < size for size, padded, _, shift in self._axes()
            )
            valid = down.reshape(-1, 1, self.window[0], 1) & across.reshape(1, -1, 1, self.window[1])
            return valid.reshape(-1, self.window[0] * self.window[1], 1).float()

        return self._once('valid', valid)

    def mask(self, scores: Tensor) -> Tensor:
        """As :meth:`Windows.mask`."""

        def mask() -> Tensor:
            down, across = (
                (torch.arange(padded) >= padded - side).long() + (torch.arange(padded) >= padded - shift).long()
                for _, padded, side, shift in self._axes()
            )
            parts = down.reshape(-1, 1, self.window[0], 1) * 3 + across.reshape(1, -1, 1, self.window[1])
            parts = parts.reshape(-1, self.window[0] * self.window[1])
            return ((parts.unsqueeze(1) != parts.unsqueeze(2)).float() * MASKED).unsqueeze(1)

        return scores + self._once('mask', mask) if any(self.shift) else scores


class Operand(NamedTuple):
    """How an operand of a window attention is quantized.

    Attributes:
        quantizer: Name of its quantizer.
        shift: See :attr:`.exportable.Codes.shift`.
    """

    quantizer: str
    shift: Optional[int]

    def codes(self, x: Tensor) -> Tensor:
        """Codes of ``x``."""
        return symbols.codes(x, self.quantizer, torch.uint8 if self.shift is None else torch.int8)

    def values(self, codes: Tensor, centred: bool = True) -> Tensor:
        """What codes stand for, see :func:`.symbols.values`."""
        return symbols.values(codes, self.quantizer, centred)


@dataclass(frozen=True)
class AttentionExport:
    """What the forward of an exported window attention reads beside the module.

    Attributes:
        name: Of the attention.
        tracing: State of the current trace.
        products: See :attr:`.exportable.ExportableModel.products`.
        operands: Operands of the attention's products if all of them are codes: ``'tokens'`` (input of ``qkv``),
            ``'q'``, ``'k'``, ``'v'`` and ``'out'`` (input of ``proj``); else None.
        biased: Whether it has a position bias, see :attr:`.exportable.ExportableModel.positions`.
        vanishing: Whether queries, and keys, are 0 where there is padding, and something else than a factor is done to
            them.
    """

    name: str
    tracing: Tracing
    products: Mapping[str, Callable[[Tensor], Tensor]]
    operands: Optional[Mapping[str, Operand]]
    biased: bool
    vanishing: Tuple[bool, bool] = (False, False)

    def part(self, name: str) -> str:
        """Dotted name of a part of the attention."""
        return f'{self.name}.{name}'

    def add_position_bias(self, scores: Tensor) -> Tensor:
        """Scores (windows, heads, N, N) with the position bias added, if there is one."""
        return symbols.position_bias(scores, self.name) if self.biased else scores


def _padding(qkv: nn.Module, channels: int) -> Tensor:
    """The value that replaces 0 after reparameterization, (C,)."""
    fill = getattr(getattr(qkv, 'input_quantizer', None), 'fill', None)
    return torch.zeros(channels) if fill is None else fill


def attend_windows(x: Tensor, attention: nn.Module, export: AttentionExport, windows: Windows) -> Tensor:
    """Attention inside shifted windows, of tokens after the LayerNorm, (1, H * W, C)."""
    channels, heads, layouts = int(x.shape[-1]), attention.num_heads, export.tracing.layouts
    padding = _padding(attention.qkv, channels)
    if export.operands is None:
        tokens = windows.cut(x.reshape(-1, channels), padding)
        return windows.join(attention(tokens, windows).unsqueeze(1)).unsqueeze(0)
    # What is moved around are codes, a quarter of the bytes. Each row of the projection reads one token, so that it may
    # as well come after the windows are joined, where nothing is padding any more.
    tokens, out, plain = export.operands['tokens'], export.operands['out'], windows.plain
    layouts[tokens.quantizer] = lambda rows: plain.join(rows.unsqueeze(1)).unsqueeze(0)
    layouts[out.quantizer] = lambda rows: rows.reshape(*rows.shape[:2], heads, -1).transpose(1, 2)
    quantizer = attention.qkv.input_quantizer
    padding = quantize(padding, quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax).to(torch.uint8)
    # Quantized before any reshape: OpenVINO's LayerNorm then writes the codes itself.
    codes = windows.cut(tokens.codes(x).reshape(-1, channels), padding)
    x = attend_integer(attention, export, tokens.values(codes), windows)
    return export.products[export.part('proj')](out.values(windows.join(out.codes(x)).unsqueeze(0)))


def _scaled(
    attention: nn.Module, export: AttentionExport, q: Tensor, k: Tensor, windows: Windows
) -> Tuple[Tensor, Tensor]:
    """:meth:`.WindowAttentionMixin.scaled` of queries and keys (windows, N, heads, D)."""
    valid = windows.valid() if any(export.vanishing) else None
    if valid is not None:
        # What rounding leaves of a 0 here would become a vector of length 1 when it is normalized.
        q, k = (t * valid.unsqueeze(-1) if zero else t for t, zero in zip((q, k), export.vanishing))
    return attention.scaled(q, k)


def attend_integer(attention: nn.Module, export: AttentionExport, x: Tensor, windows: Windows) -> Tensor:
    """Window attention before its projection, on codes: dequantized tokens (windows, N, C) to
    (windows, heads, N, C / heads).

    The scores are a product of int8 codes without zero points, which runtimes have a kernel for. They are
    s (q - a) (k - b), with codes q and k and their zero points a and b. The terms with b are equal for all keys of a
    query, so softmax does not change with them, nor after a factor of each head. What is left beside s q k is
    -s a sum(k), one number for each key.
    """
    heads = attention.num_heads
    tokens, channels = (int(s) for s in x.shape[1:])
    parts = {part: export.products[export.part(f'qkv.{part}')](x) for part in 'qkv'}
    if attention.query_factor is None:  # else it is part of the weight
        q, k = (parts[part].reshape(-1, tokens, heads, channels // heads) for part in 'qk')
        parts.update(zip('qk', (t.reshape(-1, tokens, channels) for t in _scaled(attention, export, q, k, windows))))
    back = dict(q=(0, 2, 1, 3), k=(0, 3, 1, 2), v=(0, 2, 1, 3))
    values = {}
    for part, axes in back.items():
        operand = export.operands[part]
        # Dequantized before the heads are separated: only then OpenVINO finds the integer product.
        values[part] = operand.values(operand.codes(parts[part]), part != 'v')
        export.tracing.layouts[operand.quantizer] = lambda rows, axes=axes: rows.permute(axes).reshape(
            -1, tokens, channels
        )
    q = values['q'].reshape(-1, tokens, heads, channels // heads).transpose(1, 2)
    k, v = (_heads_first(values[part], heads) for part in 'kv')
    scores = torch.matmul(q, k.transpose(2, 3))
    key_sums = export.products.get(export.part('key_sums'))
    if key_sums is not None:
        scores = scores + key_sums(values['k']).transpose(1, 2).unsqueeze(2)
    scores = windows.mask(export.add_position_bias(attention.scaled_scores(scores)))
    weights = apply_edge(attention.matmul_av.lhs_quantizer, attention.softmax(scores))
    return torch.matmul(weights, v)


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """Separate heads by looking rows up: (windows, N, C) to (windows, heads, N, C / heads). OpenVINO transposes codes
    byte by byte. (It does not for queries: their transpose becomes the stride of the product.)
    """
    tokens, channels = (int(s) for s in x.shape[1:])
    rows = torch.from_numpy(np.arange(tokens * heads).reshape(tokens, heads).T.reshape(-1))
    return (
        x.reshape(-1, tokens * heads, channels // heads)
        .index_select(1, rows)
        .reshape(-1, heads, tokens, channels // heads)
    )


def window_attention(attention: nn.Module, export: AttentionExport, x: Tensor, windows: Windows) -> Tensor:
    """Forward of a quantized window attention.

    Args:
        attention: The module.
        export: What the export knows of it.
        x: Tokens of windows, (windows, N, C).
        windows: How they were cut.
    """
    tokens, channels = (int(s) for s in x.shape[1:])
    heads = attention.num_heads
    q, k, v = attention.qkv(x).reshape(-1, tokens, 3, heads, channels // heads).unbind(2)
    q, k, v = (t.transpose(1, 2) for t in (*_scaled(attention, export, q, k, windows), v))
    scores = attention.scaled_scores(attention.matmul_qk(q, k.transpose(-2, -1)))
    scores = windows.mask(apply_edge(attention.scores_quantizer, export.add_position_bias(scores)))
    x = attention.matmul_av(attention.softmax(scores), v).transpose(1, 2).reshape(-1, tokens, channels)
    return attention.proj(x)


def cut_attention(module: nn.Module, attention: nn.Module, export: AttentionExport, x: Tensor, hw_shape=None) -> Tensor:
    """What a :class:`.CutMixin` does, its ``cut_method``.

    Args:
        module: The module that cuts.
        attention: Its attention.
        export: What the export knows of that.
        x: (1, H * W, C), or a map (1, H, W, C).
        hw_shape: H and W, where ``x`` is no map.
    """
    shape, tracing = x.shape, export.tracing
    size = tuple(shape[1:3]) if hw_shape is None else tuple(hw_shape)
    height, width = (int(s) for s in size)
    windows = Windows(height, width, *module.cut(height, width))
    if tracing.dynamic:
        windows = TracedWindows(height, width, windows.window, windows.shift, True, size, tracing.cache)
    if hw_shape is not None:
        return attend_windows(x, attention, export, windows)
    x = x.reshape(1, height * width, int(shape[3]))
    return attend_windows(x, attention, export, windows).reshape(1, height, width, -1)


def merge_patches(module: nn.Module, tracing: Tracing, x: Tensor, input_size) -> Tuple[Tensor, Tuple[int, int]]:
    """Forward of OpenMMLab's ``PatchMerging`` of 2 x 2 patches, with the channels of one patch side by side. In
    mmpretrain its norm may come after the reduction.

    The library's uses ``nn.Unfold``, which becomes gathers in ONNX and puts the four values of one channel side by
    side. LayerNorm and reduction must be reordered by :func:`patch_order` for this. A size that the graph finds out
    when it runs is even.
    """
    channels = int(x.shape[-1])
    height, width = input_size if tracing.dynamic else (int(s) for s in input_size)
    x = x.reshape(1, height, width, channels)
    if not tracing.dynamic and (height % 2 or width % 2):
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    height, width = (height + 1) // 2, (width + 1) // 2
    x = x.reshape(1, height, 2, width, 2, channels).transpose(2, 3).reshape(1, height * width, 4 * channels)
    steps = [module.reduction] if module.norm is None else [module.norm, module.reduction]
    for step in reversed(steps) if getattr(module, 'use_post_norm', False) else steps:
        x = step(x)
    return x, (height, width)


def patch_order(channels: int) -> Tensor:
    """Where the library keeps each channel of :func:`merge_patches`: int64 (4 * channels,)."""
    return torch.arange(4 * channels).reshape(channels, 4).t().reshape(-1)
