# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Values in types that JSON and a ``torch.load`` of weights alone know. Needs neither PyTorch nor NumPy."""

import math
import os
from typing import Any, Callable, Mapping, Optional

__all__ = ['to_plain']


def to_plain(value: Any, convert: Optional[Callable[[Any], Any]] = None, tuples: bool = False, nan: bool = True) -> Any:
    """A value out of None, booleans, numbers, strings, lists and dicts, at any depth; equal for equal values.

    ==============================================  ==================================================
    what                                            becomes
    ==============================================  ==================================================
    None, bool, int, float, str                     itself
    arrays, tensors and scalars of NumPy, PyTorch   numbers, in nested lists where they have dimensions
    mappings                                        a dict, whose keys are strings
    lists and tuples                                a list
    sets                                            a sorted list
    paths                                           their text
    classes and functions                           ``module.name``
    anything else                                   its ``repr``
    ==============================================  ==================================================

    Args:
        value: Anything.
        convert: Is called with every value first, at any depth. What it returns is made plain.
        tuples: Whether tuples stay tuples, and keys are numbers where they are: for ``torch.save``, not for JSON.
        nan: Whether NaN and infinity stay. False: they become None, for ``json.dumps(..., allow_nan=False)``.
    """

    def inner(item: Any) -> Any:
        return to_plain(item, convert, tuples, nan)

    if convert is not None:
        value = convert(value)
    # Asked of the type: a type of a pure-Python config that is not resolved yet answers any attribute.
    if callable(getattr(type(value), 'tolist', None)):
        listed = value.tolist()
        return repr(value) if type(listed) is type(value) else inner(listed)  # such as numpy.longdouble
    if isinstance(value, float):
        return value if nan or math.isfinite(value) else None
    if value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, Mapping):
        return {inner(key) if tuples else str(key): inner(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(inner, value), key=str)
    if isinstance(value, (list, tuple)):
        return tuple(map(inner, value)) if tuples and isinstance(value, tuple) else list(map(inner, value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, '__qualname__'):
        return f'{value.__module__}.{value.__qualname__}'
    return repr(value)
