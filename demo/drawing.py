"""What a detector or segmentor says of a picture, drawn onto it by MMEngine's Visualizer."""

from typing import Optional, Sequence, Tuple

import cv2
import numpy as np
from mmengine.visualization import Visualizer

from psaq_mm.errors import DataError

Colour = Tuple[int, int, int]

MASK_OPACITY = 0.45
MAP_OPACITY = 0.7
IGNORED = (255, 255, 255)  # labels outside the palette, such as 255 for "no class"
ZOOM = 2  # drawings are this many times as large as the picture, so that lines and letters stay fine


def _canvas(picture: np.ndarray) -> Visualizer:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise DataError(f'an array of {picture.dtype} and shape {picture.shape} is no picture: give uint8, (H, W, 3)')
    return Visualizer(image=cv2.resize(picture, None, fx=ZOOM, fy=ZOOM, interpolation=cv2.INTER_CUBIC))


def _readable_on(colour: Colour) -> str:
    """Black or white, whichever has the greater contrast on ``colour``."""
    red, green, blue = colour
    return 'black' if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else 'white'


def draw_detections(
    picture: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int],
    classes: Sequence[str],
    palette: Sequence[Colour],
    scores: Optional[Sequence[float]] = None,
    masks: Optional[np.ndarray] = None,
) -> np.ndarray:
    """Boxes, masks and class names on a picture.

    Args:
        picture: (H, W, 3), uint8, RGB.
        boxes: (n, 4): left, top, right, bottom in pixels of ``picture``.
        labels: n indices into ``classes`` and ``palette``.
        classes: Names of the classes.
        palette: A colour a class, RGB.
        scores: n confidences in 0 .. 1, shown after the name. None: ground truth, without. Names are left out where
            there is one class.
        masks: (n, H, W), bool. None: boxes alone.

    Returns:
        (ZOOM * H, ZOOM * W, 3), uint8, RGB.

    Raises:
        DataError: The picture is none, or boxes and labels differ in number.
    """
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4) * ZOOM
    if len(boxes) != len(labels):
        raise DataError(f'{len(boxes)} boxes and {len(labels)} labels: give one of each an object')
    # The least certain first, so that the most certain stays on top.
    order = np.argsort(scores) if scores is not None else np.arange(len(boxes))
    canvas = _canvas(picture)
    boxes = boxes.clip(0, [canvas.width - 1, canvas.height - 1] * 2)
    if masks is not None and len(order):
        # All at once: the canvas is copied in every call.
        grown = np.asarray(masks, dtype=bool)[order].repeat(ZOOM, 1).repeat(ZOOM, 2)
        colours = [tuple(palette[labels[i]]) for i in order]
        canvas.draw_binary_masks(grown, colors=colours, alphas=MASK_OPACITY)
        lines = [
            (line.reshape(-1, 2), colour)
            for mask, colour in zip(grown, colours)
            for line in cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
        ]
        if lines:
            outlines, edges = zip(*lines)
            canvas.draw_polygons(list(outlines), list(edges), line_widths=1, alpha=1)
    if len(classes) == 1 and len(order):  # dozens of the same name would cover the picture
        canvas.draw_bboxes(boxes, edge_colors=tuple(palette[0]), line_widths=1, alpha=1)
        return canvas.get_image()
    for i in order:
        colour = tuple(palette[labels[i]])
        canvas.draw_bboxes(boxes[i], edge_colors=colour, line_widths=ZOOM, alpha=1)
        name = classes[labels[i]] + (f' {scores[i]:.2f}' if scores is not None else '')
        _write_name(canvas, name, boxes[i], colour)
    return canvas.get_image()


def _write_name(canvas: Visualizer, name: str, box: np.ndarray, colour: Colour) -> None:
    """A name on a strip of its colour, above the box where there is room, at the side that is nearer the middle."""
    left, top, right, _ = box
    on_the_right = left + right > canvas.width
    canvas.draw_texts(
        name,
        np.array([min(right, canvas.width - 2) if on_the_right else max(left, 2), max(top, 2)]),
        font_sizes=5 * ZOOM,
        colors=_readable_on(colour),
        horizontal_alignments='right' if on_the_right else 'left',
        vertical_alignments='bottom' if top > 10 * ZOOM else 'top',
        bboxes=dict(facecolor=[channel / 255 for channel in colour], edgecolor='none', pad=1),
    )


def draw_label_map(
    picture: np.ndarray,
    labels: np.ndarray,
    palette: Sequence[Colour],
    clear: Sequence[int] = (),
    opacity: float = MAP_OPACITY,
) -> np.ndarray:
    """A segmentation over its picture.

    Args:
        picture: (H, W, 3), uint8, RGB.
        labels: (H, W), indices into ``palette``; any other number is drawn white.
        palette: A colour a class, RGB.
        clear: Labels that are not painted, so that the picture is seen there: a background.
        opacity: Of the colours: 0 the picture alone, 1 the map alone.

    Returns:
        (ZOOM * H, ZOOM * W, 3), uint8, RGB.

    Raises:
        DataError: Picture and map differ in size.
    """
    labels = np.asarray(labels)
    if labels.shape != picture.shape[:2]:
        raise DataError(
            f'a map of {labels.shape} does not cover a picture of {picture.shape[:2]}: give one label a pixel'
        )
    colours = [*map(tuple, palette), IGNORED]
    known = np.where((labels >= 0) & (labels < len(palette)), labels, len(palette)).repeat(ZOOM, 0).repeat(ZOOM, 1)
    painted = [label for label in np.unique(known).tolist() if label not in clear]
    canvas = _canvas(picture)
    if painted:
        masks = np.stack([known == label for label in painted])
        canvas.draw_binary_masks(masks, colors=[colours[label] for label in painted], alphas=float(opacity))
    return canvas.get_image()
