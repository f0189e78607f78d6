# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Operations that stand in a traced graph for what ``lowering.py`` writes out: quantizers, integer weights, attention masks.

Traced as they are, a quantizer would become six float operations and a weight a float one, and constants of the same value would
be merged whatever they belong to. Each of these carries a name instead, under which the export keeps the real thing.
"""
from typing import Tuple

import torch
from torch import Tensor

__all__ = ['DOMAIN', 'codes', 'mark_tap', 'position_bias', 'quantizer', 'values', 'weight', 'window_mask']

DOMAIN = 'psaq_mm'


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
        return g.op(f'{DOMAIN}::Values', codes, name_s=name, centred_i=int(centred)).setType(codes.type().with_dtype(torch.float32))


class _Weight(torch.autograd.Function):

    @staticmethod
    def forward(ctx, one, name, shape):
        return one.new_zeros(shape)

    @staticmethod
    def symbolic(g, one, name, shape):
        return g.op(f'{DOMAIN}::Weight', name_s=name).setType(one.type().with_sizes(list(shape)))


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


def mark_tap(x: Tensor, name: str) -> Tensor:
    """``x``, a tensor that verification feeds: a layer's exact input, whatever rounding came before it."""
    return _Named.apply(x, 'Tap', name)


def weight(x: Tensor, name: str, shape: Tuple[int, ...]) -> Tensor:
    """The integer weight ``name`` of this shape, dequantized, to be multiplied with ``x``."""
    # Traced from one value of the input: a tensor of the weight's size would be copied with each node of the graph.
    return _Weight.apply(x.reshape(-1)[0], name, shape)


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
