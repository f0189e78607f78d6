# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Starting a data-free run: the runner of a config."""

from pathlib import Path
from typing import Optional

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


def data_free_runner(config, resume: bool = False):
    """A runner for a config in data-free form.

    Args:
        config: Of :func:`psaq_mm.engine.config.to_data_free`.
        resume: Whether to go on from the newest checkpoint in the work dir that can be read.

    Raises:
        CheckpointError: There is no checkpoint to resume from.
    """
    set_scope(config)
    checkpoint = _newest_checkpoint(config.work_dir) if resume else None
    if checkpoint is not None:
        config.load_from, config.resume = f'{RESTRICTED}{checkpoint}', True
    return RUNNERS.build(config) if config.get('runner_type') else Runner.from_cfg(config)


def run_data_free(
    config,
    checkpoint: Optional[str] = None,
    val: bool = False,
    quant=None,
    resume: bool = False,
    amp: Optional[str] = None,
):
    """Quantize the model of a config without data.

    Args:
        config: A whole config of a full-precision or a quantized model.
        checkpoint: Full-precision weights: a file or URL. None: ``load_from`` of the config.
        val: Whether to validate on the config's validation set.
        quant: Precision in place of the config's.
        resume: Whether to go on from the newest checkpoint in the work dir.
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
