# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Value range and normalization of a model's input, read from its config: how pictures are loaded, and how the pipeline
and the data preprocessor normalize them.
"""

import math
from typing import Any, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from mmengine.logging import print_log
from torch import nn

from psaq_mm.engine.data_overlap import dataset_leaves
from psaq_mm.errors import ConfigError, DataError
from psaq_mm.models.task import ModelInput, input_channels
from psaq_mm.pictures import ImageSpec
from psaq_mm.pictures.image_spec import EIGHT_BITS, fits_eight_bits
from psaq_mm.type_names import type_name, type_path

__all__ = ['PipelineInput', 'check_preprocessor', 'read_pipeline', 'set_input_']

Values = Tuple[float, ...]

_ANY_DEPTH = (
    'LoadMultiChannelImageFromFiles',
    'LoadSingleRSImageFromFile',
    'LoadMultipleRSImageFromFile',
    'LoadBiomedicalImageFromFile',
    'LoadBiomedicalData',
)
"""Steps of the libraries that load pictures of any bit depth."""

_NO_VALUES = tuple(
    (
        'Resize Pad Random Center Pack Flip LoadAnn LoadPan LoadProposal LoadEmpty LoadDepth LoadTrack '
        'LoadBiomedicalAnn LoadImageFrom FixScale Collect Transpose ImageToTensor ToTensor KeyMapper FilterAnn '
        'MultiScale PhotoMetric Compose Mosaic NumpyToPIL PILToNumpy GetTaskInfo Rerange'
    ).split()
)
"""Prefixes of the names of steps that leave values as they are, or within 0 .. 255."""


class PipelineInput(NamedTuple):
    """What a pipeline does to the values of a picture.

    Attributes:
        mean: What it subtracts, in the values that pictures are loaded with; empty if it does not normalize.
        std: What it divides by; empty if it does not normalize.
        turned: Whether it reverses the order of the channels.
        deep: The step that may load pictures of more than 8 bits; '' for none.
        unknown: A step that is not known here; '' for none.
        value_range: The range that a step stretches every picture to; None: pictures stay as they are loaded.
    """

    mean: Values = ()
    std: Values = ()
    turned: bool = False
    deep: str = ''
    unknown: str = ''
    value_range: Optional[Tuple[float, float]] = None

    def normalized(self, mean: Sequence[float], std: Sequence[float]) -> 'PipelineInput':
        """The same pipeline with one more normalization at its end."""
        mean, std = _numbers('mean', mean), _numbers('std', std)
        if len(mean) != len(std) or not mean:
            raise ConfigError(
                f'mean={list(mean)} and std={list(std)} of a normalization in the pipeline differ in length: give one '
                'of each per channel'
            )
        if not self.mean:
            return self._replace(mean=mean, std=std)
        count = max(len(mean), len(self.mean))
        one, two, unit, last = (v * count if len(v) == 1 else v for v in (self.mean, mean, self.std, std))
        if {len(one), len(two)} != {count}:
            raise ConfigError(
                f'two normalizations follow each other, of {len(one)} and of {len(two)} channels: give them one number'
            )
        return self._replace(
            mean=tuple(a + b * s for a, b, s in zip(one, two, unit)), std=tuple(s * t for s, t in zip(unit, last))
        )

    def turn(self) -> 'PipelineInput':
        """The same pipeline with the channels reversed at its end: means and deviations are reversed with them."""
        return self._replace(turned=not self.turned, mean=self.mean[::-1], std=self.std[::-1])


def _numbers(name: str, values: Any) -> Values:
    try:
        return tuple(float(v) for v in (values if hasattr(values, '__iter__') else (values,)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f'{name}={values!r} is no list of numbers: give one per channel') from error


# ---------------------------------------------------------------------- pipeline
def _steps(pipeline: Sequence) -> Iterator[Mapping]:
    """The steps of a pipeline, also those nested in others; of alternative branches the first."""
    for step in pipeline:
        if not isinstance(step, Mapping):
            continue
        inner = step.get('transforms')
        if not isinstance(inner, (list, tuple)) or type_name(step) == 'Albu':
            yield step
        elif inner and isinstance(inner[0], (list, tuple)):  # TestTimeAug: each step has alternatives
            yield from _steps([branch[0] for branch in inner if branch])
        else:
            yield from _steps(inner)


def _pipeline_of(config: Mapping) -> List[Mapping]:
    """The steps of the test pipeline; where there is no test set, those of validation or training."""
    for loader in ('test_dataloader', 'val_dataloader', 'train_dataloader'):
        loaders = config.get(loader)
        for settings in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
            for leaf in dataset_leaves((settings or {}).get('dataset')):
                if leaf.get('pipeline'):
                    return list(_steps(leaf['pipeline']))
    return list(_steps(config.get('test_pipeline') or ()))


def _loaded(pipeline: PipelineInput, step: Mapping, name: str) -> PipelineInput:
    color, backend = step.get('color_type', 'color'), step.get('imdecode_backend', 'cv2')
    if name == 'LoadImageFromFile' and backend == 'tifffile':
        return pipeline._replace(deep=f"{name} with imdecode_backend='tifffile'")
    if name == 'LoadImageFromFile' and backend != 'turbojpeg' and color in ('unchanged', 'anydepth', -1, 2):
        return pipeline._replace(deep=f'{name} with color_type={color!r}')
    return pipeline._replace(deep=name) if name in _ANY_DEPTH else pipeline


def _torchvision(pipeline: PipelineInput, step: Mapping, name: str) -> PipelineInput:
    if name == 'ToTensor':
        return pipeline.normalized((0.0,), (255.0,))
    return pipeline.normalized(step['mean'], step['std']) if name == 'Normalize' else pipeline


def _albumentations(pipeline: PipelineInput, step: Mapping) -> PipelineInput:
    for inner in step.get('transforms') or ():
        name, top = type_name(inner), float(inner.get('max_pixel_value', 255.0))
        if name == 'Normalize':
            mean, std = inner.get('mean', (0.485, 0.456, 0.406)), inner.get('std', (0.229, 0.224, 0.225))
            pipeline = pipeline.normalized(
                [v * top for v in _numbers('mean', mean)], [v * top for v in _numbers('std', std)]
            )
        elif name == 'ToFloat':
            pipeline = pipeline.normalized((0.0,), (float(inner.get('max_value') or 255.0),))
    return pipeline


def read_pipeline(config: Mapping) -> PipelineInput:
    """What the steps of a config's test pipeline do to the values of a picture. No file is opened.

    Args:
        config: A whole config.

    Raises:
        ConfigError: A normalization in it is not valid.
    """
    pipeline = PipelineInput()
    for step in _pipeline_of(config):
        library, _, name = type_path(step).replace('/', '.').rpartition('.')
        if 'torchvision' in library.split('.'):
            pipeline = _torchvision(pipeline, step, name)
        elif name == 'Normalize':
            pipeline = pipeline.turn() if step.get('to_rgb', True) else pipeline
            pipeline = pipeline.normalized(step['mean'], step['std'])
        elif name == 'Albu':
            pipeline = _albumentations(pipeline, step)
        elif name == 'NumpyToPIL' and step.get('to_rgb') or name == 'PILToNumpy' and step.get('to_bgr'):
            pipeline = pipeline.turn()
        elif name == 'Rerange':
            pipeline = PipelineInput(
                turned=pipeline.turned, value_range=(float(step.get('min_value', 0)), float(step.get('max_value', 255)))
            )
        elif name.startswith('Load'):
            pipeline = _loaded(pipeline, step, name)
        if (
            not name.startswith(_NO_VALUES)
            and name not in ('Normalize', 'Albu', *_ANY_DEPTH)
            and 'torchvision' not in library.split('.')
        ):
            pipeline = pipeline._replace(unknown=name)
    return pipeline


# ---------------------------------------------------------------------- preprocessor
def check_preprocessor(config: Mapping) -> None:
    """Refuse a ``data_preprocessor`` whose mean and std no library takes, or are not valid.

    Args:
        config: A whole config.

    Raises:
        ConfigError: They differ in length, one of them is absent, or a std is not above 0.
    """
    settings = (config.get('model') or {}).get('data_preprocessor') or config.get('data_preprocessor') or {}
    absent = [name for name in ('mean', 'std') if not isinstance(settings, Mapping) or settings.get(name) is None]
    if len(absent) == 2:
        return
    if absent:
        raise ConfigError(
            f'data_preprocessor.{absent[0]} is not set and the other of mean and std is: give both, or neither'
        )
    mean, std = (_numbers(f'data_preprocessor.{name}', settings[name]) for name in ('mean', 'std'))
    if len(mean) != len(std):
        raise ConfigError(
            f'data_preprocessor.mean has {len(mean)} values and data_preprocessor.std {len(std)}: give one of each per '
            'channel'
        )
    if not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise ConfigError(
            f'data_preprocessor.mean={list(mean)} must be finite and data_preprocessor.std={list(std)} above 0: set '
            'them right'
        )
    name = type_name(settings)
    if name.startswith('Det') and len(mean) not in (1, 3):
        raise ConfigError(
            f'data_preprocessor.mean has {len(mean)} values, and {name} takes 1 or 3: normalize pictures of other '
            "channels by dict(type='Normalize', to_rgb=False) in the pipelines, and leave mean and std out"
        )


# ---------------------------------------------------------------------- both together
def _checked_range(value_range: Any, channels: int) -> Tuple[Any, Any]:
    """``dfq.value_range`` as (low, high), each a number or one per channel."""
    try:
        low, high = value_range
        spec = ImageSpec(channels=channels, max_value=high, min_value=low)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f'dfq.value_range={value_range!r} must be (low, high): the least and greatest value that a picture holds '
            f'before it is normalized, each a number or a list of one per channel (the model takes {channels})'
        ) from error
    return spec.min_value, spec.max_value


def _check_range(pipeline: PipelineInput, in_pipeline: bool) -> None:
    """Raise where pictures cannot be of 8 bits; say so where they may not be."""
    way_out = 'set dfq.value_range=(low, high), the least and greatest value that a picture holds as it is loaded'
    if pipeline.mean and not fits_eight_bits(pipeline.mean, pipeline.std):
        where = 'the pipeline and the data preprocessor' if in_pipeline else 'the data preprocessor'
        mean, std = ([float(f'{v:g}') for v in values] for values in (pipeline.mean, pipeline.std))
        raise ConfigError(
            f'{where} normalize{"" if in_pipeline else "s"} with mean={mean} and std={std}, which are not of pictures '
            f'with values 0 to 255: {way_out}'
        )
    statistics = any(pipeline.mean)
    if pipeline.deep and not statistics:
        raise ConfigError(f'{pipeline.deep} may load pictures of 8 bits or of more, and no mean tells which: {way_out}')
    if pipeline.deep or pipeline.unknown and not statistics:
        what = pipeline.deep or f'the step {pipeline.unknown} of the pipeline'
        print_log(f'Pictures are taken to hold values 0 to 255, which {what} leaves open: else {way_out}', 'current')


def set_input_(model: nn.Module, config: Mapping, value_range: Any = None, strict: bool = True) -> ModelInput:
    """Find the range and normalization of a model's input, and keep them as ``model.psaq_mm_input``, which
    :class:`psaq_mm.models.TaskModel` and the export read.

    Args:
        model: Built from the config.
        config: A whole config. Its test pipeline says how pictures are loaded and normalized before the model's own
            ``data_preprocessor``.
        value_range: Least and greatest value of pictures as they are loaded, before any normalization. Each is a
            number, or one per channel in the model's order. Defaults to None: 0 to 255, if nothing contradicts it.
        strict: Whether a contradiction to 0 to 255 is an error. False: the range is two standard deviations about the
            mean.

    Raises:
        ConfigError: The range is not known, not a range, or mean and std do not fit the model's channels.
    """
    preprocessor, pipeline = getattr(model, 'data_preprocessor', None), read_pipeline(config)
    in_pipeline, channels = bool(pipeline.mean), input_channels(model)
    turned, statistics = pipeline.turned, [getattr(preprocessor, name, None) for name in ('mean', 'std')]
    flips = any(getattr(preprocessor, n, False) for n in ('_channel_conversion', 'channel_conversion', 'to_rgb'))
    pipeline = pipeline.turn() if flips and len(pipeline.mean) == 3 else pipeline
    if all(v is not None and len(v) for v in statistics):
        pipeline = pipeline.normalized(*(v.flatten().tolist() if hasattr(v, 'flatten') else v for v in statistics))
    # YOLOX makes one pixel of four first
    if len(pipeline.mean) > 1 and channels not in (len(pipeline.mean), 4 * len(pipeline.mean)):
        where = 'Normalize in the pipeline' if in_pipeline else 'data_preprocessor.mean'
        raise ConfigError(
            f'{where} has {len(pipeline.mean)} values and the model takes {channels} channels: give one value, or one '
            'of each channel'
        )
    channels = len(pipeline.mean) if len(pipeline.mean) > 1 else channels
    low, high = EIGHT_BITS if pipeline.value_range is None else pipeline.value_range
    if value_range is not None:
        low, high = _checked_range(value_range, channels)
    elif pipeline.value_range is None:
        try:
            _check_range(pipeline, in_pipeline)
        except ConfigError:
            if strict:
                raise
            if pipeline.mean:
                low, high = (tuple(m + k * s for m, s in zip(pipeline.mean, pipeline.std)) for k in (-2, 2))
    try:
        spec = ImageSpec(pipeline.mean, pipeline.std, channels, max_value=high, min_value=low)
    except DataError as error:
        raise ConfigError(f'the input of the model: {error}') from error
    model.psaq_mm_input = ModelInput(spec, turned)  # type: ignore[assignment]
    return model.psaq_mm_input  # type: ignore[return-value]
