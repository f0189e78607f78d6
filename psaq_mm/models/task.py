# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a data-free run needs to know of a detector, segmentor or classifier, whichever library it comes from."""
from typing import List, Sequence, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.errors import ConfigError, UnsupportedModelError
from psaq_mm.models.scope import find_backbone
from psaq_mm.synthesis import ImageSpec

__all__ = ['TaskModel', 'PARTS']

PARTS = ('backbone', 'neck', 'head')
"""Parts whose outputs can be distilled. ``head``: RPN maps of a two-stage detector, per-pixel logits of a segmentor, dense
head maps of a one-stage detector, logits of a classifier."""


def _tensors(outputs) -> List[Tensor]:
    """The tensors of a nested tuple/list/dict, in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = outputs.values()
    if isinstance(outputs, (tuple, list)) or hasattr(outputs, '__iter__'):
        return [t for o in outputs for t in _tensors(o)]
    return []


class TaskModel:
    """A thin view of a model: its colour range, its outputs to distil, and a forward that reaches every layer.

    It holds no state of its own, so a teacher and a student each have one.

    Args:
        model: A built detector, segmentor, classifier or backbone.
        parts: Which outputs :meth:`outputs` returns, out of :data:`PARTS`. Parts that the model lacks are left out.
        max_proposals: RoIs an image that :meth:`calibration_forward` sends through the RoI heads. They are the RPN's best,
            without a score threshold: on synthetic images a threshold may leave a mask head without any data.

    Raises:
        ConfigError: A part that does not exist.
    """

    def __init__(self, model: nn.Module, parts: Sequence[str] = ('backbone', 'neck'), max_proposals: int = 100):
        unknown = [p for p in parts if p not in PARTS]
        if unknown:
            raise ConfigError(f'distil={list(parts)} names no part {unknown[0]!r} of a model: use some of {", ".join(PARTS)}')
        self.model = model
        self.parts = tuple(parts)
        self.max_proposals = max_proposals

    @property
    def image_spec(self) -> ImageSpec:
        """Colour normalization and channels, read from ``data_preprocessor`` and the first layer."""
        channels = 3
        for module in find_backbone(self.model).modules():
            if isinstance(module, nn.Conv2d):
                channels = module.in_channels
                break
        return ImageSpec.from_preprocessor(getattr(self.model, 'data_preprocessor', None), channels=channels)

    @property
    def min_size(self) -> int:
        """The least image side, in pixels: one attention window, or one patch under global attention."""
        patch, window = 1, 1
        for module in find_backbone(self.model).modules():
            if isinstance(module, nn.Conv2d):
                patch = max(module.stride)
                break
        for module in find_backbone(self.model).modules():
            size = getattr(module, 'window_size', None)
            if isinstance(size, int):
                window = size
                break
        return patch * window

    # ------------------------------------------------------------------ forwards
    def features(self, images: Tensor) -> Tuple[List[Tensor], List[Tensor]]:
        """Outputs of backbone and neck for normalized ``images`` (B, C, H, W); the neck's are the backbone's without one."""
        backbone = find_backbone(self.model)
        stages = backbone(images)
        stages = list(stages) if isinstance(stages, (tuple, list)) else [stages]
        neck = getattr(self.model, 'neck', None)
        if backbone is self.model or neck is None:
            return stages, stages
        levels = neck(tuple(stages))
        return stages, list(levels) if isinstance(levels, (tuple, list)) else [levels]

    def _dense_head(self, levels: List[Tensor]) -> List[Tensor]:
        for name in ('rpn_head', 'decode_head', 'bbox_head', 'head'):
            head = getattr(self.model, name, None)
            if isinstance(head, nn.Module) and not isinstance(head, nn.ModuleList):
                return _tensors(head(tuple(levels)))
        return []

    def outputs(self, images: Tensor) -> List[Tensor]:
        """The tensors that the student learns from the teacher, coarse structure first: stages, neck levels, dense maps.

        Args:
            images: Normalized, (B, C, H, W).
        """
        stages, levels = self.features(images)
        found: List[Tensor] = []
        if 'backbone' in self.parts:
            found += _tensors(stages)
        if 'neck' in self.parts and levels is not stages:
            found += levels
        if 'head' in self.parts:
            found += self._dense_head(levels)
        return found

    @torch.no_grad()
    def calibration_forward(self, images: Tensor, scope: str = 'backbone') -> None:
        """Run every layer that ``scope`` quantizes once on ``images`` (B, C, H, W)."""
        if scope == 'backbone':
            find_backbone(self.model)(images)
            return
        stages, levels = self.features(images)
        self._dense_head(levels)
        roi_head = getattr(self.model, 'roi_head', None)
        if roi_head is not None:
            self._roi_forward(images, tuple(levels), roi_head)

    # ------------------------------------------------------------------ RoI heads
    def _proposals(self, images: Tensor, levels: Tuple[Tensor, ...]) -> List[Tensor]:
        from mmdet.structures import DetDataSample
        height, width = images.shape[-2:]
        meta = dict(img_shape=(height, width), ori_shape=(height, width), pad_shape=(height, width), scale_factor=(1., 1.),
                    batch_input_shape=(height, width))
        samples = [DetDataSample(metainfo=meta) for _ in range(len(images))]
        found = self.model.rpn_head.predict(levels, samples, rescale=False)
        boxes = [r.bboxes[:self.max_proposals] for r in found]
        boxes = [b.tensor if hasattr(b, 'tensor') else b for b in boxes]
        whole = images.new_tensor([[0., 0., width, height]])
        return [b if len(b) else whole for b in boxes]

    def _roi_forward(self, images: Tensor, levels: Tuple[Tensor, ...], roi_head: nn.Module) -> None:
        from mmdet.structures.bbox import bbox2roi
        rois = bbox2roi(self._proposals(images, levels))
        stages = getattr(roi_head, 'num_stages', None)
        if not hasattr(roi_head, '_bbox_forward'):
            raise UnsupportedModelError(f'scope=\'full\' cannot run the RoI head {type(roi_head).__name__}: '
                                        'use scope=\'backbone\' for this detector')
        if stages is None:
            roi_head._bbox_forward(levels, rois)
            if roi_head.with_mask:
                roi_head._mask_forward(levels, rois)
            return
        for stage in range(stages):
            result = roi_head._bbox_forward(stage, levels, rois)
            if roi_head.with_mask:
                roi_head._mask_forward(stage, levels, rois)
            rois = self._refine(roi_head.bbox_head[stage], rois, result, images.shape[-2:])

    @staticmethod
    def _refine(head: nn.Module, rois: Tensor, result: dict, shape: Sequence[int]) -> Tensor:
        """The next cascade stage's RoIs: the class with the best score moves its box (Cascade R-CNN, section 4)."""
        labels = result['cls_score'][:, :-1].argmax(1)
        boxes = head.regress_by_class(rois[:, 1:], labels, result['bbox_pred'], dict(img_shape=tuple(shape)))
        return torch.cat([rois[:, :1], getattr(boxes, 'tensor', boxes)], 1)
