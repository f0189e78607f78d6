# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Pictures from nothing: where synthesis starts from, and what it has to beat."""
from typing import Optional, Tuple, Union

import torch
from torch import Tensor

from psaq_mm.errors import DataError
from psaq_mm.synthesis.normalization import ImageSpec

__all__ = ['gaussian_noise', 'pink_noise', 'SOURCES']


def gaussian_noise(batch: int,
                   size: Tuple[int, int],
                   image_spec: ImageSpec,
                   generator: Optional[torch.Generator] = None,
                   device: Union[str, torch.device, None] = None) -> Tensor:
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
    noise = _normal((batch, image_spec.channels, *_checked(batch, size)), _seeded(generator))
    return image_spec.clamp(image_spec.from_standard(noise)).to(device)


def pink_noise(batch: int,
               size: Tuple[int, int],
               image_spec: ImageSpec,
               generator: Optional[torch.Generator] = None,
               device: Union[str, torch.device, None] = None,
               exponent: float = 1.0,
               color_correlation: float = 0.9) -> Tensor:
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
    if not 0 <= color_correlation <= 1:
        raise DataError(f'color_correlation={color_correlation} must be within 0 .. 1')
    height, width = _checked(batch, size)
    generator = _seeded(generator)
    shape = (batch, image_spec.channels, height, width)
    common, own = _normal((batch, 1, height, width), generator), _normal(shape, generator)
    noise = color_correlation**0.5 * common + (1 - color_correlation)**0.5 * own

    frequency = (torch.fft.fftfreq(height).unsqueeze(1).square() + torch.fft.rfftfreq(width).square()).sqrt()
    # A constant has no scale to fall with; the mean is set to zero instead.
    amplitude = torch.where(frequency > 0, frequency.clamp(min=1e-12)**-exponent, torch.zeros_like(frequency))
    noise = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude, s=(height, width))
    spread = noise.flatten(2).std(-1, unbiased=False).clamp(min=1e-12)
    return image_spec.clamp(image_spec.from_standard(noise / spread[..., None, None])).to(device)


SOURCES = {'gaussian': gaussian_noise, 'pink': pink_noise}
"""Sources by name."""


def _seeded(generator: Optional[torch.Generator]) -> torch.Generator:
    return torch.Generator().manual_seed(0) if generator is None else generator


def _normal(shape: Tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _checked(batch: int, size: Tuple[int, int]) -> Tuple[int, int]:
    height, width = size
    if batch < 1 or height < 1 or width < 1:
        raise DataError(f'batch={batch} and size={size} must be positive')
    return height, width
