# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantize a model without data: ``psaq quantize CONFIG --checkpoint FULL_PRECISION.pth``."""

import argparse
from pathlib import Path
from typing import Optional, Sequence, Union

from psaq_mm.commands.common import (
    add_config_arguments,
    add_quant_arguments,
    add_run_arguments,
    run_command,
    runnable_config,
)
from psaq_mm.commands.parsing import make_parser
from psaq_mm.errors import CheckpointError

__all__ = ['build_parser', 'main', 'data_free_runner', 'run_data_free']


def _newest_checkpoint(work_dir: str) -> Optional[Path]:
    """The newest checkpoint of a run that can be read; None where the run ended before its first."""
    from psaq_mm.engine.checkpoint import read_checkpoint
    from psaq_mm.engine.hooks.data_free_quant_hook import checkpoints_in

    checkpoints = checkpoints_in(work_dir)
    for path in reversed(checkpoints):
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            print(f'{error}; the one before it is used', flush=True)
        else:
            return path
    if checkpoints or not any(Path(work_dir).glob('*/vis_data')):
        raise CheckpointError(
            f'there is no checkpoint to resume from in {work_dir}: run without --resume, or give the --work-dir of the '
            'run'
        )
    print(f'{work_dir} has no checkpoint yet: the run begins anew', flush=True)
    return None


def _checkpoint_to_resume(resume: Union[bool, str], work_dir: str) -> Optional[Path]:
    """The checkpoint that ``--resume`` means; None where a run begins anew.

    Raises:
        CheckpointError: There is none, or it is of no run.
    """
    from psaq_mm.engine.checkpoint import read_checkpoint

    if resume is False:
        return None
    if resume is True:
        return _newest_checkpoint(work_dir)
    path = Path(resume)
    if path.is_dir():
        return _newest_checkpoint(str(path))
    if not path.is_file():
        raise CheckpointError(
            f'--resume {resume}: there is no checkpoint and no work dir of this name: check the path, or leave it out '
            'to go on from the newest checkpoint in the work dir'
        )
    if 'psaq_mm' not in read_checkpoint(path):
        raise CheckpointError(
            f'--resume {resume} is no checkpoint of a run, which holds its samples too: give iter_N.pth of its work '
            'dir, or the work dir'
        )
    return path


def data_free_runner(config, resume: Union[bool, str] = False):
    """A runner for a config in data-free form.

    Args:
        config: Of :func:`psaq_mm.engine.config.to_data_free`.
        resume: Whether to go on from the newest checkpoint in the work dir that can be read; or the path of a
            checkpoint, or of a folder whose newest one is taken.

    Raises:
        CheckpointError: There is no checkpoint to resume from.
    """
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    from psaq_mm.engine.building import set_scope
    from psaq_mm.engine.checkpoint import RESTRICTED

    set_scope(config)
    checkpoint = _checkpoint_to_resume(resume, config.work_dir)
    if checkpoint is not None:
        config.load_from, config.resume = f'{RESTRICTED}{checkpoint}', True
    return RUNNERS.build(config) if config.get('runner_type') else Runner.from_cfg(config)


def run_data_free(
    config,
    checkpoint: Optional[str] = None,
    val: bool = False,
    quant=None,
    resume: Union[bool, str] = False,
    amp: Optional[str] = None,
):
    """Quantize the model of a config without data.

    Args:
        config: A whole config of a full-precision or a quantized model.
        checkpoint: Full-precision weights: a file or URL. None: ``load_from`` of the config.
        val: Whether to validate on the config's validation set.
        quant: Precision in place of the config's.
        resume: See :func:`data_free_runner`.
        amp: ``dfq.amp``; None: the config's.

    Returns:
        The runner after training.
    """
    from psaq_mm.engine.config import to_data_free

    if amp:
        dfq = config.get('dfq') or {}
        config.dfq = {**(dict(preset=dfq) if isinstance(dfq, str) else dfq), 'amp': amp}
    runner = data_free_runner(to_data_free(config, checkpoint=checkpoint, val=val, quant=quant), resume)
    runner.train()
    return runner


def build_parser(prog: str = 'psaq-dfq-train') -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = make_parser(
        prog,
        'CONFIG [--checkpoint FP.pth] [options]',
        'Quantize a trained model without data. Pictures are drawn or synthesized; no data set is opened. The quantized '
        'model, the student, is written to student.pth in the work dir.',
        [
            'mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py \\\n      --checkpoint mask_rcnn_swin-t.pth --quant w8a8 --method best',
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
        if isinstance(args.resume, str) and Path(args.resume).is_dir():
            args.work_dir = args.work_dir or args.resume
        run_data_free(runnable_config(args), args.checkpoint, args.val, resume=args.resume, amp=args.amp)

    return run_command(command, build_parser(prog), argv)


if __name__ == '__main__':
    raise SystemExit(main())
