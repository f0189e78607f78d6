# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Metrics of a full-precision model, a student or an exported model on the test set of its config."""

import copy
import functools
import os
import traceback
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from psaq_mm.commands.evaluation_options import EvaluationOptions
from psaq_mm.commands.metrics import plain_metrics
from psaq_mm.engine.data_overlap import dataset_leaves
from psaq_mm.errors import CheckpointError, ConfigError, DataError, PsaqError
from psaq_mm.ranks import ranks

__all__ = ['check_spec', 'check_test_set', 'evaluate']


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
    options: EvaluationOptions = EvaluationOptions(),
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
        options: Drawn and written predictions, and test-time augmentation.

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
    options.prepare_(config)
    runner = Runner.from_cfg(config)
    model = _innermost(runner.model)
    if runtime is not None:
        deploy_model_(model, source, runtime, threads)
    else:
        if not full_precision:
            check_spec(model, checkpoint, source)
        load_weights(model, checkpoint, source)
    for hook in hooks:
        runner.register_hook(hook)
    return _tested(runner, failed, options)


def _innermost(model):
    """The model inside the wrappers of several ranks and of test-time augmentation."""
    from mmengine.model import BaseTTAModel, is_model_wrapper

    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _tested(runner, failed: Optional[List[str]], options: EvaluationOptions) -> Dict[str, Any]:
    """Metrics of a runner's test; see :func:`evaluate`."""
    failures: List[str] = []
    _guard_evaluator(_test_loop(runner), failures)
    try:
        with options.written_by(runner):
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
