# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
from .loop import DataFreeTrainLoop

__all__ = ['DataFreeTrainLoop']
