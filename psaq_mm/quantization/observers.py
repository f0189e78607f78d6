"""Observers: what a tensor's scale and zero point are, found from the data of any number of batches.

An observer puts three independent parts together:

- what it watches, its class: a whole tensor (:class:`TensorObserver`, :class:`LogObserver`), each channel of a weight
  (:class:`ChannelObserver`) or of an activation (:class:`FeatureObserver`);
- how that becomes a range, its :class:`Rule`: :class:`MinMax`, :class:`Percentile` or :class:`Shrink`;
- how a range becomes a scale and a zero point: the :class:`.grids.Grid` that :meth:`Observer.qparams` is given.

Empty data is skipped, NaN and infinity are refused.
"""

from abc import ABC, abstractmethod
from typing import Dict, Optional, Sequence, Tuple, Type

import torch
from torch import Tensor

from psaq_mm.errors import DataError, SpecError
from psaq_mm.quantization.grids import Grid
from psaq_mm.quantization.histograms import ChannelHistogram, Histogram
from psaq_mm.quantization.primitives import memory_order
from psaq_mm.quantization.rows import valid_rows_of
from psaq_mm.quantization.stores import AllValues, Ends, Store, Values
from psaq_mm.ranks import maximum_, ranks

__all__ = [
    'OBSERVERS',
    'ChannelObserver',
    'FeatureObserver',
    'Shrink',
    'LogObserver',
    'MinMax',
    'Observer',
    'Percentile',
    'Rule',
    'TensorObserver',
    'build_observer',
    'build_rule',
    'reduce_observers',
]


PERCENTILES = (0.999, 0.9999, 0.99999, 1.0)
FACTORS = tuple([1 - 0.02 * i for i in range(41)])


# ---------------------------------------------------------------------- how values become a range
class Rule(ABC):
    """Base of all rules: which ranges to choose from. The one with the least squared error is taken.

    Attributes:
        needs_values: Whether it needs the distribution of the values, or their ends alone.
    """

    needs_values = True

    @abstractmethod
    def ranges(self, values: Values, grid: Grid) -> Tuple[Tensor, Tensor]:
        """Lower and upper ends of ``K`` candidates, the widest first, each ``(K, C)``."""


class MinMax(Rule):
    """From the least to the greatest value."""

    needs_values = False

    def ranges(self, values: Values, grid: Grid) -> Tuple[Tensor, Tensor]:
        """No candidate: without one the ends are taken."""
        return values.low.new_empty(0, len(values.low)), values.high.new_empty(0, len(values.high))


class Percentile(Rule):
    """Between the quantiles 1 - p and p (RepQ-ViT, arXiv 2212.08254, released code).

    Args:
        candidates: The p to choose from, each above 0.5; 1.0 is minimum and maximum.

    Raises:
        SpecError: A candidate is out of range.
    """

    def __init__(self, candidates: Sequence[float] = PERCENTILES):
        self.candidates = _widest_first(candidates, 0.5, 'percentile')

    def ranges(self, values: Values, grid: Grid) -> Tuple[Tensor, Tensor]:
        """One for each p."""
        return values.quantiles([1 - p for p in self.candidates]), values.quantiles(self.candidates)


class Shrink(Rule):
    """Between minimum and maximum, both shrunk by one factor, see :meth:`.grids.Grid.shrunk`.

    Args:
        factors: Shrink factors to choose from, in (0, 1].

    Raises:
        SpecError: A factor is out of range.
    """

    def __init__(self, factors: Sequence[float] = FACTORS):
        self.factors = _widest_first(factors, 0, 'shrink factor')

    def ranges(self, values: Values, grid: Grid) -> Tuple[Tensor, Tensor]:
        """One for each factor."""
        return grid.shrunk(values.low, values.high, self.factors)


def _widest_first(candidates: Sequence[float], above: float, what: str) -> Tuple[float, ...]:
    for value in candidates:
        if not above < value <= 1:
            raise SpecError(f'The {what} {value!r} is out of range: choose {what}s above {above} and up to 1.')
    return tuple(sorted(candidates, reverse=True))


OBSERVERS: Dict[str, Type[Rule]] = dict(minmax=MinMax, percentile=Percentile, mse=Shrink)


def build_rule(name: str) -> Rule:
    """Rule by name: ``'minmax'``, ``'percentile'`` or ``'mse'``.

    Raises:
        SpecError: The name is not known.
    """
    if name not in OBSERVERS:
        raise SpecError(f'The observer {name!r} is not known: choose one of {", ".join(map(repr, OBSERVERS))}.')
    return OBSERVERS[name]()


# ---------------------------------------------------------------------- what is watched
class Observer(ABC):
    """Base of all observers.

    Args:
        rule: How the values become a range.
        store: What is kept of the values.
    """

    def __init__(self, rule: Rule, store: Store):
        self.rule, self.store = rule, store

    def observe(self, x: Tensor, valid: Optional[Tensor] = None) -> None:
        """Take in one tensor.

        Args:
            x: Any shape and floating dtype; ``(..., D)`` where ``valid`` is given. Without elements it is skipped.
            valid: Mask of the rows that take part, see :func:`.rows.valid_rows_of`.

        Raises:
            DataError: NaN or infinity among what takes part, or a shape that does not fit.
        """
        data = self._data(x.detach(), valid)
        if data.numel():
            self.store.update(data)

    @property
    def saw_data(self) -> bool:
        """Whether any value took part."""
        return self.store.low is not None

    @property
    def channels(self) -> Optional[int]:
        """How many ranges there are: None before any data, 0 for one over a whole tensor."""
        low = self.store.low
        if low is None:
            return None
        return len(low) if low.dim() else 0

    def ends(self) -> Tuple[Tensor, Tensor]:
        """Least and greatest value, float32, ``()`` or ``(C,)``; NotCalibratedError if nothing was observed."""
        return self.store.ends()

    def qparams(self, grid: Grid) -> Tuple[Tensor, Tensor]:
        """Scale and zero point, ``()`` or ``(C,)``.

        Args:
            grid: Of the quantizer that shall have them.

        Raises:
            NotCalibratedError: Nothing was observed.
        """
        shape = self.ends()[0].shape
        scales, zero_points = zip(*[self._search(values, grid) for values in self.store.parts()])
        return torch.cat(scales).reshape(shape), torch.cat(zero_points).reshape(shape)

    def reduce(self, channels: int) -> None:
        """Take in what the other ranks' observers of the same quantizer saw, see :func:`reduce_observers`.

        Args:
            channels: Those of a rank that saw data.

        Raises:
            DataError: The ranks saw different numbers of channels.
        """
        if self.channels not in (None, channels):
            raise DataError(
                f'This rank observed {self.channels} channels and another one {channels}: all need the same model.'
            )
        self.store.reduce(channels)

    @abstractmethod
    def _data(self, x: Tensor, valid: Optional[Tensor]) -> Tensor:
        """What takes part, as the store wants it."""

    def _search(self, values: Values, grid: Grid) -> Tuple[Tensor, Tensor]:
        """Scale and zero point of the candidate with the least squared error, the widest among equals."""
        low, high = self.rule.ranges(values, grid)
        # Of all candidates at once, and nothing in the loop asks for a value: the host would wait for the device each
        # time. The ends come first: they are taken where no candidate is usable.
        scale, zero_point = grid.qparams(torch.cat([values.low[None], low]), torch.cat([values.high[None], high]))
        best_scale, best_zero, scale, zero_point = scale[0], zero_point[0], scale[1:], zero_point[1:]
        if len(low) == 0:
            return best_scale, best_zero
        least = torch.full_like(values.low, torch.inf, dtype=torch.float64)
        errors = values.errors(grid, scale, zero_point)
        for error, usable, *candidate in zip(errors, grid.usable(low, high), scale, zero_point):
            better = torch.where(usable, error, torch.inf) < least
            least = torch.where(better, error, least)
            best_scale = torch.where(better, candidate[0], best_scale)
            best_zero = torch.where(better, candidate[1], best_zero)
        return best_scale, best_zero


class TensorObserver(Observer):
    """Watches a whole tensor. A search keeps a histogram of fixed size.

    Args:
        rule: How the values become a range.
        interpolate: See :class:`.histograms.Distribution`.
    """

    def __init__(self, rule: Rule, interpolate: bool = False):
        super().__init__(rule, Histogram(interpolate) if rule.needs_values else Ends())

    def _data(self, x: Tensor, valid: Optional[Tensor]) -> Tensor:
        x = valid_rows_of(x, valid)
        # In the order of memory, as far as it goes: which value is whose does not matter here.
        return x.permute(memory_order(x)).reshape(-1)


class LogObserver(TensorObserver):
    """Watches a whole tensor that a logarithmic quantizer reads, see :class:`.grids.LogGrid`.

    After softmax the bins of the histogram are 2**-15 wide. Values span many more decades than that resolves, but those
    below a bin add next to nothing to a squared error: on data whose squared values spread over many bins, the chosen
    delta's error is within 1 % of the least one on the raw values.

    Args:
        rule: Chooses delta, the upper end of the range; :class:`Percentile` if None. All values count, zeros included.
    """

    def __init__(self, rule: Optional[Rule] = None):
        super().__init__(Percentile() if rule is None else rule, interpolate=True)


class ChannelObserver(Observer):
    """Watches each channel. A search keeps all values: meant for weights.

    Args:
        rule: How the values become a range.
        channel_axis: Axis that keeps its own range.
    """

    def __init__(self, rule: Rule, channel_axis: int):
        super().__init__(rule, AllValues() if rule.needs_values else Ends(dim=1))
        self.channel_axis = channel_axis

    def _data(self, x: Tensor, valid: Optional[Tensor]) -> Tensor:
        if valid is not None:
            raise DataError('A row mask cannot be combined with ranges per channel: drop one of the two.')
        return x.transpose(0, self.channel_axis).flatten(1) if x.dim() > 1 else x[:, None]


class FeatureObserver(Observer):
    """Watches each channel of an activation, the last dimension. A search keeps a histogram of each.

    It serves LayerNorm outputs before their channels are brought to one scale (RepQ-ViT, arXiv 2212.08254,
    section 3.2), see :class:`.grids.ChannelGrid`.

    Args:
        rule: How the values become a range.

    Example:
        >>> observer = FeatureObserver(Percentile())
        >>> observer.observe(torch.tensor([[0., 7.], [1., 7.], [3., 7.]]))
        >>> observer.qparams(ChannelGrid(bits=2))
        (tensor([1., 7.]), tensor([ 0, -1]))
    """

    def __init__(self, rule: Rule):
        super().__init__(rule, ChannelHistogram() if rule.needs_values else Ends(dim=0))

    def _data(self, x: Tensor, valid: Optional[Tensor]) -> Tensor:
        if x.dim() == 0:
            raise DataError('A number has no channels: give a tensor whose last dimension is the channel.')
        if self.channels not in (None, x.shape[-1]):
            raise DataError(
                f'The tensor has {x.shape[-1]} channels in its last dimension where {self.channels} were '
                'observed before: start over with a new observer.'
            )
        return valid_rows_of(x, valid).reshape(-1, x.shape[-1])


def build_observer(name: str, channel_axis: Optional[int] = None) -> Observer:
    """Observer of a whole tensor, or of each channel of a weight.

    Args:
        name: ``'minmax'``, ``'percentile'`` or ``'mse'``.
        channel_axis: Axis that keeps its own range, or None for one range over everything.

    Raises:
        SpecError: The name is not known.
    """
    rule = build_rule(name)
    return TensorObserver(rule) if channel_axis is None else ChannelObserver(rule, channel_axis)


def reduce_observers(observers: Sequence[Observer]) -> None:
    """Make every observer know what those of the same quantizer on the other ranks saw, as if one had seen all.

    Args:
        observers: In one order on all ranks, which all call this.
    """
    if ranks()[1] == 1:
        return
    # A rank may have seen nothing, such as a mask head without a box: it then learns from the others how many channels
    # there are.
    seen = [-1 if observer.channels is None else observer.channels for observer in observers]
    for observer, channels in zip(observers, maximum_(torch.tensor(seen, dtype=torch.int64)).tolist()):
        if channels >= 0:
            observer.reduce(channels)
