# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What every floor may ask of a file; the standard library alone, as an exported model is read without PyTorch."""

import contextlib
import hashlib
import os
from typing import Iterator, Union

__all__ = ['file_sha256', 'locked']


def file_sha256(path: Union[str, os.PathLike]) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path: Union[str, os.PathLike], wait: bool = True) -> Iterator[None]:
    """Hold a lock file while the block runs.

    The lock is the system's, so that one of a process that was killed is gone with it. Without ``fcntl`` (Windows)
    nothing is locked.

    Raises:
        BlockingIOError: Another process holds it, and ``wait`` is False.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
