# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The registry of methods: ``dfq='fast'`` in a config, ``--method fast`` on a command line.

A method is one frozen dataclass: its data-free settings, and the recipe of its quantizer. A config registers one of its
own from a module that its ``custom_imports`` names::

    from psaq_mm.engine.methods import Method, register_method

    register_method(Method('mine', 'Scenes set the ranges.', dict(samples='scenes'), trains=False))
"""

import dataclasses
from types import MappingProxyType
from typing import Any, Dict, Mapping

from psaq_mm.errors import ConfigError, nearest

__all__ = ['METHODS', 'Method', 'method_of', 'register_method']


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to quantize a model without data, or a control that it is compared with.

    Args:
        name: What configs and command lines call it.
        description: One line for tables and help.
        settings: Data-free settings that differ from their defaults (:data:`psaq_mm.engine.presets.DFQ_DEFAULTS`).
        trains: Whether the student is trained. A method that does not takes no training settings from a config.
        recipe: Recipe of its quantizer (:data:`psaq_mm.quantization.RECIPES`).
        low_bit_recipe: Recipe where activations have fewer than 8 bits. Empty: the same.
        published: The paper; empty for this project's own methods.
        reuses_samples: Whether saved samples of a config (a path in ``dfq.samples``) take the place of its own.
    """

    name: str
    description: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    trains: bool = True
    recipe: str = 'psaq_v2'
    low_bit_recipe: str = ''
    published: str = ''
    reuses_samples: bool = True

    def __post_init__(self) -> None:
        untrained = {} if self.trains else dict(iters=0, evolve_every=0)
        settings = {'method': self.name, **untrained, **self.settings}
        object.__setattr__(self, 'settings', MappingProxyType(settings))

    def recipe_for(self, a_bits: int) -> str:
        """Recipe of the quantizer at a number of bits of activations."""
        return self.low_bit_recipe if self.low_bit_recipe and a_bits < 8 else self.recipe


METHODS: Dict[str, Method] = {}
"""All registered methods by name."""


def register_method(method: Method) -> Method:
    """Make a method known to configs and command lines, in place of one of the same name."""
    METHODS[method.name] = method
    return method


def method_of(name: str) -> Method:
    """A method by name.

    Raises:
        ConfigError: No such method, with the most similar name.
    """
    if name not in METHODS:
        raise ConfigError(f'the method {name!r} is not known: {nearest(name, METHODS)}')
    return METHODS[name]


# ---------------------------------------------------------------------- published methods
register_method(
    Method(
        'psaq_v1',
        'Synthesized samples set the ranges; as the released code of PSAQ-ViT.',
        # lr=None is 0.20 for ViT and DeiT, 0.25 for Swin. Token 0 is dropped on every model, also on Swin, which has no
        # class token: the released code does. Detectors and segmentors have no class: there it runs class-free.
        dict(
            calibration_samples=32,
            reobserve=False,
            classes='random',
            generator=dict(
                batch_size=32,
                steps=500,
                rounds=2,
                lr=None,
                betas=(0.5, 0.9),
                warmup=0.2,
                entropy_weight=1.0,
                prior_weight=0.05,
                class_weight=1.0,
                discrepancy_weight=0.0,
                variation=(2500.0, 3000.0),
                jitter=(15, 30),
                flip=0.5,
                init='gaussian',
                drop_tokens=1,
                points=10,
                bandwidth=0.01,
                value_range=None,
            ),
        ),
        trains=False,
        recipe='psaq_v1',
        published='arXiv 2203.02250',
    )
)
register_method(
    Method(
        'psaq_v2',
        'Synthesized samples and the student evolve against each other.',
        published='arXiv 2209.05687',
    )
)
register_method(
    Method(
        'repq',
        "Real images set the ranges (dfq.samples='generated': synthesized ones); LayerNorm scales are reparameterized.",
        # Ranges are not observed again later: each time would fold them into the LayerNorms anew.
        dict(samples='real', calibration_samples=32, reobserve=False),
        trains=False,
        recipe='repq',
        published='arXiv 2212.08254',
    )
)
register_method(
    Method('repq_v2', "RepQ-ViT's quantizer under V2's training.", dict(reobserve=False), recipe='repq'),
)

# ---------------------------------------------------------------------- this project's methods
_LEAVES = dict(type='psaq_mm.DeadLeaves', exponent=2.0, radius=(3.0, 0.5), color_blur=5)
"""Dead leaves with more large ones than natural pictures' x ** -3 has, and colour coarser than brightness:
docs/method.md."""

_ROUNDED = dict(rounding='auto', rotate=True, fresh=True, reobserve=False)

register_method(
    Method(
        'fast',
        'Dead leaves set the ranges and the codes of the weights; nothing is synthesized or trained.',
        dict(_ROUNDED, samples=_LEAVES, calibration_samples=32, pool_size=32),
        trains=False,
        # With one range a tensor, the LayerNorm outputs of a DeiT lose all accuracy at 4 bits.
        low_bit_recipe='repq',
        reuses_samples=False,
    )
)
register_method(
    Method(
        'best',
        'As fast, on more pictures of two kinds.',
        # V2's samples beside dead leaves in their place are worse at W3A8 and no better at W4A8, so nothing is
        # synthesized (docs/history/results_synthesis.md). Nothing is trained either: after guided rounding a student
        # that learns on samples agrees less with photographs (docs/method.md). With iters=N given, gains, offsets and
        # biases learn and the codes stay.
        dict(
            _ROUNDED,
            samples=[dict(type='psaq_mm.Scenes', color_blur=5), dict(_LEAVES, weight=2)],
            calibration_samples=96,
            pool_size=96,
            lr=0.0,
            vector_lr=1e-3,
        ),
        trains=False,
        low_bit_recipe='repq',
    )
)

# ---------------------------------------------------------------------- controls
register_method(Method('gaussian', 'Gaussian noise sets the ranges.', dict(samples='gaussian'), trains=False))
register_method(
    Method('calibrate', "V2's samples set the ranges, without competition; nothing is trained.", trains=False)
)
