"""Stores: what an observer keeps of the values it saw. Two of them are here, those that count in :mod:`.histograms`."""

from abc import ABC, abstractmethod
from typing import Iterable, Iterator, Optional, Sequence, Tuple

import torch
from torch import Tensor

from psaq_mm.errors import DataError, NotCalibratedError, SpecError
from psaq_mm.quantization.grids import Grid
from psaq_mm.quantization.primitives import fake_quantize
from psaq_mm.ranks import maximum_, minimum_

__all__ = ['AllValues', 'Ends', 'SortedValues', 'Store', 'Values', 'refuse_non_finite']


def refuse_non_finite(low: Tensor, high: Tensor) -> None:
    """Raise DataError unless the least and the greatest value of a tensor are finite."""
    # Minimum and maximum propagate NaN, so they tell for the whole tensor.
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise DataError('The observed tensor holds NaN or infinity: look for the layer that produced it.')


class Values:
    """The distribution of the values of ``C`` channels. A search needs what the subclasses add.

    Args:
        low: ``(C,)``: least value.
        high: ``(C,)``: greatest value.
    """

    def __init__(self, low: Tensor, high: Tensor):
        self.low, self.high = low, high

    def quantiles(self, q: Sequence[float]) -> Tensor:
        """Quantiles, ``(len(q), C)``; 0 and 1 are the exact ends."""
        raise NotImplementedError

    def errors(self, grid: Grid, scale: Tensor, zero_point: Tensor) -> Iterable[Tensor]:
        """Sums of squared errors under ``K`` quantizers.

        Args:
            grid: Of the quantizers.
            scale: ``(K, C)``.
            zero_point: ``(K, C)``.

        Returns:
            ``K`` tensors ``(C,)``, float64.
        """
        raise NotImplementedError


class Store(ABC):
    """Base of all stores.

    Attributes:
        low: None before any data, then the least value: float32, ``()`` for a whole tensor, else ``(C,)``.
        high: The greatest value, likewise.
    """

    def __init__(self) -> None:
        self.low: Optional[Tensor] = None
        self.high: Optional[Tensor] = None

    def ends(self) -> Tuple[Tensor, Tensor]:
        """``low`` and ``high``; NotCalibratedError before any data."""
        if self.low is None or self.high is None:
            raise NotCalibratedError('The observer saw no data: run at least one image through the layer.')
        return self.low, self.high

    def widened(self, low: Tensor, high: Tensor) -> Tuple[Tensor, Tensor]:
        """The ends with those of more data, which are not set."""
        if self.low is None or self.high is None:
            return low, high
        return torch.minimum(self.low, low), torch.maximum(self.high, high)

    def reduced_ends(self, channels: int) -> Tuple[Tensor, Tensor]:
        """The ends over all ranks, some of which may have seen nothing; all ranks call it.

        Args:
            channels: How many there are; 0 for a whole tensor.
        """
        if self.low is None or self.high is None:
            low = torch.full((channels,) if channels else (), torch.inf)
            high = -low
        else:
            low, high = self.low.clone(), self.high.clone()
        return minimum_(low), maximum_(high)

    @abstractmethod
    def update(self, data: Tensor) -> None:
        """Take in data that is not empty; DataError on NaN or infinity."""

    @abstractmethod
    def reduce(self, channels: int) -> None:
        """Take in what the other ranks saw; all ranks call it, see :meth:`reduced_ends`."""

    @abstractmethod
    def parts(self) -> Iterator[Values]:
        """The distribution of some channels at a time, in order, which bounds the memory of what a search needs."""


class Ends(Store):
    """The least and the greatest value alone.

    Args:
        dim: Dimension of the data to reduce; None for all.
    """

    def __init__(self, dim: Optional[int] = None):
        super().__init__()
        self.dim = dim

    def update(self, data: Tensor) -> None:
        """As :meth:`Store.update`."""
        # Of rows, torch.aminmax takes twenty times as long as the two apart.
        low, high = torch.aminmax(data) if self.dim is None else (data.amin(self.dim), data.amax(self.dim))
        low, high = low.float(), high.float()
        refuse_non_finite(low, high)
        self.low, self.high = self.widened(low, high)

    def reduce(self, channels: int) -> None:
        """As :meth:`Store.reduce`."""
        self.low, self.high = self.reduced_ends(channels)

    def parts(self) -> Iterator[Values]:
        """As :meth:`Store.parts`: all at once."""
        low, high = self.ends()
        yield Values(low.reshape(-1), high.reshape(-1))


class SortedValues(Values):
    """All values of each channel.

    Args:
        values: ``(C, n)``, float32, rising along each row.
    """

    def __init__(self, values: Tensor):
        super().__init__(values[:, 0], values[:, -1])
        self.values = values

    def quantiles(self, q: Sequence[float]) -> Tensor:
        """As :meth:`Values.quantiles`, interpolated between neighbours; float32."""
        rank = torch.tensor(q, dtype=torch.float64, device=self.values.device) * (self.values.shape[1] - 1)
        floor, ceil = rank.floor().long(), rank.ceil().long()
        low, high = self.values[:, floor].double(), self.values[:, ceil].double()
        return (low + (high - low) * (rank - floor)).float().T

    def errors(self, grid: Grid, scale: Tensor, zero_point: Tensor) -> Iterator[Tensor]:
        """As :meth:`Values.errors`, of the rounding that the layer will do; one after the other, to save memory."""
        for qparams in zip(scale, zero_point):
            error = fake_quantize(self.values, *qparams, grid.qmin, grid.qmax, axis=0).sub_(self.values)
            yield error.square_().sum(dim=1, dtype=torch.float64)


class AllValues(Store):
    """All values of each channel. Meant for weights, which are seen once."""

    def __init__(self) -> None:
        super().__init__()
        self.values: Optional[Tensor] = None  # (C, n), float32, sorted

    def update(self, data: Tensor) -> None:
        """Take in ``(C, n)``."""
        data = data.float()
        low, high = data.amin(1), data.amax(1)
        refuse_non_finite(low, high)
        self.low, self.high = self.widened(low, high)
        values = data if self.values is None else torch.cat([self.values, data], dim=1)
        self.values = values.sort(dim=1).values

    def reduce(self, channels: int) -> None:
        """Refused."""
        raise SpecError(
            'All values of each channel are kept for weights alone, which every rank has: for activations use a '
            'TensorObserver or a FeatureObserver.'
        )

    def parts(self) -> Iterator[Values]:
        """As :meth:`Store.parts`: all at once."""
        if self.values is not None:
            yield SortedValues(self.values)
