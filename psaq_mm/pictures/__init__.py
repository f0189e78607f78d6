# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Pictures from nothing: where synthesis starts from, what it has to beat, and what a student can learn from without
it.
"""

from typing import Dict

from psaq_mm.pictures.base import Generated, SampleStream, Source, of_rank
from psaq_mm.pictures.image_spec import ImageSpec
from psaq_mm.pictures.leaves import DeadLeaves
from psaq_mm.pictures.mixture import NAMED, Mixture, source_of
from psaq_mm.pictures.noise import GaussianNoise, PinkNoise, gaussian_noise, pink_noise
from psaq_mm.pictures.scenes import Scenes

__all__ = [
    'DeadLeaves',
    'GaussianNoise',
    'Generated',
    'ImageSpec',
    'Mixture',
    'NAMED',
    'PinkNoise',
    'SOURCES',
    'SampleStream',
    'Scenes',
    'Source',
    'gaussian_noise',
    'of_rank',
    'pink_noise',
    'source_of',
]


class _Sources(dict):
    """Sources by name. One that is given itself stands for itself, so that nobody has to ask which of both a setting
    holds.
    """

    def __missing__(self, key):
        if isinstance(key, Source):
            return key
        raise KeyError(key)


SOURCES: Dict[str, Source] = _Sources((name, make()) for name, make in NAMED.items() if make().procedural)
"""Procedural sources by name, called as :func:`gaussian_noise` is."""
