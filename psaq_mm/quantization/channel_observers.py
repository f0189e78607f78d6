"""Observers of activations channel by channel (the last dimension), in memory that does not grow with the data.

They serve LayerNorm outputs before their channels are brought to one scale (RepQ-ViT, arXiv 2212.08254, section 3.2).
A channel's range need not include 0, and its zero point need not be a code: both end with the reparameterization.
"""

from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

from psaq_mm.errors import DataError, NotCalibratedError, SpecError
from psaq_mm.quantization.histograms import ChannelHistogram, Distribution, refuse_non_finite
from psaq_mm.quantization.observers import FACTORS, PERCENTILES, widest_first
from psaq_mm.quantization.primitives import MIN_SCALE, qrange
from psaq_mm.quantization.rows import valid_rows_of
from psaq_mm.ranks import maximum_, minimum_


def channel_qparams(low: Tensor, high: Tensor, bits: int) -> Tuple[Tensor, Tensor]:
    """Scale and zero point that put a range's two ends on the first and the last code, whether or not it includes 0.

    ``scale = (high - low) / (2**bits - 1)`` and ``zero_point = round(-low / scale)``. A range of one value ``v`` gets
    scale ``|v|`` (1 where it is 0) and zero point ``-sign(v)``: code 0 stands for ``v`` itself.

    Args:
        low: Lower ends, ``(C,)``, finite.
        high: Upper ends, ``(C,)``, finite, none below its lower end.
        bits: Width of a code, 2 to 8.

    Returns:
        ``(scale, zero_point)``, float32 and int64, ``(C,)``. The zero point is not limited to the codes: it grows with
        the distance of the range from 0, and beyond 2**24 float32 does not hold it.

    Raises:
        SpecError: ``bits`` is out of range.

    Example:
        >>> channel_qparams(torch.tensor([5., -1., 3.]), torch.tensor([6.5, 2., 3.]), bits=2)
        (tensor([0.5000, 1.0000, 3.0000]), tensor([-10,   1,  -1]))
    """
    steps = qrange(bits, symmetric=False)[1]
    low, high = low.double(), high.double()
    of_one = torch.where(low == 0, 1.0, low.abs())
    scale = torch.where(high > low, (high - low) / steps, of_one).clamp(min=MIN_SCALE).float()
    zero_point = torch.where(high > low, (-low / scale.double()).round(), -low.sign())
    return scale, zero_point.long()


def _error(values: Distribution, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Squared error of the quantizer of these ranges, ``(C,)``; infinite for a range of one value."""
    scale, zero_point = (t.double()[:, None] for t in channel_qparams(low, high, bits))
    codes = torch.arange(2**bits, dtype=torch.float64, device=low.device)
    levels = (codes - zero_point) * scale
    error = values.squared_error(levels[:, :-1] + scale / 2, levels)
    return torch.where(high > low, error, torch.inf)


class ChannelMinMaxObserver:
    """Least and greatest value of each channel; the base of the others.

    Attributes:
        low: float32, ``(C,)``: least value seen, the value of a channel that is ``constant``.
        high: float32, ``(C,)``: greatest value seen.
    """

    def __init__(self):
        self.low: Optional[Tensor] = None
        self.high: Optional[Tensor] = None

    @property
    def saw_data(self) -> bool:
        """Whether any value took part."""
        return self.low is not None

    @property
    def channels(self) -> int:
        """How many there are; -1 before any data."""
        return len(self.low) if self.saw_data else -1

    def reduce(self, channels: int) -> None:
        """Take in what this observer's namesakes on the other ranks saw; all ranks call it, see :mod:`.reduction`.

        Args:
            channels: Those of a rank that saw data.

        Raises:
            DataError: The ranks saw different numbers of channels.
        """
        if self.saw_data and len(self.low) != channels:
            raise DataError(
                f'This rank observed {len(self.low)} channels and another one {channels}: all need the same model.'
            )
        self._reduce(channels)

    def _reduce(self, channels: int) -> None:
        if not self.saw_data:
            self.low = torch.full((channels,), torch.inf)
            self.high = -self.low
        minimum_(self.low)
        maximum_(self.high)

    @property
    def constant(self) -> Tensor:
        """Channels that only ever had the value ``low``, such as those a norm's weight of 0 makes: bool, ``(C,)``."""
        self._require_data()
        return self.low == self.high

    def update(self, x: Tensor, valid: Optional[Tensor] = None) -> None:
        """Take in one tensor.

        Args:
            x: ``(..., C)``, any floating dtype, always the same ``C``. Without elements it is skipped.
            valid: Mask of the rows that take part, see :func:`.rows.valid_rows_of`.

        Raises:
            DataError: NaN or infinity among what takes part, another number of channels than before, or a mask that
                does not fit.
        """
        if x.dim() == 0:
            raise DataError('A number has no channels: give a tensor whose last dimension is the channel.')
        if self.saw_data and x.shape[-1] != len(self.low):
            raise DataError(
                f'The tensor has {x.shape[-1]} channels in its last dimension where {len(self.low)} were '
                'observed before: start over with a new observer.'
            )
        rows = valid_rows_of(x.detach(), valid)
        if rows.numel():
            self._update(rows.reshape(-1, x.shape[-1]))

    def qparams(self, bits: int) -> Tuple[Tensor, Tensor]:
        """Scale and zero point of each channel, see :func:`channel_qparams`.

        Returns:
            ``(scale, zero_point)``, float32 above 0 and int64, ``(C,)``.

        Raises:
            NotCalibratedError: Nothing was observed.
            SpecError: ``bits`` is out of range.
        """
        qrange(bits, symmetric=False)
        self._require_data()
        return channel_qparams(*self._range(bits), bits)

    def _require_data(self) -> None:
        if not self.saw_data:
            raise NotCalibratedError('The observer saw no data: run at least one image through the layer.')

    def _update(self, rows: Tensor) -> None:
        low, high = rows.amin(0).float(), rows.amax(0).float()
        refuse_non_finite(low, high)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def _range(self, bits: int) -> Tuple[Tensor, Tensor]:
        return self.low, self.high


class _ChannelSearchObserver(ChannelMinMaxObserver):
    """Takes for each channel the candidate range of least squared error; the widest among equals."""

    def __init__(self):
        super().__init__()
        self.histogram = ChannelHistogram()

    def _update(self, rows: Tensor) -> None:
        self.histogram.update(rows)
        self.low, self.high = self.histogram.min, self.histogram.max

    def _reduce(self, channels: int) -> None:
        self.histogram.reduce(channels)
        self.low, self.high = self.histogram.min, self.histogram.max

    def _candidates(self, values: Distribution) -> Tuple[Tensor, Tensor]:
        """Ends of the candidate ranges, widest first, each float64 and ``(K, C)``."""
        raise NotImplementedError

    def _range(self, bits: int) -> Tuple[Tensor, Tensor]:
        found = [self._search(values, bits) for values in self.histogram.distributions()]
        return tuple(torch.cat(ends) for ends in zip(*found))

    def _search(self, values: Distribution, bits: int) -> Tuple[Tensor, Tensor]:
        # A quantile can coincide with its opposite where the ends do not: such a range can hold no other value.
        best = torch.full_like(values.low, torch.inf), values.low, values.high
        for low, high in zip(*self._candidates(values)):
            error = _error(values, low, high, bits)
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip((error, low, high), best))
        return best[1], best[2]


class ChannelPercentileObserver(_ChannelSearchObserver):
    """Range between the quantiles 1 - p and p of each channel, p chosen by squared error (RepQ-ViT, released code).

    Args:
        candidates: The p to choose from, each above 0.5; 1.0 is minimum and maximum.

    Raises:
        SpecError: A candidate is out of range.

    Example:
        >>> observer = ChannelPercentileObserver()
        >>> observer.update(torch.tensor([[0., 7.], [1., 7.], [3., 7.]]))
        >>> observer.qparams(bits=2)
        (tensor([1., 7.]), tensor([ 0, -1]))
        >>> observer.constant
        tensor([False,  True])
    """

    def __init__(self, candidates: Sequence[float] = PERCENTILES):
        super().__init__()
        self.candidates = widest_first(candidates, 0.5, 'percentile')

    def _candidates(self, values: Distribution) -> Tuple[Tensor, Tensor]:
        return values.quantiles([1 - p for p in self.candidates]), values.quantiles(self.candidates)


class ChannelMSEObserver(_ChannelSearchObserver):
    """Range of each channel shrunk towards its middle by the factor with the least squared error.

    Towards the middle and not towards 0, which may lie outside the range.

    Args:
        factors: Shrink factors to choose from, in (0, 1].

    Raises:
        SpecError: A factor is out of range.
    """

    def __init__(self, factors: Sequence[float] = FACTORS):
        super().__init__()
        self.factors = widest_first(factors, 0, 'shrink factor')

    def _candidates(self, values: Distribution) -> Tuple[Tensor, Tensor]:
        factors = values.low.new_tensor(self.factors)[:, None]
        cut = (1 - factors) * (values.high - values.low) / 2
        return values.low + cut, values.high - cut


CHANNEL_OBSERVERS = dict(minmax=ChannelMinMaxObserver, percentile=ChannelPercentileObserver, mse=ChannelMSEObserver)


def build_channel_observer(name: str) -> ChannelMinMaxObserver:
    """Observer of channels by name: ``'minmax'``, ``'percentile'`` or ``'mse'``.

    Raises:
        SpecError: The name is not known.
    """
    if name not in CHANNEL_OBSERVERS:
        raise SpecError(f'The observer {name!r} is not known: choose one of {", ".join(map(repr, CHANNEL_OBSERVERS))}.')
    return CHANNEL_OBSERVERS[name]()
