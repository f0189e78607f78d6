# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""From the maps of a dense head to boxes: proposals of an RPN, detections of a one-stage detector."""

import math
from typing import NamedTuple, Sequence, Tuple

import numpy as np

from psaq_mm.runtime.detection.arrays import best, sigmoid, softmax
from psaq_mm.runtime.detection.boxes import decode, expected_distances, large_enough, scaled
from psaq_mm.runtime.detection.priors import level_priors
from psaq_mm.runtime.detection.settings import DenseSettings
from psaq_mm.runtime.detection.suppression import suppress

__all__ = ['Candidates', 'one_stage', 'proposals']

_LOGIT_MARGIN = 0.01
"""Below the threshold's logit: much more than what rounding in float32 moves a logit, up to scores of 0.9999."""


class Candidates(NamedTuple):
    """Boxes of one picture.

    Attributes:
        boxes: float32 (n, 4).
        scores: float32 (n,).
        labels: int64 (n,).
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def proposals(settings: DenseSettings, maps: Sequence[Sequence[np.ndarray]], shape: Tuple[int, int]) -> Candidates:
    """Proposals of an RPN for one picture (Faster R-CNN, https://arxiv.org/abs/1506.01497, section 3.1).

    Args:
        settings: Of the RPN.
        maps: Scores and deltas of each level, float32 (channels, h, w).
        shape: (height, width) of the resized picture.

    Returns:
        Boxes in pixels of the resized picture by falling score; labels are all 0.
    """
    boxes, scores, levels = [], [], []
    for level, (score_map, value_map) in enumerate(zip(*maps)):
        values = _activated(settings, score_map)[:, 0]
        positions = best(values, settings.nms_pre) if 0 < settings.nms_pre < len(values) else np.arange(len(values))
        boxes.append(_decoded(settings, level, value_map, positions, shape))
        scores.append(values[positions])
        levels.append(np.full(len(positions), level))
    candidates = _large(Candidates(np.concatenate(boxes), np.concatenate(scores), np.concatenate(levels)), settings)
    kept, scores_kept = suppress(settings.nms, *candidates, limit=settings.max_per_image)
    return Candidates(candidates.boxes[kept], scores_kept, np.zeros(len(kept), np.int64))


def one_stage(
    settings: DenseSettings,
    maps: Sequence[Sequence[np.ndarray]],
    shape: Tuple[int, int],
    scale: Tuple[float, float],
) -> Candidates:
    """Detections of a one-stage detector for one picture.

    Args:
        settings: Of its head.
        maps: Class scores, box values and, where the head gives it, centerness of each level: float32 (channels, h, w).
        shape: (height, width) of the resized picture.
        scale: (resized / original) of x and y.

    Returns:
        Boxes in pixels of the original picture by falling score.
    """
    levels = [_level(settings, level, level_maps, shape) for level, level_maps in enumerate(zip(*maps))]
    candidates = Candidates(*(np.concatenate(arrays) for arrays in zip(*levels)))
    candidates = _large(candidates._replace(boxes=scaled(candidates.boxes, scale)), settings)
    kept, scores = suppress(settings.nms, *candidates, limit=settings.max_per_image)
    return Candidates(candidates.boxes[kept], scores, candidates.labels[kept])


def _level(settings: DenseSettings, level: int, maps: Sequence[np.ndarray], shape: Tuple[int, int]) -> Candidates:
    positions, labels, values = _above_threshold(settings, maps[0])
    count = min(settings.nms_pre, len(values))
    order = best(values, count if count >= 0 else len(values) + count)  # mmdet cuts a list there: -1 drops the last
    positions, labels, values = positions[order], labels[order], values[order]
    boxes = _decoded(settings, level, maps[1], positions, shape)
    if len(maps) > 2:
        values = values * sigmoid(_rows(maps[2], 1)[positions, 0])
    return Candidates(boxes, values, labels)


def _above_threshold(settings: DenseSettings, score_map: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, labels and scores of a level that exceed the threshold, ordered by position, then label."""
    threshold = float(settings.score_threshold)
    if settings.activation != 'sigmoid' or not 0 < threshold < 1:
        scores = _activated(settings, score_map)
        positions, labels = np.nonzero(scores > np.float32(threshold))
        return positions, labels, scores[positions, labels]
    # A level may have millions of logits. Those that are clearly too low are left out before anything else is done.
    logit = math.log(threshold / (1 - threshold)) - _LOGIT_MARGIN
    channels, rows, columns = np.nonzero(score_map > np.float32(logit))
    priors, labels = np.divmod(channels, settings.channels)
    positions = (rows * score_map.shape[2] + columns) * (len(score_map) // settings.channels) + priors
    order = np.argsort(positions * settings.channels + labels)
    scores = sigmoid(score_map[channels, rows, columns])[order]
    above = scores > np.float32(threshold)
    return positions[order][above], labels[order][above], scores[above]


def _rows(array: np.ndarray, columns: int) -> np.ndarray:
    """A map (priors * columns, h, w) as (h * w * priors, columns)."""
    return array.transpose(1, 2, 0).reshape(-1, columns)


def _activated(settings: DenseSettings, score_map: np.ndarray) -> np.ndarray:
    scores = _rows(score_map, settings.channels)
    return sigmoid(scores) if settings.activation == 'sigmoid' else softmax(scores)[:, :-1]


def _decoded(
    settings: DenseSettings, level: int, value_map: np.ndarray, positions: np.ndarray, shape: Tuple[int, int]
) -> np.ndarray:
    width = 4 if settings.reg_max is None else 4 * (settings.reg_max + 1)
    values = _rows(value_map, width)[positions]
    if settings.reg_max is not None:
        values = expected_distances(values, settings.reg_max, settings.priors.strides[level][0])
    priors = level_priors(settings.priors, level, (value_map.shape[1], value_map.shape[2]), positions)
    return decode(settings.coding, priors, values, shape)


def _large(candidates: Candidates, settings: DenseSettings) -> Candidates:
    rows = large_enough(candidates.boxes, settings.min_size)
    return candidates if rows is None else Candidates(*(array[rows] for array in candidates))
