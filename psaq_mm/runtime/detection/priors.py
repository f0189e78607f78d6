# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Anchors and points of the cells of a pyramid."""

from typing import Tuple

import numpy as np

from psaq_mm.runtime.detection.settings import Priors

__all__ = ['level_priors']


def level_priors(priors: Priors, level: int, size: Tuple[int, int], positions: np.ndarray) -> np.ndarray:
    """Priors of one level at flat positions.

    Args:
        priors: Of all levels.
        level: Number of the level.
        size: Its (height, width) in cells.
        positions: (n,), counted row by row, all priors of a cell one after the other.

    Returns:
        float32 boxes (n, 4), or points (n, 2) for ``kind='points'`` and ``centers=True``, in pixels.
    """
    width, height = np.float32(priors.strides[level][0]), np.float32(priors.strides[level][1])
    if priors.kind == 'points':
        rows, columns = np.divmod(positions, size[1])
        offset = np.float32(priors.offset)
        return np.stack([(columns.astype(np.float32) + offset) * width, (rows.astype(np.float32) + offset) * height], 1)
    anchors = np.array(priors.base_anchors[level], np.float32)
    cells, kinds = np.divmod(positions, len(anchors))
    rows, columns = np.divmod(cells, size[1])
    x, y = columns.astype(np.float32) * width, rows.astype(np.float32) * height
    boxes = anchors[kinds] + np.stack([x, y, x, y], 1)
    return (boxes[:, 2:] + boxes[:, :2]) / 2 if priors.centers else boxes
