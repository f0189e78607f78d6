# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Hashes, locks and safe writes of files, without PyTorch: the runtime of an export uses it too."""

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Iterator, Union

from psaq_mm.errors import PsaqError

__all__ = ['file_sha256', 'locked', 'whole_file', 'whole_folder', 'write_whole']

PathLike = Union[str, 'os.PathLike[str]']

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that mean: there is no room for this file."""


def file_sha256(path: PathLike) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path: PathLike, wait: bool = True) -> Iterator[None]:
    """Hold a lock file while the block runs. The system frees the lock of a process that was killed.

    Args:
        path: The lock file. It is made where it is missing, and may stay.
        wait: Whether to wait for another process that holds the lock.

    Raises:
        BlockingIOError: Another process holds it, and ``wait`` is False.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(os.fspath(path), timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(errno.EWOULDBLOCK, 'another process holds the lock', os.fspath(path)) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def whole_file(path: PathLike) -> Iterator[Path]:
    """A path to write to instead of ``path``; it is moved there at the end, so a reader never sees half a file.

    Folders are made. The file is on the disk (fsync) before it is moved.

    Raises:
        OSError: The disk is full or not writable (the error names ``path``). The old file stays as it was.

    Example:
        >>> with whole_file('student.pth') as partial:
        ...     torch.save(content, partial)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
    try:
        yield partial
        with open(partial, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except PsaqError:
        raise
    except RuntimeError as error:  # torch reports a failed write of its zip archive so, without an errno
        raise OSError(errno.ENOSPC, 'no space left or the write failed', str(path)) from error
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(errno.ENOSPC, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: PathLike) -> Iterator[Path]:
    """A folder to write into, beside ``path``; it is moved there at the end, in place of a folder that is there, so a
    reader never sees half of one. If the block fails, the old folder stays as it was.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f'.{path.name}.', dir=path.parent))
    try:
        yield partial
        os.chmod(partial, 0o755)  # mkdtemp keeps others out
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f'.{path.name}.old.', dir=path.parent))
            os.replace(path, old / path.name)
            os.replace(partial, path)
            shutil.rmtree(old)
        else:
            os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_whole(path: PathLike, content: Union[str, bytes]) -> None:
    """Write a file in one step, see :func:`whole_file`. Text is written as UTF-8.

    Raises:
        OSError: The folder or the file cannot be written. The old file stays as it was.
    """
    with whole_file(path) as partial:
        partial.write_bytes(content.encode('utf-8') if isinstance(content, str) else content)
