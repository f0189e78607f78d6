# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Tables as plain text and as markdown, laid out by rich. They are as wide as their cells, whatever the terminal is."""

import io
from typing import Any, List, Optional, Sequence

__all__ = ['markdown_table', 'text_table']


def text_table(
    head: Sequence[str], rows: Sequence[Sequence[Any]], align: Optional[str] = None, rule: bool = True
) -> str:
    """A table for a terminal or a log, in ASCII beside what is in the cells.

    Args:
        head: Names of the columns.
        rows: Cells. Numbers of type float have three decimals.
        align: A letter a column, ``'l'`` left or ``'r'`` right, such as ``'lrr'``. None: right where all cells are
            numbers.
        rule: Whether a line of dashes stands below the head.

    Example:
        >>> print(text_table(('layer', 'error'), [('head', 0.25), ('blocks.0.attn.qkv', 12.5)]))
        layer               error
        -------------------------
        head                0.250
        blocks.0.attn.qkv  12.500
    """
    from rich.box import Box

    box = Box('\n'.join(['    ', '    ', '----' if rule else '    ', *['    '] * 5]))
    return '\n'.join(_lines(head, rows, align, box, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]], align: Optional[str] = None) -> str:
    """A table in markdown that is also readable as text; the arguments are those of :func:`text_table`."""
    from rich.box import MARKDOWN

    first, rule, *others = _lines(head, rows, align, MARKDOWN)
    cells = [
        cell[:-1] + ':' if letter == 'r' else cell
        for cell, letter in zip(rule.strip('|').split('|'), align or _alignment(head, rows))
    ]
    return '\n'.join([first, f'|{"|".join(cells)}|', *others])


def _alignment(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    numeric = [bool(rows) and all(not isinstance(row[i], str) for row in rows) for i in range(len(head))]
    return ''.join('r' if right else 'l' for right in numeric)


def _lines(head: Sequence[str], rows: Sequence[Sequence[Any]], align: Optional[str], box, **layout: Any) -> List[str]:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box, header_style='', **layout)
    for name, letter in zip(head, align or _alignment(head, rows)):
        table.add_column(Text(name), justify='right' if letter == 'r' else 'left', no_wrap=True)
    for row in rows:
        table.add_row(*(Text(f'{cell:.3f}' if isinstance(cell, float) else str(cell)) for cell in row))
    file = io.StringIO()
    console = Console(file=file, width=1 << 20, color_system=None, force_jupyter=False, legacy_windows=False)
    console.print(table, crop=False, no_wrap=True)
    return [line for line in map(str.rstrip, file.getvalue().split('\n')) if line]
