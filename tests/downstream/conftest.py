"""A project as its own folder, with pictures and a full-precision checkpoint."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from quick_builds import metafiles_read_once
from tiny import build_full_precision

PROJECT = Path(__file__).parent / 'project'


@pytest.fixture(scope='module', autouse=True)
def quick_configs():
    with metafiles_read_once():
        yield


@pytest.fixture(scope='module')
def welds(tmp_path_factory):
    """The project in a folder of its own, which is the current one, with pictures and a full-precision checkpoint."""
    folder = tmp_path_factory.mktemp('welds')
    shutil.copytree(PROJECT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns('__pycache__'))
    random = np.random.default_rng(0)
    for part in ('train', 'test'):
        (folder / 'data' / part).mkdir(parents=True)
        for name in ('0.png', '1.png'):
            Image.fromarray(random.integers(0, 255, (50, 80, 3), dtype=np.uint8)).save(folder / 'data' / part / name)
        (folder / 'data' / f'{part}.txt').write_text(
            '0.png pore 4 6 30 40\n0.png slag 40 8 70 30\n1.png crack 10 10 60 20\n'
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        from mmengine.config import Config
        from welds import WeldDataset

        model = build_full_precision(Config.fromfile('configs/weld_detector.py'))
        torch.save(
            dict(state_dict=model.state_dict(), meta=dict(dataset_meta=WeldDataset.METAINFO)), 'weld_detector.pth'
        )
        yield folder
