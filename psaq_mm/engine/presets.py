# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Named sets of data-free settings, so that a config elsewhere can say ``dfq='psaq_v2'`` without inheriting our
files.
"""

import copy
from typing import Any, Dict, Mapping, NamedTuple, Union

from psaq_mm.errors import ConfigError, nearest

__all__ = ['DFQ_DEFAULTS', 'DFQ_PRESETS', 'Fresh', 'METHODS', 'preset_name', 'recipe_of', 'resolve_dfq', 'with_method']

DFQ_DEFAULTS: Dict[str, Any] = dict(
    method='psaq_v2',
    generator=dict(type='psaq_mm.SampleGenerator', init='pink', steps=50),
    size=None,  # (height, width); None: from the config's data_preprocessor or test pipeline
    # (low, high): what pictures hold as they are loaded, before mean and std, each a number or a list of one per
    value_range=None,
    # channel; None: 0 to 255, refused where mean, std or the pipeline contradict it
    batch_size=8,
    calibration_samples=32,
    pool_size=128,
    evolve_every=50,
    evolve_samples=16,
    source='generated',
    # a source, as a dict or a list of dicts (a mixture), in place of one named by source; or the path of a samples.pt
    samples=None,
    # or of a folder of images: the first samples, instead of making them
    # share of each of the student's batches that is made for it instead of drawn from the pool; or dict(share=,
    # samples=)
    fresh=0.0,
    save_samples=False,  # samples.pt and samples/NNNN.png in the work dir
    reobserve=True,
    # or 'compensated': weights rounded so that errors of correlated inputs cancel, on the first samples;
    rounding='nearest',
    # 'guided': compensated, most where the model's outputs feel it; 'auto': guided below 8 bits, compensated at 8
    damping=0.1,  # of the compensated rounding
    # of the guided rounding, in place of damping: a layer's damping is prior_rows / the rows that count in it
    prior_rows=None,
    # the coordinates of streams and heads, at random, before anything is quantized: the same model in full precision
    rotate=False,
    logits_weight=0.0,  # of the divergence of a classifier's probabilities, beside the discrepancy
    # how far samples move in the student's own steps, in standard units, instead of in rounds of synthesis
    joint_lr=0.0,
    augment=True,
    classes=None,  # 'random': one class a sample, for classifiers
    distil=None,  # parts of the model, see psaq_mm.models.task.PARTS; None: chosen by the model
    block_stride=3,  # of the part 'blocks'
    iters=200,
    max_seconds=None,  # wall time of the run, samples included: the student's steps and their learning rate end with it
    lr=1e-4,  # of the weights; 0 leaves them at their first codes
    vector_lr=None,  # of biases and of the normalization layers' gains and offsets; None: as lr
    range_lr=0.0,  # of the logarithms of the activations' scales, learned with the weights; 0 leaves them as calibrated
    clip_grad=1.0,
    accumulative_counts=1,  # batches of batch_size that one student step is made of, one after the other
    amp=None,  # 'bfloat16' or 'float16': the student's steps under autocast; quantizers stay in float32
    seed=0,
    log_interval=10,
    checkpoint_interval=50,
    keep_checkpoints=2,
    sheet_interval=50,
    teacher=dict(checkpoint=None, sha256=None),
)

_LEAVES = dict(type='psaq_mm.DeadLeaves', exponent=2.0, radius=(3.0, 0.5), color_blur=5)
"""Dead leaves with more large ones than natural pictures' x ** -3 has, and colour coarser than brightness:
docs/method.md."""

DFQ_PRESETS: Dict[str, Dict[str, Any]] = {
    'psaq_v2': dict(),
    # PSAQ-ViT as its released code makes samples (arXiv 2203.02250), ranges calibrated and nothing trained. Its
    # quantizer is quant='psaq_v1_w8a8'. lr=None is 0.20 for ViT and DeiT, 0.25 for Swin. Token 0 is dropped on every
    # model, also on Swin, which has no class token: the released code does. Detectors and segmentors have no class:
    # there it runs class-free.
    'psaq_v1': dict(
        method='psaq_v1',
        iters=0,
        evolve_every=0,
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
    # RepQ-ViT (arXiv 2212.08254) calibrates on 32 real images; with source='generated' it is data-free. Its quantizer
    # is quant='repq_w4a4'. Ranges are not observed again later: each time would fold them into the LayerNorms anew.
    'repq': dict(method='repq', source='real', iters=0, evolve_every=0, calibration_samples=32, reobserve=False),
    # RepQ's quantizer under V2's training.
    'repq_v2': dict(method='repq_v2', reobserve=False),
    # Controls: ranges from noise through the same quantizer, nothing trained.
    'gaussian': dict(method='gaussian', source='gaussian', iters=0, evolve_every=0),
    # Ranges from samples of the patch similarity alone, nothing trained: V2 without its second half.
    'calibrate': dict(method='calibrate', iters=0, evolve_every=0),
    # No synthesis and no training: dead leaves set the ranges, and the codes of the weights.
    'fast': dict(
        method='fast',
        samples=dict(_LEAVES),
        rounding='auto',
        rotate=True,
        damping=0.3,
        prior_rows=32,
        fresh=1.0,
        iters=0,
        evolve_every=0,
        reobserve=False,
        calibration_samples=32,
        pool_size=32,
    ),
    # More pictures, of two kinds. V2's samples beside dead leaves in their place are worse at W3A8 and no better at
    # W4A8, so nothing is synthesized (docs/results.md); nor is anything trained: after guided rounding a student that
    # learns on samples agrees less with photographs (docs/method.md). With iters=N given, gains, offsets and biases
    # learn and the codes stay.
    'best': dict(
        method='best',
        rounding='auto',
        rotate=True,
        damping=0.3,
        prior_rows=32,
        fresh=1.0,
        iters=0,
        evolve_every=0,
        reobserve=False,
        lr=0.0,
        vector_lr=1e-3,
        calibration_samples=96,
        pool_size=96,
        samples=[dict(type='psaq_mm.Scenes', color_blur=5), dict(_LEAVES, weight=2)],
    ),
}


_MERGED = ('generator', 'teacher')
"""Settings that are dicts, of which a config may give some keys."""


def preset_name(given: Union[None, str, Mapping]) -> str:
    """The preset that a config's ``dfq`` key starts from."""
    return given if isinstance(given, str) else (given or {}).get('preset', 'psaq_v2')


def resolve_dfq(given: Union[None, str, Mapping]) -> Dict[str, Any]:
    """Complete a config's ``dfq`` key.

    Args:
        given: None, the name of a preset, or a dict that may hold ``preset=`` beside the settings that differ.

    Raises:
        ConfigError: An unknown preset or setting, with the nearest known name.
    """
    preset = preset_name(given)
    given = (
        {}
        if given is None or isinstance(given, str)
        else {key: value for key, value in given.items() if key != 'preset'}
    )
    if preset not in DFQ_PRESETS:
        raise ConfigError(f'dfq preset {preset!r} is not known: {nearest(preset, DFQ_PRESETS)}')
    settings, named = copy.deepcopy(DFQ_DEFAULTS), copy.deepcopy(DFQ_PRESETS[preset])
    # Where samples come from is one setting under two names: what is given takes the place of the preset's under
    # either.
    if given.get('samples') is not None:
        named.pop('source', None)
    if given.get('source', 'generated') != 'generated':
        named.pop('samples', None)
    for source in (named, given):
        for key, value in source.items():
            if key not in settings:
                raise ConfigError(f'dfq.{key} is no setting: {nearest(key, settings)}')
            if key in _MERGED and isinstance(value, Mapping):
                settings[key] = {**settings[key], **value}
            else:
                settings[key] = value
    return settings


class Fresh(NamedTuple):
    """``dfq.fresh``: the share of a batch that is made for it, and the config of a source for that, or None."""

    share: float
    samples: Any = None

    @classmethod
    def parse(cls, given: Union[float, Mapping]) -> 'Fresh':
        """Read a number or ``dict(share=..., samples=...)``.

        Raises:
            ConfigError: Another key, or a share that is none.
        """
        settings = dict(given) if isinstance(given, Mapping) else dict(share=given)
        share, samples = settings.pop('share', 1.0), settings.pop('samples', None)
        if settings:
            raise ConfigError(
                f'dfq.fresh has the key {next(iter(settings))!r}, which is not known: give a number, or '
                'dict(share=..., samples=...)'
            )
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ConfigError(f"dfq.fresh={share!r} must be a share of the student's batches, within 0 .. 1")
        return cls(float(share), samples)


METHODS: Dict[str, str] = dict(
    psaq_v1='psaq_v1', psaq_v2='psaq_v2', repq='repq', repq_v2='repq', fast='psaq_v2', best='psaq_v2'
)
"""Published methods, and the steps beyond: each a preset of :data:`DFQ_PRESETS` with the quantizer's recipe that
belongs to it (:data:`psaq_mm.quantization.RECIPES`), at 8-bit activations: see :func:`recipe_of`."""

_UNPUBLISHED = ('fast', 'best')

_OF_THE_MACHINE = (
    'size',
    'value_range',
    'batch_size',
    'seed',
    'log_interval',
    'checkpoint_interval',
    'keep_checkpoints',
    'sheet_interval',
    'save_samples',
    'samples',
    'teacher',
)


def recipe_of(method: str, a_bits: int) -> str:
    """The quantizer's recipe of a method. Those that are no published one take RepQ-ViT's where activations have fewer
    than 8 bits: with one range a tensor the LayerNorm outputs of a DeiT leave nothing of it at 4.
    """
    return 'repq' if method in _UNPUBLISHED and a_bits < 8 else METHODS[method]


def _given_beside(usual: Mapping, given: Mapping) -> Dict[str, Any]:
    """What of ``dfq`` is not as its own preset has it: the config that a run leaves in its work dir holds every
    setting.
    """
    kept = {key: value for key, value in given.items() if key not in usual or value != usual[key]}
    for key in _MERGED:
        if isinstance(kept.get(key), Mapping):
            kept[key] = {k: v for k, v in kept[key].items() if k not in usual[key] or v != usual[key][k]}
    return kept


def with_method(given: Union[None, str, Mapping], method: str) -> Dict[str, Any]:
    """A config's ``dfq`` key under another method.

    A method that trains takes the settings that the config has, but for those that its preset names, which are what it
    is. One that calibrates alone takes those of the input and the machine (size, range, batches, seed, intervals) and
    of the samples' memory (``generator.batch_size``); the others are the method itself.

    Args:
        given: As for :func:`resolve_dfq`.
        method: One of :data:`METHODS`.

    Raises:
        ConfigError: The method is not known.
    """
    if method not in METHODS:
        raise ConfigError(f'the method {method!r} is not known: {nearest(method, METHODS)}')
    given = {} if given is None or isinstance(given, str) else _given_beside(resolve_dfq(preset_name(given)), given)
    if resolve_dfq(method)['iters']:
        own = DFQ_PRESETS[method].keys() - set(_MERGED)
        return {**{key: value for key, value in given.items() if key not in own}, 'preset': method}
    kept = {key: given[key] for key in _OF_THE_MACHINE if key in given}
    # A path holds what a method would make. Another source, which is for a method that trains, is not this one's.
    if method == 'fast' or not isinstance(given.get('samples'), str):
        kept.pop('samples', None)
    batch = (given.get('generator') or {}).get('batch_size')
    return {**kept, 'preset': method, **(dict(generator=dict(batch_size=batch)) if batch else {})}
