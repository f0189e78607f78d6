"""The Makefile's promises that cost nothing to keep an eye on: what it would run, and one clear sentence where it
cannot."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which('make') is None, reason='make is not installed')


def make(*args, cwd=ROOT, **env):
    # A make that runs this test hands its own flags and variables down; the one under test starts without.
    inherited = {
        k: v
        for k, v in os.environ.items()
        if k
        not in (
            'MAKEFLAGS',
            'MFLAGS',
            'MAKELEVEL',
            'MAKEOVERRIDES',
            'TORCH',
            'VENV',
            'VENV_CORE',
            'ARGS',
            'DATA',
            'PYTHON',
            'STACK',
        )
    }
    return subprocess.run(
        ['make', *args],
        cwd=cwd,
        env={**inherited, **env},
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def tree(tmp_path):
    """A checkout (its name has a blank in it) whose set-up script only writes down what it was asked for."""
    root = tmp_path / 'a checkout'
    (root / '.dev').mkdir(parents=True)
    (root / 'tests' / 'quantization').mkdir(parents=True)
    shutil.copy(ROOT / 'Makefile', root)
    (root / '.dev' / 'setup_env.py').write_text('import sys; print("SETUP", sys.argv[1:])\n')
    python = root / '.venv' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\necho "RAN $*, threads $OMP_NUM_THREADS, data ${PSAQ_MM_DATA-unset}"\nexit "${FAKE_STATUS:-0}"\n'
    )
    python.chmod(0o755)
    return root


PYTHON = 'PYTHON=python3'


def test_missing_python_is_one_clear_sentence():
    result = make('test', 'PYTHON=/nonexistent/python')
    assert result.returncode != 0
    sentence, _ = result.stderr.splitlines()  # and make's own line on the failed target
    assert "'/nonexistent/python'" in sentence and 'PYTHON=' in sentence
    assert result.stdout == ''


@pytest.mark.parametrize('target,command', [('test', '-m pytest -q'), ('demo', 'demo/run_demo.py')])
def test_target_sets_up_first(tree, target, command):
    result = make(target, PYTHON, cwd=tree)
    assert result.returncode == 0, result.stderr
    set_up, *_, ran = result.stdout.splitlines()
    assert set_up == "SETUP ['--torch', '2.1.2', '--stack', 'openmmlab', '--venv', '.venv']"
    assert ran.startswith(f'RAN {command}')


def test_dry_run_shows_the_commands_and_runs_nothing(tree):
    result = make('-n', 'test', PYTHON, cwd=tree)
    assert 'setup_env.py --torch "2.1.2" --stack "openmmlab" --venv ".venv"' in result.stdout
    assert 'SETUP' not in result.stdout and 'RAN' not in result.stdout


def test_failing_set_up_stops_the_tests(tree):
    (tree / '.dev' / 'setup_env.py').write_text('raise SystemExit(1)\n')
    result = make('test', PYTHON, cwd=tree)
    assert result.returncode != 0
    assert 'RAN' not in result.stdout


def test_status_of_the_tests_is_the_status_of_make(tree):
    assert make('test', PYTHON, cwd=tree, FAKE_STATUS='1').returncode != 0


def test_arguments_and_environment_reach_pytest(tree):
    result = make('test', PYTHON, 'ARGS=-k "one or two"', cwd=tree, PSAQ_MM_DATA='/some/data')
    assert (
        'RAN -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 -k one or two, threads '
        in result.stdout
    )
    assert result.stdout.strip().endswith('data /some/data')


def test_a_folder_that_nobody_names_is_not_there_as_an_empty_one(tree, monkeypatch):
    monkeypatch.delenv('PSAQ_MM_DATA', raising=False)
    assert make('test', PYTHON, cwd=tree).stdout.strip().endswith('data unset')


@pytest.mark.parametrize('given,threads', [({}, '1'), ({'OMP_NUM_THREADS': '7'}, '7')])
def test_threads_are_bounded_unless_the_user_says_otherwise(tree, monkeypatch, given, threads):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    assert f'threads {threads},' in make('test', PYTHON, cwd=tree, **given).stdout


@pytest.mark.parametrize(
    'given,torch,stack,folder',
    [
        (['TORCH=2.13.0'], '2.13.0', 'openmmlab', '.venv-torch2.13.0'),
        (['STACK=onedl'], '2.13.0', 'onedl', '.venv-onedl-torch2.13.0'),
        (['STACK=onedl', 'TORCH=2.5.1'], '2.5.1', 'onedl', '.venv-onedl-torch2.5.1'),
    ],
)
def test_another_torch_and_other_packages_get_an_environment_of_their_own(given, torch, stack, folder):
    shown = make('-n', 'test', *given).stdout
    assert f'--torch "{torch}" --stack "{stack}" --venv "{folder}"' in shown
    assert f'"{folder}/bin/python" -m pytest' in shown


@pytest.mark.parametrize(
    'given,sentence',
    [
        (['STACK=mmlab'], 'STACK=mmlab is no stack: openmmlab or onedl'),
        (['STACK=onedl', 'TORCH=2.1.2'], 'STACK=onedl needs numpy 2'),
        (['TORCH=newest'], 'TORCH=newest is no version of torch'),
    ],
)
def test_impossible_choice_is_one_clear_sentence(tmp_path, given, sentence):
    result = make('test', PYTHON, *given)
    assert result.returncode != 0
    first, _ = result.stderr.splitlines()  # and make's own line on the failed target
    assert first.startswith(f'[setup] error: {sentence}')
    assert not list(ROOT.glob('.venv*newest*')) + list(ROOT.glob('.venv*mmlab*'))


def test_core_tests_run_without_openmmlab(tree):
    shown = make('-n', 'test-core', 'TORCH=2.13.0', cwd=tree).stdout
    assert '--stack core --venv ".venv-core-torch2.13.0"' in shown
    assert '-m pytest -q tests/quantization' in shown


def test_real_needs_a_folder(tree):
    result = make('real', PYTHON, 'DATA=/nonexistent', cwd=tree)
    assert result.returncode != 0
    assert "DATA='/nonexistent' is no folder" in result.stderr
    assert 'RAN' not in result.stdout


def test_real_passes_its_folder_on(tree):
    (tree / 'some data').mkdir()
    assert 'RAN benchmarks/real.py --data some data' in make('real', PYTHON, 'DATA=some data', cwd=tree).stdout


def test_clean_leaves_the_environment_and_the_sources(tree):
    for name in ('build', 'psaq_mm.egg-info', 'psaq_mm/__pycache__', '.venv/lib/__pycache__'):
        (tree / name).mkdir(parents=True)
    assert make('clean', cwd=tree).returncode == 0
    left = {path.relative_to(tree).as_posix() for path in tree.rglob('*')}
    assert not {'build', 'psaq_mm.egg-info', 'psaq_mm/__pycache__'} & left
    assert {'.venv/bin/python', '.venv/lib/__pycache__', '.dev/setup_env.py'} <= left


def test_torch_is_named_alike_in_makefile_and_requirements():
    for setting, files in {
        'REFERENCE': ['requirements.txt'],
        'NEW': ['requirements-torch2.13.txt', 'requirements-onedl.txt'],
    }.items():
        (named,) = re.findall(rf'^{setting}_TORCH := (\S+)$', (ROOT / 'Makefile').read_text(), re.MULTILINE)
        for file in files:
            assert f'torch=={named}' in (ROOT / file).read_text().splitlines()


class TestCI:
    """`.ci/run`, with a stand-in for make that shows what it was given."""

    @pytest.fixture
    def checkout(self, tmp_path):
        root = tmp_path / 'work' / 'checkout'
        (root / '.ci').mkdir(parents=True)
        shutil.copy(ROOT / '.ci' / 'run', root / '.ci' / 'run')
        fake = tmp_path / 'bin' / 'make'
        fake.parent.mkdir()
        fake.write_text('#!/bin/sh\necho "make $* in $(pwd)|$PIP_FIND_LINKS|$PSAQ_MM_DATA"\nexit 3\n')
        fake.chmod(0o755)
        return root

    def run(self, checkout, **env):
        path = f'{checkout.parents[1] / "bin"}{os.pathsep}{os.environ["PATH"]}'
        inherited = {k: v for k, v in os.environ.items() if k not in ('PIP_FIND_LINKS', 'PSAQ_MM_DATA')}
        return subprocess.run(
            [str(checkout / '.ci' / 'run')],
            cwd='/',
            env={**inherited, 'PATH': path, **env},
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def test_runs_the_tests_and_hands_on_their_status(self, checkout):
        result = self.run(checkout)
        assert result.returncode == 3, result.stderr
        assert result.stdout == f'make test in {checkout}||\n'

    def test_uses_what_stands_beside_the_checkout(self, checkout):
        (checkout.parent / 'shared' / 'wheels').mkdir(parents=True)
        (checkout.parent / 'shared' / 'data').mkdir()
        _, links, data = self.run(checkout, PIP_FIND_LINKS='/other').stdout.strip().split('|')
        assert links == f'/other file://{checkout.parent}/shared/wheels'
        assert data == f'{checkout.parent}/shared/data'

    def test_data_named_by_the_user_stays(self, checkout):
        (checkout.parent / 'shared' / 'data').mkdir(parents=True)
        assert self.run(checkout, PSAQ_MM_DATA='/mine').stdout.strip().endswith('|/mine')
