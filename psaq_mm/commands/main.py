# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""``psaq COMMAND ...``: all commands under one name, as git has them."""

import argparse
import importlib
import sys
from typing import Optional, Sequence

from psaq_mm.commands.listing import COMMANDS, Command
from psaq_mm.commands.parsing import make_parser
from psaq_mm.errors import nearest

__all__ = ['main']

_NAMES = {name: command for command in COMMANDS for name in (command.name, *command.aliases)}


def _titles() -> str:
    rows = [(', '.join((command.name, *command.aliases[:1])), command.summary) for command in COMMANDS]
    width = max(len(title) for title, _ in rows) + 2
    return '\n'.join(f'  {title:<{width}}{summary}' for title, summary in rows)


def _parser() -> argparse.ArgumentParser:
    description = (
        'Quantize detectors, segmentors and classifiers with transformer backbones without real data.\n'
        f'\ncommands:\n{_titles()}'
    )
    examples = [
        'quantize CONFIG --checkpoint FP.pth --quant w8a8 --method best',
        'test CONFIG work_dirs/CONFIG/student.pth --show-dir shown',
        'export CONFIG work_dirs/CONFIG/student.pth --out deployed --verify',
        'predict deployed pictures/ --out shown',
    ]
    notes = 'psaq COMMAND --help tells more about a command. Each is also a command of its own, such as psaq-test.'
    return make_parser('psaq', 'COMMAND [arguments]', description, examples, notes)


def _run(command: Command, arguments: Sequence[str]) -> int:
    module = importlib.import_module(f'psaq_mm.commands.{command.module}')
    return module.main(arguments, prog=f'psaq {command.name}')


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line; returns the exit status: that of the command, or 2 where there is no such command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ['help']:  # as git has it
        arguments = [*arguments[1:2], '--help']
    name = arguments[0] if arguments else '--help'
    if name.startswith('-'):
        _parser().parse_args([name])
        return 0
    if name in _NAMES:
        return _run(_NAMES[name], arguments[1:])
    script = next((command for command in COMMANDS if command.script == name), None)
    if script is not None:
        return _run(script, arguments[1:])
    print(f'psaq: there is no command {name}: {nearest(name, [c.name for c in COMMANDS])}', file=sys.stderr)
    return 2


if __name__ == '__main__':
    raise SystemExit(main())
