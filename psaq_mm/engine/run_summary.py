# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a run did, on a page: what is quantized and what is not, the loss to be expected, files, the next commands."""

import json
import shlex
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from torch import nn

from psaq_mm.engine.expected import Expected
from psaq_mm.engine.runner.estimate import in_words
from psaq_mm.files import write_whole
from psaq_mm.models import report_of, spec_of
from psaq_mm.plain import to_plain
from psaq_mm.quantization import ConversionReport, LogQuantizer, ReparameterizedQuantizer, quantizers

__all__ = ['SUMMARY', 'as_text', 'command_lines', 'rows_of', 'run_summary', 'size_in_words', 'write_summary']

SUMMARY = 'summary.json'
_COLUMN = 13
ROOM = 80 - 2 - _COLUMN
"""Columns of a sentence on a terminal of 80."""


def run_summary(loop) -> Dict[str, Any]:
    """What a run did, as JSON types; files and commands are added where files are written (:func:`write_summary`).

    Args:
        loop: A :class:`psaq_mm.engine.runner.loop.DataFreeTrainLoop` that has run.

    Returns:
        ``label`` (such as ``'W4A8'``), ``layers``, ``products`` and ``edges`` (how many at which bits), ``floats`` (how
        many, in which parts, and why), ``quantizers``, ``rotated``, ``rounding``, ``healed`` (what was given other
        settings than were asked for, and why), ``expected`` (None where it is switched off), ``pictures``, ``steps``,
        ``seconds``.
    """
    model, expected = loop.model, loop.expected
    samples = len(loop.first_pictures) if loop.first_pictures is not None else None
    return dict(
        label=spec_of(model).label,
        **_counted(report_of(model)),
        quantizers=_special(model),
        rotated=None if loop.rotated is None else to_plain(loop.rotated._asdict()),
        rounding=_rounded(loop.calibration),
        healed=[dict(one) for one in getattr(loop, 'healed', ())],
        expected=None if expected is None else to_plain(dict(expected._asdict(), estimate=True), nan=False),
        pictures=samples,
        steps=loop.iter,
        seconds={name: round(value, 2) for name, value in loop.clock.seconds.items()},
    )


def _counted(report: ConversionReport) -> Dict[str, Any]:
    kinds: Dict[str, Counter] = dict(layers=Counter(), products=Counter(), edges=Counter())
    for row in report.layers:
        kind = 'edges' if row.kind == 'activation' else 'products' if row.w_bits is None else 'layers'
        kinds[kind][row.w_bits, row.a_bits] += 1
    rows: Dict[str, Any] = {
        kind: [dict(w_bits=w, a_bits=a, count=count) for (w, a), count in counts.most_common()]
        for kind, counts in kinds.items()
    }
    floats: Dict[str, Tuple[int, List[str]]] = {}
    for left in report.floats:
        layers, _, word = left.kind.partition(' ')
        number = int(layers) if word.startswith('layer') and layers.isdigit() else 1
        count, names = floats.get(left.reason, (0, []))
        floats[left.reason] = count + number, [*names, left.name]
    rows['floats'] = [
        dict(reason=reason, count=count, parts=_parts(names)) for reason, (count, names) in floats.items()
    ]
    return rows


def _parts(names: Sequence[str]) -> List[str]:
    """Names of the parts of a model that layers lie in; of one or two layers their own."""
    return list(names) if len(names) <= 2 else list(dict.fromkeys(name.partition('.')[0] for name in names))


def _special(model: nn.Module) -> Dict[str, int]:
    """How many quantizers are of another kind than one uniform scale."""
    found = [quantizer for _, quantizer in quantizers(model) if quantizer.mode != 'off']
    return dict(
        logarithmic=sum(isinstance(one, LogQuantizer) for one in found),
        reparameterized=sum(isinstance(one, ReparameterizedQuantizer) for one in found),
    )


def _rounded(calibration) -> Optional[Dict[str, Any]]:
    """What rounding did; None where weights have their nearest codes, or the run was resumed after it."""
    if not calibration.rounded:
        return None
    kept = [row for row in calibration.rounded if row.reason]
    return dict(
        kind=calibration.rounding,
        layers=len(calibration.rounded) - len(kept),
        kept=[dict(name=row.name, reason=row.reason) for row in kept],
    )


def write_summary(summary: Mapping[str, Any], work_dir: Path, config: Optional[str]) -> Dict[str, Any]:
    """Write ``summary.json`` beside the student.

    Args:
        summary: Of :func:`run_summary`.
        work_dir: Of the run, with ``student.pth`` in it.
        config: Path of the run's config, for the next commands; None: unknown.

    Returns:
        ``summary`` with ``files`` (bytes by path) and ``next`` (commands).
    """
    student = work_dir / 'student.pth'
    logs = sorted(work_dir.glob('*/*.log'))
    files = {str(path): path.stat().st_size for path in (student, *logs[-1:]) if path.is_file()}
    whole = dict(summary, files=files, next=next_commands(config, student) if config else [])
    write_whole(work_dir / SUMMARY, json.dumps(whole, indent=1) + '\n')
    return whole


def next_commands(config: str, student: Path) -> List[List[str]]:
    """What to run with a student, each as its arguments."""
    out = student.parent / 'deployed'
    return [
        ['psaq', 'test', config, str(student)],
        ['psaq', 'export', config, str(student), '--out', str(out), '--verify'],
    ]


# ---------------------------------------------------------------------- text
def rows_of(summary: Mapping[str, Any]) -> List[Tuple[str, Any]]:
    """Titles and sentences of a run's summary; of commands and files a list."""
    rows: List[Tuple[str, Any]] = [('quantized', _quantized(summary))]
    for left in summary['floats']:
        rows.append(('stays float', f'{left["count"]} layers of {_listed(left["parts"])}: {left["reason"]}'))
    rows += [('also', sentence) for sentence in _also(summary)]
    rows += [('healed', f'{one["name"]}: {one["reason"]}') for one in summary['healed']]
    if summary['expected'] is not None:
        expected = _expected(summary['expected'])
        rows.append(('expected', f'{expected}. This is an estimate and no accuracy: test on pictures of your own'))
    made = f'{summary["pictures"]} pictures, ' if summary['pictures'] else ''
    taken = in_words(sum(summary['seconds'].values()))
    rows.append(('made from', f'{made}{summary["steps"]} student steps, in {taken}'))
    rows.append(('files', [f'{path} ({size_in_words(size)})' for path, size in summary.get('files', {}).items()]))
    rows.append(('next', [line for command in summary.get('next', ()) for line in command_lines(command)]))
    return [(title, said) for title, said in rows if said]


def _quantized(summary: Mapping[str, Any]) -> str:
    said = [f'{one["count"]} layers at W{one["w_bits"]}A{one["a_bits"] or 32}' for one in summary['layers']]
    said += [f'{one["count"]} products of activations at {one["a_bits"]} bits' for one in summary['products']]
    said += [f'{one["count"]} other activations at {one["a_bits"]} bits' for one in summary['edges']]
    return ', '.join(said)


def _also(summary: Mapping[str, Any]) -> List[str]:
    said, special, rounding, rotated = [], summary['quantizers'], summary['rounding'], summary['rotated']
    if special['reparameterized']:
        said.append(f'scales of {special["reparameterized"]} LayerNorm outputs are folded into the layers after them')
    if special['logarithmic']:
        said.append(f'{special["logarithmic"]} activations have a logarithmic quantizer')
    if rotated is not None:
        streams = [f'{name} ({width} channels)' for name, width in rotated['streams']]
        said.append(f'rotated: {rotated["heads"]} heads{" and " + _listed(streams) if streams else ""}')
        said += [f'not rotated: {reason}' for reason in rotated['left']]
    if rounding is not None:
        kept = f'; {len(rounding["kept"])} keep their nearest codes' if rounding['kept'] else ''
        said.append(f'weights of {rounding["layers"]} layers are rounded together ({rounding["kind"]}){kept}')
    return said


def _expected(expected: Mapping[str, Any]) -> str:
    """See :meth:`psaq_mm.engine.expected.Expected.describe`."""
    return Expected(**{name: expected[name] for name in Expected._fields}).describe()


def _listed(names: Sequence[str], most: int = 4) -> str:
    shown = ', '.join(names[:most])
    return f'{shown} and {len(names) - most} more' if len(names) > most else shown


def size_in_words(size: float) -> str:
    """Bytes as they are said: ``'48.2 MB'``."""
    return f'{size / 1e6:.1f} MB' if size >= 1e5 else f'{size / 1e3:.1f} kB'


def command_lines(arguments: Sequence[str], width: int = ROOM) -> List[str]:
    """Arguments as they are typed, within ``width`` columns if they can be: a line goes on behind a backslash."""
    lines: List[str] = []
    for word in map(shlex.quote, arguments):
        if lines and len(lines[-1]) + len(word) + 3 <= width:
            lines[-1] += f' {word}'
        else:
            lines.append(f'    {word}' if lines else word)
    return [f'{line} \\' for line in lines[:-1]] + lines[-1:]


def as_text(title: str, rows: Sequence[Tuple[str, Any]]) -> str:
    """Rows as a table of two columns, 80 wide.

    Args:
        title: First line.
        rows: Titles, and for each a sentence, which is wrapped, or a list of lines, which stay as they are.
    """
    lines, before = [title], ''
    for name, said in rows:
        parts = said if isinstance(said, list) else textwrap.wrap(said, ROOM, break_on_hyphens=False)
        head = '' if name == before else name
        lines += [f'  {"" if number else head:<{_COLUMN}}{part}'.rstrip() for number, part in enumerate(parts)]
        before = name
    return '\n'.join(lines)
