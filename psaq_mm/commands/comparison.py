# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Sources of samples through the same quantizer, calibrated or trained, at equal steps or equal seconds.

Which rows there are, what their numbers depend on, and how one comes about.
"""

import copy
import dataclasses
import errno
import gc
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from psaq_mm.commands.common import merge_options
from psaq_mm.commands.compare_rows import RowFile, alone_in, summarize, to_markdown
from psaq_mm.commands.metrics import other_metrics, scalars
from psaq_mm.commands.sample_rows import bits_of, merge_rows, principal_metrics, read_rows, rows_of
from psaq_mm.engine.missing import missing_from
from psaq_mm.errors import ConfigError, DataError, PsaqError, nearest
from psaq_mm.files import file_sha256, write_whole
from psaq_mm.plain import to_plain
from psaq_mm.progress import track
from psaq_mm.quantization import QuantSpec

__all__ = ['Run', 'Shown', 'Wanted', 'compare', 'plan', 'printer']

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
_SILENT = ('log_interval', 'dropped_hooks', 'teacher')
"""Settings of the loop that change no number; the checkpoint counts by its content."""

_ALWAYS_IN_KEYS = frozenset(
    'type max_iters model_config generator size batch_size calibration_samples pool_size evolve_every evolve_samples '
    'source samples save_samples reobserve augment classes distil block_stride seed'.split()
)
"""Settings that count in the key of a row even at their defaults. All others count where they differ from them, so that
a new setting leaves the keys of earlier rows as they are."""

_ENDLESS = 10**6
"""Steps of a run that its time ends."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The rows of a comparison: every method at every precision on every source with every seed.

    Args:
        samples: Names of sources, or paths of folders of images. ``generated`` is what the method or the config takes
            by itself.
        seeds: One row each.
        quants: Presets; None is the config's own.
        methods: Registered methods; each brings its quantizer, and trains or not. None is what the config has.
        train: Whether the training of the config runs on the samples; else ranges alone are calibrated.
        saved: File or folder of samples that ``generated`` takes instead of making its own.
        options: Settings that are merged into every config.
        seconds: Time of each run, samples included, in place of a number of steps, for those that train.
        label: Name of ``generated`` in rows and curves; the method by default.
    """

    samples: Tuple[str, ...] = ('generated', 'gaussian')
    seeds: Tuple[int, ...] = (0, 1, 2)
    quants: Tuple[Optional[str], ...] = (None,)
    methods: Tuple[Optional[str], ...] = (None,)
    train: bool = False
    saved: Optional[str] = None
    options: Optional[Mapping] = None
    seconds: Optional[float] = None
    label: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class Run:
    """One row to be: a config with quantizer, source and seed set, and a key of all that its numbers depend on."""

    path: str
    config: Any
    method: str
    quant: str
    source: str
    seed: int
    iters: int
    checkpoint: str
    key: str
    full_precision_key: str
    label: str = ''
    bits: str = ''
    by_time: bool = False

    @property
    def name(self) -> str:
        """For the progress line and the run's folder."""
        return f'{Path(self.path).stem} {self.method} {self.quant} {self.source} seed {self.seed}'


@dataclasses.dataclass(frozen=True)
class Shown:
    """What is shown of a comparison beside its table.

    Args:
        points: Evaluations of the student on the way, see :class:`psaq_mm.commands.curves.CurveHook`; 0: none.
        pictures: How many pictures of the test set these evaluations see.
        rows: JSON file that the rows are merged into, see :func:`psaq_mm.commands.sample_rows.merge_rows`. None: none.
    """

    points: int = 0
    pictures: int = 100
    rows: Optional[Path] = None


# ---------------------------------------------------------------------- keys
def _key(settings: Mapping) -> str:
    return hashlib.sha256(json.dumps(to_plain(settings), sort_keys=True).encode()).hexdigest()[:16]


class _Contents:
    """SHA-256 of files and of folders of files, each computed once."""

    def __init__(self) -> None:
        self._known: Dict[str, str] = {}

    def __call__(self, path: str) -> str:
        if '://' in path or not os.path.exists(path):  # OpenMMLab's addresses end with the hash of what they hold
            return path
        if path not in self._known:
            if os.path.isdir(path):
                files = sorted(p for p in Path(path).rglob('*') if p.is_file())
                self._known[path] = _key({str(p.relative_to(path)): file_sha256(p) for p in files})
            else:
                self._known[path] = file_sha256(path)
        return self._known[path]


def _test_settings(config) -> Dict[str, Any]:
    loader = config.test_dataloader
    return dict(
        dataset=loader.dataset,
        batch_size=loader.get('batch_size'),
        collate_fn=loader.get('collate_fn'),
        evaluator=config.test_evaluator,
        test_cfg=config.get('test_cfg'),
        preprocessor=config.get('data_preprocessor'),
    )


def _settings_that_count(loop: Mapping) -> Dict[str, Any]:
    """Settings of the loop in the key of a row, spelled as in the keys of earlier releases.

    Those had a key for the name of a source and another one for everything else that gives samples.
    """
    from psaq_mm.engine.presets import DFQ_DEFAULTS
    from psaq_mm.engine.samples import is_named

    settings = {
        name: value
        for name, value in loop.items()
        if name not in _SILENT and (name in _ALWAYS_IN_KEYS or name not in DFQ_DEFAULTS or value != DFQ_DEFAULTS[name])
    }
    settings.update(source=loop['samples'] if is_named(loop['samples']) else 'generated', samples=None)
    if 'fresh' in settings:
        settings['fresh'] = 1.0
    return settings


def _contents_of(samples: Any, content: Callable[[str], str]) -> Any:
    """``dfq.samples`` in the key of a row: a path by its content, a dict or a list by its settings and its paths'."""
    from psaq_mm.engine.samples import build_source, is_named

    if is_named(samples):
        return None
    if isinstance(samples, str):
        return content(samples)
    return dict(settings=samples, contents=[content(path) for path in build_source(samples).paths])


# ---------------------------------------------------------------------- plan
def _quant_name(config) -> str:
    """Name of the preset, with what a table must not mix: another scope than the backbone, a reduced weight range,
    another target.
    """
    from psaq_mm.engine.config import quant_holder

    quant = quant_holder(config.model).get('quant', 'w8a8')
    spec = QuantSpec.parse(quant)
    preset = quant if isinstance(quant, str) else quant.get('preset')
    notes = ([spec.scope] if spec.scope != 'backbone' else []) + (['7-bit weights'] if spec.w_reduce_range else [])
    notes += [spec.target] if spec.target != 'default' else []
    return (preset or f'w{spec.w_bits}a{spec.a_bits}').lower() + (f' ({", ".join(notes)})' if notes else '')


def _data_free_settings(config, source: str, seed: int, train: bool, wanted: Wanted) -> Dict[str, Any]:
    """A config's ``dfq`` key with the samples of one row."""
    from psaq_mm.engine.presets import preset_name, resolve_dfq
    from psaq_mm.engine.samples import is_named

    dfq = resolve_dfq(config.get('dfq'))
    dfq.update(
        preset=preset_name(config.get('dfq')), seed=seed, checkpoint_interval=0, sheet_interval=0, save_samples=False
    )
    if not train:
        dfq.update(iters=0, evolve_every=0)
    if source != 'generated':
        dfq['samples'] = source if is_named(source) else dict(type='psaq_mm.Folder', path=source)
    elif wanted.saved:
        dfq['samples'] = wanted.saved
    elif is_named(dfq['samples']):  # another control, such as the real images of RepQ-ViT
        dfq['samples'] = source
    if wanted.seconds is not None and dfq['iters']:
        dfq.update(iters=_ENDLESS, max_seconds=wanted.seconds)
    return dfq


def _label(source: str, method: Optional[str], dfq: Mapping, wanted: Wanted) -> str:
    """Name of a row and a curve: the source, and all of the run that method, steps and seconds do not tell."""
    from psaq_mm.engine.presets import resolve_dfq
    from psaq_mm.engine.samples import is_named

    name = source if is_named(source) else Path(source).stem
    if source == 'generated':
        name = wanted.label or method or source
    mixed = f', {dfq["fresh"]:.0%} fresh' if dfq['iters'] and dfq['fresh'] != resolve_dfq(method)['fresh'] else ''
    return name + mixed + (f', {wanted.seconds:g} s' if wanted.seconds is not None and dfq['iters'] else '')


def _check(wanted: Wanted) -> None:
    """Refuse what makes no sense for any config."""
    from psaq_mm.engine.methods import method_of
    from psaq_mm.engine.samples import is_named
    from psaq_mm.pictures import source_names

    for source in wanted.samples:
        if not is_named(source) and not os.path.exists(source):
            raise ConfigError(
                f'--samples {source} is no source of samples, and no such folder exists: '
                f'{nearest(source, source_names())}, or the path of a folder of images'
            )
    trains = wanted.train or any(method and method_of(method).trains for method in wanted.methods)
    if wanted.seconds is not None and not wanted.seconds > 0:
        raise ConfigError(f'--seconds {wanted.seconds:g} must be above 0')
    if wanted.seconds is not None and not trains:
        raise ConfigError(
            f'--seconds {wanted.seconds:g} bounds the training of the student, and nothing is trained: add --train, or '
            'a --method that trains'
        )
    if wanted.saved and 'generated' not in wanted.samples:
        raise ConfigError(
            f'--samples {wanted.saved} serves the source generated alone beside --calibration: add generated to it, or '
            'give all sources to --samples'
        )
    if wanted.saved and not os.path.exists(wanted.saved):
        raise DataError(f'--samples {wanted.saved} does not exist: check the path')


def _check_config(path: str, config, wanted: Wanted) -> None:
    """Refuse a config without a test set, and samples that are pictures of the test set."""
    from psaq_mm.commands.evaluation import check_test_set
    from psaq_mm.engine.data_overlap import check_folder, check_no_overlap

    check_test_set(config)
    if 'real' in wanted.samples:
        if not (config.get('train_dataloader') or {}).get('dataset'):
            raise ConfigError(
                f'--samples real needs train_dataloader.dataset in {path}: name the training set, or leave real out'
            )
        check_no_overlap(config)
    for source in wanted.samples:
        check_folder(config, source)


def _runs_of(path: str, given, wanted: Wanted, content: _Contents) -> Iterator[Run]:
    """Rows of one config."""
    from psaq_mm.engine.config import apply_method, full_precision_model_config, quant_holder, to_data_free

    plain = merge_options(copy.deepcopy(given), wanted.options)
    _check_config(path, plain, wanted)
    for method, quant in itertools.product(wanted.methods, wanted.quants):
        quantized = merge_options(apply_method(given, quant, method), wanted.options)
        spec = QuantSpec.parse(quant_holder(quantized.model).get('quant', 'w8a8'))
        for source, seed in itertools.product(wanted.samples, wanted.seeds):
            config = copy.deepcopy(quantized)
            dfq = config.dfq = _data_free_settings(quantized, source, seed, wanted.train or bool(method), wanted)
            free = to_data_free(config)
            checkpoint = free.train_cfg.teacher['checkpoint']
            test = dict(
                _test_settings(plain), checkpoint=content(checkpoint), model=full_precision_model_config(config.model)
            )
            depends_on = dict(
                test,
                loop=_settings_that_count(free.train_cfg),
                optimizer=free.optim_wrapper,
                samples=_contents_of(free.train_cfg.samples, content),
                training=plain.train_dataloader.dataset if source == 'real' else None,
            )
            quant_name = _quant_name(config)
            yield Run(
                path,
                config,
                method or (dfq['method'] if wanted.train else 'calibration'),
                quant_name,
                source,
                seed,
                free.train_cfg.max_iters,
                checkpoint,
                _key(depends_on),
                _key(test),
                _label(source, method, dfq, wanted),
                bits_of(quant_name, spec.label),
                dfq['max_seconds'] is not None,
            )


def plan(configs: Mapping[str, Any], wanted: Wanted = Wanted()) -> List[Run]:
    """All rows of a comparison, checked before the first of them runs.

    Args:
        configs: Loaded configs by their paths.
        wanted: What is compared.

    Raises:
        ConfigError, SpecError, DataError: A source, method or preset is not known, a checkpoint or test set is not
            there, or real images are asked for where there is no training set or it is the test set.
    """
    _check(wanted)
    content = _Contents()
    runs = [run for path, config in configs.items() for run in _runs_of(path, config, wanted, content)]
    return list({(run.path, run.key): run for run in runs}.values())


# ---------------------------------------------------------------------- one row
def _full_precision(run: Run, work_dir: Path, say: Callable[[str], None], failed: Dict[str, Exception]):
    """Predictions and metrics of full precision: from the work dir, else evaluated, once, and kept there."""
    if run.full_precision_key in failed:
        raise failed[run.full_precision_key]
    try:
        return _full_precision_predictions(run, work_dir, say)
    except Exception as error:
        failed[run.full_precision_key] = error
        raise


def _full_precision_predictions(run: Run, work_dir: Path, say: Callable[[str], None]):
    from psaq_mm.commands.agreement import Predictions, RecordHook
    from psaq_mm.commands.evaluation import evaluate
    from psaq_mm.commands.quiet import ProgressHook, isolated, silence
    from psaq_mm.engine.checkpoint import read_checkpoint

    path = work_dir / f'full_precision_{run.full_precision_key}.npz'
    if path.is_file():
        return Predictions.load(path)
    folder, hook, begun = work_dir / 'runs' / path.stem, RecordHook(), time.perf_counter()
    with silence():
        metrics = evaluate(
            isolated(run.config, folder),
            read_checkpoint(run.checkpoint),
            run.checkpoint,
            full_precision=True,
            hooks=[hook, ProgressHook(say)],
        )
    hook.predictions.metrics = scalars(metrics)
    hook.predictions.save(path)
    shutil.rmtree(folder, ignore_errors=True)
    say(
        f'{Path(run.path).stem} full precision: {_shown(hook.predictions.metrics)}, {time.perf_counter() - begun:.1f} s'
    )
    return hook.predictions


def _samples_used(summary: Mapping) -> int:
    """Samples that ranges were calibrated on and the student has seen."""
    return (
        summary['calibration_samples']
        + max(summary['rounds'] - 1, 0) * summary['evolve_samples']
        + summary['fresh_samples']
    )


def _run(run: Run, truth, folder: Path, say: Callable[[str], None], shown: Shown = Shown()) -> Dict[str, Any]:
    """Quantize, evaluate and compare; the row's numbers."""
    from psaq_mm.commands.agreement import AgreementHook
    from psaq_mm.commands.evaluation import evaluate
    from psaq_mm.commands.quiet import ProgressHook, isolated, silence
    from psaq_mm.engine.checkpoint import read_checkpoint
    from psaq_mm.engine.config import to_data_free
    from psaq_mm.engine.running import data_free_runner

    student, hook, results = folder / 'student.pth', AgreementHook(truth), {}
    with silence():
        begun = time.perf_counter()
        runner = data_free_runner(to_data_free(isolated(run.config, folder)))
        runner.register_hook(ProgressHook(say))
        if shown.points:
            from psaq_mm.commands.curves import CurveHook

            curve = CurveHook(truth, run.config, shown.points, shown.pictures)
            runner.register_hook(curve)
            results['curve'] = curve.curve
        runner.train()
        loop = runner.train_loop
        seconds, samples = time.perf_counter() - begun - loop.clock.paused_seconds, _samples_used(loop.summary())
        results['iters'] = loop.iter
        del runner, loop  # before another model takes its place on the device
        gc.collect()
        metrics = evaluate(
            isolated(run.config, folder), read_checkpoint(student), str(student), hooks=[hook, ProgressHook(say)]
        )
    others = other_metrics(metrics)
    return dict(
        results,
        samples=samples,
        seconds=round(seconds, 2),
        metrics=scalars(metrics),
        **hook.result(),
        **(dict(other_metrics=others) if others else {}),
    )


def _shown(metrics: Mapping[str, Optional[float]]) -> str:
    shown = [f'{k} {metrics[k]:.3f}' if metrics[k] is not None else f'{k} -' for k in principal_metrics(metrics)]
    return ', '.join(shown) or 'no metrics'


def _row_or_error(
    run: Run,
    work_dir: Path,
    keep_students: bool,
    say: Callable[[str], None],
    failed: Dict[str, Exception],
    shown: Shown = Shown(),
) -> Dict[str, Any]:
    row = dict(
        key=run.key,
        config=run.path,
        method=run.method,
        quant=run.quant,
        source=run.source,
        seed=run.seed,
        iters=run.iters,
    )
    folder = work_dir / 'runs' / f'{re.sub("[^A-Za-z0-9.-]+", "_", run.name)}_{run.key[:6]}'
    shutil.rmtree(folder, ignore_errors=True)  # what a run that was stopped left
    try:
        truth = _full_precision(run, work_dir, say, failed)
        row.update(_run(run, truth, folder, say, *([shown] if shown.points else [])), full_precision=truth.metrics)
    except PsaqError as error:
        return dict(row, error=str(error))
    # what the libraries raise is not ours to foresee, and the other rows do not depend on it
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            raise
        missing = missing_from(error)
        if missing:
            return dict(row, error=missing)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'traceback.txt').write_text(traceback.format_exc())
        message = (str(error).splitlines() or [''])[0][:300]
        return dict(row, error=f'{type(error).__name__}: {message}; the whole of it is in {folder / "traceback.txt"}')
    if not keep_students:
        shutil.rmtree(folder, ignore_errors=True)
    return row


def compare(
    runs: Sequence[Run],
    work_dir: str,
    keep_students: bool = False,
    say: Optional[Callable[[str], None]] = None,
    shown: Shown = Shown(),
) -> RowFile:
    """Run all rows that are not there yet; rows and table are in ``compare.json`` and ``compare.md`` of ``work_dir``.

    Args:
        runs: From :func:`plan`.
        work_dir: Holds rows, cached predictions of full precision, and the folder of the run that is going on.
        keep_students: Keep each row's ``student.pth`` and log; those of rows that failed stay in any case.
        say: Called with a line of progress; prints it by default.
        shown: Curves, which go into the rows and ``curves_*.png`` (a row without one is run again), and a file of rows.

    Returns:
        The rows, those of earlier calls among them; ``table`` is that of ``runs``.

    Raises:
        ConfigError: Another process is at work in ``work_dir``.
    """
    folder = Path(work_dir)
    (folder / 'runs').mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        return _compare(runs, folder, keep_students, say or printer(), shown)


def _compare(
    runs: Sequence[Run], folder: Path, keep_students: bool, say: Callable[[str], None], shown: Shown
) -> RowFile:
    file = RowFile(folder / 'compare.json')
    if shown.rows:
        read_rows(shown.rows)  # a file of something else is named before anything runs
    wanted = {run.key: run for run in runs}  # two configs may say the same
    missing = [
        run for key, run in wanted.items() if not file.done(key) or shown.points and not file.rows[key].get('curve')
    ]
    say(f'{len(wanted)} rows, {len(wanted) - len(missing)} of them are there already')
    begun, failed = time.monotonic(), {}
    for number, run in enumerate(track(missing, 'Rows'), 1):
        row = _row_or_error(run, folder, keep_students, say, failed, shown)
        file.add(row)
        _merge(run, row, shown)
        eta = (time.monotonic() - begun) / number * (len(missing) - number)
        outcome = (
            f'failed: {row["error"]}'
            if row.get('error')
            else ', '.join(
                [
                    _shown(row['metrics']),
                    f'agreement {row["agreement"]:.3f}' if row['agreement'] is not None else 'agreement -',
                    f'{row["seconds"]:.1f} s',
                ]
            )
        )
        say(f'[{number}/{len(missing)}] {run.name}: {outcome}; {_duration(eta)} left')
    file.table = summarize(
        [dict(file.rows[run.key], config=run.path, method=run.method, quant=run.quant) for run in runs]
    )
    file.save()
    write_whole(folder / 'compare.md', to_markdown(file.table))
    for run in runs:  # those of earlier calls among them
        _merge(run, file.rows[run.key], shown)
    if shown.points:
        from psaq_mm.commands.curves import draw_curves

        for path in draw_curves(
            [(f'{Path(run.path).stem} {run.bits}', run.label, file.rows[run.key]) for run in runs], folder
        ):
            say(f'drawn: {path}')
    return file


def _merge(run: Run, row: Mapping, shown: Shown) -> None:
    if shown.rows:
        merge_rows(shown.rows, rows_of(Path(run.path).stem, run.bits, run.label, row), run.by_time)


def printer() -> Callable[[str], None]:
    """Prints lines to what is standard output now."""
    console = sys.stdout  # runs are silenced by another standard output
    return lambda line: print(line, file=console, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'
