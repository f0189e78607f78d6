# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Priors on what a picture looks like, independent of task and model."""
import math
from typing import Optional, Sequence

import torch
from torch import Tensor

from psaq_mm.errors import DataError
from psaq_mm.quantization.reduction import WholeBatch

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
    right = images[..., :, :-1] - images[..., :, 1:]
    below = images[..., :-1, :] - images[..., 1:, :]
    falling = images[..., :-1, :-1] - images[..., 1:, 1:]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    if whole is None:
        return right.norm() + below.norm() + falling.norm() + rising.norm()
    squares = torch.stack([difference.square().sum() for difference in (right, below, falling, rising)])
    return whole.sum(squares).sqrt().sum()


def variation_target(level: float, shape: Sequence[int]) -> float:
    """Total variation that means for a batch of ``shape`` what ``level`` means for ``REFERENCE_SHAPE``.

    The norms grow with the square root of the number of values, so the target does.

    Args:
        level: Target for ``REFERENCE_SHAPE``; PSAQ-ViT draws it from U(2500, 3000).
        shape: (B, C, H, W).
    """
    return level * math.sqrt(math.prod(shape) / math.prod(REFERENCE_SHAPE))


def variation_prior(images: Tensor, level: float, whole: Optional[WholeBatch] = None) -> Tensor:
    """Distance |TV - target| to the scaled target, divided by the same scale.

    The result is then of one size for every batch and picture size, so that one weight serves all.
    PSAQ-ViT weighs it 0.05 at ``REFERENCE_SHAPE``, where both scales are one.

    Args:
        images: Shape (B, C, H, W), in standard units.
        level: Target for ``REFERENCE_SHAPE``.
        whole: As for :func:`total_variation`.

    Returns:
        Shape (), nonnegative.
    """
    scale = variation_target(1.0, images.shape if whole is None else (whole.total, *images.shape[1:]))
    return (total_variation(images, whole) - level * scale).abs() / scale
