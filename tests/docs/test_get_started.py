"""docs/get_started.md, block by block: what it says is what happens."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from psaq_mm.engine.checkpoint import is_quantized, read_checkpoint

pytest.importorskip('mmdet')
ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r'^```(\w*)\n(.*?)^```$', (ROOT / 'docs' / 'get_started.md').read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder that is the checkout to whoever works in it, and where every block has been run, in order."""
    folder = tmp_path_factory.mktemp('checkout')
    for name in ('configs', 'demo', 'psaq_mm', 'tools'):
        (folder / name).symlink_to(ROOT / name)
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    environment.update(PATH=os.pathsep.join([os.path.dirname(sys.executable), os.environ['PATH']]), OMP_NUM_THREADS='1')
    printed = []
    for number, (language, code) in enumerate(BLOCKS):
        assert language in ('bash', 'python'), (
            f'block {number} is of a language that this test cannot run: {language!r}'
        )
        script = folder / f'block_{number}.{language}'
        script.write_text(code)
        command = ['bash', '-euo', 'pipefail', script.name] if language == 'bash' else [sys.executable, script.name]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        logs = '\n'.join(
            log.read_text()[-1500:] for log in sorted(folder.glob('my_project/*.log'), key=os.path.getmtime)[-1:]
        )
        assert done.returncode == 0, f'block {number}:\n{code}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}\n{logs}'
        printed.append(done.stdout)
    return folder, printed


@pytest.mark.slow
def test_every_block_runs_and_leaves_what_the_text_says(folder):
    folder, printed = folder
    project = folder / 'my_project'
    student = read_checkpoint(project / 'run' / 'student.pth')
    assert is_quantized(student) and student['meta']['psaq_mm']['label'] == 'W4A8'
    assert list((project / 'run' / 'samples').glob('*.png'))
    assert any("'star'" in text for text in printed) and any('discrepancy:' in text for text in printed)
    table = next(text for text in printed if text.startswith('metric'))
    assert 'full precision' in table and 'W4A8' in table and 'coco/bbox_mAP' in table
    report = json.loads((project / 'sensitivity' / 'sensitivity.json').read_text())
    assert (
        report['mixed_precision']['error'] < report['error'] and report['mixed_precision']['average']['weights'][1] <= 5
    )
    assert (project / 'sensitivity' / 'sensitivity.html').is_file()
    mixed = read_checkpoint(project / 'mixed' / 'student.pth')['meta']['psaq_mm']['quant']
    assert mixed['overrides'] == report['mixed_precision']['overrides'] and mixed['w_bits'] == 4


def test_nothing_on_the_page_is_without_a_language_or_a_target():
    text = (ROOT / 'docs' / 'get_started.md').read_text()
    assert len(BLOCKS) == 8 and text.count('```') == 2 * len(BLOCKS)
    for link in re.findall(r'\]\(([^)#]+)\)', text):
        assert (ROOT / 'docs' / link).exists(), link
