# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Running a data-free quantization under MMEngine: config form, loop, hook, checkpoints."""

from psaq_mm.engine.forks import find_configs_of_forks

find_configs_of_forks()
