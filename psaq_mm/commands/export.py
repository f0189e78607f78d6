# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A quantized model to ONNX with integer weights and activations: ``psaq export CONFIG STUDENT.pth --out DIR``."""

import argparse
import functools
from typing import Optional, Sequence

from psaq_mm.commands.common import add_config_arguments, add_quant_arguments, load_config, run_command
from psaq_mm.commands.listing import RUNTIME_NAMES
from psaq_mm.commands.parsing import make_parser

__all__ = ['build_parser', 'main']

FORMATS = ('bundle', 'onnx')


def build_parser(prog: str = 'psaq-export') -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = make_parser(
        prog,
        'CONFIG STUDENT.pth --out DIR [options]',
        'Write a student as ONNX graphs with integer weights and activations. What is written runs without PyTorch and '
        'OpenMMLab, with psaq predict and psaq_mm.predict.',
        [
            'CONFIG work_dirs/CONFIG/student.pth --out deployed --verify',
            'CONFIG work_dirs/CONFIG/student.pth --out deployed \\\n      --size 800 1216 --size 1216 800',
            'CONFIG work_dirs/CONFIG/student.pth --out graphs --format onnx',
        ],
    )
    model = add_config_arguments(parser)
    model.add_argument('checkpoint', metavar='STUDENT.pth', help='as psaq quantize writes it')
    add_quant_arguments(parser)
    result = parser.add_argument_group('result')
    result.add_argument(
        '--out', required=True, metavar='DIR', help='folder to be written; an exported model in it is replaced'
    )
    result.add_argument(
        '--size',
        nargs=2,
        type=int,
        action='append',
        metavar=('H', 'W'),
        help='a picture size to export for, in pixels; give it again for more sizes (default: what the test pipeline '
        'makes of photographs)',
    )
    result.add_argument(
        '--dynamic',
        action='store_true',
        help='one graph for pictures of any size, padded to multiples of 32; slower than a graph of the size (default: '
        'a graph for each size)',
    )
    result.add_argument(
        '--format',
        nargs='+',
        choices=FORMATS,
        default=FORMATS[:1],
        help='bundle: for psaq predict, psaq test --deployed and psaq_mm.load; onnx: plain ONNX files for other '
        'programs; both: the ONNX files are in the folder onnx of the bundle (default: bundle)',
    )
    result.add_argument(
        '--external-data',
        action='store_true',
        help='with --format onnx, write the weights beside the ONNX files, which then share them (default: inside)',
    )
    result.add_argument('--opset', type=int, metavar='N', help='of ONNX, 17 or newer (default: the oldest that fits)')
    runtime = parser.add_argument_group('runtime')
    runtime.add_argument(
        '--runtime',
        nargs='+',
        default=[],
        metavar='NAME',
        help=f'some of {", ".join(RUNTIME_NAMES)}: start the exported model there, and tell what it runs as integers '
        '(default: none)',
    )
    runtime.add_argument(
        '--verify',
        action='store_true',
        help='compare the integer codes with those of the student, layer by layer and for each size, in each '
        '--runtime, or in all that are installed (default: not compared)',
    )
    runtime.add_argument('--threads', type=int, metavar='N', help="of the runtime (default: the runtime's own choice)")
    return parser


def main(argv: Optional[Sequence[str]] = None, prog: str = 'psaq-export') -> int:
    """Command line; returns the exit status."""

    def command(args) -> None:
        from psaq_mm.engine.exporting import Wanted, build_student, said_of, write_export

        wanted = Wanted(
            args.out,
            args.size,
            args.dynamic,
            args.format,
            args.verify,
            args.runtime,
            args.external_data,
            args.opset,
            args.threads,
        )
        wanted.check()
        config = load_config(args.config, args.cfg_options, args.quant, args.method)
        wanted = wanted.with_runtimes()
        model, checkpoint = build_student(config, args.checkpoint, args.quant, args.method, args.cfg_options)
        said = said_of(config, checkpoint['meta'].get('dataset_meta') or {}, wanted.sizes)
        write_export(model, said, wanted, functools.partial(print, flush=True))

    return run_command(command, build_parser(prog), argv)


if __name__ == '__main__':
    raise SystemExit(main())
