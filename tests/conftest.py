"""What every test folder shares."""
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# No deadline: a first call compiles, allocates or waits for another process. Derandomized: the same examples on every machine, so
# that a failure is there again when it is looked at.
settings.register_profile('psaq_mm', deadline=None, derandomize=True)
settings.load_profile('psaq_mm')

# The models of the tests are small: a second thread mostly waits for the first, and stalls where another process holds its core.
torch.set_num_threads(1)


@pytest.fixture(scope='session')
def data_root():
    """Folder of real weights and images, as the environment variable PSAQ_MM_DATA names it; skips where there is none."""
    named = os.environ.get('PSAQ_MM_DATA')
    if not named:
        pytest.skip('PSAQ_MM_DATA is not set: it names the folder of real weights and images that this test measures on')
    folder = Path(named)
    if not folder.is_dir():
        pytest.skip(f'PSAQ_MM_DATA={named} is no folder: this test measures on real weights and images in it')
    return folder
