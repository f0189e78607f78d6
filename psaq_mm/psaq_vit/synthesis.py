# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Samples out of a teacher, in batches and on all ranks, for the source ``Generated``."""

import contextlib
import dataclasses
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from psaq_mm.calibration import Network, normalized_l1
from psaq_mm.contexts import frozen
from psaq_mm.errors import ConfigError
from psaq_mm.progress import Stage, stage
from psaq_mm.psaq_vit.generator import Objective, SampleGenerator
from psaq_mm.psaq_vit.weighting import AdaptiveWeight
from psaq_mm.quantization import learned_ranges
from psaq_mm.ranks import WholeBatch, broadcast_, gathered, own_part, ranks
from psaq_mm.settings import Settings, setting

__all__ = ['Synthesis', 'SynthesisSettings']


@dataclasses.dataclass(frozen=True)
class SynthesisSettings(Settings):
    """What samples are made for."""

    classes: Optional[str] = setting(
        None,
        "'random' makes each sample for a class of its own, drawn once, where the model is a classifier (the one-hot "
        'term of PSAQ-ViT, arXiv 2203.02250, section 3.3); None is class-free.',
    )

    def __post_init__(self) -> None:
        if self.classes not in (None, 'random'):
            raise ConfigError(
                f"classes={self.classes!r} is not known: use 'random' for one random class a sample, or None"
            )


class Synthesis:
    """Makes samples out of a teacher, on request such as are hard for a student.

    In a distributed run each rank makes its part of a batch, and all ranks get the whole batch: that of one rank.

    Args:
        teacher: Full precision, frozen.
        generator: Makes one batch.
        size: (height, width) of the samples.
        settings: See :class:`SynthesisSettings`.
        random: Source of every random choice, on the CPU; on all ranks in one state.
        progress: Called with a dict after each step.

    Attributes:
        labels: Classes that the latest samples were made for, (n,), or None.
        history: Terms of the loss of every step so far.
        weight: Of the discrepancy, adapted in steps against a student.
    """

    def __init__(
        self,
        teacher: Network,
        generator: SampleGenerator,
        size: Tuple[int, int],
        settings: Optional[SynthesisSettings] = None,
        *,
        random: Optional[torch.Generator] = None,
        progress: Optional[Callable[[Dict[str, Any]], None]] = None,
    ) -> None:
        self.teacher, self.generator, self.size = teacher, generator, (int(size[0]), int(size[1]))
        self.settings, self.progress = settings or SynthesisSettings(), progress
        self.random = torch.Generator().manual_seed(0) if random is None else random
        # A generator of weight 0 makes no use of a student: the weight is then never asked.
        self.weight = AdaptiveWeight(generator.loss.discrepancy_weight or 1.0)
        self.labels: Optional[Tensor] = None
        self.history: List[Dict[str, float]] = []
        self._stage = Stage('Synthesis')

    def make(self, count: int, student: Optional[Network] = None, number: int = 0) -> Tensor:
        """``count`` new samples, (count, C, H, W), on the CPU.

        Args:
            count: How many.
            student: Samples seek what it gets wrong. Defaults to None, nothing.
            number: Of the round, for the history.
        """
        first = self.generator.first_images(count, self.size, self.teacher.image_spec, self.random)
        self.labels = self._draw_classes(count)
        batches = first.split(self.generator.batch_size * ranks()[1])
        labels = [None] * len(batches) if self.labels is None else self.labels.split(len(batches[0]))
        with stage('Synthesis', len(batches) * self._steps) as self._stage:
            return torch.cat([self._batch(batch, classes, student, number) for batch, classes in zip(batches, labels)])

    def _draw_classes(self, count: int) -> Optional[Tensor]:
        if self.settings.classes is None or self.teacher.num_classes is None:
            return None
        return torch.randint(0, self.teacher.num_classes, (count,), generator=self.random)

    def _batch(self, first: Tensor, labels: Optional[Tensor], student: Optional[Network], number: int) -> Tensor:
        """One batch of all ranks, from its first images."""
        count, world = len(first), ranks()[1]
        if world == 1:
            return self._part(first, labels, student, number, None)
        if count < world:  # a rank without an image has nothing to run: each makes all of them, and rank 0's are taken
            return broadcast_(self._part(first, labels, student, number, None))
        mine = own_part(count)
        labels = None if labels is None else labels[mine]
        return gathered(self._part(first[mine], labels, student, number, WholeBatch(mine.stop - mine.start)), count)

    def _part(
        self,
        first: Tensor,
        labels: Optional[Tensor],
        student: Optional[Network],
        number: int,
        whole: Optional[WholeBatch],
    ) -> Tensor:
        """This rank's part of a batch."""
        rival = student if self.generator.loss.discrepancy_weight > 0 else None
        # Frozen, a student keeps its quantized weights from step to step, and no graph for gradients that nobody needs.
        model = None if rival is None else rival.model
        state = contextlib.nullcontext() if model is None else frozen((*model.parameters(), *learned_ranges(model)))
        with state:
            generated = self.generator.generate(
                self.teacher.model,
                self.teacher.image_spec,
                self._objective(labels, rival),
                init=first,
                generator=self.random,
                progress=self._timed(),
                whole=whole,
            )
        self.history.extend(dict(step, round=number) for step in generated.history)
        return generated.samples.cpu()

    def _objective(self, labels: Optional[Tensor], rival: Optional[Network]) -> Objective:
        targets: List[Tensor] = []  # the teacher's outputs for the images of this step

        def forward(images: Tensor) -> Optional[Tensor]:
            output = self.teacher.run(images, with_logits=labels is not None)
            targets[:] = output.parts
            return output.logits

        return Objective(
            forward,
            discrepancy=None if rival is None else lambda images: normalized_l1(rival.outputs(images), targets),
            class_loss=None if labels is None else lambda logits: F.cross_entropy(logits, labels.to(logits.device)),
            weight=self.weight,
            prefix_tokens=self.teacher.prefix_tokens,
        )

    @property
    def _steps(self) -> int:
        """Of one batch."""
        return self.generator.schedule.steps * self.generator.schedule.rounds

    def _timed(self) -> Callable[[Dict[str, float]], None]:
        """Calls ``progress``, with the number of steps and the seconds that are left in each entry."""
        begun, steps = time.perf_counter(), self._steps

        def report(entry: Dict[str, float]) -> None:
            done = entry['step'] + 1
            self._stage.advance()
            if self.progress is not None:
                self.progress(dict(entry, steps=steps, eta=(time.perf_counter() - begun) / done * (steps - done)))

        return report

    def state_dict(self) -> Dict[str, Any]:
        """What a resumed run needs; the random state is its owner's."""
        return dict(weight=self.weight.state_dict(), history=list(self.history))

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.weight.load_state_dict(state['weight'])
        self.history, self.labels = list(state['history']), None
