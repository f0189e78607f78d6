# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A quantized model to ONNX with integer weights and activations: ``tools/export.py CONFIG STUDENT.pth --out DIR``."""

import argparse
import functools
from typing import Optional, Sequence

from psaq_mm.commands.common import add_config_arguments, add_quant_arguments, load_config, run_command
from psaq_mm.runtime import RUNTIMES

__all__ = ['main']

FORMATS = ('bundle', 'onnx')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='psaq-export', description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='student.pth, as tools/dfq_train.py writes it')
    parser.add_argument('--out', required=True, help='directory to be written; an exported model in it is replaced')
    parser.add_argument(
        '--size',
        nargs=2,
        type=int,
        action='append',
        metavar=('H', 'W'),
        help='an image size to export for, in pixels; give it again for more sizes; defaults to what the test '
        'pipeline makes',
    )
    parser.add_argument(
        '--dynamic',
        action='store_true',
        help='one graph for images of any size, padded to multiples of 32; slower than a graph of the size',
    )
    parser.add_argument(
        '--runtime',
        nargs='+',
        default=[],
        metavar='NAME',
        help=f'{", ".join(RUNTIMES)}: start the exported model there, and tell what it runs as integers',
    )
    parser.add_argument(
        '--verify',
        action='store_true',
        help='compare the integer codes with the fake-quantized model, layer by layer and for each size, in each '
        '--runtime (without one: in all that are installed)',
    )
    parser.add_argument(
        '--format',
        nargs='+',
        choices=FORMATS,
        default=FORMATS[:1],
        help='bundle: for psaq_mm.deploy.load and tools/test.py --deployed; onnx: plain ONNX files for other programs; '
        'both: the ONNX files stand in the folder onnx of the bundle; defaults to bundle',
    )
    parser.add_argument(
        '--external-data',
        action='store_true',
        help='with --format onnx, write the weights beside the ONNX files, which then share them',
    )
    parser.add_argument('--opset', type=int, help='of ONNX, 17 or newer')
    parser.add_argument('--threads', type=int, help='of the runtimes; defaults to their own choice')
    add_quant_arguments(parser)
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
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

    return run_command(command, _parser(), argv)


if __name__ == '__main__':
    raise SystemExit(main())
