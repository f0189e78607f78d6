# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The bars of :mod:`psaq_mm.progress` on a terminal, by rich; imported by that module alone."""

import logging
import os
import sys
import time
from typing import Any, Dict, List, Optional, Sequence

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from psaq_mm.progress import Stage

__all__ = ['Bars', 'terminal']

_QUICK = 0.5
"""Seconds. A stage within another one is shown once it has lasted longer: shorter ones would flicker."""


def terminal(stream: Any) -> Optional[Console]:
    """A console on a stream; None where the terminal cannot move its cursor."""
    console = Console(file=stream)
    return None if console.is_dumb_terminal or not console.is_terminal else console


class _Count(ProgressColumn):
    """``12/48``, or sizes of a download."""

    def render(self, task: Task) -> Text:
        """Called by rich."""
        shown = decimal if task.fields['unit'] == 'bytes' else lambda count: f'{count:g}'
        total = '' if task.total is None else f'/{shown(int(task.total))}'
        return Text(f'{shown(int(task.completed))}{total}')


class _Above:
    """A stream whose lines go above the bars, for as long as there are bars.

    Args:
        stream: The one in whose place it is.
        console: With the bars.
    """

    def __init__(self, stream: Any, console: Console) -> None:
        self.stream, self._begun, self._process = stream, '', os.getpid()
        self._console: Optional[Console] = console

    def write(self, text: str) -> int:
        """See :meth:`io.TextIOBase.write`. A line is shown when it is whole."""
        if self._console is None or os.getpid() != self._process:  # a forked worker has no bars
            return self.stream.write(text)
        *lines, self._begun = (self._begun + text).split('\n')
        for line in lines:
            self._console.print(Text.from_ansi(line), soft_wrap=True)
        return len(text)

    def flush(self) -> None:
        """See :meth:`io.TextIOBase.flush`."""
        self.stream.flush()

    def release(self) -> None:
        """From now on everything goes to the stream itself."""
        self._console, begun = None, self._begun
        self._begun = ''
        if begun:
            self.stream.write(begun)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Bars:
    """A bar for each stage that is under way, the outermost first.

    Args:
        console: Where they are shown.
        streams: ``[sys.stdout, sys.stderr]``, whose lines go above the bars.
    """

    def __init__(self, console: Console, streams: Sequence[Any]) -> None:
        self._above = [_Above(stream, console) for stream in streams]
        self._tasks: Dict[Stage, Any] = {}
        self._progress = Progress(
            TextColumn('{task.description}', markup=False),
            BarColumn(bar_width=14),
            _Count(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._redirect()
        self._progress.start()

    def follow(self, stage: Stage) -> None:
        """Show where a stage is now."""
        task = self._tasks.get(stage)
        if stage.ended:
            if task is not None:
                self._progress.remove_task(self._tasks.pop(stage))
            return
        label = f'{stage.description}: {stage.detail}' if stage.detail else stage.description
        label = '  ' * _depth(stage) + label
        label = label if len(label) <= _WIDTH else f'{label[: _WIDTH - 3]}...'
        if task is not None:
            self._progress.update(task, completed=stage.done, total=stage.total, description=label)
        elif stage.parent is None or time.perf_counter() - stage.begun > _QUICK:
            self._tasks[stage] = self._progress.add_task(
                label, total=stage.total, completed=int(stage.done), unit=stage.unit
            )

    def close(self) -> None:
        """Take the bars away."""
        self._progress.stop()
        self._restore()

    # ------------------------------------------------------------------ lines of others
    def _redirect(self) -> None:
        places = {id(above.stream): above for above in self._above}
        for handler in _handlers():
            if id(handler.stream) in places:
                handler.setStream(places[id(handler.stream)])
        sys.stdout, sys.stderr = (places.get(id(stream), stream) for stream in (sys.stdout, sys.stderr))

    def _restore(self) -> None:
        places = {id(above): above.stream for above in self._above}
        for handler in _handlers():
            if id(handler.stream) in places:
                handler.setStream(places[id(handler.stream)])
        sys.stdout, sys.stderr = (places.get(id(stream), stream) for stream in (sys.stdout, sys.stderr))
        for above in self._above:
            above.release()


_WIDTH = 34
"""Characters of a description: with its bar, count and time a line fits 80 columns."""


def _depth(stage: Stage) -> int:
    return 0 if stage.parent is None else 1 + _depth(stage.parent)


def _handlers() -> List[Any]:
    """All handlers of the process that write to a stream. MMEngine's loggers are not known to ``logging`` by name."""
    known = (reference() for reference in list(getattr(logging, '_handlerList', ())))
    # One that looks sys.stderr up for each line has no stream of its own.
    return [one for one in known if isinstance(one, logging.StreamHandler) and 'stream' in vars(one)]
