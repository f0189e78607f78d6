# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Ranges and first codes of a student, from pictures: all that a method without training does to it."""

import dataclasses
from typing import Callable, Dict, List, Optional

import torch
from torch import Tensor

from psaq_mm.calibration.guidance import sensitivity_loss
from psaq_mm.calibration.network import Network
from psaq_mm.contexts import frozen
from psaq_mm.errors import ConfigError
from psaq_mm.progress import stage
from psaq_mm.quantization import (
    RoundedLayer,
    calibrate,
    is_quantized_layer,
    learned_ranges,
    round_weights_,
    row_importance,
)
from psaq_mm.ranks import own_part
from psaq_mm.settings import Settings, setting

__all__ = ['Calibration', 'CalibrationSettings', 'ROUNDINGS']

ROUNDINGS = ('nearest', 'compensated', 'guided', 'auto')


@dataclasses.dataclass(frozen=True)
class CalibrationSettings(Settings):
    """How a student is calibrated."""

    batch_size: int = setting(8, 'Pictures in one forward pass; in a distributed run, of each rank.')
    calibration_samples: int = setting(32, 'Pictures that set the ranges.')
    rounding: str = setting(
        'nearest',
        "How weights get their first codes. 'nearest'; 'compensated': errors of correlated inputs cancel on the "
        "calibration pictures; 'guided': compensated, and tokens or places count by their effect on the outputs; "
        "'auto': guided where weights have fewer than 8 bits, else compensated, which is as good at 8 bits and needs "
        'no gradients.',
    )
    prior_rows: float = setting(
        32.0,
        'How little the rounding trusts the pictures: the damping of a layer is prior_rows / the effective number of '
        'its rows (tokens or places).',
    )

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise ConfigError(f'rounding={self.rounding!r} is not known: use one of {", ".join(ROUNDINGS)}')
        if not 0 < self.prior_rows < float('inf'):
            raise ConfigError(f'prior_rows={self.prior_rows} must be positive: 32 is the usual value')
        for name in ('batch_size', 'calibration_samples'):
            if getattr(self, name) < 1:
                raise ConfigError(f'{name}={getattr(self, name)} must be at least 1')


class Calibration:
    """Sets the ranges of a student on pictures and rounds its weights. In a distributed run each rank runs its part.

    Args:
        student: The network with quantizers.
        settings: See :class:`CalibrationSettings`.
        scope: Scope of the quantizers: which layers the pictures have to reach.
        random: Source of every random choice, on the CPU. Defaults to None, one of seed 0.

    Attributes:
        rounded: What the rounding did to each layer; empty before :meth:`round` and with ``'nearest'``.

    Example:
        >>> calibration = Calibration(TaskModel(student), CalibrationSettings(rounding='auto'))
        >>> calibration.run(SampleStream(DeadLeaves(), (224, 224), ImageSpec()).take(32))
    """

    def __init__(
        self,
        student: Network,
        settings: Optional[CalibrationSettings] = None,
        *,
        scope: str = 'backbone',
        random: Optional[torch.Generator] = None,
    ) -> None:
        self.student, self.settings, self.scope = student, settings or CalibrationSettings(), scope
        self.random = torch.Generator().manual_seed(0) if random is None else random
        self.rounded: List[RoundedLayer] = []

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return next(self.student.model.parameters()).device

    def run(self, pictures: Tensor) -> None:
        """Set all ranges on ``pictures`` (n, C, H, W), normalized, then round the weights on them."""
        self.observe(pictures)
        self.round(pictures)

    def observe(self, pictures: Tensor) -> None:
        """Set all ranges on ``pictures`` (n, C, H, W), batch by batch."""
        calibrate(self.student.model, self._forward(pictures, 'Observing ranges'))

    def round(self, pictures: Tensor) -> None:
        """Give the weights their codes, as ``settings.rounding`` says. Scales stay."""
        kind = self.rounding
        if kind == 'nearest':
            return
        self.rounded = round_weights_(
            self.student.model,
            self._forward(pictures, 'Inputs of layers'),
            self.settings.prior_rows,
            importance=self.importance(pictures) if kind == 'guided' else None,
        )

    def importance(self, pictures: Tensor) -> Dict[str, Tensor]:
        """How much each input row of each layer counts for the outputs, by name of the layer.

        Rows are in the order in which the forward passes of :meth:`round` send them through the layer.
        """
        seeds = torch.randint(0, 2**31, (len(pictures),), generator=self.random)
        part, size, student = own_part(len(pictures)), self.settings.batch_size, self.student

        def run() -> None:
            with stage('Importance of rows', len(pictures[part])) as passing:
                for batch, batch_seeds in zip(pictures[part].split(size), seeds[part].split(size)):
                    if len(batch):
                        outputs = student.run(batch.to(self.device).requires_grad_(), with_logits=True)
                        sensitivity_loss(outputs.parts, outputs.logits, batch_seeds).backward()
                        passing.advance(len(batch))

        # The squared gradients of the rows are wanted, and none of the weights.
        with torch.enable_grad(), frozen((*student.model.parameters(), *learned_ranges(student.model))):
            return row_importance(student.model, run)

    @property
    def rounding(self) -> str:
        """``settings.rounding``, with what the bits choose in place of ``'auto'``."""
        if self.settings.rounding != 'auto':
            return self.settings.rounding
        layers = [layer for layer in self.student.model.modules() if is_quantized_layer(layer)]
        return 'guided' if any(layer.weight_quantizer.bits < 8 for layer in layers) else 'compensated'

    def _forward(self, pictures: Tensor, what: str) -> Callable[[], None]:
        """Function that puts this rank's part of ``pictures`` through the student in batches, as the stage ``what``."""
        part = pictures[own_part(len(pictures))]

        def run() -> None:
            with stage(what, len(part)) as passing:
                for batch in part.split(self.settings.batch_size) if len(part) else ():
                    self.student.calibration_forward(batch.to(self.device), self.scope)
                    passing.advance(len(batch))

        return run
