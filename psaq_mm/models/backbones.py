# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Backbone-level form, for configs that override only ``backbone.type``."""

import sys
from typing import Mapping, Optional, Union

from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import DefaultScope
from torch import nn

from psaq_mm.errors import ConfigError
from psaq_mm.models.quantized import quantize_model_
from psaq_mm.registry import MODELS

__all__ = ['QuantSwinTransformer']

_LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')


def _current_library(arguments: Mapping) -> str:
    scope = DefaultScope.get_current_instance()
    if scope is not None and scope.scope_name in _LIBRARIES:
        return scope.scope_name
    if 'arch' in arguments:
        return 'mmpretrain'
    loaded = [name for name in _LIBRARIES if name in sys.modules]
    if len(loaded) == 1:
        return loaded[0]
    raise ConfigError(
        f'QuantSwinTransformer cannot tell which library is meant (loaded: {loaded or "none"}): '
        f'give it library=, one of {", ".join(_LIBRARIES)}'
    )


@MODELS.register_module()  # A function, named like a class: configs name it as their ``type``.
def QuantSwinTransformer(quant: Union[Mapping, str] = 'w8a8', library: Optional[str] = None, **swin) -> nn.Module:
    """The library's own SwinTransformer, quantized as it is built.

    Args:
        quant: See :func:`~psaq_mm.models.quantized.quantize_model_`; ``scope`` plays no role in a backbone.
        library: ``'mmdet'``, ``'mmseg'`` or ``'mmpretrain'``. Defaults to the config's default scope.
        **swin: The arguments of that library's SwinTransformer.

    Raises:
        ConfigError: No library given, and none can be told.

    Example:
        >>> model = dict(backbone=dict(type='psaq_mm.QuantSwinTransformer', quant='w4a8'))
    """
    library = library or _current_library(swin)
    if library not in _LIBRARIES:
        raise ConfigError(f'library={library!r} has no Swin that is known here: use one of {", ".join(_LIBRARIES)}')
    backbone = ROOT_MODELS.build(dict(type=f'{library}.SwinTransformer', **swin))
    quantize_model_(backbone, quant)
    return backbone
