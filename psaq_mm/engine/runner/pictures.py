# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The pictures of a run: where the first ones, those of later rounds and fresh ones come from."""

from typing import Any, Mapping, Optional, Union

from mmengine.logging import print_log
from torch import nn

from psaq_mm.calibration.student import PictureStream
from psaq_mm.engine.data_overlap import check_folder
from psaq_mm.engine.real_images import training_images
from psaq_mm.engine.samples import SavedSamples, build_source, folders_in, load_samples, procedural_of, takes_rgb
from psaq_mm.engine.settings import PictureSettings, read_fresh
from psaq_mm.errors import ConfigError
from psaq_mm.models import TaskModel
from psaq_mm.pictures import SampleStream, Source

__all__ = ['RunPictures']


class RunPictures:
    """Pictures of a run, out of its settings.

    Args:
        settings: See :class:`~psaq_mm.engine.settings.PictureSettings`.
        config: The run's config: a folder that it evaluates on is refused.
        teacher: Gets the pictures.
        seed: Of the run.

    Attributes:
        source: Their source; None for images of the config's own training set.
        path: Of the first pictures, where they are read.
        stream: Pictures of the source, in the order of their numbers.
    """

    def __init__(self, settings: PictureSettings, config: Any, teacher: TaskModel, seed: int) -> None:
        samples, name = settings.samples, settings.source
        if samples is not None and name != 'generated':
            raise ConfigError(
                f'dfq.samples={samples} and dfq.source={name!r} contradict each other: leave one of them out'
            )
        self.settings, self.config, self.teacher, self.seed = settings, config, teacher, seed
        self.path = samples if isinstance(samples, str) else None
        self.source: Optional[Source] = None
        if name == 'real':
            self.stream: PictureStream = training_images(config, teacher.model, settings.size, seed)
        else:
            self.source = self.built(name if samples is None or self.path else samples)
            self.stream = self._stream(self.source)

    @property
    def synthesized(self) -> bool:
        """Whether the source needs synthesis."""
        return self.source is not None and not self.source.procedural

    @property
    def description(self) -> str:
        """The kinds of pictures, for the log."""
        if self.source is None or self.settings.samples is None or self.path:
            return self.settings.source
        return ', '.join(type(member).__name__ for member in getattr(self.source, 'sources', [self.source]))

    def built(self, source: Union[str, Mapping, list]) -> Source:
        """The source of a config. None of its folders may be one that is evaluated."""
        return built_source(source, self.config, self.teacher.model)

    def first(self, count: int) -> Optional[SavedSamples]:
        """The pictures that the config names, ``count`` at most; None where it names none."""
        if self.path is None:
            return None
        saved = load_samples(self.path, self.settings.size, self.teacher.model, self.teacher.image_spec)
        taken = SavedSamples(saved.samples[:count], None if saved.labels is None else saved.labels[:count])
        few = f'; dfq.calibration_samples asks for {count}' if len(taken.samples) < count else ''
        print_log(f'Using {len(taken.samples)} of the {len(saved.samples)} samples in {self.path}{few}', 'current')
        return taken

    def fresh(self) -> Optional[PictureStream]:
        """Makes the student's batches anew; None where they are drawn from the pool.

        Raises:
            ConfigError: Nothing of the source can make pictures without synthesis, which takes too long.
        """
        fresh = read_fresh(self.settings.fresh)
        if fresh is False:
            return None
        if fresh is True and self.source is None:
            return self.stream
        source = procedural_of(self.source if fresh is True else self.built(fresh))
        if source is None:
            raise ConfigError(
                f'dfq.fresh={fresh!r} has no source of pictures for each batch, as synthesized ones take too long: '
                "name one, such as dfq.fresh=dict(type='psaq_mm.PinkNoise')"
            )
        return self._stream(source, 'fresh')

    def _stream(self, source: Source, name: str = '') -> SampleStream:
        return SampleStream(source, self.settings.size, self.teacher.image_spec, self.seed, name)


def built_source(source: Union[str, Mapping, list], config: Any, model: nn.Module) -> Source:
    """A source out of a config, or of a name; it may read no picture that is evaluated."""
    for folder in [] if isinstance(source, str) else folders_in(source):
        check_folder(config, folder)
    return build_source(source, takes_rgb(model))
