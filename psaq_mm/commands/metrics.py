# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Metrics of any evaluator, in plain types, as numbers for a table, and as JSON. Evaluators give numbers, and also
lists of one value a class, confusion matrices, nested dicts and strings; a number may be NaN.
"""

import math
import statistics
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from psaq_mm.plain import to_plain

__all__ = ['RESULTS', 'before_after_table', 'other_metrics', 'plain_metrics', 'scalars']

RESULTS = 'test_results.json'
"""File in the work dir that holds all metrics whole."""
_ELSEWHERE = 'see file'


def _number(value: Any) -> Any:
    """Numbers as floats; an array or tensor of one number is that number."""
    if math.prod(getattr(value, 'shape', (0,))) == 1:
        value = value.item()
    return float(value) if isinstance(value, (bool, int, float)) else value


def plain_metrics(found: Optional[Mapping[str, Any]]) -> Dict[str, Any]:
    """What an evaluator gave, in plain types: numbers as floats (NaN stays), tensors and arrays as lists, dicts flat,
    their keys joined with a slash.
    """
    flat: Dict[str, Any] = {}
    for key, value in (found or {}).items():
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
    """The numbers among metrics, None where one is not finite; of a list of one value a class the mean over the finite
    ones, under ``KEY (mean)``. Matrices and strings are left out.

    Args:
        metrics: Of :func:`plain_metrics`.
    """
    found: Dict[str, Optional[float]] = {}
    for key, value in metrics.items():
        if _is_classwise(value):
            known = [v for v in value if _finite(v)]
            found[f'{key} (mean)'] = statistics.fmean(known) if known else None
        elif value is None or isinstance(value, (int, float)):
            found[key] = float(value) if _finite(value) else None
    return found


def other_metrics(metrics: Mapping[str, Any]) -> Dict[str, Any]:
    """What :func:`scalars` leaves out or takes the mean of, in JSON types."""
    return {k: to_plain(v, nan=False) for k, v in metrics.items() if not (v is None or isinstance(v, (int, float)))}


# ---------------------------------------------------------------------- table


def _cell(column: Mapping[str, Any], key: str, width: int) -> str:
    value = column.get(key)
    shown = '-' if value is None else value if isinstance(value, str) else f'{value:.3f}'
    return f'  {shown:>{width}}'


def _difference(one: Any, other: Any) -> str:
    return f'  {other - one:>+10.3f}' if _finite(one) and _finite(other) else f'  {"-":>10}'


def before_after_table(
    before: Optional[Mapping], after: Optional[Mapping], label: str, first: str = 'full precision'
) -> str:
    """A table of metrics, one row a metric, full precision (or what ``first`` names) beside quantized.

    A column without a metric has ``-`` in its row; one without any is explained below. Lists of one value a class are
    shown as their mean, other kinds of metrics by a hint to the results' file.

    Args:
        before, after: Of :func:`plain_metrics`; None leaves the column out.
        label: Heads the second column.
        first: Heads the first column.
    """
    known: List[Tuple[str, int, Dict[str, Any]]] = []
    for name, width, given in ((first, 14, before), (label, max(len(label), 10), after)):
        if given is not None:
            given = plain_metrics(given)
            others = [k for k, v in other_metrics(given).items() if not _is_classwise(v)]
            known.append((name, width, {**scalars(given), **dict.fromkeys(others, _ELSEWHERE)}))
    keys = list(dict.fromkeys(key for _, _, column in reversed(known) for key in column))
    width = max(map(len, ['metric', *keys]))
    both = len(known) == 2
    head = f'{"metric":<{width}}' + ''.join(f'  {name:>{size if name == first else 10}}' for name, size, _ in known)
    head += '  difference' if both else ''
    rows = [head, '-' * len(head)]
    for key in keys:
        rows.append(
            f'{key:<{width}}'
            + ''.join(_cell(column, key, size) for _, size, column in known)
            + (_difference(*(column.get(key) for _, _, column in known)) if both else '')
        )
    if any(_ELSEWHERE in column.values() for _, _, column in known):
        rows.append(f'{_ELSEWHERE}: {RESULTS} holds these metrics whole')
    return '\n'.join(rows + _silent([name for name, _, column in known if not column]))


def _silent(names: Sequence[str]) -> List[str]:
    return [
        f'{name}: the evaluator gave no metrics; nothing was detected on the whole test set, or it only formats '
        f'results (format_only)'
        for name in names
    ]
