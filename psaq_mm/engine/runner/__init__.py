# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
from psaq_mm.engine.runner.loop import DataFreeTrainLoop

__all__ = ['DataFreeTrainLoop']
