# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Small line charts as inline SVG: no script, font or picture from elsewhere, colours from the page's style sheet."""

import html
import math
from typing import NamedTuple, Sequence, Tuple

from psaq_mm.errors import DataError

__all__ = ['Curve', 'area_chart']

WIDTH, HEIGHT = 240, 132
LEFT, RIGHT, TOP, BOTTOM = 8, 8, 22, 20  # room for the title above and the numbers below


class Curve(NamedTuple):
    """One curve of a chart.

    Attributes:
        label: What it shows; the legend and the chart's description name it.
        x: Positions, ascending.
        y: Values, 0 or more, as many.
        style: Number of the curve's style in the page's style sheet: the same thing looks the same in every chart.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: int


def _number(value: float) -> str:
    """Plain decimal for a coordinate: one decimal is a tenth of a pixel."""
    return f'{value:.1f}'.rstrip('0').rstrip('.')


def _within(curve: Curve, low: float, high: float, floor: float) -> Curve:
    """The part of ``curve`` that is drawn, with its heights above the axis."""
    kept = [(x, y) for x, y in zip(curve.x, curve.y) if low <= x <= high]
    heights = [math.log(max(y, floor) / floor) if floor else y for _, y in kept]
    return curve._replace(x=[x for x, _ in kept], y=heights)


def area_chart(
    title: str,
    curves: Sequence[Curve],
    x_range: Sequence[float],
    ticks: Sequence[float],
    floor: float = 0.0,
    size: Tuple[int, int] = (WIDTH, HEIGHT),
) -> str:
    """Curves over a common axis, each filled down to zero, on one vertical scale.

    Args:
        title: Shown above and read aloud.
        curves: One or more; the first is drawn on top.
        x_range: Ends of the horizontal axis; what lies outside is not drawn.
        ticks: Where it carries numbers.
        floor: Where above 0, the vertical scale is logarithmic and begins there, so that tails are seen beside peaks a
            thousand times as high.
        size: Width and height in units of the page's smallest letters, 12 high: a chart that is shown wider than this
            has larger ones.

    Returns:
        An ``<svg>`` element for an HTML page, in classes ``c0``, ``c1``, ... for the curves' styles.

    Raises:
        DataError: No curve, or one with values of another number than positions.
    """
    if not curves or any(len(c.x) != len(c.y) or not len(c.x) for c in curves):
        raise DataError(f'the chart {title!r} lacks curves, or one has values for other positions than its own')
    (low, high), (width, height) = x_range, size
    seen = [_within(curve, low, high, floor) for curve in curves]
    top = max((y for curve in seen for y in curve.y), default=0.0) or 1.0

    def across(x: float) -> float:
        return LEFT + (x - low) / (high - low) * (width - LEFT - RIGHT)

    def down(y: float) -> float:
        return height - BOTTOM - y / top * (height - TOP - BOTTOM)

    base = _number(down(0))
    parts = [f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{base}" y2="{base}"/>']
    for tick in ticks:
        x = _number(across(tick))
        anchor = 'start' if tick == low else 'end' if tick == high else 'middle'
        parts.append(
            f'<line class="axis" x1="{x}" x2="{x}" y1="{base}" y2="{_number(down(0) + 3)}"/>'
            f'<text class="tick" x="{x}" y="{height - 4}" text-anchor="{anchor}">{tick:g}</text>'
        )
    for curve in reversed([curve for curve in seen if curve.x]):
        line = ' '.join(f'{_number(across(x))},{_number(down(y))}' for x, y in zip(curve.x, curve.y))
        first, last = _number(across(curve.x[0])), _number(across(curve.x[-1]))
        parts.append(
            f'<polygon class="c{curve.style} fill" points="{first},{base} {line} {last},{base}"/>'
            f'<polyline class="c{curve.style} line" points="{line}"/>'
        )
    shown = html.escape(title)
    named = html.escape(', '.join(c.label for c in curves))
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{shown}: {named}">'
        f'<text class="title" x="{LEFT}" y="14">{shown}</text>{"".join(parts)}</svg>'
    )
