# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantize a model without data: ``tools/dfq_train.py CONFIG --checkpoint FULL_PRECISION.pth``."""

import argparse
from typing import Optional, Sequence

from psaq_mm.commands.common import (
    add_config_arguments,
    add_quant_arguments,
    add_run_arguments,
    run_command,
    runnable_config,
)

__all__ = ['main']


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog='psaq-dfq-train', description=__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        '--checkpoint', help='full-precision weights: a file or a URL; defaults to load_from of the config'
    )
    add_run_arguments(parser)
    parser.add_argument('--resume', action='store_true', help='go on from the newest whole checkpoint in the work dir')
    parser.add_argument(
        '--val', action='store_true', help="validate on the config's validation set; without it no dataset is opened"
    )
    parser.add_argument(
        '--amp',
        nargs='?',
        const='bfloat16',
        choices=['bfloat16', 'float16'],
        help="the student's steps under autocast (dfq.amp); bfloat16 if no type follows",
    )
    add_quant_arguments(parser)

    def command(args) -> None:
        from psaq_mm.engine.running import run_data_free

        run_data_free(runnable_config(args), args.checkpoint, args.val, resume=args.resume, amp=args.amp)

    return run_command(command, parser, argv)


if __name__ == '__main__':
    raise SystemExit(main())
