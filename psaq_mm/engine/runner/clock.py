# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The time of a run: what its parts take, what is left of a budget, pauses that do not count."""

import contextlib
import time
from typing import Dict, Iterator, Optional

import torch

from psaq_mm.ranks import broadcast_

__all__ = ['RunClock']


class RunClock:
    """Clock of a run.

    Args:
        budget: Seconds that the run may take. None: no bound.

    Attributes:
        seconds: Time of each part of the run, by name.
        paused_seconds: Time of all pauses.
    """

    def __init__(self, budget: Optional[float] = None) -> None:
        self.budget = budget
        self.seconds: Dict[str, float] = dict(synthesis=0.0, student=0.0)
        self.paused_seconds = 0.0
        self._begun = time.perf_counter()
        self._stopped: Optional[float] = None

    def start(self, elapsed: float = 0.0) -> None:
        """Begin the run, of which ``elapsed`` seconds have passed before it was resumed."""
        self._begun = time.perf_counter() - elapsed

    @property
    def elapsed(self) -> float:
        """Seconds of the run so far; pauses do not count."""
        return (time.perf_counter() if self._stopped is None else self._stopped) - self._begun

    @property
    def share(self) -> float:
        """Share of the budget that is used, on every rank by the clock of rank 0; 0 without a budget.

        Ranks that went by their own clocks would not end at the same step.
        """
        return 0.0 if self.budget is None else _of_rank_0(self.elapsed) / self.budget

    def has_time_for(self, seconds: float) -> bool:
        """Whether the budget has ``seconds`` left."""
        return self.budget is None or _of_rank_0(self.elapsed) + seconds < self.budget

    @contextlib.contextmanager
    def counted(self, name: str) -> Iterator[None]:
        """The block is a part of the run; its time is added to ``seconds[name]``."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begun

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The block is no part of the run."""
        self._stopped = time.perf_counter()
        try:
            yield
        finally:
            pause, self._stopped = time.perf_counter() - self._stopped, None
            self._begun += pause
            self.paused_seconds += pause

    @contextlib.contextmanager
    def measured(self) -> Iterator['Lap']:
        """Measures the block, on every rank by the clock of rank 0."""
        lap, begun = Lap(), time.perf_counter()
        yield lap
        lap.seconds = _of_rank_0(time.perf_counter() - begun)


class Lap:
    """Seconds that :meth:`RunClock.measured` has measured."""

    seconds = 0.0


def _of_rank_0(seconds: float) -> float:
    return float(broadcast_(torch.tensor(seconds, dtype=torch.float64)))
