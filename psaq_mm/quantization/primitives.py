"""Pure functions of affine quantization: range -> scale and zero point, quantize, dequantize, fake-quantize.

The codes are those of ONNX's ``QuantizeLinear``: ``clamp(round(x / scale) + zero_point, qmin, qmax)``, rounding half
to even. The division matters: multiplying by ``1 / scale`` gives another code at some ties, and an exported integer
model would then differ from the fake-quantized one.

A scale and a zero point have shape ``()`` (per tensor, ``axis=None``) or ``(C,)`` (per channel,
``C == x.shape[axis]``).
"""

from functools import lru_cache
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from psaq_mm.errors import DataError, SpecError

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
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def choose_qparams(
    min_val: Tensor, max_val: Tensor, bits: int, symmetric: bool, full_range: bool = False
) -> Tuple[Tensor, Tensor]:
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
        full_range: Symmetric only: spread the range over all ``2**bits`` codes; the greatest positive values are
            clipped by up to half a step.

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
    finite = torch.isfinite(low) & torch.isfinite(high)
    if not bool((finite & (low <= high)).all()):  # asked once: a device is waited for each time
        if not bool(finite.all()):
            raise DataError('The range holds NaN or infinity: look for the layer that produced it before calibrating.')
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


def along(param: Tensor, x: Tensor, axis: Optional[int]) -> Tensor:
    """Shape a per-channel parameter so that it broadcasts along ``axis`` of ``x``."""
    if axis is None:
        if param.dim() != 0:
            raise DataError(f'A scale of shape {tuple(param.shape)} is per channel: name its axis.')
        return param
    if not -x.dim() <= axis < x.dim() or param.shape != (x.shape[axis],):
        raise DataError(
            f'A scale of shape {tuple(param.shape)} does not fit axis {axis} of a tensor of shape {tuple(x.shape)}.'
        )
    shape = [1] * x.dim()
    shape[axis] = -1
    return param.reshape(shape)


def memory_order(x: Tensor) -> Tuple[int, ...]:
    """Order of the dimensions of a result of ``x`` in memory, the outermost first.

    A transposed view, such as the keys of a packed projection, gets the order in which a batched product reads it. This
    saves the copy that the product would make.
    """
    dims = tuple(range(x.dim()))
    if x.is_contiguous():
        return dims
    if x.dim() == 4 and x.stride(1) == 1:
        return 0, 2, 3, 1  # channels last
    return (*dims[:-2], dims[-1], dims[-2]) if x.dim() > 1 and x.stride(-2) < x.stride(-1) else dims


def _empty(shape: Sequence[int], order: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized tensor whose dimensions are contiguous in the given order."""
    places = [0] * len(order)
    for place, dim in enumerate(order):
        places[dim] = place
    return torch.empty([shape[dim] for dim in order], dtype=dtype, device=device).permute(places)


def _unclamped_codes(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """``round(x / scale) + zero_point`` as whole numbers in a new float32 tensor."""
    # The divisor stays a tensor on the device of x: CUDA turns division by a host scalar into a multiplication.
    # A trace has no layout, and no operation of ONNX for a division into given memory.
    out = None if torch.jit.is_tracing() else _empty(x.shape, memory_order(x), torch.float32, x.device)
    return torch.div(x.float(), scale, out=out).round_().add_(offset)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: Optional[int] = None) -> Tensor:
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
    codes = _unclamped_codes(x.detach(), along(scale, x, axis), along(zero_point, x, axis).to(torch.float32))
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
    return (codes.to(torch.int32) - along(zero_point, codes, axis)).float() * along(scale, codes, axis)


def _to_real(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """``(codes - zero_point) * scale``, in place."""
    return codes.sub_(offset).mul_(scale)


# Values processed at a time on the CPU: few enough to stay in the cache from one operation to the next, and enough to
# pay for waking the threads.
_CHUNK = 1 << 21


@lru_cache(maxsize=None)
def _row_length(count: int) -> int:
    """Length of a row: a divisor of ``count`` from 1024 to 65535, or ``count`` itself where there is none."""
    return next((length for length in range(1 << 10, 1 << 16) if count % length == 0), count)


class _Clipped:
    """Positions of clipped codes, recorded during quantization.

    A range from minimum and maximum clips few values. To store only the rows that hold a clipped code costs less than a
    bool mask of all values, and the gradients of all other rows stay as they are.

    Args:
        order: Order of the dimensions in memory, see :func:`memory_order`; the codes are cut into rows in this order.
        low: Least code.
        high: Greatest code.
    """

    def __init__(self, order: Tuple[int, ...], low: float, high: float):
        self.order, self.low, self.high = order, low, high
        self.rows: List[Tensor] = []  # indices of rows with a clipped code
        self.inside: List[Tensor] = []  # bool, (rows, length): False where a code is clipped

    def look(self, codes: Tensor, first: int = 0) -> bool:
        """Record the clipped codes among ``(rows, length)``; the first row has the index ``first``.

        Returns:
            Whether there were any. NaN counts as clipped.
        """
        fits = (codes.amin(1) >= self.low).logical_and_(codes.amax(1) <= self.high)
        if bool(fits.all()):
            return False
        rows = fits.logical_not_().nonzero().squeeze(1)
        codes = codes[rows]
        self.rows.append(rows.add_(first))
        self.inside.append((codes >= self.low).logical_and_(codes <= self.high))
        return True

    def stop(self, grad: Tensor) -> Tensor:
        """The gradient with 0 where a code was clipped. ``grad`` does not change: other functions may read it."""
        if not self.rows:
            return grad
        passed = _empty(grad.shape, self.order, grad.dtype, grad.device).copy_(grad)
        flat = passed.permute(self.order).view(-1, self.inside[0].shape[1])
        for rows, inside in zip(self.rows, self.inside):
            flat.index_copy_(0, rows, flat[rows] * inside)
        return passed


def _in_chunks(x: Tensor, scale: Tensor, low: float, high: float, clipped: Optional[_Clipped] = None) -> Tensor:
    """Fake quantization of a tensor on the CPU with one scale, as a new float32 tensor.

    Args:
        x: At least one value.
        scale: ``()``.
        low: ``qmin - zero_point``.
        high: ``qmax - zero_point``.
        clipped: Records which values are clipped; None if no gradient is needed.
    """
    order, length = memory_order(x), _row_length(x.numel())
    out = _empty(x.shape, order, torch.float32, x.device)
    target = out.permute(order).view(-1, length)
    source = x.permute(order).view(-1, length) if x.permute(order).is_contiguous() else None
    if source is None:
        torch.div(x, scale, out=out)
    zero, unit, count = torch.zeros(()), float(scale), max(_CHUNK // length, 1)
    for first in range(0, len(target), count):
        codes = target[first : first + count]
        if source is not None:
            torch.div(source[first : first + count], scale, out=codes)
        codes.round_()
        if clipped is None or clipped.look(codes, first):
            codes.clamp_(low, high)
        # The product with the scale. Adding it to 0 also turns -0.0 into the 0.0 that the code stands for.
        torch.add(zero, codes, alpha=unit, out=codes)
    return out


class Rounded(NamedTuple):
    """A fake-quantized tensor that can be used in several graphs, see :func:`round_once`.

    Attributes:
        values: Without gradient.
        clipped: Where the gradient is 0: a bool mask that is False there, the recorded positions, or None for nowhere.
    """

    values: Tensor
    clipped: Union[None, Tensor, _Clipped]


class _FakeQuantize(torch.autograd.Function):
    """Rounding with a straight-through gradient. For backward it keeps where values were clipped, at most one bool an
    element.
    """

    @staticmethod
    def forward(ctx, x, rounded):
        # Places are not saved for backward: activation checkpointing compares what was saved with what a recomputation
        # saves, and one value at the end of a range that comes out another way would end the run.
        ctx.places = rounded.clipped if isinstance(rounded.clipped, _Clipped) else None
        ctx.save_for_backward(*[rounded.clipped] if isinstance(rounded.clipped, Tensor) else [])
        return rounded.values.detach()

    @staticmethod
    def backward(ctx, grad):
        if ctx.places is not None:
            grad = ctx.places.stop(grad)
        for inside in ctx.saved_tensors:
            grad = grad * inside
        return grad, None


class _LearnedFakeQuantize(torch.autograd.Function):
    """As :class:`_FakeQuantize`, with a gradient for the logarithm of the scale. For backward it keeps the input, the
    result and one bool an element.
    """

    @staticmethod
    def forward(ctx, x, log_ratio, scale, offset, qmin, qmax):
        codes = _unclamped_codes(x, scale, offset)
        inside = (codes >= qmin).logical_and_(codes <= qmax)
        values = _to_real(codes.clamp_(qmin, qmax), scale, offset).to(x.dtype)
        ctx.save_for_backward(x, values, inside)
        return values

    @staticmethod
    def backward(ctx, grad):
        x, values, inside = ctx.saved_tensors
        passed = grad * inside
        slope = None
        if ctx.needs_input_grad[1]:
            # d values / d ln(scale) = values - x inside the range, and values where clipped. One float32 sum of the
            # differences: two sums of opposite sign would cancel each other's digits, and overflow in float16 with a
            # loss scale.
            slope = (values.float() - torch.where(inside, x.float(), 0.0)).mul_(grad).sum()
        return passed, slope, None, None, None, None


def learned_fake_quantize(
    x: Tensor, scale: Tensor, log_ratio: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> Tensor:
    """As :func:`fake_quantize` with one scale, which is learned too.

    Source: LSQ (arXiv 1902.08153, equation 3), times the scale, because its logarithm is learned.

    Args:
        x: Any shape, any floating dtype.
        scale: float32, ``()``.
        log_ratio: float32, ``()``, 0: receives the gradient of the scale's logarithm.
        zero_point: int32, ``()``.
        qmin: Least code.
        qmax: Greatest code.

    Returns:
        The values of :func:`fake_quantize`, bit for bit, with the same gradient for ``x``.
    """
    return _LearnedFakeQuantize.apply(x, log_ratio, scale, zero_point.to(torch.float32), qmin, qmax)


@torch.no_grad()
def round_once(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: Optional[int] = None
) -> Rounded:
    """The result of :func:`fake_quantize` without gradient; :func:`straight_through` adds one, as often as needed."""
    x, scale = x.detach(), along(scale, x, axis)
    offset = along(zero_point, x, axis).to(torch.float32)
    if _has_chunks(x, scale):
        clipped = _Clipped(memory_order(x), qmin - float(offset), qmax - float(offset))
        values = _in_chunks(x.float(), scale, clipped.low, clipped.high, clipped)
        return Rounded(values.to(x.dtype), clipped if clipped.rows else None)
    codes = _unclamped_codes(x, scale, offset)
    inside: Union[None, Tensor, _Clipped]
    if x.device.type == 'cpu' and x.numel():
        clipped = _Clipped(memory_order(x), qmin, qmax)
        any_clipped = clipped.look(codes.permute(clipped.order).reshape(-1, _row_length(x.numel())))
        inside = clipped if any_clipped else None
    else:  # to ask whether there are any would make the host wait for the device
        inside = (codes >= qmin).logical_and_(codes <= qmax)
    return Rounded(_to_real(codes.clamp_(qmin, qmax), scale, offset).to(x.dtype), inside)


def straight_through(x: Tensor, rounded: Rounded) -> Tensor:
    """``rounded.values`` with the gradient of :func:`fake_quantize` for ``x``, from which they were computed."""
    return _FakeQuantize.apply(x, rounded)


def _has_chunks(x: Tensor, scale: Tensor) -> bool:
    return x.device.type == 'cpu' and scale.dim() == 0 and x.numel() > 0 and not torch.jit.is_tracing()


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: Optional[int] = None
) -> Tensor:
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
    if x.requires_grad and torch.is_grad_enabled():
        return straight_through(x, round_once(x, scale, zero_point, qmin, qmax, axis))
    x, scale = x.detach(), along(scale, x, axis)
    # The offset is a float, as the codes are: whole numbers up to 2**24 are exact, and greater ones are clamped anyway.
    # Computing the codes, instead of clamping at shifted ends, also makes round(-0.2) = -0.0 the +0.0 it decodes to.
    offset = along(zero_point, x, axis).to(torch.float32)
    if _has_chunks(x, scale):
        return _in_chunks(x.float(), scale, qmin - float(offset), qmax - float(offset)).to(x.dtype)
    return _to_real(_unclamped_codes(x, scale, offset).clamp_(qmin, qmax), scale, offset).to(x.dtype)
