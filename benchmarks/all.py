# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Every claim about speed and memory, measured: one table, and ``work_dirs/benchmarks.json``.

    python benchmarks/all.py --quick               # under five minutes on two cores
    python benchmarks/all.py                       # the sizes that are claimed; an hour or so
    python benchmarks/all.py --device cuda         # the same table on a GPU
    python benchmarks/all.py --only startup memory

A row is a ratio of two things measured in the same run (or a figure in the unit that its name gives) and its bound. The
file holds a list of ``dict(name, ratio, bound, ok)``, with more where a script measures more; a script that fails is a
row with its error, ``ratio`` None.

The exit code is 1 where a bound is broken or a script failed. What else runs on the machine counts: measure on a quiet
one.
"""

import argparse
import importlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import List, Optional, Sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import Row, begin  # noqa: E402
from psaq_mm.tables import markdown_table  # noqa: E402

SCRIPTS = (
    'startup',
    'glue',
    'entropy',
    'channel_ranges',
    'sources',
    'synthesis_step',
    'fake_quantization',
    'coevolution',
    'calibration',
    'scaling',
    'memory',
)
"""Those with a function ``rows(quick, device)``, the short ones first."""


def rows_of(name: str, quick: bool, device: str) -> List[Row]:
    """The rows of one script; where it fails, one row that says why."""
    try:
        return importlib.import_module(f'benchmarks.{name}').rows(quick, device)
    except Exception as error:  # whatever it is: the other scripts are still to be run
        traceback.print_exc()
        return [
            dict(name=f'{name}: failed', ratio=None, bound=None, ok=False, error=f'{type(error).__name__}: {error}')
        ]


def collect(scripts: Sequence[str], quick: bool, device: str) -> List[Row]:
    """The rows of all scripts, in their order; each says how long it took."""
    found = []
    for name in scripts:
        print(f'\n## {name}\n', flush=True)
        begun = time.perf_counter()
        found += rows_of(name, quick, device)
        print(f'\n{name}: {time.perf_counter() - begun:.0f} s', flush=True)
    return found


def shown(rows: Sequence[Row]) -> str:
    """The table of all claims; a script that failed has its error in place of figures."""
    return markdown_table(
        ('claim', 'ratio', 'bound', 'holds'),
        [
            (
                row['name'],
                row['error'] if row['ratio'] is None else f'{row["ratio"]:.3f}',
                '' if row['bound'] is None else f'{row["bound"]:g}',
                'yes' if row['ok'] else 'no',
            )
            for row in rows
        ],
    )


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='small sizes and few repeats')
    parser.add_argument('--device', default='cpu', help='cpu or cuda (default: %(default)s)')
    parser.add_argument('--threads', type=int, default=2, help='of PyTorch (default: %(default)s)')
    parser.add_argument('--only', nargs='+', default=SCRIPTS, choices=SCRIPTS, metavar='NAME', help=', '.join(SCRIPTS))
    parser.add_argument(
        '--output', type=Path, default=ROOT / 'work_dirs' / 'benchmarks.json', help='(default: %(default)s)'
    )
    args = parser.parse_args(argv)
    if not begin(args.device, args.threads):
        return 2
    begun = time.perf_counter()
    rows = collect(args.only, args.quick, args.device)
    print(f'\n## All, in {time.perf_counter() - begun:.0f} s\n\n{shown(rows)}')
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rows, indent=1) + '\n')
    print(f'\nWrote {args.output}')
    return int(not all(row['ok'] for row in rows))


if __name__ == '__main__':
    sys.exit(main())
