# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Settings of a data-free run in groups: what a config's ``dfq`` key may hold, with defaults and descriptions.

A config gives them flat, such as ``dfq = dict(iters=200, rounding='auto')``. Each group takes the keys of its fields.
"""

import contextlib
import dataclasses
import re
from typing import Any, ClassVar, Iterator, Optional, Sequence, Tuple

from psaq_mm.calibration import CalibrationSettings, TrainingSettings
from psaq_mm.errors import ConfigError
from psaq_mm.psaq_vit import SynthesisSettings
from psaq_mm.settings import Settings, setting

__all__ = [
    'GROUPS',
    'LOOP_GROUPS',
    'HookSettings',
    'OptimizerSettings',
    'PictureSettings',
    'RunSettings',
    'named_dfq',
]


@dataclasses.dataclass(frozen=True)
class PictureSettings(Settings):
    """Where pictures come from."""

    prefix: ClassVar[str] = 'dfq.'

    size: Optional[Tuple[int, int]] = setting(
        None, "(height, width) in pixels. None: from the config's data_preprocessor or test pipeline."
    )
    value_range: Optional[Sequence] = setting(
        None,
        '(low, high): what pictures hold as they are loaded, before mean and std; each a number, or a list of one per '
        'channel. None: 0 to 255, refused where mean, std or the pipeline contradict it.',
    )
    samples: Any = setting(
        'generated',
        'Source of the pictures: a name such as generated, pink, dead_leaves, scenes or real; a dict; a list of them '
        '(a mixture); or the path of a samples.pt or of a folder of images, which are the first pictures.',
    )
    fresh: bool = setting(
        False,
        "Whether each of the student's batches is made anew, by the sources that need no synthesis, instead of drawn "
        'from the pool.',
    )
    save_samples: bool = setting(False, 'Whether the first pictures are kept: samples.pt and samples/NNNN.png.')


@dataclasses.dataclass(frozen=True)
class RunSettings(Settings):
    """The run as a whole."""

    prefix: ClassVar[str] = 'dfq.'

    distil: Optional[Tuple[str, ...]] = setting(
        None, 'Parts whose outputs the student learns, see psaq_mm.models.task.PARTS. None: chosen by the model.'
    )
    block_stride: int = setting(3, 'Of the part blocks: every how many transformer blocks.')
    rotate: bool = setting(
        False,
        'Whether weights are rotated first, at random, before anything is quantized: the same function in full '
        'precision, with fewer outliers.',
    )
    max_seconds: Optional[float] = setting(
        None,
        "Wall time of the run, pictures included: the student's steps end with it, or with iters if that is sooner, "
        'and their learning rate falls to 0 on the way there.',
    )
    accumulative_counts: int = setting(
        1, 'Batches of batch_size that one student step is made of, for a device that cannot hold them at once.'
    )
    amp: Optional[str] = setting(
        None,
        "'bfloat16' or 'float16': the student's steps under autocast; synthesis, calibration and quantizers stay in "
        'float32.',
    )
    seed: int = setting(0, 'Of every random choice.')
    log_interval: int = setting(10, 'Steps between two lines of the log.')
    summary_pictures: int = setting(
        32,
        'Drawn pictures, unseen by calibration, on which the summary at the end compares the student with full '
        'precision: as many as 2 seconds or 5 percent of the run are enough for, and at least 2. 0: none.',
    )

    def __post_init__(self) -> None:
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ConfigError(f'{self.prefix}max_seconds={self.max_seconds} must be above 0, or None for no bound')
        if self.amp not in (None, 'bfloat16', 'float16'):
            raise ConfigError(
                f'{self.prefix}amp={self.amp!r} is not known: use bfloat16, float16, or None for float32 throughout'
            )
        if self.summary_pictures < 0:
            raise ConfigError(f'{self.prefix}summary_pictures={self.summary_pictures} must be 0 (none) or more')
        if self.accumulative_counts < 1:
            raise ConfigError(f'{self.prefix}accumulative_counts={self.accumulative_counts} must be at least 1')
        if not isinstance(self.rotate, bool):
            raise ConfigError(f'{self.prefix}rotate={self.rotate!r} must be True or False')


@dataclasses.dataclass(frozen=True)
class OptimizerSettings(Settings):
    """Steps of the student and their learning rates."""

    prefix: ClassVar[str] = 'dfq.'

    iters: int = setting(200, 'Student steps; 0 calibrates only.')
    lr: float = setting(1e-4, 'Of the weights; 0 leaves them at their first codes.')
    vector_lr: Optional[float] = setting(
        None, "Of biases and of the normalization layers' gains and offsets. None: as lr."
    )
    range_lr: float = setting(
        0.0, "Of the logarithms of the activations' scales, learned with the weights; 0 leaves them as calibrated."
    )
    clip_grad: Optional[float] = setting(1.0, 'Greatest norm of the gradient. None: not bounded.')

    def __post_init__(self) -> None:
        if not self.iters >= 0:
            raise ConfigError(f'{self.prefix}iters={self.iters} must be 0 (calibrate only) or more')


@dataclasses.dataclass(frozen=True)
class HookSettings(Settings):
    """Files of a run."""

    prefix: ClassVar[str] = 'dfq.'

    checkpoint_interval: int = setting(50, 'Student steps between two iter_N.pth; 0: none.')
    keep_checkpoints: int = setting(2, 'How many of them stay.')
    sheet_interval: int = setting(50, 'Student steps between two sample sheets; 0: none but the first.')


LOOP_GROUPS = (PictureSettings, CalibrationSettings, TrainingSettings, SynthesisSettings, RunSettings)
"""Groups that the training loop reads."""

GROUPS = (*LOOP_GROUPS, OptimizerSettings, HookSettings)
"""All groups. No key stands in two of them. ``method``, ``generator`` and ``teacher`` are beside them."""


@contextlib.contextmanager
def named_dfq() -> Iterator[None]:
    """Messages of lower floors name a setting as the user does, ``dfq.NAME``: at their start, and after ``set``."""
    try:
        yield
    except ConfigError as error:
        text = re.sub(r': set (?=\w+=)', ': set dfq.', str(error))
        raise ConfigError(text if text.startswith('dfq.') else f'dfq.{text}') from error
