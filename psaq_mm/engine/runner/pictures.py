# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The pictures of a run: where the first ones, those of later rounds and fresh ones come from."""

from typing import Any, Optional

from mmengine.logging import print_log

from psaq_mm.engine.samples import Saved, SavedSamples, samples_of
from psaq_mm.engine.settings import PictureSettings
from psaq_mm.errors import ConfigError
from psaq_mm.models import TaskModel
from psaq_mm.pictures import SampleStream

__all__ = ['RunPictures']


class RunPictures:
    """Pictures of a run, out of its settings.

    Args:
        settings: See :class:`~psaq_mm.engine.settings.PictureSettings`.
        config: The run's config: a folder that it evaluates on is refused.
        teacher: Gets the pictures.
        seed: Of the run.

    Attributes:
        source: Their source.
        stream: Pictures of the source, in the order of their numbers.
    """

    def __init__(self, settings: PictureSettings, config: Any, teacher: TaskModel, seed: int) -> None:
        self.settings, self.teacher, self.seed = settings, teacher, seed
        self.source = samples_of(settings.samples, teacher.model, config, seed)
        self.stream = SampleStream(self.source, settings.size, teacher.image_spec, seed)

    @property
    def synthesized(self) -> bool:
        """Whether the source needs synthesis."""
        return not self.source.procedural

    @property
    def saved(self) -> bool:
        """Whether the first pictures are read from a file or folder."""
        return isinstance(self.source, Saved)

    @property
    def description(self) -> str:
        """The kinds of pictures, for the log."""
        if isinstance(self.settings.samples, str):
            return self.settings.samples
        return ', '.join(type(member).__name__ for member in getattr(self.source, 'sources', [self.source]))

    def first(self, count: int) -> Optional[SavedSamples]:
        """The saved pictures, ``count`` at most; None where the source saves none."""
        if not isinstance(self.source, Saved):
            return None
        saved = self.source.read(self.settings.size, self.teacher.image_spec)
        taken = SavedSamples(saved.samples[:count], None if saved.labels is None else saved.labels[:count])
        few = f'; dfq.calibration_samples asks for {count}' if len(taken.samples) < count else ''
        print_log(
            f'Using {len(taken.samples)} of the {len(saved.samples)} samples in {self.source.path}{few}', 'current'
        )
        return taken

    def fresh(self) -> Optional[SampleStream]:
        """Makes the student's batches anew; None where they are drawn from the pool.

        Raises:
            ConfigError: Nothing of the source can make pictures without synthesis, which takes too long.
        """
        if not self.settings.fresh:
            return None
        source = self.source.procedural_part()
        if source is None:
            raise ConfigError(
                f'dfq.fresh=True needs samples that are quick to make, and dfq.samples={self.settings.samples} '
                "are synthesized, which takes too long: set dfq.samples to another source, such as 'pink'"
            )
        return SampleStream(source, self.settings.size, self.teacher.image_spec, self.seed, 'fresh')
