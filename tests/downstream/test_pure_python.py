"""The project's detector as a pure-Python config of MMEngine: types are classes, bases are read by read_base, there is
no default scope."""

import json

import numpy as np
import pytest
import torch

from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.commands.export import main as export_command
from psaq_mm.commands.inspect import main as inspect_command
from psaq_mm.commands.sensitivity import main as sensitivity_command
from psaq_mm.commands.test import main as evaluate_command
from psaq_mm.engine.checkpoint import read_checkpoint
from psaq_mm.engine.config import to_data_free
from psaq_mm.quantization import quantizers

pytest.importorskip('mmdet')
pytestmark = pytest.mark.filterwarnings('ignore')
PLAIN, QUANTIZED = 'configs/pure_python_detector.py', 'configs/pure_python_detector_w4a8.py'


@pytest.fixture(scope='module')
def student(welds):
    assert dfq_train([QUANTIZED, '--work-dir', 'work']) == 0
    return welds / 'work' / 'student.pth'


@pytest.fixture(scope='module')
def metrics(student):
    assert evaluate_command([QUANTIZED, str(student), '--full-precision', '--work-dir', 'evaluation']) == 0
    return json.loads((student.parents[1] / 'evaluation' / 'test_results.json').read_text())


def table_of(capsys, *arguments):
    assert inspect_command(list(arguments)) == 0
    return capsys.readouterr().out


def test_it_is_quantized_as_the_text_config_is(welds, capsys):
    expected = table_of(capsys, 'configs/weld_detector_w4a8.py')
    assert table_of(capsys, QUANTIZED) == expected
    assert table_of(capsys, PLAIN, '--quant', 'psaq_v2_w4a8') == expected
    by_name = (welds / QUANTIZED).read_text().replace('type=Quantized', "type='psaq_mm.Quantized'")
    (welds / 'configs' / 'by_name.py').write_text(by_name)
    assert table_of(capsys, 'configs/by_name.py') == expected


def test_the_run_is_written_down_and_can_be_run_again(welds, student, metrics):
    from mmengine.config import Config

    left = Config.fromfile(f'work/{QUANTIZED.rpartition("/")[2]}')
    assert left.train_cfg.dropped_hooks == ['EMAHook'] and left.model.backbone.init_cfg is None
    assert left.train_dataloader.dataset.metainfo.classes == ('pore', 'crack', 'slag'), 'a value that was imported'
    assert to_data_free(left).train_cfg == left.train_cfg
    assert read_checkpoint(student)['meta']['dataset_meta']['classes'] == ('pore', 'crack', 'slag')
    assert metrics['quantized'].keys() == metrics['full_precision'].keys()


def test_the_librarys_runner_takes_it(welds, student, metrics):
    from mmengine.config import Config
    from mmengine.runner import Runner

    config = Config.fromfile(QUANTIZED)
    config.work_dir, config.load_from, config.custom_hooks = 'library', str(student), []
    assert Runner.from_cfg(config).test() == metrics['quantized']


def test_a_data_free_form_runs_under_the_librarys_runner(welds, student):
    from mmengine.config import Config
    from mmengine.runner import Runner

    config = to_data_free(Config.fromfile(QUANTIZED))
    config.work_dir = 'data_free'
    Runner.from_cfg(config).train()
    again = read_checkpoint('data_free/student.pth')['state_dict']
    assert all(torch.equal(value, again[key]) for key, value in read_checkpoint(student)['state_dict'].items())


@pytest.mark.parametrize('source', ['the config', 'the checkpoint'])
def test_the_library_serves_the_student(welds, student, source):
    from mmdet.apis import inference_detector, init_detector
    from mmengine.config import Config

    text = read_checkpoint(student)['meta']['cfg']
    model = init_detector(
        QUANTIZED if source == 'the config' else Config.fromstring(text, '.py'), str(student), device='cpu'
    )
    assert {q.mode for _, q in quantizers(model)} == {'on'}
    picture = np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert 0 < len(inference_detector(model, picture).pred_instances) <= 5


def test_export_and_its_metrics(welds, student, metrics, capsys):
    pytest.importorskip('onnxruntime')
    assert export_command([QUANTIZED, str(student), '--out', 'exported']) == 0
    arguments = [QUANTIZED, '--deployed', 'exported', '--runtime', 'onnxruntime', '--work-dir', 'deployed']
    assert evaluate_command(arguments) == 0
    assert (
        json.loads((welds / 'deployed' / 'test_results.json').read_text())['integer'].keys()
        == metrics['quantized'].keys()
    )


def test_sensitivity_and_the_config_it_leaves(welds, capsys):
    arguments = [QUANTIZED, 'weld_detector.pth', '--number', '1', '--budget', '5', '--work-dir', 'sensitive']
    assert sensitivity_command(arguments) == 0
    capsys.readouterr()
    bits = {
        row.split()[2] for row in table_of(capsys, 'sensitive/mixed_precision.py').splitlines() if ' Linear ' in row
    }
    assert {'4', '8'} <= bits


def test_a_full_precision_one_with_options(welds, capsys):
    arguments = [
        PLAIN,
        '--quant',
        'w4a8',
        '--method',
        'fast',
        '--checkpoint',
        'weld_detector.pth',
        '--work-dir',
        'options',
        '--cfg-options',
        'dfq.calibration_samples=2',
        'dfq.batch_size=2',
    ]
    assert dfq_train(arguments) == 0
    assert evaluate_command([PLAIN, 'options/student.pth', '--work-dir', 'options']) == 0


@pytest.mark.parametrize('line', ["type='psaq_mm.Quantized', base_type={{_base_.model.type}}, ", ''])
def test_a_text_config_over_it_is_told_how_to_inherit(welds, capsys, line):
    """MMEngine lets each kind inherit its own alone."""
    (welds / 'three_statements.py').write_text(f"_base_ = ['{PLAIN}']\nmodel = dict({line}quant='w8a8')\n")
    assert inspect_command(['three_statements.py']) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and 'with read_base(): from .BASE import *' in error


def test_an_import_that_is_not_there(welds, capsys):
    (welds / 'configs' / 'absent.py').write_text(
        'from mmengine.config import read_base\nfrom not_here import Detector\n'
        'with read_base():\n    from .pure_python_detector import *\nmodel.update(type=Detector)\n'
    )
    assert inspect_command(['configs/absent.py', '--quant', 'w8a8']) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and 'the module not_here is not there: pip install not_here' in error
