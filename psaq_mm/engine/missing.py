# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Recognizes errors about missing packages, modules and types, which the libraries word in a dozen ways."""

import importlib.util
import re
from typing import Iterator, Optional

__all__ = ['missing_from']

_DISTRIBUTIONS = dict(
    cv2='opencv-python',
    PIL='pillow',
    skimage='scikit-image',
    sklearn='scikit-learn',
    yaml='pyyaml',
    mmdet='mmdet',
    mmseg='mmsegmentation',
    mmcv='mmcv',
    mmpretrain='mmpretrain',
)
"""Distributions of modules, which pip knows by another name."""

_NO_MODULE = re.compile(r'No module named [\'"]([\w.]+)')
_PIP_INSTALL = re.compile(r'pip install((?: -[-\w]+)*) +[\'"`]?([^\s\'"`]+)')
_NOT_INSTALLED = re.compile(r'(?:[Pp]ackage )?[\'"`]?([\w.-]+)[\'"`]? is not installed')
_UNREGISTERED = re.compile(r'(\S+) is not in the (\S+) registry')


def _chain(error: Optional[BaseException]) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def missing_from(error: BaseException) -> Optional[str]:
    """What is missing, and the way out, in one sentence; None for an error of another kind.

    Args:
        error: Raised by MMEngine, a library or Python. Libraries check for an optional package when a part is built.
            They raise an ImportError, a RuntimeError or an AssertionError, with or without ``pip install`` in its text.
    """
    return next(filter(None, map(_sentence, _chain(error))), None)


def _absent(module: str) -> str:
    name = module.split('.')[0]
    return (
        f'the module {module} is not there: pip install {_DISTRIBUTIONS.get(name, name)}, or put the folder that it '
        'is in on PYTHONPATH'
    )


def _absent_library() -> Optional[str]:
    """The library of the default scope if it is not installed: MMEngine then knows only its own types."""
    from mmengine.registry import DefaultScope

    scope = DefaultScope.get_current_instance()
    try:
        installed = scope is None or importlib.util.find_spec(scope.scope_name) is not None
    except ImportError:
        installed = False
    return None if installed else scope.scope_name


def _sentence(error: BaseException) -> Optional[str]:
    message = ' '.join(str(error).split())
    module = _NO_MODULE.search(message) if isinstance(error, ImportError) else None
    if module:
        return None if module[1].split('.')[0] == 'psaq_mm' else _absent(module[1])
    if isinstance(error, (ImportError, RuntimeError, AssertionError)):
        command, absent = _PIP_INSTALL.search(message), _NOT_INSTALLED.search(message)
        package = command[2].rstrip('.,;)') if command else absent[1] if absent else None
        if package:
            return (
                f'the package {absent[1] if absent else package} is not installed: pip '
                f'install{command[1] if command else ""} {package}'
            )
    unregistered = _UNREGISTERED.search(message) if isinstance(error, KeyError) else None
    if unregistered:
        library, name = _absent_library(), unregistered[1].strip('\'"')
        if library:
            return _absent(library)
        return (
            f'type={name!r} is not known to {unregistered[2]}: check its name, or name the module that registers it '
            'in custom_imports'
        )
    return None
