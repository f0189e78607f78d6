# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Sources of pictures: what synthesis starts from, what it is compared with, and what a student can learn from."""

from psaq_mm.pictures.base import SampleStream, Source, of_rank
from psaq_mm.pictures.image_spec import ImageSpec
from psaq_mm.pictures.leaves import DeadLeaves
from psaq_mm.pictures.mixture import Generated, Mixture
from psaq_mm.pictures.noise import GaussianNoise, PinkNoise
from psaq_mm.pictures.registry import SOURCES, SourceConfig, register_source, source_names, source_of
from psaq_mm.pictures.scenes import Scenes

__all__ = [
    'DeadLeaves',
    'GaussianNoise',
    'Generated',
    'ImageSpec',
    'Mixture',
    'PinkNoise',
    'SOURCES',
    'SampleStream',
    'Scenes',
    'Source',
    'SourceConfig',
    'of_rank',
    'register_source',
    'source_names',
    'source_of',
]
