# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Output of :mod:`psaq_mm.commands.sensitivity`: a table, a page with a chart, and a mixed-precision config."""

import copy
import os
import pprint
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from psaq_mm.tables import text_table
from psaq_mm.visualization import Line, area_chart, render

__all__ = ['mixed_precision_config', 'sensitivity_page', 'to_text']

_TITLES = dict(weights='its weights alone', activations='its activations alone')


def _bits(layer: Mapping) -> str:
    letters = dict(weights='W', activations='A')
    return ' '.join(f'{letter}{layer["bits"][kind]}' for kind, letter in letters.items() if kind in layer['bits'])


def _value(value: Optional[float]) -> str:
    return '-' if value is None else f'{value:.3f}'


def _mixed_line(report: Mapping) -> str:
    mixed = report['mixed_precision']
    average = ', '.join(
        f'{kind} {before:.2f} -> {after:.2f} bits' for kind, (before, after) in mixed['average'].items()
    )
    return (
        f'{len(mixed["overrides"])} layers raised to 8 bits: {average} on average; error of the outputs '
        f'{report["error"]:.5f} -> {mixed["error"]:.5f}'
    )


def to_text(report: Mapping, count: int) -> str:
    """The first ``count`` rows of the ranking, for a terminal."""
    layers = report['layers'][:count]
    metrics = sorted({key for layer in layers for key in layer['metrics']})
    rows = [
        (str(layer['rank']), layer['name'], _bits(layer), f'{layer["error"]:.5f}')
        + tuple(_value(layer['metrics'].get(key)) for key in metrics)
        for layer in layers
    ]
    align = 'rlrr' + 'r' * len(metrics)
    lines = [text_table(('rank', 'layer', 'bits', 'error', *metrics), rows, align, rule=False)]
    lines.append(f'all {len(report["layers"])} layers together: {report["error"]:.5f}')
    for name, values in report.get('metrics', {}).items():
        shown = ', '.join(f'{key} {_value(value)}' for key, value in values.items())
        lines.append(f'{name}: {shown or "the evaluator gave no metrics"}')
    if 'mixed_precision' in report:
        lines.append(_mixed_line(report))
    return '\n'.join(lines)


def sensitivity_page(report: Mapping) -> str:
    """A page with the errors in the order of the network, and the ranking."""
    layers = report['layers']
    ordered = sorted(layers, key=lambda layer: layer['position'])
    lines = [Line('the layer alone', range(len(ordered)), [layer['error'] for layer in ordered])]
    for style, (kind, title) in enumerate(_TITLES.items(), 1):
        known = [layer for layer in ordered if kind in layer['parts']]
        if known:
            positions, errors = zip(*((layer['position'], layer['parts'][kind]) for layer in known))
            lines.append(Line(title, positions, errors, style=style))
    last = max(1, len(ordered) - 1)
    chart = area_chart(
        'Error of the outputs by layer, in the order of the network (logarithmic)',
        lines,
        (0, last),
        (0, last),
        floor=min((layer['error'] for layer in layers if layer['error'] > 0), default=0.0),
        size=(640, 240),
    )
    return render(
        Path(__file__).parent / 'templates' / 'sensitivity.html',
        report=report,
        name=Path(report['config']).name,
        chart=chart,
        lines=lines,
        metrics=sorted({key for layer in layers for key in layer['metrics']}),
        raised={override['pattern'] for override in report.get('mixed_precision', {}).get('overrides', ())},
        mixed_line=_mixed_line(report) if 'mixed_precision' in report else '',
        bits=_bits,
        value=_value,
    )


def mixed_precision_config(path: str, config, settings: Mapping, report: Mapping, folder: Path) -> str:
    """A config that inherits ``path`` and changes ``quant``.

    A pure-Python config is written in full instead, because its heirs would have to name it as a module.

    Args:
        path: The config that was analysed.
        config: The same config, loaded, with its model quantized.
        settings: The new ``quant``.
        report: See :func:`psaq_mm.commands.sensitivity.analyse`.
        folder: Where the file will be.
    """
    from mmengine.config import Config

    from psaq_mm.engine.config import is_quantized_config, quant_holder
    from psaq_mm.engine.pure_python import with_named_types

    base = Config.fromfile(path)
    base_model = base.get('model') or {}
    inherits = is_quantized_config(base_model)
    quant: Dict[str, Any] = {
        **(dict(_delete_=True) if inherits and 'quant' in quant_holder(base_model) else {}),
        **settings,
    }
    model: Dict[str, Any] = dict(quant=quant)
    if not inherits:
        model = dict(type=config.model.type, base_type=config.model.base_type, quant=quant)
    elif quant_holder(config.model) is not config.model:
        model = dict(backbone=model)
    checkpoint = os.path.abspath(report['checkpoint']) if os.path.isfile(report['checkpoint']) else report['checkpoint']
    comment = '# Written by psaq sensitivity: ' + _mixed_line(report) + '.'
    if with_named_types(base) is not base:
        full = copy.deepcopy(config)
        quant_holder(full.model)['quant'], full.load_from = dict(settings), checkpoint
        return f'{comment}\n{full.pretty_text}'
    lines: List[str] = [
        comment,
        f'_base_ = [{os.path.relpath(os.path.abspath(path), os.path.abspath(folder))!r}]',
        f'model = {pprint.pformat(model, width=110, sort_dicts=False)}',
        f'load_from = {checkpoint!r}',
    ]
    return '\n'.join(lines) + '\n'
