# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which parts of a model a scope covers, and whether its backbone is one that can be quantized."""
from typing import Callable, List

from torch import nn

from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models.adapters import ARCHITECTURES, SUPPORTED_BACKBONES
from psaq_mm.models.adapters.match import class_named, qualified_name

__all__ = ['scope_filter', 'find_backbone', 'first_layer_name', 'check_backbone']

TRAINING_ONLY = ('auxiliary_head', 'data_preprocessor')
"""Parts that are not used at test time: they stay float in every scope."""

CLASSIFIER_HEADS = ('head', 'head_dist')
"""Parts of a timm network that are no backbone: OpenMMLab's backbones end before their head, timm's networks hold it."""

_TIMM_CLASSIFIER = ('mmpretrain.models.classifiers.timm.TimmClassifier', )
_TIMM_BACKBONE = ('mmpretrain.models.backbones.timm_backbone.TIMMBackbone', )
_FEATURE_GETTER = ('timm.models._features.FeatureGetterNet', )


def find_backbone(model: nn.Module) -> nn.Module:
    """The backbone of a detector, segmentor or classifier, timm's whole network in a ``TimmClassifier``; the model itself where
    it is a backbone."""
    if class_named(model, _TIMM_CLASSIFIER):
        return model.model
    return getattr(model, 'backbone', model)


def _network(backbone: nn.Module) -> nn.Module:
    """The network that does the work: timm's, inside what mmpretrain and timm wrap around it."""
    if class_named(backbone, _TIMM_BACKBONE):
        backbone = backbone.timm_model
    return backbone.model if class_named(backbone, _FEATURE_GETTER) else backbone


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
    """Refuse at build time what the adapters do not know.

    Raises:
        UnsupportedModelError: The backbone is none of the supported ones, or one of its attention modules is not; the message
            names it. Quantizing only its convolutions and linears would leave its attention float without a word.
    """
    net = _network(find_backbone(model))
    name = class_named(net, SUPPORTED_BACKBONES)
    kind = next((kind for kind in ARCHITECTURES if name in kind.backbones), None)
    if name is None or (kind is not None and not kind.has_blocks(net)):
        # timm's feature extractor is a wrapper that anything may be in.
        known = (n for n in SUPPORTED_BACKBONES if '._features.' not in n)
        supported = ', '.join('.'.join((n.split('.')[0], n.rsplit('.', 1)[1])) for n in known)
        raise UnsupportedModelError(
            f'the backbone {_title(net)} is not supported: use one of {supported}, or a subclass that does not override its '
            'forward')
    for path, part in kind.strangers(net) if kind else ():
        raise UnsupportedModelError(
            f'{path} of the backbone {_title(net)} is a {qualified_name(type(part))}, whose attention is not known and would stay '
            'in floating point: build the backbone without it')


def scope_filter(model: nn.Module, scope: str) -> Callable[[str, nn.Module], bool]:
    """A filter over (dotted name, module) that keeps what ``scope`` covers.

    Args:
        model: The model about to be quantized.
        scope: ``'backbone'`` (without the classification head that a timm network holds) or ``'full'`` (backbone, neck and
            heads; auxiliary heads, unused at test time, stay float).
    """
    if scope != 'backbone':
        return lambda name, module: name.split('.')[0] not in TRAINING_ONLY
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
