# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Data-free settings of a config: ``dfq='psaq_v2'``, or a dict of settings that differ from a method's."""

import copy
import functools
from typing import Any, Dict, Mapping, Union

from psaq_mm.engine.methods import METHODS, method_of
from psaq_mm.engine.samples import is_named
from psaq_mm.engine.settings import GROUPS
from psaq_mm.errors import ConfigError, nearest

__all__ = ['DFQ_DEFAULTS', 'current_names', 'preset_name', 'resolve_dfq', 'with_method']

DfqConfig = Union[None, str, Mapping]
"""A config's ``dfq`` key: None, the name of a method, or a dict that may hold ``preset=`` beside other settings."""

DFQ_DEFAULTS: Dict[str, Any] = {
    'method': 'psaq_v2',
    'generator': dict(type='psaq_mm.SampleGenerator', init='pink', steps=50),
    'teacher': dict(checkpoint=None, sha256=None),
    **{name: value for group in GROUPS for name, value in group.defaults().items()},
}
"""All settings with their defaults; descriptions are in docs/reference/settings.md."""

_MERGED = ('generator', 'teacher')
"""Settings that are dicts, of which a config may give some keys."""

_KEPT = (
    'size',
    'value_range',
    'batch_size',
    'seed',
    'log_interval',
    'checkpoint_interval',
    'keep_checkpoints',
    'sheet_interval',
    'save_samples',
    'teacher',
)
"""Settings of the input and the machine: a method that does not train takes these alone from a config."""


def preset_name(dfq: DfqConfig) -> str:
    """The method that a config's ``dfq`` key starts from."""
    return dfq if isinstance(dfq, str) else (dfq or {}).get('preset', 'psaq_v2')


def resolve_dfq(dfq: DfqConfig) -> Dict[str, Any]:
    """Complete a config's ``dfq`` key: all settings by name.

    Raises:
        ConfigError: An unknown method or setting, with the nearest known name, or a former setting that is gone.
    """
    preset = preset_name(dfq)
    if preset not in METHODS:
        raise ConfigError(f'dfq preset {preset!r} is not known: {nearest(preset, METHODS)}')
    usual = METHODS[preset].settings
    settings = copy.deepcopy(DFQ_DEFAULTS)
    for layer in (usual, current_names(_settings_in(dfq), usual)):
        for key, value in layer.items():
            if key not in settings:
                raise ConfigError(f'dfq.{key} is no setting: {nearest(key, settings)}')
            merged = key in _MERGED and isinstance(value, Mapping)
            settings[key] = {**settings[key], **value} if merged else copy.deepcopy(value)
    return settings


def _settings_in(dfq: DfqConfig) -> Dict[str, Any]:
    return {k: v for k, v in dfq.items() if k != 'preset'} if isinstance(dfq, Mapping) else {}


# ---------------------------------------------------------------------- earlier names
def current_names(settings: Mapping[str, Any], usual: Mapping[str, Any] = DFQ_DEFAULTS) -> Dict[str, Any]:
    """Settings with earlier keys and values turned into today's; each that changes is logged once.

    ``source='pink'`` is ``samples='pink'``. ``fresh=1.0``, ``fresh=dict(share=1.0, samples=...)`` are ``fresh=True``
    and ``samples``. ``joint_lr=0``, ``prior_rows=None`` and the values of ``damping`` that methods had are left out.

    Args:
        settings: As a config gives them.
        usual: Settings of the method that they are laid over. Defaults to those of ``psaq_v2``.

    Raises:
        ConfigError: A setting that is gone, or two keys contradict each other.
    """
    settings = dict(settings)
    if settings.get('joint_lr'):
        raise ConfigError(
            f'dfq.joint_lr={settings["joint_lr"]} is no longer supported, samples move in rounds only: leave it out'
        )
    settings.pop('joint_lr', None)
    if 'damping' in settings:
        damping = settings.pop('damping')
        if damping not in (0.1, 0.3):  # what methods had
            raise ConfigError(
                f'dfq.damping={damping} is no longer supported, the damping of a layer is dfq.prior_rows / its rows: '
                'set dfq.prior_rows'
            )
        _log_once(f'dfq.damping={damping} is left out: the damping of a layer is dfq.prior_rows / its rows now')
    if settings.get('prior_rows', 0) is None:  # formerly: dfq.damping
        del settings['prior_rows']
    usual_samples = usual.get('samples', DFQ_DEFAULTS['samples'])
    if isinstance(settings.get('fresh'), Mapping):
        settings.update(_fresh_of(settings['fresh'], settings.get('samples'), usual_samples))
    if 'fresh' in settings:
        settings['fresh'] = _switch(settings['fresh'])
    source = settings.pop('source', None)
    if 'samples' in settings and settings['samples'] is None:
        # Formerly None: what source names. A method's own source was given as samples where it is a dict.
        settings['samples'] = usual_samples if isinstance(usual_samples, str) and source is None else 'generated'
    if source is None:
        return settings
    samples = settings.get('samples', usual_samples)
    if source == 'generated':
        samples = source if is_named(samples) else samples
    elif samples in ('generated', usual_samples, source):
        samples = source
    else:
        raise ConfigError(
            f'dfq.samples={samples} and dfq.source={source!r} contradict each other: leave dfq.source out'
        )
    _log_once(f'dfq.source={source!r} is an earlier name of dfq.samples, which is {samples!r} now')
    return dict(settings, samples=samples)


def _fresh_of(fresh: Mapping[str, Any], samples: Any, own: Any) -> Dict[str, Any]:
    """``fresh`` and ``samples`` in place of the earlier dict with both."""
    for key in fresh:
        if key not in ('share', 'samples'):
            raise ConfigError(f'dfq.fresh has the key {key!r}, which is not known: set dfq.fresh=True or False')
    result = dict(fresh=fresh.get('share', 1.0))
    source = fresh.get('samples')
    if source is not None:
        if samples not in (None, 'generated', own, source):
            raise ConfigError(
                f'dfq.fresh.samples={source} and dfq.samples={samples} contradict each other, all samples come from '
                'one source now: set dfq.fresh=True and dfq.samples'
            )
        _log_once(f'dfq.fresh.samples is an earlier name of dfq.samples: all samples come from {source}')
        result['samples'] = source
    return result


def _switch(fresh: Any) -> bool:
    if isinstance(fresh, (bool, int, float)) and fresh in (0, 1):
        return bool(fresh)
    raise ConfigError(
        f'dfq.fresh={fresh!r} must be True (every batch of the student is made anew, from dfq.samples) or False: a '
        'share of a batch is no longer supported'
    )


@functools.lru_cache(maxsize=None)
def _log_once(line: str) -> None:
    from mmengine.logging import print_log

    print_log(line)


# ---------------------------------------------------------------------- another method
def _changes(dfq: DfqConfig) -> Dict[str, Any]:
    """The settings of ``dfq`` that differ from its own method's: a config in a work dir holds every setting."""
    if not isinstance(dfq, Mapping):
        return {}
    usual = resolve_dfq(preset_name(dfq))
    settings = current_names(_settings_in(dfq), METHODS[preset_name(dfq)].settings)
    changed = {key: value for key, value in settings.items() if key not in usual or value != usual[key]}
    for key in _MERGED:
        if isinstance(changed.get(key), Mapping):
            changed[key] = {k: v for k, v in changed[key].items() if k not in usual[key] or v != usual[key][k]}
    return changed


def with_method(dfq: DfqConfig, method: str) -> Dict[str, Any]:
    """A config's ``dfq`` key under another method.

    A method that trains keeps the settings of the config, except for those that define the method. A method that does
    not keeps those of the input and the machine (size, range, batches, seed, intervals), ``generator.batch_size``, and
    the path of saved samples.

    Args:
        dfq: As for :func:`resolve_dfq`.
        method: Name of a registered method.

    Raises:
        ConfigError: The method is not known.
    """
    target, changed = method_of(method), _changes(dfq)
    if target.trains:
        defining = target.settings.keys() - set(_MERGED)
        return {**{key: value for key, value in changed.items() if key not in defining}, 'preset': method}
    kept = {key: changed[key] for key in _KEPT if key in changed}
    samples = changed.get('samples')
    if target.reuses_samples and isinstance(samples, str) and not is_named(samples):
        kept['samples'] = samples
    batch = (changed.get('generator') or {}).get('batch_size')
    return {**kept, 'preset': method, **(dict(generator=dict(batch_size=batch)) if batch else {})}
