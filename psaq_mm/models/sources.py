# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Sample sources by name in a config: the floor below knows no registry, so they are registered here."""

from psaq_mm.pictures.mixture import PLAIN
from psaq_mm.psaq_vit import SampleGenerator
from psaq_mm.registry import TASK_UTILS

__all__ = ['PLAIN', 'SampleGenerator']

TASK_UTILS.register_module(name='SampleGenerator', module=SampleGenerator)
for _name, _source in PLAIN.items():
    TASK_UTILS.register_module(name=_name, module=_source)
