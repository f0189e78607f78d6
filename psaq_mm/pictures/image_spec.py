# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a model expects of its input: channels, normalization, and the range a real picture can take."""

import math
from dataclasses import dataclass
from typing import Any, Sequence, Tuple, Union

import torch
from torch import Tensor

from psaq_mm.errors import ConfigError, DataError

__all__ = ['EIGHT_BITS', 'ImageSpec', 'fits_eight_bits']

EIGHT_BITS = (0.0, 255.0)
"""Raw values of pictures of 8 bits a channel, which all three libraries load unless a config says otherwise."""


@dataclass(frozen=True)
class ImageSpec:
    """Input of a model: ``(raw - mean) / std`` of a picture with raw values ``min_value`` .. ``max_value``.

    Samples are optimized in *standard* units, in which a natural picture has about zero mean and unit spread, so that
    step sizes and the image prior mean the same for every model. For the usual mean and standard deviation of a
    data set those are the model's own units. For raw input, or one that is only centered, the middle of the range and
    a quarter of its width stand in. Pictures of more than 8 bits rarely use their whole range, so that there a range of
    up to 100 standard deviations still is a data set's own normalization.

    Args:
        mean: Subtracted from each channel, in raw values. Empty if the model takes raw pictures.
        std: What each channel is divided by, in raw values. Empty if the model takes raw pictures.
        channels: Number of channels. Defaults to None, the length of ``mean``, or 3 without one.
        max_value: Greatest raw value: 255, or 1 where mean and std are given for pictures in 0 .. 1; or one of each
            channel.
        min_value: Least raw value, or one of each channel.

    Raises:
        DataError: If mean, std, range and channels do not fit, or are not finite and positive.

    Example:
        >>> ImageSpec(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)).channels
        3
        >>> ImageSpec(channels=1).high
        (255.0,)
    """

    mean: Tuple[float, ...] = ()
    std: Tuple[float, ...] = ()
    channels: int = None  # type: ignore[assignment]  # __post_init__ makes it a number
    max_value: Union[float, Tuple[float, ...]] = 255.0
    min_value: Union[float, Tuple[float, ...]] = 0.0

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
        for name, value in (('mean', mean), ('std', std), ('channels', channels)):
            object.__setattr__(self, name, value)
        for name in ('max_value', 'min_value'):
            object.__setattr__(self, name, _one_or_each(name, getattr(self, name), channels))
        if not all(_finite(a) and _finite(b) and a < b for a, b in zip(*self._raw_range)):
            raise DataError(f'max_value={self.max_value} must be finite and above min_value={self.min_value}')

    @classmethod
    def from_preprocessor(cls, preprocessor: Any, channels: int = 3) -> 'ImageSpec':
        """Reads ``mean`` and ``std`` (buffers, tensors or sequences, in raw values) off a data preprocessor, for
        pictures of 8 bits.

        Args:
            preprocessor: Object with or without ``mean`` and ``std``, or None.
            channels: Input channels of the model, for a preprocessor that does not normalize.

        Raises:
            ConfigError: mean and std are not of pictures of 8 bits, so that their range has to be given.
        """
        mean, std = (_values(getattr(preprocessor, name, None)) for name in ('mean', 'std'))
        if not mean or not std:
            return cls(channels=channels)
        # One value may stand for all channels.
        spec = cls(mean, std, channels if len(mean) == 1 else len(mean))
        if not fits_eight_bits(spec.mean, spec.std):
            raise ConfigError(
                f'the data preprocessor has mean={_short(mean)} and std={_short(std)}, which are not of pictures with '
                f'values 0 '
                'to 255: set dfq.value_range=(low, high), the least and greatest value that a picture holds before '
                'mean '
                'and std'
            )
        return spec

    @property
    def _raw_range(self) -> Tuple[Tuple[float, ...], Tuple[float, ...]]:
        """Least and greatest raw value of each channel."""
        return tuple(v if isinstance(v, tuple) else (v,) * self.channels for v in (self.min_value, self.max_value))  # type: ignore

    @property
    def low(self) -> Tuple[float, ...]:
        """Least value of each channel a picture can take, in the model's units."""
        return self._normalized(self._raw_range[0])

    @property
    def high(self) -> Tuple[float, ...]:
        """Greatest value of each channel a picture can take, in the model's units."""
        return self._normalized(self._raw_range[1])

    def _normalized(self, raw: Tuple[float, ...]) -> Tuple[float, ...]:
        return tuple((v - m) / s for v, m, s in zip(raw, self.mean, self.std)) if self.mean else raw

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
        """The model's units (..., C, H, W) to raw values ``min_value`` .. ``max_value``."""
        low, high = (self._column(v, images) for v in self._raw_range)
        if self.mean:
            images = images * self._column(self.std, images) + self._column(self.mean, images)
        return torch.minimum(torch.maximum(images, low), high)

    def to_unit(self, images: Tensor) -> Tensor:
        """The model's units (..., C, H, W) to 0 .. 1, from the least to the greatest raw value of each channel."""
        low, high = (self._column(v, images) for v in self._raw_range)
        return (self.to_raw(images) - low) / (high - low)

    def to_bytes(self, images: Tensor) -> Tensor:
        """The model's units (..., C, H, W) to 0 .. 255, not rounded, for pictures to look at."""
        low, high = (self._column(v, images) for v in self._raw_range)
        return (self.to_raw(images) - low) * (255.0 / (high - low))

    def from_unit(self, pictures: Tensor) -> Tensor:
        """Undo :meth:`to_unit`: pictures (..., C, H, W) with values 0 .. 1 to the model's units."""
        low, high = self._column(self.low, pictures), self._column(self.high, pictures)
        return low + pictures * (high - low)

    def _standard(self) -> Tuple[Tuple[float, ...], Tuple[float, ...]]:
        """Center and size of the standard unit of each channel."""
        low, high = self.low, self.high
        widths = [b - a for a, b in zip(low, high)]
        # A picture spans 4.4 standard deviations of ImageNet; 2 to 10 still is a data set's own normalization.
        usual = all(v in (EIGHT_BITS, (0.0, 1.0)) for v in zip(*self._raw_range))
        inside = usual or all(a < 0 < b for a, b in zip(low, high))
        if self.mean and inside and all(2 <= width <= (10 if usual else 100) for width in widths):
            return (0.0,) * self.channels, (1.0,) * self.channels
        return tuple((a + b) / 2 for a, b in zip(low, high)), tuple(width / 4 for width in widths)

    def _is_standard(self, like: Tensor) -> bool:
        """Whether the model's units are the standard units."""
        center, unit = self._standard()
        return not any(center) and set(unit) == {1.0} and like.shape[-3] == self.channels

    def _column(self, values: Tuple[float, ...], like: Tensor) -> Tensor:
        if like.shape[-3] != self.channels:
            raise DataError(
                f'images of shape {tuple(like.shape)} do not have the {self.channels} channels of the model'
            )
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)


def fits_eight_bits(mean: Sequence[float], std: Sequence[float]) -> bool:
    """Whether mean and standard deviation can be those of pictures with values 0 .. 255, or only scale such pictures.

    No distribution on 0 .. 255 spreads more than ``sqrt(mean * (255 - mean))`` (Bhatia and Davis, 2000), and one of
    less than a step is no picture's. A mean of 0, or of the middle of the range, also goes with whatever brings the
    range to about one: 255, or 256.
    """

    def fits(mean: float, std: float) -> bool:
        if std < 1 or std > 256 or not 0 <= mean <= 255 or 0 < mean <= 1:
            return False
        return mean == 0 or abs(mean - 127.5) <= 0.5 or std <= 1.02 * math.sqrt(mean * (255 - mean))

    return all(map(fits, mean, std))


def _one_or_each(name: str, value: Any, channels: int) -> Union[float, Tuple[float, ...]]:
    """A number, or a tuple of one of each channel, which is a number where all are equal."""
    if not isinstance(value, (tuple, list)):
        return float(value)
    values = tuple(float(v) for v in value)
    if len(values) not in (1, channels):
        raise DataError(
            f'{name} has {len(values)} values for {channels} channels; give one number, or one of each channel'
        )
    return values[0] if len(set(values)) == 1 else values


def _short(values: Sequence[float]) -> str:
    return f'[{", ".join(f"{v:g}" for v in values)}]'


def _finite(value: float) -> bool:
    return value - value == 0


def _values(stored: Any) -> Tuple[float, ...]:
    if stored is None:
        return ()
    return tuple(torch.as_tensor(stored, dtype=torch.float64).flatten().tolist())
