"""Every code block of the documentation is run, or says why not.

A block is one of these:

- on a page that a test of this folder runs block by block (the first line of the test says so);
- behind a line ``<!-- not run: the reason -->``;
- shell: every command of this project is read by the real parser of the command, so an option that is not there fails;
- Python: it is run here, in an empty folder;
- ``text``: what a command prints, or a tree of files.

Pages of docs/history are records of their day and stay as they are.
"""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from psaq_mm.commands import listing

markdown_it = pytest.importorskip('markdown_it')
pytest.importorskip('mmengine')
ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ('*.md', 'configs/**/*.md', 'demo/**/*.md', 'docs/**/*.md')
    for path in ROOT.glob(pattern)
    if not {'history', '_build'} & set(path.relative_to(ROOT).parts)
)
NOT_RUN = re.compile(r'<!-- not run: \S.* -->')
# Commands of a shell that need no test; what comes from elsewhere (pip, git, docker) is marked as not run.
SHELL = {'cd', 'mkdir', 'cp', 'ls', 'export'}


def run_by_a_test():
    """Pages whose blocks a test runs, with that test."""
    found = {}
    for test in sorted(Path(__file__).parent.glob('test_*.py')):
        named = re.match(r'"""([\w/, ]+\.md(?:, [\w/]+\.md)*), block by block', test.read_text(encoding='utf-8'))
        found.update({page.strip(): test for page in named[1].split(', ')} if named else {})
    return found


class Block(NamedTuple):
    page: str
    line: int
    language: str
    code: str
    marked: bool


def blocks_of(page):
    text = (ROOT / page).read_text(encoding='utf-8')
    lines = text.splitlines()
    for token in markdown_it.MarkdownIt('commonmark').parse(text):
        if token.type in ('fence', 'code_block'):
            start = token.map[0]
            before = lines[start - 1].strip() if start else ''
            marked = bool(NOT_RUN.fullmatch(before or (lines[start - 2].strip() if start > 1 else '')))
            yield Block(page, start + 1, token.info.strip(), token.content, marked)


RUN = run_by_a_test()
BLOCKS = [
    block
    for page in PAGES
    if page not in RUN
    for block in blocks_of(page)
    # Directives of the site, such as {toctree}, are no code.
    if not (block.marked or block.language.startswith('{') or block.language == 'text')
]


class Parsed(BaseException):
    """A parser has read a whole command line."""


@pytest.fixture
def parsers_only(monkeypatch, tmp_path):
    """Every command ends when its arguments have been read."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_args)
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    monkeypatch.chdir(ROOT)


def entry_points():
    """Module and function of each console script."""
    return {line.split(' = ')[0]: line.split(' = ')[1].split(':') for line in listing.entry_points()}


def commands_of(code):
    """Argument lists of the simple commands of a block of shell, comments and redirections left out."""
    for line in code.replace('\\\n', ' ').splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=';&|<>')
        lexer.whitespace_split = True
        command = []
        for token in [*lexer, ';']:
            if set(token) <= set(';&|'):
                while command and re.fullmatch(r'\w+=.*', command[0]):
                    command = command[1:]
                if command:
                    yield command
                command = []
            else:
                command.append(token)


def check(command, monkeypatch):
    """Read one command by its parser. A command that this test does not know is an error."""
    program, arguments = command[0], command[1:]
    if program == 'torchrun':
        arguments = arguments[next(i for i, argument in enumerate(arguments) if argument.endswith('.py')) :]
        program = 'python'
    if program == 'make':
        target = next((argument for argument in arguments if re.fullmatch(r'[\w-]+', argument)), None)
        makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
        assert target is None or re.search(rf'^{target}:', makefile, re.MULTILINE), f'make has no target {target}'
        return
    if program in SHELL:
        return
    if program in ('python', 'python3') and arguments[:1] == ['-m'] and arguments[1].startswith('psaq_mm'):
        monkeypatch.setattr(sys, 'argv', arguments[1:])
        run = lambda: runpy.run_module(arguments[1], run_name='__main__')
    elif program in ('python', 'python3') and arguments and (ROOT / arguments[0]).is_file():
        monkeypatch.setattr(sys, 'argv', arguments)
        run = lambda: runpy.run_path(str(ROOT / arguments[0]), run_name='__main__')
    elif program in entry_points():
        monkeypatch.setattr(sys, 'argv', command)
        module, function = entry_points()[program]
        run = lambda: getattr(__import__(module, fromlist=['*']), function)()
    else:
        raise AssertionError(f'{program} is no command of this project: mark the block, <!-- not run: why -->')
    try:
        run()
    except Parsed:
        return
    except SystemExit as end:
        assert end.code in (0, None), f'{shlex.join(command)}: its parser refuses it'


@pytest.mark.parametrize('block', BLOCKS, ids=lambda block: f'{block.page}:{block.line}')
def test_a_block_runs_or_its_commands_are_read_by_their_parsers(block, parsers_only, monkeypatch, tmp_path):
    assert block.language in ('bash', 'python'), (
        f'{block.page}, line {block.line}: say what it is (```bash, ```python, ```text), '
        'or write <!-- not run: why --> before it'
    )
    if block.language == 'python':
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        exec(compile(block.code, f'{block.page}:{block.line}', 'exec'), {'__name__': '__main__'})
        return
    for command in commands_of(block.code):
        check(command, monkeypatch)


def test_what_is_wrong_is_found(parsers_only, monkeypatch, capsys):
    """The checks above can fail: an unknown option, command, script and target."""
    check(['psaq-export', 'CONFIG', 'STUDENT.pth', '--out', 'DIR'], monkeypatch)
    for command in (
        ['psaq-export', 'CONFIG', 'STUDENT.pth', '--out', 'DIR', '--sizes', '32'],
        ['psaq-exporter', 'CONFIG'],
        ['python', 'tools/absent.py'],
        ['make', 'absent'],
    ):
        with pytest.raises(AssertionError):
            check(command, monkeypatch)
    assert '--sizes' in capsys.readouterr().err


def test_pages_that_are_run_elsewhere_are_there():
    assert set(RUN) <= set(PAGES) and 'docs/get_started.md' in RUN
