# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Several sources as one, and sources out of what a config says."""

from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Type, Union

import torch
from torch import Tensor

from psaq_mm.errors import ConfigError, DataError, nearest
from psaq_mm.pictures.base import Generated, Make, Source, checked_size, mixed
from psaq_mm.pictures.image_spec import ImageSpec
from psaq_mm.pictures.leaves import DeadLeaves
from psaq_mm.pictures.noise import GaussianNoise, PinkNoise
from psaq_mm.pictures.scenes import Scenes
from psaq_mm.type_names import type_name

__all__ = ['Mixture', 'NAMED', 'PLAIN', 'source_of']

_GOLDEN = (5**0.5 - 1) / 2


class Mixture(Source):
    """Each picture from one of several sources, in the proportions of their weights.

    Which one, the picture's number decides: multiples of the golden ratio fall evenly into 0 .. 1, so that also a batch
    has the proportions, to about one picture.

    Args:
        sources: One or more; a mixture among them is taken apart.
        weights: One each, 0 or more. Defaults to None, all alike.
        seed: As for :class:`Source`.

    Raises:
        DataError: There are no sources, or the weights do not fit.

    Example:
        >>> half_and_half = Mixture([PinkNoise(), DeadLeaves()])
    """

    def __init__(self, sources: Sequence[Source], weights: Optional[Sequence[float]] = None, seed: int = 0) -> None:
        super().__init__(seed)
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
            # Inside a mixture, the numbers that come to a member do not fall evenly any more.
            inner = zip(source.sources, source.weights) if isinstance(source, Mixture) else [(source, 1.0)]
            for member, part in inner:
                self.sources.append(member)
                self.weights.append(weight / sum(weights) * part)

    @property
    def procedural(self) -> bool:
        """Whether no member needs a model."""
        return all(source.procedural for source in self.sources)

    def procedural_part(self) -> Optional['Mixture']:
        """The members that need no model, at their weights; None where there are none, or all have weight 0."""
        kept = [(s, w) for s, w in zip(self.sources, self.weights) if s.procedural and w > 0]
        return Mixture(*zip(*kept), seed=self.seed) if kept else None

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
        chosen, whole = self.members(numbers, seed), torch.empty(len(numbers), image_spec.channels, *size)
        for index, source in enumerate(self.sources):
            places = (chosen == index).nonzero().flatten()
            if len(places):
                own = [numbers[int(place)] for place in places]
                whole[places] = source.draw(own, size, image_spec, mixed(seed, self.seed), generated).float().cpu()
        return whole


PLAIN: Dict[str, Type[Source]] = {
    cls.__name__: cls for cls in (GaussianNoise, PinkNoise, DeadLeaves, Scenes, Generated, Mixture)
}
"""Sources that need PyTorch alone, by the name that a config gives."""

NAMED: Dict[str, Callable[[], Source]] = dict(
    gaussian=GaussianNoise,
    pink=PinkNoise,
    dead_leaves=DeadLeaves,
    scenes=Scenes,
    mixture=lambda: Mixture([PinkNoise(), DeadLeaves()]),
    generated=Generated,
)
"""Short names of sources with their default settings; ``mixture`` is half 1/f noise, half dead leaves."""

Given = Union[str, Mapping, Sequence, Source]


def _plain(config: Mapping) -> Source:
    settings = dict(config)
    name = settings.pop('type', '')
    short = type_name(name)
    if short not in PLAIN:
        raise ConfigError(f'type={name!r} is no source of samples: {nearest(short, PLAIN)}')
    try:
        return PLAIN[short](**settings)
    except TypeError as error:
        raise ConfigError(f'{short} does not take these settings ({error}): see its documentation') from error


def source_of(given: Given, build: Callable[[Mapping], Any] = _plain) -> Source:
    """A source out of what a config says.

    Args:
        given: A name of :data:`NAMED`; ``dict(type='psaq_mm.PinkNoise', ...)``; a list of such, a mixture in which each
            dict may hold its ``weight`` (1 without); or a source, which is returned.
        build: Builds a dict that is no mixture. Defaults to the classes of :data:`PLAIN`; the engine gives the
            registry's.

    Raises:
        ConfigError: It is none of these.
        DataError: A setting of a source is out of range.

    Example:
        >>> source_of([dict(type='psaq_mm.PinkNoise', weight=3), dict(type='psaq_mm.DeadLeaves')]).weights
        [0.75, 0.25]
    """
    if isinstance(given, Source):
        return given
    if isinstance(given, str):
        if given not in NAMED:
            raise ConfigError(
                f'{given!r} names no source of samples: {nearest(given, NAMED)}, or a dict such as '
                "dict(type='psaq_mm.PinkNoise')"
            )
        return NAMED[given]()
    if isinstance(given, Mapping):
        if not given.get('type'):
            raise ConfigError(f"{dict(given)} is no source of samples: it lacks its type, such as 'psaq_mm.PinkNoise'")
        settings = dict(given)
        settings.pop('weight', None)
        if type_name(settings) != 'Mixture':
            found = build(settings)
        else:
            settings['sources'] = [source_of(one, build) for one in settings.get('sources') or ()]
            found = _plain(settings)
        if not isinstance(found, Source):
            raise ConfigError(
                f'type={given["type"]!r} is a {type(found).__name__} and no source of samples: use one of '
                f'{", ".join(PLAIN)}, or Folder'
            )
        return found
    if isinstance(given, Sequence):
        weights = [one.get('weight', 1.0) if isinstance(one, Mapping) else 1.0 for one in given]
        return Mixture([source_of(one, build) for one in given], weights)
    raise ConfigError(
        f"{given!r} is no source of samples: give a name, a dict such as dict(type='psaq_mm.PinkNoise'), or a list "
        'of dicts'
    )
