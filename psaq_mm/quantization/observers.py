"""Observers: what a tensor's range is, found from the data of any number of updates.

Every observer has ``update(x, valid=None)`` and ``range(bits, symmetric) -> (min, max)``. With ``channel_axis=None`` a
range has shape ``()``, else ``(C,)``. Empty input is skipped, NaN and infinity are refused.

Per channel the searches keep all values, which is meant for weights; activations per channel have
``channel_observers.py``.
"""

from typing import Iterator, Optional, Sequence, Tuple

import torch
from torch import Tensor

from psaq_mm.errors import DataError, NotCalibratedError, SpecError
from psaq_mm.quantization.histograms import Histogram, refuse_non_finite
from psaq_mm.quantization.primitives import choose_qparams, fake_quantize, memory_order, qrange
from psaq_mm.quantization.rows import valid_rows_of
from psaq_mm.ranks import maximum_, minimum_

PERCENTILES = (0.999, 0.9999, 0.99999, 1.0)
FACTORS = tuple(1 - 0.02 * i for i in range(41))


def widest_first(candidates: Sequence[float], above: float, what: str) -> Tuple[float, ...]:
    """Candidates of a search in falling order; SpecError where one is not in ``(above, 1]``."""
    for value in candidates:
        if not above < value <= 1:
            raise SpecError(f'The {what} {value!r} is out of range: choose {what}s above {above} and up to 1.')
    return tuple(sorted(candidates, reverse=True))


class Observer:
    """Base: selects rows, skips empty input, brings the channel to the front.

    Args:
        channel_axis: Axis that keeps its own range, or None for one range over everything.
    """

    def __init__(self, channel_axis: Optional[int] = None):
        self.channel_axis = channel_axis

    def update(self, x: Tensor, valid: Optional[Tensor] = None) -> None:
        """Take in one tensor.

        Args:
            x: Any shape and floating dtype; ``(..., D)`` where ``valid`` is given.
            valid: Row mask, see :func:`.rows.valid_rows_of`; per tensor only.

        Raises:
            DataError: NaN or infinity among what takes part, or a mask that does not fit.
        """
        if self.channel_axis is None:
            x = valid_rows_of(x.detach(), valid)
            # In the order of memory, as far as it goes: which value is whose does not matter here.
            data = x.permute(memory_order(x)).reshape(-1)
        elif valid is not None:
            raise DataError('A row mask cannot be combined with ranges per channel: drop one of the two.')
        else:
            data = x.detach().transpose(0, self.channel_axis).flatten(1) if x.dim() > 1 else x.detach()[:, None]
        if data.numel() == 0:
            return
        self._update(data.float())

    def range(self, bits: int, symmetric: bool) -> Tuple[Tensor, Tensor]:
        """Range to be covered by ``bits`` bits.

        Returns:
            ``(min, max)``, float32, shape ``()`` or ``(C,)``.

        Raises:
            NotCalibratedError: Nothing was observed.
        """
        if not self.saw_data:
            raise NotCalibratedError('The observer saw no data: run at least one image through the layer.')
        return self._range(bits, symmetric)

    @property
    def saw_data(self) -> bool:
        """Whether any value took part."""
        raise NotImplementedError

    @property
    def channels(self) -> int:
        """How many ranges there are: 0 for one over everything, -1 before any data."""
        raise NotImplementedError

    def reduce(self, channels: int) -> None:
        """Take in what this observer's namesakes on the other ranks saw; all ranks call it, see :mod:`.reduction`.

        Args:
            channels: Those of a rank that saw data.
        """
        raise NotImplementedError

    def _update(self, data: Tensor) -> None:
        raise NotImplementedError

    def _range(self, bits: int, symmetric: bool) -> Tuple[Tensor, Tensor]:
        raise NotImplementedError


class MinMaxObserver(Observer):
    """Least and greatest value of everything seen."""

    def __init__(self, channel_axis: Optional[int] = None):
        super().__init__(channel_axis)
        self.min: Optional[Tensor] = None
        self.max: Optional[Tensor] = None

    @property
    def saw_data(self) -> bool:
        return self.min is not None

    @property
    def channels(self) -> int:
        return len(self.min) if self.saw_data and self.min.dim() else self.saw_data - 1

    def reduce(self, channels: int) -> None:
        if not self.saw_data:
            self.min = torch.full((channels,) if channels else (), torch.inf)
            self.max = -self.min
        minimum_(self.min)
        maximum_(self.max)

    def _update(self, data: Tensor) -> None:
        # Of rows, torch.aminmax takes twenty times as long as the two apart.
        low, high = torch.aminmax(data) if self.channel_axis is None else (data.amin(1), data.amax(1))
        refuse_non_finite(low, high)
        self.min = low if self.min is None else torch.minimum(self.min, low)
        self.max = high if self.max is None else torch.maximum(self.max, high)

    def _range(self, bits: int, symmetric: bool) -> Tuple[Tensor, Tensor]:
        return self.min, self.max


class _HistogramData:
    """Per-tensor data of a search: a histogram."""

    def __init__(self):
        self.histogram = Histogram()

    @property
    def saw_data(self) -> bool:
        return self.histogram.counts is not None

    @property
    def channels(self) -> int:
        return self.saw_data - 1

    def reduce(self, channels: int) -> None:
        self.histogram.reduce()

    def add(self, data: Tensor) -> None:
        self.histogram.update(data)

    def quantiles(self, q: Sequence[float]) -> Tensor:
        return self.histogram.quantiles(q)

    def squared_errors(self, scale, zero_point, qmin, qmax) -> Tensor:
        return self.histogram.squared_errors(scale, zero_point, qmin, qmax)


class _ExactData:
    """Per-channel data of a search: all values, ``(C, n)``. Meant for weights, which are seen once."""

    def __init__(self):
        self.values: Optional[Tensor] = None

    @property
    def saw_data(self) -> bool:
        return self.values is not None

    @property
    def channels(self) -> int:
        return len(self.values) if self.saw_data else -1

    def reduce(self, channels: int) -> None:
        raise SpecError(
            'All values of each channel are kept for weights alone, which every rank has: for activations use the '
            'observers of channel_observers.py.'
        )

    def add(self, data: Tensor) -> None:
        refuse_non_finite(*torch.aminmax(data))
        values = data if self.values is None else torch.cat([self.values, data], dim=1)
        self.values = values.sort(dim=1).values

    def quantiles(self, q: Sequence[float]) -> Tensor:
        rank = torch.tensor(q, dtype=torch.float64, device=self.values.device) * (self.values.shape[1] - 1)
        floor, ceil = rank.floor().long(), rank.ceil().long()
        low, high = self.values[:, floor].double(), self.values[:, ceil].double()
        return (low + (high - low) * (rank - floor)).float().T

    def squared_errors(self, scale, zero_point, qmin, qmax) -> Iterator[Tensor]:
        for one in zip(scale, zero_point):
            error = fake_quantize(self.values, *one, qmin, qmax, axis=0).sub_(self.values)
            yield error.square_().sum(dim=1, dtype=torch.float64)


class _SearchObserver(Observer):
    """Takes the candidate range whose fake quantization has the least squared error; the widest among equals."""

    def __init__(self, channel_axis: Optional[int] = None):
        super().__init__(channel_axis)
        self.data = _HistogramData() if channel_axis is None else _ExactData()

    @property
    def saw_data(self) -> bool:
        return self.data.saw_data

    @property
    def channels(self) -> int:
        return self.data.channels

    def reduce(self, channels: int) -> None:
        self.data.reduce(channels)

    def _update(self, data: Tensor) -> None:
        self.data.add(data)

    def _candidates(self) -> Tuple[Tensor, Tensor]:
        """Ends of the candidate ranges, widest first, each ``(K,)`` or ``(K, C)``."""
        raise NotImplementedError

    def _range(self, bits: int, symmetric: bool) -> Tuple[Tensor, Tensor]:
        qmin, qmax = qrange(bits, symmetric)
        best, candidates = None, self._candidates()
        # Of all candidates at once, and nothing in the loop asks for a value: the host would wait for the device each
        # time.
        errors = self.data.squared_errors(*choose_qparams(*candidates, bits, symmetric), qmin, qmax)
        for error, low, high in zip(errors, *candidates):
            if best is None:
                best = error, low, high
            else:
                better = error < best[0]
                best = tuple(torch.where(better, new, old) for new, old in zip((error, low, high), best))
        return best[1], best[2]


class PercentileObserver(_SearchObserver):
    """Range between the quantiles 1 - p and p, p chosen by squared error (RepQ-ViT, arXiv 2212.08254, released code).

    Per tensor the values are kept as a :class:`Histogram` of fixed size, per channel exactly.

    Args:
        channel_axis: See :class:`Observer`.
        candidates: The p to choose from, each above 0.5; 1.0 is minimum and maximum.

    Raises:
        SpecError: A candidate is out of range.
    """

    def __init__(self, channel_axis: Optional[int] = None, candidates: Sequence[float] = PERCENTILES):
        super().__init__(channel_axis)
        self.candidates = widest_first(candidates, 0.5, 'percentile')

    def _candidates(self) -> Tuple[Tensor, Tensor]:
        return self.data.quantiles([*(1 - p for p in self.candidates), *self.candidates]).chunk(2)


class MSEObserver(_SearchObserver):
    """Range between minimum and maximum, both shrunk by the factor with the least squared error.

    Args:
        channel_axis: See :class:`Observer`.
        factors: Shrink factors to choose from, in (0, 1].

    Raises:
        SpecError: A factor is out of range.
    """

    def __init__(self, channel_axis: Optional[int] = None, factors: Sequence[float] = FACTORS):
        super().__init__(channel_axis)
        self.factors = widest_first(factors, 0, 'shrink factor')

    def _candidates(self) -> Tuple[Tensor, Tensor]:
        low, high = self.data.quantiles([0.0, 1.0])
        factors = torch.tensor(self.factors, device=low.device).reshape(-1, *[1] * low.dim())
        return factors * low, factors * high


OBSERVERS = dict(minmax=MinMaxObserver, percentile=PercentileObserver, mse=MSEObserver)


def build_observer(name: str, channel_axis: Optional[int] = None) -> Observer:
    """Observer by name: ``'minmax'``, ``'percentile'`` or ``'mse'``.

    Raises:
        SpecError: The name is not known.
    """
    if name not in OBSERVERS:
        raise SpecError(f'The observer {name!r} is not known: choose one of {", ".join(map(repr, OBSERVERS))}.')
    return OBSERVERS[name](channel_axis)
