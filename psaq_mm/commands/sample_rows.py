# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Rows of all comparisons in one JSON list, for tables and pages: ``tools/compare.py ... --rows
docs/results/samples.json``.
"""

import json
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence

from psaq_mm.errors import DataError
from psaq_mm.files import locked, write_whole

__all__ = ['DIVERGENCE', 'FIELDS', 'bits_of', 'merge_rows', 'principal_metrics', 'read_rows', 'rows_of']

FIELDS = ('model', 'bits', 'source', 'seed', 'steps', 'seconds', 'metric', 'value', 'agreement')
"""Keys of a row, in their order. ``seconds`` is those of the data-free part; ``agreement`` that with full precision, 0
to 1."""

DIVERGENCE = 'divergence'
"""A metric beside those of the evaluator, of classifiers that give probabilities: from those of full precision, in
nats."""


def principal_metrics(metrics: Mapping[str, Any]) -> List[str]:
    """The metrics that a table shows: those of the tasks (AP, mIoU, top-1); the first one where none is there."""
    from psaq_mm.models.tasks import TASKS

    endings = tuple(ending for task in TASKS for ending in task.metrics)
    return [key for key in metrics if key.endswith(endings)] or list(metrics)[:1]


def bits_of(quant: str, label: str) -> str:
    """What a row has under ``bits``: the precision, and the quantizer's recipe where it is neither the plain one nor
    PSAQ-ViT V2's.

    Args:
        quant: Name of the quantizer, such as ``'repq_w4a4 (full)'``.
        label: Its precision, such as ``'W4A4'``.
    """
    recipe = re.match(r'(\w+?)_w\d', quant)
    return label if recipe is None or recipe[1] == 'psaq_v2' else f'{label} {recipe[1]}'


def rows_of(model: str, bits: str, source: str, row: Mapping) -> List[Dict[str, Any]]:
    """A comparison's row as rows of :data:`FIELDS`, one a metric; none of one that failed."""
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
    """The rows of a file, none where it is not there.

    Raises:
        DataError: It holds no such rows.
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
    """Put rows into the file; each takes the place of one of the same model, bits, source, seed, metric and steps.

    Args:
        path: A JSON list; made where it is not there, written whole, one process after the other.
        rows: Of :func:`rows_of`.
        by_time: The runs ended with their time, after as many steps as came: rows of other steps are the same run, made
            again.

    Raises:
        DataError: The file holds something else.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    same = [key for key in ('model', 'bits', 'source', 'seed', 'metric', 'steps') if key != 'steps' or not by_time]
    with locked(path.with_name(f'.{path.name}.lock')):
        new = {tuple(row[key] for key in same): dict(row) for row in rows}
        kept = [row for row in read_rows(path) if tuple(row[key] for key in same) not in new]
        lines = ',\n'.join(' ' + json.dumps(row) for row in [*kept, *new.values()])
        write_whole(path, f'[\n{lines}\n]\n')
