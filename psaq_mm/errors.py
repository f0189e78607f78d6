"""Exceptions of psaq_mm.

Every message is one sentence that names the offending value and the way out. Each class also derives from the
built-in exception a caller would expect, so ``except ValueError`` keeps working for code that knows nothing of
psaq_mm.
"""


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
