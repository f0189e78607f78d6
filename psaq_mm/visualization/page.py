# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Parts of a web page that needs nothing but itself: style, pictures, tables; wide and narrow, light and dark."""

import base64
import html
import io
from dataclasses import dataclass
from typing import Sequence, Tuple

import numpy as np
from PIL import Image

from psaq_mm.visualization.sheets import encode_png

__all__ = ['STYLES', 'Picture', 'legend', 'page', 'picture_grid', 'table', 'text']

STYLES = 8
"""Number of styles of curves in the style sheet: ``c0`` .. ``c7``."""

STYLE = """
:root { color-scheme: light dark; --back: #fbfbfa; --card: #fff; --ink: #1d1f21; --soft: #5b6166; --rule: #d9dcde;
  --c0: #0b62c4; --c1: #b4480a; --c2: #4a7a2a; --c3: #8a3fa0; --c4: #00807a; --c5: #b0286a; --c6: #8a6a00; --c7: #5f6a75;
  --mark: #eef4fc }
@media (prefers-color-scheme: dark) { :root { --back: #16181a; --card: #1e2124; --ink: #e6e8ea; --soft: #a0a7ad;
  --rule: #363b40; --c0: #6db1ff; --c1: #ff9a5c; --c2: #9ad06a; --c3: #d29ae6; --c4: #5fd0c8; --c5: #ff8fc0; --c6: #e0c050; --c7: #b4bcc4;
  --mark: #1d2a3a } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 16px }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 16px 0 8px }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 40px 0 8px; padding-top: 16px; border-top: 1px solid var(--rule) }
h3 { font-size: 1.05rem; margin: 28px 0 6px }
p { max-width: 70ch; margin: 6px 0 12px }
p.soft, figcaption, .legend, summary { color: var(--soft); font-size: .9rem }
a { color: var(--c0) }
.scroll { overflow-x: auto; max-width: 100%; border: 1px solid var(--rule); border-radius: 6px;
  background: var(--card) }
.scroll:focus-visible { outline: 2px solid var(--c0) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: 7px 12px; text-align: right; white-space: nowrap; border-top: 1px solid var(--rule) }
thead th { border-top: 0; font-weight: 600; vertical-align: bottom; white-space: normal }
th:first-child, td:first-child { text-align: left }
tbody th { font-weight: 400 }
table.list td { text-align: left; width: 100%; white-space: normal }
table.list tr:first-child > * { border-top: 0 }
tr.mark > * { background: var(--mark) }
td .diff { color: var(--soft); display: inline-block; min-width: 3.6em }
details { margin: 10px 0 }
summary { cursor: pointer; padding: 6px 0 }
figure { margin: 0; min-width: 0 }
figcaption { margin-top: 3px; line-height: 1.35 }
img { display: block; width: 100%; height: auto; border-radius: 4px }
.grid { display: grid; gap: 10px; margin: 8px 0 18px }
.grid.two { grid-template-columns: repeat(2, minmax(0, 1fr)) }
.grid.three { grid-template-columns: repeat(3, minmax(0, 1fr)) }
.grid.four { grid-template-columns: repeat(4, minmax(0, 1fr)) }
.grid.panels { column-gap: 28px }
.grid.panels > div { min-width: 0 }
.chart { max-width: 640px; margin: 8px 0 18px }
.grid.charts { grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)) }
@media (max-width: 700px) { .grid.two { grid-template-columns: minmax(0, 1fr) }
  .grid.four, .grid.charts { grid-template-columns: repeat(2, minmax(0, 1fr)) } main { padding: 12px }
  h1 { font-size: 1.45rem }
  th, td { padding: 6px 8px } tbody th { white-space: normal; min-width: 9.6em }
  td .diff { display: block; min-width: 0; font-size: .85rem } }
svg { display: block; width: 100%; height: auto; background: var(--card); border: 1px solid var(--rule);
  border-radius: 4px }
svg text { font-family: inherit; fill: var(--soft); font-size: 12px }
svg .title { fill: var(--ink) }
svg .axis { stroke: var(--rule) }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.fill { opacity: .16 }
.c0.line { stroke: var(--c0) } .c0.fill { fill: var(--c0) }
.c1.line { stroke: var(--c1); stroke-dasharray: 5 3 } .c1.fill { fill: var(--c1) }
.c2.line { stroke: var(--c2); stroke-dasharray: 1.5 2.5 } .c2.fill { fill: none }
.c3.line { stroke: var(--c3); stroke-dasharray: 8 3 1.5 3 } .c3.fill { fill: none }
.c4.line { stroke: var(--c4) } .c4.fill { fill: none }
.c5.line { stroke: var(--c5); stroke-dasharray: 9 3 } .c5.fill { fill: none }
.c6.line { stroke: var(--c6); stroke-dasharray: 3 3 } .c6.fill { fill: none }
.c7.line { stroke: var(--c7) } .c7.fill { fill: none }
.legend span { display: inline-block; margin-right: 18px }
.legend svg { display: inline-block; width: 34px; height: 10px; border: 0; background: none; vertical-align: middle;
  margin-right: 6px }
.key i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 5px; vertical-align: -1px }
"""


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Args:
        array: (H, W, 3), uint8, RGB.
        caption: The line below it, plain text; may be empty.
        alt: What it shows, for those who do not see it.
        lossless: PNG; else JPEG, about a fifth of the size for pictures with grain.
    """

    array: np.ndarray
    caption: str
    alt: str
    lossless: bool = False


def text(value: object) -> str:
    """``value`` as text of a page, with nothing in it taken for markup."""
    return html.escape(str(value))


def _data(picture: Picture) -> str:
    if picture.lossless:
        return 'data:image/png;base64,' + base64.b64encode(encode_png(picture.array)).decode()
    buffer = io.BytesIO()
    Image.fromarray(picture.array).save(buffer, format='JPEG', quality=88, optimize=True)
    return 'data:image/jpeg;base64,' + base64.b64encode(buffer.getvalue()).decode()


def _figure(picture: Picture) -> str:
    height, width = picture.array.shape[:2]
    caption = f'<figcaption>{text(picture.caption)}</figcaption>' if picture.caption else ''
    return (
        f'<figure><img src="{_data(picture)}" width="{width}" height="{height}" loading="lazy" '
        f'alt="{text(picture.alt)}">{caption}</figure>'
    )


def picture_grid(pictures: Sequence[Picture], columns: str) -> str:
    """Pictures side by side; ``columns`` is ``'two'`` (one below the other on a phone), ``'three'``, or ``'four'`` (two
    there).
    """
    return f'<div class="grid {columns}">{"".join(map(_figure, pictures))}</div>'


def legend(curves: Sequence[Tuple[str, int]]) -> str:
    """Names of curves, each beside a piece of its line; the numbers are those of the styles, below :data:`STYLES`."""
    swatches = [
        f'<span><svg viewBox="0 0 34 10" aria-hidden="true"><polyline class="c{style} line" points="1,5 33,5"/></svg>'
        f'{text(label)}</span>'
        for label, style in curves
    ]
    return f'<p class="legend">{"".join(swatches)}</p>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], label: str, marked: Sequence[int] = ()) -> str:
    """A table in a box of its own that scrolls sideways where the screen is narrow.

    Args:
        head: Column names, HTML. Empty: none, for a list of names and values.
        rows: Cells, HTML; the first of a row is its name.
        label: What the table holds, read aloud.
        marked: Rows to stand out, by number.
    """
    lines = []
    for number, row in enumerate(rows):
        cells = f'<th scope="row">{row[0]}</th>' + ''.join(f'<td>{cell}</td>' for cell in row[1:])
        lines.append(f'<tr{" class=mark" if number in marked else ""}>{cells}</tr>')
    names = ''.join(f'<th scope="col">{name}</th>' for name in head)
    kind, above = ('', f'<thead><tr>{names}</tr></thead>') if head else (' class="list"', '')
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(label)}"><table{kind}>{above}'
        f'<tbody>{"".join(lines)}</tbody></table></div>'
    )


def page(title: str, body: str) -> str:
    """A whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n'
        f'<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n'
    )
