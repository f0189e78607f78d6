# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The total variation prior: how much a picture varies, independent of task and model."""

import math
from typing import Any, Iterator, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from psaq_mm.errors import DataError
from psaq_mm.ranks import WholeBatch

__all__ = ['REFERENCE_SHAPE', 'VARIATION_RANGE', 'total_variation', 'variation_target', 'variation_prior']

VARIATION_RANGE = (2500.0, 3000.0)
"""Total variation PSAQ-ViT aims at, drawn uniformly, for a batch of ``REFERENCE_SHAPE`` in standard units."""

REFERENCE_SHAPE = (32, 3, 224, 224)


def total_variation(images: Tensor, whole: Optional[WholeBatch] = None) -> Tensor:
    """Sum of the L2 norms of the differences to the four neighbours: right, below, and on both diagonals.

    Each norm runs over the whole batch. Source: released code of PSAQ-ViT (arXiv 2203.02250, Sec. 3.3), after
    DeepInversion (arXiv 1912.08795, Eq. 3).

    Args:
        images: Shape (B, C, H, W), in standard units.
        whole: The batch that ``images`` are this rank's part of. Defaults to None, they are all of it.

    Returns:
        Shape (), nonnegative.
    """
    if images.dim() != 4:
        raise DataError(f'images must be (batch, channels, height, width), not of shape {tuple(images.shape)}')
    squares = _Squares.apply(images)
    if whole is not None:
        squares = whole.sum(squares)
    # At zero the root has no gradient: it is left out there.
    least = torch.finfo(squares.dtype).tiny
    return torch.where(squares > 0, squares.clamp(min=least).sqrt(), torch.zeros_like(squares)).sum().to(images.dtype)


_NEIGHBOURS = (
    (..., slice(None), slice(None, -1)),
    (..., slice(None), slice(1, None)),  # right
    (..., slice(None, -1), slice(None)),
    (..., slice(1, None), slice(None)),  # below
    (..., slice(None, -1), slice(None, -1)),
    (..., slice(1, None), slice(1, None)),  # falling
    (..., slice(1, None), slice(None, -1)),
    (..., slice(None, -1), slice(1, None)),  # rising
)
_PIXELS = 1 << 17
"""Pixels worked on at a time: their differences stay in the cache, those of all images would not."""


class _Squares(torch.autograd.Function):
    """Sums of the squared differences of images (B, C, H, W) to their four neighbours, float64 of shape (4,).

    Written out because autograd would keep four pictures' worth of differences for each picture.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        ctx.save_for_backward(images)
        sums = images.new_zeros(4, dtype=torch.float64)
        for planes in _planes(images):
            # Channel by channel: its norm does not depend on the rest of the batch, so that ranks with parts of a batch
            # get the sums of one rank.
            norms = torch.stack([torch.linalg.vector_norm(a - b, dim=(1, 2)) for a, b in _pairs(planes)])
            sums += norms.double().square().sum(1)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (images,) = ctx.saved_tensors
        factors = (2 * grad).to(images.dtype).unbind()
        result = torch.zeros_like(images, memory_format=torch.contiguous_format)
        for planes, slopes in zip(_planes(images), _planes(result)):
            for (a, b), (slope_a, slope_b), factor in zip(_pairs(planes), _pairs(slopes), factors):
                difference = (a - b).mul_(factor)
                slope_a += difference
                slope_b -= difference
        return result


def _planes(images: Tensor) -> Sequence[Tensor]:
    """Views (n, H, W) of a few channels of the images; a copy where those do not lie together."""
    height, width = images.shape[2:]
    return images.reshape(-1, height, width).split(max(1, _PIXELS // max(1, height * width)))


def _pairs(planes: Tensor) -> Iterator[Tuple[Tensor, Tensor]]:
    """Views of the pixels and of their neighbours, in each of the four directions."""
    for ours, theirs in zip(_NEIGHBOURS[::2], _NEIGHBOURS[1::2]):
        yield planes[ours], planes[theirs]


def variation_target(level: float, shape: Sequence[int]) -> float:
    """Target of the total variation of a batch of ``shape``, where ``level`` is that of ``REFERENCE_SHAPE``.

    The norms grow with the square root of the number of values, so the target does.

    Args:
        level: Target for ``REFERENCE_SHAPE``; PSAQ-ViT draws it from U(2500, 3000).
        shape: (B, C, H, W).
    """
    return level * math.sqrt(math.prod(shape) / math.prod(REFERENCE_SHAPE))


def variation_prior(images: Tensor, level: float, whole: Optional[WholeBatch] = None) -> Tensor:
    """Distance ``|TV - target|`` to the scaled target, divided by the same scale.

    The result then has one scale for every batch and picture size, so that one weight serves all. PSAQ-ViT's weight is
    0.05 at ``REFERENCE_SHAPE``, where the scale is one.

    Args:
        images: Shape (B, C, H, W), in standard units.
        level: Target for ``REFERENCE_SHAPE``.
        whole: As for :func:`total_variation`.

    Returns:
        Shape (), nonnegative.
    """
    scale = variation_target(1.0, images.shape if whole is None else (whole.total, *images.shape[1:]))
    return (total_variation(images, whole) - level * scale).abs() / scale
