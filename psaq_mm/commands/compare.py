# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Sources of samples through the same quantizer, calibrated or trained, at equal steps or equal seconds:
``psaq compare CONFIG ... --samples generated gaussian dead_leaves real --seeds 0 1 2``.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Optional, Sequence, Tuple

from psaq_mm.commands.common import add_config_options, add_device_argument, load_config, run_command
from psaq_mm.commands.listing import METHOD_NAMES, SOURCE_NAMES
from psaq_mm.commands.parsing import make_parser
from psaq_mm.errors import ConfigError

__all__ = ['build_parser', 'main']


def build_parser(prog: str = 'psaq-compare') -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = make_parser(
        prog,
        'CONFIG [CONFIG ...] [options]',
        'Compare methods and sources of samples: each row quantizes the checkpoint in load_from of a config, evaluates '
        'the student on the test set, and measures how often it agrees with full precision. Rows and table go to '
        'compare.json and compare.md in the work dir. The same command goes on where it was stopped.',
        [
            'configs/quantized.py --method fast best --quant w8a8 w4a8',
            'configs/quantized.py --samples generated gaussian pictures/ \\\n      --train --seconds 600 --curve 8',
        ],
    )
    model = parser.add_argument_group('model')
    model.add_argument('configs', nargs='+', metavar='CONFIG', help='configs with a test set and load_from')
    add_config_options(model)
    rows = parser.add_argument_group('rows')
    rows.add_argument(
        '--method',
        nargs='+',
        metavar='NAME',
        help=f'methods, each with its quantizer, trained or not: some of {", ".join(METHOD_NAMES)}, or registered ones '
        '(default: calibration with what CONFIG says)',
    )
    rows.add_argument('--quant', nargs='+', metavar='PRESET', help='such as w8a8 w4a8 (default: what each CONFIG says)')
    rows.add_argument(
        '--samples',
        nargs='+',
        metavar='SOURCE',
        help=f'where samples come from: some of {", ".join(SOURCE_NAMES)}, or paths of folders of pictures or of '
        'samples.pt; generated is what the method makes by itself (default: generated gaussian)',
    )
    rows.add_argument('--calibration', nargs='+', metavar='SOURCE', help=argparse.SUPPRESS)  # its earlier name
    rows.add_argument(
        '--seeds', nargs='+', type=int, default=[0, 1, 2], metavar='N', help='one row each (default: 0 1 2)'
    )
    rows.add_argument(
        '--train',
        action='store_true',
        help='train the student too, as CONFIG says, on the samples of each source (default: calibrate alone)',
    )
    rows.add_argument(
        '--seconds',
        type=float,
        metavar='S',
        help='train for this time, samples included; the learning rate ends with it (default: the steps of the method)',
    )
    curves = parser.add_argument_group('curves and rows of other runs')
    curves.add_argument(
        '--curve',
        type=int,
        default=0,
        metavar='N',
        help='agreement at the start and N points of training, drawn against steps and seconds (default: none)',
    )
    curves.add_argument(
        '--curve-images',
        type=int,
        default=100,
        metavar='K',
        help='pictures of the test set for a point, always the same (default: %(default)s)',
    )
    curves.add_argument(
        '--rows',
        type=Path,
        metavar='FILE',
        help='JSON list that the rows are merged into, such as docs/results/samples.json (default: none)',
    )
    curves.add_argument(
        '--label',
        metavar='NAME',
        help='what the source generated is called in --rows and curves (default: the name of the method)',
    )
    run = parser.add_argument_group('run')
    run.add_argument(
        '--work-dir',
        metavar='FOLDER',
        default=os.path.join('work_dirs', 'compare'),
        help='where rows and table go (default: %(default)s)',
    )
    add_device_argument(run)
    run.add_argument(
        '--keep-students',
        action='store_true',
        help='keep student.pth and the log of every row (default: of rows that failed)',
    )
    return parser


def _wanted(args: argparse.Namespace):
    """What a command line asks for. Beside ``--calibration``, the earlier name, ``--samples`` is one saved file."""
    from psaq_mm.commands.comparison import Wanted

    if args.calibration and len(args.samples or ()) > 1:
        raise ConfigError('--calibration is an earlier name of --samples: give all sources to --samples')

    def each(values: Optional[Sequence], default: Sequence) -> Tuple:
        return tuple(dict.fromkeys(values or default))

    return Wanted(
        each(args.calibration or args.samples, Wanted.samples),
        each(args.seeds, Wanted.seeds),
        each(args.quant, Wanted.quants),
        each(args.method, Wanted.methods),
        args.train,
        args.samples[0] if args.calibration and args.samples else None,
        args.cfg_options,
        args.seconds,
        args.label,
    )


def main(argv: Optional[Sequence[str]] = None, prog: str = 'psaq-compare') -> int:
    """Command line; returns the exit status: 1 where a row failed."""
    parser, status = build_parser(prog), 0

    def command(args) -> None:
        from psaq_mm.commands.compare_rows import to_markdown
        from psaq_mm.commands.comparison import Shown, compare, plan, printer

        nonlocal status
        say = printer()
        configs = {path: load_config(path) for path in args.configs}
        runs = plan(configs, _wanted(args))
        if args.curve < 0 or args.curve_images < 1:
            raise ConfigError(
                f'--curve {args.curve} must be 0 or more points, on --curve-images {args.curve_images} of at least 1'
            )
        try:
            file = compare(
                runs, args.work_dir, args.keep_students, say, Shown(args.curve, args.curve_images, args.rows)
            )
        except KeyboardInterrupt:
            print(f'{parser.prog}: interrupted; the same command goes on where it was', file=sys.stderr)
            status = 130
            return
        say('\n' + to_markdown(file.table))
        say(f'saved to {args.work_dir}: compare.md, compare.json')
        failed = [run.name for run in runs if not file.done(run.key)]
        if failed:
            status = 1
            print(
                f'{parser.prog}: {len(failed)} of {len(runs)} rows failed ({failed[0]} first): the reasons are above '
                f'and in '
                f'{os.path.join(args.work_dir, "compare.json")}; the same command tries them again',
                file=sys.stderr,
            )

    return run_command(command, parser, argv) or status


if __name__ == '__main__':
    raise SystemExit(main())
