# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""OpenMMLab's registry mirrors that of the sources, so that ``type='psaq_mm.PinkNoise'`` works in any config."""

from psaq_mm.pictures import SOURCES
from psaq_mm.psaq_vit import SampleGenerator
from psaq_mm.registry import TASK_UTILS

__all__ = ['SampleGenerator']

TASK_UTILS.register_module(name='SampleGenerator', module=SampleGenerator)
for _source in dict.fromkeys(SOURCES.values()):
    TASK_UTILS.register_module(module=_source, force=True)  # sources of the engine may be there already
