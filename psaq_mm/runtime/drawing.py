# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Predictions drawn onto pictures with OpenCV."""

import colorsys
from typing import List, Optional, Sequence, Tuple

import numpy as np

from psaq_mm.runtime.predictions import Prediction
from psaq_mm.runtime.preparation import opencv

__all__ = ['drawn', 'palette_of']

_OPACITY = 0.5
_NAMED = 10  # boxes of one class that get their name and score
_STEP = 0.61803398875
"""Between the hues of neighbouring classes: the golden ratio, so that no two of a few classes are near each other."""

Colour = Tuple[int, int, int]


def palette_of(count: int, given: Optional[Sequence[Sequence[int]]] = None) -> List[Colour]:
    """A colour (blue, green, red) for each class.

    Args:
        count: Number of classes.
        given: Colours (red, green, blue) of the first classes.
    """
    colours: List[Colour] = [(int(c[2]), int(c[1]), int(c[0])) for c in given or () if len(c) == 3]
    for number in range(len(colours), count):
        red, green, blue = colorsys.hsv_to_rgb(number * _STEP % 1, 0.75, 0.95)
        colours.append((round(255 * blue), round(255 * green), round(255 * red)))
    return colours


def drawn(prediction: Prediction, picture: np.ndarray, score_threshold: float) -> np.ndarray:
    """A copy of a picture (H, W, 1 or 3) with its prediction: masks, boxes and names; the colours of a label map; or
    the first classes of a classifier.
    """
    canvas = np.repeat(picture, 3 // picture.shape[2], axis=2).astype(np.uint8)
    if prediction.task == 'segmentation':
        return _with_map(prediction, canvas)
    if prediction.task == 'classification':
        return _with_lines(canvas, _class_lines(prediction))
    return _with_boxes(prediction.above(score_threshold), canvas)


def _with_map(prediction: Prediction, canvas: np.ndarray) -> np.ndarray:
    labels = prediction.label_map
    if labels is None:
        return canvas
    count = max(len(prediction.classes), int(labels.max()) + 1)
    colours = np.array(palette_of(count, prediction.palette), np.uint8)
    return opencv().addWeighted(canvas, 1 - _OPACITY, colours[labels], _OPACITY, 0)


def _class_lines(prediction: Prediction) -> List[str]:
    scores = prediction.scores if prediction.scores is not None else ()
    return [f'{name} {score:.2f}' for name, score in zip(prediction.names or (), scores)][:3]


def _text_size(canvas: np.ndarray) -> Tuple[float, int]:
    """Scale of letters, and thickness of lines, for the size of a picture."""
    side = min(canvas.shape[:2])
    return min(max(side / 900, 0.35), 1.5), max(1, round(side / 400))


def _write(canvas: np.ndarray, text: str, corner: Tuple[int, int], colour: Colour) -> int:
    """Write a text on a plain ground, in place; its height in pixels.

    Args:
        canvas: Of the picture.
        text: OpenCV has letters of ASCII alone; others are written as question marks.
        corner: x and y of its upper left corner; it is moved into the picture.
        colour: Of the ground.
    """
    cv2 = opencv()
    scale, thickness = _text_size(canvas)
    text = text.encode('ascii', 'replace').decode()
    (width, height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    full = height + base + 2
    x = max(0, min(corner[0], canvas.shape[1] - width - 2))
    y = max(0, min(corner[1], canvas.shape[0] - full))
    cv2.rectangle(canvas, (x, y), (x + width + 1, y + full - 1), colour, -1)
    dark = 0.114 * colour[0] + 0.587 * colour[1] + 0.299 * colour[2] < 128
    ink = (255, 255, 255) if dark else (0, 0, 0)
    cv2.putText(canvas, text, (x + 1, y + height + 1), cv2.FONT_HERSHEY_SIMPLEX, scale, ink, 1, cv2.LINE_AA)
    return full


def _with_lines(canvas: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    top = 0
    for line in lines:
        top += _write(canvas, line, (0, top), (0, 0, 0))
    return canvas


def _with_boxes(prediction: Prediction, canvas: np.ndarray) -> np.ndarray:
    cv2 = opencv()
    boxes, labels, scores = prediction.boxes, prediction.labels, prediction.scores
    if boxes is None or labels is None or scores is None or not len(boxes):
        return canvas
    colours = palette_of(max(len(prediction.classes), int(labels.max()) + 1), prediction.palette)
    if prediction.masks is not None:
        layer = canvas.copy()
        for mask, label in zip(prediction.masks[::-1], labels[::-1]):  # the best one is on top
            layer[mask] = colours[label]
        canvas = cv2.addWeighted(canvas, 1 - _OPACITY, layer, _OPACITY, 0)
    thickness = _text_size(canvas)[1]
    rows = list(zip(np.rint(boxes).astype(int).tolist(), labels, prediction.names or (), scores))[::-1]
    for (x1, y1, x2, y2), label, _, _ in rows:
        cv2.rectangle(canvas, (x1, y1), (x2, y2), colours[label], thickness)
    if len(prediction.classes) == 1 and len(rows) > _NAMED:  # the same name all over would hide what was found
        return canvas
    for (x1, y1, _, _), label, name, score in rows:
        _write(canvas, f'{name} {score:.2f}', (x1, y1), colours[label])
    return canvas
