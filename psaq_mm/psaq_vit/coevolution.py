# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Samples and student evolving in turn under a frozen teacher (PSAQ-ViT V2, arXiv 2209.05687, section III).

The paper gives the principle (no class label, samples that compete with the student, a student that learns the
teacher); its code was never released. Every figure below is this project's decision, see docs/method.md.
"""

import contextlib
from typing import Any, Callable, ContextManager, Dict, Mapping, Optional

from torch import Tensor

from psaq_mm.calibration import Calibration, Network, StepLosses, StudentTraining, TrainingSettings
from psaq_mm.pictures import SampleStream
from psaq_mm.psaq_vit.synthesis import Synthesis

__all__ = ['CoEvolution']


class CoEvolution(StudentTraining):
    """Training whose pictures, or a part of them, are synthesized: in each round they seek what the student gets wrong.

    Args:
        teacher: Full precision, frozen.
        calibration: Of the student.
        stream: Its source is, or holds, :class:`~psaq_mm.pictures.Generated`.
        synthesis: Makes the synthesized pictures; it shares the random generator of ``calibration``.
        settings, fresh, seed: As for :class:`~psaq_mm.calibration.StudentTraining`.
    """

    def __init__(
        self,
        teacher: Network,
        calibration: Calibration,
        stream: SampleStream,
        synthesis: Synthesis,
        settings: Optional[TrainingSettings] = None,
        *,
        fresh: Optional[SampleStream] = None,
        seed: int = 0,
    ) -> None:
        super().__init__(teacher, calibration, stream, settings, fresh=fresh, seed=seed)
        self.synthesis = synthesis

    def pictures(self, count: int) -> Tensor:
        """``count`` new pictures, (count, C, H, W) on the CPU; the first ones without a student to compete with."""
        rival = self.student if self.rounds else None
        return self.stream.take(count, lambda part: self.synthesis.make(part, rival, self.rounds))

    def learn(
        self,
        images: Tensor,
        backward: Callable[[Tensor], None],
        batches: int = 1,
        context: Callable[[], ContextManager] = contextlib.nullcontext,
    ) -> StepLosses:
        """See :meth:`psaq_mm.calibration.StudentTraining.learn`. Samples compete for the discrepancy alone."""
        losses = super().learn(images, backward, batches, context)
        self.synthesis.weight.observe(float(losses.discrepancy))
        return losses

    def state_dict(self) -> Dict[str, Any]:
        """What a resumed run needs beside weights and optimizer."""
        return dict(super().state_dict(), **self.synthesis.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, of this release or of an earlier one."""
        super().load_state_dict(state)
        self.synthesis.load_state_dict(dict(state))
