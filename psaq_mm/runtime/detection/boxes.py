# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Decoding of boxes, in float32 and in the order of mmdet's operations."""

from typing import Optional, Tuple

import numpy as np

from psaq_mm.runtime.detection.arrays import exponential, softmax
from psaq_mm.runtime.detection.settings import BoxCoding

__all__ = ['decode', 'expected_distances', 'large_enough', 'scaled']


def decode(coding: BoxCoding, priors: np.ndarray, values: np.ndarray, shape: Tuple[int, int]) -> np.ndarray:
    """Boxes out of priors and what a head says of them.

    Args:
        coding: How. With ``'delta'``: R-CNN (https://arxiv.org/abs/1311.2524), appendix C.
        priors: float32 boxes (n, 4), or points (n, 2) for ``'distance'``.
        values: float32 (n, 4): dx, dy, dw, dh; or distances to the left, upper, right and lower side in pixels.
        shape: (height, width) of the picture, at which boxes are cut.

    Returns:
        float32 (n, 4): x1, y1, x2, y2.
    """
    if coding.kind == 'distance':
        boxes = np.concatenate([priors - values[:, :2], priors + values[:, 2:]], 1)
    else:
        boxes = _from_deltas(coding, priors, values)
    return _clipped(boxes, shape) if coding.clip else boxes


def _from_deltas(coding: BoxCoding, priors: np.ndarray, values: np.ndarray) -> np.ndarray:
    deltas = values * np.array(coding.stds, np.float32) + np.array(coding.means, np.float32)
    center = (priors[:, :2] + priors[:, 2:]) * np.float32(0.5)
    size = priors[:, 2:] - priors[:, :2]
    shift = size * deltas[:, :2]
    limit = np.float32(coding.max_ratio)
    if coding.center_clamp is None:
        ratio = np.clip(deltas[:, 2:], -limit, limit)
    else:
        reach = np.float32(coding.center_clamp)
        shift, ratio = np.clip(shift, -reach, reach), np.minimum(deltas[:, 2:], limit)
    center = center + shift
    half = size * exponential(ratio) * np.float32(0.5)
    return np.concatenate([center - half, center + half], 1)


def _clipped(boxes: np.ndarray, shape: Tuple[int, int]) -> np.ndarray:
    height, width = shape
    return np.clip(boxes, np.float32(0), np.array([width, height, width, height], np.float32))


def expected_distances(values: np.ndarray, reg_max: int, stride: float) -> np.ndarray:
    """Distances out of their distributions over 0 to ``reg_max`` strides (Generalized Focal Loss, section 3.3).

    Args:
        values: Logits (n, 4 * (reg_max + 1)).
        reg_max: Greatest distance in strides.
        stride: Pixels of a cell.

    Returns:
        float32 (n, 4), in pixels.
    """
    shares = softmax(values.reshape(-1, reg_max + 1))
    return (shares @ np.arange(reg_max + 1, dtype=np.float32)).reshape(-1, 4) * np.float32(stride)


def large_enough(boxes: np.ndarray, min_size: float) -> Optional[np.ndarray]:
    """Positions of boxes whose width and height are larger than ``min_size``; None where all boxes count."""
    if min_size < 0:
        return None
    size = boxes[:, 2:] - boxes[:, :2]
    return np.flatnonzero((size > np.float32(min_size)).all(1))


def scaled(boxes: np.ndarray, scale: Tuple[float, float]) -> np.ndarray:
    """Boxes of a resized picture in pixels of the original one; ``scale`` is (resized / original) of x and y."""
    return boxes * np.array([1 / scale[0], 1 / scale[1]] * 2, np.float32)
