# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How far long work is: stages that count steps, shown as bars where a person looks on. Needs neither PyTorch nor rich.

Any floor says what it does with :func:`track` or :func:`stage` and knows nothing of terminals. Bars are shown where
stdout and stderr are a terminal, rich is installed, the process is the first rank, and the environment variable
``PSAQ_MM_PROGRESS`` is not ``0``. They are gone when the work is done; lines of a log pass above them. Everywhere else
nothing is written. A :func:`listening` function learns of every step in either case.
"""

import contextlib
import os
import sys
import threading
import time
from typing import Any, Callable, Iterable, Iterator, List, Optional, TypeVar, Union

__all__ = ['Stage', 'bars_on', 'listening', 'stage', 'track']

T = TypeVar('T')


class Stage:
    """A piece of work that is under way.

    Attributes:
        description: What is done, such as ``'Rounding weights'``.
        total: Steps that it has; None: unknown.
        done: Steps so far.
        detail: What the current step is; ``''``: no more than its number.
        unit: ``'bytes'``, or ``''`` for steps.
        begun: When it began, as :func:`time.perf_counter` says.
        ended: Whether it is over.
        parent: The stage that it is a part of.
    """

    def __init__(self, description: str, total: Optional[float] = None, done: float = 0, unit: str = '') -> None:
        self.description, self.total, self.done, self.unit = description, total, done, unit
        self.detail, self.ended = '', False
        self.begun = time.perf_counter()
        self.parent: Optional[Stage] = None

    def advance(self, steps: float = 1) -> None:
        """``steps`` more are done."""
        self.done += steps
        _tell(self)

    def say(self, detail: str) -> None:
        """The next step is ``detail``."""
        self.detail = detail
        _tell(self)


Listener = Callable[[Stage], None]

_stages: List[Stage] = []  # that are under way, the outermost first
_listeners: List[Listener] = []
_bars: Any = None  # psaq_mm.progress_bars.Bars, while they are shown
_console: Any = None  # in place of the terminal


def _tell(one: Stage) -> None:
    for listener in _listeners:
        listener(one)
    if _bars is not None:
        _bars.follow(one)


@contextlib.contextmanager
def stage(description: str, total: Optional[float] = None, done: float = 0, unit: str = '') -> Iterator[Stage]:
    """The block is a stage; it calls :meth:`Stage.advance` after each step.

    Args:
        description: What is done.
        total: Steps. Defaults to None, unknown.
        done: Steps that were done before, such as in a run that is resumed.
        unit: ``'bytes'``, or ``''`` for steps.

    Example:
        >>> with stage('Rounding weights', len(layers)) as rounding:
        ...     for layer in layers:
        ...         work_on(layer)
        ...         rounding.advance()
    """
    global _bars
    own = Stage(description, total, done, unit)
    if threading.current_thread() is not threading.main_thread():
        yield own  # bars and listeners belong to the main thread
        return
    own.parent = _stages[-1] if _stages else None
    if not _stages:
        _bars = _new_bars()
    _stages.append(own)
    try:
        _tell(own)
        yield own
    finally:
        own.ended = True
        _stages.remove(own)
        bars = _bars
        try:
            _tell(own)
        finally:
            if not _stages and bars is not None:
                _bars = None
                bars.close()


def track(things: Union[Iterable[T], int], description: str, total: Optional[float] = None) -> Iterator[T]:
    """Goes through ``things``, or through ``range(things)``, as a stage with one step for each.

    Args:
        things: Any iterable, or a number.
        description: What is done.
        total: How many there are. Defaults to None, their length, if they have one.
    """
    items: Any = range(things) if isinstance(things, int) else things
    if total is None and hasattr(items, '__len__'):
        total = len(items)
    with stage(description, total) as own:
        for item in items:
            yield item
            own.advance()


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """In the block ``listener`` is called with each stage of the main thread that begins, goes on or ends."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextlib.contextmanager
def bars_on(console: Any) -> Iterator[None]:
    """In the block bars are shown on a ``rich.console.Console``, whatever stdout and stderr are; None: nowhere."""
    global _console
    before, _console = _console, (console,)
    try:
        yield
    finally:
        _console = before


def _new_bars() -> Any:
    if _console is not None:
        console, streams = _console[0], [sys.stdout, sys.stderr]
    else:
        console, streams = None, [sys.stdout, sys.stderr]
        if not _looked_at(streams):
            return None
    try:
        from psaq_mm.progress_bars import Bars, terminal
    except ImportError:  # rich is no requirement of the runtime
        return None
    if _console is None:
        console = terminal(sys.stderr)
    return None if console is None else Bars(console, streams)


def _looked_at(streams: List[Any]) -> bool:
    if os.environ.get('PSAQ_MM_PROGRESS', '1') == '0' or os.environ.get('RANK', '0') != '0':
        return False
    return all(getattr(stream, 'isatty', lambda: False)() for stream in streams)
