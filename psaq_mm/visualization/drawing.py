# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a detector or segmentor says of a picture, drawn onto it."""

from typing import Optional, Sequence, Tuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from psaq_mm.errors import DataError

__all__ = ['draw_detections', 'draw_label_map']

Colour = Tuple[int, int, int]

MASK_OPACITY = 0.45
MAP_OPACITY = 0.7
IGNORED = (255, 255, 255)  # labels outside the palette, such as 255 for "no class"


def _font(size: int):
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has its bitmap font in one size only
        return ImageFont.load_default()


def _enlarged(picture: np.ndarray, zoom: int) -> np.ndarray:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise DataError(f'an array of {picture.dtype} and shape {picture.shape} is no picture: give uint8, (H, W, 3)')
    size = picture.shape[1] * zoom, picture.shape[0] * zoom
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)).copy()


def _readable_on(colour: Colour) -> Colour:
    """Black or white, whichever has the greater contrast on ``colour``."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


def _outline_of(mask: np.ndarray) -> np.ndarray:
    """Pixels of ``mask`` (H, W) with a neighbour outside it."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def draw_detections(
    picture: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int],
    classes: Sequence[str],
    palette: Sequence[Colour],
    scores: Optional[Sequence[float]] = None,
    masks: Optional[np.ndarray] = None,
    zoom: int = 2,
) -> np.ndarray:
    """Boxes, masks and class names on a picture.

    Args:
        picture: (H, W, 3), uint8, RGB.
        boxes: (n, 4): left, top, right, bottom in pixels of ``picture``.
        labels: n indices into ``classes`` and ``palette``.
        classes: Names of the classes.
        palette: A colour a class, RGB.
        scores: n confidences in 0 .. 1, shown after the name. None: ground truth, without.
        masks: (n, H, W), bool. None: boxes alone.
        zoom: The drawing is this many times as large as ``picture``, so that lines and letters stay fine.

    Returns:
        (zoom * H, zoom * W, 3), uint8, RGB.

    Raises:
        DataError: The picture is none, or boxes and labels differ in number.
    """
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    if len(boxes) != len(labels):
        raise DataError(f'{len(boxes)} boxes and {len(labels)} labels: give one of each an object')
    # The least certain first, so that the names of the most certain stay on top.
    order = np.argsort(scores) if scores is not None else np.arange(len(boxes))
    canvas = _enlarged(picture, zoom).astype(np.float32)
    if masks is not None:
        for i in order:
            mask = np.asarray(masks[i], dtype=bool).repeat(zoom, 0).repeat(zoom, 1)
            colour = np.array(palette[labels[i]], np.float32)
            canvas[mask] = (1 - MASK_OPACITY) * canvas[mask] + MASK_OPACITY * colour
            canvas[_outline_of(mask)] = colour
    image = Image.fromarray(canvas.round().astype(np.uint8))
    draw, font = ImageDraw.Draw(image), _font(7 * zoom)
    for i in order:
        colour = tuple(int(v) for v in palette[labels[i]])
        left, top, right, bottom = (boxes[i] * zoom).tolist()
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=zoom)
        text = classes[labels[i]] + (f' {scores[i]:.2f}' if scores is not None else '')
        _write_name(draw, text, left, top, colour, font, image.size)
    return np.asarray(image)


def _write_name(
    draw: ImageDraw.ImageDraw, text: str, left: float, top: float, colour: Colour, font, size: Tuple[int, int]
) -> None:
    """A name on a strip of its colour above a box's corner, or inside the picture where there is no room above."""
    x0, y0, x1, y1 = draw.textbbox((0, 0), text, font=font)
    width, height = x1 + 4, y1 + 3
    left = min(max(left, 0), max(size[0] - width, 0))
    top = top - height if top >= height else max(top, 0)
    draw.rectangle((left, top, left + width, top + height), fill=colour)
    draw.text((left + 2, top + 1), text, fill=_readable_on(colour), font=font)


def draw_label_map(
    picture: np.ndarray,
    labels: np.ndarray,
    palette: Sequence[Colour],
    clear: Sequence[int] = (),
    opacity: float = MAP_OPACITY,
    zoom: int = 2,
) -> np.ndarray:
    """A segmentation over its picture.

    Args:
        picture: (H, W, 3), uint8, RGB.
        labels: (H, W), indices into ``palette``; any other number is drawn white.
        palette: A colour a class, RGB.
        clear: Labels that are not painted, so that the picture is seen there: a background.
        opacity: Of the colours: 0 the picture alone, 1 the map alone.
        zoom: The drawing is this many times as large as ``picture``.

    Returns:
        (zoom * H, zoom * W, 3), uint8, RGB.

    Raises:
        DataError: Picture and map differ in size.
    """
    labels = np.asarray(labels)
    if labels.shape != picture.shape[:2]:
        raise DataError(
            f'a map of {labels.shape} does not cover a picture of {picture.shape[:2]}: give one label a pixel'
        )
    colours = np.array(list(palette) + [IGNORED], np.float32)
    known = np.where((labels >= 0) & (labels < len(palette)), labels, len(palette)).astype(int)
    painted = colours[known].repeat(zoom, 0).repeat(zoom, 1)
    covered = (opacity * ~np.isin(known, clear))[..., None].repeat(zoom, 0).repeat(zoom, 1)
    blend = (1 - covered) * _enlarged(picture, zoom).astype(np.float32) + covered * painted
    return blend.round().clip(0, 255).astype(np.uint8)
