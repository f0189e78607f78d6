# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What sizes a config's test pipelines give its pictures, whatever data sets and transforms they are wrapped in."""

import math
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from psaq_mm.engine.data_overlap import dataset_leaves
from psaq_mm.type_names import type_name

__all__ = ['ImageSize', 'image_sizes', 'padding_multiple']


class ImageSize(NamedTuple):
    """What a pipeline makes of a picture's size.

    Attributes:
        height, width: In pixels.
        bound: Whether they are a bound, the short side first: the picture keeps its ratio, upright or across.
    """

    height: int
    width: int
    bound: bool = False


def _pair(value: Any) -> Optional[Tuple[int, int]]:
    """A number or two of them, width first as the libraries write them, as height and width; None for anything else."""
    if isinstance(value, int):
        return value, value
    whole = isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value)
    return (int(value[1]), int(value[0])) if whole else None


def _resized(scale: Any, keep_ratio: bool) -> List[ImageSize]:
    size = _pair(scale)
    if size is None:
        return []
    return [ImageSize(min(size), max(size), True) if keep_ratio and size[0] != size[1] else ImageSize(*size)]


def _after(step: Mapping, before: List[ImageSize]) -> List[ImageSize]:
    """The sizes that a step gives, ``before`` being those that it gets."""
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
    if (
        kind in ('CenterCrop', 'RandomCrop', 'EfficientNetCenterCrop')
        and step.get('crop_type', 'absolute') == 'absolute'
    ):
        size = _pair(step.get('crop_size'))
        return [ImageSize(*size)] if size else before
    if kind == 'Pad':
        size = _pair(step.get('size'))
        square = [ImageSize(max(s[:2]), max(s[:2])) for s in before] if step.get('pad_to_square') else before
        return [ImageSize(*size)] if size else square
    return before


def _random_resize(step: Mapping, keeps: bool) -> List[ImageSize]:
    """The largest size that it draws."""
    scales = step.get('scale')
    scales = (
        scales if isinstance(scales, (tuple, list)) and scales and isinstance(scales[0], (tuple, list)) else [scales]
    )
    sides = [_pair(scale) for scale in scales]
    if None in sides:
        return []
    most = max(step.get('ratio_range') or (1,))
    return _resized((int(max(s[1] for s in sides) * most), int(max(s[0] for s in sides) * most)), keeps)


def _sizes_after(steps: Sequence, sizes: List[ImageSize]) -> List[ImageSize]:
    for step in steps:
        if not isinstance(step, Mapping):
            continue
        inner = step.get('transforms')
        if not isinstance(inner, (tuple, list)):
            sizes = _after(step, sizes)
        elif inner and all(isinstance(one, (tuple, list)) for one in inner):
            sizes = _alternatives(type_name(step), inner, sizes)
        else:
            sizes = _sizes_after(inner, sizes)
    return list(dict.fromkeys(sizes))


def _alternatives(kind: str, inner: Sequence[Sequence], sizes: List[ImageSize]) -> List[ImageSize]:
    if kind == 'TestTimeAug':  # one of each list, in turn
        for choices in inner:
            sizes = [size for one in choices for size in _sizes_after([one], sizes)] or sizes
        return sizes
    return [size for steps in inner for size in _sizes_after(steps, sizes)]  # one of the lists


def image_sizes(config: Mapping) -> List[ImageSize]:
    """The sizes that the test pictures of a config have when they leave its pipelines, those of each data set, the last
    one last; none where a pipeline resizes nothing.

    Args:
        config: A whole config. Data sets may stand in wrappers (``ConcatDataset``, ``RepeatDataset``), and so may
            pipelines: a pipeline of the wrapper's own comes after those inside it.
    """
    found: List[ImageSize] = _sizes_after(config.get('test_pipeline') or (), [])
    for sizes in _of_dataset((config.get('test_dataloader') or {}).get('dataset')):
        found += sizes
    return list(dict.fromkeys(found[::-1]))[::-1]


def _of_dataset(dataset: Any) -> List[List[ImageSize]]:
    if isinstance(dataset, (tuple, list)):
        return [sizes for one in dataset for sizes in _of_dataset(one)]
    if not isinstance(dataset, Mapping):
        return []
    if dataset in list(dataset_leaves(dataset)):
        return [_sizes_after(dataset.get('pipeline') or (), [])]
    inner = _of_dataset(dataset.get('dataset') or dataset.get('datasets'))
    return [_sizes_after(dataset.get('pipeline') or (), sizes) for sizes in inner]


def padding_multiple(config: Mapping) -> int:
    """What the preprocessor pads height and width of test pictures to multiples of, in pixels."""
    settings = (config.get('model') or {}).get('data_preprocessor') or config.get('data_preprocessor') or {}
    at_test = settings.get('test_cfg') or {}
    return math.lcm(int(settings.get('pad_size_divisor') or 1), int(at_test.get('size_divisor') or 1))
