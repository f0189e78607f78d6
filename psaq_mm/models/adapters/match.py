# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Recognizing a library's class without importing the library."""

import functools
from typing import Collection, Optional, Tuple

from psaq_mm.quantization import ConvertFn, class_before, register_adapter

__all__ = ['adapt', 'class_named', 'inherits', 'qualified_name']


def qualified_name(cls: type) -> str:
    """``module.ClassName`` of a class."""
    return f'{cls.__module__}.{cls.__qualname__}'


@functools.lru_cache(maxsize=4096)  # asked for each module of a model by each adapter
def _lineage(cls: type) -> Tuple[Tuple[str, type], ...]:
    return tuple((qualified_name(base), base) for base in cls.__mro__)


def inherits(module: object, name: str) -> bool:
    """Whether the class of ``module`` is, or derives from, the one of this qualified name."""
    return any(known == name for known, _ in _lineage(type(module)))


def class_named(module: object, names: Collection[str], method: str = 'forward') -> Optional[str]:
    """The qualified name in ``names`` whose computation ``module`` inherits unchanged.

    A downstream project may subclass a library's attention to change its constructor. Its computation is still the
    library's as long as ``method`` is not overridden. A class that overrides it computes something unknown, and must
    not be replaced.

    Args:
        module: The instance looked at. One that is converted counts as before.
        names: Qualified names of known classes.
        method: The method that must come from the known class.

    Returns:
        The name found, or None.
    """
    cls = class_before(type(module))
    for name, base in _lineage(cls):
        if name in names:
            same = getattr(cls, method, None) is getattr(base, method, None)
            return name if same else None
    return None


def adapt(names: Collection[str], convert: ConvertFn) -> None:
    """Register an adapter of the classes ``names``; see :func:`.convert.register_adapter`."""
    register_adapter(lambda module: class_named(module, names) is not None, convert)
