# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantize a model without data: ``tools/dfq_train.py CONFIG --checkpoint FULL_PRECISION.pth``."""

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
from psaq_mm.errors import CheckpointError

__all__ = ['main', 'data_free_runner', 'run_data_free']


def data_free_runner(config, resume: bool = False):
    """A runner for a config in data-free form (:func:`psaq_mm.engine.config.to_data_free`)."""
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    from psaq_mm.engine.building import set_scope
    from psaq_mm.engine.checkpoint import RESTRICTED, read_checkpoint
    from psaq_mm.engine.hooks.data_free_quant_hook import checkpoints_in

    set_scope(config)
    if resume:
        found = checkpoints_in(config.work_dir)
        whole = None
        while found and whole is None:
            candidate = found.pop()
            try:
                read_checkpoint(candidate)
                whole = candidate
            except CheckpointError as error:
                print(f'{error}; the one before it is used', flush=True)
        if whole is not None:
            config.load_from, config.resume = f'{RESTRICTED}{whole}', True
        elif checkpoints_in(config.work_dir) or not any(Path(config.work_dir).glob('*/vis_data')):
            raise CheckpointError(
                f'there is no checkpoint to resume from in {config.work_dir}: run without --resume, or '
                'give the --work-dir of the run'
            )
        else:  # ended before its first samples were there
            print(f'{config.work_dir} has no checkpoint yet: the run begins anew', flush=True)
    return RUNNERS.build(config) if config.get('runner_type') else Runner.from_cfg(config)


def run_data_free(
    config,
    checkpoint: Optional[str] = None,
    val: bool = False,
    quant=None,
    resume: bool = False,
    amp: Optional[str] = None,
):
    """Quantize a loaded config; returns the runner after training."""
    from psaq_mm.engine.config import to_data_free

    if amp:
        given = config.get('dfq')
        config.dfq = {**(dict(preset=given) if isinstance(given, str) else dict(given or {})), 'amp': amp}
    runner = data_free_runner(to_data_free(config, checkpoint=checkpoint, val=val, quant=quant), resume)
    runner.train()
    return runner


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
        run_data_free(runnable_config(args), args.checkpoint, args.val, resume=args.resume, amp=args.amp)

    return run_command(command, parser, argv)


if __name__ == '__main__':
    raise SystemExit(main())
