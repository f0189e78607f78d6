# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Building the model of a config, the same way for every command."""

import copy
from typing import Mapping, Optional

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from psaq_mm.engine.config import drop_pretrained
from psaq_mm.engine.pure_python import with_named_types
from psaq_mm.models.quantized import build_named

__all__ = ['build_model', 'library_of', 'set_scope']


def set_scope(config: Mapping) -> None:
    """Look types up in the config's ``default_scope``, else in the library of its model.

    A pure-Python config has no scope: its types are classes. But a library's own code names types too, such as the
    ``'Linear'`` of mmdet's box heads, and without a scope here that of an earlier config would still hold.
    """
    init_default_scope(config.get('default_scope') or library_of(config.get('model') or {}))


def library_of(model: Mapping) -> str:
    """The import name of the OpenMMLab library that the class of a model comes from, or its nearest base does.

    Args:
        model: Config of a full-precision or a quantized model.

    Returns:
        ``'mmdet'``, ``'mmseg'``, ``'mmpretrain'`` and so on; ``'mmengine'`` where it is of none.
    """
    kind = model.get('base_type') or model.get('type')
    model_class = kind
    if isinstance(kind, str):
        with MODELS.switch_scope_and_registry(None) as registry:  # an unscoped name is one of the default scope
            model_class = registry.get(kind)
    for base in getattr(model_class, '__mro__', ()):
        library = base.__module__.partition('.')[0]
        if library in MODULE2PACKAGE:
            return library
    return 'mmengine'


def build_model(config: Mapping, model: Optional[Mapping] = None) -> nn.Module:
    """A model to load weights into. Pretrained weights that its config names are not downloaded.

    Args:
        config: A whole config, for its scope.
        model: The model's config. Defaults to None, that of ``config``.

    Returns:
        The model, with random weights.
    """
    model = copy.deepcopy(config['model'] if model is None else model)
    model = with_named_types(Config(dict(model=model))).model
    drop_pretrained(model)
    set_scope(config)
    return build_named(model)
