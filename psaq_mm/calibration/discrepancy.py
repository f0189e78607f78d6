# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The distance of the student's outputs from the teacher's."""

from typing import Sequence, Union

import torch
from torch import Tensor

from psaq_mm.errors import DataError

__all__ = ['normalized_l1']


def normalized_l1(
    student: Union[Tensor, Sequence[Tensor]],
    teacher: Union[Tensor, Sequence[Tensor]],
) -> Tensor:
    """Mean absolute difference of outputs of several scales, each in units of the teacher's own spread.

    For every feature map and every sample the mean of ``|student - teacher|`` is divided by the teacher's mean absolute
    deviation from its mean, then the maps are averaged. So all scales have the same weight, 0 means equal, and about 1
    means no better than the teacher's mean. The divisor is a constant: neither the student nor a sample can lower the
    result by changing the teacher's spread. Each sample has its own, so that the rest of the batch does not matter.

    Computed in float32 (float64 for float64 input). Source: the mean absolute error of teacher and student outputs is
    the discrepancy named in PSAQ-ViT V2 (arXiv 2209.05687); the normalization is this project's.

    Args:
        student: Feature maps, each (B, ...), or a single one.
        teacher: Feature maps of the same shapes.

    Returns:
        Shape (); differentiable with respect to both.

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
    losses = []
    for index, (output, target) in enumerate(zip(students, teachers)):
        if output.shape != target.shape or not output.numel():
            raise DataError(
                f'feature map {index} is {tuple(output.shape)} in the student and {tuple(target.shape)} in the '
                'teacher; both must see the same images at the same scale'
            )
        output, target = _wide(output).reshape(len(output), -1), _wide(target).reshape(len(target), -1)
        losses.append(((output - target).abs().mean(1) / spread_of(target)).mean())
    return torch.stack(losses).mean()


def spread_of(values: Tensor) -> Tensor:
    """Mean absolute deviation of each row of ``values`` (B, N), without gradient: (B,). Of a constant it is 1e-6."""
    fixed = values.detach()
    return (fixed - fixed.mean(1, keepdim=True)).abs().mean(1).clamp(min=1e-6)


def _maps(maps: Union[Tensor, Sequence[Tensor]]) -> Sequence[Tensor]:
    return [maps] if isinstance(maps, Tensor) else list(maps)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
