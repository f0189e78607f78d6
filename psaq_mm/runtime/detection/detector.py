# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Detectors between and after their layers: what mmdet computes there, in float32 with NumPy."""

from typing import List, NamedTuple, Optional, Protocol, Sequence, Tuple

import numpy as np

from psaq_mm.errors import DataError
from psaq_mm.runtime.detection.arrays import sigmoid, softmax
from psaq_mm.runtime.detection.boxes import decode, scaled
from psaq_mm.runtime.detection.dense import Candidates, one_stage, proposals
from psaq_mm.runtime.detection.masks import paste
from psaq_mm.runtime.detection.roi_align import Rois, roi_align
from psaq_mm.runtime.detection.settings import BoxStage, DetectorSettings, RoiAlignSettings
from psaq_mm.runtime.detection.suppression import suppress

__all__ = ['Detections', 'Heads', 'ImageInfo', 'detect']


class ImageInfo(NamedTuple):
    """Sizes of one picture.

    Attributes:
        shape: (height, width) after resizing, without padding.
        original: (height, width) before.
        scale: (resized / original) of x and y, mmdet's ``scale_factor``.
    """

    shape: Tuple[int, int]
    original: Tuple[int, int]
    scale: Tuple[float, float] = (1.0, 1.0)


class Detections(NamedTuple):
    """What was detected in one picture, by falling score.

    Attributes:
        boxes: float32 (n, 4): x1, y1, x2, y2 in pixels of the original picture.
        scores: float32 (n,).
        labels: int64 (n,).
        masks: bool (n, height, width) of the original picture; None where the detector has no masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: Optional[np.ndarray] = None


class Heads(Protocol):
    """Box and mask heads of a two-stage detector, in any runtime."""

    def box(self, stage: int, features: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """Class logits (n, classes + 1), the background last, and deltas (n, 4) or (n, 4 * classes) of RoI features,
        float32 (n, h, w, C).
        """

    def mask(self, stage: int, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Mask logits (n, H, W) of each RoI's class ``labels``, int64 (n,)."""


def detect(
    settings: DetectorSettings,
    levels: Sequence[np.ndarray],
    dense: Sequence[Sequence[np.ndarray]],
    heads: Optional[Heads],
    images: Sequence[ImageInfo],
    threads: Optional[int] = None,
    channel_last: Optional[bool] = None,
) -> List[Detections]:
    """Detections of pictures out of a network's maps.

    Args:
        settings: Of the detector.
        levels: The neck's maps, float32 (N, h, w, C), which is fast, or (N, C, h, w). A one-stage detector reads none.
        dense: Of the dense head, by kind and level: class scores, box values, and centerness where it has that; float32
            (N, channels, h, w). They are as large as the picture padded to the ``pad_divisor`` of the model, and not
            larger: every cell has its priors.
        heads: Box and mask heads; None for a one-stage detector. Not called without RoIs.
        images: Sizes of the N pictures.
        threads: For RoIAlign. Defaults to None, one.
        channel_last: Which of the two layouts ``levels`` have. Defaults to None: the axis tells that has the channels
            of the settings in all levels; of two such axes it is the last one.

    Raises:
        DataError: Maps and settings do not fit.
    """
    pictures = [[[level[i] for level in kind] for kind in dense] for i in range(len(images))]
    _check_dense(settings, dense)
    if not settings.box:
        found = [one_stage(settings.dense, maps, i.shape, i.scale) for maps, i in zip(pictures, images)]
        return [Detections(*candidates) for candidates in found]
    assert heads is not None
    boxes = [proposals(settings.dense, maps, i.shape).boxes for maps, i in zip(pictures, images)]
    stage = _RoiStages(settings, _channel_last(settings.box[0].align, levels, channel_last), heads, images, threads)
    candidates = stage.detections(boxes)
    if not settings.mask:
        return [Detections(*c) for c in candidates]
    return stage.with_masks(candidates)


def _check_dense(settings: DetectorSettings, dense: Sequence[Sequence[np.ndarray]]) -> None:
    strides = settings.dense.priors.strides
    if len(dense) not in (2, 3) or any(len(kind) != len(strides) for kind in dense):
        raise DataError(
            f'the dense head gives {[len(kind) for kind in dense]} maps, and the detector reads scores, boxes and '
            f'perhaps centerness of {len(strides)} levels: export the model again'
        )


def _channel_last(align: RoiAlignSettings, levels: Sequence[np.ndarray], last: Optional[bool]) -> List[np.ndarray]:
    """The levels that RoIs read as (N, h, w, C) with adjacent channels; views where they are so already."""
    levels = levels[: len(align.strides)]
    axes = [axis for axis in (3, 1) if all(level.shape[axis] == align.channels for level in levels)]
    if len(levels) < len(align.strides) or not axes:
        raise DataError(
            f'levels of the shapes {[level.shape for level in levels]} have no axis of the {align.channels} channels '
            f'of {len(align.strides)} levels that RoI heads read: give the maps of the neck, in the order of its levels'
        )
    last = axes[0] == 3 if last is None else last
    return [np.ascontiguousarray(level if last else level.transpose(0, 2, 3, 1)) for level in levels]


def box_candidates(
    settings: DetectorSettings,
    stage: BoxStage,
    boxes: np.ndarray,
    logits: np.ndarray,
    deltas: np.ndarray,
    image: ImageInfo,
) -> Candidates:
    """Detections of one picture out of a box head's outputs.

    Args:
        settings: Of the detector.
        stage: The last box stage.
        boxes: RoIs, float32 (n, 4).
        logits: (n, classes + 1), the background last.
        deltas: (n, 4) or (n, 4 * classes).
        image: Sizes of the picture.

    Returns:
        By falling score; boxes are of the original size where the detector has no masks, else of the resized one.
    """
    scores = softmax(logits)[:, :-1]
    rows, labels = np.nonzero(scores > np.float32(settings.score_threshold))
    values = deltas[rows] if stage.class_agnostic else deltas.reshape(len(deltas), -1, 4)[rows, labels]
    candidates = decode(stage.coding, boxes[rows], values, image.shape)
    if not settings.mask:
        candidates = scaled(candidates, image.scale)
    limit = settings.max_per_image if settings.max_per_image > 0 else -1
    kept, kept_scores = suppress(settings.nms, candidates, scores[rows, labels], labels, limit)
    return Candidates(candidates[kept], kept_scores, labels[kept])


class _RoiStages:
    """Box and mask stages for the pictures of one call."""

    def __init__(
        self,
        settings: DetectorSettings,
        levels: Sequence[np.ndarray],
        heads: Heads,
        images: Sequence[ImageInfo],
        threads: Optional[int],
    ):
        self.settings, self.levels, self.heads, self.images, self.threads = settings, levels, heads, images, threads

    def _features(self, align: RoiAlignSettings, boxes: Sequence[np.ndarray]) -> np.ndarray:
        numbers = np.repeat(np.arange(len(boxes)), [len(b) for b in boxes])
        return roi_align(align, self.levels, Rois(np.concatenate(boxes), numbers), self.threads)

    def detections(self, boxes: List[np.ndarray]) -> List[Candidates]:
        """Detections out of the proposals of each picture; boxes are of the original size where there are no masks."""
        if not sum(map(len, boxes)):
            return [Candidates(b, np.zeros(0, np.float32), np.zeros(0, np.int64)) for b in boxes]
        stages, every = self.settings.box, []
        for number, stage in enumerate(stages):
            logits, deltas = self.heads.box(number, self._features(stage.align, boxes))
            every.append(logits)
            ends = np.cumsum([len(b) for b in boxes])[:-1]
            split = list(zip(boxes, np.split(logits, ends), np.split(deltas, ends), self.images))
            if number + 1 < len(stages):
                boxes = [_refined(stage, *part) for part in split]
        averages = np.split(_mean(every), ends)
        return [
            box_candidates(self.settings, stage, b, average, d, image)
            for (b, _, d, image), average in zip(split, averages)
        ]

    def with_masks(self, candidates: Sequence[Candidates]) -> List[Detections]:
        """Masks of detections; boxes become those of the original size."""
        masks = self._mask_values([c.boxes for c in candidates], np.concatenate([c.labels for c in candidates]))
        parts = np.split(masks, np.cumsum([len(c.boxes) for c in candidates])[:-1])
        found = []
        for (boxes, scores, labels), part, image in zip(candidates, parts, self.images):
            boxes = boxes / np.array([*image.scale] * 2, np.float32)
            pasted = paste(part, boxes, image.original, self.settings.mask_threshold)
            found.append(Detections(boxes, scores, labels, pasted))
        return found

    def _mask_values(self, boxes: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
        if not len(labels):
            return np.zeros((0, 1, 1), np.float32)
        every, features, last = [], np.zeros(0, np.float32), None
        for number, stage in enumerate(self.settings.mask):
            if stage.align != last:  # the stages of a cascade read the same features
                features, last = self._features(stage.align, boxes), stage.align
            every.append(sigmoid(self.heads.mask(number, features, labels)))
        return _mean(every)


def _mean(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return sum(arrays[1:], arrays[0]) / np.float32(len(arrays))


def _refined(
    stage: BoxStage, boxes: np.ndarray, logits: np.ndarray, deltas: np.ndarray, image: ImageInfo
) -> np.ndarray:
    """RoIs of the next stage: the class of the best score moves its box (Cascade R-CNN, section 4)."""
    if not stage.class_agnostic:
        labels = logits[:, :-1].argmax(1)
        deltas = deltas.reshape(len(deltas), -1, 4)[np.arange(len(deltas)), labels]
    return decode(stage.coding, boxes, deltas, image.shape)
