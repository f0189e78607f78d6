# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Detection, with and without masks, by one-stage and two-stage detectors of mmdet's form."""

import inspect
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models.tasks.base import Compared, Task, register_task

__all__ = ['MIN_IOU', 'MIN_SCORE', 'Detection', 'filling_samples', 'matched_boxes']

MIN_IOU = 0.5
"""Least intersection over union of two boxes that are one detection."""
MIN_SCORE = 0.3
"""Least score of a detection that counts, on both sides."""

_COLUMNS = 6  # x1, y1, x2, y2, score, label

_ROI_PARTS = ('bbox_head', 'mask_head', 'bbox_roi_extractor', 'mask_roi_extractor', 'shared_head')


@register_task
class Detection(Task):
    """Compared by the F1 score of boxes. The library's RoI heads and box decoding finish the outputs of its exports."""

    name = 'detection'
    heads = ('rpn_head', 'bbox_head', 'head')
    shared_levels = ('rpn_head',)
    exact_size = False
    field = 'pred_instances'
    kind = 'boxes'
    metrics = ('mAP',)

    def matches(self, model: nn.Module) -> bool:
        """See :meth:`.Task.matches`."""
        of_mmdet = any(base.__module__.startswith('mmdet.models.detectors') for base in type(model).__mro__)
        return of_mmdet or any(hasattr(model, name) for name in ('rpn_head', 'bbox_head', 'roi_head'))

    # ------------------------------------------------------------------ calibration and distillation
    def calibrated_parts(self, model: nn.Module) -> Tuple[str, ...]:
        """See :meth:`.Task.calibrated_parts`."""
        return (*super().calibrated_parts(model), *(f'roi_head.{name}' for name in _ROI_PARTS))

    def check_full_scope(self, model: nn.Module) -> None:
        """See :meth:`.Task.check_full_scope`: RoI heads need an RPN, and must run on levels and RoIs alone."""
        kind, way_out, roi_head = type(model).__name__, "use scope='backbone' for this model", _roi_head(model)
        if roi_head is None:
            return
        if not hasattr(model, 'rpn_head'):
            raise UnsupportedModelError(
                f"scope='full' cannot run {kind}, whose RoI head has no RPN to give it boxes: {way_out}"
            )
        stage = () if getattr(roi_head, 'num_stages', None) is None else (0,)
        try:
            inspect.signature(roi_head._bbox_forward).bind(*stage, (), ())
        except (AttributeError, TypeError) as error:
            raise UnsupportedModelError(
                f"scope='full' cannot run the RoI head {type(roi_head).__name__} of {kind}, whose boxes need more "
                f'than levels and RoIs: {way_out}'
            ) from error

    def run_heads(self, model: nn.Module, images: Tensor, levels: Sequence[Tensor], max_proposals: int) -> None:
        """See :meth:`.Task.run_heads`."""
        # A layer's rows are paired with those of another pass call by call (row_importance): the RPN runs once, for its
        # proposals.
        if _roi_head(model) is None or self.dense_head(model) != 'rpn_head':
            self.dense_outputs(model, levels)
        proposals = self.proposals(model, images, levels, max_proposals)
        if proposals is not None:
            self.roi_outputs(model, images, levels, proposals)

    def proposals(
        self, model: nn.Module, images: Tensor, levels: Sequence[Tensor], max_proposals: int
    ) -> Optional[List[Tensor]]:
        """See :meth:`.Task.proposals`: the RPN's best boxes. An image without any gives itself."""
        if _roi_head(model) is None:
            return None
        predictions = model.rpn_head.predict(tuple(levels), filling_samples(images), rescale=False)
        boxes = [_tensor(prediction.bboxes[:max_proposals]) for prediction in predictions]
        image_box = images.new_tensor([[0.0, 0.0, images.shape[-1], images.shape[-2]]])
        return [b if len(b) else image_box for b in boxes]

    def roi_outputs(
        self, model: nn.Module, images: Tensor, levels: Sequence[Tensor], proposals: Sequence[Tensor]
    ) -> List[Tensor]:
        """See :meth:`.Task.roi_outputs`: class scores, box deltas and masks of every stage, one row for each RoI."""
        from mmdet.structures.bbox import bbox2roi

        roi_head, levels, rois = model.roi_head, tuple(levels), bbox2roi(proposals)
        if not hasattr(roi_head, '_bbox_forward'):
            raise UnsupportedModelError(
                f"scope='full' cannot run the RoI head {type(roi_head).__name__}: "
                "use scope='backbone' for this detector"
            )
        stages = getattr(roi_head, 'num_stages', None)
        outputs: List[Tensor] = []
        for stage in range(stages or 1):
            number = () if stages is None else (stage,)
            result = roi_head._bbox_forward(*number, levels, rois)
            outputs += [result['cls_score'], result['bbox_pred']]
            if roi_head.with_mask:
                outputs.append(roi_head._mask_forward(*number, levels, rois)['mask_preds'])
            if stages is not None:
                rois = _refined(roi_head.bbox_head[stage], rois, result, images.shape[-2:])
        return outputs

    # ------------------------------------------------------------------ predictions
    def reads(self, sample: Any) -> bool:
        """See :meth:`.Task.reads`. Instances of a pose estimator have keypoints, and no scores of boxes."""
        return super().reads(sample) and {'bboxes', 'scores', 'labels'} <= set(sample.pred_instances.keys())

    def read(self, sample: Any) -> np.ndarray:
        """See :meth:`.Task.read`: boxes of at least :data:`MIN_SCORE`, (n, 6): x1, y1, x2, y2, score, label."""
        instances = sample.pred_instances
        kept = instances.scores >= MIN_SCORE
        columns = [_tensor(instances.bboxes)[kept], instances.scores[kept, None], instances.labels[kept, None]]
        return np.concatenate([column.float().cpu().numpy() for column in columns], 1).astype(np.float32)

    def compare(self, prediction: np.ndarray, truth: np.ndarray, picture: str) -> Compared:
        """See :meth:`.Task.compare`. F1 = 2 matches / (detections of one + of the other)."""
        return Compared(2.0 * matched_boxes(prediction, truth), float(len(prediction) + len(truth)))

    def pack(self, records: Sequence[np.ndarray]) -> Tuple[Dict[str, Any], Dict[str, np.ndarray]]:
        """See :meth:`.Task.pack`."""
        boxes = np.concatenate([np.zeros((0, _COLUMNS), np.float32), *records])
        return {}, dict(boxes=boxes, counts=np.array([len(record) for record in records], np.int64))

    def unpack(self, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> List[np.ndarray]:
        """See :meth:`.Task.unpack`."""
        return np.split(arrays['boxes'], np.cumsum(arrays['counts'])[:-1])


def filling_samples(images: Tensor) -> List[Any]:
    """Data samples of mmdet for pictures (B, C, H, W) that fill their batch, without labels."""
    from mmdet.structures import DetDataSample

    shape = tuple(images.shape[-2:])
    meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, scale_factor=(1.0, 1.0), batch_input_shape=shape)
    return [DetDataSample(metainfo=dict(meta)) for _ in range(len(images))]


def _roi_head(model: nn.Module) -> Optional[nn.Module]:
    return getattr(model, 'roi_head', None)


def _tensor(boxes: Any) -> Tensor:
    """The tensor of mmdet's box types; tensors as they are."""
    return getattr(boxes, 'tensor', boxes)


def _refined(head: nn.Module, rois: Tensor, result: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """The next cascade stage's RoIs: the class with the best score moves its box (Cascade R-CNN, section 4)."""
    labels = result['cls_score'][:, :-1].argmax(1)
    boxes = head.regress_by_class(rois[:, 1:], labels, result['bbox_pred'], dict(img_shape=tuple(shape)))
    return torch.cat([rois[:, :1], _tensor(boxes)], 1)


def matched_boxes(prediction: np.ndarray, truth: np.ndarray, min_iou: float = MIN_IOU) -> int:
    """How many detections of ``prediction`` are one of ``truth``, each of which is matched at most once.

    Greedy: in the order of their scores, each takes the free box of its class with the largest overlap.

    Args:
        prediction: Shape (n, 6): x1, y1, x2, y2 in pixels, score, label.
        truth: Shape (m, 6), the same columns.
        min_iou: Least overlap.
    """
    if not len(prediction) or not len(truth):
        return 0
    prediction = prediction[np.argsort(-prediction[:, 4], kind='stable')]
    corner = np.maximum(prediction[:, None, :2], truth[None, :, :2])
    sides = np.clip(np.minimum(prediction[:, None, 2:4], truth[None, :, 2:4]) - corner, 0, None)
    common = sides[..., 0] * sides[..., 1]
    area, other = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (prediction, truth))
    overlap = common / np.maximum(area[:, None] + other[None] - common, 1e-9)
    overlap[prediction[:, None, 5] != truth[None, :, 5]] = -1.0
    matches = 0
    for row in overlap:
        best = int(row.argmax())
        if row[best] >= min_iou:
            overlap[:, best] = -1.0
            matches += 1
    return matches
