# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Image sizes that a config's test pipelines produce, also inside wrappers of data sets and transforms."""

import math
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from psaq_mm.engine.data_overlap import dataset_leaves
from psaq_mm.type_names import type_name

__all__ = ['ImageSize', 'image_sizes', 'padding_multiple']


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
