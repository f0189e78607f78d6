# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Non-maximum suppression as mmcv's ``batched_nms`` does it on a CPU.

A box is kept whose overlap with a better one equals the threshold. Areas are width x height, without a pixel added.
"""

from typing import Optional, Tuple

import numpy as np

from psaq_mm.runtime.detection.arrays import descending
from psaq_mm.runtime.detection.settings import Suppression

__all__ = ['nms', 'soft_nms', 'suppress']

_BLOCK = 64
"""Boxes whose overlaps with all others are worked out at once."""


def suppress(
    settings: Suppression, boxes: np.ndarray, scores: np.ndarray, groups: np.ndarray, limit: int = -1
) -> Tuple[np.ndarray, np.ndarray]:
    """Which boxes are kept where a box suppresses boxes of its own group alone.

    Args:
        settings: The rule.
        boxes: float32 (n, 4).
        scores: float32 (n,).
        groups: int64 (n,): class or level of each box.
        limit: Greatest number of boxes that are kept; negative: all.

    Returns:
        Positions of kept boxes by falling score, and their scores, which soft suppression lowers.
    """
    limit = min((n for n in (limit, settings.max_num) if n > 0), default=len(boxes)) if limit else 0
    if settings.kind == 'none' or not len(boxes):
        order = descending(scores)[:limit]
        return order, scores[order]
    if not settings.class_agnostic:
        # Boxes of different groups are moved apart. Adding the distance rounds them, which decides close cases.
        boxes = boxes + (groups.astype(np.float32) * (boxes.max() + np.float32(1)))[:, None]
    if len(boxes) < settings.split_at:
        return _kept(settings, boxes, scores, limit)
    kept, values = [], []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        positions, left = _kept(settings, boxes[members], scores[members], limit)
        kept.append(members[positions])
        values.append(left)
    positions, left = np.concatenate(kept), np.concatenate(values)
    by_position = np.argsort(positions)
    positions, left = positions[by_position], left[by_position]
    order = descending(left)[:limit]
    return positions[order], left[order]


def _kept(settings: Suppression, boxes: np.ndarray, scores: np.ndarray, limit: int) -> Tuple[np.ndarray, np.ndarray]:
    if settings.kind == 'soft_nms':
        positions, left = soft_nms(boxes, scores, settings)
        return positions[:limit], left[:limit]
    positions = nms(boxes, scores, settings.iou_threshold, limit)
    return positions, scores[positions]


def nms(boxes: np.ndarray, scores: np.ndarray, iou_threshold: float, limit: Optional[int] = None) -> np.ndarray:
    """Positions of kept boxes by falling score.

    Args:
        boxes: float32 (n, 4).
        scores: float32 (n,).
        iou_threshold: A box is dropped whose overlap with a better, kept one is larger.
        limit: The search stops with the box of this number. Defaults to None, all.
    """
    limit = len(boxes) if limit is None else limit
    order, threshold = descending(scores), np.float32(iou_threshold)
    columns = np.ascontiguousarray(boxes[order].T)
    areas = (columns[2] - columns[0]) * (columns[3] - columns[1])
    positions = np.arange(len(order))
    kept = []
    count = 0
    while len(positions) and count < limit:
        # The best boxes that are left suppress each other one by one, then all others at once.
        inside = _above(columns[:, :_BLOCK], areas[:_BLOCK], columns[:, :_BLOCK], areas[:_BLOCK], threshold)
        alive = np.ones(len(inside), bool)
        for i in range(len(inside) - 1):
            if alive[i]:
                alive[i + 1 :] &= ~inside[i, i + 1 :]
        chosen = np.flatnonzero(alive)
        kept.append(positions[chosen])
        count += len(chosen)
        rest = slice(len(inside), None)
        dropped = _above(columns[:, chosen], areas[chosen], columns[:, rest], areas[rest], threshold).any(0)
        left = np.flatnonzero(~dropped) + len(inside)
        columns, areas, positions = columns[:, left], areas[left], positions[left]
    return order[np.concatenate(kept)[:limit]] if kept else order[:0]


def _above(
    one: np.ndarray, one_areas: np.ndarray, other: np.ndarray, other_areas: np.ndarray, threshold: np.float32
) -> np.ndarray:
    """Whether boxes (4, n) and (4, m) overlap by more than a threshold, (n, m). Boxes without area never do."""
    width = np.minimum(one[2][:, None], other[2]) - np.maximum(one[0][:, None], other[0])
    height = np.minimum(one[3][:, None], other[3]) - np.maximum(one[1][:, None], other[1])
    common = np.maximum(width, 0, out=width) * np.maximum(height, 0, out=height)
    with np.errstate(divide='ignore', invalid='ignore'):
        return common / (one_areas[:, None] + other_areas - common) > threshold


def soft_nms(boxes: np.ndarray, scores: np.ndarray, settings: Suppression) -> Tuple[np.ndarray, np.ndarray]:
    """Soft suppression (https://arxiv.org/abs/1704.04503): a box lowers the scores of those that it overlaps.

    Args:
        boxes: float32 (n, 4).
        scores: float32 (n,).
        settings: ``iou_threshold``, ``method``, ``sigma`` and ``min_score``.

    Returns:
        Positions in the order in which boxes were chosen, and their lowered scores.
    """
    columns, scores, positions = boxes.T.copy(), scores.copy(), np.arange(len(boxes))
    areas = (columns[2] - columns[0]) * (columns[3] - columns[1])
    kept, values = [], []
    while len(positions):
        i = int(scores.argmax())
        kept.append(positions[i])
        values.append(scores[i])
        overlap = _overlaps(columns[:, i], areas[i], columns, areas)
        scores = scores * _weights(overlap, settings)
        left = scores >= np.float32(settings.min_score)
        left[i] = False
        columns, areas, scores, positions = columns[:, left], areas[left], scores[left], positions[left]
    return np.array(kept, np.int64), np.array(values, np.float32)


def _overlaps(box: np.ndarray, area: np.float32, others: np.ndarray, areas: np.ndarray) -> np.ndarray:
    width = np.maximum(np.minimum(box[2], others[2]) - np.maximum(box[0], others[0]), 0)
    height = np.maximum(np.minimum(box[3], others[3]) - np.maximum(box[1], others[1]), 0)
    with np.errstate(divide='ignore', invalid='ignore'):
        return width * height / (area + areas - width * height)


def _weights(overlap: np.ndarray, settings: Suppression) -> np.ndarray:
    if settings.method == 'gaussian':
        return np.exp(-(overlap * overlap) / np.float32(settings.sigma))
    lowered = 1 - overlap if settings.method == 'linear' else np.zeros_like(overlap)
    return np.where(overlap >= np.float32(settings.iou_threshold), lowered, np.float32(1))
