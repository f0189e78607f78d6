# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Starting a data-free run: the runner of a config, or of a model in memory."""

import contextlib
import logging
import multiprocessing
import random
import tempfile
import time
from pathlib import Path
from typing import Iterator, Optional, Union

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import RUNNERS, DefaultScope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import nn

from psaq_mm.engine.building import set_scope
from psaq_mm.engine.checkpoint import RESTRICTED, read_checkpoint
from psaq_mm.engine.config import to_data_free
from psaq_mm.engine.hooks.data_free_quant_hook import checkpoints_in
from psaq_mm.errors import CheckpointError
from psaq_mm.type_names import type_name

__all__ = ['data_free_runner', 'run_data_free', 'run_unseen', 'undisturbed']


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


# ---------------------------------------------------------------------- inside of a user's program
class _Held(nn.Module):
    """A model in memory as a runner takes it. A runner would call ``init_weights`` of the model itself, which draws
    them anew, and asks for a ``train_step``, which networks of timm and transformers have not. The loop calls neither.

    Args:
        model: The student; the loop finds it as ``module``.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.module = model

    def train_step(self, *args, **kwargs):
        """Not called: the loop makes the student's steps itself."""
        raise NotImplementedError


@contextlib.contextmanager
def undisturbed(verbose: bool = False) -> Iterator[None]:
    """Whatever MMEngine changes for a run is as before at the end of the block: random state, the default scope, the
    current logger, threads of OpenCV, the way in which processes are started.

    Args:
        verbose: Whether the log is printed; if not, warnings and errors are.
    """
    managed = {kind: dict(kind._instance_dict) for kind in (DefaultScope, MMLogger, MessageHub, Visualizer)}
    state, numbers, start = random.getstate(), np.random.get_state(), multiprocessing.get_start_method(allow_none=True)
    threads = _opencv_threads()
    level = 'INFO' if verbose else 'WARNING'
    with torch.random.fork_rng():
        try:
            MMLogger.get_instance(f'psaq_mm_{time.time_ns()}', logger_name='psaq_mm', log_level=level)
            yield
        finally:
            for kind, instances in managed.items():
                for name in [name for name in kind._instance_dict if name not in instances]:
                    _close(kind._instance_dict.pop(name))
            random.setstate(state)
            np.random.set_state(numbers)
            if multiprocessing.get_start_method(allow_none=True) != start:
                multiprocessing.set_start_method(start, force=True)
            _opencv_threads(threads)


def _opencv_threads(number: Optional[int] = None) -> int:
    """OpenCV's number of threads, which is set first where one is given."""
    import cv2

    if number is not None and number != cv2.getNumThreads():
        cv2.setNumThreads(number)
    return cv2.getNumThreads()


def _close(instance) -> None:
    for handler in list(getattr(instance, 'handlers', ())):
        if isinstance(handler, logging.FileHandler):
            instance.removeHandler(handler)
            handler.close()


def run_unseen(
    config: Config, model: Optional[nn.Module] = None, work_dir: Optional[str] = None, verbose: bool = False
):
    """Run a config in data-free form inside of a user's program: nothing else of the process is changed.

    Args:
        config: Of :func:`psaq_mm.engine.config.to_data_free`.
        model: The quantized student, in place of the one that the config builds.
        work_dir: For the files of the run. Defaults to None: there are none.
        verbose: Whether the log is printed.

    Returns:
        The loop of the run; its ``model`` is the student.
    """
    # Unformatted: a runner writes its config four times, and laying it out takes longer than a small model's run.
    config = Config(config.to_dict(), filename=config.filename, format_python_code=False)
    config.launcher, config.log_level = 'none', 'INFO' if verbose else 'WARNING'
    config.experiment_name = f'psaq_mm_{time.time_ns()}'
    config.visualizer = dict(type='Visualizer', name=config.experiment_name, vis_backends=[])
    with contextlib.ExitStack() as stack:
        config.work_dir = work_dir or stack.enter_context(tempfile.TemporaryDirectory())
        if work_dir is None:
            config.custom_hooks = [h for h in config.custom_hooks if type_name(h) != 'DataFreeQuantHook']
        if model is None:
            runner = data_free_runner(config)
        else:
            runner = Runner(
                _Held(model),
                config.work_dir,
                train_dataloader=config.train_dataloader,
                train_cfg=config.train_cfg,
                optim_wrapper=config.optim_wrapper,
                param_scheduler=config.param_scheduler,
                default_hooks=config.default_hooks,
                custom_hooks=config.custom_hooks,
                log_processor=config.log_processor,
                log_level=config.log_level,
                visualizer=config.visualizer,
                default_scope=config.get('default_scope') or 'mmengine',
                randomness=config.randomness,
                experiment_name=config.experiment_name,
                cfg=config,
            )
        runner.train()
        return runner.train_loop
