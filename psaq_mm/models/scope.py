# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which parts of a model a scope covers, and whether its backbone is one that can be quantized."""
from typing import Callable, List

from torch import nn

from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models.adapters import SUPPORTED_BACKBONES
from psaq_mm.models.adapters.match import class_named, qualified_name

__all__ = ['scope_filter', 'find_backbone', 'first_layer_name', 'check_backbone']

TRAINING_ONLY = ('auxiliary_head', 'data_preprocessor')
"""Parts that are not used at test time: they stay float in every scope."""


def find_backbone(model: nn.Module) -> nn.Module:
    """The backbone of a detector, segmentor or classifier; the model itself where it is a backbone."""
    return getattr(model, 'backbone', model)


def check_backbone(model: nn.Module) -> None:
    """Refuse at build time what the adapters do not know.

    Raises:
        UnsupportedModelError: The backbone is none of the supported ones, named in the message. Quantizing only its
            convolutions and linears would leave its attention float without a word.
    """
    backbone = find_backbone(model)
    if class_named(backbone, SUPPORTED_BACKBONES) is None:
        supported = ', '.join('.'.join((n.split('.')[0], n.rsplit('.', 1)[1])) for n in SUPPORTED_BACKBONES)
        raise UnsupportedModelError(
            f'the backbone {qualified_name(type(backbone))} is not supported: use one of {supported}, or a subclass that '
            'does not override its forward')


def scope_filter(model: nn.Module, scope: str) -> Callable[[str, nn.Module], bool]:
    """A filter over (dotted name, module) that keeps what ``scope`` covers.

    Args:
        model: The model about to be quantized.
        scope: ``'backbone'`` or ``'full'`` (backbone, neck and heads; auxiliary heads, unused at test time, stay float).
    """
    if scope == 'backbone' and find_backbone(model) is not model:
        return lambda name, module: name.startswith('backbone.')
    return lambda name, module: name.split('.')[0] not in TRAINING_ONLY


def first_layer_name(model: nn.Module) -> str:
    """The layer that sees the image (the patch embedding): its input keeps ``QuantSpec.input_bits``."""
    names: List[str] = [n for n, m in find_backbone(model).named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    prefix = '' if find_backbone(model) is model else 'backbone.'
    return prefix + names[0] if names else ''
