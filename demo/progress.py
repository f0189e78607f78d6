"""What a long run says of itself on the console: what it does now, for how long, and how long it still takes."""

import contextlib
import logging
import math
import re
import statistics
import sys
import time
from typing import Iterator, List, Optional, Sequence, TextIO, Tuple

HEARTBEAT = 15.0  # seconds between two lines of one step


def clock(seconds: float) -> str:
    """``seconds`` as minutes and seconds, such as ``3:07``."""
    whole = max(0, int(round(seconds)))
    return f'{whole // 60}:{whole % 60:02d}'


class Progress:
    """Steps known beforehand, each with the seconds it took on another machine.

    What is left is their sum, scaled by how this machine compares on the steps done so far: the median of their ratios,
    the lower one of two, so that one step that was held up says nothing of the others. The first one also pays for
    imports and cold files: where it was slow, the square root of its ratio counts.

    Args:
        plan: Name and expected seconds of every step, in order.
        stream: Where lines go.
    """

    def __init__(self, plan: Sequence[Tuple[str, float]], stream: Optional[TextIO] = None):
        self.plan, self.stream = list(plan), stream or sys.stdout
        self.begun = time.perf_counter()
        self.ratios: List[float] = []  # of the seconds of each step that is done to those expected
        self._step_begun, self._spoken = self.begun, self.begun

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.begun

    @property
    def remaining(self) -> float:
        """Expected seconds until the end."""
        if self.done == len(self.plan):
            return 0.0
        now = self.plan[self.done][1]
        later = sum(seconds for _, seconds in self.plan[self.done + 1 :])
        running = time.perf_counter() - self._step_begun
        pace = (
            self._pace([*self.ratios, running / now])
            if running > now * self._pace(self.ratios)
            else self._pace(self.ratios)
        )
        return max(0.0, now * pace - running) + later * pace

    @property
    def done(self) -> int:
        """Steps that have ended."""
        return len(self.ratios)

    @staticmethod
    def _pace(ratios: Sequence[float]) -> float:
        """Seconds here for one second of the plan."""
        first, others = ratios[:1], ratios[1:]
        return statistics.median_low([*(min(ratio, math.sqrt(ratio)) for ratio in first), *others] or [1.0])

    def say(self, line: str = '') -> None:
        """A line of its own, at once on the console."""
        print(line, file=self.stream, flush=True)
        self._spoken = time.perf_counter()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """The next step of the plan: announced when it begins, counted when it ends."""
        name = self.plan[self.done][0]
        self._step_begun = time.perf_counter()
        self.say(f'[{clock(self.elapsed):>5}, about {clock(self.remaining)} left]  {name}')
        yield
        now = time.perf_counter()
        self.ratios.append((now - self._step_begun) / self.plan[self.done][1])
        self._step_begun = now

    def beat(self, detail: str) -> None:
        """Within a step: ``detail`` on a line, unless the last line is younger than :data:`HEARTBEAT` seconds."""
        if time.perf_counter() - self._spoken >= HEARTBEAT:
            self.say(f'[{clock(self.elapsed):>5}, about {clock(self.remaining)} left]    {detail}')


class LogBeat(logging.Handler):
    """Turns the lines of a runner's log that count something into beats of a :class:`Progress`."""

    COUNTED = (
        (re.compile(r'^Samples \[\s*(\d+)/(\d+)\]'), 'making samples, step {} of {}'),
        (re.compile(r'^Iter\(train\)\s*\[\s*(\d+)/(\d+)\]'), 'training the student, step {} of {}'),
    )

    def __init__(self, progress: Progress):
        super().__init__(logging.INFO)
        self.progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        """Called by the logger for each line."""
        message = record.getMessage()
        for pattern, sentence in self.COUNTED:
            found = pattern.match(message)
            if found:
                self.progress.beat(sentence.format(*found.groups()))
