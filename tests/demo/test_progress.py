"""The time left follows the pace of the machine."""

import importlib.util
import io
import logging
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location(
    'demo_progress', Path(__file__).resolve().parents[2] / 'demo' / 'progress.py'
)
progress = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(progress)


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [100.0]
    monkeypatch.setattr(progress.time, 'perf_counter', lambda: now[0])
    return now


def test_what_is_left_is_scaled_by_what_was_measured(clock):
    out = io.StringIO()
    run = progress.Progress([('a', 10.0), ('b', 30.0), ('c', 20.0)], out)
    assert run.remaining == 60
    with run.step():
        clock[0] += 40  # a quarter as fast as planned, or a slow start
    assert run.remaining == 50 * 2
    with run.step():
        clock[0] += 15
        assert run.remaining == pytest.approx(60 - 15 + 40)
        clock[0] += 105
        assert run.remaining == pytest.approx(20 * 2)
    assert run.remaining == pytest.approx(20 * 2)
    with run.step():
        clock[0] += 1
    assert run.remaining == 0
    assert out.getvalue().splitlines() == [
        '[ 0:00, about 1:00 left]  a',
        '[ 0:40, about 1:40 left]  b',
        '[ 2:40, about 0:40 left]  c',
    ]


@pytest.mark.parametrize('slow', range(6))
def test_one_step_that_was_held_up_says_nothing_of_the_others(clock, slow):
    """Imports from a cold disk in the first, another program's turn in a later one."""
    run = progress.Progress([(str(number), 10.0 + number) for number in range(10)], io.StringIO())
    for number in range(9):
        left = sum(seconds for _, seconds in run.plan[number:])
        if number != 1 or slow:
            assert run.remaining == pytest.approx(left), number
        assert run.remaining < 6 * left
        with run.step():
            clock[0] += run.plan[number][1] * (30 if number == slow else 1)


def test_a_machine_that_is_slower_throughout_is_known_by_the_third_step(clock):
    run = progress.Progress([('x', 10.0)] * 6, io.StringIO())
    for number in range(5):
        with run.step():
            clock[0] += 35
        if number > 1:
            assert run.remaining == pytest.approx(35.0 * (5 - number))


def test_a_first_step_that_outlasts_its_plan_says_so_before_it_ends(clock):
    run = progress.Progress([('x', 10.0)] * 3, io.StringIO())
    with run.step():
        clock[0] += 90
        assert run.remaining == pytest.approx(20.0 * 3)


def test_a_step_that_fails_is_not_counted(clock):
    run = progress.Progress([('a', 10.0)], io.StringIO())
    with pytest.raises(ValueError):
        with run.step():
            raise ValueError
    assert run.done == 0


def test_beats_are_apart_and_speak_of_what_is_counted(clock):
    out = io.StringIO()
    run = progress.Progress([('a', 100.0)], out)
    logger = logging.Logger('demo')
    logger.addHandler(progress.LogBeat(run))
    with run.step():
        for number in range(1, 41):
            clock[0] += 1
            logger.info('Samples [%4d/40]  eta: 3 s', number)
            logger.info('something else')
        clock[0] += 20
        logger.info('Iter(train) [ 50/200]  lr: 1e-4')
    assert [line.split(']')[1].strip() for line in out.getvalue().splitlines()[1:]] == [
        'making samples, step 15 of 40',
        'making samples, step 30 of 40',
        'training the student, step 50 of 200',
    ]
