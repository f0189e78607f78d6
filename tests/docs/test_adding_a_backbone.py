"""docs/guides/adding_a_backbone.md, block by block: its files are those of the project, and its checks hold there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('mmdet')
pytest.importorskip('onnxruntime')
ROOT = Path(__file__).parents[2]
PROJECT = ROOT / 'tests' / 'downstream' / 'project'
TEXT = (ROOT / 'docs' / 'guides' / 'adding_a_backbone.md').read_text()
BLOCKS = re.findall(r'^```python\n(.*?)^```$', TEXT, re.DOTALL | re.MULTILINE)
FILES = {
    match[1]: block[match.end() :] for block in BLOCKS if (match := re.match(r'# ((?:welds|configs)/\S+)\n', block))
}
CHECKS = [block for block in BLOCKS if not re.match(r'# (?:welds|configs)/', block)]


def test_the_files_of_the_page_are_those_of_the_project():
    assert list(FILES) == ['welds/seam_net.py', 'welds/seam_net_quant.py', 'configs/seam_detector_w4a8.py']
    for name, content in FILES.items():
        assert content == (PROJECT / name).read_text(), name


def test_every_other_block_runs_in_the_project(tmp_path):
    """In a process of its own: a description stays registered."""
    assert len(CHECKS) == 6 and TEXT.count('```') == 2 * len(BLOCKS)
    for name in ('welds', 'configs'):
        (tmp_path / name).symlink_to(PROJECT / name)
    (tmp_path / 'page.py').write_text('\n'.join(CHECKS))
    command = [sys.executable, '-W', 'ignore', 'page.py']
    done = subprocess.run(command, cwd=tmp_path, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'the backbone welds.seam_net.SeamNet is not supported' in done.stdout
    assert 'the stream of stage 1 (16 channels), the stream of stage 2 (32 channels)' in done.stdout


def _environment():
    import os

    return dict(
        os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    )


def test_every_link_has_a_target():
    for link in re.findall(r'\]\(([^)#]+)\)', TEXT):
        assert (ROOT / 'docs' / 'guides' / link).exists(), link
