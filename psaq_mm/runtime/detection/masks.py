# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Pasting of masks into a picture, by matrix products: bilinear sampling is one factor for each axis."""

from typing import Iterator, Tuple

import numpy as np

__all__ = ['paste']

_PRODUCTS = 1 << 18
"""Multiplications of a matrix product for which OpenBLAS starts no threads: on a busy machine they wait for each other
far longer than the product takes. The results stay in the cache, too.
"""


def paste(masks: np.ndarray, boxes: np.ndarray, size: Tuple[int, int], threshold: float) -> np.ndarray:
    """Masks at the size of a picture.

    Args:
        masks: float32 probabilities (n, h, w), each of one box.
        boxes: float32 (n, 4), in pixels of the picture.
        size: (height, width) of the picture.
        threshold: A pixel is of the mask whose value at its centre is at least this.

    Returns:
        bool (n, height, width). Pixels outside of a box and its neighbours are False.
    """
    pasted = np.zeros((len(masks), *size), bool)
    if not len(masks):
        return pasted
    limit = np.float32(threshold)
    for mask, box, picture in zip(masks, boxes, pasted):
        x, y = (_reach(box[0], box[2], size[1]), _reach(box[1], box[3], size[0]))
        if x[0] >= x[1] or y[0] >= y[1]:
            continue
        columns = _samples(x, box[0], box[2], mask.shape[1])
        rows = _samples(y, box[1], box[3], mask.shape[0])
        stretched = np.concatenate([mask @ columns[part].T for part in _parts(columns, mask.shape[0])], 1)
        window = picture[y[0] : y[1], x[0] : x[1]]
        for part in _parts(rows, stretched.shape[1]):
            np.greater_equal(rows[part] @ stretched, limit, out=window[part])
    return pasted


def _parts(rows: np.ndarray, columns: int) -> Iterator[slice]:
    """Parts of a matrix whose products with one of ``columns`` columns are small."""
    step = max(1, _PRODUCTS // (rows.shape[1] * columns))
    return (slice(begin, begin + step) for begin in range(0, len(rows), step))


def _reach(low: np.float32, high: np.float32, limit: int) -> Tuple[int, int]:
    """The pixels of an axis that a box may reach."""
    return int(max(np.floor(low) - 1, 0)), int(min(np.ceil(high) + 1, limit))


def _samples(pixels: Tuple[int, int], low: np.float32, high: np.float32, cells: int) -> np.ndarray:
    """Weights (pixels, cells) of the cells of a mask at the centres of pixels."""
    with np.errstate(divide='ignore', invalid='ignore'):
        places = (np.arange(*pixels, dtype=np.float32) + np.float32(0.5) - low) / (high - low) * np.float32(2) - 1
    places[np.isinf(places)] = 0  # a box without area gets the middle of its mask
    places = ((places + 1) * np.float32(cells) - 1) / np.float32(2)
    # A cell counts by its distance from the place; a place outside of the mask has a neighbour of value 0.
    return np.maximum(1 - np.abs(places[:, None] - np.arange(cells, dtype=np.float32)), 0)
