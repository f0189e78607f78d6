"""Histograms, and the quantiles and squared errors that follow from them.

The width of a bin is a power of two. It only ever doubles, and bins merge in pairs, so that no count has to be split.
The result does not depend on the order of the data or on how it was cut into batches.
"""

import math
from typing import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from psaq_mm.quantization.grids import Grid
from psaq_mm.quantization.stores import Store, Values, refuse_non_finite
from psaq_mm.ranks import maximum_, sum_

__all__ = ['ChannelHistogram', 'Distribution', 'Histogram']


class Distribution(Values):
    """The values of ``C`` histograms of ``B`` bins, under the assumption that the values of a bin lie evenly over it.

    Running sums of the powers 0, 1 and 2 of the values then give the squared error of any quantizer exactly. The cost
    grows with the number of levels and not of bins.

    Args:
        counts: ``(C, B)``, integers.
        start: ``(C,)``, float64 whole numbers: the first bin begins at ``start * width``.
        width: ``(C,)``, float64: width of a bin in units of the data.
        low: ``(C,)``: least value.
        high: ``(C,)``: greatest value.
        interpolate: Whether a quantile is interpolated between the two values around it, as ``torch.quantile`` does,
            or read where its own rank lies in a bin.
    """

    def __init__(
        self, counts: Tensor, start: Tensor, width: Tensor, low: Tensor, high: Tensor, interpolate: bool = True
    ):
        super().__init__(low.double(), high.double())
        self.counts, self.interpolate = counts.double(), interpolate
        self.start, self.width = start[:, None], width[:, None]
        # Positions are counted from the middle bin, which keeps the sums small.
        self._half = counts.shape[1] // 2
        left = torch.arange(counts.shape[1], dtype=torch.float64, device=counts.device) - self._half
        means = left + 0.5, left * left + left + 1 / 3  # of the values in a bin, and of their squares
        self._sums = tuple(map(self._up_to_edges, (self.counts, *(self.counts * mean for mean in means))))

    @staticmethod
    def _up_to_edges(of_bins: Tensor) -> Tensor:
        """Running sum at each of the ``B + 1`` edges."""
        sums = of_bins.new_zeros(len(of_bins), of_bins.shape[1] + 1)
        torch.cumsum(of_bins, 1, out=sums[:, 1:])
        return sums

    def quantiles(self, q: Sequence[float]) -> Tensor:
        """As :meth:`.stores.Values.quantiles`; float64, each off by less than the width of a bin."""
        last = self._sums[0][:, -1:] - 1
        rank = torch.tensor(q, dtype=torch.float64, device=last.device) * last
        if not self.interpolate:
            return self._at_rank(rank, last).T
        floor = rank.floor()
        low, high = self._at_rank(floor, last), self._at_rank(rank.ceil(), last)
        return (low + (high - low) * (rank - floor)).T

    def _at_rank(self, rank: Tensor, last: Tensor) -> Tensor:
        """The values of these ranks, ``(C, Q)``, which count from 0 and may lie between two values."""
        below, middle = self._sums[0], rank + 0.5
        index = torch.searchsorted(below[:, 1:].contiguous(), middle, right=True).clamp_(max=self.counts.shape[1] - 1)
        inside = (middle - below.gather(1, index)) / self.counts.gather(1, index).clamp(min=1)
        value = (self.start + index + inside) * self.width
        low, high = self.low[:, None], self.high[:, None]
        value = torch.where(rank <= 0, low, torch.where(rank >= last, high, value))
        return torch.minimum(torch.maximum(value, low), high)

    def errors(self, grid: Grid, scale: Tensor, zero_point: Tensor) -> Iterable[Tensor]:
        """As :meth:`.stores.Values.errors`."""
        if scale.shape[1] == 1:  # all at once
            return self.squared_error(*grid.cells(scale[:, 0], zero_point[:, 0]))[:, None]
        return (self.squared_error(*grid.cells(*qparams)) for qparams in zip(scale, zero_point))

    def squared_error(self, edges: Tensor, levels: Tensor) -> Tensor:
        """Sum of squared errors of a quantizer that maps all values between two edges to one level.

        Args:
            edges: float64, ``(C, L - 1)``, rising: where one level ends and the next begins. With one channel
                ``(K, L - 1)``, of ``K`` quantizers.
            levels: float64, ``(C, L)`` or ``(K, L)``, in units of the data as the edges.

        Returns:
            float64, ``(C,)`` or ``(K,)``.
        """
        bins, rows = self.counts.shape[1], len(edges)
        place = (edges / self.width - self.start).clamp_(0, bins)
        index = place.floor().clamp_(max=bins - 1).long()
        right, left = place - self._half, index.double() - self._half
        counts = self.counts.expand(rows, -1).gather(1, index)
        power, pieces = (right, left), []
        for degree, sums in enumerate(self._sums, 1):
            sums = sums.expand(rows, -1)
            # Sum over whole bins, and the integral over the part of a bin up to the edge.
            at_edges = sums.gather(1, index).addcmul_(counts, (power[0] - power[1]) / degree)
            pieces.append(torch.diff(at_edges, dim=1, prepend=torch.zeros_like(sums[:, :1]), append=sums[:, -1:]))
            power = power[0] * right, power[1] * left
        level = levels / self.width - self.start - self._half
        # The sum of (x - level)^2 in each cell, below 0 by rounding alone.
        error = (pieces[0] * level).sub_(pieces[1], alpha=2).mul_(level).add_(pieces[2]).clamp_(min=0)
        return error.sum(1) * self.width.squeeze(1) ** 2


class Histogram(Store):
    """Counts of all values seen, on a fixed number of bins around 0; memory does not grow with the data.

    The bin width is a power of two and doubles when a value falls outside.

    Args:
        interpolate: See :class:`Distribution`.

    Attributes:
        counts: ``(BINS,)``, int64: float32 stops counting at 2**24. Missing before any data.
        exponent: The bins cover ``(-2**exponent, 2**exponent)``.
    """

    BINS = 1 << 16
    # values processed at a time: bounds the memory of the bin numbers, and keeps them in a processor's cache
    _CHUNK = 1 << 20
    _MIN_EXPONENT = -100  # values below 2**-100 share a bin with 0

    counts: Tensor

    def __init__(self, interpolate: bool = False):
        super().__init__()
        self.interpolate = interpolate
        self.exponent = self._MIN_EXPONENT

    @property
    def width(self) -> float:
        """Width of a bin, in units of the data."""
        return math.ldexp(2.0, self.exponent) / self.BINS

    def update(self, data: Tensor) -> None:
        """Count the values of a flat tensor."""
        data = data.float()
        low, high = torch.aminmax(data)
        ends = torch.stack([low, high]).tolist()  # read once: a device is waited for each time
        refuse_non_finite(*torch.tensor(ends))
        if self.low is None:
            self.counts = torch.zeros(self.BINS, dtype=torch.int64, device=data.device)
        self.low, self.high = self.widened(low, high)
        self._widen(math.frexp(max(map(abs, ends)))[1])
        per_unit = 1.0 / self.width  # a power of two: the product below is exact
        size = min(self._CHUNK, len(data))
        place, index = data.new_empty(size), data.new_empty(size, dtype=torch.int32)
        for chunk in data.split(self._CHUNK):
            # Whole numbers of at most 17 digits: float32 holds them.
            bins = torch.mul(chunk, per_unit, out=place[: len(chunk)]).floor_().add_(self.BINS // 2)
            self.counts += torch.bincount(index[: len(chunk)].copy_(bins), minlength=self.BINS)

    def reduce(self, channels: int) -> None:
        """As :meth:`.stores.Store.reduce`."""
        if self.low is None:
            self.counts = torch.zeros(self.BINS, dtype=torch.int64)
        self.low, self.high = self.reduced_ends(channels)
        # To the width that all values need. Merging bins is exact: this is the histogram of one rank that saw all.
        self._widen(int(maximum_(torch.tensor([self.exponent]))))
        sum_(self.counts)

    def _widen(self, exponent: int) -> None:
        shift = exponent - self.exponent
        if shift <= 0:
            return
        half = self.BINS // 2
        index = torch.arange(-half, half, device=self.counts.device) // 2 ** min(shift, 40)
        self.counts = torch.zeros_like(self.counts).index_add_(0, index + half, self.counts)
        self.exponent = exponent

    def parts(self) -> Iterator[Distribution]:
        """As :meth:`.stores.Store.parts`: the whole tensor is one channel."""
        low, high = self.ends()
        width = low.new_tensor([self.width], dtype=torch.float64)
        start = low.new_tensor([-self.BINS // 2], dtype=torch.float64)
        yield Distribution(self.counts[None], start, width, low[None], high[None], self.interpolate)


def _power_of_two(exponent: Tensor) -> Tensor:
    """``2**exponent`` in float64, exactly (a device's pow may be off by a digit); exponents from -1022 to 1023."""
    return ((exponent + 1023) << 52).view(torch.float64)


class ChannelHistogram(Store):
    """Counts of all values seen of each channel, 8 KiB a channel however much data there was.

    Each channel has its own bin width, the least power of two with which all its values fit into the bins, and its
    own first bin: its least and greatest value lie 1023 to 2048 widths apart, also far from 0 (fewer only where float32
    itself is coarser).

    Attributes:
        counts: ``(C, BINS)``, int32 as long as no count can overflow, then int64.
        exponent: ``(C,)``, int64: the bins of channel c are ``2**exponent[c]`` wide.
        start: ``(C,)``, int64: bin i holds ``[start + i, start + i + 1)`` widths.
    """

    BINS = 1 << 11
    _VALUES = 1 << 18  # values binned at a time: bounds the memory of the bin numbers
    _CHANNELS = 32  # channels binned at a time: their counts stay in a processor's cache
    _MIN_EXPONENT = -120  # of the width: its inverse is finite in float32
    _DIGITS = 23  # of a bin number: float32 holds 24, and bins reach beyond the values

    counts: Tensor
    exponent: Tensor
    start: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def update(self, data: Tensor) -> None:
        """Count the values of ``(rows, C)``."""
        low, high = data.amin(0).float(), data.amax(0).float()
        refuse_non_finite(low, high)
        self._cover(*self.widened(low, high))
        self.rows += len(data)
        if self.rows > torch.iinfo(torch.int32).max:
            self.counts = self.counts.long()
        wide = (self.exponent > 0).cpu()  # read once: a device is waited for each time
        for part in self._slices():
            # Divided by a width above 1, a tiny float32 could underflow, and a negative one would end in the bin of 0.
            dtype = torch.float64 if bool(wide[part].any()) else torch.float32
            per_unit, start = _power_of_two(-self.exponent[part]).to(dtype), self.start[part].to(dtype)
            base = torch.arange(len(start), dtype=torch.int32, device=data.device) * self.BINS
            for chunk in data[:, part].split(max(self._VALUES // len(base), 1)):
                # All exact: powers of two, and whole numbers of at most 24 digits.
                index = (chunk.to(dtype) * per_unit).floor_().sub_(start).to(torch.int32).add_(base)
                counts = torch.bincount(index.view(-1), minlength=len(base) * self.BINS)
                self.counts[part] += counts.view(-1, self.BINS).to(self.counts.dtype)

    def reduce(self, channels: int) -> None:
        """As :meth:`.stores.Store.reduce`."""
        low, high = self.reduced_ends(channels)
        self._cover(low, high)
        # Place the bins by the ends alone, on every rank: their place so far depends on what a rank saw first.
        exponent = self._least_exponent(low, high)
        start = self._first_bin(low, high, exponent)
        for part in torch.arange(channels, device=low.device).split(self._CHANNELS):
            self._move(part, exponent[part], start[part])
        self.rows = int(sum_(torch.tensor([self.rows])))
        self.counts = sum_(self.counts.long())

    def parts(self) -> Iterator[Distribution]:
        """As :meth:`.stores.Store.parts`: bounds the memory of the float64 sums."""
        low, high = self.ends()
        for part in self._slices():
            width = _power_of_two(self.exponent[part])
            yield Distribution(self.counts[part], self.start[part].double(), width, low[part], high[part])

    def _slices(self) -> Iterator[slice]:
        for first in range(0, len(self.counts), self._CHANNELS):
            yield slice(first, first + self._CHANNELS)

    def _cover(self, low: Tensor, high: Tensor) -> None:
        """Place the bins so that they cover these ends, ``(C,)`` each, which are set."""
        exponent = self._least_exponent(low, high)
        start = self._first_bin(low, high, exponent)
        per_unit = _power_of_two(-exponent)
        first, last = (low * per_unit).floor().long(), (high * per_unit).floor().long()
        empty = self.low is None
        self.low, self.high = low, high
        if empty:
            self.counts = torch.zeros(len(low), self.BINS, dtype=torch.int32, device=low.device)
            self.exponent, self.start = exponent, start
            return
        moved = (exponent > self.exponent) | (first < self.start) | (last >= self.start + self.BINS)
        for channels in moved.nonzero().squeeze(1).split(self._CHANNELS):
            self._move(channels, exponent[channels], start[channels])

    def _first_bin(self, low: Tensor, high: Tensor, exponent: Tensor) -> Tensor:
        # The range lies in the middle of the bins: with room on both sides, bins move seldom.
        per_unit = _power_of_two(-exponent)
        first, last = (low * per_unit).floor().long(), (high * per_unit).floor().long()
        return torch.div(first + last + 1 - self.BINS, 2, rounding_mode='floor')

    def _least_exponent(self, low: Tensor, high: Tensor) -> Tensor:
        # It depends on the two ends alone and never falls as they move apart: so batches do not matter.
        low, high = low.double(), high.double()
        span, farthest = self._exponent_of(high - low), self._exponent_of(torch.maximum(low.abs(), high.abs()))
        exponent = torch.maximum(span - (self.BINS.bit_length() - 1), farthest - self._DIGITS)
        exponent = exponent.clamp(min=self._MIN_EXPONENT)
        per_unit = _power_of_two(-exponent)
        return exponent + ((high * per_unit).floor() - (low * per_unit).floor() >= self.BINS)

    def _exponent_of(self, value: Tensor) -> Tensor:
        # For 0, frexp gives the exponent 0, which is greater than that of most numbers.
        return torch.where(value > 0, torch.frexp(value).exponent.long(), self._MIN_EXPONENT)

    def _move(self, channels: Tensor, exponent: Tensor, start: Tensor) -> None:
        old = self.start[channels][:, None] + torch.arange(self.BINS, device=channels.device)
        shift = (exponent - self.exponent[channels]).clamp(max=62)
        # The clamp moves empty bins only: all values have a place.
        index = ((old >> shift[:, None]) - start[:, None]).clamp_(0, self.BINS - 1)
        counts = self.counts[channels]
        self.counts[channels] = torch.zeros_like(counts).scatter_add_(1, index, counts)
        self.exponent[channels], self.start[channels] = exponent, start
