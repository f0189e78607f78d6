# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What is known of a model in memory, written as the config that it was built without: its input and its pictures."""

import copy
import os
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from mmengine.config import Config
from torch import nn

from psaq_mm.engine.reading import read_config
from psaq_mm.errors import ConfigError
from psaq_mm.models import TaskModel
from psaq_mm.models.adapters.match import qualified_name
from psaq_mm.models.network import is_timm, is_transformers
from psaq_mm.models.tasks import task_of

__all__ = ['Known', 'config_of', 'dataset_meta_of_model', 'library_of']

_LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')


class Known(NamedTuple):
    """What a caller knows of a model; None where the model knows it itself.

    Attributes:
        size: (height, width) in pixels of the pictures that it takes, or one number for both.
        mean: Subtracted from each channel, for values 0 to 255.
        std: Each channel is divided by it.
        classes: Names of its classes.
    """

    size: Union[int, Sequence[int], None] = None
    mean: Optional[Sequence[float]] = None
    std: Optional[Sequence[float]] = None
    classes: Optional[Sequence[str]] = None

    @property
    def pair(self) -> Optional[Tuple[int, int]]:
        """The size as (height, width).

        Raises:
            ConfigError: It is no size.
        """
        if self.size is None:
            return None
        sides = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ConfigError(f'size={self.size!r} is no size: give (height, width) in pixels, or one number for both')
        return sides


def library_of(model: nn.Module) -> str:
    """``'mmdet'``, ``'mmseg'``, ``'mmpretrain'``, ``'timm'``, ``'transformers'``, or ``''`` for another one."""
    for base in type(model).__mro__:
        library = base.__module__.partition('.')[0]
        if library in _LIBRARIES:
            return library
    if is_transformers(model):
        return 'transformers'
    return 'timm' if is_timm(model) else ''


def config_of(model: nn.Module, known: Known = Known(), config: Union[str, os.PathLike, Config, None] = None) -> Config:
    """The config of a model in memory, as a copy: the one given, or the one that the library left in the model; without
    one, a config with what is known of its input.

    Args:
        model: Full-precision or quantized.
        known: What the caller knows.
        config: Its config, or the path of it.

    Raises:
        ConfigError: The size or the normalization is not known, or the config cannot be read.
    """
    if config is not None and not isinstance(config, Config):
        config = read_config(config)
    found = config if config is not None else _left_in(model)
    if found is not None:
        _refuse(known, 'the model has a config, whose data_preprocessor and pipeline say it: change them there')
        return copy.deepcopy(found)
    return _described(model, known)


def _left_in(model: nn.Module) -> Optional[Config]:
    """The config that ``init_detector`` and ``init_model`` (``cfg``) and ``get_model`` (``_config``) leave."""
    if library_of(model) not in _LIBRARIES:
        return None
    found = [getattr(model, name, None) for name in ('cfg', '_config')]
    return next((config for config in found if isinstance(config, Config) and config.get('model')), None)


def _refuse(known: Known, reason: str) -> None:
    given = [name for name in ('mean', 'std') if getattr(known, name) is not None]
    if given:
        raise ConfigError(f'{given[0]} is given and {reason}')


def _described(model: nn.Module, known: Known) -> Config:
    library, preprocessor = library_of(model), getattr(model, 'data_preprocessor', None)
    settings: Dict[str, Any] = {}
    normalization: List[Dict[str, Any]] = []
    if preprocessor is not None and library in _LIBRARIES:
        _refuse(known, "the model's own data_preprocessor normalizes its pictures: change it there")
        settings = _preprocessor_settings(preprocessor)
    else:
        mean, std = _statistics(model, known)
        normalization = [dict(type='Normalize', mean=mean, std=std, to_rgb=True)]
    size = known.pair or _size(model, preprocessor)
    if size is None:
        raise ConfigError(
            f'the size of the pictures that {type(model).__name__} takes is not known from the model: give '
            'size=(height, width), or config= with its test pipeline'
        )
    steps = [dict(type='LoadImageFromFile'), *_resizing(model, size), *normalization]
    return Config(
        dict(
            default_scope=library if library in _LIBRARIES else 'mmengine',
            in_memory=qualified_name(type(model)),
            model=dict(type=qualified_name(type(model)), data_preprocessor=settings, test_cfg=_slide(model)),
            test_pipeline=steps,
        ),
        format_python_code=False,
    )


def _preprocessor_settings(preprocessor: nn.Module) -> Dict[str, Any]:
    """What configs say of a data preprocessor beside mean and std, which are read off the module."""
    settings: Dict[str, Any] = {}
    for name in ('pad_size_divisor', 'pad_value', 'pad_val', 'test_cfg'):
        value = getattr(preprocessor, name, None)
        if isinstance(value, (int, float, Mapping)):
            settings[name] = dict(value) if isinstance(value, Mapping) else value
    return settings


def _slide(model: nn.Module) -> Dict[str, Any]:
    """A segmentor's sliding window."""
    settings = getattr(model, 'test_cfg', None)
    if not isinstance(settings, Mapping) or settings.get('mode') != 'slide':
        return {}
    return dict(mode='slide', crop_size=tuple(settings['crop_size']), stride=tuple(settings['stride']))


# ---------------------------------------------------------------------- timm and transformers
def pretrained_settings(model: nn.Module) -> Dict[str, Any]:
    """Timm's ``pretrained_cfg`` or ``default_cfg``: ``mean``, ``std`` (for values 0 to 1), ``input_size``,
    ``crop_pct``, ``interpolation``.
    """
    for name in ('pretrained_cfg', 'default_cfg'):
        found = getattr(model, name, None)
        found = found if isinstance(found, Mapping) else getattr(found, '__dict__', None)
        if found:
            return dict(found)
    return {}


def _statistics(model: nn.Module, known: Known) -> Tuple[List[float], List[float]]:
    """Mean and standard deviation for values 0 to 255.

    Raises:
        ConfigError: They are not known.
    """
    if (known.mean is None) != (known.std is None):
        raise ConfigError(f'{"mean" if known.std is None else "std"} is given alone: give both of mean and std')
    if known.mean is not None and known.std is not None:
        return [float(v) for v in known.mean], [float(v) for v in known.std]
    settings = pretrained_settings(model)
    if settings.get('mean') and settings.get('std'):
        return [255.0 * v for v in settings['mean']], [255.0 * v for v in settings['std']]
    hint = ', 255 times image_mean and image_std of its image processor' if library_of(model) == 'transformers' else ''
    raise ConfigError(
        f'the normalization of the pictures that {type(model).__name__} takes is not known from the model: give mean '
        f'and std, for values 0 to 255{hint}'
    )


def _size(model: nn.Module, preprocessor: Optional[nn.Module]) -> Optional[Tuple[int, int]]:
    """The size that a model was built for; None where it does not say."""
    backbone = getattr(model, 'backbone', model)
    candidates = [
        getattr(preprocessor, 'size', None),
        TaskModel(model, parts=()).fixed_size,
        getattr(getattr(model, 'patch_embed', None), 'img_size', None),
        (pretrained_settings(model).get('input_size') or ())[-2:] or None,
        getattr(backbone, 'img_size', None),
        getattr(getattr(model, 'config', None), 'image_size', None),
    ]
    return next((pair for pair in map(_pair, candidates) if pair is not None), None)


def _pair(value: Any) -> Optional[Tuple[int, int]]:
    if isinstance(value, int) and value > 0:
        return value, value
    whole = isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, int) for v in value)
    return (value[0], value[1]) if whole else None


def _resizing(model: nn.Module, size: Tuple[int, int]) -> List[Dict[str, Any]]:
    """Steps from a picture to the size: the middle of it for a classifier, all of it for other models."""
    height, width = size
    task = task_of(model).name
    if task != 'classification' and height != width and library_of(model) in _LIBRARIES:
        return [dict(type='Resize', scale=(max(size), min(size)), keep_ratio=True)]
    if task != 'classification' or height != width:
        return [dict(type='Resize', scale=(width, height), keep_ratio=False)]
    settings = pretrained_settings(model)
    kind = settings.get('interpolation') or 'bicubic'
    whole = settings.get('crop_mode', 'center') == 'squash'
    if whole:
        return [dict(type='Resize', scale=(width, height), keep_ratio=False, backend='pillow', interpolation=kind)]
    edge = int(height / (settings.get('crop_pct') or 1.0))
    return [
        dict(type='ResizeEdge', scale=edge, edge='short', backend='pillow', interpolation=kind),
        dict(type='CenterCrop', crop_size=height),
    ]


# ---------------------------------------------------------------------- classes
def dataset_meta_of_model(model: nn.Module, config: Mapping, known: Known) -> Dict[str, Any]:
    """Classes and palette of a model, as far as they are known.

    Args:
        model: Full-precision or quantized.
        config: Of :func:`config_of`; the ``metainfo`` of its test set may have them.
        known: What the caller knows.
    """
    meta = dict(getattr(model, 'dataset_meta', None) or {})
    if not meta.get('classes'):
        dataset = (config.get('test_dataloader') or {}).get('dataset') or {}
        meta.update(dataset.get('metainfo') or {} if isinstance(dataset, Mapping) else {})
    labels = getattr(getattr(model, 'config', None), 'id2label', None)
    if not meta.get('classes') and isinstance(labels, Mapping) and library_of(model) == 'transformers':
        names = [str(labels[number]) for number in sorted(labels)]
        if names != [f'LABEL_{number}' for number in range(len(names))]:  # what a config without names has
            meta['classes'] = names
    if known.classes is not None:
        meta['classes'] = list(known.classes)
    return {name: list(meta[name]) for name in ('classes', 'palette') if meta.get(name)}
