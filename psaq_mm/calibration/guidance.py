# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A loss whose squared gradients tell how much the outputs depend on each value inside a model; needs no label."""

from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from psaq_mm.calibration.discrepancy import spread_of
from psaq_mm.errors import DataError

__all__ = ['sensitivity_loss']


def sensitivity_loss(parts: Sequence[Tensor], logits: Optional[Tensor], seeds: Tensor) -> Tensor:
    """One random draw of a loss, summed over samples. Its expected squared gradient is the Gauss-Newton diagonal.

    For class probabilities this is the Fisher matrix, the curvature of their Kullback-Leibler divergence: each sample's
    label is drawn from the model's own prediction (Martens, arXiv 1412.1193, section 5). For other outputs it is the
    curvature of the mean squared difference of each map in units of its own spread: each map is multiplied with random
    signs (Hutchinson's estimator).

    Args:
        parts: Feature maps, each (B, ...); read where there are no logits.
        logits: (B, classes), or None.
        seeds: Integers (B,). The draw of a sample depends on its own seed alone, whatever batch it is in.

    Returns:
        A scalar.

    Raises:
        DataError: There are no outputs, or not one seed for each sample.
    """
    outputs = list(parts) if logits is None else [logits]
    if not outputs or any(len(out) != len(seeds) for out in outputs):
        raise DataError(
            f'{len(seeds)} seeds do not fit outputs of {[len(out) for out in outputs]} samples: give one seed a '
            'sample, and at least one output'
        )
    draws = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    if logits is not None:
        chances = logits.detach().float().softmax(-1).cpu()
        labels = torch.cat([torch.multinomial(row, 1, generator=draw) for row, draw in zip(chances, draws)])
        return F.cross_entropy(logits.float(), labels.to(logits.device), reduction='sum')
    total = outputs[0].new_zeros((), dtype=torch.float32)
    for out in outputs:
        out = out.float().reshape(len(out), -1)
        bits = [torch.randint(0, 2, out.shape[1:], generator=draw, dtype=torch.int8) for draw in draws]
        signs = torch.stack(bits).to(out) * 2 - 1
        total = total + ((out * signs).sum(1) / (spread_of(out) * out.shape[1] ** 0.5)).sum()
    return total
