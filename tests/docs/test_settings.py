"""The reference of settings is that of the code."""

from pathlib import Path

from psaq_mm.commands.reference import reference
from psaq_mm.engine.presets import DFQ_DEFAULTS

PAGE = Path(__file__).parents[2] / 'docs' / 'reference' / 'settings.md'


def test_the_reference_is_current():
    assert PAGE.read_text() == reference(), 'python -m psaq_mm.commands.reference > docs/reference/settings.md'


def test_every_setting_stands_in_it():
    text = reference()
    assert all(f'`dfq.{name}`' in text for name in DFQ_DEFAULTS if name != 'method')
