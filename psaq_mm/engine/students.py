# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A student's checkpoint says how it was quantized. A config or command line may repeat that, but not contradict it."""

import copy
import os
import re
from typing import Any, Dict, Mapping, Optional

from mmengine.config import Config

from psaq_mm.engine.config import is_quantized_config, preset_of, quant_holder, quantized_model_config
from psaq_mm.errors import CheckpointError, ConfigError, first_of
from psaq_mm.quantization import QuantSpec

__all__ = ['config_of_student', 'spec_in']

_QUANT_OPTION = re.compile(r'model\.(?:backbone\.)?quant(?:\.|$)')


def spec_in(checkpoint: Mapping) -> Optional[QuantSpec]:
    """The spec in the metadata of a ``student.pth``; None for other checkpoints."""
    settings = (checkpoint['meta'].get('psaq_mm') or {}).get('quant')
    return QuantSpec.from_dict(settings) if settings else None  # settings newer than the student have their defaults


def config_of_student(
    config: Config,
    checkpoint: Mapping,
    source: str,
    quant: Optional[str] = None,
    method: Optional[str] = None,
    options: Optional[Mapping] = None,
) -> Config:
    """A config whose model is quantized as a student was.

    Args:
        config: Of a full-precision or a quantized model. Its ``quant`` is for the next student; where it differs from
            this one's, a line says so.
        checkpoint: As read by :func:`psaq_mm.engine.checkpoint.read_checkpoint`. Without a spec in it the config is
            returned as it is.
        source: Path of the checkpoint, for messages.
        quant: ``--quant`` of the command line.
        method: ``--method`` of the command line.
        options: ``--cfg-options`` of the command line.

    Raises:
        CheckpointError: The command line asks for another spec than the student's.
    """
    spec = spec_in(checkpoint)
    if spec is None:
        return config
    _check_command_line(spec, source, quant, method, options or {})
    is_quantized = is_quantized_config(config.model)
    in_config = QuantSpec.parse(quant_holder(config.model).get('quant', 'w8a8')) if is_quantized else spec
    if in_config != spec and not (quant or method) and os.environ.get('RANK', '0') == '0':
        print(
            f'{source} was quantized as {spec.label} with {_differences(spec, in_config)}: the student is taken as it '
            'was made',
            flush=True,
        )
    config = copy.deepcopy(config)
    config.model = quantized_model_config(config, None if is_quantized else 'w8a8')
    quant_holder(config.model)['quant'] = spec.to_dict()
    return config


def _differences(spec: QuantSpec, other: QuantSpec, whose: str = 'the config has') -> str:
    ours, theirs = spec.to_dict(), other.to_dict()
    return first_of([f'{key}={ours[key]!r} ({whose} {theirs[key]!r})' for key in ours if ours[key] != theirs[key]])


def _check_command_line(
    spec: QuantSpec, source: str, quant: Optional[str], method: Optional[str], options: Mapping
) -> None:
    """Refuse options that ask for another spec than the student's."""
    fields = spec.to_dict()
    if quant or method:
        fields.update(_fields_of(preset_of(quant or f'w{spec.w_bits}a{spec.a_bits}', method), spec.target))
    options = {key: value for key, value in options.items() if _QUANT_OPTION.match(key)}
    for asked in [fields, *(_merged(fields, key, value) for key, value in options.items())]:
        other = QuantSpec.from_dict(asked)
        if other != spec:
            raise CheckpointError(
                f'{source} was quantized as {spec.label} with {_differences(spec, other, "the command says")}: leave '
                '--quant, --method and quant in --cfg-options out, the student knows how it was made'
            )


def _merged(spec: Mapping, key: str, value: Any) -> Dict[str, Any]:
    """The fields of a spec, with one of ``--cfg-options`` merged into them."""
    config = Config(dict(quant=copy.deepcopy(dict(spec))))
    try:
        config.merge_from_dict({'.'.join(key.split('.')[key.split('.').index('quant') :]): value})
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(
            f'--cfg-options {key}={value!r} does not fit how the student was quantized ({error}): leave it out'
        ) from error
    fields = config.quant if isinstance(config.quant, Mapping) else dict(preset=config.quant)
    preset = fields.pop('preset', None)
    target = fields.get('target', spec.get('target'))
    return {**spec, **fields, **(_fields_of(preset, target) if preset else {})}


def _fields_of(preset: str, target: Optional[str] = None) -> Dict[str, Any]:
    """The fields that a preset sets: its bits, and those in which its recipe differs from the defaults."""
    spec = QuantSpec.parse(dict(preset=preset, target=target))
    bits = re.search(r'w\d+a\d+$', preset, re.IGNORECASE)[0]
    plain = QuantSpec.parse(dict(preset=bits, target=target)).to_dict()
    return {key: value for key, value in spec.to_dict().items() if key in ('w_bits', 'a_bits') or value != plain[key]}
