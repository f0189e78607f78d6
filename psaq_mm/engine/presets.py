# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Named sets of data-free settings, so that a config elsewhere can say ``dfq='psaq_v2'`` without inheriting our files."""
import copy
import difflib
from typing import Any, Dict, Mapping, Union

from psaq_mm.errors import ConfigError

__all__ = ['DFQ_DEFAULTS', 'DFQ_PRESETS', 'resolve_dfq']

DFQ_DEFAULTS: Dict[str, Any] = dict(
    method='psaq_v2',
    generator=dict(type='psaq_mm.SampleGenerator', init='pink', steps=50),
    size=None,  # (height, width); None: from the config's data_preprocessor or test pipeline
    batch_size=8,
    calibration_samples=32,
    pool_size=128,
    evolve_every=50,
    evolve_samples=16,
    source='generated',
    reobserve=True,
    augment=True,
    distil=('backbone', 'neck'),
    iters=200,
    lr=1e-4,
    clip_grad=1.0,
    seed=0,
    log_interval=10,
    checkpoint_interval=50,
    keep_checkpoints=2,
    sheet_interval=50,
    teacher=dict(checkpoint=None, sha256=None),
)

DFQ_PRESETS: Dict[str, Dict[str, Any]] = {
    'psaq_v2': dict(),
    # Controls: ranges from noise through the same quantizer, nothing trained.
    'gaussian': dict(method='gaussian', source='gaussian', iters=0, evolve_every=0),
    # Ranges from samples of the patch similarity alone, nothing trained: V2 without its second half.
    'calibrate': dict(method='calibrate', iters=0, evolve_every=0),
}


def resolve_dfq(given: Union[None, str, Mapping]) -> Dict[str, Any]:
    """Complete a config's ``dfq`` key.

    Args:
        given: None, the name of a preset, or a dict that may hold ``preset=`` beside the settings that differ.

    Raises:
        ConfigError: An unknown preset or setting, with the nearest known name.
    """
    given = dict(preset=given) if isinstance(given, str) else dict(given or {})
    preset = given.pop('preset', 'psaq_v2')
    if preset not in DFQ_PRESETS:
        raise ConfigError(f'dfq preset {preset!r} is not known: use one of {", ".join(DFQ_PRESETS)}')
    settings = copy.deepcopy(DFQ_DEFAULTS)
    for source in (DFQ_PRESETS[preset], given):
        for key, value in source.items():
            if key not in settings:
                near = difflib.get_close_matches(key, settings, 1)
                hint = f'did you mean {near[0]}?' if near else f'known are {", ".join(settings)}'
                raise ConfigError(f'dfq.{key} is no setting: {hint}')
            if isinstance(settings[key], dict) and isinstance(value, Mapping):
                settings[key] = {**settings[key], **value}
            else:
                settings[key] = value
    return settings
