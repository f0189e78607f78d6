"""Exceptions of psaq_mm.

Every message is one sentence that names the offending value and the way out. Each class also derives from the
built-in exception a caller would expect, so ``except ValueError`` keeps working for code that knows nothing of
psaq_mm.
"""

import difflib
from typing import Iterable, List, Sequence


class PsaqError(Exception):
    """Base of every error that psaq_mm raises on purpose."""


class SpecError(PsaqError, ValueError):
    """A quantization setting is unknown, out of range, or matches nothing."""


class NotCalibratedError(PsaqError, RuntimeError):
    """A quantizer was used before it got a range from calibration or from a checkpoint."""


class UnsupportedModelError(PsaqError, TypeError):
    """A model lacks what a method needs of it."""


class CheckpointError(PsaqError, RuntimeError):
    """A checkpoint does not fit the model it is loaded into."""


class ConfigError(PsaqError, ValueError):
    """A config key is unknown, missing or contradicts another one."""


class DataError(PsaqError, ValueError):
    """A tensor is empty, not finite, or of a shape that does not fit."""


def similar(name: object, known: Iterable[str], count: int = 1) -> List[str]:
    """Known names that look most like ``name``, best first; none where no one is near."""
    return difflib.get_close_matches(str(name), list(known), count, cutoff=0.4)


def nearest(name: object, known: Iterable[str]) -> str:
    """The hint of a message about an unknown name: the most similar known one, and the list of all.

    Example:
        >>> f'the method {"bset"!r} is not known: {nearest("bset", ["fast", "best"])}'
        "the method 'bset' is not known: did you mean best? Known are fast, best"
    """
    names = list(known)
    near = similar(name, names)
    return f'did you mean {near[0]}? Known are {", ".join(names)}' if near else f'use one of {", ".join(names)}'


def first_of(names: Sequence[str], count: int = 3) -> str:
    """The first names of a list that may be long, for a message.

    Example:
        >>> first_of(['a', 'b', 'c', 'd', 'e'])
        'a, b, c and 2 more'
    """
    rest = f' and {len(names) - count} more' if len(names) > count else ''
    return ', '.join(names[:count]) + rest
