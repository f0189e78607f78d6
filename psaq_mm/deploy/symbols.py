# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Symbols: operations in a traced graph that ``lowering.py`` replaces, for quantizers, integer weights and attention
masks.

Traced without them, a quantizer would become six float operations and a weight a float tensor, and constants of equal
value would be merged. A symbol has a name instead, by which the export finds what it stands for in its tables.
"""

import math
from typing import Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    'CAST_VALUE',
    'DOMAIN',
    'codes',
    'look_up',
    'mark_tap',
    'position_bias',
    'quantizer',
    'values',
    'weight',
    'quantized',
    'weight_rows',
    'window_mask',
]

DOMAIN = 'psaq_mm'

CAST_VALUE = '.cast_value'
"""How the name of a weight ends that is dequantized by a cast and a multiplication, see :mod:`.products`."""


class _Named(torch.autograd.Function):
    """An operation on one tensor whose result has its shape; ``kind`` is what the graph calls it."""

    @staticmethod
    def forward(ctx, x, kind, name):
        return x.clone()

    @staticmethod
    def symbolic(g, x, kind, name):
        return g.op(f'{DOMAIN}::{kind}', x, name_s=name).setType(x.type())


class _Codes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, name, dtype):
        return x.to(dtype)

    @staticmethod
    def symbolic(g, x, name, dtype):
        return g.op(f'{DOMAIN}::Codes', x, name_s=name).setType(x.type().with_dtype(dtype))


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx, codes, name, centred):
        return codes.float()

    @staticmethod
    def symbolic(g, codes, name, centred):
        return g.op(f'{DOMAIN}::Values', codes, name_s=name, centred_i=int(centred)).setType(
            codes.type().with_dtype(torch.float32)
        )


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, channels, entries, shapes, limit):
        places = sum(np.reshape(values, shape) for values, shape in zip(entries, shapes))
        return rows[
            torch.from_numpy(np.minimum(places, np.inf if limit is None else limit).astype(np.int64).reshape(-1))
        ]

    @staticmethod
    def symbolic(g, rows, channels, entries, shapes, limit):
        flat = dict(
            entries_i=[e for values in entries for e in values], shapes_i=[s for shape in shapes for s in shape]
        )
        total = math.prod(max(shape[axis] for shape in shapes) for axis in range(len(shapes[0])))
        return g.op(
            f'{DOMAIN}::LookUp', rows, tables_i=len(shapes), limit_i=-1 if limit is None else limit, **flat
        ).setType(rows.type().with_sizes([total, channels]))


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, one, name, shape):
        return one.new_zeros(shape)

    @staticmethod
    def symbolic(g, one, name, shape):
        return g.op(f'{DOMAIN}::Weight', name_s=name).setType(one.type().with_sizes(list(shape)))


class _Quantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, name):
        return x.to(torch.float32, copy=True)

    @staticmethod
    def symbolic(g, x, name):
        return g.op(f'{DOMAIN}::Quantized', x, name_s=name).setType(x.type().with_dtype(torch.float32))


class _WeightRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, places, name, width):
        return torch.zeros(len(places), width)

    @staticmethod
    def symbolic(g, places, name, width):
        rows = g.op(f'{DOMAIN}::WeightRows', places, name_s=name)
        return rows.setType(places.type().with_dtype(torch.float32).with_sizes([None, width]))


class _WindowMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, windows, value):
        return scores.clone()

    @staticmethod
    def symbolic(g, scores, windows, value):
        return g.op(f'{DOMAIN}::WindowMask', scores, windows_i=list(windows), value_f=value).setType(scores.type())


def quantizer(x: Tensor, name: str) -> Tensor:
    """``x`` quantized and dequantized by the quantizer ``name``."""
    return _Named.apply(x, 'Quantizer', name)


def codes(x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """The codes of ``x`` by the quantizer ``name``: for operations that only move them, before :func:`values`."""
    return _Codes.apply(x, name, dtype)


def values(codes: Tensor, name: str, centred: bool = False) -> Tensor:
    """What codes of the quantizer ``name`` stand for; ``centred``: as if its zero point were 0."""
    return _Values.apply(codes, name, centred)


def look_up(rows: Tensor, tables: Sequence[np.ndarray], limit: Optional[int]) -> Tensor:
    """``rows[min(sum(tables), limit)]``, whose many indices stand in the graph as a few.

    Args:
        rows: (count, C).
        tables: Integers, of shapes that broadcast.
        limit: The greatest index, which stands for all beyond it; None where there is none beyond.

    Returns:
        (product of the tables' broadcast shape, C).
    """
    return _LookUp.apply(
        rows, int(rows.shape[1]), [t.reshape(-1).tolist() for t in tables], [t.shape for t in tables], limit
    )


def mark_tap(x: Tensor, name: str) -> Tensor:
    """``x``, a tensor that verification feeds: a layer's exact input, whatever rounding came before it."""
    return _Named.apply(x, 'Tap', name)


def weight(x: Tensor, name: str, shape: Tuple[int, ...]) -> Tensor:
    """The integer weight ``name`` of this shape, dequantized, to be multiplied with ``x``."""
    # Traced from one value of the input: a tensor of the weight's size would be copied with each node of the graph.
    return _Weight.apply(x.reshape(-1)[0], name, shape)


def quantized(x: Tensor, name: str) -> Tensor:
    """A tensor that is quantized already by ``name``, the input quantizer of the layer that reads it: what the graph
    has for :func:`codes` of it (where ``x`` is codes) or for :func:`quantizer` of it (where ``x`` is their values).
    Nothing else may read it.
    """
    return _Quantized.apply(x, name)


def weight_rows(places: Tensor, name: str, width: int) -> Tensor:
    """Rows (n, width) of the integer weight ``name`` (channels, width, 1, 1), dequantized.

    Args:
        places: int64 (n,), the channel of each row.
        name: Of the weight.
        width: Its input channels.
    """
    return _WeightRows.apply(places, name, width)


def position_bias(scores: Tensor, name: str) -> Tensor:
    """Attention scores (windows, heads, N, N) with the relative position bias of the attention ``name`` added."""
    # As a tensor it would be folded into (heads, N, N) values for each block, fourteen times what its table has.
    return _Named.apply(scores, 'PositionBias', name)


def window_mask(scores: Tensor, windows: Tuple[int, ...], value: float) -> Tensor:
    """Attention scores with ``value`` added between two tokens of a window that come from different parts of the image.

    Args:
        scores: (windows, heads, N, N).
        windows: Height and width of the padded token map, of a window, and the shift down and across.
        value: Such as -100.
    """
    return _WindowMask.apply(scores, windows, value)
