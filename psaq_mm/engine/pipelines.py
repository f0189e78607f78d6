# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a config's test pipelines do to the size of pictures: the sizes that they produce, also inside wrappers of data
sets and transforms, and their steps for an exported model, which repeats them without the library.
"""

import math
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from psaq_mm.engine.data_overlap import dataset_leaves
from psaq_mm.type_names import type_name, type_path

__all__ = ['ImageSize', 'PipelineSteps', 'image_sizes', 'padding_multiple', 'pipeline_steps']


class ImageSize(NamedTuple):
    """The size of a picture at the end of a pipeline.

    Attributes:
        height: In pixels.
        width: In pixels.
        bound: Whether height and width bound the short and the long side of a picture that keeps its aspect ratio, in
            portrait or landscape.
    """

    height: int
    width: int
    bound: bool = False


def _pair(value: Any) -> Optional[Tuple[int, int]]:
    """Height and width from one number, or from width and height as the libraries write them; None for other values."""
    if isinstance(value, int):
        return value, value
    pair = isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value)
    return (int(value[1]), int(value[0])) if pair else None


def _resized(scale: Any, keep_ratio: bool) -> List[ImageSize]:
    size = _pair(scale)
    if size is None:
        return []
    return [ImageSize(min(size), max(size), True) if keep_ratio and size[0] != size[1] else ImageSize(*size)]


def _after(step: Mapping, before: List[ImageSize]) -> List[ImageSize]:
    """The sizes after a step, given those before it."""
    kind, keeps = type_name(step), bool(step.get('keep_ratio'))
    if kind in ('Resize', 'FixScaleResize', 'ResizeEdge'):
        return _resized(step.get('scale'), keeps) or before
    if kind == 'ResizeShortestEdge':
        short = _pair(step.get('scale'))
        return [ImageSize(min(short), max(int(step.get('max_size') or 0), *short), True)] if short else before
    if kind == 'FixShapeResize':
        return _resized((step.get('width'), step.get('height')), False) or before
    if kind == 'RandomChoiceResize':
        return [size for scale in step.get('scales') or () for size in _resized(scale, keeps)] or before
    if kind == 'RandomResize':
        return _random_resize(step, keeps) or before
    crops = kind in ('CenterCrop', 'RandomCrop', 'EfficientNetCenterCrop')
    if crops and step.get('crop_type', 'absolute') == 'absolute':
        size = _pair(step.get('crop_size'))
        return [ImageSize(*size)] if size else before
    if kind == 'Pad':
        size = _pair(step.get('size'))
        square = [ImageSize(max(s[:2]), max(s[:2])) for s in before] if step.get('pad_to_square') else before
        return [ImageSize(*size)] if size else square
    return before


def _random_resize(step: Mapping, keeps: bool) -> List[ImageSize]:
    """The largest size that the step can choose."""
    scales = step.get('scale')
    several = isinstance(scales, (tuple, list)) and scales and isinstance(scales[0], (tuple, list))
    sides = [_pair(scale) for scale in (scales if several else [scales])]
    if None in sides:
        return []
    ratio = max(step.get('ratio_range') or (1,))
    return _resized((int(max(s[1] for s in sides) * ratio), int(max(s[0] for s in sides) * ratio)), keeps)


def _sizes_after(steps: Sequence, sizes: List[ImageSize]) -> List[ImageSize]:
    for step in steps:
        if not isinstance(step, Mapping):
            continue
        inner = step.get('transforms')
        if not isinstance(inner, (tuple, list)):
            sizes = _after(step, sizes)
        elif inner and all(isinstance(branch, (tuple, list)) for branch in inner):
            sizes = _alternatives(type_name(step), inner, sizes)
        else:
            sizes = _sizes_after(inner, sizes)
    return list(dict.fromkeys(sizes))


def _alternatives(kind: str, inner: Sequence[Sequence], sizes: List[ImageSize]) -> List[ImageSize]:
    if kind == 'TestTimeAug':  # one step of each list, in turn
        for steps in inner:
            sizes = [size for step in steps for size in _sizes_after([step], sizes)] or sizes
        return sizes
    return [size for steps in inner for size in _sizes_after(steps, sizes)]  # all steps of one of the lists


def image_sizes(config: Mapping) -> List[ImageSize]:
    """The sizes of test pictures at the end of each pipeline of a config, in order; empty where nothing is resized.

    Args:
        config: A whole config. Data sets may be in wrappers (``ConcatDataset``, ``RepeatDataset``). A wrapper's own
            pipeline runs after those inside it.
    """
    sizes: List[ImageSize] = _sizes_after(config.get('test_pipeline') or (), [])
    for of_one in _of_dataset((config.get('test_dataloader') or {}).get('dataset')):
        sizes += of_one
    return list(dict.fromkeys(sizes[::-1]))[::-1]


def _of_dataset(dataset: Any) -> List[List[ImageSize]]:
    if isinstance(dataset, (tuple, list)):
        return [sizes for part in dataset for sizes in _of_dataset(part)]
    if not isinstance(dataset, Mapping):
        return []
    if dataset in list(dataset_leaves(dataset)):
        return [_sizes_after(dataset.get('pipeline') or (), [])]
    inner = _of_dataset(dataset.get('dataset') or dataset.get('datasets'))
    return [_sizes_after(dataset.get('pipeline') or (), sizes) for sizes in inner]


def padding_multiple(config: Mapping) -> int:
    """The number of pixels that height and width of test pictures are padded to multiples of.

    Args:
        config: A whole config.
    """
    settings = (config.get('model') or {}).get('data_preprocessor') or config.get('data_preprocessor') or {}
    at_test = settings.get('test_cfg') or {}
    return math.lcm(int(settings.get('pad_size_divisor') or 1), int(at_test.get('size_divisor') or 1))


# ---------------------------------------------------------------------- steps for an exported model
class PipelineSteps(NamedTuple):
    """What is done to a test picture before the network.

    Attributes:
        pipeline: Steps for :class:`psaq_mm.runtime.preparation.Preparation`, plain values; None where one of them has
            no such form.
        pad_divisor: Height and width are padded to multiples of it, with zeros, after normalization.
        slide: ``crop_size`` and ``stride`` (height, width) of a segmentor with a sliding window; None without.
        unknown: Why ``pipeline`` is None, for a message.
    """

    pipeline: Optional[List[Dict[str, Any]]]
    pad_divisor: int = 1
    slide: Optional[Dict[str, List[int]]] = None
    unknown: str = ''


class _NoStep(Exception):
    """A transform that has no form in an export; the message says why."""


_LIBRARIES = ('mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'mmengine')
_INTERPOLATIONS = dict(
    cv2=('nearest', 'bilinear', 'bicubic', 'area', 'lanczos'),
    pillow=('nearest', 'bilinear', 'bicubic', 'box', 'lanczos', 'hamming'),
)
_LEAVES_PIXELS = ('PackDetInputs', 'PackSegInputs', 'PackInputs', 'LoadAnnotations', 'Collect', 'LoadEmptyAnnotations')


def _width_height(value: Any) -> List[int]:
    if isinstance(value, int):
        return [value, value]
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return list(value)
    raise _NoStep(f'a size of {value!r}')


def _interpolation(step: Mapping, default: str = 'bilinear') -> Dict[str, str]:
    backend, kind = step.get('backend') or 'cv2', step.get('interpolation') or default
    if kind not in _INTERPOLATIONS.get(backend, ()):
        raise _NoStep(f'interpolation={kind!r} with backend={backend!r}')
    return dict(interpolation=kind, backend=backend)


def _load(step: Mapping) -> List[Dict[str, Any]]:
    color = step.get('color_type', 'color')
    if color not in ('color', 'grayscale') or step.get('imdecode_backend', 'cv2') not in ('cv2', 'pillow', 'turbojpeg'):
        raise _NoStep(f'color_type={color!r}, imdecode_backend={step.get("imdecode_backend", "cv2")!r}')
    return [dict(type='to_float32')] if step.get('to_float32') else []


def _resize(step: Mapping) -> List[Dict[str, Any]]:
    keeps = dict(keep_ratio=bool(step.get('keep_ratio')), **_interpolation(step))
    if step.get('scale') is not None:
        return [dict(type='resize', scale=_width_height(step['scale']), **keeps)]
    factor = step.get('scale_factor')
    factors = list(factor) if isinstance(factor, (tuple, list)) else [factor, factor]
    if not all(isinstance(value, float) for value in factors):
        raise _NoStep(f'scale_factor={factor!r}')
    return [dict(type='resize', factor=factors, **keeps)]


def _fix_scale_resize(step: Mapping) -> List[Dict[str, Any]]:
    return [dict(row, rounding='down') for row in _resize(step)]


def _fix_shape_resize(step: Mapping) -> List[Dict[str, Any]]:
    if step.get('keep_ratio'):
        raise _NoStep('keep_ratio=True')
    scale = [int(step['width']), int(step['height'])]
    return [dict(type='resize', scale=scale, keep_ratio=False, **_interpolation(step))]


def _resize_edge(step: Mapping) -> List[Dict[str, Any]]:
    edge = step.get('edge', 'short')
    return [dict(type='resize_edge', scale=int(step['scale']), edge=edge, **_interpolation(step))]


def _resize_shortest(step: Mapping) -> List[Dict[str, Any]]:
    return [dict(type='resize_shortest', scale=min(_width_height(step['scale'])), max_size=int(step['max_size']))]


def _resize_multiple(step: Mapping) -> List[Dict[str, Any]]:
    return [dict(type='resize_multiple', divisor=int(step.get('size_divisor', 32)), **_interpolation(step))]


def _center_crop(step: Mapping) -> List[Dict[str, Any]]:
    if step.get('auto_pad'):
        raise _NoStep('auto_pad=True')
    return [dict(type='center_crop', size=_width_height(step['crop_size']))]


def _efficientnet_crop(step: Mapping) -> List[Dict[str, Any]]:
    sizes = dict(size=int(step['crop_size']), padding=int(step.get('crop_padding', 32)))
    return [dict(type='efficientnet_crop', **sizes, **_interpolation(step, 'bicubic'))]


def _pad(step: Mapping) -> List[Dict[str, Any]]:
    if step.get('padding_mode', 'constant') != 'constant':
        raise _NoStep(f'padding_mode={step["padding_mode"]!r}')
    value, size = step.get('pad_val', 0), step.get('size')
    value = value.get('img', 0) if isinstance(value, Mapping) else value
    row = dict(
        type='pad',
        size=None if size is None else _width_height(size),
        divisor=step.get('size_divisor'),
        square=bool(step.get('pad_to_square')),
        value=list(value) if isinstance(value, (tuple, list)) else value,
    )
    return [row]


_STEPS: Dict[str, Callable[[Mapping], List[Dict[str, Any]]]] = dict(
    LoadImageFromFile=_load,
    Resize=_resize,
    FixScaleResize=_fix_scale_resize,
    FixShapeResize=_fix_shape_resize,
    ResizeEdge=_resize_edge,
    ResizeShortestEdge=_resize_shortest,
    ResizeToMultiple=_resize_multiple,
    CenterCrop=_center_crop,
    EfficientNetCenterCrop=_efficientnet_crop,
    Pad=_pad,
    Normalize=lambda step: [],  # mean and std of the manifest are of pipeline and preprocessor together
)


def _step(step: Any) -> List[Dict[str, Any]]:
    """The steps of a transform for an export.

    Raises:
        _NoStep: There are none.
    """
    name, library = type_name(step), type_path(step).replace('/', '.').split('.')
    if library[0] not in (*_LIBRARIES, name) or 'torchvision' in library:
        raise _NoStep(f'{type_path(step)}')
    if name in _LEAVES_PIXELS or (name == 'RandomFlip' and step.get('prob') == 0):
        return []
    if name not in _STEPS:
        raise _NoStep(name or repr(step))
    try:
        return _STEPS[name](step)
    except _NoStep as error:
        raise _NoStep(f'{name} with {error}') from error
    except (KeyError, TypeError, ValueError) as error:
        raise _NoStep(f'{name} as it stands there ({error})') from error


def _test_pipelines(config: Mapping) -> List[List]:
    """The pipelines of a config's test sets, each once, those of wrappers at the end; else ``test_pipeline``."""
    pipelines: List[List] = []

    def collect(dataset: Any, after: List) -> None:
        if isinstance(dataset, (tuple, list)):
            for part in dataset:
                collect(part, after)
        elif isinstance(dataset, Mapping):
            steps = [*(dataset.get('pipeline') or ()), *after]
            inner = dataset.get('dataset') or dataset.get('datasets')
            if isinstance(inner, (Mapping, tuple, list)):
                collect(inner, steps)
            elif steps not in pipelines:
                pipelines.append(steps)

    collect((config.get('test_dataloader') or {}).get('dataset'), [])
    pipelines = [steps for steps in pipelines if steps]
    return pipelines or [list(config.get('test_pipeline') or ())]


def pipeline_steps(config: Mapping) -> PipelineSteps:
    """What is done to a test picture before the network, for the manifest of an export.

    Args:
        config: A whole config.
    """
    settings = (config.get('model') or {}).get('data_preprocessor') or config.get('data_preprocessor') or {}
    test_cfg = (config.get('model') or {}).get('test_cfg') or {}
    slide = None
    if test_cfg.get('mode') == 'slide' and test_cfg.get('crop_size') and test_cfg.get('stride'):
        slide = {name: [int(side) for side in test_cfg[name]] for name in ('crop_size', 'stride')}
    unknown, steps = '', []
    pipelines = _test_pipelines(config)
    try:
        if len(pipelines) > 1:
            raise _NoStep('several test sets, each with a pipeline of its own')
        if not pipelines[0]:
            raise _NoStep('no test pipeline')
        for number, step in enumerate(pipelines[0]):
            steps += _step(step)
            if type_name(step) == 'Normalize' and any(map(_step, pipelines[0][number + 1 :])):
                raise _NoStep('Normalize before the size is changed')
        if (settings.get('test_cfg') or {}).get('size'):
            raise _NoStep('data_preprocessor.test_cfg.size')
        if settings.get('pad_value') or settings.get('pad_val'):
            raise _NoStep('padding with another value than 0')
    except _NoStep as error:
        unknown = str(error)
    return PipelineSteps(None if unknown else steps, padding_multiple(config), slide, unknown)
