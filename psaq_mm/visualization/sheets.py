# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Sheets of samples as pictures, and PNG files."""

import io

import numpy as np
from PIL import Image
from torch import Tensor

from psaq_mm.errors import DataError
from psaq_mm.files import PathLike, write_whole
from psaq_mm.pictures import ImageSpec

__all__ = ['to_pixels', 'sample_sheet', 'write_png', 'encode_png']

GAP = 4  # pixels of white between two samples, so that dark ones do not run together


def to_pixels(images: Tensor, image_spec: ImageSpec) -> np.ndarray:
    """Undo the model's normalization.

    Args:
        images: Normalized images, shape (N, C, H, W), in the model's units.
        image_spec: Mean, standard deviation and value range of the model's input.

    Returns:
        Shape (N, H, W, 3), uint8. One channel is shown as grey. Of any number but one and three the first three
        channels are shown as they are (two: the third is black): a projection onto three colours would differ from
        sheet to sheet, and two sheets of one run could not be compared.

    Raises:
        DataError: The shape is another, or a value is NaN or infinite.

    Example:
        >>> to_pixels(torch.zeros(2, 3, 8, 8), ImageSpec(mean=(128, ), std=(64, ), channels=3))[0, 0, 0].tolist()
        [128, 128, 128]
    """
    if images.dim() != 4 or 0 in images.shape:
        raise DataError(
            f'samples of shape {tuple(images.shape)} are no batch of pictures: give (N, C, H, W), none of them 0'
        )
    images = images.detach().float().cpu()
    if not images.isfinite().all():
        raise DataError(
            'a sample holds NaN or infinite values and cannot be drawn: lower the learning rate of the synthesis'
        )
    pixels = image_spec.to_bytes(images).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    channels = pixels.shape[-1]
    if channels == 1:
        return np.repeat(pixels, 3, axis=-1)
    if channels == 2:
        return np.concatenate([pixels, np.zeros_like(pixels[..., :1])], axis=-1)
    return np.ascontiguousarray(pixels[..., :3])


def _fit(picture: np.ndarray, cell: int) -> np.ndarray:
    """``picture`` (H, W, 3) made smaller until its longer side is at most ``cell`` pixels; a small one stays."""
    height, width = picture.shape[:2]
    scale = cell / max(height, width)
    if scale >= 1:
        return picture
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def sample_sheet(samples: Tensor, image_spec: ImageSpec, columns: int = 8, cell: int = 160) -> np.ndarray:
    """All samples in rows, left to right.

    Args:
        samples: Normalized images, shape (N, C, H, W), in the model's units; any number of channels, see
            :func:`to_pixels`.
        image_spec: Mean, standard deviation and value range of the model's input.
        columns: Samples in a row, at most.
        cell: Longest side of a sample on the sheet, in pixels; larger ones are made smaller, smaller ones stay.

    Returns:
        Shape (H, W, 3), uint8, in the order of the model's channels (RGB for models that take RGB).

    Raises:
        DataError: No samples, NaN among them, or ``columns`` or ``cell`` below 1.

    Example:
        >>> sample_sheet(torch.zeros(3, 3, 32, 32), ImageSpec(), columns=2).shape
        (68, 68, 3)
    """
    if columns < 1 or cell < 1:
        raise DataError(f'columns={columns} and cell={cell} must be at least 1')
    pictures = [_fit(picture, cell) for picture in to_pixels(samples, image_spec)]
    height, width = pictures[0].shape[:2]
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // columns * (height + GAP), number % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def write_png(array: np.ndarray, path: PathLike) -> None:
    """Write a picture (H, W, 3) or (H, W), uint8, as PNG, see :func:`psaq_mm.files.write_whole`.

    Raises:
        DataError: The array is no picture.
        OSError: It cannot be written.
    """
    write_whole(path, encode_png(array))


def encode_png(array: np.ndarray) -> bytes:
    """A picture (H, W, 3) or (H, W), uint8, as the bytes of a PNG file."""
    array = np.asarray(array)
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or (array.ndim == 3 and array.shape[2] != 3)
        or not array.size
    ):
        raise DataError(
            f'an array of {array.dtype} and shape {array.shape} is no picture: give uint8, (H, W, 3) or (H, W)'
        )
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format='PNG')
    return buffer.getvalue()
