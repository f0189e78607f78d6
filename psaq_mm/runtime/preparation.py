# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""From a picture to a network's input, as the test pipeline and the data preprocessor of the model's own library do it.

The steps stand in the manifest (``pipeline``), written by :func:`psaq_mm.engine.pipelines.pipeline_steps`. Steps that
resize need OpenCV, or Pillow where the pipeline says so; each is imported when a step needs it. Formulas of sizes are
those of mmcv's ``rescale_size``, mmpretrain's ``ResizeEdge`` and so on, so that inputs are equal to the last bit.
"""

import os
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Sequence, Tuple, Union

import numpy as np

from psaq_mm.errors import ConfigError, DataError
from psaq_mm.runtime.detection import ImageInfo

__all__ = ['Picture', 'Preparation', 'Prepared', 'STEPS', 'as_picture', 'read_picture']

Picture = Union[np.ndarray, str, os.PathLike]
Size = Tuple[int, int]

_CV2 = dict(
    nearest='INTER_NEAREST', bilinear='INTER_LINEAR', bicubic='INTER_CUBIC', area='INTER_AREA', lanczos='INTER_LANCZOS4'
)
_PILLOW = dict(
    nearest='NEAREST', bilinear='BILINEAR', bicubic='BICUBIC', box='BOX', lanczos='LANCZOS', hamming='HAMMING'
)


def opencv() -> Any:
    """The module cv2.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise ConfigError(
            f'reading, resizing and drawing pictures need OpenCV ({error}): pip install opencv-python-headless'
        ) from error
    return cv2


# ---------------------------------------------------------------------- reading
def read_picture(path: Union[str, os.PathLike], channels: int = 3) -> np.ndarray:
    """Read a picture file.

    Args:
        path: Of a file that OpenCV reads.
        channels: 3 (a grey file gets three equal ones), or 1.

    Returns:
        uint8 (H, W, channels), blue first.

    Raises:
        DataError: There is no such file, or it is no picture, or cut short.
        ConfigError: OpenCV is not installed.
    """
    cv2 = opencv()
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise DataError(f'there is no picture {path}: check the path')
    try:
        data = np.fromfile(path, np.uint8)  # not by name: OpenCV reads no names beyond ASCII on Windows
    except OSError as error:
        raise DataError(f'the picture {path} cannot be read ({error.strerror}): check its permissions') from error
    flag = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR
    try:
        picture = cv2.imdecode(data, flag) if data.size else None
    except cv2.error:  # sizes beyond OpenCV's limit
        picture = None
    if picture is None:
        raise DataError(f'{path} is no picture that OpenCV reads, or is cut short: leave it out, or save it again')
    return picture.reshape(*picture.shape[:2], channels)


def as_picture(picture: Picture, channels: int) -> np.ndarray:
    """A picture, given as an array or as the path of a file, as an array (H, W, channels) of uint8 or float32.

    Raises:
        DataError: It is of another shape, empty, not finite, or has values that are none from 0 to 255.
    """
    if isinstance(picture, (str, os.PathLike)):
        return read_picture(picture, channels)
    array = np.asarray(picture)
    if array.ndim == 2:
        raise DataError(
            f'a picture of shape {array.shape} is grey and the model takes {channels} channels: give (H, W, {channels})'
            + (', as cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR) makes it' if channels == 3 else '')
        )
    if array.ndim != 3 or array.shape[2] != channels:
        hint = (
            ', such as picture[..., :3] without its transparency' if array.shape[2:] == (4,) and channels == 3 else ''
        )
        raise DataError(
            f'images of shape {array.shape} are no pictures of {channels} channels: give (H, W, {channels}), blue '
            f'first{hint}'
        )
    if not array.size:
        raise DataError(f'a picture of shape {array.shape} has no pixels: leave it out')
    return array if array.dtype == np.uint8 else _from_other_type(array)


def _from_other_type(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in 'iuf':
        raise DataError(f'a picture of {array.dtype} has no values from 0 to 255: give uint8')
    least, greatest = array.min(), array.max()
    if not (np.isfinite(least) and np.isfinite(greatest)):
        raise DataError('a picture has values that are not finite (nan or inf): give values from 0 to 255')
    if least < 0 or greatest > 255:
        raise DataError(
            f'a picture of {array.dtype} has values from {least:g} to {greatest:g}: give it as it was read, from 0 to '
            '255 and not normalized'
        )
    if array.dtype.kind == 'f':
        if greatest <= 1 and (array != np.rint(array)).any():
            raise DataError(
                f'a picture of {array.dtype} has values from {least:g} to {greatest:g}: give values from 0 to 255, '
                'such as picture * 255'
            )
        return array.astype(np.float32)
    return array.astype(np.uint8)


# ---------------------------------------------------------------------- steps
class _State(NamedTuple):
    """A picture between two steps, and mmdet's ``scale_factor``: x, y."""

    picture: np.ndarray
    scale: Tuple[float, float] = (1.0, 1.0)


def _resized(state: _State, size: Size, step: Mapping[str, Any]) -> _State:
    """Resize to a size (width, height)."""
    (height, width), kind = state.picture.shape[:2], step.get('interpolation', 'bilinear')
    if min(size) < 1:
        raise DataError(
            f'a picture of {height} x {width} would have no pixels in the size {size[1]} x {size[0]} that the model '
            'takes it in: leave it out, or cut it'
        )
    if step.get('backend') == 'pillow':
        picture = _resized_by_pillow(state.picture, size, kind)
    else:
        cv2 = opencv()
        picture = cv2.resize(state.picture, size, interpolation=getattr(cv2, _CV2[kind]))
    return _State(picture.reshape(*picture.shape[:2], -1), (size[0] / width, size[1] / height))


def _resized_by_pillow(picture: np.ndarray, size: Size, kind: str) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError(
            f'the test pipeline of this model resizes with Pillow ({error}): pip install pillow'
        ) from error
    if picture.dtype != np.uint8:
        raise DataError(f'Pillow resizes no picture of {picture.dtype}: give uint8')
    source = Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)
    return np.array(source.resize(size, getattr(getattr(Image, 'Resampling', Image), _PILLOW[kind])))


def _resize(state: _State, step: Mapping[str, Any]) -> _State:
    """As mmcv's ``Resize``, and mmdet's ``FixScaleResize``, which rounds down."""
    height, width = state.picture.shape[:2]
    scale = step.get('scale')
    if scale is None:
        scale = [int(side * factor + 0.5) for side, factor in zip((width, height), step['factor'])]
    if not step.get('keep_ratio'):
        return _resized(state, (int(scale[0]), int(scale[1])), step)
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    half = 0.0 if step.get('rounding') == 'down' else 0.5
    return _resized(state, (int(width * factor + half), int(height * factor + half)), step)


def _resize_edge(state: _State, step: Mapping[str, Any]) -> _State:
    """As mmpretrain's ``ResizeEdge``: one side gets a length, the other one keeps the ratio."""
    (height, width), length, edge = state.picture.shape[:2], step['scale'], step.get('edge', 'short')
    if edge == 'width' or (edge == 'short' and width < height) or (edge == 'long' and width > height):
        return _resized(state, (length, int(length * height / width)), step)
    return _resized(state, (int(length * width / height), length), step)


def _resize_shortest(state: _State, step: Mapping[str, Any]) -> _State:
    """As mmseg's ``ResizeShortestEdge``; a ``Resize`` that keeps the ratio follows inside of it."""
    height, width = state.picture.shape[:2]
    length = float(step['scale'])
    scale = length / min(height, width)
    new_height, new_width = (length, scale * width) if height < width else (scale * height, length)
    if max(new_height, new_width) > step['max_size']:
        scale = step['max_size'] * 1.0 / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    bound = [int(new_width + 0.5), int(new_height + 0.5)]
    return _resize(state, dict(scale=bound, keep_ratio=True))


def _resize_multiple(state: _State, step: Mapping[str, Any]) -> _State:
    """As mmseg's ``ResizeToMultiple``."""
    divisor = step['divisor']
    height, width = (-(-side // divisor) * divisor for side in state.picture.shape[:2])
    return _resized(state, (width, height), step)._replace(scale=state.scale)


def _crop(picture: np.ndarray, left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """As mmcv's ``imcrop``: whole numbers, the last column and row included."""
    height, width = picture.shape[:2]
    x1, x2 = (max(min(int(x), width - 1), 0) for x in (left, right))
    y1, y2 = (max(min(int(y), height - 1), 0) for y in (top, bottom))
    return picture[y1 : y2 + 1, x1 : x2 + 1]


def _center_crop(state: _State, step: Mapping[str, Any]) -> _State:
    """As mmcv's ``CenterCrop``. A smaller picture stays as it is."""
    height, width = state.picture.shape[:2]
    crop_width, crop_height = min(step['size'][0], width), min(step['size'][1], height)
    top, left = round((height - crop_height) / 2.0), round((width - crop_width) / 2.0)
    return state._replace(picture=_crop(state.picture, left, top, left + crop_width - 1, top + crop_height - 1))


def _efficientnet_crop(state: _State, step: Mapping[str, Any]) -> _State:
    """As mmpretrain's ``EfficientNetCenterCrop``: a share of the short side, resized."""
    (height, width), size = state.picture.shape[:2], step['size']
    side = size / (size + step['padding']) * min(height, width)
    top, left = max(0, round((height - side) / 2.0)), max(0, round((width - side) / 2.0))
    return _resized(
        state._replace(picture=_crop(state.picture, left, top, left + side - 1, top + side - 1)), (size, size), step
    )


def _pad(state: _State, step: Mapping[str, Any]) -> _State:
    """As mmcv's ``Pad``, before normalization, at the right and at the bottom."""
    height, width = state.picture.shape[:2]
    target = (max(height, width),) * 2 if step.get('square') else (height, width)
    if step.get('size'):
        target = step['size'][1], step['size'][0]
    if step.get('divisor'):
        target = tuple(-(-side // step['divisor']) * step['divisor'] for side in target)
    shape = max(target[0], height), max(target[1], width), state.picture.shape[2]
    picture = np.empty(shape, state.picture.dtype)
    picture[:] = step.get('value', 0)
    picture[:height, :width] = state.picture
    return state._replace(picture=picture)


def _to_float32(state: _State, step: Mapping[str, Any]) -> _State:
    return state._replace(picture=state.picture.astype(np.float32))


STEPS: Dict[str, Callable[[_State, Mapping[str, Any]], _State]] = dict(
    resize=_resize,
    resize_edge=_resize_edge,
    resize_shortest=_resize_shortest,
    resize_multiple=_resize_multiple,
    center_crop=_center_crop,
    efficientnet_crop=_efficientnet_crop,
    pad=_pad,
    to_float32=_to_float32,
)
"""By the ``type`` of a step in manifests."""


# ---------------------------------------------------------------------- the whole way
class Prepared(NamedTuple):
    """A picture as the network takes it.

    Attributes:
        image: float32 (C, H, W), normalized, padded with zeros to a multiple of ``pad_divisor``.
        info: Its sizes.
    """

    image: np.ndarray
    info: ImageInfo


class Preparation:
    """What is done to a picture before the network, out of a manifest.

    Args:
        manifest: Of an exported model. Without ``pipeline`` a picture is taken in its own size.

    Raises:
        ConfigError: The pipeline has a step that this version does not know.
    """

    def __init__(self, manifest: Mapping[str, Any]):
        self.steps: List[Mapping[str, Any]] = list(manifest.get('pipeline') or ())
        for step in self.steps:
            if step.get('type') not in STEPS:
                raise ConfigError(
                    f'the pipeline of this export has a step {step.get("type")!r}, which this psaq_mm does not know: '
                    'install the psaq_mm that wrote it'
                )
        self.channels: int = manifest['channels']
        self.divisor: int = manifest.get('pad_divisor') or 1
        self.reverse: bool = manifest['reverse_channels']
        self.mean, self.std = (np.array(manifest[name] or (), np.float32) for name in ('mean', 'std'))

    def __call__(self, picture: Picture) -> Prepared:
        """Prepare a picture, (H, W, C) or the path of a file.

        Raises:
            DataError: It is no picture that the model takes.
            ConfigError: OpenCV or Pillow is needed and not installed.
        """
        array = as_picture(picture, self.channels)
        state = _State(array)
        for step in self.steps:
            state = STEPS[step['type']](state, step)
        original, shape = ((a.shape[0], a.shape[1]) for a in (array, state.picture))
        return Prepared(self._normalized(state.picture), ImageInfo(shape, original, state.scale))

    def _normalized(self, picture: np.ndarray) -> np.ndarray:
        height, width = picture.shape[:2]
        padded: Sequence[int] = [-(-side // self.divisor) * self.divisor for side in (height, width)]
        image = np.zeros((self.channels, *padded), np.float32)
        for channel in range(self.channels):
            plane = image[channel, :height, :width]
            plane[:] = picture[..., self.channels - 1 - channel if self.reverse else channel]
            if self.mean.size:
                plane -= self.mean[channel]
                plane /= self.std[channel]
        return image
