"""The calls of psaq_mm.api: students of configs and of models in memory, in files, as exports, and bad input."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import DETECTOR, WITHOUT_TORCH, Project
from tiny_classifier import ClassifierProject

import psaq_mm
from psaq_mm.errors import CheckpointError, ConfigError, DataError, SpecError, UnsupportedModelError
from psaq_mm.models import spec_of
from psaq_mm.quantization import quantizers, set_mode
from psaq_mm.runtime import Prediction

ROOT = Path(__file__).resolve().parents[2]
QUICK = dict(method='fast', quant='w4a8', calibration_samples=2, seed=3)
SIZE = (32, 32)


def vit(seed=0, **settings):
    timm = pytest.importorskip('timm')
    torch.manual_seed(seed)
    known = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    return timm.create_model('vit_tiny_patch16_224', **{**known, **settings}).eval()


def picture(height=40, width=50, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope='module')
def student():
    return psaq_mm.quantize(vit(), **QUICK)


# ---------------------------------------------------------------------- a network of timm
def test_the_model_is_copied_and_the_process_is_as_before(student):
    from mmengine.registry import DefaultScope

    model, scope = vit(), DefaultScope.get_current_instance()
    before, state = weights(model), torch.get_rng_state()
    numbers = np.random.get_state()[1].copy()
    made = psaq_mm.quantize(model, **QUICK)
    assert same(before, weights(model)) and next(quantizers(model), None) is None
    assert type(model).forward is type(made).forward and not made.training and spec_of(made).label == 'W4A8'
    assert torch.equal(state, torch.get_rng_state()) and (numbers == np.random.get_state()[1]).all()
    assert DefaultScope.get_current_instance() is scope
    assert same(weights(made), weights(student)), 'the same seed gives the same student'
    other = psaq_mm.quantize(model, **{**QUICK, 'seed': 4})
    assert not same(weights(made), weights(other))


def test_in_place_the_model_itself_is_the_student(student):
    model = vit()
    assert psaq_mm.quantize(model, in_place=True, **QUICK) is model
    assert same(weights(model), weights(student))


def test_with_quantizers_off_it_is_the_model():
    model = vit()
    made = psaq_mm.quantize(model, rounding='nearest', rotate=False, **QUICK)
    set_mode(made, 'off')
    images = torch.randn(2, 3, *SIZE)
    for block in model.blocks:
        block.attn.fused_attn = False
    assert torch.equal(made(images), model(images))


def test_settings_reach_the_run_and_the_quantizer():
    made = psaq_mm.quantize(vit(), None, 'gaussian', 'w8a8', scope='full', calibration_samples=1, seed=7)
    settings = made.psaq_mm_student.settings
    assert spec_of(made).scope == 'full' and 'head' in {row.name for row in made.quant_report.layers}
    assert (settings['seed'], settings['samples'], settings['calibration_samples']) == (7, 'gaussian', 1)
    assert settings['size'] == list(SIZE), 'the size that the position embedding was built for'


def test_a_method_that_trains_or_synthesizes_runs_on_a_model_in_memory():
    brief = dict(iters=1, batch_size=1, calibration_samples=2, pool_size=2, evolve_every=0)
    made = psaq_mm.quantize(vit(), None, 'psaq_v2', generator=dict(steps=1, batch_size=2), **brief)
    assert made.psaq_mm_student.settings['steps'] == 1
    assert same(weights(vit()), weights(vit())) and torch.isfinite(made(torch.randn(1, 3, *SIZE))).all()


def test_save_and_load(student, tmp_path):
    path = tmp_path / 'student.pth'
    psaq_mm.save(student, path)
    loaded = psaq_mm.load(path, model=vit(seed=1))
    assert same(weights(loaded), weights(student)) and spec_of(loaded) == spec_of(student)
    found, wanted = (psaq_mm.predict(model, picture())[0] for model in (loaded, student))
    assert np.array_equal(found.logits, wanted.logits)
    with pytest.raises(ConfigError, match='VisionTransformer that was built without a config: give model='):
        psaq_mm.load(path)
    with pytest.raises(CheckpointError, match='in the checkpoint and .* in the model'):
        psaq_mm.load(path, model=vit(embed_dim=64))


def test_an_export_predicts_as_the_student(student, tmp_path):
    pytest.importorskip('onnxruntime')
    exported = psaq_mm.export(student, tmp_path / 'deployed', verify=True, runtime='onnxruntime')
    assert exported.manifest['task'] == 'classification' and exported.manifest['complete']
    assert [tuple(graph['size']) for graph in exported.manifest['graphs']] == [SIZE]
    pictures = [picture(), picture(64, 33, seed=1)]
    ours = psaq_mm.predict(student, pictures)
    theirs = psaq_mm.predict(tmp_path / 'deployed', pictures, runtime='onnxruntime')
    for one, other in zip(ours, theirs):
        assert isinstance(one, Prediction) and one.size == other.size
        assert np.allclose(one.logits, other.logits, atol=0.01 * np.abs(one.logits).max())
        assert one.names[0] == other.names[0] and one.draw(pictures[0]).shape if one.size == (40, 50) else True


def test_predictions_agree_with_the_model_on_what_the_network_takes():
    """At the size of the network, without a crop, the preparation is mean and std of timm's own settings."""
    model, array = vit(), picture(*SIZE)
    model.pretrained_cfg = dict(model.pretrained_cfg, crop_pct=1.0)
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ('mean', 'std'))
    images = (torch.from_numpy(array[..., ::-1].copy()).permute(2, 0, 1) / 255 - mean) / std
    [prediction] = psaq_mm.predict(model, array)
    assert np.allclose(prediction.logits, model(images[None])[0].detach().numpy(), atol=1e-4)
    assert not hasattr(model, 'psaq_mm_input'), 'a model that predicts is not changed'


# ---------------------------------------------------------------------- configs
def test_memory_and_config_give_one_student(tmp_path):
    pytest.importorskip('mmpretrain')
    from mmengine.config import Config

    from psaq_mm.commands.dfq_train import main as dfq_train
    from psaq_mm.engine.building import build_model
    from psaq_mm.engine.checkpoint import load_weights, read_checkpoint

    project = ClassifierProject(tmp_path, per_class=1)
    config = Config.fromfile(project.base)
    built = build_model(config, dict(config.model, data_preprocessor=config.data_preprocessor))
    load_weights(built, read_checkpoint(project.checkpoint), project.checkpoint)
    settings = dict(QUICK, size=32)
    from_config = psaq_mm.quantize(project.base, project.checkpoint, **settings)
    from_memory = psaq_mm.quantize(built, classes=['bolt', 'nut'], **settings)
    from_file = psaq_mm.quantize(built, project.checkpoint, **settings)
    assert same(weights(from_config), weights(from_memory)) and same(weights(from_config), weights(from_file))
    options = ['dfq.calibration_samples=2', 'dfq.seed=3', 'dfq.size=(32,32)', 'dfq.preset=fast']
    work_dir = tmp_path / 'run'
    arguments = ['--checkpoint', str(project.checkpoint), '--work-dir', str(work_dir), '--quant', 'w4a8', '--method']
    assert dfq_train([str(project.base), *arguments, 'fast', '--cfg-options', *options]) == 0
    loaded = psaq_mm.load(work_dir / 'student.pth')
    assert same(weights(from_config), weights(loaded))
    names = [model.psaq_mm_student.dataset_meta['classes'] for model in (from_config, from_memory)]
    assert [list(found) for found in names] == [['bolt', 'nut']] * 2
    array = picture(*SIZE)
    logits = [psaq_mm.predict(model, array)[0].logits for model in (from_config, from_memory, loaded)]
    assert np.array_equal(logits[0], logits[1]) and np.array_equal(logits[0], logits[2])


def test_a_detector_from_memory_to_boxes(tmp_path):
    pytest.importorskip('mmdet')
    pytest.importorskip('onnxruntime')
    from mmengine.config import Config

    from psaq_mm.engine.building import build_model

    project = Project(tmp_path, DETECTOR)
    built = build_model(Config.fromfile(project.base))
    with pytest.raises(ConfigError, match='size of the pictures that MaskRCNN takes is not known .* size='):
        psaq_mm.quantize(built, project.checkpoint, **QUICK)
    with pytest.raises(ConfigError, match='mean is given and the model.s own data_preprocessor'):
        psaq_mm.quantize(built, project.checkpoint, mean=[0.0] * 3, std=[1.0] * 3, size=64, **QUICK)
    student = psaq_mm.quantize(built, project.checkpoint, size=(64, 96), **QUICK)
    psaq_mm.export(student, tmp_path / 'deployed', size=(64, 96))
    array = picture(64, 96)
    [ours] = psaq_mm.predict(student, array)
    [theirs] = psaq_mm.predict(tmp_path / 'deployed', array, runtime='onnxruntime')
    assert ours.task == theirs.task == 'detection' and len(ours.boxes) and ours.names
    assert ours.masks.shape[1:] == (64, 96) and (np.diff(ours.scores) <= 0).all()
    # Of a detector of random weights, proposals with almost the same score change places.
    assert np.allclose(ours.scores[:3], theirs.scores[:3], atol=0.05) and theirs.masks.shape[1:] == (64, 96)


def test_boxes_are_those_of_the_library(tmp_path):
    """A picture that is resized and padded, against mmdet's own data preprocessor and test step."""
    pytest.importorskip('mmdet')
    import cv2
    from mmdet.structures import DetDataSample
    from mmengine.config import Config

    from psaq_mm.engine.building import build_model
    from psaq_mm.engine.checkpoint import load_weights, read_checkpoint
    from psaq_mm.engine.in_memory import Known, config_of
    from psaq_mm.engine.predicting import Predictor

    project = Project(tmp_path, DETECTOR)
    model = build_model(Config.fromfile(project.base))
    load_weights(model, read_checkpoint(project.checkpoint), project.checkpoint)
    model.eval()
    array = picture(50, 100)
    found = Predictor(model, config_of(model, Known(size=(64, 96))), {})(array)
    meta = dict(ori_shape=(50, 100), img_shape=(48, 96), scale_factor=(0.96, 0.96))
    resized = torch.from_numpy(cv2.resize(array, (96, 48))).permute(2, 0, 1)
    with torch.no_grad():
        samples = model.test_step(dict(inputs=[resized], data_samples=[DetDataSample(metainfo=meta)]))
    sample = samples[0].pred_instances
    assert len(found.boxes) == len(sample.bboxes) > 0
    assert np.array_equal(found.boxes, sample.bboxes.numpy()) and np.array_equal(found.masks, sample.masks.numpy())


# ---------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    'change, error, message',
    [
        (dict(method='bset'), ConfigError, "the method 'bset' is not known: did you mean best"),
        (dict(quant='w9a8'), SpecError, 'w9a8|w_bits'),
        (dict(sample='pink'), ConfigError, 'sample is no setting: did you mean samples'),
        (dict(size=(0, 32)), ConfigError, r'size=\(0, 32\) is no size'),
        (dict(size=64), ConfigError, r'size=\(64, 64\) does not fit the position embedding of the model: set .*32'),
        (dict(rounding='none'), ConfigError, "dfq.rounding='none' is not known"),
        (dict(mean=[0.5] * 3), ConfigError, 'mean is given alone'),
        (dict(checkpoint='absent.pth'), ConfigError, 'absent.pth does not exist'),
        (dict(config='absent.py'), ConfigError, 'there is no config file absent.py'),
    ],
)
def test_wrong_arguments_for_a_model(change, error, message):
    settings = {**QUICK, **change}
    with pytest.raises(error, match=message):
        psaq_mm.quantize(vit(), **settings)


def test_wrong_models(student, tmp_path):
    with pytest.raises(UnsupportedModelError, match='VisionTransformer is a student already'):
        psaq_mm.quantize(student)
    with pytest.raises(UnsupportedModelError, match='Sequential.* is not supported: use one of'):
        psaq_mm.quantize(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), size=32, mean=[0] * 3, std=[255] * 3)
    with pytest.raises(ConfigError, match='normalization of the pictures that Sequential takes is not known'):
        psaq_mm.quantize(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), size=32)
    with pytest.raises(ConfigError, match='int is neither a config nor a model'):
        psaq_mm.quantize(5)
    with pytest.raises(ConfigError, match='there is no config file absent.py'):
        psaq_mm.quantize('absent.py')
    broken = vit()
    broken.head.weight.data[0, 0] = float('nan')
    with pytest.raises(CheckpointError, match='VisionTransformer: head.weight holds NaN'):
        psaq_mm.quantize(broken, **QUICK)
    with pytest.raises(UnsupportedModelError, match='VisionTransformer is no student'):
        psaq_mm.export(vit(), tmp_path / 'deployed')
    torch.save(vit().state_dict(), tmp_path / 'full.pth')
    with pytest.raises(CheckpointError, match='full-precision checkpoint and no student'):
        psaq_mm.load(tmp_path / 'full.pth')
    for call in (psaq_mm.load, lambda path: psaq_mm.predict(path, picture())):
        with pytest.raises(CheckpointError, match='absent holds no exported model'):
            call(tmp_path / 'absent')
    with pytest.raises(DataError, match='there is no picture and no folder absent.jpg'):
        psaq_mm.predict(student, 'absent.jpg')
    with pytest.raises(ConfigError, match="format='onx' is not known: did you mean onnx"):
        psaq_mm.export(student, tmp_path / 'deployed', format='onx')
    assert not (tmp_path / 'deployed').exists()


def test_the_config_in_a_file_is_read_and_not_run(student, tmp_path):
    psaq_mm.save(student, tmp_path / 'student.pth')
    content = torch.load(tmp_path / 'student.pth')
    content['meta']['cfg'] = "__import__('pathlib').Path('ran').touch()\n" + content['meta']['cfg']
    torch.save(content, tmp_path / 'student.pth')
    with pytest.raises(CheckpointError, match='no list of plain values'):
        psaq_mm.load(tmp_path / 'student.pth')
    assert not Path('ran').exists()


# ---------------------------------------------------------------------- what an import costs
def test_without_pytorch_the_package_imports_and_predicts(student, tmp_path):
    pytest.importorskip('onnxruntime')
    psaq_mm.export(copy.deepcopy(student), tmp_path / 'deployed')
    np.save(tmp_path / 'picture.npy', picture())
    script = f"""{WITHOUT_TORCH}
import psaq_mm
heavy = [name for name in ('numpy', 'cv2', 'psaq_mm.api') if name in sys.modules]
assert not heavy and 'quantize' in dir(psaq_mm), heavy
import numpy
[prediction] = psaq_mm.predict({str(tmp_path / 'deployed')!r}, numpy.load({str(tmp_path / 'picture.npy')!r}),
                               runtime='onnxruntime')
print(prediction.names[0])
"""
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == psaq_mm.predict(student, picture())[0].names[0]
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        psaq_mm.quantise  # noqa: B018
