# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The registry of sources, and the one function that turns what a config says into a source."""

import os
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Type, TypeVar, Union

from psaq_mm.errors import ConfigError, nearest
from psaq_mm.pictures.base import Source
from psaq_mm.type_names import type_name

__all__ = ['SOURCES', 'SourceConfig', 'register_source', 'source_names', 'source_of']

SourceConfig = Union[str, Mapping, Sequence, Source]
"""What a config may say where a source is asked for; see :func:`source_of`."""

S = TypeVar('S', bound=Type[Source])

SOURCES: Dict[str, Type[Source]] = {}
"""Classes of sources by class name, and by short name where they have one."""


def register_source(name: str = '') -> Callable[[S], S]:
    """Class decorator: configs can name the source.

    Args:
        name: Short name of the source with its default settings, such as ``'pink'``. Empty if it needs settings.

    Example:
        >>> @register_source('grey')
        ... class Grey(Source):
        ...     def picture(self, size, image_spec, generator):
        ...         return torch.zeros(image_spec.channels, *size)
        >>> source_of('grey')
        Grey(seed=0)
    """

    def register(cls: S) -> S:
        SOURCES[cls.__name__] = cls
        if name:
            SOURCES[name] = cls
        return cls

    return register


def source_names() -> List[str]:
    """Short names: each stands for a source with its default settings."""
    return [name for name, cls in SOURCES.items() if name != cls.__name__]


def source_of(config: SourceConfig, find: Callable[[str], Any] = lambda name: None) -> Source:
    """Build a source out of what a config says.

    Args:
        config: A short name (:func:`source_names`); ``dict(type='psaq_mm.PinkNoise', ...)``; the path of a folder of
            images or of a ``samples.pt``; a list of these, which is a mixture in which a dict may hold its ``weight``
            (1 by default); or a source, which is returned.
        find: Looks up a type that is not registered here; returns a class or None. The engine passes the lookup of
            OpenMMLab's registry.

    Raises:
        ConfigError: It is none of these.
        DataError: A setting of a source is out of range.

    Example:
        >>> source_of([dict(type='psaq_mm.PinkNoise', weight=3), dict(type='psaq_mm.DeadLeaves')]).weights
        [0.75, 0.25]
    """
    if isinstance(config, Source):
        return config
    if isinstance(config, str):
        if config in SOURCES:
            return _built(SOURCES[config], {})
        if 'Folder' in SOURCES and os.path.exists(config):
            return _built(SOURCES['Folder'], dict(path=config))
        raise ConfigError(
            f'{config!r} is no source of samples, and no such file exists: {nearest(config, source_names())}, a dict '
            "such as dict(type='psaq_mm.PinkNoise'), or the path of a folder of images"
        )
    if isinstance(config, Mapping):
        settings = {key: value for key, value in config.items() if key not in ('type', 'weight')}
        cls = _class_of(config, find)
        if settings.get('sources'):
            settings['sources'] = [source_of(member, find) for member in settings['sources']]
        return _built(cls, settings)
    if isinstance(config, Sequence):
        weights = [member.get('weight', 1.0) if isinstance(member, Mapping) else 1.0 for member in config]
        return SOURCES['Mixture'](sources=[source_of(member, find) for member in config], weights=weights)  # type: ignore
    raise ConfigError(
        f"{config!r} is no source of samples: give a name, a dict such as dict(type='psaq_mm.PinkNoise'), or a list "
        'of dicts'
    )


def _class_of(config: Mapping, find: Callable[[str], Any]) -> Type[Source]:
    kind: Any = config.get('type')
    if not kind:
        raise ConfigError(f"{dict(config)} is no source of samples: it lacks its type, such as 'psaq_mm.PinkNoise'")
    name = type_name(kind)
    cls: Optional[Any] = kind if isinstance(kind, type) else SOURCES.get(name) or find(str(kind))
    if isinstance(cls, type) and issubclass(cls, Source):
        return cls
    shown = '' if cls is None else f' ({cls!r})'
    known = [key for key, source in SOURCES.items() if key == source.__name__]
    raise ConfigError(f'type={kind!r}{shown} is no source of samples: {nearest(name, known)}')


def _built(cls: Type[Source], settings: Mapping[str, Any]) -> Source:
    for name in settings:
        if name in cls.fixed:
            raise ConfigError(
                f'{name} of {cls.__name__} can no longer be set, it is a constant of {cls.__module__}: leave it out'
            )
    try:
        return cls(**settings)
    except TypeError as error:
        raise ConfigError(f'{cls.__name__} does not take these settings ({error}): see its documentation') from error
