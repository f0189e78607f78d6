"""docs/get_started.md, block by block: what it says is what happens."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from psaq_mm.engine.checkpoint import is_quantized, read_checkpoint

pytest.importorskip('mmdet')
pytest.importorskip('onnx')
pytest.importorskip('openvino')
ROOT = Path(__file__).parents[2]
PAGE = ROOT / 'docs' / 'get_started.md'
BLOCKS = re.findall(
    r'^(<!-- not run: [^\n]* -->\n)?```(bash|python)\n(.*?)^```$',
    PAGE.read_text(encoding='utf-8'),
    re.DOTALL | re.MULTILINE,
)
COMMANDS = [code for not_run, language, code in BLOCKS if not not_run and language == 'bash']


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    """A folder that is the checkout to whoever works in it, and what each block printed there, run in order."""
    folder = tmp_path_factory.mktemp('checkout')
    for name in ('configs', 'demo', 'psaq_mm'):
        (folder / name).symlink_to(ROOT / name)
    psaq = folder / 'bin' / 'psaq'  # of this checkout, whatever is installed
    psaq.parent.mkdir()
    psaq.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m psaq_mm.commands.main "$@"\n')
    psaq.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    path = os.pathsep.join([str(psaq.parent), os.path.dirname(sys.executable), os.environ['PATH']])
    environment.update(PATH=path, OMP_NUM_THREADS='1')
    printed = []
    for code in COMMANDS:
        done = subprocess.run(
            ['bash', '-euo', 'pipefail', '-c', code], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f'{code}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
        printed.append(done.stdout)
        print(f'$ {code}{done.stdout[-3000:]}')
    return folder / 'my_project', printed


@pytest.mark.slow
def test_every_block_runs_and_leaves_what_the_page_says(ran):
    project, printed = ran
    student = read_checkpoint(project / 'run' / 'student.pth')
    assert is_quantized(student) and student['meta']['psaq_mm']['label'] == 'W8A8'
    assert 'star' in student['meta']['dataset_meta']['classes']
    metrics = json.loads((project / 'test' / 'test_results.json').read_text())
    assert 'full precision' in printed[1] and 'W8A8' in printed[1] and 'coco/bbox_mAP' in printed[1]
    before, after = (metrics[model]['coco/bbox_mAP'] for model in ('full_precision', 'quantized'))
    assert after > before - 0.05 > 0.5
    assert (project / 'deployed' / 'manifest.json').is_file()
    assert 'my_project/deployed' in printed[2] and 'psaq predict' in ' '.join(printed[2].split())
    pictures = sorted((project / 'scenes' / 'detection' / 'val').iterdir())
    drawn = [np.abs(cv2.imread(str(p)).astype(int) - cv2.imread(str(_shown(project, p)))).max() for p in pictures]
    assert len(drawn) == 8 and min(drawn) > 0


@pytest.mark.slow
def test_the_table_of_files_is_true(ran):
    project, _ = ran
    rows = re.findall(r'^\| `my_project/([^`]+)` \|', PAGE.read_text(encoding='utf-8'), re.MULTILINE)
    assert len(rows) == 6
    for row in rows:
        assert list(project.glob(row.rstrip('/'))), row


def test_the_method_of_the_page_neither_synthesizes_nor_trains():
    from psaq_mm.engine.methods import METHODS
    from psaq_mm.engine.presets import resolve_dfq

    for name in ('fast', 'best'):
        assert f'`{name}`' in PAGE.read_text(encoding='utf-8')
        settings = resolve_dfq(name)
        assert not METHODS[name].trains and settings['iters'] == 0 and 'enerated' not in str(settings['samples'])


def _shown(project, picture):
    """The drawn form of a picture."""
    [path] = [p for p in (project / 'shown').rglob('*') if p.stem == picture.stem and p.suffix in ('.png', '.jpg')]
    return path
