"""Stages of long work and their bars: on a terminal, where there is none, with lines of a log, without rich."""

import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from psaq_mm import progress
from psaq_mm.progress import bars_on, listening, stage, track

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def screen():
    """A terminal of 80 columns whose text can be read."""
    return Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self):
        return True


def test_a_bar_tells_what_is_done_and_is_gone_at_the_end(screen):
    with bars_on(screen), stage('Rounding weights', 48) as rounding:
        rounding.advance(12)
        progress._bars._progress.refresh()
    text = screen.file.getvalue()
    assert 'Rounding weights' in text and '12/48' in text
    assert text.endswith('\x1b[?25h') or '\x1b[2K' in text.rpartition('12/48')[2], 'the bar is not wiped away'
    assert progress._bars is None and not progress._stages


def test_a_stage_within_another_is_shown_below_it_once_it_lasts(screen, monkeypatch):
    from psaq_mm import progress_bars

    monkeypatch.setattr(progress_bars, '_QUICK', 0.0)
    with bars_on(screen), stage('Student', 4) as outer:
        for _ in track(2, 'Synthesis'):
            pass
        progress._bars._progress.refresh()
        assert [task.description for task in progress._bars._progress.tasks] == ['Student']
        with stage('Synthesis', 3) as inner:
            inner.advance()
            tasks = [(task.description, task.completed) for task in progress._bars._progress.tasks]
        outer.advance()
    assert tasks == [('Student', 0), ('  Synthesis', 1)]


def test_short_stages_within_another_are_not_shown(screen):
    with bars_on(screen), stage('Student', 4):
        with stage('Synthesis', 3) as inner:
            inner.advance()
            assert len(progress._bars._progress.tasks) == 1


def test_a_line_fits_eighty_columns(screen):
    with bars_on(screen), stage('Downloading ' + 'x' * 90, 10**9, unit='bytes') as coming:
        coming.advance(10**8)
        progress._bars._progress.refresh()
    lines = [line.strip('\r').replace('\x1b[?25h', '') for line in screen.file.getvalue().split('\x1b[2K')[1:]]
    assert any('100.0 MB/1.0 GB' in line for line in lines)
    assert max(map(len, lines)) <= 80 and not any('\n' in line for line in lines)


def test_lines_of_a_log_go_above_the_bars_whole_and_in_order(screen, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, 'stdout', out)
    logger = logging.Logger('not known by name')  # as MMEngine's are
    handler = logging.StreamHandler(out)
    logger.addHandler(handler)
    long = 'x' * 200 + ' [1/2] [bold]'
    with bars_on(screen), stage('Student', 2) as steps:
        logger.warning(long)
        steps.advance()
        print('first half, ', end='')
        print('second half')
        assert handler.stream is not out
    text = screen.file.getvalue()
    assert long in text and 'first half, second half' in text and text.index(long) < text.index('first half')
    assert not out.getvalue(), 'written past the bars'
    assert handler.stream is out and sys.stdout is out
    logger.warning('afterwards')
    assert out.getvalue() == 'afterwards\n'


def test_a_logger_that_is_made_meanwhile_writes_to_the_stream_itself_afterwards(screen, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, 'stdout', out)
    with bars_on(screen), stage('Rows', 1):
        handler = logging.StreamHandler(sys.stdout)
        kept = sys.stdout
    assert handler.stream is out
    kept.write('late')
    assert out.getvalue() == 'late'


def test_an_error_takes_the_bars_away(screen, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, 'stdout', out)
    with bars_on(screen), pytest.raises(KeyboardInterrupt), stage('Student', 2), stage('Synthesis', 2):
        raise KeyboardInterrupt
    assert sys.stdout is out and progress._bars is None and not progress._stages


def test_a_loop_that_is_left_early_ends_its_stage(screen):
    with bars_on(screen):
        for item in track(['a', 'b'], 'Predicting'):
            assert item == 'a'
            break
        assert progress._bars is None and not progress._stages


@pytest.mark.parametrize(
    ('stdout', 'stderr', 'variables', 'shown'),
    [
        (Terminal, Terminal, {}, True),
        (io.StringIO, Terminal, {}, False),  # as in `psaq quantize ... | tee log`
        (Terminal, io.StringIO, {}, False),
        (Terminal, Terminal, dict(PSAQ_MM_PROGRESS='0'), False),
        (Terminal, Terminal, dict(RANK='1'), False),
        (Terminal, Terminal, dict(RANK='0'), True),
        (Terminal, Terminal, dict(TERM='dumb'), False),
    ],
)
def test_where_bars_are_shown(monkeypatch, stdout, stderr, variables, shown):
    for name in ('PSAQ_MM_PROGRESS', 'RANK'):
        monkeypatch.delenv(name, raising=False)
    for name, value in dict(dict(TERM='xterm', COLUMNS='80'), **variables).items():
        monkeypatch.setenv(name, value)
    out, err = stdout(), stderr()
    monkeypatch.setattr(sys, 'stdout', out)
    monkeypatch.setattr(sys, 'stderr', err)
    with stage('Student', 2) as steps:
        steps.advance()
    assert ('Student' in err.getvalue()) == shown
    assert not out.getvalue() and (shown or not err.getvalue())


def test_without_rich_there_is_no_bar_and_no_error():
    code = """
import sys
class Refuse:
    def find_spec(self, name, *args):
        if name.split('.')[0] in ('rich', 'torch'):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
class Terminal:
    def __init__(self, stream): self.stream = stream
    def isatty(self): return True
    def __getattr__(self, name): return getattr(self.stream, name)
sys.stdout, sys.stderr = Terminal(sys.stdout), Terminal(sys.stderr)
from psaq_mm.progress import track
print(list(track([1, 2], 'Predicting')))
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, '[1, 2]\n', '')


def test_a_listener_learns_of_every_step():
    seen = []
    with listening(lambda one: seen.append((one.description, one.done, one.total, one.ended))):
        with stage('Student', 3, done=1) as steps:
            steps.advance()
    with stage('Unheard'):
        pass
    assert seen == [('Student', 1, 3, False), ('Student', 2, 3, False), ('Student', 2, 3, True)]
