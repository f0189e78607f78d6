# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The loop of a data-free run, its clock and its pictures."""

from psaq_mm.engine.runner.loop import DataFreeTrainLoop

__all__ = ['DataFreeTrainLoop']
