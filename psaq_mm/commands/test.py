# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Box and mask AP, mIoU or top-1 of a quantized model: ``tools/test.py CONFIG CKPT [--full-precision [FP]]``; of an exported one:
``tools/test.py CONFIG --deployed DIR``."""
import argparse
import copy
import json
import os
from typing import Dict, Mapping, Optional, Sequence

from psaq_mm.commands.common import (add_config_arguments, add_quant_arguments, add_run_arguments, run_command,
                                    runnable_config)
from psaq_mm.engine.data_overlap import dataset_leaves
from psaq_mm.errors import CheckpointError, ConfigError, DataError
from psaq_mm.quantization.reduction import ranks

__all__ = ['main', 'evaluate', 'check_test_set', 'before_after_table']


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
        raise ConfigError(f'the config {config.filename} has no test set: set test_dataloader, test_cfg and test_evaluator')
    absent = _missing_file(config)
    if absent:
        raise DataError(f'the test set is not there: {absent} does not exist; check data_root, or override '
                        'test_dataloader.dataset.ann_file')


def evaluate(config, checkpoint: Optional[Mapping], source: str, full_precision: bool = False, hooks: Sequence = (),
             runtime: Optional[str] = None, threads: Optional[int] = None) -> Dict[str, float]:
    """Metrics of a model on its config's test set.

    Args:
        config: A loaded config of a quantized model.
        checkpoint: As read by :func:`psaq_mm.engine.checkpoint.read_checkpoint`; None for an exported model.
        source: The checkpoint's path, for messages; an exported model's directory with ``runtime``.
        full_precision: Evaluate the library's own model type instead, with no quantizer in it.
        hooks: MMEngine hooks that see the run, such as :class:`psaq_mm.commands.agreement.RecordHook`.
        runtime: Evaluate the exported model at ``source`` in ``'openvino'`` or ``'onnxruntime'``.
        threads: Of the runtime.

    Returns:
        The evaluator's metrics under its own keys, such as ``coco/bbox_mAP`` and ``mIoU``.

    Raises:
        ConfigError: The config has no test set.
        DataError: Its images or annotations are not there.
        CheckpointError: The checkpoint does not fit, or is quantized under another spec.
    """
    from mmengine.registry import init_default_scope
    from mmengine.runner import Runner

    from psaq_mm.engine.checkpoint import load_weights
    from psaq_mm.engine.config import drop_pretrained, full_precision_model_config
    from psaq_mm.models import deploy_model_
    config = copy.deepcopy(config)
    check_test_set(config)
    config.load_from, config.resume = None, False
    for key in ('train_cfg', 'train_dataloader', 'optim_wrapper', 'val_cfg', 'val_dataloader', 'val_evaluator'):
        config[key] = None
    config.param_scheduler = None
    config.pop('auto_scale_lr', None)
    if full_precision:
        config.model = full_precision_model_config(config.model)
    drop_pretrained(config.model)
    init_default_scope(config.get('default_scope', 'mmengine'))
    runner = Runner.from_cfg(config)
    model = getattr(runner.model, 'module', runner.model)
    if runtime is not None:
        deploy_model_(model, source, runtime, threads)
    else:
        if not full_precision:
            _check_spec(model, checkpoint, source)
        load_weights(model, checkpoint, source)
    for hook in hooks:
        runner.register_hook(hook)
    return {k: float(v) for k, v in runner.test().items()}


def _check_spec(model, checkpoint: Mapping, source: str) -> None:
    from psaq_mm.models import spec_of
    from psaq_mm.quantization import QuantSpec
    made = (checkpoint['meta'].get('psaq_mm') or {}).get('quant')
    if not made:
        return
    made, wanted = QuantSpec.from_dict(made).to_dict(), spec_of(model).to_dict()  # a setting that came later has its default there
    odd = [f'{k}={made[k]!r}, the config {wanted[k]!r}' for k in wanted if made[k] != wanted[k]]
    if odd:
        raise CheckpointError(f'{source} was quantized under another spec ({"; ".join(odd[:3])}): use the config it was made with, or set '
                              'these under its quant')


def before_after_table(before: Optional[Mapping], after: Optional[Mapping], label: str, first: str = 'full precision') -> str:
    """A table of metrics, one row a metric, full precision (or what ``first`` names) beside quantized."""
    keys = [k for k in (after or before)]
    width = max(len(k) for k in keys)
    head = f'{"metric":<{width}}' + (f'  {first:>14}' if before else '') + (f'  {label:>10}' if after else '')
    head += '  difference' if before and after else ''
    rows = [head, '-' * len(head)]
    for key in keys:
        row = f'{key:<{width}}'
        row += f'  {before[key]:>14.3f}' if before else ''
        row += f'  {after[key]:>{max(len(label), 10)}.3f}' if after else ''
        row += f'  {after[key] - before[key]:>+10.3f}' if before and after else ''
        rows.append(row)
    return '\n'.join(rows)


def _teacher_of(checkpoint: Mapping, given: Optional[str], path: str) -> str:
    from psaq_mm.engine.checkpoint import file_sha256
    if given:
        return given
    teacher = (checkpoint['meta'].get('psaq_mm') or {}).get('teacher') or {}
    where = teacher.get('checkpoint')
    if not where or not os.path.isfile(where):
        raise CheckpointError(f'{path} was made from {where}, which is not there: give it as --full-precision PATH')
    if teacher.get('sha256') and file_sha256(where) != teacher['sha256']:
        raise CheckpointError(f'{where} has changed since {path} was made from it: give the right one as --full-precision PATH')
    return where


def _test_deployed(config, args) -> None:
    """Metrics of an exported model, beside those of the fake-quantized one where its checkpoint is given too."""
    from psaq_mm.deploy import load
    from psaq_mm.deploy.kernels import EXPLAINED
    from psaq_mm.engine.checkpoint import read_checkpoint
    if args.full_precision is not None:
        raise ConfigError('--deployed and --full-precision do not go together: evaluate one after the other')
    label = f'{load(args.deployed, args.runtime).manifest["label"]} {args.runtime}'  # before the test set is opened
    fake = evaluate(config, read_checkpoint(args.checkpoint), args.checkpoint) if args.checkpoint else None
    ran = _kernels_hook()
    found = evaluate(config, None, args.deployed, hooks=[ran], runtime=args.runtime, threads=args.threads)
    told = ''.join(f'\n{args.runtime} ran it with {EXPLAINED[kernels]}' for kernels in ran.kernels)
    _show(config, before_after_table(fake, found, label, 'fake-quantized') + told,
          dict(deployed=args.deployed, runtime=args.runtime, kernels=list(ran.kernels), checkpoint=args.checkpoint, quantized=fake,
               integer=found))


def _kernels_hook():
    """A hook that knows after a test which kernels an exported model was run with."""
    from mmengine.hooks import Hook

    from psaq_mm.models import DeployedBackbone

    class KernelsHook(Hook):
        kernels: Sequence[str] = ()

        def after_test(self, runner) -> None:
            models = [m.deployed for m in runner.model.modules() if isinstance(m, DeployedBackbone)]
            self.kernels = sorted({kernels for model in models for kernels in model.kernels})

    return KernelsHook()


def _show(config, table: str, results: Mapping) -> None:
    """Print and save; of several ranks, which all have the same metrics, the first."""
    if ranks()[0]:
        return
    print(table, flush=True)
    out = os.path.join(config.work_dir, 'test_results.json')
    os.makedirs(config.work_dir, exist_ok=True)
    with open(out, 'w') as file:
        json.dump(results, file, indent=2)
    print(f'saved to {out}')


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog='psaq-test', description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('checkpoint', nargs='?', help='student.pth, or a full-precision checkpoint with --full-precision; not needed with '
                        '--deployed')
    parser.add_argument('--full-precision', nargs='?', const='', metavar='FP',
                        help='evaluate the full-precision model too (before and after); FP defaults to the one the student '
                        'was made from')
    parser.add_argument('--deployed', metavar='DIR', help='evaluate the integer model that tools/export.py wrote')
    parser.add_argument('--runtime', default='openvino', metavar='NAME', help='of --deployed: openvino (default) or onnxruntime')
    parser.add_argument('--threads', type=int, help='of the runtime; defaults to its own choice')
    add_quant_arguments(parser)
    add_run_arguments(parser)

    def command(args) -> None:
        from psaq_mm.engine.checkpoint import is_quantized, read_checkpoint
        config = runnable_config(args)
        if args.deployed:
            _test_deployed(config, args)
            return
        if not args.checkpoint:
            raise CheckpointError('there is no checkpoint to evaluate: give student.pth after the config, or --deployed DIR')
        checkpoint = read_checkpoint(args.checkpoint)
        before = after = None
        if args.full_precision is not None:
            path = args.checkpoint
            if is_quantized(checkpoint):
                path = _teacher_of(checkpoint, args.full_precision, path)
            before = evaluate(config, read_checkpoint(path), path, full_precision=True)
        elif not is_quantized(checkpoint):
            raise CheckpointError(f'{args.checkpoint} is a full-precision checkpoint: quantize it with tools/dfq_train.py '
                                  'first, or evaluate it as it is with --full-precision')
        if is_quantized(checkpoint):
            after = evaluate(config, checkpoint, args.checkpoint)
        label = (checkpoint['meta'].get('psaq_mm') or {}).get('label', 'quantized')
        _show(config, before_after_table(before, after, label),
              dict(checkpoint=args.checkpoint, full_precision=before, quantized=after))

    return run_command(command, parser, argv)


if __name__ == '__main__':
    raise SystemExit(main())
