# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Co-evolution whose samples come from a source object, such as a mixture of procedural and generated ones."""

from torch import Tensor

from psaq_mm.pictures import Generated, SampleStream
from psaq_mm.psaq_vit.coevolution import CoEvolution, taken_from

__all__ = ['SourcedEvolution']


class SourcedEvolution(CoEvolution):
    """Samples by number out of a stream, instead of by the name of a source.

    Args:
        stream: Where samples come from; what it holds of :class:`~psaq_mm.pictures.Generated` is synthesized as ever,
            in competition with the student.
        *args, **kwargs: As for :class:`CoEvolution`, its settings with ``source='generated'``.
    """

    def __init__(self, stream: SampleStream, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.stream = stream

    def make_samples(self, count: int, compete: bool) -> Tensor:
        """The next ``count`` samples, (count, C, H, W) on the CPU."""
        if self.stream.source.procedural:  # what is synthesized is split over the ranks where it is made
            self.labels = None
            return taken_from(self.stream, count)
        made = self.stream.take(count, lambda some: super(SourcedEvolution, self).make_samples(some, compete))
        if not isinstance(self.stream.source, Generated):
            self.labels = None  # classes of a part of the samples are none of the whole
        return made

    def state_dict(self):
        """See :meth:`CoEvolution.state_dict`."""
        return dict(super().state_dict(), stream=self.stream.state_dict())

    def load_state_dict(self, state) -> None:
        """Undo :meth:`state_dict`."""
        super().load_state_dict(state)
        self.stream.load_state_dict(state['stream'])
