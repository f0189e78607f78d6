"""Pure functions of affine quantization: range -> scale and zero point, quantize, dequantize, fake-quantize.

The codes are those of ONNX's ``QuantizeLinear``: ``clamp(round(x / scale) + zero_point, qmin, qmax)``, rounding half
to even. The division matters: multiplying by ``1 / scale`` gives another code at some ties, and an exported integer
model would then differ from the fake-quantized one.

A scale and a zero point have shape ``()`` (per tensor, ``axis=None``) or ``(C,)`` (per channel,
``C == x.shape[axis]``).
"""

from typing import Optional, Tuple

import torch
from torch import Tensor

from ..errors import DataError, SpecError

MIN_BITS = 2
MAX_BITS = 8

# Smallest normal float32. A denormal scale loses its significant bits, and some devices flush it to zero.
MIN_SCALE = torch.finfo(torch.float32).tiny


def qrange(bits: int, symmetric: bool) -> Tuple[int, int]:
    """Least and greatest code.

    Args:
        bits: Width of a code, 2 to 8.
        symmetric: Signed codes ``-2**(bits-1) .. 2**(bits-1) - 1`` if true, else ``0 .. 2**bits - 1``.

    Returns:
        ``(qmin, qmax)``.

    Raises:
        SpecError: ``bits`` is no integer from 2 to 8.

    Example:
        >>> qrange(4, symmetric=True), qrange(8, symmetric=False)
        ((-8, 7), (0, 255))
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise SpecError(f'bits={bits!r} is not supported: choose an integer from {MIN_BITS} to {MAX_BITS}.')
    if symmetric:
        return -2**(bits - 1), 2**(bits - 1) - 1
    return 0, 2**bits - 1


def choose_qparams(min_val: Tensor,
                   max_val: Tensor,
                   bits: int,
                   symmetric: bool,
                   full_range: bool = False) -> Tuple[Tensor, Tensor]:
    """Scale and zero point that cover a range.

    Symmetric: ``scale = max(|min|, |max|) / (2**(bits-1) - 1)``, zero point 0, or over ``(2**bits - 1) / 2`` with
    ``full_range`` (PSAQ-ViT, arXiv 2203.02250, released code). Asymmetric: the range is widened to
    include 0, ``scale = (max - min) / (2**bits - 1)`` and ``zero_point = round(-min / scale)``, so that 0 has a code of
    its own. A range that is 0 alone gets scale 1. No scale is below ``MIN_SCALE`` (the smallest normal float32).

    Args:
        min_val: Lower ends, shape ``()`` or ``(C,)``.
        max_val: Upper ends, same shape.
        bits: Width of a code, 2 to 8.
        symmetric: See :func:`qrange`.
        full_range: Symmetric only: spread the range over all ``2**bits`` codes; the greatest positive values are clipped
            by up to half a step.

    Returns:
        ``(scale, zero_point)``, float32 and int32, of the shape of ``min_val``.

    Raises:
        DataError: The range is empty, not finite or upside down, or the two shapes differ.
        SpecError: ``bits`` is out of range.

    Example:
        >>> choose_qparams(torch.tensor(-1.), torch.tensor(2.), bits=2, symmetric=False)
        (tensor(1.), tensor(1, dtype=torch.int32))
    """
    qmin, qmax = qrange(bits, symmetric)
    if min_val.shape != max_val.shape:
        raise DataError(f'A range needs two ends of one shape, not {tuple(min_val.shape)} and {tuple(max_val.shape)}.')
    if min_val.numel() == 0:
        raise DataError('The range is empty: a scale can only be chosen from at least one value.')
    # float64, so that max - min cannot overflow; the outcome always fits into float32.
    low, high = min_val.detach().double(), max_val.detach().double()
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise DataError('The range holds NaN or infinity: look for the layer that produced it before calibrating.')
    if not bool((low <= high).all()):
        raise DataError('The range is upside down: min_val must not exceed max_val.')
    if symmetric:
        scale = torch.maximum(low.abs(), high.abs()) / ((qmax - qmin) / 2 if full_range else qmax)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / (qmax - qmin)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale.clamp(min=MIN_SCALE)).float()
    if symmetric:
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    else:
        zero_point = torch.round(-low / scale.double()).clamp(qmin, qmax).to(torch.int32)
    return scale, zero_point


def _along(param: Tensor, x: Tensor, axis: Optional[int]) -> Tensor:
    """Shape a per-channel parameter so that it broadcasts along ``axis`` of ``x``."""
    if axis is None:
        if param.dim() != 0:
            raise DataError(f'A scale of shape {tuple(param.shape)} is per channel: name its axis.')
        return param
    if not -x.dim() <= axis < x.dim() or param.shape != (x.shape[axis], ):
        raise DataError(f'A scale of shape {tuple(param.shape)} does not fit axis {axis} of a tensor of shape '
                        f'{tuple(x.shape)}.')
    shape = [1] * x.dim()
    shape[axis] = -1
    return param.reshape(shape)


def _unclamped_codes(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """``round(x / scale) + zero_point`` as whole numbers in a new float32 tensor."""
    # The divisor stays a tensor on the device of x: CUDA turns division by a host scalar into a multiplication.
    return torch.div(x.float(), scale).round_().add_(offset)


def quantize(x: Tensor,
             scale: Tensor,
             zero_point: Tensor,
             qmin: int,
             qmax: int,
             axis: Optional[int] = None) -> Tensor:
    """Integer codes, ``clamp(round(x / scale) + zero_point, qmin, qmax)`` as ONNX's ``QuantizeLinear``.

    Args:
        x: Any shape, any floating dtype (computed in float32). Infinity saturates.
        scale: float32, ``()`` or ``(C,)``.
        zero_point: int32, same shape.
        qmin: Least code.
        qmax: Greatest code.
        axis: Channel axis of ``x`` for a per-channel scale, else None.

    Returns:
        int32 codes of the shape of ``x``.

    Raises:
        DataError: ``x`` holds NaN, which has no code, or the scale does not fit ``axis``.
    """
    codes = _unclamped_codes(x.detach(), _along(scale, x, axis), _along(zero_point, x, axis).to(torch.float32))
    if bool(torch.isnan(codes).any()):
        raise DataError('The tensor holds NaN, which has no integer code: look for the layer that produced it.')
    # Clamp before the cast: a float32 beyond int32 has no defined integer value.
    return codes.clamp_(qmin, qmax).to(torch.int32)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: Optional[int] = None) -> Tensor:
    """Real values of codes, ``(codes - zero_point) * scale`` as ONNX's ``DequantizeLinear``.

    Args:
        codes: Integers of any shape.
        scale: float32, ``()`` or ``(C,)``.
        zero_point: int32, same shape.
        axis: Channel axis of ``codes`` for a per-channel scale, else None.

    Returns:
        float32 tensor of the shape of ``codes``.

    Raises:
        DataError: The scale does not fit ``axis``.
    """
    return (codes.to(torch.int32) - _along(zero_point, codes, axis)).float() * _along(scale, codes, axis)


def _to_real(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """``(codes - zero_point) * scale``, in place."""
    return codes.sub_(offset).mul_(scale)


class _FakeQuantize(torch.autograd.Function):
    """Rounding with a straight-through gradient; keeps one bool an element for backward and no float copy."""

    @staticmethod
    def forward(ctx, x, scale, offset, qmin, qmax):
        unclamped = _unclamped_codes(x, scale, offset)
        codes = unclamped.clamp(qmin, qmax)
        ctx.save_for_backward(codes == unclamped)
        return _to_real(codes, scale, offset).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        inside, = ctx.saved_tensors
        return grad * inside, None, None, None, None


def fake_quantize(x: Tensor,
                  scale: Tensor,
                  zero_point: Tensor,
                  qmin: int,
                  qmax: int,
                  axis: Optional[int] = None) -> Tensor:
    """Quantize and dequantize with a straight-through gradient (Bengio et al., arXiv 1308.3432).

    Equals ``dequantize(quantize(x))`` bit for bit for every finite float32 ``x``. Computed in float32 whatever the
    dtype of ``x`` and also under autocast. NaN stays NaN, so that an error upstream is seen; infinity saturates.

    Args:
        x: Any shape, any floating dtype.
        scale: float32, ``()`` or ``(C,)``.
        zero_point: int32, same shape.
        qmin: Least code.
        qmax: Greatest code.
        axis: Channel axis of ``x`` for a per-channel scale, else None.

    Returns:
        New tensor of the shape and dtype of ``x``. Its gradient passes unchanged where
        ``round(x / scale) + zero_point`` lies in ``[qmin, qmax]`` and is 0 where it was clipped.

    Raises:
        DataError: The scale does not fit ``axis``.

    Example:
        >>> fake_quantize(torch.tensor([-1., .2, .9, 7.]), torch.tensor(.5), torch.tensor(1, dtype=torch.int32), 0, 3)
        tensor([-0.5000,  0.0000,  1.0000,  1.0000])
    """
    scale = _along(scale, x, axis)
    # As float, because the codes are: whole numbers up to 2**24 are exact, what lies beyond is clamped anyway. Going
    # through the codes, instead of clamping at shifted ends, also makes round(-0.2) = -0.0 the +0.0 it decodes to.
    offset = _along(zero_point, x, axis).to(torch.float32)
    if x.requires_grad and torch.is_grad_enabled():
        return _FakeQuantize.apply(x, scale, offset, qmin, qmax)
    return _to_real(_unclamped_codes(x, scale, offset).clamp_(qmin, qmax), scale, offset).to(x.dtype)
