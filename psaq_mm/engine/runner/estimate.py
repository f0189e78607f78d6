# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How long a run still takes: its parts are known from the settings, and each is measured from its first steps on."""

import math
import time
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch

from psaq_mm.engine.samples import Saved
from psaq_mm.progress import Stage
from psaq_mm.quantization import rounding_plan
from psaq_mm.ranks import ranks

__all__ = ['Part', 'RunEstimate', 'in_words', 'parts_of', 'rounding_work']

EVERY = 60.0
"""Seconds between two lines, after the first ones."""


def in_words(seconds: float) -> str:
    """A length of time as it is said: ``'40 seconds'``, ``'6 minutes'``, ``'2.5 hours'``."""
    if seconds < 90:
        rounded = int(round(seconds, -1)) if seconds >= 20 else int(round(seconds))
        return f'{rounded} second{"" if rounded == 1 else "s"}'
    return f'{seconds / 60:.0f} minutes' if seconds < 5400 else f'{seconds / 3600:.1f} hours'


def _each(seconds: float) -> str:
    return f'{seconds:.1f} s' if seconds >= 0.95 else f'{1000 * seconds:.0f} ms'


def rounding_work(layers: Sequence[Tuple[int, int]]) -> List[float]:
    """Seconds that rounding took for weights (outputs, inputs) on one core: a loop over the inputs, in it one over the
    outputs, and factors of a matrix of the inputs.
    """
    return [
        2e-4 * inputs + 1e-8 * outputs * inputs + 1.2e-10 * outputs * inputs**2 + 2e-10 * inputs**3
        for outputs, inputs in layers
    ]


class Part:
    """One part of a run.

    Args:
        name: Description of its stages.
        count: Steps that it has in all.
        guess: Seconds of a step, until it is measured.
        word: What its steps are called.
        work: Of each step relative to the others. Defaults to None, all are alike.

    Attributes:
        done: Steps so far.
        seconds: What they took.
    """

    def __init__(
        self, name: str, count: float, guess: float, word: str = 'pictures', work: Optional[Sequence[float]] = None
    ) -> None:
        self.name, self.count, self.guess, self.word, self.work = name, count, guess, word, work
        self.done, self.seconds = 0.0, 0.0
        self.skipped = 0.0  # done before, in a run that is resumed

    @property
    def measured(self) -> bool:
        """Whether the time of a step is known."""
        return self.done > self.skipped and self.seconds > 0

    @property
    def each(self) -> float:
        """Seconds of a step, or of a unit of work."""
        work = self._work(self.done) - self._work(self.skipped)
        return self.seconds / work if self.measured and work > 0 else self.guess

    @property
    def left(self) -> float:
        """Seconds until it is over."""
        left = (self._work(self.count) - self._work(self.done)) * self.each
        # Within a first step that is longer than it was guessed, no less is left than has passed.
        return max(left, self.seconds if self.done < self.count and not self.measured else 0.0)

    def _work(self, done: float) -> float:
        return done if self.work is None else sum(self.work[: int(done)])

    def describe(self) -> str:
        """In a few words, such as ``'student 400 steps of 0.8 s'``."""
        count = max(self.count - self.done, 0)
        each = f' of {_each(self.each)}' if self.work is None and self.measured else ''
        return f'{self.name.lower()} {count:g} {self.word}{each}'


class RunEstimate:
    """Says how long a run still takes: when its first part is measured, when its student has made its first steps, and
    then at most once a minute.

    It listens to stages (:func:`psaq_mm.progress.listening`). The time of a stage within another one is that of the
    inner part where the run has such a part, else of the outer one.

    Args:
        parts: In order.
        say: Takes a line.
        bound: Seconds that the run has left at most; None: no bound.
        clock: Gives seconds; for tests.
    """

    FIRST = 2
    """Steps after which a part is taken for measured, unless the first ones took :data:`LONG` seconds."""
    LONG = 5.0

    def __init__(
        self,
        parts: Sequence[Part],
        say: Callable[[str], None],
        bound: Callable[[], Optional[float]] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.parts = {part.name: part for part in parts}
        self._say, self._bound, self._clock = say, bound, clock
        self._seen: Dict[Stage, float] = {}
        self._last = clock()
        self._current: Optional[Part] = None
        self._spoken: Optional[float] = None
        self._told: List[str] = []

    @property
    def left(self) -> float:
        """Seconds until the end of the run."""
        left, bound = sum(part.left for part in self.parts.values()), self._bound()
        return left if bound is None else min(left, max(bound, 0.0))

    def __call__(self, stage: Stage) -> None:
        """Called with each stage that begins, goes on or ends."""
        now = self._clock()
        if self._current is not None:
            self._current.seconds += now - self._last
        self._last = now
        part = self._part_of(stage)
        own = self.parts.get(stage.description)
        if stage not in self._seen:
            self._seen[stage] = stage.done
            if own is not None and own is part and stage.done:
                own.done, own.skipped = stage.done, stage.done
        elif own is not None and own is part:
            own.done = min(own.done + stage.done - self._seen[stage], own.count)
            self._seen[stage] = stage.done
        if stage.ended:
            del self._seen[stage]
        self._current = self._part_of(stage.parent if stage.ended else stage)
        self._speak(now)

    def _part_of(self, stage: Optional[Stage]) -> Optional[Part]:
        """The part that a stage belongs to: its own, but pictures that a student step needs belong to the step."""
        while stage is not None:
            outer = stage.parent
            drawn = stage.description == 'Drawing pictures' and outer is not None
            if stage.description in self.parts and not drawn:
                return self.parts[stage.description]
            stage = outer
        return None

    def _speak(self, now: float) -> None:
        part = self._current
        if part is None or not part.measured:
            return
        steps = part.done - part.skipped
        known = steps >= min(self.FIRST, part.count - part.skipped) or part.seconds >= self.LONG
        first = known and not self._told
        student = known and part.name == 'Student' and 'Student' not in self._told
        if not first and not student and (self._spoken is None or now - self._spoken < EVERY):
            return
        if known:
            self._told.append(part.name)
        self._spoken = now
        open_parts = [one.describe() for one in self.parts.values() if one.done < one.count]
        if open_parts:
            self._say(f'About {in_words(self.left)} left ({", ".join(open_parts)})')


def parts_of(loop, source, resumed: bool) -> List[Part]:
    """The parts that a run has before it: each with its number of steps, and their time as a multiple of one forward
    pass of the teacher, which is run here once. They take other times in other models, by a factor of about two.

    Args:
        loop: A :class:`psaq_mm.engine.runner.loop.DataFreeTrainLoop` that is prepared.
        source: Of the pictures.
        resumed: Whether its calibration is done.
    """
    calibration, settings = loop.calibration, loop.calibration_settings
    forward, world = _forward_seconds(loop, settings.batch_size), ranks()[1]
    count = settings.calibration_samples
    training = loop.training_settings
    rounds = (loop.max_iters - 1) // training.evolve_every if training.evolve_every and loop.max_iters else 0
    rounds -= max(loop.rounds - 1, 0)
    parts = []
    if loop.synthesis is not None:
        generator = loop.synthesis.generator
        steps, share = generator.schedule.steps * generator.schedule.rounds, _synthesized(source)

        def batches(pictures: int) -> int:
            return math.ceil(pictures * share / (generator.batch_size * world))

        first = 0 if resumed or isinstance(source, Saved) else batches(count)
        guess = 6 * forward * min(generator.batch_size, count)
        parts.append(Part('Synthesis', steps * (first + rounds * batches(training.evolve_samples)), guess, 'steps'))
    elif not resumed and not isinstance(source, Saved):
        height, width = loop.picture_settings.size
        parts.append(Part('Drawing pictures', math.ceil(count / world), 1e-6 * height * width))
    again = rounds * min(count, training.pool_size) if training.reobserve else 0
    parts.append(Part('Observing ranges', math.ceil(((0 if resumed else count) + again) / world), 2.5 * forward))
    if not resumed:
        parts += _rounding_parts(calibration, math.ceil(count / world), forward)
    if loop.max_iters:
        parts.append(Part('Student', loop.max_iters, 5 * forward * settings.batch_size * loop.batches, 'steps'))
    return [part for part in parts if part.count > 0]


def _rounding_parts(calibration, count: int, forward: float) -> List[Part]:
    kind, plan, parts = calibration.rounding, rounding_plan(calibration.student.model), []
    if kind == 'guided':
        parts.append(Part('Importance of rows', count, 5 * forward))
    if kind != 'nearest':
        parts.append(Part('Inputs of layers', plan.passes * count, 3 * forward))
        parts.append(Part('Rounding weights', len(plan.layers), 1.0, 'layers', rounding_work(plan.layers)))
    return parts


def _synthesized(source) -> float:
    """Share of a source's pictures that need synthesis."""
    weights = getattr(source, 'weights', [1.0])
    return sum(w for member, w in zip(getattr(source, 'sources', [source]), weights) if not member.procedural)


@torch.no_grad()
def _forward_seconds(loop, batch: int) -> float:
    """Of a forward pass of the teacher, for one picture."""
    device = loop.calibration.device
    count = 1 if device.type == 'cpu' else batch  # a GPU is as fast with many as with one
    images = torch.zeros(count, loop.teacher.image_spec.channels, *loop.picture_settings.size, device=device)
    seconds = 0.0
    for _ in range(1 if device.type == 'cpu' else 2):  # the first one on a GPU starts its libraries
        begun = time.perf_counter()
        float(loop.teacher.run(images).parts[-1].sum())  # waits for the device
        seconds = time.perf_counter() - begun
    return seconds / count
