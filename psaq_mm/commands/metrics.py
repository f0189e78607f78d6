# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Metrics of any evaluator, in plain types, as numbers for a table, and as JSON. Evaluators give numbers, and also
lists of one value a class, confusion matrices, nested dicts and strings; a number may be NaN.
"""

import math
import statistics
from typing import Any, Dict, List, Mapping, Optional, Sequence

from psaq_mm.plain import to_plain
from psaq_mm.tables import text_table

__all__ = ['RESULTS', 'before_after_table', 'other_metrics', 'plain_metrics', 'scalars']

RESULTS = 'test_results.json'
"""File in the work dir that holds all metrics whole."""
_ELSEWHERE = 'see file'


def _number(value: Any) -> Any:
    """Numbers as floats; an array or tensor of one number is that number."""
    if math.prod(getattr(value, 'shape', (0,))) == 1:
        value = value.item()
    return float(value) if isinstance(value, (bool, int, float)) else value


def plain_metrics(metrics: Optional[Mapping[str, Any]]) -> Dict[str, Any]:
    """An evaluator's metrics in plain types: numbers as floats (NaN stays), tensors and arrays as lists, dicts flat,
    with their keys joined by a slash.
    """
    flat: Dict[str, Any] = {}
    for key, value in (metrics or {}).items():
        value = to_plain(value, _number)
        if isinstance(value, dict):
            flat.update({f'{key}/{name}': v for name, v in plain_metrics(value).items()})
        else:
            flat[str(key)] = value
    return flat


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_classwise(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(v is None or isinstance(v, (int, float)) for v in value)


def scalars(metrics: Mapping[str, Any]) -> Dict[str, Optional[float]]:
    """The numbers among metrics, None where one is not finite. A list of one value a class gives the mean over its
    finite values, under ``KEY (mean)``. Matrices and strings are left out.

    Args:
        metrics: Of :func:`plain_metrics`.
    """
    numbers: Dict[str, Optional[float]] = {}
    for key, value in metrics.items():
        if _is_classwise(value):
            known = [v for v in value if _finite(v)]
            numbers[f'{key} (mean)'] = statistics.fmean(known) if known else None
        elif value is None or isinstance(value, (int, float)):
            numbers[key] = float(value) if _finite(value) else None
    return numbers


def other_metrics(metrics: Mapping[str, Any]) -> Dict[str, Any]:
    """The metrics that are no numbers: :func:`scalars` leaves them out, or takes their mean. In JSON types."""
    return {k: to_plain(v, nan=False) for k, v in metrics.items() if not (v is None or isinstance(v, (int, float)))}


# ---------------------------------------------------------------------- table


def _column(metrics: Mapping[str, Any]) -> Dict[str, Any]:
    """Cells by metric."""
    metrics = plain_metrics(metrics)
    others = [key for key, value in other_metrics(metrics).items() if not _is_classwise(value)]
    return {**scalars(metrics), **dict.fromkeys(others, _ELSEWHERE)}


def before_after_table(
    before: Optional[Mapping], after: Optional[Mapping], label: str, first: str = 'full precision'
) -> str:
    """A table of metrics, one row a metric, full precision (or what ``first`` names) beside quantized.

    A column without a metric has ``-`` in its row; one without any is explained below. Lists of one value a class are
    shown as their mean, other kinds of metrics by a hint to the results' file.

    Args:
        before: Of :func:`plain_metrics`; None leaves the column out.
        after: The same of the quantized model.
        label: Heads the second column.
        first: Heads the first column.
    """
    columns = {name: _column(metrics) for name, metrics in ((first, before), (label, after)) if metrics is not None}
    keys = dict.fromkeys(key for column in reversed(columns.values()) for key in column)
    rows = []
    for key in keys:
        values = [column.get(key) for column in columns.values()]
        cells = ['-' if value is None else value for value in values]
        if len(values) == 2:
            cells.append(f'{values[1] - values[0]:+.3f}' if all(map(_finite, values)) else '-')
        rows.append([key, *cells])
    head = ['metric', *(name.rjust(10) for name in columns), *(['difference'] if len(columns) == 2 else [])]
    lines = [text_table(head, rows, 'l' + 'r' * (len(head) - 1))]
    if any(_ELSEWHERE in column.values() for column in columns.values()):
        lines.append(f'{_ELSEWHERE}: {RESULTS} holds these metrics whole')
    return '\n'.join(lines + _silent([name for name, column in columns.items() if not column]))


def _silent(names: Sequence[str]) -> List[str]:
    return [
        f'{name}: the evaluator gave no metrics; nothing was detected on the whole test set, or it only formats '
        f'results (format_only)'
        for name in names
    ]
