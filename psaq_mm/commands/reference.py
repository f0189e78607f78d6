# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Reference of methods, sources and settings, out of their registries: ``python -m psaq_mm.commands.reference``."""

import dataclasses
import inspect
import re
from typing import Any, Dict, Iterable, List, Sequence, Type

from psaq_mm.settings import Settings

__all__ = ['reference']

_HEAD = """# Methods, sources and settings

Written by `python -m psaq_mm.commands.reference > docs/reference/settings.md`: do not edit.

A config says `dfq='fast'`, or `dfq=dict(preset='fast', calibration_samples=64)` with the settings that differ from the
method's."""


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> List[str]:
    cells = [[str(cell).replace('|', '\\|') for cell in row] for row in (head, ['---'] * len(head), *rows)]
    return [f'| {" | ".join(row)} |' for row in cells] + ['']


def _settings(group: Type[Settings], prefix: str) -> List[str]:
    title = (group.__doc__ or '').strip().splitlines()[0].rstrip('.')
    docs, defaults = group.docs(), group.defaults()
    rows = [(f'`{prefix}{name}`', f'`{defaults[name]!r}`', docs[name]) for name in group.names()]
    return [f'### {title}', '', *_table(('setting', 'default', 'what it is'), rows)]


def _arguments(cls: type) -> Dict[str, str]:
    """What the docstring of a class says of each argument, on one line and without the markup of docstrings."""
    text = inspect.getdoc(cls).partition('Args:\n')[2].partition('\n\n')[0]
    parts = re.split(r'^ {4}(\w+): ', text, flags=re.MULTILINE)[1:]
    plain = (re.sub(r'``(.+?)``', r'`\1`', re.sub(r'\s+', ' ', part)).strip() for part in parts[1::2])
    return dict(zip(parts[::2], plain))


def _quantization() -> List[str]:
    from psaq_mm.quantization import QuantSpec

    docs = _arguments(QuantSpec)
    rows = [(f'`{f.name}`', f'`{f.default!r}`', docs[f.name]) for f in dataclasses.fields(QuantSpec)]
    text = [
        "`model.quant`: a preset such as `'w4a8'`, or `dict(preset='w4a8', scope='full')` with settings of its own."
    ]
    return ['## Quantization', '', *text, '', *_table(('setting', 'default', 'what it is'), rows)]


def reference() -> str:
    """The content of ``docs/reference/settings.md``."""
    from psaq_mm.engine.methods import METHODS
    from psaq_mm.engine.presets import DFQ_DEFAULTS
    from psaq_mm.engine.samples import SOURCES
    from psaq_mm.engine.settings import GROUPS
    from psaq_mm.pictures import source_names
    from psaq_mm.psaq_vit.generator import Density, Loss, Moves, Schedule

    methods = [
        (
            f'`{method.name}`',
            method.description,
            'trained' if method.trains else 'calibrated',
            f'`{method.recipe}`' + (f', `{method.low_bit_recipe}` below A8' if method.low_bit_recipe else ''),
            method.published or '-',
        )
        for method in METHODS.values()
    ]
    sources = [
        (f'`{name}`', f'`{SOURCES[name].__name__}`', (SOURCES[name].__doc__ or '').strip().splitlines()[0])
        for name in source_names()
    ]
    lines = [_HEAD, '', '## Methods', '']
    lines += _table(('`--method`', 'what it does', 'student', 'quantizer', 'paper'), methods)
    lines += ['## Sources of samples', '']
    lines += _table(('`dfq.samples`, `--samples`', 'type', 'pictures'), sources)
    lines += _quantization()
    lines += [
        '## Settings',
        '',
        f'Beside these, `dfq.generator` (default `{DFQ_DEFAULTS["generator"]}`) holds those of',
    ]
    lines += ['the synthesis, and `dfq.teacher` the full-precision checkpoint and its SHA-256.', '']
    for group in GROUPS:
        lines += _settings(group, 'dfq.')
    for group in (Loss, Schedule, Moves, Density):
        lines += _settings(group, 'dfq.generator.')
    return '\n'.join(lines).rstrip() + '\n'


if __name__ == '__main__':
    print(reference(), end='')
