# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Reference of the commands, out of their list and parsers: ``python -m psaq_mm.commands.command_reference``."""

import argparse
import importlib
from typing import Iterable, List, Sequence

from psaq_mm.commands.listing import COMMANDS, Command

__all__ = ['command_reference']

_HEAD = """# Commands

Written by `python -m psaq_mm.commands.command_reference > docs/reference/commands.md`: do not edit.

`psaq COMMAND` runs a command; each one is also a command of its own. `psaq --help` lists them, `psaq COMMAND --help`
explains one, and `psaq --version` gives the versions that a report needs. A mistake ends with one sentence and a
non-zero exit status.
"""


def _cell(text: str) -> str:
    return ' '.join(text.split()).replace('|', '\\|').replace('<', '&lt;')


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> List[str]:
    return [f'| {" | ".join(cells)} |' for cells in (head, ['---'] * len(head), *rows)] + ['']


def _names(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    """An argument as it is written: ``--out DIR``."""
    formatter = parser._get_formatter()
    if not action.option_strings:
        return formatter._format_args(action, str(action.metavar or action.dest))
    value = '' if action.nargs == 0 else ' ' + formatter._format_args(action, action.dest.upper())
    return ', '.join(action.option_strings) + value


def _help(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    return _cell(parser._get_formatter()._expand_help(action))


def _command(command: Command) -> List[str]:
    module = importlib.import_module(f'psaq_mm.commands.{command.module}')
    parser: argparse.ArgumentParser = module.build_parser(f'psaq {command.name}')
    others = [f'`{command.script}`', *(f'`psaq {alias}`' for alias in command.aliases)]
    lines = [f'## psaq {command.name}', '', f'The same as {", ".join(others)}.', '']
    lines += [
        _cell(parser.description or ''),
        '',
        '```text',
        (parser.usage or '').replace('%(prog)s', parser.prog),
        '```',
        '',
    ]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        if actions and group.title != 'help':
            rows = [(f'`{_names(action, parser)}`'.replace('|', '\\|'), _help(action, parser)) for action in actions]
            lines += _table((str(group.title), 'what it is'), rows)
    examples = (parser.epilog or '').partition('examples:\n')[2].splitlines()
    return [*lines, 'Examples:', '', '```bash', *(line[2:] for line in examples), '```', '']


def command_reference() -> str:
    """The content of ``docs/reference/commands.md``."""
    rows = [(f'[`psaq {c.name}`](#psaq-{c.name})', f'`{c.script}`', _cell(c.summary)) for c in COMMANDS]
    lines = [_HEAD, *_table(('command', 'single command', 'what it does'), rows)]
    for command in COMMANDS:
        lines += _command(command)
    return '\n'.join(lines).rstrip() + '\n'


if __name__ == '__main__':
    print(command_reference(), end='')
