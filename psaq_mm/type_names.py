# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The name of what a config's ``type`` stands for, in each form that MMEngine takes it in."""

from collections.abc import Mapping
from typing import Any

__all__ = ['type_name', 'type_path']


def type_path(given: Any) -> str:
    """A type with its scope or module, where it is given with one; see :func:`type_name`.

    Example:
        >>> type_path(dict(type='torchvision/Resize')), type_path(dict), type_path(None)
        ('torchvision/Resize', 'builtins.dict', '')
    """
    if isinstance(given, Mapping):
        given = given.get('type')
    if isinstance(given, (list, tuple)):  # several in the place of one
        return ''
    # An import of a pure-Python config that is not resolved yet answers any attribute, and prints its name.
    if not type(given).__module__.startswith('mmengine.config') and hasattr(given, '__name__'):
        return f'{given.__module__}.{given.__qualname__}'
    return str(given or '')


def type_name(given: Any) -> str:
    """The bare name of a type: ``'Resize'`` for ``'Resize'``, ``'mmdet.Resize'``, the class itself, and
    ``dict(type=...)`` of these.

    Args:
        given: A config with or without ``type``, a name with or without scope or module, a class or function, as
            MMEngine's pure-Python configs have it, or None.

    Returns:
        Its name; ``''`` where there is none.

    Example:
        >>> type_name(dict(type='psaq_mm.Quantized')), type_name(dict), type_name(None)
        ('Quantized', 'dict', '')
    """
    return type_path(given).rpartition('.')[2]
