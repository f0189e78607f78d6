# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A picture of what students got out of each source: rows of tools/compare.py --rows as means and spreads.

    python benchmarks/sources_chart.py docs/results/samples.json --png docs/images/sources.png \
        --sources best=best dead_leaves='dead leaves' real='real images'

One panel a model and precision that at least two of the sources have untrained rows of; in it a line a source, from the
least seed to the greatest, with a dot at the mean.
"""

import argparse
import io
import sys
from pathlib import Path
from typing import Any, Dict, Mapping, NamedTuple, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from psaq_mm.commands.common import run_command  # noqa: E402
from psaq_mm.commands.sample_rows import read_rows  # noqa: E402
from psaq_mm.errors import ConfigError  # noqa: E402
from psaq_mm.files import write_whole  # noqa: E402

WIDTH, ACROSS = 1500, 3
OURS, CONTROL, REAL = '#0b62c4', '#5f6a75', '#b4480a'


class Spread(NamedTuple):
    """Agreement of some seeds."""

    least: float
    mean: float
    greatest: float
    seeds: int


def panels(rows: Sequence[Mapping[str, Any]], sources: Sequence[str]) -> Dict[Tuple[str, str], Dict[str, Spread]]:
    """By (model, bits) and source the spread of the agreement with full precision, nothing trained."""
    found: Dict[Tuple[str, str], Dict[str, Dict[int, float]]] = {}
    for row in rows:
        if row['source'] in sources and row['steps'] == 0 and row['agreement'] is not None:
            # A detector has a row a metric, all with one agreement.
            found.setdefault((row['model'], row['bits']), {}).setdefault(row['source'], {})[row['seed']] = row[
                'agreement'
            ]
    return {
        key: {
            name: Spread(min(seeds.values()), sum(seeds.values()) / len(seeds), max(seeds.values()), len(seeds))
            for name, seeds in by_source.items()
        }
        for key, by_source in found.items()
        if len(by_source) > 1
    }


def draw(found: Mapping[Tuple[str, str], Mapping[str, Spread]], titles: Mapping[str, str]) -> bytes:
    """PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    down = -(-len(found) // ACROSS)
    figure = Figure(figsize=(WIDTH / 100, 0.9 + down * (0.9 + 0.3 * len(titles))), dpi=100)
    for place, ((model, bits), spreads) in enumerate(found.items(), 1):
        axes = figure.add_subplot(down, ACROSS, place)
        names = [name for name in titles if name in spreads]
        for height, name in enumerate(reversed(names)):
            least, mean, greatest, seeds = spreads[name]
            colour = OURS if name == next(iter(titles)) else REAL if name == 'real' else CONTROL
            axes.plot([least, greatest], [height, height], color=colour, linewidth=3, alpha=0.5, solid_capstyle='round')
            axes.plot([mean], [height], 'o', color=colour, markersize=7)
        axes.set_yticks(range(len(names)), [f'{titles[name]} ({spreads[name].seeds})' for name in reversed(names)])
        axes.set_title(f'{model}, {bits}', fontsize=11)
        axes.grid(axis='x', color='#d8dde2')
        axes.set_axisbelow(True)
        axes.locator_params(axis='x', nbins=5)
        for side in ('top', 'right', 'left'):
            axes.spines[side].set_visible(False)
        axes.tick_params(length=0)
    figure.supxlabel('agreement with full precision: mean, least and greatest seed (number of seeds)', fontsize=11)
    figure.tight_layout()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def named(given: Sequence[str]) -> Dict[str, str]:
    """``NAME=TITLE`` or ``NAME`` to titles by name.

    Raises:
        ConfigError: A name stands there twice.
    """
    titles: Dict[str, str] = {}
    for one in given:
        name, _, title = one.partition('=')
        if name in titles:
            raise ConfigError(f'--sources {name} stands there twice: give each source once')
        titles[name] = title or name
    return titles


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog='sources_chart', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('rows', type=Path, help='rows of tools/compare.py --rows')
    parser.add_argument(
        '--sources',
        nargs='+',
        metavar='NAME=TITLE',
        required=True,
        help='from the top; the first is the one to look at',
    )
    parser.add_argument(
        '--png', type=Path, default=Path('work_dirs/sources.png'), help='where the picture goes (default: %(default)s)'
    )

    def command(args) -> None:
        titles, rows = named(args.sources), read_rows(args.rows)
        found = panels(rows, list(titles))
        if not found:
            known = ', '.join(sorted({str(row['source']) for row in rows})) or 'none'
            raise ConfigError(
                f'{args.rows} has no two of the sources {", ".join(titles)} for one model and precision: it has {known}'
            )
        write_whole(args.png, draw(found, titles))
        print(f'{args.png}: {len(found)} panels')

    return run_command(command, parser, argv)


if __name__ == '__main__':
    sys.exit(main())
