# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The weight of the discrepancy in the loss of the samples."""

import math
from typing import Any, Dict, Optional, Tuple

from psaq_mm.errors import DataError

__all__ = ['AdaptiveWeight']


class AdaptiveWeight:
    """A weight that adapts, so that samples stay hard for the student and still look like pictures.

    A fixed weight is too weak once the student is good; while the student is bad, it takes samples far from pictures.
    Hardness is the discrepancy on the samples, divided by its running mean in the student's own steps. The weight
    steers it to a target::

        weight <- clamp(weight * (target / hardness) ** rate, *bounds)

    The rule and its constants are this project's; PSAQ-ViT V2 (arXiv 2209.05687) only says that both evolve
    against each other.

    Args:
        weight: First weight.
        target: Hardness to hold, above 1: samples are this many times as hard as what the student learned last.
        rate: How fast the weight follows, 0 .. 1; 0 holds it fixed.
        momentum: Of the running mean of the student's discrepancy, 0 .. 1.
        bounds: Least and greatest weight.

    Raises:
        DataError: On a setting out of range.

    Example:
        >>> weight = AdaptiveWeight()
        >>> weight.observe(0.2)   # after a step of the student
        >>> weight.follow(0.1) > 1.0   # samples too easy: seek the discrepancy more
        True
    """

    def __init__(
        self,
        weight: float = 1.0,
        target: float = 1.5,
        rate: float = 0.1,
        momentum: float = 0.9,
        bounds: Tuple[float, float] = (0.01, 10.0),
    ) -> None:
        low, high = bounds
        if not 0 <= low <= weight <= high < math.inf:
            raise DataError(f'weight={weight} must be within bounds={bounds}, which must be finite and not negative')
        if not target > 0:
            raise DataError(f'target={target} must be positive')
        for name, value in (('rate', rate), ('momentum', momentum)):
            if not 0 <= value <= 1:
                raise DataError(f'{name}={value} must be within 0 .. 1')
        self.weight, self.target, self.rate, self.momentum, self.bounds = float(weight), target, rate, momentum, bounds
        self.reference: Optional[float] = None

    def observe(self, discrepancy: float) -> None:
        """Take note of the student's discrepancy in one of its own steps."""
        value = _checked(discrepancy)
        mixed = value if self.reference is None else self.momentum * self.reference + (1 - self.momentum) * value
        self.reference = mixed

    def follow(self, discrepancy: float) -> float:
        """Move the weight for a step of the samples, and return it.

        Args:
            discrepancy: Value on the samples in this step. Before the first :meth:`observe` the weight stays.
        """
        value = _checked(discrepancy)
        if self.reference:
            # A discrepancy of 0 asks for all there is, and the bound gives it.
            hardness = max(value / self.reference, 1e-6)
            self.weight = min(max(self.weight * (self.target / hardness) ** self.rate, self.bounds[0]), self.bounds[1])
        return self.weight

    def state_dict(self) -> Dict[str, Any]:
        """State, to be saved in a checkpoint."""
        return dict(weight=self.weight, reference=self.reference)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; a weight outside the present bounds is moved into them."""
        missing = {'weight', 'reference'} - set(state)
        if missing:
            raise DataError(f'state of a weight lacks {sorted(missing)}; it was not saved by AdaptiveWeight')
        self.weight = min(max(float(state['weight']), self.bounds[0]), self.bounds[1])
        self.reference = state['reference']


def _checked(discrepancy: float) -> float:
    value = float(discrepancy)
    if not (math.isfinite(value) and value >= 0):
        raise DataError(f'discrepancy={value} must be finite and not negative; check teacher and student for NaN')
    return value
