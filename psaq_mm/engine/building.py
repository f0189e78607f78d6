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

__all__ = ['build_model', 'set_scope']


def set_scope(config: Mapping) -> None:
    """Look types up where a config says, else in the library of its model.

    A pure-Python config says None, as its own types are no names; but those that a library writes into its code are,
    such as the ``'Linear'`` of mmdet's box heads, and the scope of an earlier config would still be in force.
    """
    init_default_scope(config.get('default_scope') or _library_of(config.get('model') or {}))


def _library_of(model: Mapping) -> str:
    given = model.get('base_type') or model.get('type')
    built = MODELS.get(given) if isinstance(given, str) else given
    for base in getattr(built, '__mro__', ()):
        library = base.__module__.partition('.')[0]
        if library in MODULE2PACKAGE:
            return library
    return 'mmengine'


def build_model(config: Mapping, model: Optional[Mapping] = None) -> nn.Module:
    """A model that weights are about to be loaded into: nothing that it was pretrained from is fetched.

    Args:
        config: A whole config, which tells the scope.
        model: The model's config. Defaults to None, that of ``config``.

    Returns:
        The model, with the weights of its own initialization.
    """
    model = copy.deepcopy(config['model'] if model is None else model)
    model = with_named_types(Config(dict(model=model))).model
    drop_pretrained(model)
    set_scope(config)
    return MODELS.build(model)
