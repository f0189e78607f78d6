# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Sources that draw from others: several sources as one, and synthesis."""

from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from psaq_mm.errors import DataError
from psaq_mm.pictures.base import Make, Source, checked_size, mixed
from psaq_mm.pictures.image_spec import ImageSpec
from psaq_mm.pictures.leaves import DeadLeaves
from psaq_mm.pictures.noise import PinkNoise
from psaq_mm.pictures.registry import register_source

__all__ = ['Generated', 'Mixture']

_GOLDEN = (5**0.5 - 1) / 2


@register_source('mixture')
class Mixture(Source):
    """Each picture from one of several sources, by their weights; by default half 1/f noise, half dead leaves.

    The picture's number decides which one. Multiples of the golden ratio fall evenly into 0 .. 1, so that a batch has
    the proportions too, to about one picture.

    Args:
        sources: One or more. The members of a mixture among them become members of this one. Defaults to None, 1/f
            noise and dead leaves.
        weights: One for each source, 0 or more. Defaults to None, equal weights.
        seed: As for :class:`Source`.

    Raises:
        DataError: There are no sources, or the weights do not fit.

    Example:
        >>> half_and_half = Mixture([PinkNoise(), DeadLeaves()])
    """

    def __init__(
        self,
        sources: Optional[Sequence[Source]] = None,
        weights: Optional[Sequence[float]] = None,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        sources = [PinkNoise(), DeadLeaves()] if sources is None else sources
        weights = [1.0] * len(sources) if weights is None else [float(w) for w in weights]
        if not sources or len(weights) != len(sources):
            raise DataError(
                f'a mixture of {len(sources)} sources with {len(weights)} weights: give at least one source and one '
                'weight each'
            )
        if min(weights) < 0 or not 0 < sum(weights) < float('inf'):
            raise DataError(f'weights={weights} of a mixture must be 0 or more, one of them above 0')
        self.sources: List[Source] = []
        self.weights: List[float] = []
        for source, weight in zip(sources, weights):
            if not isinstance(source, Source):
                raise DataError(f'{source!r} is no source of samples: build it with psaq_mm.pictures.source_of first')
            # Flattened, because the numbers that reach a member of a mixture no longer fall evenly.
            inner: Any = zip(source.sources, source.weights) if isinstance(source, Mixture) else [(source, 1.0)]
            for member, part in inner:
                self.sources.append(member)
                self.weights.append(weight / sum(weights) * part)

    @property
    def procedural(self) -> bool:
        """Whether no member needs synthesis."""
        return all(source.procedural for source in self.sources)

    @property
    def paths(self) -> List[str]:
        """See :attr:`Source.paths`."""
        return [path for source in self.sources for path in source.paths]

    def open(self, model: Any, config: Any, seed: int) -> None:
        """See :meth:`Source.open`."""
        for source in self.sources:
            source.open(model, config, seed)

    def procedural_part(self) -> Optional[Source]:
        """The members that need no synthesis, at their weights; None if there are none, or all have weight 0."""
        kept = [(s, w) for s, w in zip(self.sources, self.weights) if s.procedural and w > 0]
        return Mixture([s for s, _ in kept], [w for _, w in kept], self.seed) if kept else None

    def members(self, numbers: Sequence[int], seed: int = 0) -> Tensor:
        """Index of the source of each number, (len(numbers),)."""
        start = mixed(seed, self.seed, 1) / 2**64
        places = (torch.tensor(list(numbers), dtype=torch.float64) * _GOLDEN + start).frac()
        edges = torch.tensor(self.weights, dtype=torch.float64).cumsum(0)
        return torch.searchsorted(edges / edges[-1], places, right=True).clamp_(max=len(self.weights) - 1)

    def draw(
        self,
        numbers: Sequence[int],
        size: Tuple[int, int],
        image_spec: ImageSpec,
        seed: int = 0,
        generated: Optional[Make] = None,
    ) -> Tensor:
        """See :meth:`Source.draw`."""
        checked_size(len(numbers), size)
        chosen, pictures = self.members(numbers, seed), torch.empty(len(numbers), image_spec.channels, *size)
        for index, source in enumerate(self.sources):
            places = (chosen == index).nonzero().flatten()
            if len(places):
                part = source.draw(
                    [numbers[int(place)] for place in places], size, image_spec, mixed(seed, self.seed), generated
                )
                pictures[places] = part.float().cpu()
        return pictures


@register_source('generated')
class Generated(Source):
    """Samples that are synthesized out of the teacher.

    The run makes them: see :class:`psaq_mm.psaq_vit.SampleGenerator`.
    """

    @property
    def procedural(self) -> bool:
        """See :attr:`Source.procedural`."""
        return False

    def draw(
        self,
        numbers: Sequence[int],
        size: Tuple[int, int],
        image_spec: ImageSpec,
        seed: int = 0,
        generated: Optional[Make] = None,
    ) -> Tensor:
        """See :meth:`Source.draw`. What ``generated`` makes depends on the model and the step, not on the numbers.

        Raises:
            DataError: No model is there to make them.
        """
        if generated is None:
            raise DataError(
                'generated samples are made by a run, which has the teacher: take a procedural source here, such as '
                "dict(type='psaq_mm.PinkNoise')"
            )
        return generated(len(numbers))
