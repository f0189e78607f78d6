"""A task is one registered class: one of a user's own goes through quantization, export and agreement."""

import numpy as np
import pytest
import torch
from head_models import SIZE, student
from mmengine.structures import BaseDataElement
from swin_models import build_backbone

from psaq_mm.commands.agreement import AgreementHook, Predictions, RecordHook
from psaq_mm.deploy.parts import graph_parts
from psaq_mm.errors import DataError, UnsupportedModelError
from psaq_mm.models import TaskModel, tasks
from psaq_mm.models.tasks.base import Compared
from psaq_mm.quantization import quantizers
from psaq_mm.runtime import glue, load

pytest.importorskip('mmdet')
pytestmark = pytest.mark.filterwarnings('ignore')
SMALL = dict(depths=[1, 1], num_heads=[1, 2], strides=(4, 2), out_indices=(0, 1))


class Pose(tasks.Task):
    """Heatmaps of keypoints, compared by where they are highest."""

    name, kind, field, heads, exact_size = 'pose', 'peaks', 'pred_heatmaps', ('keypoint_head',), False

    def matches(self, model):
        return hasattr(model, 'keypoint_head')

    def read(self, sample):
        return sample.pred_heatmaps.flatten(1).argmax(1).numpy()

    def compare(self, prediction, truth, picture):
        return Compared(float((prediction == truth).sum()), float(len(truth)))


def peaks(outputs, manifest, size):
    maps = outputs['dense']
    return {**outputs, 'peaks': maps.reshape(*maps.shape[:2], -1).argmax(2)}


class KeypointHead(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.final_layer = torch.nn.Conv2d(32, 5, 1)

    def forward(self, levels):
        return self.final_layer(levels[-1])


class Estimator(torch.nn.Module):
    """A project's own model, of none of the libraries' kinds."""

    def __init__(self):
        super().__init__()
        self.backbone, self.keypoint_head = build_backbone('mmdet', **SMALL), KeypointHead()

    def forward(self, images):
        return self.keypoint_head(self.backbone(images))


@pytest.fixture
def registered(monkeypatch):
    known = list(tasks.TASKS)
    monkeypatch.setattr(glue, '_FINISHERS', dict(glue._FINISHERS))
    tasks.register_task(Pose)
    glue.register_finisher('pose')(peaks)
    yield
    tasks.TASKS[:] = known


def sample(number, maps):
    return BaseDataElement(metainfo=dict(img_path=f'{number}.png'), pred_heatmaps=maps)


def test_a_task_of_a_users_own_is_quantized_and_exported(registered, tmp_path):
    pytest.importorskip('onnxruntime')
    from psaq_mm.deploy.export import export_model

    torch.manual_seed(0)
    model = Estimator().eval()
    images = student(model, dict(preset='w8a8', scope='full'), size=SIZE)
    names = [name for name, quantizer in quantizers(model) if bool(quantizer.calibrated)]
    assert any(name.startswith('keypoint_head.final_layer') for name in names)
    assert TaskModel(model, ('head',)).outputs(images)[0].shape == (2, 5, 8, 12)
    exported = export_model(model, tmp_path / 'out', [SIZE])
    assert exported.manifest['task'] == 'pose' and exported.manifest['replaced'] == ['backbone', 'keypoint_head']
    picture = np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    deployed = load(exported.directory, 'onnxruntime', 1)
    outputs = deployed(picture)
    with torch.no_grad():
        expected = model(torch.from_numpy(deployed.normalize(picture))).flatten(2).argmax(2).numpy()
    assert outputs['peaks'].shape == (1, 5) and (outputs['peaks'] == expected).mean() >= 0.8


def test_agreement_of_a_task_of_a_users_own(registered, tmp_path):
    random = torch.Generator().manual_seed(0)
    maps = torch.rand(3, 5, 4, 4, generator=random)
    record = RecordHook()
    record.after_test_iter(None, 0, outputs=[sample(i, m) for i, m in enumerate(maps)])
    record.predictions.save(tmp_path / 'full.npz')
    other = maps.clone()
    other[0, 0], other[2, 1] = -maps[0, 0], -maps[2, 1]
    hook = AgreementHook(Predictions.load(tmp_path / 'full.npz'))
    hook.after_test_iter(None, 0, outputs=[sample(i, m) for i, m in enumerate(other)])
    assert hook.result() == dict(agreement=13 / 15, difference=None, difference_se=None, divergence=None)


def test_the_file_of_a_task_that_is_not_registered_is_not_read(registered, tmp_path):
    record = RecordHook()
    record.after_test_iter(None, 0, outputs=[sample(0, torch.rand(5, 4, 4))])
    record.predictions.save(tmp_path / 'full.npz')
    tasks.TASKS.pop(0)
    with pytest.raises(DataError, match='peaks'):
        Predictions.load(tmp_path / 'full.npz')


def test_a_model_of_no_known_task_is_not_given_the_name_of_another_one():
    model = Estimator()
    assert tasks.task_of(model).name == 'other' and graph_parts(model).task == 'other'
    model.head = model.keypoint_head
    assert graph_parts(model).task == 'other' and graph_parts(model).dense == 'head'
    with pytest.raises(
        UnsupportedModelError,
        match=r'predictions of Estimator .pred_heatmaps. .*those of .*classification.*register_task',
    ):
        tasks.task_predicting(sample(0, torch.zeros(5, 4, 4)), model)


def test_boxes_of_a_pose_estimator_are_not_compared_as_detections():
    from mmengine.structures import InstanceData

    keypoints = BaseDataElement(pred_instances=InstanceData(keypoints=torch.zeros(2, 17, 2), bboxes=torch.zeros(2, 4)))
    with pytest.raises(UnsupportedModelError, match='pred_instances'):
        tasks.task_predicting(keypoints)
