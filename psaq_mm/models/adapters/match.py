# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Recognizing a library's class without importing the library."""
from typing import Collection, Optional

__all__ = ['qualified_name', 'class_named']


def qualified_name(cls: type) -> str:
    """``module.ClassName`` of a class."""
    return f'{cls.__module__}.{cls.__qualname__}'


def class_named(module: object, names: Collection[str], method: str = 'forward') -> Optional[str]:
    """The qualified name in ``names`` whose computation ``module`` inherits unchanged.

    A downstream project may subclass a library's attention to change its constructor; its computation is still the
    library's as long as ``method`` is not overridden. One that overrides it computes something an adapter does not
    know, and must not be replaced.

    Args:
        module: The instance looked at.
        names: Qualified names of known classes.
        method: The method that must come from the known class.

    Returns:
        The name found, or None.
    """
    cls = type(module)
    for base in cls.__mro__:
        if qualified_name(base) in names:
            same = getattr(cls, method, None) is getattr(base, method, None)
            return qualified_name(base) if same else None
    return None
