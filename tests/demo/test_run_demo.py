"""The demo leaves a page and a summary that agree, says how far it is, and fails in one sentence."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODELS = {'mask_rcnn_swin_nuclei': 'coco/bbox_mAP', 'upernet_swin_demo': 'mIoU'}
RUNS = {
    'mask_rcnn_swin_nuclei': ['full_precision', 'gaussian_w8a8', 'fast_w8a8', 'best_w8a8', 'best_w4a8'],
    'upernet_swin_demo': ['full_precision', 'gaussian_w8a8', 'fast_w8a8', 'best_w8a8', 'psaq_v2_w8a8', 'best_w4a8'],
}

pytestmark = pytest.mark.skipif(
    not all((ROOT / 'demo' / 'checkpoints' / f'{name}.pth').is_file() for name in MODELS),
    reason='demo/checkpoints holds no checkpoints; a clone of the repository has them',
)


def _demo(*arguments):
    # From another folder: the demo finds its configs, scenes and checkpoints from wherever it is called.
    return subprocess.run(
        [sys.executable, str(ROOT / 'demo' / 'run_demo.py'), *map(str, arguments)],
        cwd=os.path.dirname(ROOT),
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
    )


@pytest.fixture(scope='module')
def quick(tmp_path_factory):
    """One quick run of both models."""
    out = tmp_path_factory.mktemp('demo')
    return out, _demo('--quick', '--seed', 5, '--out', out)


@pytest.mark.slow
def test_the_summary_holds_every_run_under_the_evaluators_own_keys(quick):
    out, done = quick
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / 'summary.json').read_text())
    assert list(summary) == list(MODELS)
    for model, key in MODELS.items():
        assert list(summary[model]) == RUNS[model]
        for run in RUNS[model]:
            assert summary[model][run]['seconds'] > 0 and isinstance(summary[model][run][key], float)


@pytest.mark.slow
def test_the_page_says_what_the_summary_says_and_needs_nothing_else(quick):
    out, _ = quick
    page = (out / 'index.html').read_text()
    summary = json.loads((out / 'summary.json').read_text())
    for runs in summary.values():
        for entry in runs.values():
            for key, value in entry.items():
                if key not in ('seconds', 'seconds_of') and value is not None:
                    assert f'<code>{key}</code>' in page and f'<td>{value:g}</td>' in page
    assert 'http' not in page and 'src="data:image/' in page
    assert page.count('role="img"') == 2 * 10  # a chart a block of either Swin
    assert 'a quick run' in page and page.count('class="mark"') == 4


@pytest.mark.slow
def test_the_console_tells_the_time_and_ends_in_a_table(quick):
    out, done = quick
    lines = done.stdout.splitlines()
    steps = [line for line in lines if re.match(r'\[ *\d+:\d\d, about \d+:\d\d left\]', line)]
    assert len(steps) >= sum(len(runs) + 1 for runs in RUNS.values()) and len(lines) < 100
    assert done.stderr == ''
    assert lines[-1].endswith(f'the numbers are in {out / "summary.json"}')
    for model in MODELS:
        assert any(line.startswith(model) and line.endswith('seconds') for line in lines)
    assert 'mmengine - INFO' in (out / 'console.log').read_text()


@pytest.mark.slow
def test_no_training_picture_is_ever_there_to_be_opened(quick):
    out, _ = quick
    assert not list(out.rglob('train*.json')) and not (ROOT / 'demo' / 'nuclei' / 'annotations' / 'train.json').exists()
    assert not (out / 'scenes-quick' / 'segmentation' / 'images' / 'training').exists()


@pytest.mark.slow
def test_without_a_checkpoint_it_says_so_and_leaves_earlier_results(tmp_path):
    (tmp_path / 'summary.json').write_text('{}')
    (tmp_path / 'index.html').write_text('earlier')
    done = _demo('--quick', '--only', 'segmentor', '--out', tmp_path, '--checkpoints', tmp_path / 'none')
    assert done.returncode == 1
    assert (
        len(done.stderr.splitlines()) == 1
        and 'there is no checkpoint' in done.stderr
        and 'upernet_swin_demo.pth' in done.stderr
    )
    assert (tmp_path / 'summary.json').read_text() == '{}' and (tmp_path / 'index.html').read_text() == 'earlier'
    assert not list(tmp_path.glob('.*'))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / 'upernet_swin_demo.pth').write_bytes(b'PK\x03\x04 cut short')
    done = _demo('--quick', '--only', 'segmentor', '--out', tmp_path / 'out', '--checkpoints', tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert 'upernet_swin_demo.pth is damaged' in done.stderr
    assert not (tmp_path / 'out' / 'summary.json').exists() and not (tmp_path / 'out' / 'index.html').exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / 'file').write_text('')
    done = _demo('--quick', '--out', tmp_path / 'file' / 'out')
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and str(tmp_path / 'file') in done.stderr


def test_arguments_are_checked():
    done = _demo('--only', 'classifier')
    assert done.returncode == 2 and 'detector' in done.stderr and 'segmentor' in done.stderr
