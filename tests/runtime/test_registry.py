"""A runtime is one registered class, which load, the export and its verification find by name; and no PyTorch."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from vit_models import build

from psaq_mm.deploy import export_model
from psaq_mm.deploy.report import execution
from psaq_mm.engine.exporting import chosen_runtimes, verify_export
from psaq_mm.errors import ConfigError
from psaq_mm.models import quantize_model_
from psaq_mm.quantization import calibrate
from psaq_mm.runtime import RUNTIMES, load

ROOT = Path(__file__).resolve().parents[2]
SIZE = (32, 32)


@pytest.fixture(scope='module')
def student(tmp_path_factory):
    pytest.importorskip('timm')
    model, images = build('timm-vit'), torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(2))
    quantize_model_(model, 'w8a8')
    calibrate(model, lambda: model(images))
    return model, images, export_model(model, tmp_path_factory.mktemp('vit') / 'out', [SIZE])


@pytest.fixture
def plain():
    """The runtime that the docs show: its name is not that of its package, and it has float kernels only."""
    pytest.importorskip('onnxruntime')
    before, text = dict(RUNTIMES), (ROOT / 'docs' / 'reference' / 'integer_models.md').read_text()
    code = text[text.index('from psaq_mm.runtime import Runtime') :]
    exec(code[: code.index('```')], {})
    yield RUNTIMES['plain']
    RUNTIMES.clear()
    RUNTIMES.update(before)


def test_a_registered_runtime_loads_executes_and_verifies(student, plain, capsys):
    model, images, exported = student
    found = load(exported.directory, 'plain', 1).run(images.numpy())['logits']
    wanted = load(exported.directory, 'onnxruntime', 1, kernels='float').run(images.numpy())['logits']
    assert np.allclose(found, wanted, atol=0.02 * np.abs(wanted).max())
    assert chosen_runtimes(['plain'], False) == ['plain'] and 'plain' in chosen_runtimes([], True)
    deployed = load(exported.directory, 'plain', 1)
    told = execution(deployed, deployed.sizes[0])
    assert told.startswith('plain, 32 x 32: 0 of 1 products are integer, float kernels'), told
    verify_export(model, exported, ['plain'], 1)
    assert 'plain ran the graph with float kernels' in capsys.readouterr().out
    with pytest.raises(ConfigError, match="runtime='plane' is not known: did you mean plain"):
        load(exported.directory, 'plane')
    with pytest.raises(ConfigError, match='the runtime plain takes no device: leave it out'):
        load(exported.directory, 'plain', device='GPU')
    with pytest.raises(ConfigError, match='the runtime plain takes no settings'):
        load(exported.directory, 'plain', settings=dict(threads=2))


def test_a_runtime_without_its_package_is_refused(student, plain, monkeypatch):
    plain.package = 'psaq_mm_absent'
    with pytest.raises(ConfigError, match='the runtime plain is not installed'):
        load(student[2].directory, 'plain')
    assert not plain.installed() and 'plain' not in chosen_runtimes([], True)


@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
def test_running_an_export_imports_no_pytorch(student, runtime):
    pytest.importorskip(runtime)
    script = f"""
import sys
import numpy
import psaq_mm.runtime
model = psaq_mm.runtime.load({str(student[2].directory)!r}, {runtime!r}, 1)
model(numpy.zeros({(*SIZE, 3)}, numpy.uint8))
heavy = {{'torch', 'onnx', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'timm'}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, '-c', script], check=True, cwd=ROOT)


@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
def test_borrowed_outputs_are_those_of_a_run_until_the_context_ends(student, runtime):
    pytest.importorskip(runtime)
    _, images, exported = student
    session = load(exported.directory, runtime, 1).session(SIZE)
    first, second = (dict(images=images[i : i + 1].numpy()) for i in range(2))
    wanted = session.run(first)['logits']
    other = threading.Thread(target=session.run, args=(second,))
    with session.borrowed(first) as outputs:
        other.start()
        other.join(0.2)
        assert np.array_equal(outputs['logits'], wanted), 'another thread has written to them'
        if runtime == 'openvino':
            assert other.is_alive() and outputs['logits'].base is not None, 'they were copied'
    other.join()
    assert not np.array_equal(session.run(second)['logits'], wanted)
