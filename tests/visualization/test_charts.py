"""Charts show values where they are, in colours of the page, and give the same bytes again."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

import psaq_mm.visualization
from psaq_mm.errors import DataError
from psaq_mm.visualization import STYLES, Line, Panel, area_chart, line_chart

pytest.importorskip('matplotlib')
CSS = (Path(psaq_mm.visualization.__file__).parent / 'templates' / 'page.css').read_text(encoding='utf-8')


def points(chart, style):
    """Positions of a line in a chart."""
    path = re.search(r'<g class="line">\s*<path d="([^"]+)" style="[^"]*var\(--c%d\)' % style, chart)[1]
    return [tuple(map(float, pair)) for pair in re.findall(r'[ML] (\S+) (\S+)', path)]


def test_a_line_lies_where_its_values_are():
    chart = area_chart('x', [Line('a', [-1, 0, 1], [0, 2, 1])], (-1, 1), (-1, 1))
    (x0, y0), (x1, y1), (x2, y2) = points(chart, 0)
    assert x1 - x0 == pytest.approx(x2 - x1) and x1 > x0
    assert y0 > y2 > y1 and y0 - y2 == pytest.approx((y0 - y1) / 2, abs=0.1)


def test_a_larger_chart_has_its_line_all_over_it():
    chart = area_chart('x', [Line('a', [-1, 1], [1, 1], style=3)], (-1, 1), (-1, 1), size=(360, 240))
    assert 'viewBox="0 0 360 240"' in chart and points(chart, 3) == [(8, 22), (352, 22)]


def test_peaks_do_not_hide_tails_and_what_is_outside_the_axis_is_left_out():
    line = Line('a', [-1, -0.5, 0, 0.5, 1], [50, 0, 0.01, 1, 100])
    least, middle, top = (y for _, y in points(area_chart('x', [line], (-0.5, 1), (0,), floor=0.01), 0)[-3:])
    assert least - middle == pytest.approx((least - top) / 2, abs=0.1)


def test_a_flat_line_on_the_floor_is_drawn():
    for floor in (0.0, 0.5):
        heights = [y for _, y in points(area_chart('x', [Line('a', [0, 1], [0, 0])], (0, 1), (), floor=floor), 0)]
        assert heights[0] == heights[1] == 112


def test_a_chart_is_one_element_of_any_page_and_always_the_same():
    lines = [Line(f'a <{style}>', [0, 1], [1, 2], style=style) for style in range(len(STYLES))]
    first, second = (area_chart('A & $b$', lines, (0, 1), (0, 1)) for _ in range(2))
    assert first == second and 'http' not in first and '<style' not in first and '#0' not in first
    root = ElementTree.fromstring(first)
    assert root.get('aria-label').startswith('A & $b$: a <0>, a <1>')
    assert [text.text for text in root.iter('text')] == ['0', '1', 'A & $b$']
    for style, (colour, _) in enumerate(STYLES):
        assert f'var(--c{style})' in first and f'--c{style}: {colour}' in CSS
        assert CSS.count(f'--c{style}:') == 2  # light and dark


def test_each_label_has_one_colour_in_all_panels():
    first, second = Line('a', [0, 1], [0, 1], [0, 0.9], [0.1, 1.1]), Line('b', [0, 2], [1, 0])
    both = line_chart('t', [Panel('x', 'y', [first, second]), Panel('x', 'y', [second])], (300, 200))
    assert both.dtype == np.uint8 and both.shape[1:] == (600, 3)
    colours = [tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour, _ in STYLES[:2]]
    found = [[(half[60:] == colour).all(-1).sum() > 20 for colour in colours] for half in np.split(both, 2, axis=1)]
    assert found == [[True, True], [False, True]]


@pytest.mark.parametrize(
    'lines', [[], [Line('a', [1.0, 2.0], [1.0])], [Line('a', [1.0], [float('nan')])], [Line('a', [], [])]]
)
def test_charts_of_nothing_and_of_nonsense_are_named(lines):
    with pytest.raises(DataError, match="chart 't'"):
        line_chart('t', [Panel('x', 'y', lines)])
    with pytest.raises(DataError, match="chart 't'"):
        area_chart('t', lines, (0, 1), (0, 1))
