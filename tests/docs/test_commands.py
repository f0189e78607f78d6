"""The reference of commands is that of the parsers, and the entry points are those of the list."""

from pathlib import Path

from psaq_mm.commands.command_reference import command_reference
from psaq_mm.commands.listing import COMMANDS, entry_points

ROOT = Path(__file__).parents[2]
PAGE = ROOT / 'docs' / 'reference' / 'commands.md'


def test_the_reference_is_current():
    assert PAGE.read_text() == command_reference(), (
        'python -m psaq_mm.commands.command_reference > docs/reference/commands.md'
    )


def test_every_option_stands_in_it():
    text = command_reference()
    for command in COMMANDS:
        assert f'\n## psaq {command.name}\n' in text and f'`{command.script}`' in text
    for option in ('--resume [PATH]', '--device NAME', '--show-dir FOLDER', '--tta', '--size H W', '--seeds N [N ...]'):
        assert f'| `{option}` |' in text, option
    assert '--local' not in text and '--calibration' not in text, 'hidden options stay hidden'


def test_every_command_has_an_entry_point_and_a_script():
    names = [line.split(' = ')[0] for line in entry_points()]
    assert names == ['psaq', *(command.script for command in COMMANDS)]
    for command in COMMANDS:
        script = 'inspect_model' if command.name == 'inspect' else command.module
        assert (ROOT / 'tools' / f'{script}.py').is_file()
