"""What the benchmarks measure with: counts that can be known, and a child process that is a real one."""

import functools
import json
import sys

import pytest
import torch

from benchmarks import measuring

LINUX = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='peak memory is read from /proc')
MIB = 1 << 20


def taking(mebibytes):
    """As a benchmark's builder: what is there before, and a call that takes more."""
    kept = torch.ones(8 * MIB)

    def call():
        return len(torch.ones(mebibytes * MIB // 4)) + len(kept)

    return call


def test_calls_run_in_turn_and_the_first_turn_does_not_count():
    order = []
    seconds = measuring.in_turn(dict(a=lambda: order.append('a'), b=lambda: order.append('b')), 3)
    assert ''.join(order) == 'abababab'
    assert [len(found) for found in seconds.values()] == [3, 3]
    assert measuring.ratio_of([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0


@LINUX
def test_peak_counts_what_a_call_takes_and_gives_back():
    found = measuring.peak_of(taking(64))
    assert 60 * MIB < found.grown < 80 * MIB and found.result == 24 * MIB
    assert found.total > found.grown
    assert measuring.peak_of(taking(1)).grown < 20 * MIB  # not the one before


@LINUX
def test_peak_of_another_process():
    found = measuring.peak_apart(functools.partial, exec, 'x = b"x" * (64 << 20)', threads=1)
    assert 60 * MIB < found.grown < 80 * MIB < found.total


def test_rows_and_tables():
    rows = [measuring.row('fast', 1.25, 1.25), measuring.row('slow', 2, 1.5, reason='because')]
    assert [r['ok'] for r in rows] == [True, False] and json.loads(json.dumps(rows)) == rows
    assert measuring.table_of(rows).splitlines() == [
        '| claim | ratio | bound | holds |',
        '|-------|------:|-------|-------|',
        '| fast  | 1.250 | 1.25  | yes   |',
        '| slow  | 2.000 | 1.5   | no    |',
    ]


@pytest.mark.parametrize(
    'options, parts, code', [([], ('x', 'y'), 1), (['--quick'], ('x', 'y'), 0), (['--part', 'y'], ('y',), 1)]
)
def test_command_line(options, parts, code, capsys):
    asked = []

    def rows(quick, device, chosen):
        asked.append((quick, device, chosen))
        return [measuring.row('slow', 2, 1)]

    threads = ['--threads', str(torch.get_num_threads())]
    assert measuring.run_script(rows, 'What it is.', ('x', 'y'), [*options, *threads]) == code
    assert asked == [('--quick' in options, 'cpu', parts)] and '| slow' in capsys.readouterr().out
