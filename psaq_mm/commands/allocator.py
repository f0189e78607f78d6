# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Settings of the C library's memory allocator, for tensors on the CPU."""

import ctypes
import os
import platform

__all__ = ['keep_freed_memory']

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_KEPT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let glibc reuse freed memory of tensors for new ones, instead of returning it to the system.

    By default each large tensor is a mapping of its own. The system clears its pages when they are first touched, which
    takes a seventh of a step whose forward pass holds some GiB (``benchmarks/coevolution.py``). The price: the process
    holds its peak memory to the end.

    Returns:
        Whether it was set. It is not with another C library or system, nor where the environment has its own settings
        (``MALLOC_...``, ``GLIBC_TUNABLES``, a preloaded allocator).
    """
    settings = any(name.startswith('MALLOC_') for name in os.environ) or 'malloc' in os.environ.get(
        'GLIBC_TUNABLES', ''
    )
    if settings or os.environ.get('LD_PRELOAD') or platform.system() != 'Linux' or platform.libc_ver()[0] != 'glibc':
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_TRIM_THRESHOLD, _KEPT) and mallopt(_M_MMAP_MAX, 0))
