# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How far the student is from the teacher."""

from typing import Sequence, Union

import torch
from torch import Tensor

from psaq_mm.errors import DataError

__all__ = ['normalized_l1']


def normalized_l1(
    student: Union[Tensor, Sequence[Tensor]],
    teacher: Union[Tensor, Sequence[Tensor]],
    reduction: str = 'mean',
    eps: float = 1e-6,
) -> Tensor:
    """Mean absolute difference of outputs of several scales, each in units of the teacher's own spread.

    For every feature map and every sample the mean of |student - teacher| is divided by the teacher's mean absolute
    deviation from its mean, then the maps are averaged. So scales weigh alike, 0 means equal, and about 1 means no
    better than the teacher's mean. The divisor is a constant: neither the student nor a sample can lower the
    result by changing the teacher's spread. It is taken a sample, so batches and ranks do not couple.

    Computed in float32 (float64 for float64 input). Source: the mean absolute error of teacher and student outputs is
    the discrepancy named in PSAQ-ViT V2 (arXiv 2209.05687); the normalization is this project's.

    Args:
        student: Feature maps, each (B, ...), or a single one.
        teacher: Feature maps of the same shapes.
        reduction: 'mean' for a scalar, 'none' for one value a sample.
        eps: Least divisor, for maps that are constant.

    Returns:
        Shape () or (B,); differentiable with respect to both.

    Raises:
        DataError: On an empty list, or numbers or shapes of maps that differ.

    Example:
        >>> normalized_l1([torch.zeros(2, 4)], [torch.tensor([[1., -1., 1., -1.]] * 2)])
        tensor(1.)
    """
    students, teachers = _maps(student), _maps(teacher)
    if not teachers or len(students) != len(teachers):
        raise DataError(
            f'student and teacher give {len(students)} and {len(teachers)} feature maps; '
            'take the same ones, at least one, from both'
        )
    if reduction not in ('mean', 'none'):
        raise DataError(f"reduction={reduction!r} must be 'mean' or 'none'")
    losses = []
    for index, (ours, theirs) in enumerate(zip(students, teachers)):
        if ours.shape != theirs.shape or not ours.numel():
            raise DataError(
                f'feature map {index} is {tuple(ours.shape)} in the student and {tuple(theirs.shape)} in the '
                'teacher; both must see the same images at the same scale'
            )
        ours, theirs = _wide(ours).reshape(len(ours), -1), _wide(theirs).reshape(len(theirs), -1)
        losses.append((ours - theirs).abs().mean(1) / spread_of(theirs, eps))
    if reduction == 'mean':
        return torch.stack([loss.mean() for loss in losses]).mean()
    if len({len(loss) for loss in losses}) > 1:
        raise DataError(
            f"feature maps hold {[len(loss) for loss in losses]} samples; reduction='none' needs one number"
        )
    return torch.stack(losses).mean(0)


def spread_of(values: Tensor, eps: float = 1e-6) -> Tensor:
    """Mean absolute deviation of each row of ``values`` (B, N) from its mean, at least ``eps``: (B,), without
    gradient.
    """
    fixed = values.detach()
    return (fixed - fixed.mean(1, keepdim=True)).abs().mean(1).clamp(min=eps)


def _maps(maps: Union[Tensor, Sequence[Tensor]]) -> Sequence[Tensor]:
    return [maps] if isinstance(maps, Tensor) else list(maps)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
