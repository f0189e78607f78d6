"""Logarithmic quantization of attention after softmax (RepQ-ViT, arXiv 2212.08254, section 3.3).

With base 2 or sqrt(2), and m = 1 or 2 codes to an octave::

    code  = round(-m log2(x / delta)), at least 0          value = delta 2^(-code / m)

As in the released code, what lies past the last of the ``2**bits`` levels is 0. Here this zero has a code of its own,
``2**bits``: codes run from 0 (the greatest value, delta) to ``2**bits - 1`` (the least), then comes zero. So an integer
tensor of codes says everything, and a table of ``2**bits + 1`` values decodes it.

All is computed in float32, also under autocast; rounding is half to even.
"""

from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from psaq_mm.errors import DataError, NotCalibratedError, SpecError
from psaq_mm.quantization.histograms import Histogram
from psaq_mm.quantization.observers import PERCENTILES, widest_first
from psaq_mm.quantization.primitives import MIN_SCALE, memory_order, qrange
from psaq_mm.quantization.rows import valid_rows_of

# The least normal float32. Whether a smaller number is itself or 0 depends on the machine and the runtime: here it is
# 0.
LEAST = 2.0**-126
# Codes to an octave.
BASES = {'log2': 1, 'log_sqrt2': 2}


def _per_octave(base: str) -> int:
    if base not in BASES:
        raise SpecError(f'The base {base!r} is not known: choose one of {", ".join(map(repr, BASES))}.')
    return BASES[base]


def _zero_code(bits: int) -> int:
    return qrange(bits, symmetric=False)[1] + 1


def _unclamped_codes(x: Tensor, delta: Tensor, per_octave: int) -> Tensor:
    """``round(-m log2(x / delta))`` in a new float32 tensor; infinite where the ratio is not above ``LEAST``."""
    # As in primitives.py, a division and not a product with the inverse: an exported model decides ties the same way.
    return F.threshold_(torch.div(x.float(), delta), LEAST, 0).log2_().mul_(-per_octave).round_()


def _to_real(codes: Tensor, delta: Tensor, zero_code: int, per_octave: int) -> Tensor:
    """Values of float32 codes, in place."""
    zero = codes == zero_code
    return codes.mul_(-1 / per_octave).exp2_().mul_(delta).masked_fill_(zero, 0)


def log_quantize(x: Tensor, delta: Tensor, bits: int, base: str) -> Tensor:
    """Integer codes, see the top of this file.

    Args:
        x: Any shape, any floating dtype. What exceeds ``delta``, infinity too, saturates at code 0; what is not above
            0, or so small that ``x / delta`` is no normal float32, gets the code of zero.
        delta: float32, ``()``, above 0.
        bits: Width of a code without the one for zero, 2 to 8.
        base: ``'log2'`` or ``'log_sqrt2'``.

    Returns:
        int32 codes of the shape of ``x``, 0 to ``2**bits``; the last stands for zero.

    Raises:
        DataError: ``x`` holds NaN, which has no code.
        SpecError: ``bits`` or ``base`` is not supported.

    Example:
        >>> log_quantize(torch.tensor([1., .7, .13, .1, 0.]), torch.tensor(1.), bits=2, base='log2')
        tensor([0, 1, 3, 3, 4], dtype=torch.int32)
    """
    codes = _unclamped_codes(x.detach(), delta, _per_octave(base)).clamp_(0, _zero_code(bits))
    if bool(torch.isnan(codes).any()):
        raise DataError('The tensor holds NaN, which has no integer code: look for the layer that produced it.')
    return codes.to(torch.int32)


def log_dequantize(code: Tensor, delta: Tensor, bits: int, base: str) -> Tensor:
    """Real values of codes, ``delta * 2**(-code / m)`` and 0 for the code ``2**bits``.

    Args:
        code: Integers of any shape, 0 to ``2**bits``.
        delta: float32, ``()``.
        bits: As in :func:`log_quantize`.
        base: As in :func:`log_quantize`.

    Returns:
        float32 tensor of the shape of ``code``.

    Raises:
        SpecError: ``bits`` or ``base`` is not supported.
    """
    return _to_real(code.to(torch.float32, copy=True), delta, _zero_code(bits), _per_octave(base))


def log2_form(code: Tensor, delta: Tensor, bits: int) -> Tensor:
    """Real values of ``'log_sqrt2'`` codes by whole shifts, as an integer unit computes them (section 3.3).

    ``delta * 2**-ceil(code / 2)``, times sqrt(2) where the code is odd: a scale for even codes, one for odd codes, and
    a shift. Equals :func:`log_dequantize` up to float32 rounding.

    Args:
        code: As in :func:`log_dequantize`.
        delta: float32, ``()``.
        bits: As in :func:`log_quantize`.

    Returns:
        float32 tensor of the shape of ``code``.

    Raises:
        SpecError: ``bits`` is not supported.
    """
    code = code.to(torch.int32)
    odd = torch.bitwise_and(code, 1)
    scale = torch.where(odd == 1, delta * 2**0.5, delta)
    shift = torch.bitwise_right_shift(code + 1, 1)
    return (scale * torch.exp2(-shift.float())).masked_fill_(code == _zero_code(bits), 0)


class _FakeLogQuantize(torch.autograd.Function):
    """Rounding with a straight-through gradient; keeps one bool an element for backward and no float copy."""

    @staticmethod
    def forward(ctx, x, delta, zero_code, per_octave):
        codes = _unclamped_codes(x, delta, per_octave)
        ctx.save_for_backward((codes >= 0).logical_and_(codes < zero_code))
        return _to_real(codes.clamp_(0, zero_code), delta, zero_code, per_octave).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None


def fake_log_quantize(x: Tensor, delta: Tensor, bits: int, base: str) -> Tensor:
    """Quantize and dequantize with a straight-through gradient.

    Equals ``log_dequantize(log_quantize(x))`` bit for bit for every float32 ``x`` but NaN, which stays NaN.

    Args:
        x: Any shape, any floating dtype.
        delta: float32, ``()``, above 0.
        bits: As in :func:`log_quantize`.
        base: As in :func:`log_quantize`.

    Returns:
        New tensor of the shape and dtype of ``x``. Its gradient passes unchanged where the code was neither clipped at
        0 nor past the last level, and is 0 elsewhere.

    Raises:
        SpecError: ``bits`` or ``base`` is not supported.

    Example:
        >>> fake_log_quantize(torch.tensor([1.5, .7, .3, .01]), torch.tensor(1.), bits=2, base='log_sqrt2')
        tensor([1.0000, 0.7071, 0.3536, 0.0000])
    """
    zero_code, per_octave = _zero_code(bits), _per_octave(base)
    if x.requires_grad and torch.is_grad_enabled():
        return _FakeLogQuantize.apply(x, delta, zero_code, per_octave)
    return _to_real(_unclamped_codes(x, delta, per_octave).clamp_(0, zero_code), delta, zero_code, per_octave).to(
        x.dtype
    )


class LogObserver:
    """Finds delta: the quantile of all values, zeros included, whose log quantizer has the least squared error.

    The values are kept as a :class:`.histograms.Histogram`, so memory does not grow with the data. After softmax its
    bins are 2**-15 wide. Values span many more decades than that resolves, but those below a bin add next to nothing
    to a squared error: on data whose squared values spread over many bins, the chosen delta's error is within 1 % of
    the least one on the raw values.

    Args:
        candidates: The quantiles to choose from, each above 0.5; 1.0 is the maximum.

    Raises:
        SpecError: A candidate is out of range.
    """

    def __init__(self, candidates: Sequence[float] = PERCENTILES):
        self.candidates = widest_first(candidates, 0.5, 'percentile')
        self.histogram = Histogram()

    @property
    def saw_data(self) -> bool:
        """Whether any value took part."""
        return self.histogram.counts is not None

    @property
    def channels(self) -> int:
        """0 for one range over everything, -1 before any data."""
        return self.saw_data - 1

    def reduce(self, channels: int) -> None:
        """As :meth:`.observers.Observer.reduce`."""
        self.histogram.reduce()

    def update(self, x: Tensor, valid: Optional[Tensor] = None) -> None:
        """Take in one tensor.

        Args:
            x: Any shape and floating dtype; ``(..., D)`` where ``valid`` is given. Without elements it is skipped.
            valid: Row mask, see :func:`.rows.valid_rows_of`.

        Raises:
            DataError: NaN or infinity among what takes part, or a mask that does not fit.
        """
        x = valid_rows_of(x.detach(), valid)
        data = x.permute(memory_order(x)).reshape(-1)
        if data.numel():
            self.histogram.update(data.float())

    def delta(self, bits: int, base: str) -> Tensor:
        """The greatest value that shall have a code.

        Returns:
            float32, ``()``, above 0; 1 where no value was.

        Raises:
            NotCalibratedError: Nothing was observed.
            SpecError: ``bits`` or ``base`` is not supported.
        """
        zero_code, per_octave = _zero_code(bits), _per_octave(base)
        if not self.saw_data:
            raise NotCalibratedError('The observer saw no data: run at least one image through the layer.')
        values = self.histogram.distribution()
        greatest = values.high[0]
        if not greatest > 0:
            return torch.ones_like(greatest, dtype=torch.float32)
        # Rising: where zero ends, the levels from the last to the first, the edges between them.
        codes = torch.arange(zero_code, -1, -1, dtype=torch.float64, device=greatest.device)
        levels = torch.exp2(-codes / per_octave).masked_fill_(codes == zero_code, 0)[None]
        edges = torch.exp2(-(codes[:-1] - 0.5) / per_octave)[None]
        # Most of a tensor may be 0, and a quantile with it.
        found = values.quantiles(self.candidates)[:, 0]
        deltas = [delta for delta, positive in zip(found, (found > 0).tolist()) if positive] or [greatest]
        errors = torch.cat([values.squared_error(edges * delta, levels * delta) for delta in deltas])
        return torch.stack(deltas)[errors.argmin()].clamp(min=MIN_SCALE).float()
