"""What of a model becomes the graph, by its head: in the library's own model, the exported one gives the library's own
results."""

import copy

import numpy as np
import pytest
import torch
from head_models import MODELS, SIZE, build, config_of, samples, student
from swin_models import build_backbone

from psaq_mm.deploy import export_model, load
from psaq_mm.deploy.parts import graph_parts
from psaq_mm.deploy.report import summary
from psaq_mm.deploy.serving import deploy_model_
from psaq_mm.deploy.verify import verify
from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models import quantize_model_

RUNTIMES = ('onnxruntime', 'openvino')
SMALL = dict(depths=[1, 1], num_heads=[1, 2], strides=(4, 2), out_indices=(0, 1))
pytestmark = pytest.mark.filterwarnings('ignore')


class Exported:
    """A student of a tiny model, what the library's model predicts, and what the exported one does in its place."""

    def __init__(self, folder, settings, library, quant='w8a8', image=None, change=None):
        pytest.importorskip(library)
        self.settings, self.library, self.quant = settings, library, quant
        self.model = build(settings, library)
        self.image = student(self.model, quant)[:1] if image is None else image
        if image is not None:
            student(self.model, quant)
        if change is not None:
            change(self)
        self.wanted = self.predicted(self.model)
        self.exported = export_model(self.model, folder / 'out', [SIZE])
        self.manifest = self.exported.manifest

    def predicted(self, model):
        with torch.no_grad():
            return model.predict(self.image.clone(), None if self.library == 'mmpretrain' else samples(self.library))[0]

    def deployed(self, runtime):
        pytest.importorskip(runtime)
        other = build(self.settings, self.library, seed=9)  # what the graph does not hold comes with it
        quantize_model_(other, self.quant)
        return self.predicted(deploy_model_(other, self.exported.directory, runtime, 1))

    def check_codes(self, runtime):
        pytest.importorskip(runtime)
        found = verify(self.model, self.exported, self.image, runtime, 1)
        assert found.layers and not found.weights
        assert found.equal >= 0.999 and max(layer.step for layer in found.layers) <= 1, found.to_table()


def config_library(name):
    return MODELS[name][0].split('::')[0]


def exported(name, folder, more=None, **settings):
    config = config_of(name, more)
    return Exported(folder, config.model, config.default_scope, **settings)


# ---------------------------------------------------------------------- heads in the graph
def test_a_convolution_that_levels_share_has_the_normalization_of_each(tmp_path):
    """RTMDet's: the convolutions of its levels are one module, their batch normalizations are not."""
    pytest.importorskip('mmdet')
    made = exported('rtmdet', tmp_path, quant=dict(preset='w8a8', scope='full'))
    head = made.model.bbox_head
    assert (
        head.cls_convs[0][0].conv is head.cls_convs[1][0].conv
        and head.cls_convs[0][0].norm is not head.cls_convs[1][0].norm
    )
    assert (
        made.exported.exportable.model.bbox_head.cls_convs[0][0].conv
        is not made.exported.exportable.model.bbox_head.cls_convs[1][0].conv
    )
    assert made.manifest['dense_head'] == 'bbox_head' and not made.exported.exportable.notes, 'all are folded'
    images = torch.cat([made.image, -made.image])
    with torch.no_grad():
        wanted = [level for kind in head(made.model.extract_feat(images)) for level in kind]
    for runtime in RUNTIMES:
        made.check_codes(runtime)
        found = load(made.exported.directory, runtime, 1).run(images.numpy())
        errors = [
            np.linalg.norm(found[name] - w.numpy()) / w.norm().item()
            for name, w in zip(made.manifest['outputs']['names'], wanted)
        ]
        assert np.median(errors) < 0.1, errors


def normalized(model, picture):
    """A picture (H, W, 3), as the library's preprocessor hands it to the network."""
    data = model.data_preprocessor(dict(inputs=[torch.from_numpy(picture.transpose(2, 0, 1).copy())]))
    return torch.stack(list(data['inputs']))


def both_classes(made):
    """Logits that lie around the threshold of .3."""
    head = made.model.decode_head
    with torch.no_grad():
        head.conv_seg.weight.mul_(5)
        logits = head(made.model.extract_feat(made.image))
        head.conv_seg.bias.sub_(logits.median() - np.log(0.3 / 0.7))


def spread_classes(made):
    """Logits of which each class has the greatest somewhere."""
    head = made.model.decode_head
    with torch.no_grad():
        head.conv_seg.bias.sub_(head(made.model.extract_feat(made.image)).mean((0, 2, 3)))


@pytest.mark.parametrize('classes', [1, 2])
def test_the_threshold_of_a_binary_segmentor_makes_its_labels(classes, tmp_path):
    config = config_of('fcn')
    config.model.decode_head.update(num_classes=classes, out_channels=1, threshold=0.3)
    config.model.decode_head.loss_decode.use_sigmoid = True
    picture = np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    image = normalized(build(config.model, 'mmseg'), picture)
    made = Exported(tmp_path, config.model, 'mmseg', image=image, change=both_classes)
    assert made.manifest['labels'] == dict(rule='threshold', threshold=0.3)
    wanted = made.wanted.pred_sem_seg.data[0].numpy()
    assert 0.1 < wanted.mean() < 0.95, 'argmax gives 0 alone'
    for runtime in RUNTIMES:
        labels = load(made.exported.directory, runtime, 1)(picture)['labels'][0]
        assert labels.dtype == np.int64 and (labels == wanted).mean() > 0.97
        assert (made.deployed(runtime).pred_sem_seg.data[0].numpy() == wanted).mean() > 0.97


def test_labels_of_an_export_of_an_earlier_version_are_the_greatest_logit(tmp_path):
    pytest.importorskip('onnxruntime')
    made = exported('fcn', tmp_path, change=spread_classes)
    assert made.manifest['labels'] == dict(rule='argmax')
    deployed = load(made.exported.directory, 'onnxruntime', 1)
    picture = np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    labels = deployed(picture)['labels']
    del deployed.manifest['labels']
    assert len(np.unique(labels)) > 1 and np.array_equal(deployed(picture)['labels'], labels)


# ---------------------------------------------------------------------- heads beside the graph
APART = dict(
    # mask heads of these read the levels, and a semantic head does
    condinst=(('backbone', 'neck', 'bbox_head'), 'CondInst is the detector whose predict is not that of'),
    yolact=(('backbone', 'neck', 'bbox_head'), 'YOLACT is the detector whose predict is not that of'),
    panoptic_fpn=(('backbone', 'neck', 'rpn_head'), 'PanopticFPN is the detector whose predict is not that of'),
    dyhead=(('backbone',), 'MMCVModulatedDeformConv2d'),
    detr=(('backbone', 'neck'), 'reads queries'),
    mask2former=(('backbone',), 'Mask2FormerHead needs more than the levels'),
    ocrnet=(('backbone',), None),
)
"""By model, what the graph holds, and why a part of the rest runs in PyTorch."""


def close(found, wanted):
    """Whether two predictions are the same but for ties of rounding."""
    for key in ('pred_sem_seg', 'pred_panoptic_seg'):
        if key in wanted:
            values = [getattr(one, key).get('data', getattr(one, key).get('sem_seg')) for one in (found, wanted)]
            return (values[0] == values[1]).float().mean() > 0.95
    found, wanted = found.pred_instances, wanted.pred_instances
    masks = [one.masks.float().mean() if 'masks' in one else torch.tensor(0.0) for one in (found, wanted)]
    count = min(len(found), len(wanted))
    gaps = (found.scores.sort(descending=True)[0][:count] - wanted.scores.sort(descending=True)[0][:count]).abs()
    return (
        abs(len(found) - len(wanted)) <= 0.2 * len(wanted)
        and count
        and gaps.mean() < 0.03
        and abs(masks[0] - masks[1]) < 0.05
    )


@pytest.mark.parametrize('name', list(APART))
def test_what_a_graph_cannot_hold_stays_in_pytorch(name, tmp_path):
    """The library's model predicts from both what it does from the fake-quantized one."""
    pytest.importorskip(config_library(name))
    made = exported(name, tmp_path)
    replaced, reason = APART[name]
    assert tuple(made.manifest['replaced']) == replaced
    told = summary(made.manifest['tensors'])
    assert ('runs in PyTorch: ' in told) == bool(reason) and (reason or '') in told
    for runtime in RUNTIMES:
        assert close(made.deployed(runtime), made.wanted), runtime
    assert {domain.domain for domain in made.exported.graphs[SIZE].model.opset_import} <= {'', 'ai.onnx'}


# ---------------------------------------------------------------------- classifiers and others with a head
CLASSIFIER = dict(
    type='ImageClassifier',
    backbone=dict(
        type='SwinTransformer',
        arch=dict(embed_dims=16, depths=[1, 1], num_heads=[1, 2]),
        out_indices=(1,),
        pad_small_map=True,
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=32),
)
TASKS = dict(
    type='MultiTaskHead',
    in_channels=32,
    task_heads=dict(
        colour=dict(type='LinearClsHead', num_classes=3), shapes=dict(type='MultiLabelLinearClsHead', num_classes=4)
    ),
)


def test_the_heads_of_several_tasks_predict_from_the_graph(tmp_path):
    made = Exported(tmp_path, dict(CLASSIFIER, head=TASKS), 'mmpretrain')
    assert (
        made.manifest['task'] == 'classification'
        and made.manifest['replaced'] == ['backbone', 'neck']
        and made.manifest['exact_size']
    )
    assert 'MultiTaskHead does not predict from the outputs of its forward' in summary(made.manifest['tensors'])
    for runtime in RUNTIMES:
        found = made.deployed(runtime)
        for task in ('colour', 'shapes'):
            assert torch.allclose(found.get(task).pred_score, made.wanted.get(task).pred_score, atol=0.1), runtime


def test_a_head_of_several_labels_is_in_the_graph(tmp_path):
    made = Exported(
        tmp_path,
        dict(CLASSIFIER, head=dict(type='MultiLabelLinearClsHead', num_classes=4, in_channels=32)),
        'mmpretrain',
    )
    assert made.manifest['outputs']['dense'] == 'logits' and made.manifest['labels'] is None
    for runtime in RUNTIMES:
        assert torch.allclose(made.deployed(runtime).pred_score, made.wanted.pred_score, atol=0.1)


class PoseHead(torch.nn.Module):
    """Heatmaps, as a pose estimator's head gives them, or whatever ``change`` makes of them."""

    def __init__(self, change=lambda maps: maps):
        super().__init__()
        self.final_layer, self.change = torch.nn.Conv2d(32, 5, 1), change

    def forward(self, feats):
        return self.change(self.final_layer(feats[-1]))


class PoseEstimator(torch.nn.Module):
    """A downstream project's model, of none of the libraries' kinds."""

    def __init__(self, head):
        super().__init__()
        self.backbone, self.head = build_backbone('mmdet', **SMALL), head

    def forward(self, images):
        return self.head(self.backbone(images))


def quantized(model):
    image = student(model)[:1]
    with torch.no_grad():
        return model, image, model(image)


def check_maps(model, image, wanted, exported):
    for runtime in RUNTIMES:
        with torch.no_grad():
            found = deploy_model_(copy.deepcopy(model), exported.directory, runtime, 1)(image)
        assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_a_pose_estimator_is_no_classifier(tmp_path):
    model, image, wanted = quantized(PoseEstimator(PoseHead()))
    exported = export_model(model, tmp_path / 'out', [SIZE])
    assert (
        exported.manifest['task'] == 'other'
        and exported.manifest['outputs']['dense'] == 'dense'
        and exported.manifest['exact_size']
    )
    check_maps(model, image, wanted, exported)


class Unlike(PoseHead):
    """A head that remembers what only its own forward knows."""

    def forward(self, feats):
        self.seen = feats[-1].shape
        return super().forward(feats)


class OwnFeatures(PoseEstimator):
    def extract_feat(self, images):
        levels = self.backbone(images)
        return [level * 2 for level in (levels if getattr(self, 'neck', None) is None else self.neck(levels))]

    def forward(self, images):
        return self.head(self.extract_feat(images))


@pytest.mark.parametrize('kind', ['remembers', 'own features', 'own neck'])
def test_a_head_that_a_graph_would_get_wrong_stays_in_pytorch(kind, tmp_path):
    model = PoseEstimator(Unlike()) if kind == 'remembers' else OwnFeatures(PoseHead())
    if kind == 'own neck':
        model.neck = torch.nn.Identity()
    model, image, wanted = quantized(model)
    exported = export_model(model, tmp_path / 'out', [SIZE])
    assert exported.manifest['replaced'] == ['backbone']
    check_maps(model, image, wanted, exported)


def test_outputs_with_names_are_kept_and_those_that_are_no_tensors_stay_in_pytorch(tmp_path):
    model, image, wanted = quantized(
        PoseEstimator(PoseHead(lambda maps: dict(maps=maps, none=None, pair=[maps + 1, maps])))
    )
    exported = export_model(model, tmp_path / 'named', [SIZE])
    assert exported.manifest['outputs']['dense'] == dict(
        maps='dense_maps', none=None, pair=['dense_pair_0', 'dense_pair_1']
    )
    found = deploy_model_(model, exported.directory, 'onnxruntime', 1)(image)
    assert found['none'] is None and (found['pair'][0] - found['maps'] - 1).abs().max() < 1e-5
    assert (found['maps'] - wanted['maps']).norm() < 0.1 * wanted['maps'].norm()
    model, image, wanted = quantized(PoseEstimator(PoseHead(lambda maps: (maps, {1, 2}))))
    exported = export_model(model, tmp_path / 'odd', [SIZE])
    assert exported.manifest['replaced'] == ['backbone'] and 'a set, which is no tensor' in summary(
        exported.manifest['tensors']
    )


class _Foreign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def symbolic(g, x):
        return g.op('lab::Secret', x).setType(x.type())


class Foreign(torch.nn.Module):
    def forward(self, x):
        return _Foreign.apply(x)


def test_a_backbone_with_an_operator_that_onnx_has_not_is_refused_by_name(tmp_path):
    model = build_backbone('mmdet', **SMALL)
    model.drop_after_pos = Foreign()
    student(model)
    with pytest.raises(
        UnsupportedModelError, match='SwinTransformer does not export .it needs lab::Secret, which ONNX does not have.'
    ):
        export_model(model, tmp_path / 'out', [SIZE])
    assert not (tmp_path / 'out').exists()


HEADS = dict(
    linear=('LinearClsHead', {}),
    stacked=('StackedLinearClsHead', dict(mid_channels=[8])),
    csra=('CSRAClsHead', dict(num_heads=1, lam=0.1)),
    margin=('ArcFaceClsHead', {}),
    tokens=('VisionTransformerClsHead', {}),
    several_labels=('MultiLabelClsHead', {}),
)


def test_heads_of_the_libraries_are_seen_to_predict_from_their_forward():
    pytest.importorskip('mmpretrain')
    for name, (kind, more) in HEADS.items():
        if kind != 'MultiLabelClsHead':
            more = dict(more, num_classes=3, in_channels=32)
        assert graph_parts(build(dict(CLASSIFIER, head=dict(type=kind, **more)), 'mmpretrain')).dense == 'head', name
