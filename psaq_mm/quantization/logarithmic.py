"""Logarithmic quantization of attention after softmax (RepQ-ViT, arXiv 2212.08254, section 3.3).

With base 2 or sqrt(2), and m = 1 or 2 codes to an octave::

    code  = round(-m log2(x / delta)), at least 0          value = delta 2^(-code / m)

As in the released code, a value past the last of the ``2**bits`` levels becomes 0. Here this zero has a code of its
own, ``2**bits``: codes run from 0 (the greatest value, delta) to ``2**bits - 1`` (the least), then comes zero. So a
table of ``2**bits + 1`` values decodes the integer codes.

All is computed in float32, also under autocast; rounding is half to even.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from psaq_mm.errors import DataError, SpecError
from psaq_mm.quantization.primitives import qrange

# The least normal float32. A smaller number counts as 0: whether it is 0 otherwise depends on machine and runtime.
LEAST = 2.0**-126
# Codes to an octave.
BASES = {'log2': 1, 'log_sqrt2': 2}


def codes_per_octave(base: str) -> int:
    """``m`` of a base; SpecError where the base is not known."""
    if base not in BASES:
        raise SpecError(f'The base {base!r} is not known: choose one of {", ".join(map(repr, BASES))}.')
    return BASES[base]


def zero_code_of(bits: int) -> int:
    """The code of zero; SpecError where ``bits`` is out of range."""
    return qrange(bits, symmetric=False)[1] + 1


def _unclamped_codes(x: Tensor, delta: Tensor, per_octave: int) -> Tensor:
    """``round(-m log2(x / delta))`` in a new float32 tensor; infinite where the ratio is not above ``LEAST``."""
    # As in primitives.py, a division and not a product with the inverse: an exported model decides ties the same way.
    return F.threshold(torch.div(x.float(), delta), LEAST, 0, inplace=True).log2_().mul_(-per_octave).round_()


def _to_real(codes: Tensor, delta: Tensor, zero_code: int, per_octave: int) -> Tensor:
    """Values of float32 codes, in place."""
    zero = codes == zero_code
    return codes.mul_(-1 / per_octave).exp2_().mul_(delta).masked_fill_(zero, 0)


def log_quantize(x: Tensor, delta: Tensor, bits: int, base: str) -> Tensor:
    """Integer codes, see the top of this file.

    Args:
        x: Any shape, any floating dtype. A value above ``delta``, infinity too, gets code 0; a value not above 0, or so
            small that ``x / delta`` is no normal float32, gets the code of zero.
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
    codes = _unclamped_codes(x.detach(), delta, codes_per_octave(base)).clamp_(0, zero_code_of(bits))
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
    return _to_real(code.to(torch.float32, copy=True), delta, zero_code_of(bits), codes_per_octave(base))


class _FakeLogQuantize(torch.autograd.Function):
    """Rounding with a straight-through gradient. For backward it keeps one bool an element and no float copy."""

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
    zero_code, per_octave = zero_code_of(bits), codes_per_octave(base)
    if x.requires_grad and torch.is_grad_enabled():
        return _FakeLogQuantize.apply(x, delta, zero_code, per_octave)
    return _to_real(_unclamped_codes(x, delta, per_octave).clamp_(0, zero_code), delta, zero_code, per_octave).to(
        x.dtype
    )
