# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Line charts side by side as one picture, drawn with Pillow alone: what a run reaches, against steps and against
seconds.
"""

import math
from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from psaq_mm.errors import DataError

__all__ = ['Line', 'Panel', 'line_chart', 'ticks_of']

INK, SOFT, RULE = (29, 31, 33), (91, 97, 102), (223, 226, 228)
COLOURS = (
    (11, 98, 196),
    (180, 72, 10),
    (74, 122, 42),
    (138, 63, 160),
    (0, 128, 122),
    (176, 40, 106),
    (138, 106, 0),
    (95, 106, 117),
)
"""Those of the page's style sheet, in the same order."""
DASHES = ((), (10, 6), (3, 5), (14, 6, 3, 6))
"""Lengths of strokes and gaps in pixels: colours come with another one the second time round."""

_FINE = 2  # drawn this many times as large, and made smaller: smooth lines
_MARGIN = dict(left=58, right=18, top=22, bottom=48)


class Line(NamedTuple):
    """A curve of a chart.

    Attributes:
        label: In the legend.
        x: Positions, ascending.
        y: Values at them.
        low, high: Least and greatest of what ``y`` is the mean of, drawn as a band; None: no band.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Optional[Sequence[float]] = None
    high: Optional[Sequence[float]] = None


class Panel(NamedTuple):
    """One chart: the names of its axes, and its lines."""

    x_label: str
    y_label: str
    lines: Sequence[Line]


def ticks_of(low: float, high: float, count: int = 5) -> List[float]:
    """Round numbers within ``low`` .. ``high``, about ``count`` of them, evenly spaced by 1, 2 or 5 times a power of
    ten.
    """
    if not high > low:
        return [low]
    power = 10 ** math.floor(math.log10((high - low) / count))
    step = next(power * f for f in (1, 2, 5, 10) if (high - low) / (power * f) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(step * k, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(title: str, panels: Sequence[Panel], size: Tuple[int, int] = (560, 360)) -> np.ndarray:
    """Panels side by side under one title and one legend.

    A line has the colour of its place in the first panel; a label that comes again in another panel has the same.

    Args:
        title: Above everything.
        panels: One or more.
        size: (width, height) of a panel in pixels.

    Returns:
        Shape (H, W, 3), uint8, RGB.

    Raises:
        DataError: There are no lines, or one lacks points, has values for other positions than its own, or NaN.
    """
    lines = [line for panel in panels for line in panel.lines]
    if not lines:
        raise DataError(f'the chart {title!r} has no lines: give at least one')
    for line in lines:
        parts = [part for part in (line.y, line.low, line.high) if part is not None]
        if (
            not len(line.x)
            or any(len(part) != len(line.x) for part in parts)
            or not np.isfinite([*line.x, *sum(map(list, parts), [])]).all()
        ):
            raise DataError(
                f'the line {line.label!r} of the chart {title!r} has {len(line.x)} positions and {len(line.y)} values: '
                f'give as '
                'many of each, one or more, all finite'
            )
    names = list(dict.fromkeys(line.label for line in lines))
    (width, height), count = size, len(panels)
    columns = max(1, min(len(names), count * width // 190))
    legend = 34 + 22 * -(-len(names) // columns)
    canvas = _Canvas(width * count, height + legend)
    canvas.text(16, 12, title, 16, INK)
    for place, name in enumerate(names):
        x, y = 18 + place % columns * ((width * count - 36) // columns), 40 + place // columns * 22
        canvas.stroke([(x, y + 8), (x + 30, y + 8)], *_style(place))
        canvas.text(x + 38, y + 8, name, 12, SOFT, 'lm')
    for place, panel in enumerate(panels):
        _draw_panel(canvas, panel, names, (place * width, legend), size)
    return canvas.array()


def _style(place: int) -> Tuple[Tuple[int, int, int], Sequence[int]]:
    return COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS) % len(DASHES)]


def _range(values: Sequence[float], pad: float) -> Tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * pad or max(abs(high), 1.0) * 0.05
    return low - (room if pad else 0), high + room * (1 if pad else 0) if high > low else high + room


def _draw_panel(
    canvas: '_Canvas', panel: Panel, names: Sequence[str], corner: Tuple[int, int], size: Tuple[int, int]
) -> None:
    left, top = corner[0] + _MARGIN['left'], corner[1] + _MARGIN['top']
    right, bottom = corner[0] + size[0] - _MARGIN['right'], corner[1] + size[1] - _MARGIN['bottom']
    x_low, x_high = _range([x for line in panel.lines for x in line.x], 0)
    y_low, y_high = _range(
        [y for line in panel.lines for part in (line.y, line.low, line.high) if part is not None for y in part], 0.06
    )

    def at(x: float, y: float) -> Tuple[float, float]:
        return (
            left + (x - x_low) / (x_high - x_low) * (right - left),
            bottom - (y - y_low) / (y_high - y_low) * (bottom - top),
        )

    for y in ticks_of(y_low, y_high):
        canvas.stroke([(left, at(x_low, y)[1]), (right, at(x_low, y)[1])], RULE, thick=1)
        canvas.text(left - 8, at(x_low, y)[1], f'{y:g}', 12, SOFT, 'rm')
    for x in ticks_of(x_low, x_high):
        canvas.stroke([(at(x, y_low)[0], bottom), (at(x, y_low)[0], bottom + 4)], SOFT, thick=1)
        canvas.text(at(x, y_low)[0], bottom + 7, f'{x:g}', 12, SOFT, 'mt')
    canvas.stroke([(left, bottom), (right, bottom)], SOFT, thick=1)
    canvas.text((left + right) / 2, bottom + 26, panel.x_label, 12, INK, 'mt')
    canvas.text(left - 42, top - 18, panel.y_label, 12, INK)
    for line in panel.lines:  # bands below all lines
        if line.low is not None and line.high is not None and len(line.x) > 1:
            edge = [at(*p) for p in zip(line.x, line.high)] + [at(*p) for p in zip(line.x, line.low)][::-1]
            canvas.fill(edge, _style(names.index(line.label))[0])
    for line in panel.lines:
        colour, dashes = _style(names.index(line.label))
        points = [at(*p) for p in zip(line.x, line.y)]
        canvas.stroke(points, colour, dashes)
        for point in points:
            canvas.dot(point, colour)


class _Canvas:
    """White paper with coordinates in pixels of the result."""

    def __init__(self, width: int, height: int):
        self.size = (width, height)
        self.image = Image.new('RGB', (width * _FINE, height * _FINE), (255, 255, 255))
        self.draw = ImageDraw.Draw(self.image)

    def _fine(self, points: Sequence[Tuple[float, float]]) -> List[Tuple[float, float]]:
        return [(x * _FINE, y * _FINE) for x, y in points]

    def text(self, x: float, y: float, words: str, size: int, colour: Tuple[int, int, int], anchor: str = 'lt') -> None:
        try:
            font = ImageFont.load_default(size * _FINE)
        except TypeError:  # Pillow before 10.1 has its bitmap font in one size only, and no anchors for it
            font, anchor = ImageFont.load_default(), None
        self.draw.text((x * _FINE, y * _FINE), words, fill=colour, font=font, anchor=anchor)

    def fill(self, points: Sequence[Tuple[float, float]], colour: Tuple[int, int, int]) -> None:
        """A faint area."""
        mask = Image.new('L', self.image.size, 0)
        ImageDraw.Draw(mask).polygon(self._fine(points), fill=34)
        self.image.paste(Image.new('RGB', self.image.size, colour), mask=mask)

    def dot(self, point: Tuple[float, float], colour: Tuple[int, int, int]) -> None:
        x, y = point
        self.draw.ellipse([(x - 2.5) * _FINE, (y - 2.5) * _FINE, (x + 2.5) * _FINE, (y + 2.5) * _FINE], fill=colour)

    def stroke(
        self,
        points: Sequence[Tuple[float, float]],
        colour: Tuple[int, int, int],
        dashes: Sequence[int] = (),
        thick: float = 2,
    ) -> None:
        for piece in _dashed(points, dashes) if dashes else [points]:
            if len(piece) > 1:
                self.draw.line(self._fine(piece), fill=colour, width=round(thick * _FINE), joint='curve')

    def array(self) -> np.ndarray:
        return np.asarray(self.image.resize(self.size, Image.Resampling.LANCZOS)).copy()


def _dashed(points: Sequence[Tuple[float, float]], dashes: Sequence[int]) -> List[List[Tuple[float, float]]]:
    """The drawn pieces of a line of strokes and gaps."""
    pieces, piece = [], [points[0]]
    number, left = 0, float(dashes[0])
    for begin, end in zip(points, points[1:]):
        position, length = 0.0, math.dist(begin, end)
        while length - position > left:
            position += left
            at = tuple(a + (b - a) * position / length for a, b in zip(begin, end))
            if number % 2 == 0:
                pieces.append(piece + [at])
            number, piece = number + 1, [at]
            left = float(dashes[number % len(dashes)])
        left -= length - position
        piece.append(end)
    return pieces + ([piece] if number % 2 == 0 else [])
