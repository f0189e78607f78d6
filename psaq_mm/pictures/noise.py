# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Noise, white and with the spectrum of natural pictures."""

from typing import Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from psaq_mm.errors import DataError
from psaq_mm.pictures.base import Source, checked_size
from psaq_mm.pictures.image_spec import ImageSpec

__all__ = [
    'GaussianNoise',
    'PinkNoise',
    'blurred',
    'bounds',
    'check_correlation',
    'correlated',
    'gaussian_noise',
    'odd_side',
    'pink_noise',
    'power_law_noise',
    'softened',
    'uniform_in',
]


def gaussian_noise(
    batch: int,
    size: Tuple[int, int],
    image_spec: ImageSpec,
    generator: Optional[torch.Generator] = None,
    device: Union[str, torch.device, None] = None,
) -> Tensor:
    """Independent normal values N(0, 1) in standard units, moved into the valid range.

    Args:
        batch: Number of pictures.
        size: (height, width) in pixels.
        image_spec: Channels and range of the model's input.
        generator: Source of randomness, on the CPU. Defaults to None, one seeded with 0: the global one is never used.
        device: Where the result goes. It is drawn on the CPU, so every device gets the same values.

    Returns:
        Shape (batch, C, height, width), float32, in the model's units.
    """
    noise = _normal((batch, image_spec.channels, *checked_size(batch, size)), _seeded(generator))
    return image_spec.clamp(image_spec.from_standard(noise)).to(device)


def pink_noise(
    batch: int,
    size: Tuple[int, int],
    image_spec: ImageSpec,
    generator: Optional[torch.Generator] = None,
    device: Union[str, torch.device, None] = None,
    exponent: float = 1.0,
    color_correlation: float = 0.9,
) -> Tensor:
    """Noise whose amplitude falls as 1 / f ** exponent, as that of natural pictures does, moved into the valid range.

    The fall of the amplitude with exponent 1: Field, Relations between the statistics of natural images and the
    response properties of cortical cells, J. Opt. Soc. Am. A 4(12), 1987.

    Args:
        batch, size, image_spec, generator, device: As for :func:`gaussian_noise`.
        exponent: Fall of the amplitude; 0 gives white noise.
        color_correlation: Correlation between any two channels, 0 .. 1.

    Returns:
        Shape (batch, C, height, width), float32, in the model's units; zero mean and unit spread a channel in standard
        units before it is moved into the range.
    """
    check_correlation(color_correlation)
    noise = _shaped(
        (batch, image_spec.channels, *checked_size(batch, size)), [exponent], color_correlation, _seeded(generator)
    )
    return image_spec.clamp(image_spec.from_standard(noise)).to(device)


def _shaped(
    shape: Tuple[int, int, int, int], exponents: Sequence[float], color_correlation: float, generator: torch.Generator
) -> Tensor:
    """White noise of a whole batch, drawn together, with the spectrum of :func:`pink_noise`; one exponent for all
    pictures, or one each.
    """
    batch, _, height, width = shape
    common, own = _normal((batch, 1, height, width), generator), _normal(shape, generator)
    noise = color_correlation**0.5 * common + (1 - color_correlation) ** 0.5 * own

    frequency = (torch.fft.fftfreq(height).unsqueeze(1).square() + torch.fft.rfftfreq(width).square()).sqrt()
    # A constant has no scale to fall with; the mean is set to zero instead.
    amplitude = torch.stack(
        [
            torch.where(frequency > 0, frequency.clamp(min=1e-12) ** -exponent, torch.zeros_like(frequency))
            for exponent in exponents
        ]
    ).unsqueeze(1)
    noise = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude, s=(height, width))
    spread = noise.flatten(0, 1).flatten(1)
    # as row_means
    spread = (spread.expand(2, -1) if len(spread) == 1 else spread).std(-1, unbiased=False)[: len(spread)]
    return noise / spread.clamp(min=1e-12).view(*shape[:2], 1, 1)


def uniform_in(bounds: Sequence[float], generator: torch.Generator) -> float:
    """A number within (least, greatest); nothing is drawn where they are equal."""
    low, high = bounds
    return low if low == high else low + (high - low) * float(torch.rand((), generator=generator))


def row_means(rows: Tensor) -> Tensor:
    """Mean of each row, (n, ...) to (n,), the same whatever the number of threads: the sum of a single row is split
    among them by PyTorch, and rounded otherwise by each number of them; of two or more rows every one has a thread to
    itself.
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
    """Independent planes (C, ...) of unit spread to ones of which any two are correlated; in place of a common one and
    C others.

    The mixing matrix is the symmetric root of the correlation matrix.
    """
    count, own = len(planes), (1 - correlation) ** 0.5
    common = ((1 - correlation + count * correlation) ** 0.5 - own) / count
    return planes * own + planes.sum(0) * common


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
    """A picture (C, H, W) whose colour is less sharp than its brightness: the channels' differences from their mean are
    averaged over squares of ``side`` pixels, an odd number, and once more.
    """
    if side == 1 or len(picture) == 1:
        return picture
    brightness = picture.mean(0, keepdim=True)
    colour = blurred(blurred(picture[:-1] - brightness, side), side)
    return torch.cat([colour, -colour.sum(0, keepdim=True)]).add_(brightness)  # differences from a mean add up to none


class GaussianNoise(Source):
    """N(0, 1) in standard units: no structure at all, the control of every published table."""

    def picture(self, size: Tuple[int, int], image_spec: ImageSpec, generator: torch.Generator) -> Tensor:
        """See :meth:`Source.picture`."""
        return torch.randn(image_spec.channels, *size, generator=generator)

    def __call__(
        self,
        batch: int,
        size: Tuple[int, int],
        image_spec: ImageSpec,
        generator: Optional[torch.Generator] = None,
        device: Union[str, torch.device, None] = None,
    ) -> Tensor:
        """:func:`gaussian_noise`: the batch is drawn together."""
        return gaussian_noise(batch, size, image_spec, self._of(generator), device)


class PinkNoise(Source):
    """1/f noise: the spectrum of natural pictures (Field, J. Opt. Soc. Am. A 4(12), 1987) and nothing else of them.

    Args:
        exponent: Fall a of the amplitude 1 / f ** a, or (least, greatest) of which each picture has its own.
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

    def __call__(
        self,
        batch: int,
        size: Tuple[int, int],
        image_spec: ImageSpec,
        generator: Optional[torch.Generator] = None,
        device: Union[str, torch.device, None] = None,
    ) -> Tensor:
        """:func:`pink_noise`: the batch is drawn together; with exponents of their own those come first."""
        shape, generator = (batch, image_spec.channels, *checked_size(batch, size)), _seeded(self._of(generator))
        one = self.exponent[0] == self.exponent[1]
        exponents = [uniform_in(self.exponent, generator) for _ in range(1 if one else batch)]
        return image_spec.clamp(
            image_spec.from_standard(_shaped(shape, exponents, self.color_correlation, generator))
        ).to(device)


def bounds(name: str, given: Union[float, Sequence[float]], least: float, greatest: float) -> Tuple[float, float]:
    """A number, or (least, greatest), as two numbers.

    Raises:
        DataError: They are not in order or outside ``least`` .. ``greatest``; the sentence has their name.
    """
    found = (given, given) if isinstance(given, (int, float)) else tuple(given)
    if len(found) != 2 or not least <= found[0] <= found[1] <= greatest:
        raise DataError(
            f'{name}={given} must be a number within {least:g} .. {greatest:g}, or (least, greatest) of such'
        )
    return float(found[0]), float(found[1])


def check_correlation(value: float) -> float:
    if not 0 <= value <= 1:
        raise DataError(f'color_correlation={value} must be within 0 .. 1')
    return float(value)


def odd_side(name: str, value: int) -> int:
    """The side of a square of pixels.

    Raises:
        DataError: It is no odd number within 1 .. 99; the sentence has its name.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 99 or value % 2 == 0:
        raise DataError(f'{name}={value} must be an odd number of pixels within 1 .. 99; 1 leaves pictures as they are')
    return value


def _seeded(generator: Optional[torch.Generator]) -> torch.Generator:
    return torch.Generator().manual_seed(0) if generator is None else generator


def _normal(shape: Tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)
