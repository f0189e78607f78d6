"""What `psaq` and the single commands say of themselves: lists, help texts, versions. PyTorch is imported nowhere."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import psaq_mm
from psaq_mm.commands import listing
from psaq_mm.commands.listing import COMMANDS
from psaq_mm.commands.main import main

ROOT = Path(__file__).parents[2]
NAMES = [command.name for command in COMMANDS]


def parser_of(command, prog='psaq'):
    return importlib.import_module(f'psaq_mm.commands.{command.module}').build_parser(prog)


def told(capsys, *arguments):
    """Exit status and standard output of psaq."""
    try:
        status = main(list(arguments))
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().out


@pytest.fixture
def columns(monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')


# ---------------------------------------------------------------------- psaq
def test_without_arguments_all_commands_are_listed(columns, capsys):
    status, text = told(capsys)
    assert status == 0 and told(capsys, '--help') == (0, text) == told(capsys, 'help')
    for command in COMMANDS:
        assert re.search(rf'^  {command.name}\b.* {re.escape(command.summary)}$', text, re.MULTILINE), command.name


def test_an_unknown_command_gets_the_nearest_name(capsys):
    assert main(['tset', 'C.py']) == 2
    captured = capsys.readouterr()
    assert captured.out == '' and captured.err.splitlines() == [
        f'psaq: there is no command tset: did you mean test? Known are {", ".join(NAMES)}'
    ]


@pytest.mark.parametrize('name', ['train', 'dfq-train', 'psaq-dfq-train', 'quantize'])
def test_quantize_has_the_names_of_other_tools(capsys, name):
    assert told(capsys, name, '--help')[1].startswith('usage: psaq quantize CONFIG')


def test_help_of_a_command_as_git_has_it(capsys):
    assert told(capsys, 'help', 'predict') == told(capsys, 'predict', '--help')


@pytest.mark.parametrize('command', COMMANDS, ids=NAMES)
def test_a_single_command_is_the_same_under_its_own_name(capsys, command):
    module = importlib.import_module(f'psaq_mm.commands.{command.module}')
    with pytest.raises(SystemExit):
        module.main(['--help'])
    own = capsys.readouterr().out
    assert own.startswith(f'usage: {command.script} ')
    unwrapped = ' '.join(own.replace(command.script, f'psaq {command.name}').split())
    assert ' '.join(told(capsys, command.name, '--help')[1].split()) == unwrapped


def test_mistakes_of_arguments_name_the_command_as_it_was_called(capsys):
    with pytest.raises(SystemExit) as end:
        main(['export', 'C.py'])
    assert end.value.code == 2 and 'psaq export: error: the following arguments are required' in capsys.readouterr().err


# ---------------------------------------------------------------------- help texts
@pytest.mark.parametrize('name', ['', *NAMES])
def test_help_reads_well_on_80_columns(columns, capsys, name):
    status, text = told(capsys, *([name] if name else []), '--help')
    assert status == 0 and 'examples:' in text
    assert not [line for line in text.splitlines() if len(line) > 80 or line != line.rstrip()]
    assert not re.search(r'`|:func:|:class:|%\(|%s|\bNone\b|==SUPPRESS==', text)


@pytest.mark.parametrize('command', COMMANDS, ids=NAMES)
def test_every_argument_is_explained_and_has_its_default(command):
    for action in parser_of(command)._actions:
        if action.help == '==SUPPRESS==':
            continue
        assert action.help, action.dest
        required = action.required or action.nargs == 0 or not action.option_strings
        stands_alone = action.dest in ('show_dir', 'out', 'deployed', 'cfg_options', 'resume')
        assert required or stands_alone or 'default' in action.help, action.dest


@pytest.mark.parametrize('command', COMMANDS, ids=NAMES)
def test_the_examples_are_command_lines_that_parse(command):
    """A line that ends with a backslash goes on in the next one."""
    parser = parser_of(command)
    lines = parser.epilog.replace('\\\n', ' ').partition('examples:\n')[2].splitlines()
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[0] == 'psaq'
        parser.parse_args(words[1:])


# ---------------------------------------------------------------------- versions
def test_versions_are_one_block_for_a_report(capsys):
    status, text = told(capsys, '--version')
    rows = dict(line.split(None, 1) for line in text.splitlines())
    assert status == 0 and rows['psaq_mm'] == psaq_mm.__version__
    assert rows['torch'].split('+')[0] == importlib.import_module('torch').__version__.split('+')[0]
    assert {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'timm', 'onnxruntime', 'openvino'} <= set(rows)
    for name in NAMES:
        assert told(capsys, name, '--version') == (0, text)


def test_a_package_that_is_not_installed_is_named_so(monkeypatch, capsys):
    from psaq_mm.commands import parsing

    monkeypatch.setitem(parsing._PACKAGES, 'timm', ('no-such-distribution',))
    monkeypatch.setitem(parsing._PACKAGES, 'mmdet', ('no-such-distribution', 'pytest'))
    rows = dict(line.split(None, 1) for line in told(capsys, '--version')[1].splitlines())
    assert rows['timm'] == 'not installed' and rows['mmdet'] == f'{pytest.__version__} (pytest)'


# ---------------------------------------------------------------------- quickly
def test_help_and_version_import_neither_torch_nor_mmengine():
    script = f"""
import sys
from psaq_mm.commands.main import main
for words in [['--help'], ['--version'], *[[name, '--help'] for name in {NAMES!r}]]:
    try:
        main(words)
    except SystemExit as end:
        assert not end.code, words
    heavy = {{'torch', 'mmengine', 'numpy', 'onnxruntime', 'openvino', 'cv2'}} & set(sys.modules)
    assert not heavy, (words, heavy)
"""
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_names_in_help_texts_are_those_of_the_registries():
    from psaq_mm.engine import samples  # noqa: F401  registers sources
    from psaq_mm.engine.methods import METHODS
    from psaq_mm.pictures import source_names
    from psaq_mm.runtime import RUNTIMES

    assert set(listing.METHOD_NAMES) <= set(METHODS) and set(listing.RUNTIME_NAMES) <= set(RUNTIMES)
    assert set(listing.SOURCE_NAMES) <= set(source_names())
    script = (
        'from psaq_mm.engine import samples; from psaq_mm.engine.methods import METHODS; '
        'from psaq_mm.pictures import source_names; from psaq_mm.runtime import RUNTIMES; '
        'print(*METHODS); print(*source_names()); print(*RUNTIMES)'
    )
    # In a process of its own: other tests register more.
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert [tuple(line.split()) for line in done.stdout.splitlines()] == [
        listing.METHOD_NAMES,
        listing.SOURCE_NAMES,
        listing.RUNTIME_NAMES,
    ]
