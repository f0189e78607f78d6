# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a model expects of its input: channels, normalization, and the range a real picture can take."""
from dataclasses import dataclass
from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from psaq_mm.errors import DataError

__all__ = ['ImageSpec']


@dataclass(frozen=True)
class ImageSpec:
    """Input of a model: ``(raw - mean) / std`` of a picture with raw values 0 .. ``max_value``.

    Samples are optimized in *standard* units, in which a natural picture has about zero mean and unit spread, so that
    step sizes and the image prior mean the same for every model. For the usual mean and standard deviation of a
    data set those are the model's own units. For raw input, or one that is only centered, the middle of the range and
    a quarter of its width stand in.

    Args:
        mean: Subtracted from each channel, in raw values. Empty if the model takes raw pictures.
        std: What each channel is divided by, in raw values. Empty if the model takes raw pictures.
        channels: Number of channels. Defaults to None, the length of ``mean``, or 3 without one.
        max_value: Greatest raw value: 255, or 1 where mean and std are given for pictures in 0 .. 1.

    Raises:
        DataError: If mean, std and channels do not fit, or are not finite and positive.

    Example:
        >>> ImageSpec(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)).channels
        3
        >>> ImageSpec(channels=1).high
        (255.0,)
    """
    mean: Tuple[float, ...] = ()
    std: Tuple[float, ...] = ()
    channels: Optional[int] = None
    max_value: float = 255.0

    def __post_init__(self) -> None:
        mean, std = tuple(float(v) for v in self.mean), tuple(float(v) for v in self.std)
        if len(mean) != len(std):
            raise DataError(f'mean has {len(mean)} values and std {len(std)}; give one of each per channel, or neither')
        channels = self.channels if self.channels is not None else len(mean) or 3
        if channels < 1:
            raise DataError(f'channels={channels} must be at least 1')
        if mean and len(mean) != channels:
            if len(mean) != 1:
                raise DataError(f'mean has {len(mean)} values for {channels} channels; give one per channel')
            mean, std = mean * channels, std * channels
        if not all(map(_finite, mean + std)) or not all(v > 0 for v in std):
            raise DataError(f'mean={mean} must be finite and std={std} positive')
        if not (_finite(self.max_value) and self.max_value > 0):
            raise DataError(f'max_value={self.max_value} must be positive')
        for name, value in (('mean', mean), ('std', std), ('channels', channels)):
            object.__setattr__(self, name, value)

    @classmethod
    def from_preprocessor(cls, preprocessor: Any, channels: int = 3) -> 'ImageSpec':
        """Reads ``mean`` and ``std`` (buffers, tensors or sequences, in 0 .. 255) off a data preprocessor.

        Args:
            preprocessor: Object with or without ``mean`` and ``std``, or None.
            channels: Input channels of the model, for a preprocessor that does not normalize.
        """
        mean, std = (_values(getattr(preprocessor, name, None)) for name in ('mean', 'std'))
        if not mean or not std:
            return cls(channels=channels)
        # One value may stand for all channels.
        return cls(mean, std, channels if len(mean) == 1 else None)

    @property
    def low(self) -> Tuple[float, ...]:
        """Least value of each channel a picture can take, in the model's units."""
        return tuple(-m / s for m, s in zip(self.mean, self.std)) if self.mean else (0.0,) * self.channels

    @property
    def high(self) -> Tuple[float, ...]:
        """Greatest value of each channel a picture can take, in the model's units."""
        if not self.mean:
            return (self.max_value,) * self.channels
        return tuple((self.max_value - m) / s for m, s in zip(self.mean, self.std))

    def clamp(self, images: Tensor) -> Tensor:
        """Images (..., C, H, W) in the model's units with every value moved into the valid range."""
        low, high = self._column(self.low, images), self._column(self.high, images)
        return torch.minimum(torch.maximum(images, low), high)

    def from_standard(self, values: Tensor) -> Tensor:
        """Standard units (..., C, H, W) to the model's units; ``values`` itself where they are the same."""
        center, unit = self._standard()
        if self._is_standard(values):
            return values
        return values * self._column(unit, values) + self._column(center, values)

    def to_standard(self, images: Tensor) -> Tensor:
        """The model's units (..., C, H, W) to standard units; ``images`` themselves where they are the same."""
        center, unit = self._standard()
        if self._is_standard(images):
            return images
        return (images - self._column(center, images)) / self._column(unit, images)

    def to_raw(self, images: Tensor) -> Tensor:
        """The model's units (..., C, H, W) to raw values 0 .. ``max_value``, for pictures to look at."""
        if not self.mean:
            return images.clamp(0, self.max_value)
        raw = images * self._column(self.std, images) + self._column(self.mean, images)
        return raw.clamp(0, self.max_value)

    def _standard(self) -> Tuple[Tuple[float, ...], Tuple[float, ...]]:
        """Center and size of the standard unit of each channel."""
        low, high = self.low, self.high
        widths = [b - a for a, b in zip(low, high)]
        # A picture spans 4.4 standard deviations of ImageNet; 2 to 10 still is a data set's own normalization.
        if self.mean and all(2 <= width <= 10 for width in widths):
            return (0.0,) * self.channels, (1.0,) * self.channels
        return tuple((a + b) / 2 for a, b in zip(low, high)), tuple(width / 4 for width in widths)

    def _is_standard(self, like: Tensor) -> bool:
        """Whether the model's units are the standard units."""
        center, unit = self._standard()
        return not any(center) and set(unit) == {1.0} and like.shape[-3] == self.channels

    def _column(self, values: Tuple[float, ...], like: Tensor) -> Tensor:
        if like.shape[-3] != self.channels:
            raise DataError(f'images of shape {tuple(like.shape)} do not have the {self.channels} channels of the model')
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)


def _finite(value: float) -> bool:
    return value - value == 0


def _values(stored: Any) -> Tuple[float, ...]:
    if stored is None:
        return ()
    return tuple(torch.as_tensor(stored, dtype=torch.float64).flatten().tolist())
