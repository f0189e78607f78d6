# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Comparison of :mod:`psaq_mm.runtime.detection` with mmdet, on the same maps and with the same heads.

So a difference is one of the glue: decoding, choice of boxes, RoIAlign, suppression, pasting.
"""

import contextlib
import importlib
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from psaq_mm.contexts import evaluating, replaced
from psaq_mm.deploy.detectors import detector_settings
from psaq_mm.runtime.detection import Detections, DetectorSettings, ImageInfo, detect

__all__ = ['GlueAgreement', 'TorchHeads', 'compare_detections', 'compare_glue', 'library_detections', 'torch_maps']

GREATEST_BOX = 1e-3
"""Pixels."""
GREATEST_SCORE = 1e-5
GREATEST_PIXELS = 1e-5
"""Share of all pixels of all masks."""


class GlueAgreement(NamedTuple):
    """What :func:`compare_glue` returns. Agreements of several pictures add up.

    Attributes:
        pictures: Number of pictures.
        detections: Detections of the library.
        missing: Detections of one side that the other side has not, with the same class.
        moved: Detections at another place of the list, though scores are further apart than :data:`GREATEST_SCORE`.
        tied: Detections at another place of the list, where scores are equal up to that: the last bit of a score, which
            depends on the order of a sum, decides.
        box: Greatest difference of a coordinate, in pixels of the original picture.
        score: Greatest difference of a score.
        pixels: Pixels of masks that differ.
        area: All pixels of masks.
    """

    pictures: int = 0
    detections: int = 0
    missing: int = 0
    moved: int = 0
    tied: int = 0
    box: float = 0.0
    score: float = 0.0
    pixels: int = 0
    area: int = 0

    @property
    def good(self) -> bool:
        """Whether both sides have the same detections in the same order, and numbers within the limits."""
        exact = not self.missing and not self.moved
        near = self.box <= GREATEST_BOX and self.score <= GREATEST_SCORE
        return exact and near and self.pixels <= GREATEST_PIXELS * self.area

    def plus(self, other: 'GlueAgreement') -> 'GlueAgreement':
        """Both together."""
        worst = ('box', 'score')
        return GlueAgreement(*(max(a, b) if n in worst else a + b for n, a, b in zip(self._fields, self, other)))

    def __str__(self) -> str:
        masks = f', {self.pixels} of {self.area} mask pixels differ' if self.area else ''
        tied = f', {self.tied} of equal scores in another order' if self.tied else ''
        return (
            f'boxes and masks on the same maps as mmdet, {self.pictures} pictures: {self.detections} detections, '
            f'{self.missing} missing, {self.moved} in another order{tied}, boxes within {self.box:.1e} px, scores '
            f'within {self.score:.1e}{masks}{"" if self.good else "  <- too far"}'
        )


class TorchHeads:
    """Box and mask heads of an mmdet model for :func:`psaq_mm.runtime.detection.detect`.

    Args:
        model: A two-stage detector, on the CPU.
    """

    def __init__(self, model: nn.Module):
        self._roi = model.roi_head

    def box(self, stage: int, features: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """See :class:`psaq_mm.runtime.detection.Heads`."""
        with torch.no_grad():
            scores, deltas = _stage(self._roi.bbox_head, stage)(_channel_first(features))
        return scores.numpy(), deltas.numpy()

    def mask(self, stage: int, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """See :class:`psaq_mm.runtime.detection.Heads`."""
        head = _stage(self._roi.mask_head, stage)
        with torch.no_grad():
            masks = head(_channel_first(features)).numpy()
        return masks[:, 0] if head.class_agnostic else masks[np.arange(len(labels)), labels]


def _stage(heads: nn.Module, stage: int) -> nn.Module:
    return heads[stage] if isinstance(heads, nn.ModuleList) else heads


def _channel_first(features: np.ndarray) -> Tensor:
    return torch.from_numpy(features).permute(0, 3, 1, 2).contiguous()


def torch_maps(model: nn.Module, images: Tensor) -> Tuple[List[np.ndarray], List[List[np.ndarray]]]:
    """Levels of the neck and maps of the dense head, as :func:`psaq_mm.runtime.detection.detect` takes them.

    Args:
        model: A detector of mmdet, on the CPU.
        images: Normalized, (N, C, H, W).
    """
    with torch.no_grad():
        levels = model.extract_feat(images)
        dense = _dense_head(model)(levels)
    return [level.numpy() for level in levels], [[level.numpy() for level in kind] for kind in dense]


def _dense_head(model: nn.Module) -> Any:
    return model.rpn_head if hasattr(model, 'roi_head') else model.bbox_head


@contextlib.contextmanager
def stable_sorts() -> Iterator[None]:
    """Inside, mmdet and mmcv sort scores stably: of equal ones, the first comes first.

    PyTorch's own sort leaves their order open, and with it which of them are among the best, or suppress the others.
    Saturated scores and cells of a flat area are equal. So there would be no right result to compare with.
    """
    # The package has a function of the module's name.
    compiled = importlib.import_module('mmcv.ops.nms').ext_module
    sort, suppress = torch.Tensor.sort, compiled.nms

    def stable_sort(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        return sort(self, *args, **kwargs) if args else sort(self, **{**kwargs, 'stable': True})

    def stable_suppress(boxes: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        order = sort(scores, descending=True, stable=True)[1]
        return order[suppress(boxes[order], torch.arange(len(order), 0, -1, dtype=scores.dtype), **kwargs)]

    with replaced(torch.Tensor, 'sort', stable_sort), replaced(compiled, 'nms', stable_suppress):
        yield


def library_detections(
    model: nn.Module, levels: Sequence[Tensor], images: Sequence[ImageInfo], padded: Tuple[int, int]
) -> List[Detections]:
    """What mmdet predicts from levels of the neck.

    Args:
        model: A detector of mmdet.
        levels: (N, C, h, w).
        images: Sizes of the N pictures.
        padded: (height, width) of the batch.
    """
    from mmdet.structures import DetDataSample

    shapes = dict(pad_shape=padded, batch_input_shape=padded)
    samples = [
        DetDataSample(metainfo=dict(shapes, img_shape=i.shape, ori_shape=i.original, scale_factor=i.scale))
        for i in images
    ]
    with torch.no_grad(), stable_sorts():
        if hasattr(model, 'roi_head'):
            boxes = model.rpn_head.predict(levels, samples, rescale=False)
            predictions = model.roi_head.predict(levels, boxes, samples, rescale=True)
        else:
            predictions = model.bbox_head.predict(levels, samples, rescale=True)
    return [
        Detections(
            getattr(p.bboxes, 'tensor', p.bboxes).numpy(),
            p.scores.numpy(),
            p.labels.numpy().astype(np.int64),
            p.masks.numpy() if 'masks' in p else None,
        )
        for p in predictions
    ]


def compare_glue(
    model: nn.Module, images: Tensor, infos: Sequence[ImageInfo], threads: Optional[int] = None
) -> GlueAgreement:
    """Run a detector's layers in PyTorch, and compare what mmdet and the glue make of their outputs.

    Args:
        model: A detector of mmdet, such as a fake-quantized student, on the CPU.
        images: Normalized and padded, (N, C, H, W).
        infos: Sizes of the N pictures.
        threads: Of the glue.

    Raises:
        UnsupportedModelError: The glue does not cover the detector.
    """
    settings = DetectorSettings.from_dict(detector_settings(model))
    with evaluating(model):
        levels, dense = torch_maps(model, images)
        heads = TorchHeads(model) if settings.box else None
        wanted = library_detections(
            model, [torch.from_numpy(level) for level in levels], infos, (images.shape[2], images.shape[3])
        )
        results = detect(settings, levels, dense, heads, infos, threads, channel_last=False)
    agreement = GlueAgreement()
    for one, other in zip(results, wanted):
        agreement = agreement.plus(compare_detections(one, other))
    return agreement


def compare_detections(detections: Detections, wanted: Detections) -> GlueAgreement:
    """Differences of one picture's detections. Each one of ``wanted`` is paired with the nearest of its class."""
    free = np.ones(len(detections.scores), bool)
    pairs: List[Tuple[int, int]] = []
    for i, (box, score, label) in enumerate(zip(wanted.boxes, wanted.scores, wanted.labels)):
        distance = np.abs(detections.boxes - box).max(1) + np.abs(detections.scores - score)
        distance[~free | (detections.labels != label)] = np.inf
        if free.any() and distance.min() < 1:  # further away it is another detection
            j = int(distance.argmin())
            pairs.append((i, j))
            free[j] = False
    missing = len(wanted.scores) - len(pairs) + int(free.sum())
    apart = [abs(float(wanted.scores[i]) - float(wanted.scores[min(j, len(wanted.scores) - 1)])) for i, j in pairs]
    elsewhere = [gap for (i, j), gap in zip(pairs, apart) if i != j]
    tied = sum(gap <= GREATEST_SCORE for gap in elsewhere)
    rows, others = [i for i, _ in pairs], [j for _, j in pairs]
    box = np.abs(wanted.boxes[rows] - detections.boxes[others]).max(initial=0)
    score = np.abs(wanted.scores[rows] - detections.scores[others]).max(initial=0)
    pixels = area = 0
    if wanted.masks is not None and detections.masks is not None:
        pixels = sum(int((wanted.masks[i] != detections.masks[j]).sum()) for i, j in pairs)
        area = len(pairs) * int(np.prod(wanted.masks.shape[1:]))
    return GlueAgreement(
        1, len(wanted.scores), missing, len(elsewhere) - tied, tied, float(box), float(score), pixels, area
    )
