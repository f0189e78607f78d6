"""What the commands ask of the C library, in processes of their own."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='settings of glibc')

FAULTS = """
import resource, sys
from psaq_mm.commands.allocator import keep_freed_memory
print(keep_freed_memory())
import torch
def use():
    for _ in range(20):
        torch.ones(16 << 20, dtype=torch.uint8)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(**environment):
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith('MALLOC_') and k not in ('GLIBC_TUNABLES', 'LD_PRELOAD')
    }
    done = subprocess.run([sys.executable, '-c', FAULTS], capture_output=True, text=True, env={**kept, **environment})
    assert done.returncode == 0, done.stderr
    found, faults = done.stdout.split()
    return found == 'True', int(faults)


def test_freed_memory_is_used_again_without_a_page_fault():
    found, faults = run()
    assert found and faults < 1000, '20 tensors of 4096 pages'


@pytest.mark.parametrize(
    'name, value', [('MALLOC_MMAP_THRESHOLD_', '131072'), ('GLIBC_TUNABLES', 'glibc.malloc.mmap_threshold=131072')]
)
def test_settings_of_the_environment_stay(name, value):
    found, faults = run(**{name: value})
    assert not found and faults > 10000
