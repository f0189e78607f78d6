# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which parts of a model a scope covers, and whether its backbone is one that can be quantized."""

from typing import Callable, Iterator, List, Optional, Tuple

from torch import nn

from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models.adapters import BACKBONES, backbone_of
from psaq_mm.models.adapters.match import class_named, qualified_name
from psaq_mm.models.adapters.packed_attention import QuantPackedAttentionMixin
from psaq_mm.models.network import TIMM_CLASSIFIER, TRAINING_ONLY, find_backbone, is_pretraining, network_of, tower_name
from psaq_mm.models.tasks import task_of
from psaq_mm.quantization import ADAPTERS
from psaq_mm.quantization.layers import quant_class_of

__all__ = ['check_backbone', 'check_scope', 'find_backbone', 'first_layer_name', 'network_of', 'scope_filter']

CLASSIFIER_HEADS = ('head', 'head_dist')
"""Parts of a timm network outside of the backbone: timm's networks hold their head, OpenMMLab's backbones do not."""


def _backbone_path(model: nn.Module) -> str:
    """Dotted name of the backbone, ``''`` where the model is one."""
    backbone = find_backbone(model)
    return next((name for name, module in model.named_modules() if module is backbone), 'backbone')


def _title(net: nn.Module) -> str:
    # timm's feature extractors all have one class: its name says nothing.
    config = getattr(net, 'pretrained_cfg', None)
    architecture = config.get('architecture') if isinstance(config, dict) else None
    return qualified_name(type(net)) + (f' ({architecture})' if architecture else '')


def check_backbone(model: nn.Module) -> None:
    """Refuse a backbone that the adapters do not know, when the model is built.

    Raises:
        UnsupportedModelError: The backbone, or one of its attention modules, is not supported; the message names it.
            Otherwise only its convolutions and linear layers would be quantized, and its attention would stay float
            silently.
    """
    net = network_of(find_backbone(model))
    kind = backbone_of(net)
    tower = tower_name(net)
    if kind is None and tower:
        raise UnsupportedModelError(
            f'{_title(net)} is not supported as a whole: quantize its image tower {tower} alone, by '
            f'quantize_model_(model.{tower}, spec) or with the config of {tower} as the model'
        )
    if kind is None:
        known = (name for backbone in BACKBONES for name in backbone.names)
        supported = ', '.join('.'.join((name.split('.')[0], name.rsplit('.', 1)[1])) for name in known)
        raise UnsupportedModelError(
            f'the backbone {_title(net)} is not supported: use one of {supported}, or a subclass that does not '
            'override its forward'
        )
    reason = kind.unsupported(net)
    if reason:
        raise UnsupportedModelError(f'the backbone {_title(net)} is not supported in this form: {reason}')
    for path, part in kind.strangers(net):
        raise UnsupportedModelError(
            f'{path} of the backbone {_title(net)} is a {qualified_name(type(part))}, whose attention is not known and '
            'would stay in floating point: build the backbone without it'
        )


def _quantizable(part: nn.Module) -> bool:
    return any(quant_class_of(module)[0] is not None for module in part.modules())


def _never_run(model: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
    """Parts of a model that a calibration of the full scope does not run."""
    task = task_of(model)
    calibrated = task.calibrated_parts(model)
    known = ('neck', *TRAINING_ONLY, *calibrated, *task.float_parts(model))
    in_part = {name.split('.')[0] for name in calibrated if '.' in name}
    backbone = find_backbone(model)
    for name, part in model.named_children():
        if part is backbone or name in known:
            continue
        if name not in in_part:
            yield name, part
            continue
        for key, child in part.named_children():
            if f'{name}.{key}' not in known:
                yield f'{name}.{key}', child


def _unknown_attention(model: nn.Module) -> Optional[str]:
    """Name of a ``torch.nn.MultiheadAttention`` outside the backbone that no adapter converts; None without one."""
    backbone = find_backbone(model)
    inside = tuple(f'{name}.' for name, part in model.named_children() if part is backbone or name in TRAINING_ONLY)
    inside += tuple(f'{name}.' for name in task_of(model).float_parts(model))
    for name, module in model.named_modules():
        converted = isinstance(module, QuantPackedAttentionMixin)
        if not isinstance(module, nn.MultiheadAttention) or converted or name.startswith(inside):
            continue
        if not any(adapter.matcher(module) for adapter in ADAPTERS):
            return name
    return None


def check_scope(model: nn.Module, scope: str) -> None:
    """Refuse a model that ``scope='full'`` cannot quantize or calibrate, when it is built.

    Args:
        model: The model about to be quantized.
        scope: ``'backbone'`` covers every model with a supported backbone.

    Raises:
        UnsupportedModelError: A part of the model would see no sample, or an attention would stay float silently. The
            message names the part.
    """
    if scope == 'backbone' or find_backbone(model) is model or class_named(model, TIMM_CLASSIFIER):
        return
    task, kind, way_out = task_of(model), type(model).__name__, "use scope='backbone' for this model"
    if is_pretraining(model):
        raise UnsupportedModelError(
            f"scope='full' does not cover {kind}, whose neck and head restore masked pictures: {way_out}"
        )
    for name, part in _never_run(model):
        if _quantizable(part):
            raise UnsupportedModelError(
                f"scope='full' cannot run {name} of {kind} ({type(part).__name__}), whose ranges would never be "
                f'set: {way_out}'
            )
    attention = _unknown_attention(model)
    if attention:
        raise UnsupportedModelError(
            f'{attention} of {kind} is torch.nn.MultiheadAttention, which would stay in floating point under '
            f"scope='full': {way_out}"
        )
    task.check_full_scope(model)


def scope_filter(model: nn.Module, scope: str) -> Callable[[str, nn.Module], bool]:
    """A filter over (dotted name, module) that keeps what ``scope`` covers.

    Args:
        model: The model about to be quantized.
        scope: ``'backbone'`` (without the classification head that a timm network holds) or ``'full'`` (backbone, neck
            and heads; what the task names as float, and auxiliary heads, unused at test time, stay float).

    Raises:
        UnsupportedModelError: See :func:`check_scope`.
    """
    check_scope(model, scope)
    if scope != 'backbone':
        floats = tuple(f'{name}.' for name in (*TRAINING_ONLY, *task_of(model).float_parts(model)))
        return lambda name, module: not f'{name}.'.startswith(floats)
    path = _backbone_path(model)
    prefix = f'{path}.' if path else ''
    heads = tuple(prefix + head for head in CLASSIFIER_HEADS)

    def covers(name: str, module: nn.Module) -> bool:
        if name != path and not name.startswith(prefix):
            return False
        return not name.startswith(tuple(f'{head}.' for head in heads)) and name not in heads

    return covers


def first_layer_name(model: nn.Module) -> str:
    """The layer that sees the image (the patch embedding): its input keeps ``QuantSpec.input_bits``."""
    names: List[str] = [n for n, m in find_backbone(model).named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    path = _backbone_path(model)
    prefix = f'{path}.' if path else ''
    return prefix + names[0] if names else ''
