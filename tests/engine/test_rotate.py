"""``dfq.rotate`` in a run: the same function before anything is quantized, on disk and resumed, and exported."""

import shutil

import pytest
import torch
from classifier_models import SIZES, build_classifier
from mmengine.config import Config
from tiny import DETECTOR, SEGMENTOR, Project

from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.engine.checkpoint import read_checkpoint
from psaq_mm.engine.methods import METHODS
from psaq_mm.engine.presets import resolve_dfq
from psaq_mm.models import TaskModel, rotate_model_
from psaq_mm.quantization import calibrate, quantizers, set_mode

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    pytest.importorskip('mmdet')
    project = Project(tmp_path_factory.mktemp('rotated'), DETECTOR)
    project.work_dir = project.folder / 'work'
    assert dfq_train([str(project.config(rotate=True)), '--work-dir', str(project.work_dir)]) == 0
    return project


def test_presets_that_are_no_published_method_rotate():
    assert [name for name in METHODS if resolve_dfq(name)['rotate']] == ['fast', 'best']


def test_the_log_says_what_was_rotated_and_what_was_not(detector):
    log = next(detector.work_dir.glob('*/*.log')).read_text()
    assert 'Rotated 18 heads and the stream of stage 2 (32 channels), the stream of stage 3 (64 channels)' in log
    assert 'left as they are: the stream of stage 1: it begins behind the LayerNorm' in log


def test_the_run_resumes_to_the_same_student(detector):
    work_dir = detector.folder / 'resumed'
    work_dir.mkdir()
    shutil.copy(detector.work_dir / 'iter_2.pth', work_dir)
    assert dfq_train([str(detector.config(rotate=True)), '--work-dir', str(work_dir), '--resume']) == 0
    expected, found = (
        read_checkpoint(folder / 'student.pth')['state_dict'] for folder in (detector.work_dir, work_dir)
    )
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0, msg=key)


@pytest.mark.parametrize('base, part', [(DETECTOR, 'neck'), (SEGMENTOR, 'head')])
def test_a_calibrated_student_is_the_users_model_with_its_quantizers_off(base, part, tmp_path):
    pytest.importorskip('mmseg' if part == 'head' else 'mmdet')
    from mmengine.registry import MODELS, init_default_scope

    project = Project(tmp_path, base)
    path = project.config(quant='psaq_v2_w4a8', rotate=True, iters=0, evolve_every=0)
    assert dfq_train([str(path), '--work-dir', str(tmp_path / 'work')]) == 0
    config = Config.fromfile(path)
    init_default_scope(config.default_scope)
    outputs, images = [], torch.randn(1, 3, 64, 96)
    for checkpoint in (project.checkpoint, tmp_path / 'work' / 'student.pth'):
        model = MODELS.build(config.model)
        model.load_state_dict(read_checkpoint(checkpoint)['state_dict'], strict=False)
        model.eval()
        set_mode(model, 'off')
        with torch.no_grad():
            outputs.append(TaskModel(model, (part,)).outputs(images))
    for plain, rotated in zip(*outputs):
        torch.testing.assert_close(rotated, plain, rtol=0, atol=1e-4 * float(plain.std()))
    plain, rotated = (read_checkpoint(c)['state_dict'] for c in (project.checkpoint, tmp_path / 'work' / 'student.pth'))
    moved = {key.split('.')[0] for key in plain if not torch.equal(plain[key], rotated[key])}
    assert moved == ({'backbone', 'decode_head', 'auxiliary_head'} if part == 'head' else {'backbone', 'neck'})


@pytest.mark.parametrize('value', ['auto', 1])
def test_a_value_that_says_neither(value, tmp_path, capsys):
    pytest.importorskip('mmseg')
    project = Project(tmp_path, SEGMENTOR)
    assert dfq_train([str(project.config(rotate=value)), '--work-dir', str(tmp_path / 'work')]) == 1
    assert f'dfq.rotate={value!r} must be True or False' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['timm-vit', 'mmpretrain-swin'])
@pytest.mark.parametrize('quant', ['psaq_v2_w4a8', 'repq_w4a8'])
def test_rotated_models_export_to_the_same_codes(name, quant, tmp_path):
    pytest.importorskip('onnxruntime')
    from psaq_mm.deploy import export_model
    from psaq_mm.deploy.verify import verify

    size = [SIZES[name]] * 2
    model = build_classifier(name, quant=dict(preset=quant, scope='full'))
    rotate_model_(model, size)
    images = torch.randn(4, 3, *size)
    view = TaskModel(model, ('head',))
    calibrate(model, lambda: view.calibration_forward(images, 'full'))
    exported = export_model(model, tmp_path / 'deployed', [size])
    assert all(quantizer.mode == 'on' for _, quantizer in quantizers(model))
    found = verify(model, exported, images[:1], 'onnxruntime', 1)
    assert found.good, found.to_table()
