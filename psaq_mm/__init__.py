"""Quantization of vision transformers in OpenMMLab without real data.

``quantize``, ``export``, ``predict``, ``save`` and ``load`` of :mod:`psaq_mm.api` stand here too. They are imported
when they are asked for: ``import psaq_mm`` itself imports nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any, List

if TYPE_CHECKING:
    from psaq_mm.api import export, load, predict, quantize, save

__version__ = '0.2.0'

__all__ = ['__version__', 'export', 'load', 'predict', 'quantize', 'save']


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module('psaq_mm.api'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> List[str]:
    return sorted({*globals(), *__all__})
