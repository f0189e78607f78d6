"""Weights rounded one input at a time, each error carried over into the inputs that are still to come.

Rounding every weight to its nearest code is the best there is only if the inputs of a layer are uncorrelated; those of
a transformer are anything but. With the Gram matrix of the layer's inputs the error of one weight can be made up for by
the weights after it: optimal brain compression (Frantar & Alistarh, arXiv 2208.11580) in the order and with the
Cholesky form of GPTQ (Frantar et al., arXiv 2210.17323, section 3). Scales and codes stay those of the weight's own
quantizer: what runs afterwards is the same integer model with better codes in it.
"""

import contextlib
import math
from typing import Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.errors import DataError
from psaq_mm.quantization.layers import QuantConv2dMixin, QuantLinearMixin, full_precision_weights, is_quantized_layer
from psaq_mm.quantization.primitives import fake_quantize
from psaq_mm.quantization.rows import row_mask_given, valid_rows_of
from psaq_mm.ranks import broadcast_, maximum_, sum_

__all__ = ['RoundedLayer', 'compensated_rounding', 'round_weights_']

BLOCK = 128
"""Columns that are worked through before the rest of the matrix hears of their errors (GPTQ's lazy batch)."""

STRIP = 1 << 26
"""Bytes of a convolution's inputs that are unfolded at a time."""


class LowRankError(DataError):
    """The inputs of a layer span too few directions for their damping: their Gram matrix has no inverse in float64."""


class RoundedLayer(NamedTuple):
    """What rounding did to a layer.

    Attributes:
        name: Of the layer.
        nearest: Squared error of its output with every weight at its nearest code, relative to the squared output.
        compensated: The same error after compensation.
        reason: Why it stayed at its nearest codes; empty if it did not.
    """

    name: str
    nearest: float
    compensated: float
    reason: str = ''


def compensated_rounding(
    weight: Tensor, gram: Tensor, round_columns: Callable[[Tensor], Tensor], damping: float = 0.1
) -> Tensor:
    """Round a matrix so that its products with given inputs change little.

    Source: GPTQ, arXiv 2210.17323, section 3 (Cholesky form, lazy batches, inputs of greatest energy first).

    Args:
        weight: (outputs, inputs).
        gram: X^T X of the inputs X (rows, inputs): (inputs, inputs), symmetric, finite.
        round_columns: Rounds columns (outputs, n) to the grid; works on each output by itself.
        damping: Added to the diagonal, as a multiple of its mean; positive. Much of it trusts the inputs less: 0 would
            fit the rows of X alone, and infinity is rounding to the nearest.

    Returns:
        (outputs, inputs), on the grid, in the dtype of ``weight``; not differentiable.

    Raises:
        DataError: The shapes do not fit, a value is not finite, or the damping is not positive.
        LowRankError: With this little damping the Gram matrix has no inverse (a DataError).

    Memory: beside its arguments, one float64 matrix of the size of ``gram`` (8 inputs^2 bytes, 0.5 GB at 8192 inputs)
    and three of that of ``weight``.
    """
    inputs = weight.shape[-1]
    if weight.dim() != 2 or gram.shape != (inputs, inputs):
        raise DataError(
            f'A weight of shape {tuple(weight.shape)} and a Gram matrix of shape {tuple(gram.shape)} do not fit: '
            'the matrix has one row and column an input.'
        )
    if not damping > 0 or not math.isfinite(damping):
        raise DataError(f'damping={damping} must be positive and finite: 0.1 is the usual value')
    if not bool(torch.isfinite(gram).all()) or not bool(torch.isfinite(weight).all()):
        raise DataError(
            'The weight or the inputs of the layer hold NaN or infinity: look for what made them before rounding.'
        )
    energy = gram.diagonal().double()
    order = torch.argsort(energy, descending=True, stable=True)
    factor = _inverse_factor_(
        _ordered(gram, order), damping * max(float(energy.mean()), torch.finfo(torch.float32).tiny), damping
    )
    left = weight[:, order].double()  # columns that are rounded stay in it
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        errors = left.new_empty(len(left), stop - start)
        for i in range(start, stop):
            column = left[:, i : i + 1]
            rounded = round_columns(column.to(weight.dtype)).double()
            errors[:, i - start : i - start + 1] = (column - rounded) / factor[i, i]
            left[:, i : i + 1] = rounded
            left[:, i + 1 : stop] -= errors[:, i - start : i - start + 1] @ factor[i : i + 1, i + 1 : stop]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    out = torch.empty_like(weight)
    out[:, order] = left.to(weight.dtype)
    return out


def _ordered(gram: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of ``gram`` in an order, as a new float64 matrix; a strip of rows at a time, so that there is
    one copy alone.
    """
    found = torch.empty(gram.shape, dtype=torch.float64, device=gram.device)
    for rows, part in zip(found.split(BLOCK), order.split(BLOCK)):
        rows.copy_(gram[part][:, order])
    return found


def _inverse_factor_(gram: Tensor, shift: float, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of ``gram`` + ``shift`` on the diagonal, in the memory of ``gram``."""
    gram = gram.t()  # symmetric: the same matrix, laid out as LAPACK works in place
    gram.diagonal().add_(shift)
    failed = torch.zeros((), dtype=torch.int32, device=gram.device)
    for inverted in (False, True):
        if inverted:
            torch.cholesky_inverse(gram, out=gram)
        torch.linalg.cholesky_ex(gram, upper=inverted, out=(gram, failed))
        if bool(failed):
            raise LowRankError(
                f'damping={damping:g} is too little: the inputs of the layer span fewer directions than it has inputs, '
                f'and '
                'nothing tells how to share errors among the others; give more damping, or more samples'
            )
    return gram


@torch.no_grad()
def round_weights_(
    model: nn.Module,
    run: Callable[[], None],
    damping: float = 0.1,
    memory: int = 2**30,
    max_inputs: int = 8192,
    importance: Optional[Mapping[str, Tensor]] = None,
    prior_rows: Optional[float] = None,
) -> List[RoundedLayer]:
    """Round the weights of every quantized Linear and convolution to codes that fit the layer's own quantized inputs,
    in place.

    The model has to be calibrated; ranges, codes and scales stay. The samples go through the model with its activations
    quantized, so a layer's weights also answer for what that did to the inputs. Weights that are still to be rounded
    are in full precision meanwhile: their nearest codes spoil the inputs of the layers behind them more than the codes
    that they will get. Gram matrices of several layers are gathered in one pass, as many as ``memory`` holds; later
    passes see the weights rounded before.

    Beside those matrices a pass needs the memory of the model's forward, the quantized inputs of a layer once more in
    float32, of a convolution at most 64 MiB of its unfolded inputs at a time (twice that with ``importance``), and
    rounding what :func:`compensated_rounding` says, for one layer at a time. Matrices are float32 and summed in float32
    also under autocast.

    Args:
        model: Calibrated quantized model.
        run: Puts the samples through the model; called once a pass, without gradients. In a distributed run each rank
            puts samples of its own through, and all round alike.
        damping: See :func:`compensated_rounding`.
        memory: Bytes for the Gram matrices of one pass.
        max_inputs: Layers with more inputs (channels times kernel) stay at their nearest codes: time grows with the
            third power.
        importance: By layer name, the weight of each row that ``run`` sends through, as :func:`.row_importance` finds
            it: errors are made small where outputs matter. Rows of layers that are missing weigh alike.
        prior_rows: Damping of the layers with ``importance``, in place of ``damping``: as if so many rows more of
            uncorrelated inputs of the mean energy had been seen, beside the effective number of rows under those
            weights, (sum w)^2 / sum w^2. The fewer rows matter, the less they are trusted (shrinkage, Ledoit & Wolf, J.
            Multivariate Analysis 88, 2004). Positive.

    Returns:
        One entry a layer whose weight is quantized, its errors under those weights. A layer that compensation would not
        help stays as it was, and so does one whose inputs are of too low a rank for the damping: its ``reason`` says
        so.

    Raises:
        DataError: An input holds NaN or infinity, ``importance`` is of other rows than ``run`` sends (names the layer),
            or ``prior_rows`` is not positive.

    Example:
        >>> calibrate(model, lambda: model(samples))
        >>> report = round_weights_(model, lambda: model(samples))
    """
    dampings = {} if prior_rows is None else _shrinkage(importance or {}, prior_rows)
    done: Dict[str, RoundedLayer] = {}
    waiting: List[Tuple[str, nn.Module]] = []
    layers = [(n, m) for n, m in model.named_modules() if is_quantized_layer(m) and m.weight_quantizer.mode == 'on']
    for name, layer in layers:
        reason = _reason_to_leave(layer, max_inputs)
        if reason:
            done[name] = RoundedLayer(name, math.nan, math.nan, reason)
        else:
            waiting.append((name, layer))
    while waiting:
        batch, used = [], 0
        while waiting and (not batch or used + 4 * _inputs(waiting[0][1]) ** 2 <= memory):
            used += 4 * _inputs(waiting[0][1]) ** 2
            batch.append(waiting.pop(0))
        with full_precision_weights(model):
            grams = _gather(batch, run, importance or {})
        for name, layer in batch:
            gram = grams.pop(name, None)
            if gram is None:
                done[name] = RoundedLayer(name, math.nan, math.nan, 'no sample went through it')
                continue
            try:
                done[name] = _round_layer(name, layer, gram, dampings.get(name, damping))
            except DataError as error:
                raise DataError(f'Layer {name!r}: {error}') from error
    return [done[name] for name, _ in layers]


def _shrinkage(importance: Mapping[str, Tensor], prior_rows: float) -> Dict[str, float]:
    """By layer name, the damping that so many rows more come to."""
    if not 0 < prior_rows < math.inf:
        raise DataError(f'prior_rows={prior_rows} must be positive and finite: 32 is the usual value')
    found = {}
    for name, weights in importance.items():
        weights = weights.double()
        total, squares = sum_(torch.stack([weights.sum(), weights.pow(2).sum()])).tolist()
        found[name] = prior_rows * squares / total**2
    return found


def _inputs(layer: nn.Module) -> int:
    return layer.weight[0].numel()


def _reason_to_leave(layer: nn.Module, max_inputs: int) -> str:
    if isinstance(layer, QuantConv2dMixin):
        if layer.groups != 1:
            return f'{layer.groups} groups'
        if isinstance(layer.padding, str) or layer.padding_mode != 'zeros':
            return f'padding {layer.padding!r}, {layer.padding_mode}'
    elif not isinstance(layer, QuantLinearMixin):
        return type(layer).__name__
    return f'{_inputs(layer)} inputs, more than {max_inputs}' if _inputs(layer) > max_inputs else ''


def _gather(
    layers: List[Tuple[str, nn.Module]], run: Callable[[], None], importance: Mapping[str, Tensor]
) -> Dict[str, Tensor]:
    """Gram matrices of the quantized inputs of ``layers`` over one run."""
    grams: Dict[str, Tensor] = {}
    calls = getattr(importance, 'calls', {})
    weights = {name: _Weights(name, importance[name], calls.get(name)) for name, _ in layers if name in importance}
    with contextlib.ExitStack() as hooks:
        for name, layer in layers:
            # On the input's quantizer: layers whose owner multiplies for them (packed projections) are seen as well.
            handle = layer.input_quantizer.register_forward_hook(_gram_hook(grams, name, layer, weights.get(name)))
            hooks.callback(handle.remove)
        run()
    for given in weights.values():
        given.close()
    return _reduced(layers, grams)


class _Weights:
    """Weights of the rows that go through a layer, in their order.

    Args:
        name: Of the layer.
        values: (rows,).
        calls: How many of them each call had, see :class:`.RowImportance`; None where their order says enough.
    """

    def __init__(self, name: str, values: Tensor, calls: Optional[Sequence[int]] = None):
        self.name, self.values, self.calls = name, values, calls
        self.used = self.made = 0

    def begin(self, count: int) -> None:
        """A call of so many rows follows."""
        if self.calls is not None and self.calls[self.made : self.made + 1] != (count,):
            raise DataError(
                f'Layer {self.name!r}: weights of {len(self.values)} rows do not fit. It is called several times in a '
                f'pass, '
                f'call {self.made + 1} has {count} rows, and the weights are of calls of '
                f'{", ".join(map(str, self.calls[:8]))} '
                'rows: put the same samples through in the same batches both times.'
            )
        self.made += 1

    def next(self, count: int) -> Tensor:
        """(count, 1)."""
        self.used += count
        if self.used > len(self.values):
            self.close()
        return self.values[self.used - count : self.used, None]

    def close(self) -> None:
        """After the last row."""
        if self.used != len(self.values):
            raise DataError(
                f'Layer {self.name!r}: weights of {len(self.values)} rows do not fit {self.used} rows: take both from '
                f'the '
                'same samples, in the same order.'
            )


def _reduced(layers: List[Tuple[str, nn.Module]], grams: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Gram matrices of the samples of all ranks; a rank may have sent none through a layer."""
    seen = maximum_(torch.tensor([name in grams for name, _ in layers], dtype=torch.int32))
    for (name, layer), anywhere in zip(layers, seen.tolist()):
        if anywhere:
            inputs = _inputs(layer)
            sum_(grams.setdefault(name, torch.zeros(inputs, inputs, device=layer.weight.device)))
    return grams


def _gram_hook(grams: Dict[str, Tensor], name: str, layer: nn.Module, weights: Optional[_Weights]):

    def hook(quantizer: nn.Module, args: Tuple, output: Tensor) -> None:
        rows = valid_rows_of(output, row_mask_given(args))
        if weights is not None:
            weights.begin(_count(layer, rows))
        # sums of thousands of products are no numbers of eight bits
        with torch.autocast(output.device.type, enabled=False):
            for part in _rows(layer, rows.float()):
                if weights is not None:
                    part = part * weights.next(len(part)).sqrt()
                found = grams.get(name)
                if found is None:
                    grams[name] = part.t() @ part
                else:
                    found.addmm_(part.t(), part)

    return hook


def _places(layer: nn.Module, x: Tensor) -> Tuple[int, int]:
    """Height and width of what a convolution gives for ``x`` (..., H, W)."""
    height, width = (
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, pad, dilation, kernel, stride in zip(
            x.shape[-2:], layer.padding, layer.dilation, layer.kernel_size, layer.stride
        )
    )
    return height, width


def _count(layer: nn.Module, x: Tensor) -> int:
    """How many vectors :func:`_rows` gives."""
    if isinstance(layer, QuantConv2dMixin):
        height, width = _places(layer, x)
        return (len(x) if x.dim() == 4 else 1) * height * width
    return x.shape[:-1].numel()


def _rows(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The vectors (rows, inputs) that the layer multiplies with, of a convolution an image at a time, or a strip of
    one.
    """
    if not isinstance(layer, QuantConv2dMixin):
        yield x.reshape(-1, x.shape[-1])
        return
    height, width = _places(layer, x)
    lines = max(1, STRIP // (4 * _inputs(layer) * max(width, 1)))  # of the output
    step, reach = layer.stride[0], layer.dilation[0] * (layer.kernel_size[0] - 1) + 1
    for image in (x if x.dim() == 4 else x[None]).split(1):
        if lines >= height:
            yield F.unfold(image, layer.kernel_size, layer.dilation, layer.padding, layer.stride)[0].t()
            continue
        down, across = layer.padding
        image = F.pad(image, (across, across, down, down))
        for first in range(0, height, lines):
            last = min(first + lines, height) - 1
            yield F.unfold(
                image[..., first * step : last * step + reach, :], layer.kernel_size, layer.dilation, 0, layer.stride
            )[0].t()


def _round_layer(name: str, layer: nn.Module, gram: Tensor, damping: float) -> RoundedLayer:
    quantizer, weight = layer.weight_quantizer, layer.weight.flatten(1)
    nearest = quantizer.fake_quantize(layer.weight).flatten(1)

    def round_columns(columns: Tensor) -> Tensor:
        return fake_quantize(columns, quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax, 0)

    energy = max(_squared(weight, gram), 1e-30)
    before = _squared(nearest - weight, gram) / energy
    reason, better = '', nearest
    try:
        better = compensated_rounding(weight, gram, round_columns, damping)
    except LowRankError as error:
        reason = str(error)
    if int(maximum_(torch.tensor(bool(reason), dtype=torch.int32))):  # one word for all ranks
        return RoundedLayer(name, before, before, reason or 'another rank cannot round it')
    # Of rank 0: one error decides over all codes after it, so ranks that differed in a last digit would drift apart.
    better = broadcast_(better)
    after = _squared(better - weight, gram) / energy
    if after >= before:
        return RoundedLayer(name, before, before, 'nothing gained')
    layer.weight.copy_(better.view_as(layer.weight))
    return RoundedLayer(name, before, after)


def _squared(weight: Tensor, gram: Tensor) -> float:
    """Squared norm of X weight^T over the rows of X that ``gram`` was made of; in float64, some columns of it at a
    time.
    """
    weight = weight.double()
    return float(
        sum(
            ((weight @ columns.double()) * part).sum()
            for columns, part in zip(gram.split(BLOCK, 1), weight.split(BLOCK, 1))
        )
    )
