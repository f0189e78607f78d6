# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The settings of :mod:`psaq_mm.runtime.detection` out of an mmdet model, or why it has none.

A detector is covered where every method that computes something between its layers is mmdet's own, of a class whose
computation the glue knows. What its layers are does not matter: those are in the graphs.
"""

from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Type

from torch import nn

from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models.adapters.match import qualified_name
from psaq_mm.runtime.detection.settings import (
    BoxCoding,
    BoxStage,
    DenseSettings,
    DetectorSettings,
    MaskStage,
    Priors,
    RoiAlignSettings,
    Suppression,
)

__all__ = ['detector_settings', 'why_not_covered']

_HEADS = 'mmdet.models.dense_heads'
_ROI = 'mmdet.models.roi_heads'
_BASE = f'{_HEADS}.base_dense_head.BaseDenseHead'
_TASKS = 'mmdet.models.task_modules'

# By what is looked at: methods, and the classes that they must come from.
_ONE_STAGE = {('predict',): ('mmdet.models.detectors.single_stage.SingleStageDetector',)}
_TWO_STAGE = {('predict',): ('mmdet.models.detectors.two_stage.TwoStageDetector',)}
_RPN = {
    ('predict', 'predict_by_feat'): (_BASE,),
    ('_predict_by_feat_single', '_bbox_post_process'): (f'{_HEADS}.rpn_head.RPNHead',),
}
_DENSE = {
    ('predict', 'predict_by_feat', '_bbox_post_process'): (_BASE,),
    ('_predict_by_feat_single',): (_BASE, f'{_HEADS}.gfl_head.GFLHead'),
}
_STANDARD = f'{_ROI}.standard_roi_head.StandardRoIHead'
_CASCADE = f'{_ROI}.cascade_roi_head.CascadeRoIHead'
_ROI_HEAD = {
    ('predict',): (f'{_ROI}.base_roi_head.BaseRoIHead',),
    ('predict_bbox', 'predict_mask', '_bbox_forward', '_mask_forward'): (_STANDARD, _CASCADE),
}
_BOX_HEAD = {
    ('predict_by_feat', '_predict_by_feat_single', 'regress_by_class'): (f'{_ROI}.bbox_heads.bbox_head.BBoxHead',)
}
_MASK_HEAD = {
    ('predict_by_feat', '_predict_by_feat_single'): (f'{_ROI}.mask_heads.fcn_mask_head.FCNMaskHead',),
}
_EXTRACTOR = {('forward', 'map_roi_levels'): (f'{_ROI}.roi_extractors.single_level_roi_extractor.SingleRoIExtractor',)}
_ALIGN = {('forward',): ('mmcv.ops.roi_align.RoIAlign',)}
_ANCHORS = f'{_TASKS}.prior_generators.anchor_generator.AnchorGenerator'
_POINTS = f'{_TASKS}.prior_generators.point_generator.MlvlPointGenerator'
_PRIORS = {('grid_priors', 'single_level_grid_priors', '_meshgrid'): (_ANCHORS, _POINTS)}
_DELTA = f'{_TASKS}.coders.delta_xywh_bbox_coder.DeltaXYWHBBoxCoder'
_DISTANCE = f'{_TASKS}.coders.distance_point_bbox_coder.DistancePointBBoxCoder'
_CODER = {('decode',): (_DELTA, _DISTANCE)}

_INTEGRAL = {('forward',): (f'{_HEADS}.gfl_head.Integral',)}
_NMS_KEYS = ('type', 'iou_threshold', 'iou_thr', 'class_agnostic', 'split_thr', 'max_num')
_SOFT_KEYS = (*_NMS_KEYS, 'sigma', 'min_score', 'method')
_ADVICE = 'backbone and neck can be exported, and the library decodes their maps'

Rules = Mapping[Tuple[str, ...], Tuple[str, ...]]


def detector_settings(model: nn.Module) -> Dict[str, Any]:
    """What :class:`psaq_mm.runtime.detection.DetectorSettings` reads, of a detector of mmdet, in types of JSON.

    Args:
        model: Built from its config; its weights do not matter.

    Raises:
        UnsupportedModelError: The glue does not compute what the detector does; the message names the part.

    Example:
        >>> settings = DetectorSettings.from_dict(detector_settings(model))
    """
    two_stage = hasattr(model, 'roi_head')
    _check_queries(model)
    _check(model, _TWO_STAGE if two_stage else _ONE_STAGE, 'the detector')
    if not two_stage:
        return _one_stage(model).to_dict()
    return _two_stage(model).to_dict()


def why_not_covered(model: nn.Module) -> Optional[str]:
    """Why a detector cannot decode its boxes without PyTorch, in one sentence; None where it can."""
    try:
        detector_settings(model)
    except UnsupportedModelError as error:
        return str(error)
    return None


def _refuse(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f'{what}: {_ADVICE}')


def _check_queries(model: nn.Module) -> None:
    names = [qualified_name(base) for base in type(model).__mro__]
    if any(name.rpartition('.')[2] == 'DetectionTransformer' for name in names):
        raise _refuse(f'{type(model).__name__} decodes boxes out of queries, which psaq_mm does not run in integers')


def _check(part: object, rules: Rules, what: str) -> None:
    """Refuse a part with a method that is not of one of the known classes.

    A method that a downstream project or another class of mmdet overrides computes something else.
    """
    known = {qualified_name(base): base for base in type(part).__mro__}
    for methods, owners in rules.items():
        classes: Sequence[Type] = [known[owner] for owner in owners if owner in known]
        for method in methods:
            function = getattr(type(part), method, None)
            inherited = any(function is vars(cls).get(method) for cls in classes)
            if function is None or not inherited or method in getattr(part, '__dict__', {}):
                raise _refuse(
                    f'{type(part).__name__} is {what} whose {method} is not that of '
                    f'{" or ".join(owner.rpartition(".")[2] for owner in owners)}'
                )


def _owner(part: object, method: str) -> str:
    """Name of the class that defines a method."""
    return getattr(type(part), method).__qualname__.split('.')[0]


# ---------------------------------------------------------------------- dense heads
def _one_stage(model: nn.Module) -> DetectorSettings:
    head = getattr(model, 'bbox_head', None)
    if head is None or hasattr(model, 'mask_head'):
        raise _refuse(f'{type(model).__name__} has no bbox_head alone, which makes the boxes of a one-stage detector')
    _check(head, _DENSE, 'a head')
    return DetectorSettings(classes=head.num_classes, dense=_dense(head, head.test_cfg))


def _dense(head: nn.Module, config: Mapping[str, Any]) -> DenseSettings:
    loss = head.loss_cls
    if getattr(loss, 'custom_cls_channels', False) or getattr(loss, 'custom_activation', False):
        raise _refuse(f'{type(head).__name__} has the loss {type(loss).__name__}, which computes scores of its own')
    is_gfl = _owner(head, '_predict_by_feat_single') == 'GFLHead'
    if is_gfl:
        _check(head.integral, _INTEGRAL, 'an integral')
    sigmoid = is_gfl or head.use_sigmoid_cls
    return DenseSettings(
        priors=_priors(head.prior_generator, is_gfl),
        coding=_coding(head.bbox_coder),
        nms=_suppression(config.get('nms')),
        activation='sigmoid' if sigmoid else 'softmax',
        channels=head.cls_out_channels,
        score_threshold=float(config.get('score_thr', 0)),
        nms_pre=int(config.get('nms_pre', -1)),
        max_per_image=int(config['max_per_img']),
        min_size=float(config.get('min_bbox_size', -1)),
        reg_max=int(head.reg_max) if is_gfl else None,
    )


def _priors(generator: Any, centers: bool) -> Priors:
    _check(generator, _PRIORS, 'a generator of priors')
    strides = tuple((float(w), float(h)) for w, h in generator.strides)
    if hasattr(generator, 'base_anchors'):
        anchors = tuple(tuple(map(tuple, level.tolist())) for level in generator.base_anchors)
        return Priors(kind='anchors', strides=strides, base_anchors=anchors, centers=centers)
    return Priors(kind='points', strides=strides, offset=float(generator.offset))


def _coding(coder: Any) -> BoxCoding:
    _check(coder, _CODER, 'a coder of boxes')
    clip = coder.clip_border is not False
    if not hasattr(coder, 'stds'):
        return BoxCoding(kind='distance', clip=clip)
    return BoxCoding(
        means=tuple(map(float, coder.means)),
        stds=tuple(map(float, coder.stds)),
        clip=clip,
        center_clamp=float(coder.ctr_clamp) if coder.add_ctr_clamp else None,
    )


def _suppression(config: Optional[Mapping[str, Any]]) -> Suppression:
    if config is None:
        return Suppression(kind='none')
    kind = config.get('type', 'nms')
    known = dict(nms=_NMS_KEYS, soft_nms=_SOFT_KEYS).get(kind)
    unknown = [key for key in config if key not in (known or ())]
    if known is None or unknown:
        raise _refuse(f'nms={dict(config)!r} of the config has {", ".join(unknown)}, which is not built')
    defaults = Suppression()
    threshold = config.get('iou_threshold', config.get('iou_thr', 0.3 if kind == 'soft_nms' else None))
    if threshold is None:
        raise _refuse(f'nms={dict(config)!r} of the config has no iou_threshold')
    return Suppression(
        kind=kind,
        iou_threshold=float(threshold),
        class_agnostic=bool(config.get('class_agnostic', False)),
        split_at=int(config.get('split_thr', defaults.split_at)),
        max_num=int(config.get('max_num', -1)),
        sigma=float(config.get('sigma', defaults.sigma)),
        min_score=float(config.get('min_score', defaults.min_score)),
        method=config.get('method', defaults.method),
    )


# ---------------------------------------------------------------------- RoI heads
def _two_stage(model: nn.Module) -> DetectorSettings:
    if not hasattr(model, 'rpn_head'):
        raise _refuse(f'{type(model).__name__} has no RPN, which makes the RoIs of a two-stage detector')
    rpn, roi = model.rpn_head, model.roi_head
    _check(rpn, _RPN, 'an RPN')
    _check(roi, _ROI_HEAD, 'a RoI head')
    if getattr(roi, 'with_shared_head', False):
        raise _refuse(f'{type(roi).__name__} has a shared_head')
    cascade = any(qualified_name(base) == _CASCADE for base in type(roi).__mro__)
    if cascade:
        _check(roi, {('_refine_roi',): (_CASCADE,)}, 'a RoI head')
    stages = range(roi.num_stages if cascade else 1)
    config = roi.test_cfg
    masks = [MaskStage(align=_align(e)) for e in _each(roi.mask_roi_extractor, stages)] if roi.with_mask else []
    threshold = float(config.get('mask_thr_binary', 0.5))
    for head in _each(roi.mask_head, stages) if roi.with_mask else ():
        _check(head, _MASK_HEAD, 'a mask head')
    if threshold < 0:
        raise _refuse(f'mask_thr_binary={threshold} of the config asks for grey masks')
    boxes = [
        _box_stage(head, extractor)
        for head, extractor in zip(_each(roi.bbox_head, stages), _each(roi.bbox_roi_extractor, stages))
    ]
    return DetectorSettings(
        classes=_each(roi.bbox_head, stages)[-1].num_classes,
        dense=_dense(rpn, rpn.test_cfg),
        box=tuple(boxes),
        mask=tuple(masks),
        score_threshold=float(config['score_thr']),
        nms=_suppression(config.get('nms')),
        max_per_image=int(config['max_per_img']),
        mask_threshold=threshold,
    )


def _each(parts: Any, stages: Sequence[int]) -> List[Any]:
    """The parts of the stages: mmdet has a list for a cascade, and one part for a single stage."""
    return [parts[i] for i in stages] if isinstance(parts, nn.ModuleList) else [parts]


def _box_stage(head: nn.Module, extractor: nn.Module) -> BoxStage:
    _check(head, _BOX_HEAD, 'a box head')
    if head.custom_cls_channels or head.custom_activation:
        raise _refuse(f'{type(head).__name__} has the loss {type(head.loss_cls).__name__}, which computes scores')
    if not (head.with_cls and head.with_reg):
        raise _refuse(f'{type(head).__name__} gives no scores or no boxes')
    return BoxStage(align=_align(extractor), coding=_coding(head.bbox_coder), class_agnostic=head.reg_class_agnostic)


def _align(extractor: nn.Module) -> RoiAlignSettings:
    _check(extractor, _EXTRACTOR, 'a RoI extractor')
    layer = extractor.roi_layers[0]
    _check(layer, _ALIGN, 'a RoI layer')
    if layer.pool_mode != 'avg' or layer.use_torchvision:
        raise _refuse(f'{type(layer).__name__} with pool_mode={layer.pool_mode!r} is not built')
    return RoiAlignSettings(
        size=tuple(layer.output_size),
        strides=tuple(map(float, extractor.featmap_strides)),
        channels=int(extractor.out_channels),
        sampling_ratio=int(layer.sampling_ratio),
        aligned=bool(layer.aligned),
        finest_scale=float(extractor.finest_scale),
    )
