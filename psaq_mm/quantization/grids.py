"""Grids: which values the codes of a quantizer stand for, and how a range becomes a scale and a zero point.

An observer finds a range without knowing these formulas, see :meth:`.observers.Observer.qparams`.
"""

from abc import ABC, abstractmethod
from typing import Sequence, Tuple

import torch
from torch import Tensor

from psaq_mm.quantization.logarithmic import codes_per_octave, zero_code_of
from psaq_mm.quantization.primitives import MIN_SCALE, choose_qparams, qrange

__all__ = ['ChannelGrid', 'Grid', 'LogGrid', 'UniformGrid']


class Grid(ABC):
    """Base of all grids.

    Args:
        bits: Width of a code, 2 to 8.
        symmetric: Whether codes are signed, see :func:`.primitives.qrange`.

    Attributes:
        qmin: Least code.
        qmax: Greatest code.

    Raises:
        SpecError: ``bits`` is out of range.
    """

    def __init__(self, bits: int, symmetric: bool = False):
        self.bits, self.symmetric = bits, symmetric
        self.qmin, self.qmax = qrange(bits, symmetric)

    @abstractmethod
    def qparams(self, low: Tensor, high: Tensor) -> Tuple[Tensor, Tensor]:
        """Scale and zero point of each range, element by element.

        Args:
            low: Lower ends, any shape.
            high: Upper ends, same shape.
        """

    @abstractmethod
    def cells(self, scale: Tensor, zero_point: Tensor) -> Tuple[Tensor, Tensor]:
        """Intervals of the real line, and the value that stands for each of them.

        Args:
            scale: ``(K,)``.
            zero_point: ``(K,)``.

        Returns:
            ``(edges, levels)``, float64, ``(K, L - 1)`` and ``(K, L)``, both rising.
        """

    def usable(self, low: Tensor, high: Tensor) -> Tensor:
        """Which of these ranges a search may choose: bool, of their shape."""
        return low <= high

    def shrunk(self, low: Tensor, high: Tensor, factors: Sequence[float]) -> Tuple[Tensor, Tensor]:
        """Ranges shrunk by each factor, ``(len(factors), C)``, from the ends ``(C,)`` of one."""
        raise NotImplementedError(f'{type(self).__name__} has no ranges that shrink.')


class UniformGrid(Grid):
    """Equal steps; zero has a code of its own, see :func:`.primitives.choose_qparams`.

    Args:
        bits: Width of a code, 2 to 8.
        symmetric: Signed codes and zero point 0, else unsigned codes.
        full_range: See :func:`.primitives.choose_qparams`.
    """

    def __init__(self, bits: int, symmetric: bool = False, full_range: bool = False):
        super().__init__(bits, symmetric)
        self.full_range = full_range

    def qparams(self, low: Tensor, high: Tensor) -> Tuple[Tensor, Tensor]:
        """As :func:`.primitives.choose_qparams`."""
        return choose_qparams(low.float(), high.float(), self.bits, self.symmetric, self.full_range)

    def cells(self, scale: Tensor, zero_point: Tensor) -> Tuple[Tensor, Tensor]:
        """As :meth:`Grid.cells`."""
        step = scale.double()[:, None]
        codes = torch.arange(self.qmin, self.qmax + 1, dtype=torch.float64, device=scale.device)
        levels = (codes - zero_point[:, None]) * step
        return levels[:, :-1] + step / 2, levels

    def shrunk(self, low: Tensor, high: Tensor, factors: Sequence[float]) -> Tuple[Tensor, Tensor]:
        """Towards 0, which every range includes."""
        factor = torch.tensor(factors, device=low.device)[:, None]
        return factor * low.float(), factor * high.float()


class ChannelGrid(UniformGrid):
    """Equal steps from end to end of a range that need not include 0; the zero point need not be a code.

    It serves channels before they are brought to one scale (:mod:`.reparam`), which is why neither has to hold.

    ``scale = (high - low) / (2**bits - 1)`` and ``zero_point = round(-low / scale)``. A range of one value ``v`` gets
    scale ``|v|`` (1 where it is 0) and zero point ``-sign(v)``: code 0 stands for ``v`` itself.

    Args:
        bits: Width of a code, 2 to 8.

    Example:
        >>> ChannelGrid(bits=2).qparams(torch.tensor([5., -1., 3.]), torch.tensor([6.5, 2., 3.]))
        (tensor([0.5000, 1.0000, 3.0000]), tensor([-10,   1,  -1]))
    """

    def __init__(self, bits: int):
        super().__init__(bits)

    def qparams(self, low: Tensor, high: Tensor) -> Tuple[Tensor, Tensor]:
        """Scale, float32, and zero point, int64, which grows with the distance of the range from 0."""
        low, high = low.double(), high.double()
        of_one_value = torch.where(low == 0, 1.0, low.abs())
        scale = torch.where(high > low, (high - low) / self.qmax, of_one_value).clamp(min=MIN_SCALE).float()
        zero_point = torch.where(high > low, (-low / scale.double()).round(), -low.sign())
        return scale, zero_point.long()

    def usable(self, low: Tensor, high: Tensor) -> Tensor:
        """Not a range of one value: two quantiles can coincide where the ends do not."""
        return low < high

    def shrunk(self, low: Tensor, high: Tensor, factors: Sequence[float]) -> Tuple[Tensor, Tensor]:
        """Towards the middle of the range: 0 may lie outside."""
        cut = (1 - low.new_tensor(factors)[:, None]) * (high - low) / 2
        return low + cut, high - cut


class LogGrid(Grid):
    """Steps of equal ratio from the greatest value down, and zero, see :mod:`.logarithmic`.

    The scale is the greatest value that has a code, ``delta``. The lower end of a range has no effect.

    Args:
        bits: Width of a code without the one for zero, 2 to 8.
        base: ``'log2'`` or ``'log_sqrt2'``.

    Raises:
        SpecError: ``bits`` or ``base`` is not supported.
    """

    def __init__(self, bits: int, base: str):
        super().__init__(bits)
        self.base, self._per_octave, self._zero_code = base, codes_per_octave(base), zero_code_of(bits)

    def qparams(self, low: Tensor, high: Tensor) -> Tuple[Tensor, Tensor]:
        """Delta, 1 where no value is above 0, and a zero point of 0."""
        delta = torch.where(high > 0, high.clamp(min=MIN_SCALE), 1.0).float()
        return delta, torch.zeros_like(delta, dtype=torch.int32)

    def cells(self, scale: Tensor, zero_point: Tensor) -> Tuple[Tensor, Tensor]:
        """As :meth:`Grid.cells`; the first level is zero, the next that of the last code."""
        codes = torch.arange(self._zero_code, -1, -1, dtype=torch.float64, device=scale.device)
        levels = torch.exp2(-codes / self._per_octave).masked_fill_(codes == self._zero_code, 0)
        edges = torch.exp2(-(codes[:-1] - 0.5) / self._per_octave)
        delta = scale.double()[:, None]
        return edges * delta, levels * delta

    def usable(self, low: Tensor, high: Tensor) -> Tensor:
        """Most of a tensor may be 0, and a quantile with it."""
        return high > 0
