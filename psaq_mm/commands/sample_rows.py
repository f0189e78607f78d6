# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Rows of all comparisons in one JSON list: ``tools/compare.py ... --rows docs/results/samples.json``."""

import json
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence

from psaq_mm.errors import DataError
from psaq_mm.files import locked, write_whole

__all__ = ['DIVERGENCE', 'FIELDS', 'bits_of', 'merge_rows', 'principal_metrics', 'read_rows', 'rows_of']

FIELDS = ('model', 'bits', 'source', 'seed', 'steps', 'seconds', 'metric', 'value', 'agreement')
"""Keys of a row, in their order. ``seconds``: of the data-free part. ``agreement``: with full precision, 0 to 1."""

DIVERGENCE = 'divergence'
"""A metric beside those of the evaluator: divergence of a classifier's probabilities from full precision, in nats."""


def principal_metrics(metrics: Mapping[str, Any]) -> List[str]:
    """The metrics in a table: those of the tasks (AP, mIoU, top-1). The first metric, if there is none of them."""
    from psaq_mm.models.tasks import TASKS

    endings = tuple(ending for task in TASKS for ending in task.metrics)
    return [key for key in metrics if key.endswith(endings)] or list(metrics)[:1]


def bits_of(quant: str, label: str) -> str:
    """The value of ``bits`` in a row: the precision, followed by the quantizer's recipe unless it is PSAQ-ViT V2's.

    Args:
        quant: Name of the quantizer, such as ``'repq_w4a4 (full)'``.
        label: Its precision, such as ``'W4A4'``.
    """
    recipe = re.match(r'(\w+?)_w\d', quant)
    return label if recipe is None or recipe[1] == 'psaq_v2' else f'{label} {recipe[1]}'


def rows_of(model: str, bits: str, source: str, row: Mapping) -> List[Dict[str, Any]]:
    """A comparison's row as rows of :data:`FIELDS`, one for each metric. None, if the run failed."""
    if row.get('error'):
        return []
    values = {metric: row['metrics'][metric] for metric in principal_metrics(row['metrics'])}
    if row.get(DIVERGENCE) is not None:
        values[DIVERGENCE] = round(row[DIVERGENCE], 5)
    return [
        dict(
            model=model,
            bits=bits,
            source=source,
            seed=row['seed'],
            steps=row['iters'],
            seconds=row['seconds'],
            metric=metric,
            value=value,
            agreement=row['agreement'],
        )
        for metric, value in values.items()
    ]


def read_rows(path: Path) -> List[Dict[str, Any]]:
    """The rows of a file. None, if it does not exist.

    Raises:
        DataError: It has other content.
    """
    path = Path(path)
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(rows, list) or not all(isinstance(row, dict) and set(FIELDS) <= set(row) for row in rows):
            raise ValueError('rows lack a key')
    except ValueError as error:
        raise DataError(
            f'{path} holds no list of rows with the keys {", ".join(FIELDS)} ({error}): move it away or give another '
            'file'
        ) from error
    return rows


def merge_rows(path: Path, rows: Sequence[Mapping], by_time: bool = False) -> None:
    """Add rows to a file. A row replaces one with the same model, bits, source, seed, metric and steps.

    Args:
        path: A JSON list. It is created if it is missing, and locked while it is changed.
        rows: From :func:`rows_of`.
        by_time: The runs were limited by time, so their number of steps varies: a row also replaces one with another
            number of steps.

    Raises:
        DataError: The file has other content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    same = [key for key in ('model', 'bits', 'source', 'seed', 'metric', 'steps') if key != 'steps' or not by_time]
    with locked(path.with_name(f'.{path.name}.lock')):
        new = {tuple(row[key] for key in same): dict(row) for row in rows}
        kept = [row for row in read_rows(path) if tuple(row[key] for key in same) not in new]
        lines = ',\n'.join(' ' + json.dumps(row) for row in [*kept, *new.values()])
        write_whole(path, f'[\n{lines}\n]\n')
