# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A loss whose squared gradients tell how much a model's outputs change with each of its parts, with no label and no
second model.
"""

from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from psaq_mm.calibration.discrepancy import spread_of
from psaq_mm.errors import DataError

__all__ = ['sensitivity_loss']


def sensitivity_loss(parts: Sequence[Tensor], logits: Optional[Tensor], seeds: Tensor) -> Tensor:
    """One random draw of a loss, summed over samples: the expectation of its squared gradient is the diagonal of the
    Gauss-Newton matrix.

    Of class probabilities that is the Fisher matrix, the curvature of their Kullback-Leibler divergence, drawn by
    taking each sample's label from the model's own prediction (Martens, arXiv 1412.1193, section 5). Of other outputs
    it is the curvature of the mean squared difference of each map in units of its own spread: each map is multiplied
    with random signs (Hutchinson's estimator).

    Args:
        parts: Feature maps, each (B, ...); read where there are no logits.
        logits: (B, classes), or None.
        seeds: Integers (B,): the draw of a sample depends on its own alone, whatever batch it is in.

    Returns:
        A scalar.

    Raises:
        DataError: There is nothing to take a loss of, or a number of seeds that is not that of samples.
    """
    outputs = list(parts) if logits is None else [logits]
    if not outputs or any(len(out) != len(seeds) for out in outputs):
        raise DataError(
            f'{len(seeds)} seeds do not fit outputs of {[len(out) for out in outputs]} samples: give one seed a '
            f'sample, and at '
            'least one output'
        )
    draws = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    if logits is not None:
        chances = logits.detach().float().softmax(-1).cpu()
        labels = torch.cat([torch.multinomial(row, 1, generator=draw) for row, draw in zip(chances, draws)])
        return F.cross_entropy(logits.float(), labels.to(logits.device), reduction='sum')
    total = outputs[0].new_zeros((), dtype=torch.float32)
    for out in outputs:
        out = out.float().reshape(len(out), -1)
        signs = (
            torch.stack([torch.randint(0, 2, out.shape[1:], generator=draw, dtype=torch.int8) for draw in draws]).to(
                out
            )
            * 2
            - 1
        )
        total = total + ((out * signs).sum(1) / (spread_of(out) * out.shape[1] ** 0.5)).sum()
    return total
