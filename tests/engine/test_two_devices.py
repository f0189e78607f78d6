"""Whole runs of a model on a second device: what a GPU would refuse, found without one; and on a GPU where there is
one."""

import contextlib
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from second_device import DEVICES, second_device
from tiny import DETECTOR, Project
from tiny_classifier import ClassifierProject

from psaq_mm.commands.common import load_config
from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.commands.sensitivity import main as sensitivity
from psaq_mm.commands.test import main as evaluate
from psaq_mm.engine.config import quantized_model_config
from psaq_mm.engine.running import run_data_free
from psaq_mm.models import TaskModel
from psaq_mm.quantization import calibrate

pytestmark = pytest.mark.filterwarnings('ignore')

SHORT = dict(size=(32, 32), calibration_samples=2, pool_size=2, iters=1, evolve_every=1)


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    pytest.importorskip('mmpretrain')
    return ClassifierProject(tmp_path_factory.mktemp('classifier'), per_class=1)


@pytest.fixture(params=DEVICES)
def on_device(request):
    """Makes the context in which a run finds a GPU: an emulated one, or the one that is there, for which it gives
    None."""
    return second_device if request.param == 'emulated' else contextlib.nullcontext


@pytest.fixture(autouse=True)
def whole_models(monkeypatch):
    """Whether the model of a run was on the second device is asked where it ends."""
    from psaq_mm.engine.runner import DataFreeTrainLoop

    run, found = DataFreeTrainLoop.run, []

    def watched(self):
        made = run(self)
        found.append({p.device.type for p in made.state_dict().values()} | {self.calibration.device.type})
        return made

    monkeypatch.setattr(DataFreeTrainLoop, 'run', watched)
    return found


def test_presets_of_a_classifier_from_samples_to_accuracy(classifier, whole_models, on_device):
    for preset in ('psaq_v2', 'fast', 'best'):
        config, work_dir = (
            str(classifier.config('w4a8', f'{preset}.py', preset=preset, **SHORT)),
            classifier.folder / preset,
        )
        with on_device() as second:
            assert dfq_train([config, '--work-dir', str(work_dir)]) == 0
            assert evaluate([config, str(work_dir / 'student.pth'), '--work-dir', str(work_dir)]) == 0
        assert (second is None or second.waits) and whole_models.pop() == {'cuda'}, preset
        content = torch.load(work_dir / 'student.pth', map_location='cpu')
        assert all(value.device.type == 'cpu' for value in content['state_dict'].values())


def test_settings_that_no_preset_has(classifier, whole_models, on_device):
    sources = [dict(type='psaq_mm.Generated'), dict(type='psaq_mm.DeadLeaves')]
    config = classifier.config(
        'w4a8',
        'settings.py',
        **{**SHORT, 'pool_size': 4},
        classes='random',
        accumulative_counts=2,
        augment=True,
        fresh=True,
        samples=sources,
        range_lr=1e-3,
        vector_lr=1e-3,
        logits_weight=1.0,
        evolve_samples=2,
    )
    with on_device():
        assert dfq_train([str(config), '--work-dir', str(classifier.folder / 'settings')]) == 0
    assert whole_models == [{'cuda'}]


def test_v2_and_the_page_of_the_demo_on_a_detector(tmp_path, whole_models, monkeypatch, on_device):
    pytest.importorskip('mmdet')
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / 'demo'))
    from run_demo import Demo

    project = Project(tmp_path, DETECTOR)
    config = load_config(
        str(
            project.config(
                'w8a8',
                preset='psaq_v2',
                calibration_samples=2,
                pool_size=2,
                iters=1,
                evolve_every=0,
                generator=dict(batch_size=2, steps=1),
            )
        )
    )
    config.work_dir, config.launcher = str(tmp_path / 'work'), 'none'
    with on_device():
        loop = run_data_free(config).train_loop
        assert whole_models == [{'cuda'}]
        loops = dict(best=loop, psaq_v2=loop)
        samples, densities = Demo._samples(None, loops, [loop.training.pool.samples[:1].cuda()])
    assert samples and len(densities) == 3 and all(densities.values())


def test_an_export_of_a_model_that_is_not_on_the_cpu(classifier, tmp_path, monkeypatch, on_device):
    pytest.importorskip('onnxruntime')
    from psaq_mm.deploy import export
    from psaq_mm.deploy.verify import verify

    config = load_config(str(classifier.config('w8a8', 'export.py', **SHORT)))
    init_default_scope('mmpretrain')
    model, trace = MODELS.build(quantized_model_config(config)).eval(), export._trace
    with on_device() as second:
        model.cuda()

        def traced(graph, *args, **settings):
            assert not any(p.is_cuda for p in graph.parameters())
            with second.paused() if second else contextlib.nullcontext():
                return trace(graph, *args, **settings)

        monkeypatch.setattr(export, '_trace', traced)
        images = torch.randn(1, 3, 32, 32)
        calibrate(model, lambda: TaskModel(model).calibration_forward(images.cuda(), 'full'))
        exported = export.export_model(model, str(tmp_path / 'out'), [(32, 32)])
        assert verify(model, exported, images, 'onnxruntime', 1).good
        assert {p.device.type for p in model.parameters()} == {'cuda'}


def test_sensitivity(classifier, tmp_path, monkeypatch, on_device):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    config = str(classifier.config('w8a8', 'sensitivity.py', **SHORT))
    with on_device() as second:
        assert sensitivity([config, str(classifier.checkpoint), '--number', '1', '--work-dir', str(tmp_path)]) == 0
    assert second is None or second.waits


def test_without_float64_a_run_goes_on_on_the_cpu(classifier, whole_models):
    config, work_dir = classifier.config('w8a8', 'mps.py', **{**SHORT, 'evolve_every': 0}), classifier.folder / 'mps'
    with second_device('mps'):
        assert dfq_train([str(config), '--work-dir', str(work_dir)]) == 0
    assert whole_models == [{'cpu'}]
    assert next(work_dir.glob('*/*.log')).read_text().count('MPS has no float64') == 1
