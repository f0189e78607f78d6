# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The closing lines of an export: its sizes, what in it is integer, whether it was verified, the next command."""

from collections import Counter
from pathlib import Path
from typing import Any, List, Mapping, Sequence, Tuple

from psaq_mm.engine.run_summary import command_lines

__all__ = ['export_rows']


def export_rows(
    manifest: Mapping[str, Any], folders: Sequence[Path], sizes: Sequence[str], verified: Sequence[str], bundle: bool
) -> List[Tuple[str, Any]]:
    """Rows for :func:`psaq_mm.engine.run_summary.as_text`.

    Args:
        manifest: Of the exported model.
        folders: That were written.
        sizes: On the disk, a sentence for each folder.
        verified: Runtimes whose codes were compared with the student's; a failed comparison is no export to close.
        bundle: Whether the first folder can be loaded by this library.
    """
    kinds = Counter((row['kind'], row['type'], row['bits']) for row in manifest['tensors'] if 'reason' not in row)
    integer = [f'{count} {kind}s as {type_} ({bits} bits)' for (kind, type_, bits), count in sorted(kinds.items())]
    left = sum('reason' in row for row in manifest['tensors'])
    graphs = manifest['graphs']
    shapes = [f'{graph["size"][0]} x {graph["size"][1]}' for graph in graphs]
    taken = f'any, in multiples of {graphs[0]["multiple"]}' if graphs[0]['multiple'] else ', '.join(shapes)
    rows: List[Tuple[str, Any]] = [
        ('integer', ', '.join(integer) or 'nothing'),
        ('float', f'{left} entries, each with its reason above' if left else 'nothing'),
        ('pictures', taken),
        ('complete', _complete(manifest)),
        ('verified', _verified(verified)),
        ('files', [f'{folder}: {size.partition(",")[0]}' for folder, size in zip(folders, sizes)]),
    ]
    if bundle:
        rows.append(('next', command_lines(['psaq', 'predict', str(folders[0]), 'PICTURE.jpg', '--out', 'shown'])))
    return rows


def _complete(manifest: Mapping[str, Any]) -> str:
    if manifest['complete']:
        return 'gives predictions without PyTorch'
    return 'needs PyTorch and the library for the parts that are not in its graphs'


def _verified(runtimes: Sequence[str]) -> str:
    if runtimes:
        return f"integer codes are the student's in {' and '.join(runtimes)}"
    return 'no (--verify compares it with the student)'
