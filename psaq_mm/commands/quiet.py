# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Many runs in one process: each with names of its own, silent but for a line of progress now and then."""

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
    """A copy of a config whose run shares nothing with earlier ones: MMEngine keeps loggers and visualizers by name."""
    # Unformatted: a runner writes its config four times, and laying it out takes longer than a small model's run.
    config = Config(copy.deepcopy(config.to_dict()), filename=config.filename, format_python_code=False)
    config.work_dir, config.launcher, config.log_level = str(work_dir), 'none', 'INFO'
    config.experiment_name = f'{os.path.basename(work_dir)}_{time.time_ns()}'
    # Without backends: dozens of runs would otherwise each open one in TensorBoard or elsewhere.
    drawn = config.get('visualizer') or dict(type='Visualizer')
    config.visualizer = dict(drawn, name=config.experiment_name, vis_backends=[])
    return config


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing on standard output and no warnings inside; log files are written as ever."""
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


class _Relay(logging.Handler):
    """Passes on log lines that say how far a run is (``[ 10/50]``), one every ``interval`` seconds at most."""

    def __init__(self, say: Callable[[str], None], interval: float):
        super().__init__(logging.INFO)
        self.say, self.interval, self.last = say, interval, time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        """Called by the logger."""
        line = record.getMessage()
        if time.monotonic() - self.last >= self.interval and _COUNTED.search(line):
            self.last = time.monotonic()
            self.say(' '.join(line.split())[:160])


class ProgressHook(Hook):
    """Says how far a silent run is, and closes its log files at the end.

    Args:
        say: Called with a line.
        interval: Least seconds between two lines; a run that takes less says nothing.
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
