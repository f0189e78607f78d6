# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A student knows how it was quantized: what a config and a command line say of that is asked only whether it
contradicts.
"""

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
    """The spec that a ``student.pth`` says it was made with; None where it says nothing, as other checkpoints do."""
    made = (checkpoint['meta'].get('psaq_mm') or {}).get('quant')
    return QuantSpec.from_dict(made) if made else None  # a setting that came later has its default there


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
        config: Loaded, of a full-precision or a quantized model. What it says under ``quant`` is how the next student
            would be made: where this one was made otherwise, a line says so.
        checkpoint: As read by :func:`psaq_mm.engine.checkpoint.read_checkpoint`. One that tells no spec leaves the
            config as it is.
        source: Its path, for messages.
        quant, method, options: ``--quant``, ``--method`` and ``--cfg-options`` as they were given.

    Raises:
        CheckpointError: What was given says another spec than the student's.
    """
    made = spec_in(checkpoint)
    if made is None:
        return config
    _check_stated(made, source, quant, method, options or {})
    own = (
        QuantSpec.parse(quant_holder(config.model).get('quant', 'w8a8')) if is_quantized_config(config.model) else made
    )
    if own != made and not (quant or method) and os.environ.get('RANK', '0') == '0':
        print(
            f'{source} was quantized as {made.label} with {_differences(made, own)}: the student is taken as it was '
            f'made',
            flush=True,
        )
    config = copy.deepcopy(config)
    config.model = quantized_model_config(config, 'w8a8' if not is_quantized_config(config.model) else None)
    quant_holder(config.model)['quant'] = made.to_dict()
    return config


def _differences(made: QuantSpec, other: QuantSpec, whose: str = 'the config has') -> str:
    made, other = made.to_dict(), other.to_dict()
    odd = [f'{key}={made[key]!r} ({whose} {other[key]!r})' for key in made if made[key] != other[key]]
    return first_of(odd)


def _check_stated(made: QuantSpec, source: str, quant: Optional[str], method: Optional[str], options: Mapping) -> None:
    said = {
        **made.to_dict(),
        **(_fields_of(preset_of(quant or f'w{made.w_bits}a{made.a_bits}', method)) if quant or method else {}),
    }
    options = {key: value for key, value in options.items() if _QUANT_OPTION.match(key)}
    for said in [said, *(_merged(said, key, value) for key, value in options.items())]:
        said = QuantSpec.from_dict(said)
        if said != made:
            raise CheckpointError(
                f'{source} was quantized as {made.label} with {_differences(made, said, "the command says")}: leave '
                '--quant, --method and quant in --cfg-options out, the student knows how it was made'
            )


def _merged(spec: Mapping, key: str, value: Any) -> Dict[str, Any]:
    """A spec with what one of ``--cfg-options`` says of it."""
    config = Config(dict(quant=copy.deepcopy(dict(spec))))
    try:
        config.merge_from_dict({'.'.join(key.split('.')[key.split('.').index('quant') :]): value})
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(
            f'--cfg-options {key}={value!r} does not fit how the student was quantized ({error}): leave it out'
        ) from error
    found = config.quant if isinstance(config.quant, Mapping) else dict(preset=config.quant)
    preset = found.pop('preset', None)
    return {**spec, **found, **(_fields_of(preset) if preset else {})}


def _fields_of(preset: str) -> Dict[str, Any]:
    """What a preset says: its bits, and what its recipe has else than the defaults."""
    spec, bits = QuantSpec.parse(preset), re.search(r'w\d+a\d+$', preset, re.IGNORECASE)[0]
    plain = QuantSpec.parse(bits).to_dict()
    return {key: value for key, value in spec.to_dict().items() if key in ('w_bits', 'a_bits') or value != plain[key]}
