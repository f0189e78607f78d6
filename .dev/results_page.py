# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""docs/results.md and the table of README.md, out of the rows under docs/results.

    python .dev/results_page.py                                   # prints the page
    python .dev/results_page.py --write                           # writes the page and the table of README.md
    python .dev/results_page.py --add work_dirs/compare/compare.json    # takes the rows of a comparison, then writes

``--add`` runs on the machine and the commit that measured: both go into the rows. A row takes the place of an earlier
one of the same model, scope, bits, method, samples, seed and runtime, so there is one generation of numbers. A test
compares page, README and rows.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from psaq_mm.files import write_whole  # noqa: E402
from psaq_mm.tables import markdown_table  # noqa: E402

RESULTS = ROOT / 'docs' / 'results'
ROWS, SPEED = RESULTS / 'measured.json', RESULTS / 'speed.json'
PAGE, README = ROOT / 'docs' / 'results.md', ROOT / 'README.md'
BEGIN, END = '<!-- results: begin -->', '<!-- results: end -->'

KEY = ('model', 'scope', 'bits', 'method', 'samples', 'seed', 'runtime')
PROVENANCE = ('commit', 'date', 'processor', 'threads')
FIELDS = (*KEY, 'metrics', 'full_precision', 'agreement', 'seconds', *PROVENANCE)
"""Keys of a row. ``metrics`` and ``full_precision``: in per cent. ``seconds``: of the data-free part."""

METRICS = {
    'coco/bbox_mAP': ('box AP', 100),
    'coco/segm_mAP': ('mask AP', 100),
    'mIoU': ('mIoU', 1),
    'accuracy/top1': ('top-1', 1),
}
"""Names that a reader knows for those of the evaluators, and what makes per cent of their numbers."""

MODELS = {
    'mask_rcnn_swin_demo': 'Mask R-CNN, Swin (demo)',
    'upernet_swin_demo': 'UperNet, Swin (demo)',
    'mask_rcnn_swin_nuclei': 'Mask R-CNN, Swin (cells)',
    'deit_tiny': 'DeiT-Tiny',
    'vit_tiny': 'ViT-Tiny (AugReg)',
}
NOTES = {
    'mask_rcnn_swin_nuclei': '108 pictures of cells (Data Science Bowl 2018, CC0), `configs/nuclei/`.',
}
PYTORCH, RUNTIMES = 'pytorch', {'openvino': 'OpenVINO', 'onnxruntime': 'ONNX Runtime'}
BITS = ('W8A8', 'W6A6', 'W4A8', 'W4A4')
CONTROLS = ('gaussian', 'real')
METHODS = {'best': '`best`', 'fast': '`fast`', 'psaq_v2': 'PSAQ-ViT V2', 'psaq_v1': 'PSAQ-ViT V1', 'repq': 'RepQ-ViT'}

HEAD = """# Results

`.dev/results_page.py` makes this page from the rows in `docs/results/measured.json`; a test compares both. Earlier
numbers, other sources of pictures and trials are in [earlier results](history/results.md).

- **lost**: full precision less the quantized model, in points; below zero the quantized model is ahead. Mean over the
  seeds, in brackets the least and the greatest.
- **agreement**: share of the test pictures (classifiers) or pixels (segmentors) with the class that full precision
  gives, or F1 of the boxes against those of full precision (detectors).
- **minutes**: of quantizing, the least of the seeds, one thread of a machine with other work. Start-up and evaluation
  are not counted. A dash: not kept, or the machine was so busy that it says nothing.
- **rows**: when and where it was measured: [the last table](#measured-on).
- **on Gaussian noise**, **on real images**: controls, other pictures through the same quantizer and rounding: what
  they lose; their agreement. RepQ-ViT as published calibrates on real images.
- W6A6 and W4A4 use RepQ-ViT's quantizer, W8A8 and W4A8 the one of PSAQ-ViT V2 ([settings](reference/settings.md)).

Every row comes from this, with its own method, bits and source:

```bash
psaq compare CONFIG --method fast --quant w8a8 --samples generated --seeds 0 1 2
```

with `--cfg-options model.quant.scope=full` where the scope is full ([comparing](guides/compare.md)). A dash: not run.
"""

DEMO = """## Detector and segmentor of the demo

Small models, trained on the drawn scenes of `demo/scenes.py` (checkpoints in `demo/checkpoints/`), tested on 160
scenes. They show that the method works, not what it does on COCO or ADE20K. Scope *backbone* quantizes the backbone
alone, *full* also neck and heads. 160 scenes are few: noise of 1e-5 in the pictures alone moves AP by up to 0.2
([exactness](reference/integer_models.md#exactness))."""

CLASSIFIERS = """## Classifiers

timm's `deit_tiny_patch16_224.fb_in1k` and `vit_tiny_patch16_224.augreg_in21k_ft_in1k` on 1000 ImageNet photographs, one
a class: the 500 with an odd class index are tested, real images come from the others
(`benchmarks/image_folder.py`). Every layer is quantized. 500 photographs are few.{error}"""

INTEGER = """## Integer models

The exported model in its runtime beside the fake-quantized one in PyTorch
([what is compared, and how exactly](reference/integer_models.md#exactness)), one seed."""

SPEEDS = """## Speed

Seconds a picture of the whole model, from the picture to boxes, masks or map; two threads of a server processor with
VNNI (`{processor}`, {date}). More: [performance](guides/performance.md#integer-models)."""

NOT_RUN = (
    (
        'official COCO and ADE20K checkpoints (the tables of the papers)',
        'no COCO, no ADE20K; [commands](reference/papers.md)',
    ),
    ("ImageNet's whole validation set; DeiT-S, -B, ViT-S, -B, Swin classifiers", 'neither weights nor images at hand'),
    ('PSAQ-ViT V1, V2 and RepQ-ViT on ViT-Tiny', 'no time; drawn pictures were as good on DeiT-Tiny and faster'),
    ('cells with a dash, seeds below three', 'no time'),
    ('anything on a GPU', 'no GPU at hand'),
)

MEASURED_ON = """## Measured on

One generation of methods; what no later change touched was not measured again. `docs/results/measured.json` has the
commit of each row. Gaussian noise of rows before 2026-11-28 is other noise of the same statistics."""


class Spread(NamedTuple):
    """Mean, least and greatest over the seeds."""

    mean: float
    least: float
    greatest: float

    def text(self, digits: int = 2) -> str:
        """``mean (least to greatest)``."""
        mean, least, greatest = (f'{value + 0.0:.{digits}f}' for value in _no_minus_zero(self, digits))
        return mean if least == greatest else f'{mean} ({least} to {greatest})'


def _no_minus_zero(values: Iterable[float], digits: int) -> List[float]:
    return [0.0 if abs(value) < 0.5 * 10**-digits else value for value in values]


# ---------------------------------------------------------------------- rows
def read_rows(path: Path = ROWS) -> List[Dict[str, Any]]:
    """All rows; SystemExit where one lacks a key."""
    rows = json.loads(path.read_text(encoding='utf-8'))
    for row in rows:
        missing = [key for key in FIELDS if key not in row]
        if missing:
            raise SystemExit(f'{path}: a row of {row.get("model")} has no {", ".join(missing)}')
    return rows


def write_rows(rows: Sequence[Mapping], path: Path = ROWS) -> None:
    """A line a row, in the order of their keys."""
    ordered = sorted(rows, key=lambda row: [str(row[key]) for key in KEY])
    write_whole(path, '[\n' + ',\n'.join(' ' + json.dumps(row) for row in ordered) + '\n]\n')


def processor() -> str:
    """Vendor, family and the sets of instructions that matter here: ``AMD family 25, avx2``."""
    try:
        text = Path('/proc/cpuinfo').read_text()
    except OSError:
        return 'not known'
    values = {key.strip(): value.strip() for key, _, value in (line.partition(':') for line in text.splitlines())}
    flags = values.get('flags', '').split()
    known = [flag for flag in ('avx2', 'avx512f', 'avx_vnni', 'avx512_vnni', 'amx_int8') if flag in flags]
    vendor = values.get('vendor_id', 'unknown').replace('Authentic', '').replace('Genuine', '')
    return f'{vendor} family {values.get("cpu family", "unknown")}, {" ".join(known) or "none of these flags"}'


def provenance() -> Dict[str, Any]:
    """Where rows are measured that are added now: commit, day (UTC), processor, threads.

    Raises:
        SystemExit: OMP_NUM_THREADS, which the measurement ran with, is not set.
    """
    threads = os.environ.get('OMP_NUM_THREADS', '')
    if not threads.isdigit():
        raise SystemExit(
            'OMP_NUM_THREADS is not set: set it as it was for the comparison, for example OMP_NUM_THREADS=1'
        )
    commit = subprocess.run(
        ['git', 'rev-parse', '--short=7', 'HEAD'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    day = datetime.now(timezone.utc).date().isoformat()
    return dict(commit=commit.stdout.strip(), date=day, processor=processor(), threads=int(threads))


def rows_of_comparison(comparison: Mapping, where: Mapping) -> List[Dict[str, Any]]:
    """Rows of this page out of ``compare.json``; runs that failed are left out.

    Args:
        comparison: Its content.
        where: From :func:`provenance`.
    """
    return [_row(run, where) for run in comparison['rows'] if not run.get('error')]


def _row(run: Mapping, where: Mapping) -> Dict[str, Any]:
    name = re.sub(r'_w\da\d$', '', Path(run['config']).stem)
    bits = re.search(r'w\da\d', run['quant'])
    if bits is None:
        raise SystemExit(f'{run["quant"]} names no bits such as w8a8: leave its rows out')
    extra = {key: run[key] for key in ('difference_se', 'divergence') if run.get(key) is not None}
    return dict(
        model=name,
        scope='full' if '(full' in run['quant'] else 'backbone',
        bits=bits[0].upper(),
        method=run['method'],
        samples=run['source'],
        seed=run['seed'],
        runtime=PYTORCH,
        metrics=_named(run['metrics']),
        full_precision=_named(run['full_precision']),
        agreement=round(run['agreement'], 5),
        seconds=run['seconds'],
        pictures=run['samples'],
        **{key: round(value, 5) for key, value in extra.items()},
        **where,
    )


def _named(metrics: Mapping[str, float]) -> Dict[str, float]:
    return {name: round(metrics[key] * scale, 4) for key, (name, scale) in METRICS.items() if key in metrics}


def merged(rows: Sequence[Mapping], new: Sequence[Mapping]) -> List[Mapping]:
    """``rows`` with ``new``, which take the place of those of the same :data:`KEY`.

    A row without a seed sums up an earlier measurement of several; it goes when rows of as many seeds are there.
    """

    def key(row: Mapping) -> Tuple:
        return tuple(row[name] for name in KEY)

    taken = {key(row) for row in new}
    every = [*(row for row in rows if key(row) not in taken), *new]
    single = Counter(_kind(row) for row in every if row['seed'] is not None)
    return [row for row in every if row['seed'] is not None or single[_kind(row)] < row['seeds']]


def _kind(row: Mapping) -> Tuple:
    return tuple(row[name] for name in KEY if name != 'seed')


def group(rows: Sequence[Mapping], **wanted: Any) -> List[Mapping]:
    """The rows with these values: those that sum up several seeds where there are any, else one a seed."""
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    sums = {_kind(row) for row in found if row['seed'] is None}
    return [row for row in found if row['seed'] is None or _kind(row) not in sums]


def value(rows: Sequence[Mapping], metric: str) -> Spread:
    """A metric over the seeds, in per cent."""
    if rows[0]['seed'] is None:  # a table of an earlier measurement, of which mean, least and greatest are known
        return Spread(*rows[0]['metrics'][metric])
    values = [row['metrics'][metric] for row in rows]
    return Spread(statistics.fmean(values), min(values), max(values))


def lost(rows: Sequence[Mapping], metric: str) -> Spread:
    """Full precision less the quantized model, over the seeds, in points."""
    full, got = rows[0]['full_precision'][metric], value(rows, metric)
    return Spread(full - got.mean, full - got.greatest, full - got.least)


def seeds(rows: Sequence[Mapping]) -> int:
    """How many there are."""
    return rows[0]['seeds'] if rows[0]['seed'] is None else len(rows)


def agreement(rows: Sequence[Mapping]) -> str:
    """Its mean over the seeds."""
    known = [row['agreement'] for row in rows if row['agreement'] is not None]
    return f'{statistics.fmean(known):.3f}' if known else '-'


def minutes(rows: Sequence[Mapping]) -> str:
    """The least of the seeds: what other work on the machine lengthened least. Not of rows marked as busy."""
    known = [row['seconds'] for row in rows if row['seconds'] is not None and not row.get('busy')]
    return f'{min(known) / 60:.1f}' if known else '-'


# ---------------------------------------------------------------------- tables
def _measurement(row: Mapping) -> Tuple:
    return row['date'], row['processor'], row['threads']


def measurements(rows: Sequence[Mapping]) -> List[Tuple]:
    """All days and machines, the newest first; their letters are a, b, c in this order."""
    return sorted({_measurement(row) for row in rows}, key=str, reverse=True)


def letters(rows: Sequence[Mapping], all_rows: Sequence[Mapping]) -> str:
    """Those of some rows' measurements."""
    order = measurements(all_rows)
    return ''.join(sorted({chr(97 + order.index(_measurement(row))) for row in rows}))


def _kinds(rows: Sequence[Mapping]) -> List[Tuple[str, str, str]]:
    """Scope, bits and method of all that was measured in PyTorch, in the order of the tables."""
    found = {(row['scope'], row['bits'], row['method']) for row in rows if row['runtime'] == PYTORCH}
    return sorted(found, key=lambda kind: (kind[0], BITS.index(kind[1]), list(METHODS).index(kind[2])))


def _full_precision(rows: Sequence[Mapping]) -> Mapping[str, float]:
    """That of the newest row; of the whole model, where AP is not rounded to one decimal, if there is one."""
    return max(rows, key=lambda row: (row['date'], row['scope'] == 'full'))['full_precision']


def _control(rows: Sequence[Mapping], metrics: Iterable[str]) -> str:
    """What a control loses, and its agreement; its number of seeds where it is not three or more."""
    if not rows:
        return '-'
    few = '' if seeds(rows) > 2 else f'; {seeds(rows)} seed{"s" * (seeds(rows) > 1)}'
    known = '' if agreement(rows) == '-' else f'; {agreement(rows)}'
    return ' / '.join(lost(rows, metric).text() for metric in metrics) + known + few


def table(model: str, rows: Sequence[Mapping]) -> str:
    """All that was measured of one model: a line for each scope, bits and method, controls beside it."""
    of_model = [row for row in rows if row['model'] == model and row['runtime'] == PYTORCH]
    full = _full_precision(of_model)
    scopes = len({row['scope'] for row in of_model}) > 1
    lines = []
    for scope, bits, method in _kinds(of_model):
        kind = dict(scope=scope, bits=bits, method=method)
        own, *controls = (group(of_model, samples=samples, **kind) for samples in ('generated', *CONTROLS))
        lines.append(
            [
                *([scope] if scopes else []),
                bits,
                METHODS[method],
                str(seeds(own)) if own else '-',
                *(lost(own, metric).text() if own else '-' for metric in full),
                agreement(own),
                minutes(own),
                *(_control(control, full) for control in controls),
                letters(own + controls[0] + controls[1], rows),
            ]
        )
    head = [*(['scope'] if scopes else []), 'bits', 'method', 'seeds', *(f'{name} lost' for name in full)]
    head += ['agreement', 'minutes', 'on Gaussian noise', 'on real images', 'rows']
    return markdown_table(head, lines, 'l' * len(head))


def title(model: str, rows: Sequence[Mapping]) -> str:
    """The head of its table, with full precision."""
    of_model = [row for row in rows if row['model'] == model and row['runtime'] == PYTORCH]
    full = _full_precision(of_model)
    numbers = ', '.join(f'{name} {number:.2f}' for name, number in full.items())
    return f'### {MODELS[model]}: {numbers} in full precision' + (f'\n\n{NOTES[model]}' if model in NOTES else '')


def integer_table(rows: Sequence[Mapping]) -> str:
    """Exported models beside the fake-quantized ones."""
    exported, kind = [row for row in rows if row['runtime'] != PYTORCH], KEY[:-1]
    lines = []
    for key in dict.fromkeys(tuple(row[name] for name in kind) for row in exported):
        runs = {row['runtime']: row for row in exported if tuple(row[name] for name in kind) == key}
        first = next(iter(runs.values()))
        cells = [first['fake_quantized'], *(runs[name]['metrics'] if name in runs else {} for name in RUNTIMES)]
        lines.append(
            [
                MODELS[first['model']],
                first['scope'],
                first['bits'],
                METHODS[first['method']],
                ' / '.join(first['metrics']),
                *(' / '.join(f'{number:.2f}' for number in cell.values()) or '-' for cell in cells),
                letters(list(runs.values()), rows),
            ]
        )
    head = ('model', 'scope', 'bits', 'method', 'metric', 'fake-quantized', *RUNTIMES.values(), 'rows')
    return markdown_table(head, lines, 'l' * len(head))


def speed_table() -> str:
    """Whole integer models in their runtimes, from docs/results/speed.json."""
    lines = [
        [
            f'{row["model"]}, {row["size"]}',
            RUNTIMES[row['runtime']],
            *(f'{row[key]:.3g}' for key in ('pytorch_seconds', 'float32_seconds', 'w8a8_seconds')),
            f'{row["over_pytorch"]:.1f}',
            f'{row["over_float32"]:.1f}',
        ]
        for row in json.loads(SPEED.read_text(encoding='utf-8'))
    ]
    head = ('model, picture', 'runtime', 'PyTorch float32', 'runtime float32', 'runtime W8A8')
    return markdown_table([*head, 'times PyTorch', 'times float32'], lines, 'llrrrrr')


def measured_on(rows: Sequence[Mapping]) -> str:
    """What the letters of the tables stand for."""
    lines = []
    for i, where in enumerate(measurements(rows)):
        commits = sorted({row['commit'] for row in rows if _measurement(row) == where})
        date, name, threads = where
        lines.append([chr(97 + i), date, name, str(threads or 'not kept'), ' '.join(commits)])
    return markdown_table(('rows', 'date', 'processor', 'threads', 'commits'), lines, 'lllll')


def standard_error(rows: Sequence[Mapping]) -> str:
    """A sentence on that of what classifiers lose, from the least to the greatest row."""
    known = [row['difference_se'] for row in rows if row.get('difference_se')]
    if not known:
        return ''
    return f' One standard error of what one seed loses: {min(known):.1f} to {max(known):.1f} points.'


def not_run(rows: Sequence[Mapping]) -> str:
    """What one would look for in vain, first the precisions at which `best` was not run on a model of the tables."""
    missing = []
    for model, name in MODELS.items():
        of_model = group(rows, model=model, method='best', samples='generated', runtime=PYTORCH)
        bits = [one for one in BITS if one not in {row['bits'] for row in of_model}]
        if bits and group(rows, model=model):
            missing.append((f'`best` on {name} at {", ".join(bits)}', 'no time'))
    return markdown_table(('what', 'why'), [*missing, *NOT_RUN])


def page(rows: Optional[Sequence[Mapping]] = None) -> str:
    """The whole of docs/results.md."""
    rows = read_rows() if rows is None else rows
    parts = [HEAD, DEMO]
    for model in MODELS:
        if model == 'deit_tiny':
            parts.append(CLASSIFIERS.format(error=standard_error(rows)))
        if group(rows, model=model):
            parts += [title(model, rows), table(model, rows)]
    where = json.loads(SPEED.read_text(encoding='utf-8'))[0]
    speeds = SPEEDS.format(processor=where['processor'], date=where['date'])
    parts += [INTEGER, integer_table(rows), speeds, speed_table()]
    parts += ['## What was not run', not_run(rows)]
    parts += [MEASURED_ON, measured_on(rows)]
    return '\n\n'.join(part.strip('\n') for part in parts) + '\n'


# ---------------------------------------------------------------------- metafiles
def claims(config: str, arguments: str, rows: Optional[Sequence[Mapping]] = None) -> Dict[str, float]:
    """What a metafile may say of a model: the mean of each metric over the seeds; nothing, where it was not measured.

    Args:
        config: Such as ``configs/demo/mask_rcnn_swin_demo_w8a8.py``.
        arguments: Of the command, such as ``--method best --quant w4a8``.
        rows: Those of the page by default.
    """
    rows = read_rows() if rows is None else rows
    name, bits = re.fullmatch(r'(.+?)(?:_(w\da\d))?', Path(config).stem).groups()
    method, given = (re.search(rf'--{key} (\S+)', arguments) for key in ('method', 'quant'))
    full = 'scope=full' in arguments or '/classification/' in config
    own = group(
        rows,
        model=name,
        scope='full' if full else 'backbone',
        bits=(given[1] if given else bits or 'w8a8').upper(),
        method=method[1] if method else 'psaq_v2',
        samples='generated',
        runtime=PYTORCH,
    )
    return {metric: round(value(own, metric).mean, 2) for metric in own[0]['full_precision']} if own else {}


# ---------------------------------------------------------------------- README
README_LINES = (
    ('mask_rcnn_swin_demo', 'full', 'W8A8', 'best'),
    ('mask_rcnn_swin_demo', 'full', 'W4A8', 'fast'),
    ('mask_rcnn_swin_demo', 'backbone', 'W4A4', 'best'),
    ('upernet_swin_demo', 'full', 'W4A8', 'fast'),
    ('upernet_swin_demo', 'backbone', 'W4A4', 'best'),
    ('deit_tiny', 'full', 'W8A8', 'best'),
    ('deit_tiny', 'full', 'W4A8', 'best'),
    ('deit_tiny', 'full', 'W4A4', 'best'),
    ('vit_tiny', 'full', 'W8A8', 'best'),
    ('vit_tiny', 'full', 'W4A4', 'best'),
)
LAYERS = dict(backbone='backbone', full='every layer')


def readme_table(rows: Optional[Sequence[Mapping]] = None) -> str:
    """The one table of README.md: what is lost in the mean, beside both controls, and the minutes."""
    rows = read_rows() if rows is None else rows
    lines = []
    for model, scope, bits, method in README_LINES:
        kind = dict(model=model, scope=scope, bits=bits, method=method, runtime=PYTORCH)
        own, *controls = (group(rows, samples=samples, **kind) for samples in ('generated', *CONTROLS))
        if not own:
            continue
        full = own[0]['full_precision']
        losses = [
            ' / '.join(f'{mean:.2f}' for mean in _no_minus_zero((lost(some, name).mean for name in full), 2)) or '-'
            if some
            else 'not run'
            for some in (own, *controls)
        ]
        numbers = ' / '.join(f'{number:.2f}' for number in full.values())
        lines.append(
            [
                MODELS[model],
                LAYERS[scope],
                bits,
                METHODS[method],
                f'{" / ".join(full)} {numbers}',
                *losses,
                minutes(own),
            ]
        )
    head = (
        'model',
        'quantized',
        'bits',
        'method',
        'full precision',
        'lost',
        'on Gaussian noise',
        'on real images',
        'minutes',
    )
    return markdown_table(head, lines, 'l' * len(head))


def readme_with(text: str, new: str) -> str:
    """README's text with another table between the two markers.

    Raises:
        SystemExit: The markers are not there.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f'README.md needs {BEGIN} and {END} once each: put them around its table of results')
    before, _, rest = text.partition(BEGIN)
    return f'{before}{BEGIN}\n{new}\n{END}{rest.partition(END)[2]}'


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--write', action='store_true', help='write docs/results.md and the table of README.md')
    parser.add_argument(
        '--add', type=Path, nargs='+', metavar='COMPARE_JSON', help='take the rows of comparisons first'
    )
    parser.add_argument(
        '--busy', action='store_true', help='the machine had so much other work that seconds say nothing'
    )
    args = parser.parse_args(argv)
    if args.add:
        where = dict(provenance(), **(dict(busy=True) if args.busy else {}))
        rows = read_rows() if ROWS.is_file() else []
        for path in args.add:
            rows = merged(rows, rows_of_comparison(json.loads(path.read_text(encoding='utf-8')), where))
        write_rows(rows)
    if args.write or args.add:
        write_whole(PAGE, page())
        write_whole(README, readme_with(README.read_text(encoding='utf-8'), readme_table()))
    else:
        print(page(), end='')
    return 0


if __name__ == '__main__':
    sys.exit(main())
