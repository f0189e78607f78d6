"""What every test folder shares."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from quick_builds import configs_as_they_are, metafiles_read_once
from second_device import DEVICES, SecondDevice

# No deadline: a first call compiles, allocates or waits for another process. Derandomized: the same examples on every
# machine, so that a failure is there again when it is looked at.
settings.register_profile('psaq_mm', deadline=None, derandomize=True)
settings.load_profile('psaq_mm')

# The models of the tests are small: a second thread mostly waits for the first, and stalls where another process holds
# its core.
torch.set_num_threads(1)


class NeedsTorchvision:
    """Import finder for where there is no torchvision: says so of the libraries that import it, and tests that ask for
    them are skipped.

    mmpretrain itself is imported without, and fails at its models.
    """

    libraries = ('mmpretrain', 'timm')

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in cls.libraries:
            raise ModuleNotFoundError(
                f'{name} needs torchvision, which is not installed: there is none for every CPU-only torch '
                f'(this one is {torch.__version__})',
                name=name,
            )


if importlib.util.find_spec('torchvision') is None:
    sys.meta_path.insert(0, NeedsTorchvision)


@pytest.fixture(scope='session', autouse=True)
def quick_configs():
    """What MMEngine does with a config takes longer than most tests; programs that a test starts do all of it."""
    with metafiles_read_once(), configs_as_they_are():
        yield


@pytest.fixture(params=DEVICES)
def device(request):
    """A device that is not the CPU: an emulated one, and a GPU where there is one."""
    if request.param == 'cuda':
        yield torch.device('cuda')
        return
    with SecondDevice() as second:
        yield second.device


@pytest.fixture(scope='session')
def data_root():
    """Folder of real weights and images, as the environment variable PSAQ_MM_DATA names it; skips where there is
    none."""
    named = os.environ.get('PSAQ_MM_DATA')
    if not named:
        pytest.skip(
            'PSAQ_MM_DATA is not set: it names the folder of real weights and images that this test measures on'
        )
    folder = Path(named)
    if not folder.is_dir():
        pytest.skip(f'PSAQ_MM_DATA={named} is no folder: this test measures on real weights and images in it')
    return folder
