# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Box and mask AP, mIoU or top-1 of a quantized model: ``psaq test CONFIG STUDENT.pth [--full-precision [FP]]``; of an
exported one: ``psaq test CONFIG --deployed DIR``.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from psaq_mm.commands.common import (
    add_config_arguments,
    add_quant_arguments,
    add_run_arguments,
    run_command,
    runnable_config,
)
from psaq_mm.commands.evaluation_options import EvaluationOptions
from psaq_mm.commands.listing import RUNTIME_NAMES
from psaq_mm.commands.metrics import RESULTS, before_after_table
from psaq_mm.commands.parsing import make_parser
from psaq_mm.errors import CheckpointError, ConfigError, DataError
from psaq_mm.files import file_sha256, write_whole
from psaq_mm.plain import to_plain

__all__ = ['build_parser', 'main']


def _teacher_of(checkpoint: Mapping, given: Optional[str], path: str) -> str:
    if given:
        return given
    teacher = (checkpoint['meta'].get('psaq_mm') or {}).get('teacher') or {}
    where = teacher.get('checkpoint')
    if not where or not os.path.isfile(where):
        raise CheckpointError(f'{path} was made from {where}, which is not there: give it as --full-precision PATH')
    if teacher.get('sha256') and file_sha256(where) != teacher['sha256']:
        raise CheckpointError(
            f'{where} has changed since {path} was made from it: give the right one as --full-precision PATH'
        )
    return where


def _test_deployed(config, args) -> None:
    """Metrics of an exported model, beside those of the fake-quantized one where its checkpoint is given too."""
    from psaq_mm.commands.evaluation import evaluate
    from psaq_mm.deploy import load
    from psaq_mm.engine.checkpoint import read_checkpoint
    from psaq_mm.engine.students import config_of_student
    from psaq_mm.ranks import ranks
    from psaq_mm.runtime.kernels import EXPLAINED

    if args.full_precision is not None:
        raise ConfigError('--deployed and --full-precision do not go together: evaluate one after the other')
    label = f'{load(args.deployed, args.runtime).manifest["label"]} {args.runtime}'  # before the test set is opened
    results: Dict[str, Any] = dict(
        deployed=args.deployed, runtime=args.runtime, checkpoint=args.checkpoint, quantized=None, integer=None
    )
    failed: List[str] = []
    wanted = _options(args, *(['quantized'] if args.checkpoint else []), 'integer')
    if args.checkpoint:
        checkpoint = read_checkpoint(args.checkpoint)
        student = config_of_student(config, checkpoint, args.checkpoint, args.quant, args.method, args.cfg_options)
        results['quantized'] = evaluate(
            student, checkpoint, args.checkpoint, failed=failed, options=wanted['quantized']
        )
        _save(config, results)
    ran = _kernels_hook()
    results['integer'] = evaluate(
        config,
        None,
        args.deployed,
        hooks=[ran],
        runtime=args.runtime,
        threads=args.threads,
        failed=failed,
        options=wanted['integer'],
    )
    results['kernels'] = list(ran.kernels)
    if not ranks()[0]:
        print(''.join(f'{args.runtime} ran it with {EXPLAINED[kernels]}\n' for kernels in ran.kernels), end='')
    _show(config, results, failed, wanted, results['quantized'], results['integer'], label, 'fake-quantized')


def _kernels_hook():
    """A hook that has, after a test, the ``kernels`` that an exported model was run with."""
    from mmengine.hooks import Hook

    from psaq_mm.deploy.serving import DeployedBackbone

    class KernelsHook(Hook):
        kernels: Sequence[str] = ()

        def after_test(self, runner) -> None:
            models = [m.deployed for m in runner.model.modules() if isinstance(m, DeployedBackbone)]
            self.kernels = sorted({kernels for model in models for kernels in model.kernels})

    return KernelsHook()


def _save(config, results: Mapping) -> Path:
    """Write the results so far: what comes next may fail after hours. Returns the path."""
    from psaq_mm.ranks import ranks

    out = Path(config.work_dir) / RESULTS
    if not ranks()[0]:  # all have the same metrics
        write_whole(out, json.dumps(to_plain(results, nan=False), indent=2, allow_nan=False))
    return out


def _show(config, results: Mapping, failed: Sequence[str], wanted: Mapping[str, EvaluationOptions], *columns) -> None:
    """Save results, and print the table. With several ranks the first one does it: all have the same metrics.

    Raises:
        DataError: An evaluator failed; what the others gave has been saved and printed.
    """
    from psaq_mm.ranks import ranks

    try:
        out = _save(config, results)
    finally:  # where the disk is full, the table is all there is
        if not ranks()[0]:
            print(before_after_table(*columns), flush=True)
    if not ranks()[0]:
        told = [line for options in wanted.values() for line in options.told()]
        print('\n'.join([*told, f'saved to {out}']), flush=True)
    if failed:
        raise DataError('; '.join(dict.fromkeys(failed)))


def _options(args, *models: str) -> Dict[str, EvaluationOptions]:
    """The options for each model that is evaluated; of several, each one has files of its own."""
    options = EvaluationOptions(args.show_dir, args.show, args.wait_time, args.out, args.tta)
    return {name: options.part(name) if len(models) > 1 else options for name in models}


def _command(args) -> None:
    _options(args, 'any')['any'].check()
    config = runnable_config(args)
    if args.deployed:
        _test_deployed(config, args)
    elif args.checkpoint:
        _test_checkpoint(config, args)
    else:
        raise CheckpointError(
            'there is no checkpoint to evaluate: give student.pth after the config, or --deployed DIR'
        )


def _test_checkpoint(config, args) -> None:
    """Metrics of a student, and of full precision where that is asked for."""
    from psaq_mm.commands.evaluation import evaluate
    from psaq_mm.engine.checkpoint import is_quantized, read_checkpoint
    from psaq_mm.engine.students import config_of_student

    checkpoint = read_checkpoint(args.checkpoint)
    config = config_of_student(config, checkpoint, args.checkpoint, args.quant, args.method, args.cfg_options)
    results: Dict[str, Any] = dict(checkpoint=args.checkpoint, full_precision=None, quantized=None)
    failed: List[str] = []
    before = args.full_precision is not None
    models = ['full_precision'] * before + ['quantized'] * is_quantized(checkpoint)
    wanted = _options(args, *models)
    if before:
        path = args.checkpoint
        if is_quantized(checkpoint):
            path = _teacher_of(checkpoint, args.full_precision, path)
        results['full_precision'] = evaluate(
            config,
            read_checkpoint(path),
            path,
            full_precision=True,
            failed=failed,
            options=wanted['full_precision'],
        )
        _save(config, results)
    elif not is_quantized(checkpoint):
        raise CheckpointError(
            f'{args.checkpoint} is a full-precision checkpoint: quantize it with psaq quantize first, '
            'or evaluate it as it is with --full-precision'
        )
    if is_quantized(checkpoint):
        results['quantized'] = evaluate(config, checkpoint, args.checkpoint, failed=failed, options=wanted['quantized'])
    label = (checkpoint['meta'].get('psaq_mm') or {}).get('label', 'quantized')
    _show(config, results, failed, wanted, results['full_precision'], results['quantized'], label)


def build_parser(prog: str = 'psaq-test') -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = make_parser(
        prog,
        'CONFIG [STUDENT.pth] [--full-precision [FP.pth]] [options]',
        'Evaluate a student, a full-precision model or an exported model on the test set of a config, with the '
        'evaluator of the config: box and mask AP, mIoU, top-1. A table is printed; all metrics are written to '
        f'{RESULTS} in the work dir.',
        [
            'CONFIG work_dirs/CONFIG/student.pth --full-precision',
            'CONFIG work_dirs/CONFIG/student.pth --show-dir shown --tta',
            'CONFIG --deployed deployed --out predictions.pkl',
        ],
    )
    model = add_config_arguments(parser)
    model.add_argument(
        'checkpoint',
        nargs='?',
        metavar='STUDENT.pth',
        help='the student; a full-precision checkpoint with --full-precision; not needed with --deployed',
    )
    model.add_argument(
        '--full-precision',
        nargs='?',
        const='',
        metavar='FP.pth',
        help='evaluate the full-precision model too, before and after (default of FP.pth: the one that the student was '
        'made from)',
    )
    add_quant_arguments(parser)
    exported = parser.add_argument_group('exported model')
    exported.add_argument('--deployed', metavar='DIR', help='evaluate the integer model that psaq export wrote there')
    exported.add_argument(
        '--runtime', default='openvino', metavar='NAME', help=f'one of {", ".join(RUNTIME_NAMES)} (default: openvino)'
    )
    exported.add_argument('--threads', type=int, metavar='N', help="of the runtime (default: the runtime's own choice)")
    shown = parser.add_argument_group('predictions')
    shown.add_argument(
        '--show-dir',
        metavar='FOLDER',
        help='draw the predictions of the whole test set onto its pictures, into this folder',
    )
    shown.add_argument('--show', action='store_true', help='show them in a window, one after the other')
    shown.add_argument(
        '--wait-time', type=float, default=2, metavar='S', help='seconds of --show for a picture (default: 2)'
    )
    shown.add_argument(
        '--out',
        metavar='PATH',
        help='write the predictions: of a detector or classifier to a pickle (PATH ends with .pkl), as mmdet and '
        'mmpretrain do; of a segmentor as label maps (PNG) into a folder, as mmseg does',
    )
    shown.add_argument(
        '--tta',
        action='store_true',
        help='test-time augmentation: tta_model and tta_pipeline of CONFIG; without them a detector or classifier sees '
        'each picture flipped, too',
    )
    add_run_arguments(parser)
    return parser


def main(argv: Optional[Sequence[str]] = None, prog: str = 'psaq-test') -> int:
    """Command line; returns the exit status."""
    return run_command(_command, build_parser(prog), argv)


if __name__ == '__main__':
    raise SystemExit(main())
