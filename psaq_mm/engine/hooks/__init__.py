# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
from psaq_mm.engine.hooks.data_free_quant_hook import DataFreeQuantHook

__all__ = ['DataFreeQuantHook']
