# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Converts MMEngine's pure-Python configs (``read_base()``), whose types are classes, to text configs, whose types are
names.

A run writes its config into the work dir and into ``student.pth``, where a class has no text, and the libraries compare
types by name in many places. So a pure-Python config is converted when it is loaded, and all other code knows one form.
"""

from typing import Any

from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.registry import MODELS
from mmengine.utils import get_object_from_string

__all__ = ['with_named_types']

_TYPES = ('type', 'base_type', 'constructor', 'runner_type')
"""Keys whose values MMEngine looks up in a registry, by name or by path."""

_BY_BARE_NAME = ('mmcv.ops', 'albumentations')
"""Modules whose types mmdet and mmcv look up by bare name: ``RoIAlign`` and ``nms`` have no path there."""


def with_named_types(config: Config) -> Config:
    """A config whose types are names: ``'mmdet.models.FasterRCNN'`` in place of the class.

    Args:
        config: Any config. A text config is returned as it is.

    Returns:
        A copy that can be written and read again, without the names that a pure-Python file imports.

    Raises:
        ImportError: A module that the config imports does not exist.
    """
    if not _has_objects(config._cfg_dict):
        return config
    imported = getattr(config, '_imported_names', ())
    content = {key: value for key, value in dict.items(config._cfg_dict) if key not in imported}
    return Config(_named(content), filename=config.filename)


def _has_objects(value: Any) -> bool:
    # dict.values: MMEngine's own values() would import what is not imported yet.
    if isinstance(value, dict):
        return any(map(_has_objects, dict.values(value)))
    if isinstance(value, (list, tuple)):
        return any(map(_has_objects, value))
    return _is_object(value)


def _is_object(value: Any) -> bool:
    """Whether a setting is a class, a function or an import that is not resolved yet."""
    return isinstance(value, (LazyAttr, LazyObject, type)) or hasattr(value, '__qualname__')


def _named(value: Any, key: Any = None) -> Any:
    if isinstance(value, dict):
        return {name: _named(item, name) for name, item in dict.items(value)}
    if isinstance(value, (list, tuple)):
        return type(value)(_named(item) for item in value)
    if not _is_object(value):
        return value
    target = value.build() if isinstance(value, (LazyAttr, LazyObject)) else value
    if key in _TYPES:
        return _name_of(target, value)
    return target if _is_data(target) else value


def _name_of(target: Any, setting: Any) -> Any:
    """The path or name by which the libraries find ``target``; the setting itself where no path leads to it."""
    module, name = str(getattr(target, '__module__', '')), str(getattr(target, '__qualname__', ''))
    if module.startswith(_BY_BARE_NAME) and target not in MODELS.module_dict.values():
        return name
    paths = [f'{setting.module}.{setting}'] if isinstance(setting, (LazyAttr, LazyObject)) else []
    while module:  # from mmdet.models.losses.smooth_l1_loss upwards: there, a function has the name of its module
        paths.append(f'{module}.{name}')
        module = module.rpartition('.')[0]
    return next((path for path in paths if get_object_from_string(path) is target), setting)


def _is_data(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_data, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_data, value))
    return value is None or isinstance(value, (bool, int, float, str))
