# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How the C library keeps the memory of tensors on the CPU."""

import ctypes
import os
import platform

__all__ = ['keep_freed_memory']

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_KEPT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let glibc keep what tensors leave free for the next ones, instead of giving it back to the system and asking
    again.

    By default each large tensor is a mapping of its own, whose pages the system clears when they are first touched: a
    seventh of the time of a step whose forward pass holds some GiB (``benchmarks/coevolution.py``). What is kept is
    what the process used at its peak.

    Returns:
        Whether it was done: not under another C library or system, and not where the environment has settings of its
        own (``MALLOC_...``, ``GLIBC_TUNABLES``, a preloaded allocator).
    """
    given = any(name.startswith('MALLOC_') for name in os.environ) or 'malloc' in os.environ.get('GLIBC_TUNABLES', '')
    if given or os.environ.get('LD_PRELOAD') or platform.system() != 'Linux' or platform.libc_ver()[0] != 'glibc':
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_TRIM_THRESHOLD, _KEPT) and mallopt(_M_MMAP_MAX, 0))
