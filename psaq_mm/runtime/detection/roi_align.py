# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""RoIAlign (Mask R-CNN, https://arxiv.org/abs/1703.06870, section 3) of a pyramid, by matrix products.

A bin is the mean of bilinear samples on a grid. Weights, validity and mean of a sample are products of one factor for
each axis. So a RoI is two small products: rows of the map to rows of bins, then columns to columns. It is RoIAlign
itself, up to the order of the sums.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from psaq_mm.runtime.detection.settings import RoiAlignSettings

__all__ = ['Rois', 'roi_align', 'roi_levels']

_CHUNK = 64
"""RoIs that a thread takes at once."""


class Rois(NamedTuple):
    """RoIs of several pictures.

    Attributes:
        boxes: float32 (n, 4), in pixels of the resized picture.
        pictures: int64 (n,), number of the picture of each.
    """

    boxes: np.ndarray
    pictures: np.ndarray


def roi_levels(boxes: np.ndarray, finest_scale: float, levels: int) -> np.ndarray:
    """The level that each RoI reads (FPN, https://arxiv.org/abs/1612.03144, equation 1).

    Args:
        boxes: float32 (n, 4).
        finest_scale: Boxes with a side of less than twice this many pixels read level 0.
        levels: Number of levels.
    """
    size = boxes[:, 2:] - boxes[:, :2]
    scale = np.sqrt(size[:, 1] * size[:, 0])
    level = np.floor(np.log2(scale / np.float32(finest_scale) + np.float32(1e-6)))
    return np.clip(level, 0, levels - 1).astype(np.int64)


def roi_align(
    settings: RoiAlignSettings, levels: Sequence[np.ndarray], rois: Rois, threads: Optional[int] = None
) -> np.ndarray:
    """Features of RoIs.

    Args:
        settings: Bins, sampling and strides.
        levels: float32 maps (N, h, w, C), the first of the pyramid first; more than ``settings.strides`` are not read.
            Fast where the C values of a cell are adjacent in memory. Others are right, too.
        rois: May be none. One of size 0 gives zeros with the adaptive grid, as mmcv does.
        threads: That share the RoIs. Defaults to None, one.

    Returns:
        float32 (n, height, width, C).
    """
    count = len(settings.strides)
    features = np.empty((len(rois.boxes), *settings.size, levels[0].shape[-1]), np.float32)
    level_of = roi_levels(rois.boxes, settings.finest_scale, count)
    tasks: List[_Task] = []
    for level in range(count):
        members = np.flatnonzero(level_of == level)
        if len(members):
            tasks += _tasks(settings, levels[level], settings.strides[level], rois, members)

    def run(chunk: Sequence[_Task]) -> None:
        for task in chunk:
            # Columns first along the rows: products are so small that BLAS starts no threads of its own.
            partial = np.matmul(task.rows, task.window.transpose(1, 0, 2))  # (w, bins, C)
            np.matmul(task.columns, partial.transpose(1, 0, 2), out=features[task.roi])

    chunks = [tasks[i : i + _CHUNK] for i in range(0, len(tasks), _CHUNK)]
    if threads is None or threads < 2 or len(chunks) < 2:
        run(tasks)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, chunks))
    return features


class _Task(NamedTuple):
    """A RoI: its number, the cells it reads (h, w, C), and the weights (bins, h) and (bins, w) of the axes."""

    roi: int
    window: np.ndarray
    rows: np.ndarray
    columns: np.ndarray


def _tasks(settings: RoiAlignSettings, maps: np.ndarray, stride: float, rois: Rois, members: np.ndarray) -> List[_Task]:
    shift = np.float32(0.5 if settings.aligned else 0)
    corners = rois.boxes[members] * np.float32(1 / stride) - shift
    size = corners[:, 2:] - corners[:, :2]
    if not settings.aligned:
        size = np.maximum(size, np.float32(1))
    rows = _axis(corners[:, 1], size[:, 1], settings.size[0], maps.shape[1], settings.sampling_ratio)
    columns = _axis(corners[:, 0], size[:, 0], settings.size[1], maps.shape[2], settings.sampling_ratio)
    return [
        _Task(roi, maps[rois.pictures[roi], y : y + h.shape[1], x : x + w.shape[1]], h, w)
        for roi, (y, h), (x, w) in zip(members, rows, columns)
    ]


def _axis(start: np.ndarray, size: np.ndarray, bins: int, limit: int, ratio: int) -> List[Tuple[int, np.ndarray]]:
    """Weights of the cells of an axis for the bins of each RoI.

    Args:
        start: Where RoIs begin, in cells, float32 (n,).
        size: Their sizes in cells.
        bins: Bins of a RoI.
        limit: Number of cells.
        ratio: Samples of a bin; 0: one a cell.

    Returns:
        For each RoI the first cell it reads, and float32 weights (bins, cells).
    """
    bin_size = size / np.float32(bins)
    grids = np.full(len(start), ratio) if ratio > 0 else np.ceil(bin_size).astype(np.int64)
    axes: List[Tuple[int, np.ndarray]] = [(0, np.zeros((bins, 1), np.float32))] * len(start)  # of RoIs of size 0
    for grid in np.unique(grids[grids > 0]):
        members = np.flatnonzero(grids == grid)
        begin, step = start[members][:, None, None], bin_size[members][:, None, None]
        inside = (np.arange(grid, dtype=np.float32) + np.float32(0.5)) * step / np.float32(grid)
        places = begin + np.arange(bins, dtype=np.float32)[:, None] * step + inside  # (n, bins, grid)
        axes_of_grid = _weights(places, limit)
        for member, axis in zip(members, axes_of_grid):
            axes[member] = axis
    return axes


def _weights(places: np.ndarray, limit: int) -> List[Tuple[int, np.ndarray]]:
    """Weights of cells for samples at places (n, bins, grid), see :func:`_axis`."""
    count, bins, grid = places.shape
    valid = (places >= -1) & (places <= limit)
    places = np.clip(places, 0, limit - 1)
    low = places.astype(np.int64)
    fraction: np.ndarray = places - low.astype(np.float32)
    first, last = low.min((1, 2)), np.minimum(low.max((1, 2)) + 1, limit - 1)
    length = int((last - first).max()) + 2  # one more than the cells: the last cell has no neighbour, whose weight is 0
    rows = (np.arange(count)[:, None] * bins + np.arange(bins)) * length - first[:, None]
    flat = (rows[:, :, None] + low).ravel()
    total = count * bins * length
    weights = np.bincount(flat, ((1 - fraction) * valid).ravel(), total)
    weights += np.bincount(flat + 1, (fraction * valid).ravel(), total)
    weights = (weights.reshape(count, bins, length) / grid).astype(np.float32)
    return [(int(f), w[:, : e + 1 - f]) for f, e, w in zip(first, last, weights)]
