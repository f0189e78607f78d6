# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a model's input holds, as its whole config tells it: values that pictures are loaded with, normalization in the
pipeline, and in the data preprocessor.
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
"""Steps of the libraries that load pictures of any depth."""
_NO_VALUES = (
    'Resize',
    'Pad',
    'Random',
    'Center',
    'Pack',
    'Flip',
    'LoadAnn',
    'LoadPan',
    'LoadProposal',
    'LoadEmpty',
    'LoadDepth',
    'LoadTrack',
    'LoadBiomedicalAnn',
    'LoadImageFrom',
    'FixScale',
    'Collect',
    'Transpose',
    'ImageToTensor',
    'ToTensor',
    'KeyMapper',
    'FilterAnn',
    'MultiScale',
    'PhotoMetric',
    'Compose',
    'Mosaic',
    'NumpyToPIL',
    'PILToNumpy',
    'GetTaskInfo',
    'Rerange',
)
"""How the names of steps begin that leave values as they are, or within 0 .. 255."""


class PipelineInput(NamedTuple):
    """What a pipeline does to the values of a picture.

    Attributes:
        mean, std: What it subtracts, and divides by, in the values that pictures are loaded with; empty if it does not
            normalize.
        turned: Whether it turns the order of the channels.
        deep: The step that may load other pictures than those of 8 bits; '' for none.
        unknown: A step that is not known here; '' for none.
        value_range: Where a step stretches every picture to a range of its own; None: as they are loaded.
    """

    mean: Values = ()
    std: Values = ()
    turned: bool = False
    deep: str = ''
    unknown: str = ''
    value_range: Optional[Tuple[float, float]] = None

    def normalized(self, mean: Sequence[float], std: Sequence[float]) -> 'PipelineInput':
        """With one more normalization after what is there."""
        mean, std = _numbers('mean', mean), _numbers('std', std)
        if len(mean) != len(std) or not mean:
            raise ConfigError(
                f'mean={list(mean)} and std={list(std)} of a normalization in the pipeline differ in length: give one '
                f'of '
                'each per channel'
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
        """With the channels turned after what is there: its means and deviations turn with them."""
        return self._replace(turned=not self.turned, mean=self.mean[::-1], std=self.std[::-1])


def _numbers(name: str, given: Any) -> Values:
    try:
        return tuple(float(v) for v in (given if hasattr(given, '__iter__') else (given,)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f'{name}={given!r} is no list of numbers: give one per channel') from error


# ---------------------------------------------------------------------- pipeline
def _steps(pipeline: Sequence) -> Iterator[Mapping]:
    """The steps of a pipeline, those inside others too; of branches the first."""
    for step in pipeline:
        if not isinstance(step, Mapping):
            continue
        inner = step.get('transforms')
        if not isinstance(inner, (list, tuple)) or type_name(step) == 'Albu':
            yield step
        elif inner and isinstance(inner[0], (list, tuple)):  # TestTimeAug: alternatives of each step
            yield from _steps([branch[0] for branch in inner if branch])
        else:
            yield from _steps(inner)


def _pipeline_of(config: Mapping) -> List[Mapping]:
    """The steps that a model's pictures go through when it is tested; validated or trained where there is no test
    set.
    """
    for loader in ('test_dataloader', 'val_dataloader', 'train_dataloader'):
        for one in given if isinstance(given := config.get(loader), (list, tuple)) else [given]:
            for leaf in dataset_leaves((one or {}).get('dataset')):
                if leaf.get('pipeline'):
                    return list(_steps(leaf['pipeline']))
    return list(_steps(config.get('test_pipeline') or ()))


def _loaded(found: PipelineInput, step: Mapping, name: str) -> PipelineInput:
    color, backend = step.get('color_type', 'color'), step.get('imdecode_backend', 'cv2')
    if name == 'LoadImageFromFile' and backend == 'tifffile':
        return found._replace(deep=f"{name} with imdecode_backend='tifffile'")
    if name == 'LoadImageFromFile' and backend != 'turbojpeg' and color in ('unchanged', 'anydepth', -1, 2):
        return found._replace(deep=f'{name} with color_type={color!r}')
    return found._replace(deep=name) if name in _ANY_DEPTH else found


def _torchvision(found: PipelineInput, step: Mapping, name: str) -> PipelineInput:
    if name == 'ToTensor':
        return found.normalized((0.0,), (255.0,))
    return found.normalized(step['mean'], step['std']) if name == 'Normalize' else found


def _albumentations(found: PipelineInput, step: Mapping) -> PipelineInput:
    for inner in step.get('transforms') or ():
        name, top = type_name(inner), float(inner.get('max_pixel_value', 255.0))
        if name == 'Normalize':
            mean, std = inner.get('mean', (0.485, 0.456, 0.406)), inner.get('std', (0.229, 0.224, 0.225))
            found = found.normalized([v * top for v in _numbers('mean', mean)], [v * top for v in _numbers('std', std)])
        elif name == 'ToFloat':
            found = found.normalized((0.0,), (float(inner.get('max_value') or 255.0),))
    return found


def read_pipeline(config: Mapping) -> PipelineInput:
    """What the steps of a config's test pipeline do to the values of a picture; nothing is opened.

    Raises:
        ConfigError: A normalization in it makes no sense.
    """
    found = PipelineInput()
    for step in _pipeline_of(config):
        library, _, name = type_path(step).replace('/', '.').rpartition('.')
        if 'torchvision' in library.split('.'):
            found = _torchvision(found, step, name)
        elif name == 'Normalize':
            found = found.turn() if step.get('to_rgb', True) else found
            found = found.normalized(step['mean'], step['std'])
        elif name == 'Albu':
            found = _albumentations(found, step)
        elif name == 'NumpyToPIL' and step.get('to_rgb') or name == 'PILToNumpy' and step.get('to_bgr'):
            found = found.turn()
        elif name == 'Rerange':
            found = PipelineInput(
                turned=found.turned, value_range=(float(step.get('min_value', 0)), float(step.get('max_value', 255)))
            )
        elif name.startswith('Load'):
            found = _loaded(found, step, name)
        if (
            not name.startswith(_NO_VALUES)
            and name not in ('Normalize', 'Albu', *_ANY_DEPTH)
            and 'torchvision' not in library.split('.')
        ):
            found = found._replace(unknown=name)
    return found


# ---------------------------------------------------------------------- preprocessor
def check_preprocessor(config: Mapping) -> None:
    """Refuse a config's ``data_preprocessor`` with a mean and std that no library takes, or that make no sense.

    Raises:
        ConfigError: They differ in length, one of them is absent, or a std is not above 0.
    """
    given = (config.get('model') or {}).get('data_preprocessor') or config.get('data_preprocessor') or {}
    if not isinstance(given, Mapping) or given.get('mean') is None and given.get('std') is None:
        return
    if given.get('mean') is None or given.get('std') is None:
        absent = 'mean' if given.get('mean') is None else 'std'
        raise ConfigError(
            f'data_preprocessor.{absent} is not set and the other of mean and std is: give both, or neither'
        )
    mean, std = (_numbers(f'data_preprocessor.{name}', given[name]) for name in ('mean', 'std'))
    if len(mean) != len(std):
        raise ConfigError(
            f'data_preprocessor.mean has {len(mean)} values and data_preprocessor.std {len(std)}: give one of each per '
            'channel'
        )
    if not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise ConfigError(
            f'data_preprocessor.mean={list(mean)} must be finite and data_preprocessor.std={list(std)} above 0: set '
            f'them '
            'right'
        )
    name = type_name(given)
    if name.startswith('Det') and len(mean) not in (1, 3):
        raise ConfigError(
            f'data_preprocessor.mean has {len(mean)} values, and {name} takes 1 or 3: normalize pictures of other '
            f'channels '
            "by dict(type='Normalize', to_rgb=False) in the pipelines, and leave mean and std out"
        )


# ---------------------------------------------------------------------- both together
def _given_range(given: Any, channels: int) -> Tuple[Any, Any]:
    """``dfq.value_range`` as (low, high), each a number or one of each channel."""
    try:
        low, high = given
        spec = ImageSpec(channels=channels, max_value=high, min_value=low)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f'dfq.value_range={given!r} must be (low, high): the least and greatest value that a picture holds before '
            f'it is '
            f'normalized, each a number or a list of one per channel (the model takes {channels})'
        ) from error
    return spec.min_value, spec.max_value


def _check_range(found: PipelineInput, in_pipeline: bool) -> None:
    """Refuse, or tell, an input that is not known to be of 8 bits."""
    way_out = 'set dfq.value_range=(low, high), the least and greatest value that a picture holds as it is loaded'
    if found.mean and not fits_eight_bits(found.mean, found.std):
        where = 'the pipeline and the data preprocessor' if in_pipeline else 'the data preprocessor'
        mean, std = ([float(f'{v:g}') for v in values] for values in (found.mean, found.std))
        raise ConfigError(
            f'{where} normalize{"" if in_pipeline else "s"} with mean={mean} and std={std}, which are not of pictures '
            f'with '
            f'values 0 to 255: {way_out}'
        )
    statistics = any(found.mean)
    if found.deep and not statistics:
        raise ConfigError(f'{found.deep} may load pictures of 8 bits or of more, and no mean tells which: {way_out}')
    if found.deep or found.unknown and not statistics:
        what = found.deep or f'the step {found.unknown} of the pipeline'
        print_log(f'Pictures are taken to hold values 0 to 255, which {what} leaves open: else {way_out}', 'current')


def set_input_(model: nn.Module, config: Mapping, value_range: Any = None, strict: bool = True) -> ModelInput:
    """Find out what a model's input holds, and keep it with the model, where :class:`psaq_mm.models.TaskModel` and the
    export read it.

    Args:
        model: Built from the config.
        config: A whole config: its test pipeline tells how pictures are loaded, and what normalizes them before the
            model's own ``data_preprocessor``.
        value_range: Least and greatest value that pictures hold as they are loaded, before all normalization, each a
            number or one of each channel in the model's order. Defaults to None: 0 to 255, if nothing contradicts it.
        strict: Whether what contradicts 0 to 255 is an error; else two standard deviations about the mean stand in.

    Raises:
        ConfigError: The range is not known, not a range, or mean and std do not fit the model's channels.
    """
    preprocessor, found = getattr(model, 'data_preprocessor', None), read_pipeline(config)
    in_pipeline, channels = bool(found.mean), input_channels(model)
    turned, given = found.turned, [getattr(preprocessor, name, None) for name in ('mean', 'std')]
    flips = any(getattr(preprocessor, n, False) for n in ('_channel_conversion', 'channel_conversion', 'to_rgb'))
    found = found.turn() if flips and len(found.mean) == 3 else found
    if all(v is not None and len(v) for v in given):
        found = found.normalized(*(v.flatten().tolist() if hasattr(v, 'flatten') else v for v in given))
    # YOLOX puts four pixels into one first
    if len(found.mean) > 1 and channels not in (len(found.mean), 4 * len(found.mean)):
        where = 'Normalize in the pipeline' if in_pipeline else 'data_preprocessor.mean'
        raise ConfigError(
            f'{where} has {len(found.mean)} values and the model takes {channels} channels: give one value, or one of '
            f'each '
            'channel'
        )
    channels = len(found.mean) if len(found.mean) > 1 else channels
    low, high = EIGHT_BITS if found.value_range is None else found.value_range
    if value_range is not None:
        low, high = _given_range(value_range, channels)
    elif found.value_range is None:
        try:
            _check_range(found, in_pipeline)
        except ConfigError:
            if strict:
                raise
            if found.mean:
                low, high = (tuple(m + k * s for m, s in zip(found.mean, found.std)) for k in (-2, 2))
    try:
        spec = ImageSpec(found.mean, found.std, channels, max_value=high, min_value=low)
    except DataError as error:
        raise ConfigError(f'the input of the model: {error}') from error
    model.psaq_mm_input = ModelInput(spec, turned)  # type: ignore[assignment]
    return model.psaq_mm_input  # type: ignore[return-value]
