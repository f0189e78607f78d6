"""Box and mask heads as graphs, and detectors that are exported as a whole."""

import copy
import json

import numpy as np
import pytest
import torch
from head_models import build, student

from psaq_mm.deploy import export_model, load
from psaq_mm.deploy.heads import head_places, why_roi_apart
from psaq_mm.deploy.serving import deploy_model_
from psaq_mm.deploy.verify import verify, verify_glue
from psaq_mm.errors import UnsupportedModelError
from psaq_mm.quantization import quantize
from psaq_mm.runtime.bundle import read_manifest
from psaq_mm.runtime.detection import ImageInfo
from psaq_mm.runtime.heads import quantize_features

pytest.importorskip('mmdet')
pytestmark = pytest.mark.filterwarnings('ignore')
RUNTIMES = ('onnxruntime', 'openvino')
SIZE = (64, 96)
CLASSES = 3

COMMON = """
_base_ = ['mmdet::_base_/models/{base}']
model = dict(
    backbone=dict(
        _delete_=True, type='SwinTransformer', embed_dims=16, depths=[1, 1], num_heads=[1, 2], window_size=7,
        strides=(4, 2), out_indices=(0, 1)),
    neck=dict(in_channels=[16, 32], out_channels=16, num_outs=2{neck}),
    {rest})
"""
TWO_STAGE = """
    rpn_head=dict(in_channels=16, feat_channels=16, anchor_generator=dict(strides=[4, 8])),
    test_cfg=dict(rpn=dict(max_per_img=30), rcnn=dict(max_per_img=20)),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16, featmap_strides=[4, 8]), {roi})
"""
MASKS = """
        mask_roi_extractor=dict(out_channels=16, featmap_strides=[4, 8]),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_convs=1, num_classes=3{mask})
"""
STAGE = """dict(
    type='{kind}', in_channels=16, fc_out_channels=16, num_classes=3, roi_feat_size=7,
    reg_class_agnostic={agnostic}{more},
    bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.] * 4, target_stds=[.1, .1, .2, .2]),
    loss_cls=dict(type='CrossEntropyLoss'), loss_bbox=dict(type='SmoothL1Loss'))"""
FOUR_CONVOLUTIONS = ", conv_out_channels=16, norm_cfg=dict(type='BN')"
BRANCHES = ', num_cls_fcs=1, num_reg_convs=1, num_reg_fcs=1, conv_out_channels=16'


def two_stage(base, roi):
    return COMMON.format(base=base, neck='', rest=TWO_STAGE.format(roi=roi))


MODELS = dict(
    mask=two_stage(
        'mask-rcnn_r50_fpn.py',
        'bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes=3),' + MASKS.format(mask=''),
    ),
    cascade=two_stage(
        'cascade-mask-rcnn_r50_fpn.py',
        'bbox_head=['
        + STAGE.format(kind='Shared2FCBBoxHead', agnostic=True, more='')
        + ', '
        + STAGE.format(kind='Shared4Conv1FCBBoxHead', agnostic=False, more=FOUR_CONVOLUTIONS)
        + ', '
        + STAGE.format(kind='Shared2FCBBoxHead', agnostic=True, more='')
        + '],'
        + MASKS.format(mask=', class_agnostic=True'),
    ),
    faster=two_stage(
        'faster-rcnn_r50_fpn.py',
        'bbox_head=dict(_delete_=True, '
        + STAGE.format(kind='ConvFCBBoxHead', agnostic=False, more=BRANCHES).partition('(')[2],
    ),
    retina=COMMON.format(
        base='retinanet_r50_fpn.py',
        neck=', start_level=0, add_extra_convs=False',
        rest='bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1, num_classes=3, '
        'anchor_generator=dict(strides=[4, 8])), test_cfg=dict(max_per_img=20)',
    ),
)


class Exported:
    """A student of a tiny detector and its export."""

    def __init__(self, name, folder, scope='full', preset='w8a8', change=None):
        from mmengine.config import Config
        from quick_builds import metafiles_read_once

        with metafiles_read_once():
            config = Config.fromstring(MODELS[name], '.py').model
        config.backbone.pop('init_cfg', None)
        self.model = build(config, 'mmdet')
        if change is not None:
            change(self.model)
        self.images = student(self.model, dict(preset=preset, scope=scope), SIZE)
        self.exported = export_model(self.model, folder / 'out', [SIZE], classes=('a', 'b', 'c'))
        self.directory = self.exported.directory
        self.manifest = read_manifest(self.directory)

    def check_codes(self, runtime):
        result = verify(self.model, self.exported, self.images[:1], runtime, 1)
        rows = {row.name for row in result.layers}
        heads = {name for name, module in self.model.named_modules() if name.endswith('input_quantizer')}
        heads = {name for name in heads if name.startswith('roi_head') and 'fc_cls' not in name}  # that of fc_reg
        assert heads <= rows and not result.weights
        assert result.equal >= 0.999 and max(row.step for row in result.layers) <= 1, result.to_table()


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    kept = {}

    def make(name):
        if name not in kept:
            kept[name] = Exported(name, tmp_path_factory.mktemp(name))
        return kept[name]

    return make


# ---------------------------------------------------------------------- codes
@pytest.mark.parametrize('runtime', RUNTIMES)
@pytest.mark.parametrize('name', ['mask', 'cascade'])
def test_codes_of_every_head(name, runtime, made):
    pytest.importorskip(runtime)
    made(name).check_codes(runtime)


def test_what_a_wrong_order_of_features_would_be_is_seen(made, monkeypatch):
    """The columns of fc1 are permuted for channel-last features: without, its weight and its codes are wrong."""
    pytest.importorskip('onnxruntime')
    one = made('mask')
    key = 'roi_head.bbox_head.shared_fcs.0.input_quantizer'
    order = one.exported.exportable.orders[key]
    assert sorted(order.tolist()) == list(range(16 * 49)) and order[:3].tolist() == [0, 49, 98]
    monkeypatch.setitem(one.exported.exportable.orders, key, torch.arange(16 * 49))
    result = verify(one.model, one.exported, one.images[:1], 'onnxruntime', 1)
    assert result.weights == ['roi_head.bbox_head.shared_fcs.0'] and not result.good


def rois_of(place, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *place.features, generator=generator) * 2


def outputs_of(one, deployed, place, features, labels):
    entry = one.manifest['heads'][place.kind][place.stage]
    session = deployed.head_session(place.kind, place.stage)
    inputs = dict(features=quantize_features(features.numpy(), entry['input']['quantizer']), labels=labels)
    return session.run({name: value for name, value in inputs.items() if name in session.input_names})


@pytest.mark.parametrize('runtime', RUNTIMES)
@pytest.mark.parametrize('name', ['mask', 'cascade', 'faster'])
def test_heads_with_any_number_of_rois(name, runtime, made):
    """Outputs are the library's own heads', also where a call has none, more or fewer RoIs than the one before."""
    pytest.importorskip(runtime)
    one = made(name)
    deployed = load(one.directory, runtime, 1)
    for place in head_places(one.model):
        head = one.model.get_submodule(place.path)
        for count in (7, 0, 1, 23):
            features = rois_of(place, count, count)
            labels = np.arange(count) % CLASSES
            outputs = outputs_of(one, deployed, place, features, labels)
            with torch.no_grad():
                wanted = head(features.permute(0, 3, 1, 2).contiguous())
            if place.kind == 'mask':
                own = torch.from_numpy(labels) * (not head.class_agnostic)
                wanted = (wanted[torch.arange(count), own],)
            for key, value in zip(place.outputs, wanted):
                assert outputs[key].shape == tuple(value.shape), (place.path, count)
                error = np.linalg.norm(outputs[key] - value.numpy()) / max(float(value.norm()), 1e-6)
                assert error < 0.02, (place.path, key, error)  # ties


def test_codes_of_features_are_those_of_the_model(made):
    one = made('mask')
    for place in head_places(one.model):
        settings = one.manifest['heads'][place.kind][0]['input']['quantizer']
        layer = 'shared_fcs.0' if place.kind == 'box' else 'convs.0.conv'
        quantizer = one.model.get_submodule(f'{place.path}.{layer}.input_quantizer')
        features = rois_of(place, 50)
        wanted = quantize(features, quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax)
        codes = quantize_features(features.numpy(), settings)
        assert codes.dtype == np.uint8 and len(np.unique(codes)) > 100
        assert np.array_equal(codes, wanted.numpy().astype(np.uint8))
    assert made('faster').manifest['heads']['box'][0]['input']['quantizer'] is None, 'two branches read the features'


def test_a_transposed_convolution_is_a_1x1_convolution_of_the_same_integers(made):
    one = made('mask')
    kinds = [node.op_type for head in one.exported.heads for node in head.graph.model.graph.node]
    assert 'ConvTranspose' not in kinds and kinds.count('Conv') == 2 and 'DepthToSpace' in kinds
    name = 'roi_head.mask_head.upsample'
    layer, weight = one.model.get_submodule(name), one.exported.exportable.weights[name]
    quantizer = layer.weight_quantizer
    codes = quantize(layer.weight, quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax, 1)
    values = weight.codes.float() * weight.scale[:, None, None, None]
    x = torch.randint(0, 255, (2, 16, 5, 6)).float()
    wanted = torch.nn.functional.conv_transpose2d(
        x.double(), (codes * quantizer.scale[None, :, None, None]).double(), stride=2
    )
    shuffled = torch.nn.functional.pixel_shuffle(torch.nn.functional.conv2d(x.double(), values.double()), 2)
    assert torch.equal(torch.sort(weight.codes.flatten())[0], torch.sort(codes.flatten().to(torch.int8))[0])
    assert torch.allclose(shuffled, wanted, rtol=1e-12, atol=0)


def test_weights_of_4_bits_are_packed_in_heads_too(tmp_path):
    pytest.importorskip('onnxruntime')
    one = Exported('mask', tmp_path, preset='w4a8')
    one.check_codes('onnxruntime')
    packed = one.manifest['weights']['packed']
    assert any(name.startswith('roi_head.bbox_head.shared_fcs.0') for name in packed)


# ---------------------------------------------------------------------- whole detectors
def wanted_of(one, deployed, infos):
    """What mmdet makes of the levels that the dense graph gives, with the fake-quantized heads."""
    from psaq_mm.deploy.glue_check import library_detections
    from psaq_mm.runtime.deployed import nested

    arrays = deployed.run(one.images.numpy())
    names = one.manifest['outputs']
    if names['levels']:
        levels = [torch.from_numpy(arrays[name]).permute(0, 3, 1, 2).contiguous() for name in names['levels']]
        return library_detections(one.model, levels, infos, SIZE)
    dense = nested(names['dense'], {name: torch.from_numpy(array) for name, array in arrays.items()})
    model = copy.copy(one.model)
    model.bbox_head = copy.copy(model.bbox_head)
    model.bbox_head.forward = lambda levels: dense
    return library_detections(model, (), infos, SIZE)


@pytest.mark.parametrize('runtime', RUNTIMES)
@pytest.mark.parametrize('name', list(MODELS))
def test_the_whole_detector_gives_the_librarys_detections(name, runtime, made):
    """On maps of its own dense graph; a batch of two."""
    pytest.importorskip(runtime)
    from mmdet.structures import DetDataSample

    one = made(name)
    assert one.manifest['complete'] and 'rest' not in one.manifest
    assert not [path.name for path in one.directory.iterdir() if path.name.startswith('rest')]
    infos = [ImageInfo((60, 90), (120, 180), (0.5, 0.5))] * 2
    model = deploy_model_(copy.deepcopy(one.model), one.directory, runtime, 1)
    assert name == 'retina' or model.roi_head is None, 'nothing of it runs'
    wanted = wanted_of(one, model.backbone.deployed, infos)
    meta = dict(img_shape=(60, 90), ori_shape=(120, 180), scale_factor=(0.5, 0.5))
    with torch.no_grad():
        results = model.predict(one.images, [DetDataSample(metainfo=dict(meta)) for _ in infos])
    for sample, detections in zip(results, wanted):
        instances = sample.pred_instances
        assert len(instances) == len(detections.scores) > 3
        # a tie of rounding in a head moves a score or a box a little
        scores = np.abs(np.sort(instances.scores.numpy()) - np.sort(detections.scores))
        assert np.median(scores) < 1e-4 and scores.max() < 0.02
        places = np.abs(instances.bboxes.numpy()[:, None] - detections.boxes[None]).max(2).min(1)
        assert np.median(places) < 0.01 and (places < 1).mean() > 0.8
        if name in ('mask', 'cascade'):
            assert instances.masks.shape == (len(instances), 120, 180) and instances.masks.dtype == torch.bool
            assert abs(instances.masks.float().mean() - detections.masks.mean()) < 0.02
        else:
            assert 'masks' not in instances


def test_the_glue_is_verified_on_the_models_own_maps(made):
    for name in ('cascade', 'retina'):
        agreement = verify_glue(made(name).model, made(name).images)
        assert agreement.detections and agreement.good, str(agreement)
    assert made('mask').model.roi_head.test_cfg.score_thr > 0, 'the check changed nothing'


def test_rescale_and_a_picture_without_detections(made):
    pytest.importorskip('onnxruntime')
    from mmdet.structures import DetDataSample

    one = made('mask')
    model = deploy_model_(copy.deepcopy(one.model), one.directory, 'onnxruntime', 1)
    samples = [DetDataSample(metainfo=dict(img_shape=SIZE, ori_shape=(128, 192), scale_factor=(0.5, 0.5)))]
    sample = model.predict(one.images[:1], samples, rescale=False)[0].pred_instances
    assert sample.masks.shape[1:] == SIZE and float(sample.bboxes[:, 2].max()) <= SIZE[1]
    manifest = json.loads((one.directory / 'manifest.json').read_text())
    settings = dict(manifest['detector'], score_threshold=1.0)
    deployed = load(one.directory, 'onnxruntime', 1)
    deployed._detector = type(deployed._detector).from_dict(settings)
    nothing = deployed.detect(one.images[:1].numpy(), [ImageInfo(SIZE, SIZE)])[0]
    assert nothing.boxes.shape == (0, 4) and nothing.masks.shape == (0, *SIZE)


def test_heads_outside_the_scope_are_float_graphs(tmp_path):
    pytest.importorskip('onnxruntime')
    one = Exported('mask', tmp_path, scope='backbone')
    assert one.manifest['complete'] and 'rest' not in one.manifest
    for head in one.exported.heads:
        assert head.entry['input']['quantizer'] is None
        assert not any('Quantize' in node.op_type for node in head.graph.model.graph.node)
    deployed = load(one.directory, 'onnxruntime', 1)
    for place in head_places(one.model):
        features, labels = rois_of(place, 9), np.arange(9) % CLASSES
        outputs = outputs_of(one, deployed, place, features, labels)
        with torch.no_grad():
            wanted = one.model.get_submodule(place.path)(features.permute(0, 3, 1, 2).contiguous())
        wanted = (wanted[torch.arange(9), torch.from_numpy(labels)],) if place.kind == 'mask' else wanted
        for key, value in zip(place.outputs, wanted):
            assert np.abs(outputs[key] - value.numpy()).max() < 1e-4 * float(value.abs().max())
    verify(one.model, one.exported, one.images[:1], 'onnxruntime', 1)


# ---------------------------------------------------------------------- what is not covered
def test_a_head_that_is_not_covered_stays_in_the_library(tmp_path):
    from psaq_mm.deploy.report import summary

    class Own(torch.nn.Identity):
        pass

    def change(model):
        head = model.roi_head.mask_head
        head.__class__ = type(
            'OwnMaskHead', (type(head),), dict(forward=lambda self, x: type(head).forward(self, x) + 1)
        )

    one = Exported('mask', tmp_path, scope='backbone', change=change)
    assert not one.manifest['complete'] and not one.manifest['heads'] and one.manifest['rest']
    assert one.manifest['outputs']['channel_last'] == []
    told = summary(one.exported.manifest['tensors'])
    assert 'roi_head: runs in PyTorch: the mask head OwnMaskHead has a forward of its own' in told
    with pytest.raises(UnsupportedModelError, match='OwnMaskHead has a forward of its own|holds no whole detector'):
        load(one.directory, 'onnxruntime', 1).detect(one.images[:1].numpy(), [ImageInfo(SIZE, SIZE)])


def test_reasons_why_heads_are_no_graphs(made):
    model = copy.deepcopy(made('mask').model)
    assert why_roi_apart(model) is None
    model.roi_head.mask_head.upsample_method = 'carafe'
    assert 'upsamples with carafe' in why_roi_apart(model)
    model = copy.deepcopy(made('mask').model)
    model.roi_head.bbox_head.with_reg = False
    assert 'gives no deltas' in why_roi_apart(model)
