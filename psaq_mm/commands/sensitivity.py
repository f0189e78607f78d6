# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which layers suffer most from being quantized: ``psaq sensitivity CONFIG FP.pth [--budget BITS] [--metric]``."""

import argparse
import copy
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from psaq_mm.commands.common import (
    add_config_arguments,
    add_device_argument,
    add_quant_arguments,
    load_config,
    run_command,
)
from psaq_mm.commands.listing import SOURCE_NAMES
from psaq_mm.commands.metrics import scalars
from psaq_mm.commands.parsing import make_parser
from psaq_mm.errors import CheckpointError, ConfigError
from psaq_mm.files import write_whole
from psaq_mm.plain import to_plain

__all__ = ['build_parser', 'main', 'analyse']

SHOWN = 15


def _samples(config, task, number: int, samples: str, seed: int):
    """Normalized samples, (number, C, H, W), on the CPU."""
    from psaq_mm.engine.config import sample_size
    from psaq_mm.engine.presets import resolve_dfq
    from psaq_mm.engine.samples import Saved, samples_of
    from psaq_mm.pictures import SampleStream

    size = tuple(resolve_dfq(config.get('dfq'))['size'] or task.fixed_size or sample_size(config))
    if task.fixed_size is not None and size != tuple(task.fixed_size):
        raise ConfigError(
            f'dfq.size={size} does not fit the position embedding of the model: set dfq.size={tuple(task.fixed_size)}'
        )
    if min(size) < task.min_size:
        raise ConfigError(
            f'dfq.size={size} is smaller than one attention window of {task.min_size} pixels: give a larger size'
        )
    source = samples_of(samples, task.model, config, seed)
    if isinstance(source, Saved):
        return source.read(size, task.image_spec).samples[:number]
    return SampleStream(source, size, task.image_spec, seed).take(number)


def _build(config, model_config: Mapping, checkpoint: Mapping, source: str):
    """The quantized model with full-precision weights, not calibrated yet, in eval mode."""
    from mmengine.device import get_device

    from psaq_mm.engine.building import build_model
    from psaq_mm.engine.checkpoint import load_weights
    from psaq_mm.engine.device import leave_device_without_float64
    from psaq_mm.engine.inputs import check_preprocessor, set_input_
    from psaq_mm.engine.presets import resolve_dfq

    check_preprocessor(config)
    model = build_model(config, model_config)
    load_weights(model, checkpoint, source)
    set_input_(model, config, resolve_dfq(config.get('dfq'))['value_range'])
    model.eval()  # None in the libraries' backbones
    model.to(get_device())
    leave_device_without_float64(model)
    return model


def _calibrated(model, batches: Sequence) -> None:
    from psaq_mm.models import TaskModel, spec_of
    from psaq_mm.quantization import calibrate

    task, scope = TaskModel(model), spec_of(model).scope

    def run() -> None:
        for batch in batches:
            task.calibration_forward(batch, scope)

    calibrate(model, run)


def _only_hook(names: Optional[Sequence[str]]):
    """A hook that quantizes the layers of these names alone during a test run; None quantizes all."""
    from mmengine.hooks import Hook

    from psaq_mm.models.sensitivity import layer_quantizers

    class OnlyHook(Hook):
        def before_test(self, runner) -> None:
            for name, kinds in layer_quantizers(getattr(runner.model, 'module', runner.model)).items():
                for quantizer in kinds['weights'] + kinds['activations']:
                    quantizer.mode = 'on' if names is None or name in names else 'off'

    return OnlyHook()


def _metrics(config, model, work_dir: Path, names: Optional[Sequence[str]]) -> Dict[str, Optional[float]]:
    from psaq_mm.commands.evaluation import evaluate
    from psaq_mm.commands.quiet import ProgressHook, isolated, silence

    content = dict(state_dict={key: value.cpu() for key, value in model.state_dict().items()}, meta={})
    quiet = isolated(config, str(work_dir / 'evaluation'))
    with silence():
        return scalars(evaluate(quiet, content, 'the calibrated model', hooks=[_only_hook(names), ProgressHook(print)]))


def _mixed_precision(
    config, content: Mapping, checkpoint: str, spec, choice, batches: Sequence
) -> Tuple[Dict[str, Any], float]:
    """Settings under ``quant`` with a choice's overrides, and the error of the outputs under them, all layers
    quantized.
    """
    from psaq_mm.engine.config import quant_holder
    from psaq_mm.models.sensitivity import mean_error, only_quantized, outputs_to_compare, with_overrides
    from psaq_mm.quantization import quantizers

    settings = with_overrides(spec, choice)
    model_config = copy.deepcopy(config.model)
    quant_holder(model_config)['quant'] = settings
    model = _build(config, model_config, content, checkpoint)
    _calibrated(model, batches)
    with only_quantized(model, ()):
        run = outputs_to_compare(model, batches)
        reference = run()
    with only_quantized(model, [q for _, q in quantizers(model)]):
        return settings, mean_error(run(), reference)


def analyse(
    config,
    checkpoint: str,
    *,
    number: int = 8,
    samples: str = 'pink',
    batch_size: int = 1,
    seed: int = 0,
    budgets: Optional[Mapping[str, float]] = None,
    metric: int = 0,
    work_dir: Optional[Path] = None,
    say=print,
) -> Tuple[Dict[str, Any], Optional[Dict[str, Any]]]:
    """Rank the layers of a quantized config.

    Args:
        config: Loaded; its ``model`` is quantized.
        checkpoint: Full-precision weights, a file or URL.
        number: Samples.
        samples: Name of a source (:func:`psaq_mm.pictures.source_names`), or the path of a ``samples.pt`` or of a
            folder of pictures.
        batch_size: Samples a forward pass.
        seed: Of the samples.
        budgets: See :func:`psaq_mm.models.sensitivity.choose_bits`; None chooses nothing.
        metric: How many of the most sensitive layers to evaluate on the config's test set, each quantized alone; 0
            opens no dataset.
        work_dir: Where test runs keep their logs.
        say: Called with a line of progress.

    Returns:
        What ``sensitivity.json`` holds, and the settings under ``quant`` of the mixed-precision config, None without a
        budget.

    Raises:
        CheckpointError: It cannot be read, does not fit, or is quantized already.
        ConfigError: A source, size or budget makes no sense.
    """
    from psaq_mm.commands.evaluation import check_test_set
    from psaq_mm.engine.checkpoint import is_quantized, read_checkpoint
    from psaq_mm.engine.config import quantized_model_config
    from psaq_mm.models import TaskModel, spec_of
    from psaq_mm.models.sensitivity import choose_bits, measure_layers

    if number < 1 or batch_size < 1:
        raise ConfigError(f'--number {number} and --batch-size {batch_size} must be at least 1')
    config.model = quantized_model_config(config)
    if metric:
        check_test_set(config)
    content = read_checkpoint(checkpoint)
    if is_quantized(content):
        raise CheckpointError(f'{checkpoint} is quantized: give the full-precision checkpoint that it was made from')
    model = _build(config, config.model, content, checkpoint)
    device = next(model.parameters()).device
    batches = [part.to(device) for part in _samples(config, TaskModel(model), number, samples, seed).split(batch_size)]
    _calibrated(model, batches)

    def progress(done: int, count: int, row) -> None:
        say(f'[{done:>3}/{count}] {row.error:.5f}  {row.name}')

    budgets, spec, settings = dict(budgets or {}), spec_of(model), None
    rows, all_layers = measure_layers(model, batches, tuple(budgets), progress)
    report: Dict[str, Any] = dict(
        config=str(config.filename),
        checkpoint=str(checkpoint),
        quant=spec.to_dict(),
        source=samples,
        samples=sum(len(batch) for batch in batches),
        size=list(batches[0].shape[-2:]),
        seed=seed,
        error=all_layers,
    )
    if budgets:
        choice = choose_bits(rows, budgets)
        settings, error = _mixed_precision(config, content, checkpoint, spec, choice, batches)
        report['mixed_precision'] = dict(
            budgets=budgets,
            average={k: list(v) for k, v in choice.average.items()},
            overrides=[o.to_dict() for o in choice.overrides],
            error=error,
        )
    if metric:
        folder = Path(work_dir or 'work_dirs/sensitivity')
        _keep(report, rows, folder)
        report['metrics'] = dict(
            full_precision=_metrics(config, model, folder, ()), quantized=_metrics(config, model, folder, None)
        )
        for row in rows[:metric]:
            row.metrics = _metrics(config, model, folder, (row.name,))
            _keep(report, rows, folder)
            say(f'evaluated with {row.name} quantized alone')
    return dict(report, layers=_layers(rows)), settings


def _layers(rows: Sequence) -> List[Dict[str, Any]]:
    return [dict(rank=rank, **dataclasses.asdict(row)) for rank, row in enumerate(rows, 1)]


def _keep(report: Mapping, rows: Sequence, folder: Path) -> None:
    """Write what is known so far: a test run that fails after hours takes nothing with it."""
    _write_report(dict(report, layers=_layers(rows)), folder)


def _write_report(report: Mapping, folder: Path) -> None:
    write_whole(Path(folder) / 'sensitivity.json', json.dumps(to_plain(report, nan=False), indent=2, allow_nan=False))


def build_parser(prog: str = 'psaq-sensitivity') -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = make_parser(
        prog,
        'CONFIG FP.pth [options]',
        'Rank the layers of a model by the error that quantizing each one alone makes in the output. With a budget, '
        'choose the layers that get 8 bits, and write a config of it. No data set is opened without --metric.',
        [
            'mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py fp.pth --quant w4a8',
            'mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py fp.pth \\\n      --quant w4a8 --budget 5',
        ],
    )
    model = add_config_arguments(parser)
    model.add_argument('checkpoint', metavar='FP.pth', help='full-precision weights, a file or a URL')
    add_quant_arguments(parser)
    choice = parser.add_argument_group('what is measured')
    choice.add_argument(
        '--budget',
        type=float,
        metavar='BITS',
        help='average bits of the weights: layers get 8 bits within it (default: none are chosen)',
    )
    choice.add_argument(
        '--activation-budget', type=float, metavar='BITS', help='the same for activations (default: none are chosen)'
    )
    choice.add_argument(
        '--metric',
        nargs='?',
        type=int,
        const=10,
        default=0,
        metavar='LAYERS',
        help='evaluate the most sensitive layers on the test set of CONFIG, each quantized alone; 10 if no number '
        'follows (default: no test set is opened)',
    )
    samples = parser.add_argument_group('samples')
    samples.add_argument('--number', type=int, default=8, metavar='N', help='how many samples (default: %(default)s)')
    samples.add_argument(
        '--samples',
        metavar='SOURCE',
        help=f'where they come from: one of {", ".join(SOURCE_NAMES)}, or the path of a samples.pt or of a folder of '
        'pictures (default: pink, which is 1/f noise)',
    )
    samples.add_argument('--source', default='pink', help=argparse.SUPPRESS)  # its earlier name
    samples.add_argument(
        '--batch-size', type=int, default=1, metavar='N', help='samples of a forward pass (default: %(default)s)'
    )
    samples.add_argument('--seed', type=int, default=0, metavar='N', help='of the samples (default: %(default)s)')
    run = parser.add_argument_group('run')
    run.add_argument(
        '--work-dir',
        metavar='FOLDER',
        help='where the results go (default: work_dirs/ and the name of the config with _sensitivity)',
    )
    add_device_argument(run)
    return parser


def main(argv: Optional[Sequence[str]] = None, prog: str = 'psaq-sensitivity') -> int:
    """Command line; returns the exit status."""

    def command(args) -> None:
        from psaq_mm.commands.sensitivity_report import mixed_precision_config, sensitivity_page, to_text

        config = load_config(args.config, args.cfg_options, args.quant, args.method)
        folder = Path(args.work_dir or os.path.join('work_dirs', f'{Path(args.config).stem}_sensitivity'))
        asked = dict(weights=args.budget, activations=args.activation_budget)
        budgets = {kind: value for kind, value in asked.items() if value is not None}
        report, settings = analyse(
            config,
            args.checkpoint,
            number=args.number,
            samples=args.samples or args.source,
            batch_size=args.batch_size,
            seed=args.seed,
            budgets=budgets,
            metric=max(0, args.metric),
            work_dir=folder,
        )
        folder.mkdir(parents=True, exist_ok=True)
        files: List[str] = ['sensitivity.json', 'sensitivity.html']
        _write_report(report, folder)
        write_whole(folder / files[1], sensitivity_page(report))
        if settings is not None:
            files.append('mixed_precision.py')
            write_whole(folder / files[2], mixed_precision_config(args.config, config, settings, report, folder))
        print('\n' + to_text(report, SHOWN))
        print(f'saved to {folder}: {", ".join(files)}')

    return run_command(command, build_parser(prog), argv)


if __name__ == '__main__':
    raise SystemExit(main())
