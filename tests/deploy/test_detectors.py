"""Detectors of every kind end to end: the glue gives mmdet's own detections of the same maps, or says what it lacks."""

import copy
import json

import numpy as np
import pytest
import torch
from head_models import SWIN, lively

from psaq_mm.deploy.detectors import detector_settings, why_not_covered
from psaq_mm.deploy.glue_check import GlueAgreement, TorchHeads, compare_detections, compare_glue, torch_maps
from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models import quantize_model_
from psaq_mm.runtime.detection import Detections, DetectorSettings, ImageInfo, detect
from psaq_mm.runtime.detection.roi_align import roi_align

pytestmark = pytest.mark.filterwarnings('ignore')
CLASSES, CHANNELS = 5, 16
SIZE = (96, 128)
IMAGES = (ImageInfo((90, 128), (45, 64), (2.0, 2.0)), ImageInfo((96, 100), (64, 71), (100 / 71, 1.5)))
"""Of one batch: the first is padded below, the second at the right and scaled differently in x and y."""

NMS = dict(type='nms', iou_threshold=0.5)
ONE_STAGE = dict(nms_pre=60, score_thr=0.05, nms=NMS, max_per_img=40, min_bbox_size=0)


def backbone(first):
    stages = tuple(range(first, 4))
    fpn = dict(type='FPN', in_channels=[16 * 2**i for i in stages], out_channels=CHANNELS, num_outs=4)
    return dict(backbone=dict(SWIN, out_indices=stages), neck=fpn)


def delta(*stds):
    return dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=list(stds or [1.0] * 4))


def extractor(size, **layer):
    align = dict(dict(type='RoIAlign', output_size=size, sampling_ratio=0), **layer)
    return dict(
        type='SingleRoIExtractor', roi_layer=align, out_channels=CHANNELS, featmap_strides=[4, 8, 16], finest_scale=14
    )


def box_head(agnostic=False, stds=(0.1, 0.1, 0.2, 0.2)):
    return dict(
        type='Shared2FCBBoxHead',
        in_channels=CHANNELS,
        fc_out_channels=16,
        roi_feat_size=7,
        num_classes=CLASSES,
        bbox_coder=delta(*stds),
        reg_class_agnostic=agnostic,
    )


MASK_HEAD = dict(type='FCNMaskHead', num_convs=1, in_channels=CHANNELS, conv_out_channels=CHANNELS, num_classes=CLASSES)


def two_stage(name, roi_head, rpn_loss=None, rpn=None, rcnn=None):
    rpn_head = dict(
        type='RPNHead',
        in_channels=CHANNELS,
        feat_channels=CHANNELS,
        anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32]),
        bbox_coder=delta(),
        **(dict(loss_cls=rpn_loss) if rpn_loss else {}),
    )
    test_cfg = dict(
        rpn=dict(
            dict(nms_pre=80, max_per_img=50, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0), **(rpn or {})
        ),
        rcnn=dict(dict(score_thr=0.1, nms=NMS, max_per_img=30, mask_thr_binary=0.5), **(rcnn or {})),
    )
    return dict(type=name, **backbone(0), rpn_head=rpn_head, roi_head=roi_head, train_cfg=None, test_cfg=test_cfg)


def cascade(agnostic):
    stds = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
    return two_stage(
        'CascadeRCNN',
        dict(
            type='CascadeRoIHead',
            num_stages=3,
            stage_loss_weights=[1, 0.5, 0.25],
            bbox_roi_extractor=extractor(7),
            bbox_head=[box_head(agnostic, s) for s in stds],
            mask_roi_extractor=extractor(14),
            mask_head=[dict(MASK_HEAD, class_agnostic=agnostic) for _ in range(3)],
        ),
    )


def standard(mask=True, **layer):
    masks = dict(mask_roi_extractor=extractor(14), mask_head=MASK_HEAD) if mask else {}
    return dict(type='StandardRoIHead', bbox_roi_extractor=extractor(7, **layer), bbox_head=box_head(), **masks)


def one_stage(name, head, **settings):
    common = dict(type=head, num_classes=CLASSES, in_channels=CHANNELS, feat_channels=CHANNELS, stacked_convs=1)
    return dict(type=name, **backbone(0), bbox_head=dict(common, **settings), test_cfg=ONE_STAGE)


def anchors(**more):
    strides = [4, 8, 16, 32]
    return dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=strides, **more)


RETINA = dict(
    type='AnchorGenerator', octave_base_scale=4, scales_per_octave=2, ratios=[0.5, 1.0], strides=[4, 8, 16, 32]
)
FCOS = dict(strides=[4, 8, 16, 32], regress_ranges=((-1, 16), (16, 32), (32, 64), (64, 1e8)), norm_cfg=None)
MODELS = dict(
    mask_rcnn=two_stage('MaskRCNN', standard()),
    cascade=cascade(agnostic=False),
    cascade_agnostic=cascade(agnostic=True),
    faster_rcnn=two_stage('FasterRCNN', standard(mask=False)),
    faster_rcnn_of_old=two_stage(  # soft suppression, fixed samples, an RPN with a class of background
        'FasterRCNN',
        standard(mask=False, sampling_ratio=2, aligned=False),
        rpn_loss=dict(type='CrossEntropyLoss', use_sigmoid=False),
        rcnn=dict(nms=dict(type='soft_nms', iou_threshold=0.5, min_score=0.05)),
    ),
    many_candidates=two_stage(  # from a number of candidates on, classes are suppressed one after the other
        'MaskRCNN',
        standard(),
        rpn=dict(nms=dict(NMS, split_thr=100)),
        rcnn=dict(score_thr=0, nms=dict(NMS, split_thr=100)),
    ),
    retinanet=one_stage('RetinaNet', 'RetinaHead', anchor_generator=RETINA, bbox_coder=delta()),
    retinanet_softmax=one_stage(
        'RetinaNet',
        'RetinaHead',
        anchor_generator=RETINA,
        bbox_coder=delta(),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False),
    ),
    fcos=one_stage('FCOS', 'FCOSHead', **FCOS),
    fcos_normed=one_stage('FCOS', 'FCOSHead', norm_on_bbox=True, centerness_on_reg=True, **FCOS),
    atss=one_stage(
        'ATSS',
        'ATSSHead',
        anchor_generator=anchors(),
        bbox_coder=delta(0.1, 0.1, 0.2, 0.2),
        norm_cfg=dict(type='GN', num_groups=4),
    ),
    gfl=one_stage('GFL', 'GFLHead', anchor_generator=anchors(), reg_max=7, norm_cfg=dict(type='GN', num_groups=4)),
)


def build(config, seed=0):
    pytest.importorskip('mmdet')
    from mmdet.registry import MODELS as registry
    from mmengine.config import ConfigDict
    from mmengine.registry import init_default_scope

    init_default_scope('mmdet')
    torch.manual_seed(seed)
    model = lively(registry.build(ConfigDict(copy.deepcopy(config))), seed)
    for name, parameter in model.named_parameters():
        if name.endswith('_cls.weight'):  # sigmoids of large logits are all 1, and equal scores have no order
            parameter.data *= 0.2
    return model


def batch():
    """Noise in the padding, too."""
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(3))


# ---------------------------------------------------------------------- the same detections
@pytest.mark.parametrize('name', list(MODELS))
def test_glue_gives_the_detections_of_mmdet(name):
    model = build(MODELS[name])
    agreement = compare_glue(model, batch(), IMAGES)
    assert agreement.good, agreement
    assert agreement.detections >= 20 and agreement.pictures == 2, agreement
    assert bool(agreement.area) == hasattr(getattr(model, 'roi_head', None), 'mask_head'), agreement
    json.dumps(detector_settings(model), allow_nan=False)


@pytest.mark.parametrize('name', ['mask_rcnn', 'retinanet', 'fcos_normed', 'atss'])
def test_equal_scores_are_chosen_in_their_order(name):
    """Logits of three values: the best of a level, suppression and the order of the result are all decided by ties."""
    model = build(MODELS[name])
    head = model.rpn_head if hasattr(model, 'roi_head') else model.bbox_head
    forward = head.forward

    def coarse(levels):
        scores, *others = forward(levels)
        return ([(level / level.std()).round().clamp(-1, 1) for level in scores], *others)

    head.forward = coarse
    agreement = compare_glue(model, batch(), IMAGES)
    assert agreement.good and agreement.detections >= 20, agreement


def test_fake_quantized_heads_are_compared_too():
    model = build(MODELS['mask_rcnn'])
    quantize_model_(model, dict(preset='w8a8', scope='full'))
    from psaq_mm.models import TaskModel
    from psaq_mm.quantization import calibrate

    images = batch()
    calibrate(model, lambda: TaskModel(model).calibration_forward(images, 'full'), allow_unseen=True)
    agreement = compare_glue(model, images, IMAGES, threads=2)
    assert agreement.good and agreement.detections >= 20, agreement


@pytest.mark.parametrize('name', ['mask_rcnn', 'cascade', 'faster_rcnn', 'fcos'])
def test_pictures_without_detections_give_empty_arrays(name):
    model = build(MODELS[name])
    config = model.test_cfg.rcnn if hasattr(model, 'roi_head') else model.bbox_head.test_cfg
    config.score_thr = 2.0
    if hasattr(model, 'roi_head'):
        model.roi_head.test_cfg.score_thr = 2.0
    levels, dense = torch_maps(model, batch())
    settings = DetectorSettings.from_dict(detector_settings(model))
    heads = TorchHeads(model) if settings.box else None
    for found, info in zip(detect(settings, levels, dense, heads, IMAGES), IMAGES):
        assert found.boxes.shape == (0, 4) and found.scores.shape == found.labels.shape == (0,)
        assert found.masks is None if not settings.mask else found.masks.shape == (0, *info.original)
        assert (found.boxes.dtype, found.labels.dtype) == (np.float32, np.int64)


def test_pictures_without_proposals_give_empty_arrays():
    model = build(MODELS['cascade'])
    model.rpn_head.test_cfg.min_bbox_size = 1000
    levels, dense = torch_maps(model, batch())
    settings = DetectorSettings.from_dict(detector_settings(model))
    for found, info in zip(detect(settings, levels, dense, TorchHeads(model), IMAGES), IMAGES):
        assert found.boxes.shape == (0, 4) and found.masks.shape == (0, *info.original)


def test_one_picture_of_a_batch_may_have_nothing():
    model = build(MODELS['cascade'])
    levels, dense = torch_maps(model, batch())
    for kind in dense[:1]:
        for level in kind:
            level[1] = -np.inf  # no score at all: nothing is larger than a threshold of 0 afterwards
    settings = DetectorSettings.from_dict({**detector_settings(model)})
    alone = detect(
        settings, [lv[:1] for lv in levels], [[m[:1] for m in k] for k in dense], TorchHeads(model), IMAGES[:1]
    )
    both = detect(settings, levels, dense, TorchHeads(model), IMAGES)
    assert compare_detections(both[0], alone[0]).good


def test_layout_of_levels_does_not_matter():
    model = build(MODELS['mask_rcnn'])
    levels, dense = torch_maps(model, batch())
    settings = DetectorSettings.from_dict(detector_settings(model))
    first = detect(settings, levels, dense, TorchHeads(model), IMAGES)
    last = detect(
        settings, [np.ascontiguousarray(lv.transpose(0, 2, 3, 1)) for lv in levels], dense, TorchHeads(model), IMAGES
    )
    for one, other in zip(first, last):
        for a, b in zip(one, other):
            np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------------- the comparison itself
def some_detections():
    boxes = np.array([[0, 0, 9, 9], [20, 20, 30, 40], [1, 1, 8, 9]], np.float32)
    masks = np.zeros((3, 50, 50), bool)
    return Detections(boxes, np.array([0.9, 0.8, 0.7], np.float32), np.array([0, 1, 0]), masks)


def changed(**parts):
    return some_detections()._replace(**parts)


@pytest.mark.parametrize(
    'other, field, value',
    [
        (changed(boxes=some_detections().boxes + np.float32(0.01)), 'box', 0.01),
        (changed(scores=np.array([0.9, 0.8, 0.6999], np.float32)), 'score', 1e-4),
        (changed(labels=np.array([0, 2, 0])), 'missing', 2),
        (changed(masks=np.eye(50, dtype=bool)[None].repeat(3, 0)), 'pixels', 150),
        (Detections(*(a[[1, 0, 2]] for a in some_detections())), 'moved', 2),
        (Detections(*(a[:2] for a in some_detections())), 'missing', 1),
        (Detections(*(a[:0] for a in some_detections())), 'missing', 3),
    ],
)
def test_differences_are_not_good(other, field, value):
    agreement = compare_detections(other, some_detections())
    assert getattr(agreement, field) == pytest.approx(value, rel=1e-2) and not agreement.good
    assert 'too far' in str(agreement)
    assert not GlueAgreement().plus(agreement).plus(compare_detections(some_detections(), some_detections())).good


def test_equal_scores_may_come_in_either_order():
    tied = changed(scores=np.array([0.9, 0.9, 0.7], np.float32))
    agreement = compare_detections(Detections(*(a[[1, 0, 2]] for a in tied)), tied)
    assert agreement.tied == 2 and agreement.good and '2 of equal scores' in str(agreement)


def test_a_wrong_glue_is_found(monkeypatch):
    """RoIs that are half a cell off move boxes."""
    model = build(MODELS['faster_rcnn'])

    def shifted(align, levels, rois, threads=None):
        return roi_align(align, levels, rois._replace(boxes=rois.boxes + np.float32(2)), threads)

    monkeypatch.setattr('psaq_mm.runtime.detection.detector.roi_align', shifted)
    assert not compare_glue(model, batch(), IMAGES).good


# ---------------------------------------------------------------------- what is not covered
GENERIC = dict(
    type='GenericRoIExtractor',
    aggregation='sum',
    roi_layer=dict(type='RoIAlign', output_size=7),
    out_channels=CHANNELS,
    featmap_strides=[4, 8, 16],
)


def with_head(name, **changes):
    config = copy.deepcopy(MODELS[name])
    part = config.get('roi_head') or config['bbox_head']
    part.update(changes)
    return config


@pytest.mark.parametrize(
    'config, said',
    [
        (dict(MODELS['faster_rcnn'], roi_head=dict(standard(False), type='PISARoIHead')), None),  # another training
        (dict(MODELS['faster_rcnn'], roi_head=dict(standard(False), type='DynamicRoIHead')), None),
        (
            dict(MODELS['retinanet'], bbox_head=dict(MODELS['retinanet']['bbox_head'], type='FreeAnchorRetinaHead')),
            None,
        ),
        (
            dict(MODELS['atss'], type='PAA', bbox_head=dict(MODELS['atss']['bbox_head'], type='PAAHead')),
            'PAAHead is a head whose predict_by_feat is not that of BaseDenseHead',
        ),
        (with_head('faster_rcnn', bbox_roi_extractor=GENERIC), 'RoI extractor'),
        (with_head('faster_rcnn', bbox_roi_extractor=extractor(7, pool_mode='max')), "pool_mode='max'"),
        (with_head('retinanet', bbox_coder=dict(type='TBLRBBoxCoder')), 'TBLRBBoxCoder is a coder of boxes'),
        (
            dict(MODELS['retinanet'], test_cfg=dict(ONE_STAGE, nms=dict(NMS, offset=1))),
            'of the config has offset, which is not built',
        ),
        (
            dict(
                MODELS['mask_rcnn'],
                test_cfg=dict(
                    MODELS['mask_rcnn']['test_cfg'],
                    rcnn=dict(score_thr=0.05, nms=NMS, max_per_img=9, mask_thr_binary=-1),
                ),
            ),
            'mask_thr_binary=-1.0',
        ),
    ],
)
def test_reasons_name_the_part(config, said):
    reason = why_not_covered(build(config))
    assert reason is None if said is None else said in reason, reason


def test_own_methods_of_a_project_are_not_covered():
    model = build(MODELS['mask_rcnn'])
    head = model.roi_head.bbox_head

    class OwnHead(type(head)):
        def _predict_by_feat_single(self, *args, **kwargs):
            """Another rule."""

    head.__class__ = OwnHead
    with pytest.raises(UnsupportedModelError, match='OwnHead is a box head whose _predict_by_feat_single is not that'):
        detector_settings(model)

    class OwnLayers(OwnHead.__mro__[1]):
        def forward(self, features):
            """Other layers, which are in the graph."""

    head.__class__ = OwnLayers
    assert why_not_covered(model) is None
    model.predict = lambda *args: []
    assert 'predict is not that of TwoStageDetector' in why_not_covered(model)


def test_detectors_with_queries_say_what_can_be_exported():
    pytest.importorskip('mmdet')
    from mmdet.models.detectors import DINO

    model = DINO.__new__(DINO)
    torch.nn.Module.__init__(model)
    assert 'decodes boxes out of queries' in why_not_covered(model)
    assert 'backbone and neck can be exported' in why_not_covered(model)
