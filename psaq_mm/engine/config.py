# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Turning any config of a quantized model into its data-free form."""

import copy
import os
import re
from typing import Any, List, Mapping, Optional, Tuple

from mmengine.config import Config, ConfigDict

from psaq_mm.engine.data_overlap import check_no_overlap
from psaq_mm.engine.inputs import check_preprocessor
from psaq_mm.engine.methods import method_of
from psaq_mm.engine.pipelines import image_sizes
from psaq_mm.engine.presets import preset_name, resolve_dfq, with_method
from psaq_mm.engine.pure_python import with_named_types
from psaq_mm.engine.samples import reads_training_set
from psaq_mm.engine.settings import LOOP_GROUPS, HookSettings, OptimizerSettings
from psaq_mm.errors import ConfigError
from psaq_mm.quantization import QuantSpec
from psaq_mm.type_names import type_name

__all__ = [
    'apply_method',
    'to_data_free',
    'quant_holder',
    'quantized_model_config',
    'full_precision_model_config',
    'is_quantized_config',
    'sample_size',
    'drop_pretrained',
    'preset_of',
    'type_name',
]

_DATA_HOOKS = (
    'EMAHook',
    'CheckpointHook',
    'PipelineSwitchHook',
    'NumClassCheckHook',
    'ClassNumCheckHook',
    'YOLOXModeSwitchHook',
    'MeanTeacherHook',
    'PreciseBNHook',
    'SyncNormHook',
    'SwitchRecipeHook',
    'SwAVHook',
)
"""Inherited hooks that are dropped: they expect the real dataset, keep a second copy of the weights that nothing here
uses, or write checkpoints, which :class:`psaq_mm.engine.hooks.DataFreeQuantHook` does."""


_PRETRAINED = ('Pretrained', 'PretrainedInit')
"""MMEngine's name of the initialization from a file, and the class that a pure-Python config names."""


def is_quantized_config(model: Mapping) -> bool:
    """Whether a model config builds quantized layers, as a whole or through its backbone."""
    return type_name(model) == 'Quantized' or type_name(model.get('backbone') or {}) == 'QuantSwinTransformer'


def quantized_model_config(config: Config, quant=None, method: Optional[str] = None) -> ConfigDict:
    """The model config, wrapped in ``psaq_mm.Quantized`` where it is not quantized yet and ``quant`` says how.

    Args:
        config: A whole config.
        quant: A preset. On a config that is quantized already it takes the place of all but the scope, the target, and
            ``w_reduce_range`` with 8 bits.
        method: Name of a registered method (:data:`psaq_mm.engine.methods.METHODS`). The recipe of its quantizer is
            applied to the bits of ``quant`` or of the config; a preset that names a recipe itself keeps its own.

    Raises:
        ConfigError: No model in the config, or a full-precision one without ``quant``.
        SpecError: The preset is not known.
    """
    if not config.get('model'):
        raise ConfigError(f'the config {config.filename} has no model: give a full model config, not one of its bases')
    config = with_named_types(config)
    model = copy.deepcopy(ConfigDict(config.model))
    if config.get('data_preprocessor') and not model.get('data_preprocessor'):
        # mmpretrain has it beside the model; whoever builds from the model config alone needs its mean and std too.
        model.data_preprocessor = copy.deepcopy(config.data_preprocessor)
    if not is_quantized_config(model):
        if quant is None:
            raise ConfigError(
                f"the config {config.filename} is full-precision: set model = dict(type='psaq_mm.Quantized', "
                "base_type={{_base_.model.type}}, quant='w8a8') in a config that inherits it, or give --quant"
            )
        return ConfigDict(
            {**model, 'type': 'psaq_mm.Quantized', 'base_type': model.type, 'quant': preset_of(quant, method)}
        )
    holder = quant_holder(model)
    spec = QuantSpec.parse(holder.get('quant', 'w8a8'))
    if quant is not None or method:
        holder.quant = dict(preset=preset_of(quant or f'w{spec.w_bits}a{spec.a_bits}', method), scope=spec.scope)
        if spec.target != 'default':  # it is about the runtime, and the next one about the processor
            holder.quant.target = spec.target
        if spec.w_reduce_range and QuantSpec.parse(holder.quant).w_bits == 8:
            holder.quant.w_reduce_range = True
    return model


def quant_holder(model: Mapping) -> Any:
    """The part of a quantized model config that has ``quant``: the model, or its backbone."""
    return model if type_name(model) == 'Quantized' else model['backbone']


def preset_of(quant: Any, method: Optional[str]) -> Any:
    """A preset such as ``'w4a8'`` with a method's recipe before it. A preset with a recipe, or a dict, stays."""
    plain = re.fullmatch(r'w\d+a(\d+)', quant, re.IGNORECASE) if isinstance(quant, str) else None
    return f'{method_of(method).recipe_for(int(plain[1]))}_{quant}' if method and plain else quant


def full_precision_model_config(model: Mapping) -> ConfigDict:
    """The model config that a quantized one was made from."""
    plain = ConfigDict({k: v for k, v in model.items() if k not in ('base_type', 'quant')})
    if type_name(model) == 'Quantized':
        plain.type = model['base_type']
    backbone = plain.get('backbone')
    if backbone and type_name(backbone) == 'QuantSwinTransformer':
        kept = {k: v for k, v in backbone.items() if k not in ('quant', 'library')}
        library = backbone.get('library')
        plain.backbone = ConfigDict({**kept, 'type': f'{library}.SwinTransformer' if library else 'SwinTransformer'})
    return plain


def drop_pretrained(model: Any) -> None:
    """Clear every pretrained initialization: it would be fetched although the checkpoint replaces it."""
    if isinstance(model, dict):
        if model.get('pretrained') is not None:
            model['pretrained'] = None
        if type_name(model.get('init_cfg')) in _PRETRAINED:
            model['init_cfg'] = None
        for value in model.values():
            drop_pretrained(value)
    elif isinstance(model, (list, tuple)):
        for value in model:
            drop_pretrained(value)


def sample_size(config: Config) -> Tuple[int, int]:
    """Height and width of the samples: the training crop, or else the test resolution, in whole strides.

    If all test pictures have one size (a classifier's crop, a scale without ratio), it is taken as it is, because a
    position embedding may fit no other.

    Raises:
        ConfigError: The config has neither: ``dfq.size`` must give it.
    """
    size = (config.model.get('data_preprocessor') or config.get('data_preprocessor') or {}).get('size')
    if not size:
        sizes = image_sizes(config)
        if sizes and not sizes[-1].bound:
            return sizes[-1][:2]
        # A detector's scale is a bound: 1333 x 800 lets a 3:2 picture be 800 x 1200.
        size = sizes and (sizes[-1].height, min(sizes[-1].width, round(sizes[-1].height * 1.5)))
    if not size:
        raise ConfigError('the config tells no image size: set dfq.size=(height, width)')
    height, width = (size, size) if isinstance(size, int) else size
    return -(-int(height) // 32) * 32, -(-int(width) // 32) * 32


def _sorted_hooks(config: Config) -> Tuple[List, List[str]]:
    kept, dropped = [], []
    for hook in config.get('custom_hooks') or []:
        (dropped if type_name(hook) in _DATA_HOOKS else kept).append(hook)
    default = [hook for name, hook in (config.get('default_hooks') or {}).items() if hook and name != 'checkpoint']
    dropped += [hook for hook in default if type_name(hook) in _DATA_HOOKS]
    return [h for h in kept if type_name(h) != 'DataFreeQuantHook'], [type_name(h) for h in dropped]


def apply_method(config: Config, quant: Optional[str] = None, method: Optional[str] = None) -> Config:
    """A copy of a config with another precision, another method, or both.

    Args:
        config: A whole config.
        quant: See :func:`quantized_model_config`.
        method: See :func:`quantized_model_config` for the quantizer, and :func:`psaq_mm.engine.presets.with_method` for
            samples and training.
    """
    config = copy.deepcopy(with_named_types(config))
    config.model = quantized_model_config(config, quant, method)
    if method:
        config.dfq = with_method(config.get('dfq'), method)
    return config


def to_data_free(
    config: Config,
    *,
    checkpoint: Optional[str] = None,
    val: bool = False,
    quant=None,
    in_model: Optional[Mapping] = None,
) -> Config:
    """A copy of ``config`` that quantizes without data, and runs under any ``tools/train.py`` of OpenMMLab.

    The loop, the optimizer and its schedule are replaced; pretrained initialization is cleared; inherited hooks that
    need the dataset are dropped, and named in ``dfq.dropped_hooks`` for the log. No dataset is opened unless ``val`` is
    set.

    Args:
        config: A config with a quantized model, and optionally ``dfq``: a preset's name or a dict, see
            :mod:`psaq_mm.engine.presets`.
        checkpoint: The full-precision checkpoint; defaults to ``dfq.teacher.checkpoint``, then ``load_from``.
        val: Validate after the last step, on the config's own validation set (sooner with ``train_cfg.val_interval``).
        quant: See :func:`quantized_model_config`.
        in_model: Where the full-precision weights are those that the runner's model has already: their classes and
            palette. Defaults to None: they are read from the checkpoint.

    Raises:
        ConfigError: No checkpoint, no such file, no image size, or an unknown setting.
    """
    config = copy.deepcopy(with_named_types(config))
    dfq = resolve_dfq(config.get('dfq'))
    if reads_training_set(dfq['samples']):
        # While the config still has its validation set, and before anything is written.
        check_no_overlap(config)
    config.model = quantized_model_config(config, quant)
    check_preprocessor(config)
    drop_pretrained(config.model)

    before = config.get('train_cfg') or {}  # of a config that is data-free already: what a run leaves in its work dir
    before = before if type_name(before) == 'DataFreeTrainLoop' else {}
    if in_model is None:
        path = _teacher(checkpoint, dfq, config, before)
        dfq['teacher'] = dict(checkpoint=path, sha256=dfq['teacher'].get('sha256'))
    else:
        dfq['teacher'] = dict(checkpoint=None, sha256=None, in_model=dict(in_model))
    dfq['size'] = tuple(dfq['size'] or sample_size(config))

    hooks, dropped = _sorted_hooks(config)
    config.custom_hooks = hooks + [
        ConfigDict(type='psaq_mm.DataFreeQuantHook', **{name: dfq[name] for name in HookSettings.names()})
    ]
    optimizer = OptimizerSettings(**{name: dfq[name] for name in OptimizerSettings.names()})
    loop = ['generator', 'teacher', *(name for group in LOOP_GROUPS for name in group.names())]
    config.train_cfg = ConfigDict(
        type='psaq_mm.DataFreeTrainLoop',
        max_iters=optimizer.iters,
        dropped_hooks=[*before.get('dropped_hooks', ()), *dropped],
        model_config=config.model,
        **copy.deepcopy({name: dfq[name] for name in loop}),
    )
    # All settings are kept, so that the config in a work dir is the run that left it, also with another --method.
    config.dfq = dict(preset=preset_name(config.get('dfq')), **dfq)
    # A runner asks for a training dataloader beside a training loop; the loop brings its own over the pool of samples.
    if not config.get('train_dataloader'):
        config.train_dataloader = ConfigDict(batch_size=dfq['batch_size'])
    _set_optimizer(config, optimizer, dfq['amp'])
    if val and not all(config.get(key) is not None for key in ('val_dataloader', 'val_evaluator', 'val_cfg')):
        raise ConfigError(
            f'the config {config.filename} has no validation set: set val_dataloader, val_cfg and val_evaluator, or '
            'run without --val'
        )
    if not val:
        config.val_cfg = config.val_dataloader = config.val_evaluator = None
    _set_runtime(config, dfq)
    return config


def _teacher(given: Optional[str], dfq: Mapping, config: Config, before: Mapping) -> str:
    path = (
        given
        or dfq['teacher'].get('checkpoint')
        or config.get('load_from')
        or (before.get('teacher') or {}).get('checkpoint')
    )
    if not path:
        raise ConfigError(
            'there is no full-precision checkpoint to quantize: set load_from in the config or give --checkpoint'
        )
    if '://' not in str(path) and not os.path.isfile(path):
        what = (
            'is a folder: give the file in it'
            if os.path.isdir(path)
            else 'does not exist: set load_from or give --checkpoint'
        )
        raise ConfigError(f'the full-precision checkpoint {path} {what}')
    return str(path)


def _set_optimizer(config: Config, settings: OptimizerSettings, amp: Optional[str]) -> None:
    """Optimizer of the student and its schedule."""
    lr, clip = settings.lr, settings.clip_grad
    rates = dict(vector_lr=settings.vector_lr, range_lr=settings.range_lr)
    config.optim_wrapper = ConfigDict(
        type='OptimWrapper',
        optimizer=dict(type='Adam', lr=lr, betas=(0.9, 0.999)),
        clip_grad=dict(max_norm=clip) if clip else None,
    )
    if lr < 0 or settings.iters and (not lr or rates != dict(vector_lr=None, range_lr=0.0)):
        config.optim_wrapper.update(constructor='psaq_mm.StudentOptimWrapperConstructor', paramwise_cfg=rates)
    if amp == 'float16':  # its small gradients vanish unless the loss is scaled; bfloat16's do not
        config.optim_wrapper.type = 'psaq_mm.Float16OptimWrapper'
    # Without T_max: MMEngine ends it with the loop, also where train_cfg.max_iters is changed in a work dir's config.
    schedule = ConfigDict(type='CosineAnnealingLR', eta_min=0, by_epoch=False)
    config.param_scheduler = [schedule] if settings.iters else []
    config.pop('auto_scale_lr', None)


def _by_iteration(log_processor: Mapping) -> ConfigDict:
    """A log processor for an iteration loop, which has no epochs: their windows become windows of all steps so far."""
    processor = ConfigDict({**copy.deepcopy(dict(log_processor)), 'type': 'LogProcessor', 'by_epoch': False})
    if not isinstance(processor.get('window_size', 1), int):
        processor.pop('window_size')
    for entry in processor.get('custom_cfg') or []:
        if entry.get('window_size') == 'epoch':
            entry['window_size'] = 'global'
    return processor


def _set_runtime(config: Config, dfq: Mapping) -> None:
    default_hooks = ConfigDict(config.get('default_hooks') or {})
    default_hooks.checkpoint = None  # mmengine removes the old file before it writes the new one; our hook does neither
    for name in [name for name, hook in default_hooks.items() if hook and type_name(hook) in _DATA_HOOKS]:
        default_hooks.pop(name)  # mmengine takes None for its own names alone
    default_hooks.logger = ConfigDict(
        {**(default_hooks.get('logger') or {}), 'type': 'LoggerHook', 'interval': dfq['log_interval']}
    )
    config.default_hooks = default_hooks
    config.log_processor = _by_iteration(config.get('log_processor') or {})
    config.randomness = ConfigDict(seed=dfq['seed'])
    config.load_from, config.resume = None, False
    config.work_dir = config.get('work_dir') or './work_dirs/data_free'
