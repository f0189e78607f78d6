# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Differences of OpenMMLab's maintained forks from the originals, beside the names of their distributions."""

import importlib.util
from importlib.metadata import PackageNotFoundError, version

from mmengine.config.utils import MODULE2PACKAGE

__all__ = ['find_configs_of_forks']


def find_configs_of_forks() -> None:
    """Make ``_base_ = ['mmseg::...']`` work with the forks too.

    MMEngine looks up a library's configs under the name of the original distribution: ``mmsegmentation`` for mmseg. So
    does onedl-mmengine, although that distribution is never installed beside it. Without the original, the name of the
    module is used instead, which is the same in both families.
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
    except ImportError:  # raised by an import hook that blocks a library
        return False
