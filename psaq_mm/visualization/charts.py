# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Charts, drawn by matplotlib: lines with bands as pixels, filled curves as SVG for a page.

matplotlib is imported when a chart is drawn, because it takes longer to import than the whole package.
"""

import io
import re
from html import escape
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from psaq_mm.errors import DataError

__all__ = ['STYLES', 'Line', 'Panel', 'area_chart', 'line_chart']

INK, SOFT, RULE = '#1d1f21', '#5b6166', '#d9dcde'
STYLES: Tuple[Tuple[str, Tuple[float, ...]], ...] = (
    ('#0b62c4', ()),
    ('#b4480a', (5, 3)),
    ('#4a7a2a', (1.5, 2.5)),
    ('#8a3fa0', (8, 3, 1.5, 3)),
    ('#00807a', ()),
    ('#b0286a', (9, 3)),
    ('#8a6a00', (3, 3)),
    ('#5f6a75', ()),
)
"""Styles of lines by number: colour, and lengths of strokes and gaps. The colours are ``--c0`` .. ``--c7`` of the style
sheet of pages, which has others for dark screens."""

_FILLED = 2  # styles below this number are filled
_THEMED = {INK: 'var(--ink)', SOFT: 'var(--soft)', RULE: 'var(--rule)'}
_THEMED.update({colour: f'var(--c{number})' for number, (colour, _) in enumerate(STYLES)})

# The font comes with matplotlib; labels hold names of files, in which a dollar is no mathematics.
_TEXT: Dict[str, Any] = {'font.family': 'DejaVu Sans', 'text.parse_math': False}
# The same chart gives the same bytes, its words stay words, and dashes are as long as they are in the page's legend.
_SVG: Dict[str, Any] = {'svg.hashsalt': 'psaq_mm', 'svg.fonttype': 'none', 'lines.scale_dashes': False}


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
        label: Its name in the legend and in the chart's description.
        x: Positions, ascending.
        y: Values at them.
        low, high: Least and greatest of the values that ``y`` is the mean of, drawn as a band; None: no band.
        style: Number in :data:`STYLES`; :func:`line_chart` gives each label its own.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Optional[Sequence[float]] = None
    high: Optional[Sequence[float]] = None
    style: int = 0


class Panel(NamedTuple):
    """One chart: the names of its axes, and its lines."""

    x_label: str
    y_label: str
    lines: Sequence[Line]


def _check(title: str, lines: Sequence[Line]) -> None:
    if not lines:
        raise DataError(f'the chart {title!r} has no lines: give at least one')
    for line in lines:
        values = [part for part in (line.y, line.low, line.high) if part is not None]
        if (
            not len(line.x)
            or any(len(part) != len(line.x) for part in values)
            or not np.isfinite(np.concatenate([line.x, *values])).all()
        ):
            raise DataError(
                f'the line {line.label!r} of the chart {title!r} has {len(line.x)} positions and {len(line.y)} values: '
                'give as many of each, one or more, all finite'
            )


def line_chart(title: str, panels: Sequence[Panel], size: Tuple[int, int] = (560, 360)) -> np.ndarray:
    """Panels side by side under one title and one legend.

    The same label has the same colour in all panels. The ninth label has the first colour again, dashed.

    Args:
        title: Above everything.
        panels: One or more.
        size: (width, height) of a panel in pixels.

    Returns:
        Shape (H, W, 3), uint8, RGB.

    Raises:
        DataError: There are no lines, or one lacks points, has another number of values than positions, or NaN.
    """
    _check(title, [line for panel in panels for line in panel.lines])
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    width = len(panels) * size[0]
    columns = max(1, min(len(labels), width // (60 + 7 * max(map(len, labels)))))
    above = 40 + 20 * -(-len(labels) // columns)
    height = size[1] + above
    with matplotlib.rc_context(_TEXT):
        figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor='white')
        canvas = FigureCanvasAgg(figure)
        drawn: Dict[str, Any] = {}
        for number, panel in enumerate(panels):
            left = (number * size[0] + 58) / width
            axes = figure.add_axes((left, 48 / height, (size[0] - 80) / width, (size[1] - 78) / height))
            drawn.update(_draw_panel(axes, panel, labels))
        figure.text(16 / width, 1 - 12 / height, title, fontsize=12.5, color=INK, va='top')
        figure.legend(
            [drawn[label] for label in labels],
            labels,
            loc='upper left',
            bbox_to_anchor=(10 / width, 1 - 34 / height),
            ncols=columns,
            frameon=False,
            fontsize=9,
            labelcolor=SOFT,
            handlelength=3,
        )
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_panel(axes, panel: Panel, labels: Sequence[str]) -> Dict[str, Any]:
    """Draw the lines; matplotlib's line by label."""
    drawn = {}
    for line in panel.lines:
        place = labels.index(line.label)
        colour, dashes = STYLES[place % len(STYLES)][0], ('-', '--', ':', '-.')[place // len(STYLES) % 4]
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.13, linewidth=0)
        (drawn[line.label],) = axes.plot(line.x, line.y, color=colour, linestyle=dashes, marker='o', markersize=3.6)
    axes.margins(x=0)
    axes.set_xlabel(panel.x_label, fontsize=9, color=INK)
    axes.set_title(panel.y_label, fontsize=9, color=INK, loc='left', x=-42 / 480)
    axes.grid(axis='y', color=RULE)
    axes.set_axisbelow(True)
    axes.locator_params(nbins=6)
    axes.tick_params(labelsize=9, colors=SOFT)
    axes.tick_params(axis='y', length=0)
    for side in ('top', 'right', 'left'):
        axes.spines[side].set_visible(False)
    axes.spines['bottom'].set_color(SOFT)
    return drawn


def area_chart(
    title: str,
    lines: Sequence[Line],
    x_range: Tuple[float, float],
    ticks: Sequence[float],
    floor: float = 0.0,
    size: Tuple[int, int] = (240, 132),
) -> str:
    """Lines over a common axis on one vertical scale, those of the first styles filled.

    Args:
        title: Shown above and read aloud.
        lines: One or more; the first is drawn on top.
        x_range: Ends of the horizontal axis; points outside are left out.
        ticks: Where it carries numbers.
        floor: Above 0: the vertical scale is logarithmic and begins here, so that tails are seen beside high peaks.
        size: Width and height in units of which letters are 12 high. A chart that is shown wider has larger letters.

    Returns:
        An ``<svg>`` element for a page of :mod:`psaq_mm.visualization.page`, in colours of its style sheet.

    Raises:
        DataError: There are no lines, or one lacks points, has another number of values than positions, or NaN.
    """
    _check(title, lines)
    import matplotlib
    from matplotlib.figure import Figure

    width, height = size
    with matplotlib.rc_context({**_TEXT, **_SVG}):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor='none')
        axes = figure.add_axes((8 / width, 20 / height, 1 - 16 / width, 1 - 42 / height), facecolor='none')
        top = _draw_areas(axes, lines, x_range, floor)
        axes.set(xlim=x_range, ylim=(floor, top))
        axes.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
        axes.tick_params(axis='x', labelsize=12, labelcolor=SOFT, color=RULE, length=3, pad=2)
        for tick, label in zip(ticks, axes.get_xticklabels()):
            label.set_horizontalalignment('left' if tick == x_range[0] else 'right' if tick == x_range[1] else 'center')
        axes.yaxis.set_visible(False)
        for side in ('top', 'right', 'left'):
            axes.spines[side].set_visible(False)
        axes.spines['bottom'].set_color(RULE)
        figure.text(8 / width, 1 - 14 / height, title, fontsize=12, color=INK)
        file = io.StringIO()
        figure.savefig(file, format='svg', metadata=dict.fromkeys(('Creator', 'Date', 'Format', 'Type')))
    return _inline(file.getvalue(), f'{title}: {", ".join(line.label for line in lines)}', size)


def _draw_areas(axes, lines: Sequence[Line], x_range: Tuple[float, float], floor: float) -> float:
    """Draw the lines; the greatest height."""
    if floor:
        axes.set_yscale('log')
    heights: List[float] = []
    for line in reversed(lines):
        x, y = np.asarray(line.x, float), np.maximum(np.asarray(line.y, float), floor)
        inside = (x >= x_range[0]) & (x <= x_range[1])
        x, y = x[inside], y[inside]
        if not len(x):
            continue
        heights.append(float(y.max()))
        colour, dashes = STYLES[line.style]
        if line.style < _FILLED:
            base = [floor, floor]
            axes.fill([*x, x[-1], x[0]], [*y, *base], color=colour, alpha=0.16, linewidth=0, clip_on=False)
        linestyle = (0, dashes) if dashes else '-'
        axes.plot(x, y, color=colour, linestyle=linestyle, linewidth=1.8, clip_on=False, gid='line')
    top = max(heights, default=0.0)
    return top if top > floor else 10 * floor or 1.0


def _inline(svg: str, description: str, size: Tuple[int, int]) -> str:
    """The SVG file of matplotlib as an element of a page: without namespaces and ids, in colours of the style sheet."""
    svg = svg[svg.index('<svg') :]
    opening = f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(description)}">'
    svg = re.sub(r'<svg[^>]*>', lambda _: opening, svg, count=1)
    svg = re.sub(r'<defs>\s*<style.*?</style>\s*</defs>', '', svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="line"', '<g class="line"', svg)
    svg = re.sub(r'<g id="[^"]*"', '<g', svg).replace('xlink:href', 'href')
    return re.sub('|'.join(_THEMED), lambda colour: _THEMED[colour[0]], svg).strip()
