# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Many runs in one process: each has its own names, and prints only a line of progress now and then."""

import contextlib
import copy
import logging
import os
import re
import time
import warnings
from typing import Callable, Iterator

from mmengine.config import Config
from mmengine.hooks import Hook

__all__ = ['ProgressHook', 'isolated', 'silence']

_COUNTED = re.compile(r'\[\s*\d+/\s*\d+\]')


def isolated(config, work_dir: str):
    """A copy of a config with its own names: MMEngine would give a run the logger and visualizer of an earlier one."""
    # Unformatted: a runner writes its config four times, and laying it out takes longer than a small model's run.
    config = Config(copy.deepcopy(config.to_dict()), filename=config.filename, format_python_code=False)
    config.work_dir, config.launcher, config.log_level = str(work_dir), 'none', 'INFO'
    config.experiment_name = f'{os.path.basename(work_dir)}_{time.time_ns()}'
    # Without backends: dozens of runs would otherwise each open one in TensorBoard or elsewhere.
    visualizer = config.get('visualizer') or dict(type='Visualizer')
    config.visualizer = dict(visualizer, name=config.experiment_name, vis_backends=[])
    return config


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No standard output and no warnings inside the block. Log files are written as usual."""
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


class _Relay(logging.Handler):
    """Passes on log lines with progress (``[ 10/50]``), at most one every ``interval`` seconds."""

    def __init__(self, say: Callable[[str], None], interval: float):
        super().__init__(logging.INFO)
        self.say, self.interval, self.last = say, interval, time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        """Handle a line of the log."""
        line = record.getMessage()
        if time.monotonic() - self.last >= self.interval and _COUNTED.search(line):
            self.last = time.monotonic()
            self.say(' '.join(line.split())[:160])


class ProgressHook(Hook):
    """Reports the progress of a silent run, and closes its log files at the end.

    Not a progress bar: the lines go to logs and pipes as often as to a terminal.

    Args:
        say: Called with a line.
        interval: Least seconds between two lines. A run that takes less time reports nothing.
    """

    priority = 'LOWEST'

    def __init__(self, say: Callable[[str], None], interval: float = 30.0):
        self._relay = _Relay(say, interval)

    def _begin(self, runner) -> None:
        if self._relay not in runner.logger.handlers:
            runner.logger.addHandler(self._relay)

    def _end(self, runner) -> None:
        runner.logger.removeHandler(self._relay)
        for handler in list(runner.logger.handlers):
            if isinstance(handler, logging.FileHandler):
                runner.logger.removeHandler(handler)
                handler.close()

    before_train = before_test = _begin
    after_train = after_test = _end
