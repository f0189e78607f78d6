# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The runtimes that come with psaq_mm, one file each. All files here are imported, and each registers its runtime."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f'{__name__}.{_module.name}')
