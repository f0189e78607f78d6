# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantize a model without data: ``psaq quantize CONFIG --checkpoint FULL_PRECISION.pth``."""

import argparse
from pathlib import Path
from typing import Optional, Sequence

from psaq_mm.commands.common import (
    add_config_arguments,
    add_quant_arguments,
    add_run_arguments,
    run_command,
    runnable_config,
)
from psaq_mm.commands.parsing import make_parser

__all__ = ['build_parser', 'main']


def build_parser(prog: str = 'psaq-dfq-train') -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = make_parser(
        prog,
        'CONFIG [--checkpoint FP.pth] [options]',
        'Quantize a trained model without data. Pictures are drawn or synthesized; no data set is opened. The '
        'quantized model, the student, is written to student.pth in the work dir.',
        [
            'mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py \\\n'
            '      --checkpoint mask_rcnn_swin-t.pth --quant w8a8 --method best',
            'configs/quantized.py --work-dir work_dirs/first --device cuda:1',
            'configs/quantized.py --work-dir work_dirs/first --resume',
        ],
    )
    model = add_config_arguments(parser)
    model.add_argument(
        '--checkpoint', metavar='FP.pth', help='full-precision weights, a file or a URL (default: load_from of CONFIG)'
    )
    add_quant_arguments(parser)
    run = add_run_arguments(parser)
    run.add_argument(
        '--resume',
        nargs='?',
        const=True,
        default=False,
        metavar='PATH',
        help='go on from a checkpoint (iter_N.pth), or from the newest one in a work dir, where results then go too; '
        'without PATH from the newest one in the work dir',
    )
    run.add_argument(
        '--val',
        action='store_true',
        help='validate on the validation set of CONFIG (default: no data set is opened)',
    )
    run.add_argument(
        '--amp',
        nargs='?',
        const='bfloat16',
        choices=['bfloat16', 'float16'],
        help='train the student under autocast; bfloat16 if no type follows (default: dfq.amp of CONFIG)',
    )
    return parser


def main(argv: Optional[Sequence[str]] = None, prog: str = 'psaq-dfq-train') -> int:
    """Command line; returns the exit status."""

    def command(args) -> None:
        from psaq_mm.engine.running import run_data_free

        if isinstance(args.resume, str) and Path(args.resume).is_dir():
            args.work_dir = args.work_dir or args.resume
        run_data_free(runnable_config(args), args.checkpoint, args.val, resume=args.resume, amp=args.amp)

    return run_command(command, build_parser(prog), argv)


if __name__ == '__main__':
    raise SystemExit(main())
