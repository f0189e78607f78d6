# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Noise, white and with the spectrum of natural pictures."""

from typing import Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from psaq_mm.errors import DataError
from psaq_mm.pictures.base import Source
from psaq_mm.pictures.image_spec import ImageSpec
from psaq_mm.pictures.registry import register_source

__all__ = [
    'GaussianNoise',
    'PinkNoise',
    'blurred',
    'bounds',
    'check_correlation',
    'correlated',
    'odd_side',
    'power_law_noise',
    'softened',
    'uniform_in',
]


def uniform_in(bounds: Sequence[float], generator: torch.Generator) -> float:
    """A number within (least, greatest); nothing is drawn where they are equal."""
    low, high = bounds
    return low if low == high else low + (high - low) * float(torch.rand((), generator=generator))


def row_means(rows: Tensor) -> Tensor:
    """Mean of each row, (n, ...) to (n,), the same for any number of threads.

    PyTorch splits the sum of a single row among its threads, so that rounding depends on their number. Of two or more
    rows, each is summed by one thread.
    """
    rows = rows.flatten(1)
    return (rows.expand(2, -1) if len(rows) == 1 else rows).mean(1)[: len(rows)]


def power_law_noise(planes: int, size: Tuple[int, int], exponent: float, generator: torch.Generator) -> Tensor:
    """Independent planes of noise whose amplitude falls as 1 / f ** exponent; periodic, zero mean, unit spread each.

    The spectrum itself is drawn, so that one transform is enough.

    Returns:
        Shape (planes, height, width), float32.
    """
    height, width = size
    half = width // 2 + 1
    squared = torch.fft.fftfreq(height).square().unsqueeze(1) + torch.fft.rfftfreq(width).square()
    squared[0, 0] = 1.0
    amplitude = squared ** (-exponent / 2)
    amplitude[0, 0] = 0.0  # a constant has no scale to fall with: the mean is zero
    # Columns that are their own mirror image lose their imaginary half in a real transform.
    amplitude[:, 0] *= 2**0.5
    if width % 2 == 0:
        amplitude[:, -1] *= 2**0.5
    spectrum = torch.view_as_complex(
        torch.randn(planes, height, half, 2, generator=generator) * amplitude.unsqueeze(-1)
    )
    noise = torch.fft.irfft2(spectrum, s=(height, width))
    spread = row_means(noise.square()).sqrt()
    return noise / torch.where(spread > 1e-12, spread, torch.ones_like(spread)).view(-1, 1, 1)


def correlated(planes: Tensor, correlation: float) -> Tensor:
    """Independent planes (C, ...) of unit spread to planes of which any two have this correlation.

    The mixing matrix is the symmetric root of the correlation matrix.
    """
    count, separate = len(planes), (1 - correlation) ** 0.5
    common = ((1 - correlation + count * correlation) ** 0.5 - separate) / count
    return planes * separate + planes.sum(0) * common


def blurred(picture: Tensor, side: int) -> Tensor:
    """Means over squares of ``side`` pixels, an odd number; (C, H, W) to the same."""
    if side == 1:
        return picture
    picture = F.pad(picture.unsqueeze(0), (side // 2 + 1, side // 2) * 2, mode='replicate')[0]
    for axis, size in ((-2, picture.shape[-2]), (-1, picture.shape[-1])):
        sums = picture.cumsum(axis)  # differences of running sums: as fast for a large square as for a small one
        picture = sums.narrow(axis, side, size - side) - sums.narrow(axis, 0, size - side)
    return picture.div_(side**2)


def softened(picture: Tensor, side: int) -> Tensor:
    """A picture (C, H, W) with its colour made less sharp and its brightness left as it is.

    The channels' differences from their mean are averaged over squares of ``side`` pixels, an odd number, twice.
    """
    if side == 1 or len(picture) == 1:
        return picture
    brightness = picture.mean(0, keepdim=True)
    colour = blurred(blurred(picture[:-1] - brightness, side), side)
    return torch.cat([colour, -colour.sum(0, keepdim=True)]).add_(brightness)  # differences from a mean sum to 0


@register_source('gaussian')
class GaussianNoise(Source):
    """N(0, 1) in standard units: no structure at all, the control of every published table."""

    def picture(self, size: Tuple[int, int], image_spec: ImageSpec, generator: torch.Generator) -> Tensor:
        """See :meth:`Source.picture`."""
        return torch.randn(image_spec.channels, *size, generator=generator)


@register_source('pink')
class PinkNoise(Source):
    """1/f noise: the spectrum of natural pictures (Field, J. Opt. Soc. Am. A 4(12), 1987), and nothing else of them.

    Args:
        exponent: Fall a of the amplitude 1 / f ** a, or (least, greatest): each picture then draws its own.
        color_correlation: Correlation between any two channels, 0 .. 1.
        seed: As for :class:`Source`.

    Raises:
        DataError: A setting is out of range.

    Example:
        >>> PinkNoise(exponent=(0.8, 1.4)).draw(range(8), (224, 224), ImageSpec()).shape
        torch.Size([8, 3, 224, 224])
    """

    def __init__(
        self, exponent: Union[float, Sequence[float]] = 1.0, color_correlation: float = 0.9, seed: int = 0
    ) -> None:
        super().__init__(seed)
        self.exponent = bounds('exponent', exponent, -4.0, 4.0)
        self.color_correlation = check_correlation(color_correlation)

    def picture(self, size: Tuple[int, int], image_spec: ImageSpec, generator: torch.Generator) -> Tensor:
        """See :meth:`Source.picture`; every channel has zero mean and about unit spread."""
        exponent = uniform_in(self.exponent, generator)
        return correlated(power_law_noise(image_spec.channels, size, exponent, generator), self.color_correlation)


def bounds(name: str, value: Union[float, Sequence[float]], least: float, greatest: float) -> Tuple[float, float]:
    """A number, or (least, greatest), as two numbers.

    Raises:
        DataError: They are not in order or outside ``least`` .. ``greatest``; the message gives ``name``.
    """
    pair = (value, value) if isinstance(value, (int, float)) else tuple(value)
    if len(pair) != 2 or not least <= pair[0] <= pair[1] <= greatest:
        raise DataError(
            f'{name}={value} must be a number within {least:g} .. {greatest:g}, or (least, greatest) of such'
        )
    return float(pair[0]), float(pair[1])


def check_correlation(value: float) -> float:
    """A correlation of channels, checked to be within 0 .. 1."""
    if not 0 <= value <= 1:
        raise DataError(f'color_correlation={value} must be within 0 .. 1')
    return float(value)


def odd_side(name: str, value: int) -> int:
    """The side of a square of pixels.

    Raises:
        DataError: It is no odd number within 1 .. 99; the message gives ``name``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 99 or value % 2 == 0:
        raise DataError(f'{name}={value} must be an odd number of pixels within 1 .. 99; 1 leaves pictures as they are')
    return value
