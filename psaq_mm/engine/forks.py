# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Where the maintained forks of OpenMMLab differ from the originals in more than the name that pip knows them by."""

import importlib.util
from importlib.metadata import PackageNotFoundError, version

from mmengine.config.utils import MODULE2PACKAGE

__all__ = ['find_configs_of_forks']


def find_configs_of_forks() -> None:
    """Let ``_base_ = ['mmseg::...']`` be found under the forks, too.

    MMEngine looks a library's configs up under the name of its distribution, and knows the originals' alone:
    ``mmsegmentation`` for mmseg, also in onedl-mmengine, beside which that distribution is never installed. The name of
    the module, which MMEngine tries next, is the same in both families. Libraries whose original is installed are left
    as they are.
    """
    for module, distribution in MODULE2PACKAGE.items():
        if module == distribution:
            continue
        try:
            version(distribution)
        except PackageNotFoundError:
            if _is_there(module):
                MODULE2PACKAGE[module] = module


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # an import hook that keeps a library out says so this way
        return False
