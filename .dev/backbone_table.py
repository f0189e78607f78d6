# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""docs/reference/backbones.md: the rows of tests/backbone_builders.py, the results of benchmarks/every_config.py.

    python .dev/backbone_table.py > docs/reference/backbones.md

A test compares the page with what this prints, and runs every cell of the first table.
"""

import json
import sys
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from backbone_builders import CELLS, ROWS, Row  # noqa: E402

from benchmarks.every_config import by_backbone, counted, left_out, summary  # noqa: E402
from psaq_mm.tables import markdown_table  # noqa: E402

RESULTS = ROOT / 'docs' / 'results' / 'every_config.json'
COLUMNS = dict(
    folding='RepQ folding',
    rotation='rotation',
    similarity='patch similarity',
    export='integer export',
    dynamic='one graph for all sizes',
)
HEAD = """# Backbones

Every backbone that psaq_mm quantizes, in each library that has it; `.dev/backbone_table.py` writes this page.
`tests/models/test_every_backbone.py` builds every row at reduced size. With its quantizers off it is the library's
model to the last bit; it is calibrated without data, saved and loaded; at W8A8 it is near full precision; and each cell
is exercised, or refused in the words of the note. [Adding a backbone](../guides/adding_a_backbone.md) takes one class.
"""
CONFIGS = """## Every config of the libraries

All configs that mmdet 3.3.0, mmseg 1.2.2 and mmpretrain 1.2.0 install with a transformer or a ConvNeXt as backbone, at
reduced size: built, quantized to W8A8, calibrated on noise and run.

```bash
python benchmarks/every_config.py --library mmdet mmseg mmpretrain --json docs/results/every_config.json
```

Language models are replaced by a stand-in or left out; where the rest cannot be built without packages or weights that
are not there ("not built"), the image tower is tried alone.
"""


def cells(row: Row, notes: List[str]) -> Tuple[str, ...]:
    """Those of one row; a refusal is the number of its note, which is added where it is new."""
    texts = []
    for name in CELLS:
        value = row.cells[name]
        if isinstance(value, str):
            note = f'{COLUMNS[name]}: "{value}"'
            if note not in notes:
                notes.append(note)
            texts.append(f'no ({notes.index(note) + 1})')
        else:
            texts.append('yes' if value is True else f'yes, {value}')
    return tuple(texts)


def backbones(rows: Sequence[Row]) -> str:
    """The table of backbones, and its notes."""
    notes: List[str] = []
    ordered = sorted(rows, key=lambda row: (row.title.lower(), row.library, row.build_of))
    body = [(row.title, row.library, row.build_of, *cells(row, notes)) for row in ordered]
    table = markdown_table(('backbone', 'library', 'build', *(COLUMNS[name] for name in CELLS)), body)
    floats = [
        f'{row.title} of {row.library}{f" ({row.build_of})" if row.build_of else ""}: {", ".join(row.floats)}'
        for row in ordered
        if row.floats
    ]
    lines = [
        table,
        '',
        'Numbers: layers, streams and attention modules of the small builds. What psaq_mm says to a no:',
    ]
    lines += ['', *(f'{i}. {note}' for i, note in enumerate(notes, 1))]
    if floats:
        lines += [
            '',
            'In floating point inside the backbone, and named by `psaq-inspect`:',
            '',
            *(f'- {one}' for one in floats),
        ]
    return '\n'.join(lines)


def configs(rows: Sequence[Dict]) -> str:
    """The tables of all configs of the libraries."""
    behind = [row for row in counted(rows) if row['backbone_scope']['result'] == 'quantized']
    sections = [
        CONFIGS,
        summary(rows),
        '',
        by_backbone(rows),
        '',
        "Not quantized under `scope='backbone'`:",
        '',
        left_out(rows, 'backbone_scope'),
        '',
        "Quantized under `scope='backbone'`, and not under `scope='full'`:",
        '',
        left_out(behind, 'full_scope'),
    ]
    return '\n'.join(sections)


def page() -> str:
    """The whole page."""
    rows = json.loads(RESULTS.read_text(encoding='utf-8'))
    return '\n'.join([HEAD, backbones(ROWS), '', configs(rows), ''])


if __name__ == '__main__':
    print(page(), end='')
