"""demo/tutorial.ipynb, cell by cell: it runs as it stands, says what the text says, and is kept without outputs."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / 'demo' / 'tutorial.ipynb'
CELLS = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']


def value_of(code, names):
    """Run a cell as Jupyter does: what its last line is worth is shown below it."""
    *statements, last = code.splitlines(keepends=True)
    exec(''.join(statements), names)
    return eval(last, names)


def test_outputs_are_stripped():
    for cell in CELLS:
        assert cell['cell_type'] == 'markdown' or (cell['outputs'] == [] and cell['execution_count'] is None)


def test_its_links_lead_to_files():
    links = [link for cell in CELLS for link in re.findall(r'\]\(([^)#]+)\)', ''.join(cell['source']))]
    assert links
    for link in links:
        assert (NOTEBOOK.parent / link).is_file(), link


def test_every_cell_runs(monkeypatch, tmp_path):
    pytest.importorskip('mmdet')
    pytest.importorskip('onnx')
    pytest.importorskip('openvino')
    monkeypatch.chdir(ROOT / 'demo')
    monkeypatch.setattr(sys, 'path', [*sys.path])
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    names = {}
    shown = [value_of(''.join(cell['source']), names) for cell in CELLS if cell['cell_type'] == 'code']
    version, kind, quantized, integer, picture = shown
    assert version == names['psaq_mm'].__version__
    assert kind.__name__ == 'MaskRCNN'
    # The integer model finds what the student finds: at least two objects, in the same order of certainty.
    assert len(quantized) >= 2 and [name for name, _ in quantized][:2] == [name for name, _ in integer][:2]
    assert picture.size == (480, 480) and len(set(picture.getdata())) > 100
