# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Starting a data-free run: the runner of a config."""

from pathlib import Path
from typing import Optional, Union

from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from psaq_mm.engine.building import set_scope
from psaq_mm.engine.checkpoint import RESTRICTED, read_checkpoint
from psaq_mm.engine.config import to_data_free
from psaq_mm.engine.hooks.data_free_quant_hook import checkpoints_in
from psaq_mm.errors import CheckpointError

__all__ = ['data_free_runner', 'run_data_free']


def _newest_checkpoint(work_dir: str) -> Optional[Path]:
    """The newest checkpoint of a run that can be read; None where the run ended before its first."""
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
    if amp:
        dfq = config.get('dfq') or {}
        config.dfq = {**(dict(preset=dfq) if isinstance(dfq, str) else dfq), 'amp': amp}
    runner = data_free_runner(to_data_free(config, checkpoint=checkpoint, val=val, quant=quant), resume)
    runner.train()
    return runner
