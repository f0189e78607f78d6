"""Counts of values in bins of a power-of-two width, and what follows from them: quantiles and squared errors.

A bin's width only ever doubles, and bins merge in pairs. So no count is ever split by a guess, and the outcome does
not depend on the order of the data or on how it was cut into batches.
"""

import math
from typing import Iterator, Optional, Sequence, Tuple

import torch
from torch import Tensor

from psaq_mm.errors import DataError
from psaq_mm.ranks import maximum_, minimum_, sum_


def refuse_non_finite(low: Tensor, high: Tensor) -> None:
    """Raise DataError unless the least and the greatest value of a tensor are finite."""
    # Minimum and maximum propagate NaN, so they tell for the whole tensor.
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise DataError('The observed tensor holds NaN or infinity: look for the layer that produced it.')


class Distribution:
    """What is known of the values in ``H`` histograms of ``B`` bins: each bin's values lie evenly over it.

    The running sums of the values' powers 0, 1 and 2 give the squared error of any quantizer exactly under that
    assumption, at the cost of its levels and not of the bins.

    Args:
        counts: ``(H, B)``, integers.
        start: ``(H, )``, float64 whole numbers: the first bin begins at ``start * width``.
        width: ``(H, )``, float64: width of a bin in units of the data.
        low: ``(H, )``: least value.
        high: ``(H, )``: greatest value.
    """

    def __init__(self, counts: Tensor, start: Tensor, width: Tensor, low: Tensor, high: Tensor):
        self.counts = counts.double()
        self.start, self.width = start[:, None], width[:, None]
        self.low, self.high = low.double(), high.double()
        # Positions are counted in bins from the middle one, which keeps the sums small.
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
        """Quantiles, interpolated between neighbouring values as ``torch.quantile`` does; 0 and 1 are the exact ends.

        Returns:
            float64, ``(len(q), H)``. Each is off by less than the width of a bin.
        """
        last = self._sums[0][:, -1:] - 1
        rank = torch.tensor(q, dtype=torch.float64, device=last.device) * last
        floor = rank.floor()
        low, high = self._order_statistic(floor, last), self._order_statistic(rank.ceil(), last)
        return (low + (high - low) * (rank - floor)).T

    def _order_statistic(self, rank: Tensor, last: Tensor) -> Tensor:
        """The ``rank``-th least value, ranks ``(H, Q)`` from 0."""
        below = self._sums[0]
        index = torch.searchsorted(below[:, 1:].contiguous(), rank, right=True).clamp_(max=self.counts.shape[1] - 1)
        inside = (rank + 0.5 - below.gather(1, index)) / self.counts.gather(1, index).clamp(min=1)
        value = (self.start + index + inside) * self.width
        low, high = self.low[:, None], self.high[:, None]
        value = torch.where(rank <= 0, low, torch.where(rank >= last, high, value))
        return torch.minimum(torch.maximum(value, low), high)

    def squared_error(self, edges: Tensor, levels: Tensor) -> Tensor:
        """Sum of squared errors of a quantizer that maps all values between two edges to one level.

        Args:
            edges: float64, ``(H, L - 1)`` or ``(1, L - 1)``, rising: where one level ends and the next begins.
            levels: float64, ``(H, L)`` or ``(1, L)``, in units of the data as the edges.

        Returns:
            float64, ``(H, )``.
        """
        bins = self.counts.shape[1]
        place = (edges / self.width - self.start).clamp_(0, bins)
        index = place.floor().clamp_(max=bins - 1).long()
        right, left = place - self._half, index.double() - self._half
        counts = self.counts.gather(1, index)
        power, pieces = (right, left), []
        for degree, sums in enumerate(self._sums, 1):
            # Sum over whole bins, and the integral over the part of a bin up to the edge.
            at_edges = sums.gather(1, index).addcmul_(counts, (power[0] - power[1]) / degree)
            pieces.append(torch.diff(at_edges, dim=1, prepend=torch.zeros_like(sums[:, :1]), append=sums[:, -1:]))
            power = power[0] * right, power[1] * left
        level = levels / self.width - self.start - self._half
        # The sum of (x - level)^2 in each cell, below 0 by rounding alone.
        error = (pieces[0] * level).sub_(pieces[1], alpha=2).mul_(level).add_(pieces[2]).clamp_(min=0)
        return error.sum(1) * self.width.squeeze(1) ** 2


class Histogram:
    """Counts of all values seen, on a fixed number of bins around 0; memory does not grow with the data.

    The bin width is a power of two and doubles when a value falls outside.
    """

    BINS = 1 << 16
    # values binned at a time: bounds the memory of the bin numbers, and keeps them in a processor's cache
    _CHUNK = 1 << 20
    _MIN_EXPONENT = -100  # values below 2**-100 share a bin with 0

    def __init__(self):
        self.counts: Optional[Tensor] = None  # int64: float32 stops counting at 2**24
        self.exponent = self._MIN_EXPONENT  # the bins cover (-2**exponent, 2**exponent)
        self._found: Optional[Tuple] = None
        self.min: Optional[Tensor] = None
        self.max: Optional[Tensor] = None

    @property
    def width(self) -> float:
        """Width of a bin, in units of the data."""
        return math.ldexp(2.0, self.exponent) / self.BINS

    def update(self, data: Tensor) -> None:
        """Count the values of a flat float32 tensor; DataError on NaN or infinity."""
        low, high = torch.aminmax(data)
        ends = torch.stack([low, high]).tolist()  # read once: a device is waited for each time
        refuse_non_finite(*torch.tensor(ends))
        self.min = low if self.min is None else torch.minimum(self.min, low)
        self.max = high if self.max is None else torch.maximum(self.max, high)
        if self.counts is None:
            self.counts = torch.zeros(self.BINS, dtype=torch.int64, device=data.device)
        self._widen(math.frexp(max(map(abs, ends)))[1])
        per_unit = 1.0 / self.width  # a power of two: the product below is exact
        size = min(self._CHUNK, len(data))
        place, index = data.new_empty(size), data.new_empty(size, dtype=torch.int32)
        for chunk in data.split(self._CHUNK):
            # Whole numbers of at most 17 digits: float32 holds them.
            found = torch.mul(chunk, per_unit, out=place[: len(chunk)]).floor_().add_(self.BINS // 2)
            self.counts += torch.bincount(index[: len(chunk)].copy_(found), minlength=self.BINS)

    def reduce(self) -> None:
        """Add the counts of the other ranks, some of which may have none; all ranks call it."""
        if self.counts is None:
            self.counts = torch.zeros(self.BINS, dtype=torch.int64)
            self.min = torch.tensor(torch.inf)
            self.max = -self.min
        minimum_(self.min)
        maximum_(self.max)
        # To the width that all values ask for; merging bins is exact, so this is the histogram of one rank that saw
        # all.
        self._widen(int(maximum_(torch.tensor([self.exponent]))))
        sum_(self.counts)
        self._found = None

    def _widen(self, exponent: int) -> None:
        shift = exponent - self.exponent
        if shift <= 0:
            return
        half = self.BINS // 2
        index = torch.arange(-half, half, device=self.counts.device) // 2 ** min(shift, 40)
        self.counts = torch.zeros_like(self.counts).index_add_(0, index + half, self.counts)
        self.exponent = exponent

    def quantiles(self, q: Sequence[float]) -> Tensor:
        """Quantiles, linear inside a bin; 0 and 1 are the exact ends. float32, shape ``(len(q),)``."""
        q = torch.tensor(q, dtype=torch.float64, device=self.counts.device)
        below = torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)]).double()
        rank = q * (below[-1] - 1) + 0.5
        index = (torch.searchsorted(below, rank, right=True) - 1).clamp(0, self.BINS - 1)
        inside = (rank - below[index]) / self.counts[index].double().clamp(min=1)
        value = (index - self.BINS // 2 + inside) * self.width
        value = torch.where(q <= 0, self.min.double(), torch.where(q >= 1, self.max.double(), value))
        return torch.minimum(torch.maximum(value, self.min.double()), self.max.double()).float()

    def squared_error(self, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
        """:meth:`squared_errors` of one quantizer, scale and zero point ``()``."""
        return self.squared_errors(scale[None], zero_point[None], qmin, qmax)[0]

    def squared_errors(self, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
        """Sums of squared errors that fake quantization would make, values spread evenly over each bin.

        With u = x / scale and k = clamp(round(u)), the integral of (u - k)^2 is k/12 + (u - k)^3/3, also where it
        clips: exact however many steps a bin spans, where evaluating at bin centres fails for steps finer than a bin.

        Args:
            scale: ``(K, )``.
            zero_point: ``(K, )``.
            qmin: Least code.
            qmax: Greatest code.

        Returns:
            float64, ``(K, )``.
        """
        left, counts = self._occupied()
        steps, offsets = scale.double()[:, None], zero_point[:, None]

        def integral(edges: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
            ratio = edges * (self.width / step)
            code = ratio.round().clamp_(low, high)
            rest = ratio.sub_(code)
            return (rest * rest).mul_(rest).div_(3).add_(code, alpha=1 / 12)

        found = []
        # One at a time stays in a processor's cache; a GPU is better off with few large operations.
        for step, offset in zip(*(t.split(1 if left.device.type == 'cpu' else len(scale)) for t in (steps, offsets))):
            ends = (qmin - offset).double(), (qmax - offset).double()
            mean = integral(left + 1, step, *ends).sub_(integral(left, step, *ends)).mul_(step / self.width)
            found.append((mean * counts).sum(1) * step.squeeze(1) ** 2)
        return torch.cat(found)

    def _occupied(self) -> Tuple[Tensor, Tensor]:
        """Left edges, in bins from 0, and counts of the bins that hold a value, float64: the same for all
        candidates.
        """
        if self._found is None or self._found[0] is not self.counts or self._found[1] != self.counts._version:
            bins = self.counts.nonzero().squeeze(1)
            self._found = (
                self.counts,
                self.counts._version,
                ((bins - self.BINS // 2).double(), self.counts[bins].double()),
            )
        return self._found[2]

    def distribution(self) -> Distribution:
        """The same as a row of a :class:`Distribution`."""
        width = self.counts.new_tensor([self.width], dtype=torch.float64)
        start = self.counts.new_tensor([-self.BINS // 2], dtype=torch.float64)
        return Distribution(self.counts[None], start, width, self.min[None], self.max[None])


def _power_of_two(exponent: Tensor) -> Tensor:
    """``2**exponent`` in float64, exactly (a device's pow may be off by a digit); exponents from -1022 to 1023."""
    return ((exponent + 1023) << 52).view(torch.float64)


class ChannelHistogram:
    """Counts of all values seen of each channel; 8 KiB a channel however much data there was.

    Each channel has its own bin width, the least power of two with which all its values fit into the bins, and its
    own first bin: its least and greatest value lie 1023 to 2048 widths apart, also far from 0 (fewer only where float32
    itself is coarser).
    """

    BINS = 1 << 11
    _VALUES = 1 << 18  # values binned at a time: bounds the memory of the bin numbers
    _CHANNELS = 32  # channels binned at a time: their counts stay in a processor's cache
    _MIN_EXPONENT = -120  # of the width: its inverse is finite in float32
    _DIGITS = 23  # of a bin number: float32 holds 24, and bins reach beyond the values

    def __init__(self):
        self.counts: Optional[Tensor] = None  # (C, BINS), int32 as long as no count can overflow, then int64
        self.exponent: Optional[Tensor] = None  # (C, ), int64: the bins of channel c are 2**exponent[c] wide
        self.start: Optional[Tensor] = None  # (C, ), int64: bin i holds [start + i, start + i + 1) widths
        self.min: Optional[Tensor] = None
        self.max: Optional[Tensor] = None
        self.rows = 0

    def update(self, data: Tensor) -> None:
        """Count the values of ``(rows, C)``; DataError on NaN or infinity."""
        low, high = data.amin(0).float(), data.amax(0).float()
        refuse_non_finite(low, high)
        if self.counts is not None:
            low, high = torch.minimum(self.min, low), torch.maximum(self.max, high)
        self._cover(low, high)
        self.rows += len(data)
        if self.rows > torch.iinfo(torch.int32).max:
            self.counts = self.counts.long()
        wide = (self.exponent > 0).cpu()  # read once: a device is waited for each time
        for part in self._parts():
            # Divided by a width above 1, a tiny float32 could underflow, and a negative one would end in the bin of 0.
            dtype = torch.float64 if bool(wide[part].any()) else torch.float32
            per_unit, start = _power_of_two(-self.exponent[part]).to(dtype), self.start[part].to(dtype)
            base = torch.arange(len(start), dtype=torch.int32, device=data.device) * self.BINS
            for chunk in data[:, part].split(max(self._VALUES // len(base), 1)):
                # All exact: powers of two, and whole numbers of at most 24 digits.
                index = (chunk.to(dtype) * per_unit).floor_().sub_(start).to(torch.int32).add_(base)
                found = torch.bincount(index.view(-1), minlength=len(base) * self.BINS)
                self.counts[part] += found.view(-1, self.BINS).to(self.counts.dtype)

    def reduce(self, channels: int) -> None:
        """Add the counts of the other ranks, some of which may have none; all ranks call it."""
        seen = self.counts is not None
        low = minimum_(self.min.clone() if seen else torch.full((channels,), torch.inf))
        high = maximum_(self.max.clone() if seen else torch.full((channels,), -torch.inf))
        self._cover(low, high)
        # Bins lie where the ends alone say, on every rank: where they lay before depends on what a rank saw first.
        exponent = self._least_exponent(low, high)
        start = self._first_bin(low, high, exponent)
        for part in torch.arange(channels, device=low.device).split(self._CHANNELS):
            self._move(part, exponent[part], start[part])
        self.rows = int(sum_(torch.tensor([self.rows])))
        self.counts = sum_(self.counts.long())

    def distributions(self) -> Iterator[Distribution]:
        """The distribution of some channels at a time, in order: bounds the memory of the float64 sums."""
        for part in self._parts():
            yield Distribution(
                self.counts[part],
                self.start[part].double(),
                _power_of_two(self.exponent[part]),
                self.min[part],
                self.max[part],
            )

    def _parts(self) -> Iterator[slice]:
        for first in range(0, len(self.counts), self._CHANNELS):
            yield slice(first, first + self._CHANNELS)

    def _cover(self, low: Tensor, high: Tensor) -> None:
        """Make every value between two ends per channel have a bin."""
        exponent = self._least_exponent(low, high)
        start = self._first_bin(low, high, exponent)
        per_unit = _power_of_two(-exponent)
        first, last = (low * per_unit).floor().long(), (high * per_unit).floor().long()
        self.min, self.max = low, high
        if self.counts is None:
            self.counts = torch.zeros(len(low), self.BINS, dtype=torch.int32, device=low.device)
            self.exponent, self.start = exponent, start
            return
        moved = (exponent > self.exponent) | (first < self.start) | (last >= self.start + self.BINS)
        for channels in moved.nonzero().squeeze(1).split(self._CHANNELS):
            self._move(channels, exponent[channels], start[channels])

    def _first_bin(self, low: Tensor, high: Tensor, exponent: Tensor) -> Tensor:
        # The ends in the middle, so that there is room on both sides and bins move seldom.
        per_unit = _power_of_two(-exponent)
        first, last = (low * per_unit).floor().long(), (high * per_unit).floor().long()
        return torch.div(first + last + 1 - self.BINS, 2, rounding_mode='floor')

    def _least_exponent(self, low: Tensor, high: Tensor) -> Tensor:
        # A function of the two ends alone that never falls as they part: this is what makes batches not matter.
        low, high = low.double(), high.double()
        span, farthest = self._exponent_of(high - low), self._exponent_of(torch.maximum(low.abs(), high.abs()))
        exponent = torch.maximum(span - (self.BINS.bit_length() - 1), farthest - self._DIGITS)
        exponent = exponent.clamp(min=self._MIN_EXPONENT)
        per_unit = _power_of_two(-exponent)
        return exponent + ((high * per_unit).floor() - (low * per_unit).floor() >= self.BINS)

    def _exponent_of(self, value: Tensor) -> Tensor:
        # frexp gives 0 the exponent 0, which is more than that of most numbers.
        return torch.where(value > 0, torch.frexp(value).exponent.long(), self._MIN_EXPONENT)

    def _move(self, channels: Tensor, exponent: Tensor, start: Tensor) -> None:
        old = self.start[channels][:, None] + torch.arange(self.BINS, device=channels.device)
        shift = (exponent - self.exponent[channels]).clamp(max=62)
        # What the clamp catches are empty bins: all values have a place.
        index = ((old >> shift[:, None]) - start[:, None]).clamp_(0, self.BINS - 1)
        counts = self.counts[channels]
        self.counts[channels] = torch.zeros_like(counts).scatter_add_(1, index, counts)
        self.exponent[channels], self.start[channels] = exponent, start
