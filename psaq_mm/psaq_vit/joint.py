# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Samples that change in the student's own steps: one pass through both networks has the gradients of weights and of
pixels.

In rounds, a step of the samples goes through teacher and student forward and backward, and so does a step of the
student. Here one backward pass serves both: weights go down the discrepancy, and the same gradient, with its sign
changed, takes the pixels up.

Source: samples and student that compete are PSAQ-ViT V2's (arXiv 2209.05687, section III); one backward pass for an
input and the weights is that of "free" adversarial training (Shafahi et al., arXiv 1904.12843, algorithm 1), the
changed sign the gradient reversal of Ganin and Lempitsky (arXiv 1409.7495, section 3). That procedural pictures
perturbed against the student are worth more than they were is reported for the distillation of classifiers (arXiv
2310.13782).
"""

from typing import NamedTuple, Sequence, Tuple

import torch
from torch import Tensor

from psaq_mm.pictures import ImageSpec

__all__ = ['Drawn', 'scale_gradient', 'step_of']


class Drawn(NamedTuple):
    """How a batch came out of the pool, which is what it takes to put it back.

    Attributes:
        indices: Places in the pool of this rank's samples, (n,); -1 for those of no place.
        own: Which of the whole batch they are.
        count: Samples in the whole batch.
        flip: Which are flipped, boolean (n, 1, 1, 1).
        shift: By how many pixels all are rolled, down and across.
    """

    indices: Tensor
    own: Sequence[int]
    count: int
    flip: Tensor
    shift: Tuple[int, int]

    def moved(self, images: Tensor) -> Tensor:
        """Images (n, C, H, W) of the pool as the student sees them."""
        return torch.where(self.flip, images.flip(-1), images).roll(shifts=self.shift, dims=(-2, -1))

    def moved_back(self, images: Tensor) -> Tensor:
        """What :meth:`moved` made, undone."""
        images = images.roll(shifts=tuple(-s for s in self.shift), dims=(-2, -1))
        return torch.where(self.flip.to(images.device), images.flip(-1), images)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x``, through which gradients come back ``factor`` times as large; a negative factor changes their sign."""
    return _ScaleGradient.apply(x, factor)


def step_of(values: Tensor, rate: float, image_spec: ImageSpec) -> Tensor:
    """Samples one step down their gradient.

    Every sample moves by ``rate`` (root mean square over its pixels), whatever the length of its gradient: neither the
    scale of a loss under mixed precision nor the size of the batch matters. One whose gradient is 0 or not finite
    stays.

    Args:
        values: Leaf (n, C, H, W) in standard units, with its gradient.
        rate: In standard units.
        image_spec: Units and range of the samples.

    Returns:
        (n, C, H, W) in the model's units, within their range, without gradient.
    """
    gradient = values.grad.detach().to(torch.float32, copy=True)
    length = gradient.square().mean((1, 2, 3), keepdim=True).sqrt_()
    usable = torch.isfinite(length) & (length > 0)
    step = torch.where(
        usable, gradient.mul_(rate) / length.where(usable, torch.ones_like(length)), torch.zeros_like(gradient)
    )
    return image_spec.clamp(image_spec.from_standard(values.detach() - step))
