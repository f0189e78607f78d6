# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import all as collector
from benchmarks.scaling import exponent

ROOT = Path(__file__).resolve().parents[2]


def test_a_selection_is_measured_and_written(tmp_path):
    output = tmp_path / 'new' / 'benchmarks.json'
    command = [sys.executable, 'benchmarks/all.py', '--quick', '--only', 'startup', '--output', str(output)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    rows = json.loads(output.read_text())
    assert len(rows) == 2 and all(set(row) >= {'name', 'ratio', 'bound', 'ok'} for row in rows), done.stdout
    assert all(row['ok'] == (row['ratio'] <= row['bound']) for row in rows)
    assert rows[1]['name'] == 'libraries of OpenMMLab loaded before a config asks' and rows[1]['ratio'] == 0
    assert done.returncode == int(not all(row['ok'] for row in rows))
    assert all(row['name'] in done.stdout for row in rows)


def test_every_script_has_rows():
    for name in collector.SCRIPTS:
        assert callable(importlib.import_module(f'benchmarks.{name}').rows), name


def test_a_script_that_fails_is_a_row_and_the_others_are_run():
    found = collector.collect(('no_such_script', 'startup'), True, 'cpu')
    assert found[0]['ok'] is False and found[0]['ratio'] is None and 'no_such_script' in found[0]['error']
    assert len(found) == 3
    assert 'ModuleNotFoundError' in collector.shown(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')
def test_a_device_that_is_not_there_is_named(capsys):
    assert collector.main(['--device', 'cuda']) == 2
    assert 'PyTorch sees no such device' in capsys.readouterr().err


def test_exponent_of_a_power():
    assert exponent([1, 10, 100], [3, 3 * 10**0.5, 30]) == pytest.approx(0.5)
