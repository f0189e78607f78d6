"""Format, lint and types, in the versions that requirements-tools.txt pins. The settings are in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pinned(name: str) -> str:
    """The version of a tool or library that the reference stack has."""
    lines = (ROOT / 'requirements.txt').read_text() + (ROOT / 'requirements-tools.txt').read_text()
    return next(line.split('==')[1] for line in lines.splitlines() if line.startswith(f'{name}=='))


def check(name: str, *arguments: str) -> None:
    """Run a tool of this environment over the repository; what it says is the message of the failure."""
    tool = Path(sys.executable).parent / name
    if not tool.is_file():
        pytest.skip(f'{name} is not installed in this environment')
    version = subprocess.run([tool, '--version'], capture_output=True, text=True).stdout.split()[1]
    if version != pinned(name):
        pytest.skip(f'{name} {version} is installed, and other versions than {pinned(name)} have other rules')
    done = subprocess.run([tool, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_no_mistake():
    check('ruff', 'check', '--output-format', 'concise', '.')


def test_ruff_would_format_nothing_differently():
    check('ruff', 'format', '--check', '.')


def test_types_of_the_floors_that_need_pytorch_alone():
    torch = pytest.importorskip('torch')
    if torch.__version__.split('+')[0] != pinned('torch'):
        pytest.skip(f'types are checked against torch {pinned("torch")}, whose own hints differ from other versions')
    check('mypy', '--python-executable', sys.executable)
