# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Hooks of a data-free run."""

from psaq_mm.engine.hooks.data_free_quant_hook import DataFreeQuantHook

__all__ = ['DataFreeQuantHook']
