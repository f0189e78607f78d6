# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Rows of a comparison: a file that keeps them, and a table of their means."""

import contextlib
import json
import re
import statistics
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence

from psaq_mm.errors import ConfigError, DataError
from psaq_mm.files import PathLike, locked, write_whole
from psaq_mm.tables import markdown_table

__all__ = ['RowFile', 'alone_in', 'summarize', 'to_markdown']

_DETAIL = re.compile(r'_(\d+|s|m|l)$')
"""Metrics at one overlap or object size. They are in the JSON file, not in the printed table."""


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock a work dir while the block runs: two processes would each drop the rows that the other has added.

    Raises:
        ConfigError: Another process has the lock.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / '.lock', wait=False))
        except BlockingIOError as error:
            raise ConfigError(
                f'another comparison is at work in {folder}: wait for it, or give another --work-dir'
            ) from error
        yield


class RowFile:
    """``compare.json``: one row for each run, under a key made of its settings.

    Args:
        path: The file. It is read if it exists.

    Raises:
        DataError: It is not a file of rows.
    """

    def __init__(self, path: PathLike):
        self.path = Path(path)
        self.rows: Dict[str, Dict] = {}
        self.table: List[Dict] = []
        if self.path.is_file():
            try:
                content = json.loads(self.path.read_text(encoding='utf-8'))
                self.rows, self.table = {row['key']: row for row in content['rows']}, content['table']
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f'{self.path} holds no rows of a comparison ({type(error).__name__}): move it away or give '
                    'another --work-dir'
                ) from error

    def done(self, key: str) -> bool:
        """Whether the file has a row of the run without an error."""
        return key in self.rows and not self.rows[key].get('error')

    def add(self, row: Mapping) -> None:
        """Add a row, in place of one with the same key, and save."""
        self.rows.pop(row['key'], None)
        self.rows[row['key']] = dict(row)
        self.save()

    def save(self) -> None:
        """Write the file."""
        write_whole(self.path, json.dumps(dict(rows=list(self.rows.values()), table=self.table), indent=1))


def _spread(values: Sequence[Optional[float]]) -> Optional[Dict[str, float]]:
    known = [v for v in values if v is not None]
    return dict(mean=statistics.fmean(known), min=min(known), max=max(known)) if known else None


def summarize(rows: Sequence[Mapping]) -> List[Dict[str, Any]]:
    """Mean, min and max over the seeds, for each config, method, quant and source, in the order of the rows.

    Rows with an ``error`` are counted in ``failed``, and are not in the means.
    """
    groups: Dict[tuple, List[Mapping]] = {}
    for row in rows:
        groups.setdefault((row['config'], row['method'], row['quant'], row['source']), []).append(row)
    entries = []
    for (config, method, quant, source), group in groups.items():
        good = [r for r in group if not r.get('error')]
        entry: Dict[str, Any] = dict(
            config=config,
            method=method,
            quant=quant,
            source=source,
            seeds=[r['seed'] for r in good],
            failed=len(group) - len(good),
        )
        if good:
            keys = dict.fromkeys(k for r in good for k in r['metrics'])
            entry['metrics'] = {k: _spread([r['metrics'].get(k) for r in good]) for k in keys}
            for key in ('agreement', 'difference', 'difference_se', 'divergence', 'seconds', 'samples', 'iters'):
                entry[key] = _spread([r.get(key) for r in good])
            entry['full_precision'] = good[0]['full_precision']
        entries.append(entry)
    return entries


def _cell(spread: Optional[Mapping], digits: int) -> str:
    if spread is None:
        return '-'
    least, mean, most = (f'{spread[k]:.{digits}f}' for k in ('min', 'mean', 'max'))
    return mean if least == most else f'{mean} ({least} to {most})'


def _difference(entry: Mapping) -> str:
    error = entry.get('difference_se')
    return _cell(entry.get('difference'), 2) + (f' ± {error["mean"]:.2f}' if error else '')


def to_markdown(table: Sequence[Mapping]) -> str:
    """Entries of :func:`summarize` as markdown: a table for each config, full precision first.

    Cells have the mean and, in brackets, min and max over the seeds. Metrics are in the evaluator's units.
    """
    parts = []
    for config in dict.fromkeys(entry['config'] for entry in table):
        parts.append(f'## {config}\n\n{_one_config([e for e in table if e["config"] == config])}')
    return '\n\n'.join(parts) + '\n'


def _one_config(entries: Sequence[Mapping]) -> str:
    full = next((e['full_precision'] for e in entries if e.get('full_precision')), {})
    # Full precision may have no metrics, or not all of them.
    known = dict.fromkeys([*full, *(k for e in entries for k in e.get('metrics') or {})])
    keys = [k for k in known if not _DETAIL.search(k)] or list(known)
    paired = any(e.get('difference') for e in entries)
    divergent = any(e.get('divergence') for e in entries)
    head = [
        'method',
        'quant',
        'source',
        'seeds',
        *keys,
        'agreement',
        *(['difference'] if paired else []),
        *(['divergence'] if divergent else []),
        'samples',
        'steps',
        'seconds',
    ]
    # AP comes as a share, mIoU and top-1 in per cent.
    digits = {k: 3 if full.get(k) is None or abs(full[k]) <= 1 else 2 for k in keys}
    lines = []
    if full:
        values = [f'{full[k]:.{digits[k]}f}' if full.get(k) is not None else '-' for k in keys]
        first = ['full precision', '-', '-', '-', *values, '1.000']
        lines.append(first + ['-'] * (len(head) - len(first)))
    for e in entries:
        metrics = e.get('metrics') or {}
        seeds = f'{len(e["seeds"])}' + (f' ({e["failed"]} failed)' if e['failed'] else '')
        lines.append(
            [
                e['method'],
                e['quant'],
                e['source'],
                seeds,
                *(_cell(metrics.get(k), digits[k]) for k in keys),
                _cell(e.get('agreement'), 3),
                *([_difference(e)] if paired else []),
                *([_cell(e.get('divergence'), 4)] if divergent else []),
                _cell(e.get('samples'), 0),
                _cell(e.get('iters'), 0),
                _cell(e.get('seconds'), 1),
            ]
        )
    return markdown_table(head, lines)
