# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Box and mask AP, mIoU or top-1 of a quantized model: ``tools/test.py CONFIG CKPT [--full-precision [FP]]``; of an
exported one: ``tools/test.py CONFIG --deployed DIR``.
"""

import argparse
import copy
import functools
import json
import os
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from psaq_mm.commands.common import (
    add_config_arguments,
    add_quant_arguments,
    add_run_arguments,
    run_command,
    runnable_config,
)
from psaq_mm.commands.metrics import RESULTS, before_after_table, plain_metrics
from psaq_mm.engine.data_overlap import dataset_leaves
from psaq_mm.errors import CheckpointError, ConfigError, DataError, PsaqError
from psaq_mm.files import file_sha256, write_whole
from psaq_mm.plain import to_plain
from psaq_mm.ranks import ranks
from psaq_mm.runtime import RUNTIMES

__all__ = ['main', 'evaluate', 'check_spec', 'check_test_set', 'before_after_table']


def _missing_file(config) -> Optional[str]:
    """The annotation file or image folder of the test set that is not there."""
    for dataset in dataset_leaves(config.test_dataloader.dataset):
        root, prefix = dataset.get('data_root') or '', dataset.get('data_prefix') or {}
        wanted = [dataset.get('ann_file'), *(prefix.values() if isinstance(prefix, Mapping) else [prefix])]
        for name in wanted:
            path = os.path.join(root, name) if isinstance(name, str) and name else None
            if path and '://' not in path and not os.path.exists(path):
                return path
    return None


def check_test_set(config) -> None:
    """Whether a config has a test set, and its files are there.

    Raises:
        ConfigError: The config has no test set.
        DataError: Its images or annotations are not there.
    """
    if not config.get('test_dataloader') or not config.get('test_evaluator'):
        raise ConfigError(
            f'the config {config.filename} has no test set: set test_dataloader, test_cfg and test_evaluator'
        )
    if not isinstance(config.test_dataloader, Mapping) or not config.test_dataloader.get('dataset'):
        raise ConfigError(
            f'test_dataloader of the config {config.filename} is no single loader with a dataset: give one, or several '
            'sets as the datasets of a ConcatDataset'
        )
    absent = _missing_file(config)
    if absent:
        raise DataError(
            f'the test set is not there: {absent} does not exist; check data_root, or override '
            'test_dataloader.dataset.ann_file'
        )


def evaluate(
    config,
    checkpoint: Optional[Mapping],
    source: str,
    full_precision: bool = False,
    hooks: Sequence = (),
    runtime: Optional[str] = None,
    threads: Optional[int] = None,
    failed: Optional[List[str]] = None,
) -> Dict[str, Any]:
    """Metrics of a model on its config's test set.

    Args:
        config: A loaded config of a quantized model.
        checkpoint: As read by :func:`psaq_mm.engine.checkpoint.read_checkpoint`; None for an exported model.
        source: The checkpoint's path, for messages; an exported model's directory with ``runtime``.
        full_precision: Evaluate the library's own model type instead, with no quantizer in it.
        hooks: MMEngine hooks that see the run, such as :class:`psaq_mm.commands.agreement.RecordHook`.
        runtime: Evaluate the exported model at ``source`` in this runtime, one of :data:`psaq_mm.runtime.RUNTIMES`.
        threads: Of the runtime.
        failed: Takes a sentence for each evaluator that fails at the end, so that the metrics of the others are not
            lost. Defaults to None: the first failure is an error.

    Returns:
        The evaluator's metrics under its own keys, such as ``coco/bbox_mAP`` and ``mIoU``: floats, NaN where there is
        nothing to score; lists, matrices and strings where the evaluator gives such
        (:func:`psaq_mm.commands.metrics.scalars` takes the numbers).

    Raises:
        ConfigError: The config has no test set.
        DataError: Its images or annotations are not there, it is empty, or it does not fit its evaluator.
        CheckpointError: The checkpoint does not fit, or is quantized under another spec.
    """
    from mmengine.runner import Runner

    from psaq_mm.deploy.serving import deploy_model_
    from psaq_mm.engine.building import set_scope
    from psaq_mm.engine.checkpoint import load_weights
    from psaq_mm.engine.config import drop_pretrained, full_precision_model_config
    from psaq_mm.engine.pure_python import with_named_types

    config = copy.deepcopy(with_named_types(config))
    check_test_set(config)
    config.load_from, config.resume = None, False
    for key in ('train_cfg', 'train_dataloader', 'optim_wrapper', 'val_cfg', 'val_dataloader', 'val_evaluator'):
        config[key] = None
    config.param_scheduler = None
    config.pop('auto_scale_lr', None)
    if full_precision:
        config.model = full_precision_model_config(config.model)
    drop_pretrained(config.model)
    set_scope(config)
    runner = Runner.from_cfg(config)
    model = getattr(runner.model, 'module', runner.model)
    if runtime is not None:
        deploy_model_(model, source, runtime, threads)
    else:
        if not full_precision:
            check_spec(model, checkpoint, source)
        load_weights(model, checkpoint, source)
    for hook in hooks:
        runner.register_hook(hook)
    return _tested(runner, failed)


def _tested(runner, failed: Optional[List[str]]) -> Dict[str, Any]:
    """Metrics of a runner's test; see :func:`evaluate`."""
    failures: List[str] = []
    _guard_evaluator(_test_loop(runner), failures)
    try:
        metrics = plain_metrics(runner.test())
    except Exception as error:  # a pipeline's own code may raise anything
        if isinstance(error, PsaqError) or not _while_loading(error):
            raise
        raise DataError(
            f'a picture of the test set cannot be loaded ({_reason(error)}): check its files and '
            'test_dataloader.dataset.pipeline'
        ) from error
    if failures and failed is None:
        raise DataError(failures[0])
    if failed is not None:
        failed.extend(failures)
    return metrics


_CODE_ERRORS = (LookupError, ValueError, TypeError, AttributeError, AssertionError, RuntimeError)
_IN_WORKER = 'in DataLoader worker process'


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    if lines and _IN_WORKER in lines[0]:  # the whole traceback follows
        return lines[-1]
    return f'{type(error).__name__}: {lines[0]}' if lines else type(error).__name__


def _while_loading(error: BaseException) -> bool:
    """Whether an error comes out of a data set and its pipeline, in this process or a worker."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return _IN_WORKER in str(error) or any(name.endswith(os.path.join('_utils', 'fetch.py')) for name in files)


def _test_loop(runner):
    """The test loop, built with its data set and evaluator."""
    try:
        loop = runner.test_loop
        count = len(loop.dataloader.dataset)
    except PsaqError:
        raise
    except (*_CODE_ERRORS, ImportError, OSError) as error:
        if 'need at least one array' not in str(error):  # how MMEngine's dataset ends without a picture
            raise DataError(
                f'the test set or its evaluator cannot be built ({_reason(error)}): check test_dataloader and '
                'test_evaluator'
            ) from error
        count = 0
    if not count:
        raise DataError('the test set is empty: check its annotation file, data_prefix, indices and filter_cfg')
    return loop


def _guard_evaluator(loop, failures: List[str]) -> None:
    """Keep the metrics of the others where one of several evaluators fails, or two give metrics of one name.

    With several ranks a failure still ends the test, because the ranks wait for each other in the evaluators.

    Args:
        loop: The runner's test loop.
        failures: Takes a sentence for each evaluator that fails.
    """
    from mmengine.evaluator import Evaluator

    evaluator, seen = getattr(loop, 'evaluator', None), {}  # type: Any, Dict[str, Any]
    one_rank = ranks()[1] == 1
    plain = getattr(type(evaluator), 'evaluate', None) is Evaluator.evaluate  # a subclass may rename metrics itself
    for number, metric in enumerate(getattr(evaluator, 'metrics', None) or ()):
        name = type(metric).__name__
        metric.process = functools.partial(_process, metric.process, name)
        if one_rank and hasattr(metric, 'compute_metrics'):
            metric.compute_metrics = functools.partial(_compute, metric.compute_metrics, name, failures)
        if one_rank and plain:
            metric.evaluate = functools.partial(_renamed, metric.evaluate, f'{name} {number + 1}', seen)


def _process(process: Callable, name: str, *args, **kwargs) -> None:
    try:
        process(*args, **kwargs)
    except PsaqError:
        raise
    except _CODE_ERRORS as error:
        raise DataError(
            f'the evaluator {name} cannot score what the test set and the model give ({_reason(error)}): the test set '
            'needs the annotations that it asks for, and the classes of the model'
        ) from error


def _compute(compute: Callable, name: str, failures: List[str], *args, **kwargs) -> Dict[str, Any]:
    try:
        return compute(*args, **kwargs) or {}
    except Exception as error:  # whatever a metric's own code raises, after all pictures have been seen
        failures.append(
            f'the evaluator {name} failed at the end of the evaluation ({_reason(error)}): check its '
            'settings under test_evaluator, and the annotations'
        )
        return {}


def _renamed(evaluate_metric: Callable, name: str, seen: Dict[str, Any], *args, **kwargs) -> Dict[str, Any]:
    metrics = evaluate_metric(*args, **kwargs)
    renamed = {f'{key} ({name})' if key in seen else key: value for key, value in metrics.items()}
    seen.update(renamed)
    return renamed


def check_spec(model, checkpoint: Mapping, source: str) -> None:
    """Compare the spec that a student was quantized under with that of a model.

    Args:
        model: A quantized model.
        checkpoint: As read by :func:`psaq_mm.engine.checkpoint.read_checkpoint`; one without a spec passes.
        source: Its path, for the message.

    Raises:
        CheckpointError: They differ; the message names the settings.
    """
    from psaq_mm.engine.students import spec_in
    from psaq_mm.models import spec_of

    spec = spec_in(checkpoint)
    if spec is None:
        return
    trained, wanted = spec.to_dict(), spec_of(model).to_dict()
    differences = [f'{k}={trained[k]!r}, the config {wanted[k]!r}' for k in wanted if trained[k] != wanted[k]]
    if differences:
        raise CheckpointError(
            f'{source} was quantized under another spec ({"; ".join(differences[:3])}): use the config it was made '
            'with, or set these under its quant'
        )


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
    from psaq_mm.deploy import load
    from psaq_mm.engine.checkpoint import read_checkpoint
    from psaq_mm.engine.students import config_of_student
    from psaq_mm.runtime.kernels import EXPLAINED

    if args.full_precision is not None:
        raise ConfigError('--deployed and --full-precision do not go together: evaluate one after the other')
    label = f'{load(args.deployed, args.runtime).manifest["label"]} {args.runtime}'  # before the test set is opened
    results: Dict[str, Any] = dict(
        deployed=args.deployed, runtime=args.runtime, checkpoint=args.checkpoint, quantized=None, integer=None
    )
    failed: List[str] = []
    if args.checkpoint:
        checkpoint = read_checkpoint(args.checkpoint)
        student = config_of_student(config, checkpoint, args.checkpoint, args.quant, args.method, args.cfg_options)
        results['quantized'] = evaluate(student, checkpoint, args.checkpoint, failed=failed)
        _save(config, results)
    ran = _kernels_hook()
    results['integer'] = evaluate(
        config, None, args.deployed, hooks=[ran], runtime=args.runtime, threads=args.threads, failed=failed
    )
    results['kernels'] = list(ran.kernels)
    if not ranks()[0]:
        print(''.join(f'{args.runtime} ran it with {EXPLAINED[kernels]}\n' for kernels in ran.kernels), end='')
    _show(config, results, failed, results['quantized'], results['integer'], label, 'fake-quantized')


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
    out = Path(config.work_dir) / RESULTS
    if not ranks()[0]:  # all have the same metrics
        write_whole(out, json.dumps(to_plain(results, nan=False), indent=2, allow_nan=False))
    return out


def _show(config, results: Mapping, failed: Sequence[str], *columns) -> None:
    """Save results, and print the table. With several ranks the first one does it: all have the same metrics.

    Raises:
        DataError: An evaluator failed; what the others gave has been saved and printed.
    """
    try:
        out = _save(config, results)
    finally:  # where the disk is full, the table is all there is
        if not ranks()[0]:
            print(before_after_table(*columns), flush=True)
    if not ranks()[0]:
        print(f'saved to {out}', flush=True)
    if failed:
        raise DataError('; '.join(dict.fromkeys(failed)))


def _command(args) -> None:
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
    from psaq_mm.engine.checkpoint import is_quantized, read_checkpoint
    from psaq_mm.engine.students import config_of_student

    checkpoint = read_checkpoint(args.checkpoint)
    config = config_of_student(config, checkpoint, args.checkpoint, args.quant, args.method, args.cfg_options)
    results: Dict[str, Any] = dict(checkpoint=args.checkpoint, full_precision=None, quantized=None)
    failed: List[str] = []
    if args.full_precision is not None:
        path = args.checkpoint
        if is_quantized(checkpoint):
            path = _teacher_of(checkpoint, args.full_precision, path)
        results['full_precision'] = evaluate(config, read_checkpoint(path), path, full_precision=True, failed=failed)
        _save(config, results)
    elif not is_quantized(checkpoint):
        raise CheckpointError(
            f'{args.checkpoint} is a full-precision checkpoint: quantize it with tools/dfq_train.py '
            'first, or evaluate it as it is with --full-precision'
        )
    if is_quantized(checkpoint):
        results['quantized'] = evaluate(config, checkpoint, args.checkpoint, failed=failed)
    label = (checkpoint['meta'].get('psaq_mm') or {}).get('label', 'quantized')
    _show(config, results, failed, results['full_precision'], results['quantized'], label)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog='psaq-test', description=__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help='student.pth, or a full-precision checkpoint with --full-precision; not needed with --deployed',
    )
    parser.add_argument(
        '--full-precision',
        nargs='?',
        const='',
        metavar='FP',
        help='evaluate the full-precision model too (before and after); FP defaults to the one the student '
        'was made from',
    )
    parser.add_argument('--deployed', metavar='DIR', help='evaluate the integer model that tools/export.py wrote')
    parser.add_argument(
        '--runtime',
        default='openvino',
        metavar='NAME',
        help=f'of --deployed: {", ".join(RUNTIMES)} (default: openvino)',
    )
    parser.add_argument('--threads', type=int, help='of the runtime; defaults to its own choice')
    add_quant_arguments(parser)
    add_run_arguments(parser)

    return run_command(_command, parser, argv)


if __name__ == '__main__':
    raise SystemExit(main())
