"""What a long run says of itself on the console: what it does now, for how long, and how long it still takes."""
import contextlib
import logging
import re
import sys
import time
from typing import Iterator, Optional, Sequence, TextIO, Tuple

HEARTBEAT = 15.  # seconds between two lines of one step


def clock(seconds: float) -> str:
    """``seconds`` as minutes and seconds, such as ``3:07``."""
    whole = max(0, int(round(seconds)))
    return f'{whole // 60}:{whole % 60:02d}'


class Progress:
    """Steps known beforehand, each with the seconds it took on another machine.

    What is left is their sum, scaled by how this machine compares on the steps done so far.

    Args:
        plan: Name and expected seconds of every step, in order.
        stream: Where lines go.
    """

    def __init__(self, plan: Sequence[Tuple[str, float]], stream: Optional[TextIO] = None):
        self.plan, self.stream = list(plan), stream or sys.stdout
        self.begun = time.perf_counter()
        self.done, self.spent = 0, 0.
        self._step_begun, self._spoken = self.begun, self.begun

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.begun

    @property
    def remaining(self) -> float:
        """Expected seconds until the end."""
        if self.done == len(self.plan):
            return 0.
        done = sum(seconds for _, seconds in self.plan[:self.done])
        now = self.plan[self.done][1]
        later = sum(seconds for _, seconds in self.plan[self.done + 1:])
        running = time.perf_counter() - self._step_begun
        pace = self.spent / done if done else 1.
        if running > now * pace:  # it takes longer than thought, and so will the others
            pace = (self.spent + running) / (done + now)
        return max(0., now * pace - running) + later * pace

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
        self.spent, self.done, self._step_begun = self.spent + now - self._step_begun, self.done + 1, now

    def beat(self, detail: str) -> None:
        """Within a step: ``detail`` on a line, unless the last line is younger than :data:`HEARTBEAT` seconds."""
        if time.perf_counter() - self._spoken >= HEARTBEAT:
            self.say(f'[{clock(self.elapsed):>5}, about {clock(self.remaining)} left]    {detail}')


class LogBeat(logging.Handler):
    """Turns the lines of a runner's log that count something into beats of a :class:`Progress`."""

    COUNTED = ((re.compile(r'^Samples \[\s*(\d+)/(\d+)\]'), 'making samples, step {} of {}'),
               (re.compile(r'^Iter\(train\)\s*\[\s*(\d+)/(\d+)\]'), 'training the student, step {} of {}'))

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
