# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Reading a config file, of either of MMEngine's two kinds."""

import os
from typing import Union

from mmengine.config import Config

from psaq_mm.engine.missing import missing_from
from psaq_mm.engine.pure_python import with_named_types
from psaq_mm.errors import ConfigError

__all__ = ['read_config']


def read_config(path: Union[str, os.PathLike]) -> Config:
    """Read a config file.

    Args:
        path: The file.

    Raises:
        ConfigError: The file or a base of it does not exist or cannot be read.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ConfigError(f'there is no config file {path}: check the path')
    try:
        return with_named_types(Config.fromfile(path))
    except (OSError, KeyError, TypeError, AttributeError, SyntaxError, ImportError, RuntimeError) as error:
        raise ConfigError(f'the config {path} cannot be read: {_why_unreadable(error)}') from error


def _why_unreadable(error: Exception) -> str:
    message = ' '.join(str(error).split())
    if 'lazy_import' in message:  # MMEngine's word for it
        return (
            'it and one of its bases are of two kinds, and a pure-Python config is inherited by a pure-Python one '
            "alone: write `with read_base(): from .BASE import *`, then model.update(type='psaq_mm.Quantized', "
            "base_type=model.type, quant='w8a8')"
        )
    return missing_from(error) or message
