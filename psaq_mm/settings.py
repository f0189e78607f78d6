# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Groups of settings: frozen dataclasses whose fields hold the default and the description of each setting.

The fields are the one place where a setting stands. Configs, messages, reports and tables of the docs read them.
"""

import dataclasses
from typing import Any, ClassVar, Dict, Mapping, Optional, Tuple, Type, TypeVar

from psaq_mm.errors import ConfigError, nearest

__all__ = ['Settings', 'read_groups', 'setting']

S = TypeVar('S', bound='Settings')


def setting(default: Any, doc: str) -> Any:
    """A field of :class:`Settings`: its default (never a mutable object) and its description."""
    return dataclasses.field(default=default, metadata={'doc': doc})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of a group. A subclass is a frozen dataclass of :func:`setting` fields. It checks them in ``__post_init__``.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Rounding(Settings):
        ...     kind: str = setting('nearest', 'How weights get their codes.')
        >>> Rounding.from_dict(dict(kind='guided'))
        Rounding(kind='guided')
    """

    prefix: ClassVar[str] = ''
    """How messages name the group, such as ``'dfq.'``."""

    @classmethod
    def names(cls) -> Tuple[str, ...]:
        """Names of all settings of the group."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def defaults(cls) -> Dict[str, Any]:
        """Defaults by name."""
        return {field.name: field.default for field in dataclasses.fields(cls)}

    @classmethod
    def docs(cls) -> Dict[str, str]:
        """Descriptions by name."""
        return {field.name: field.metadata.get('doc', '') for field in dataclasses.fields(cls)}

    @classmethod
    def from_dict(cls: Type[S], given: Optional[Mapping[str, Any]] = None) -> S:
        """Settings out of what a config says; what it leaves out has its default. Lists become tuples.

        Raises:
            ConfigError: A key is unknown (the message names the most similar one), or a value is out of range.
        """
        given = dict(given or {})
        for name in given:
            if name not in cls.names():
                raise ConfigError(f'{cls.prefix}{name} is no setting: {nearest(name, cls.names())}')
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})

    def to_dict(self) -> Dict[str, Any]:
        """Settings by name; groups inside stay groups."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def read_groups(flat: Mapping[str, Any], *groups: Type[Settings]) -> Tuple[Any, ...]:
    """One instance of each group out of settings that a config gives flat: each group takes the keys of its fields.

    Raises:
        ConfigError: No group has the key (the message names the most similar one), or a value is out of range.

    Example:
        >>> loss, schedule = read_groups(dict(prior_weight=0.1, steps=50), Loss, Schedule)
    """
    known = [name for group in groups for name in group.names()]
    for name in flat:
        if name not in known:
            raise ConfigError(f'{groups[0].prefix}{name} is no setting: {nearest(name, known)}')
    return tuple(group.from_dict({k: v for k, v in flat.items() if k in group.names()}) for group in groups)
