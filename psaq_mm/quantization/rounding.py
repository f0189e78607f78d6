"""Compensated rounding: weights are rounded input by input, and each error is carried into the inputs after it.

The nearest code of every weight is the best choice only where the inputs of a layer are uncorrelated, and those of a
transformer are not. With the Gram matrix of the layer's inputs, later weights can compensate the error of one weight:
optimal brain compression (Frantar & Alistarh, arXiv 2208.11580) in the order and with the Cholesky form of GPTQ
(Frantar et al., arXiv 2210.17323, section 3). Scales and the code range of the weight's quantizer stay: the result is
the same integer model with better codes.
"""

import math
from typing import Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.contexts import hooked
from psaq_mm.errors import DataError
from psaq_mm.progress import stage
from psaq_mm.quantization.layers import QuantConv2dMixin, QuantLinearMixin, full_precision_weights, is_quantized_layer
from psaq_mm.quantization.primitives import fake_quantize
from psaq_mm.quantization.rows import row_mask_given, valid_rows_of
from psaq_mm.ranks import broadcast_, maximum_, sum_

__all__ = ['RoundedLayer', 'RoundingPlan', 'compensated_rounding', 'round_weights_', 'rounding_plan']

BLOCK = 128
"""Columns that are rounded before their errors are carried into the rest of the matrix (GPTQ's lazy batch)."""

STRIP = 1 << 26
"""Bytes of a convolution's inputs that are unfolded at a time."""

GRAM_BYTES = 1 << 30
"""Bytes of the Gram matrices that are gathered in one pass."""

MAX_INPUTS = 8192
"""Layers with more inputs (channels times kernel) keep their nearest codes: time grows with the third power."""

NamedLayer = Tuple[str, nn.Module]


class LowRankError(DataError):
    """The inputs of a layer span too few directions for their damping: their Gram matrix has no inverse in float64."""


class RoundedLayer(NamedTuple):
    """What rounding did to a layer.

    Attributes:
        name: Of the layer.
        nearest: Squared error of its output with nearest codes, relative to the squared output.
        compensated: The same error after compensation.
        reason: Why it keeps its nearest codes; empty if it does not.
    """

    name: str
    nearest: float
    compensated: float
    reason: str = ''


def compensated_rounding(
    weight: Tensor, gram: Tensor, round_columns: Callable[[Tensor], Tensor], damping: float = 0.1
) -> Tensor:
    """Round a matrix so that its product with the inputs changes little.

    Source: GPTQ, arXiv 2210.17323, section 3 (Cholesky form, lazy batches, inputs of greatest energy first).

    Args:
        weight: (outputs, inputs).
        gram: X^T X of the inputs X (rows, inputs): (inputs, inputs), symmetric, finite.
        round_columns: Rounds columns (outputs, n) to the grid; works on each output by itself.
        damping: Added to the diagonal, as a multiple of its mean; positive. A greater one trusts the inputs less: 0
            would fit the rows of X alone, and infinity is rounding to the nearest.

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
    """``gram`` with rows and columns reordered, as float64; by strips of rows, so that memory holds one copy."""
    ordered = torch.empty(gram.shape, dtype=torch.float64, device=gram.device)
    for rows, part in zip(ordered.split(BLOCK), order.split(BLOCK)):
        rows.copy_(gram[part][:, order])
    return ordered


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
                'and nothing tells how to share errors among the others; give more damping (in a config, '
                'dfq.prior_rows), or more samples'
            )
    return gram


@torch.no_grad()
def round_weights_(
    model: nn.Module,
    run: Callable[[], None],
    prior_rows: float = 32.0,
    importance: Optional[Mapping[str, Tensor]] = None,
) -> List[RoundedLayer]:
    """Round the weights of quantized Linears and convolutions to codes that fit their quantized inputs, in place.

    The model has to be calibrated; ranges and scales stay. The samples go through the model with quantized activations,
    so the weights of a layer also compensate the error of its inputs. Weights that are not rounded yet are in full
    precision meanwhile: their nearest codes change the inputs of later layers more than the codes that they will get.
    Gram matrices of several layers are gathered in one pass, as many as :data:`GRAM_BYTES` hold; later passes see the
    weights rounded before.

    Beside those matrices a pass needs the memory of the model's forward, the quantized inputs of a layer once more in
    float32 (of a convolution at most 64 MiB of its unfolded inputs, twice that with ``importance``), and what
    :func:`compensated_rounding` needs for one layer. Matrices are float32 and summed in float32 also under autocast.

    Args:
        model: Calibrated quantized model.
        run: Puts the samples through the model; called once a pass, without gradients. In a distributed run each rank
            puts its own samples through, and all get the same codes.
        prior_rows: Damping of a layer, as a number of rows: as if so many more rows of uncorrelated inputs of the mean
            energy had been seen. The damping is ``prior_rows`` divided by the effective number of rows, which is
            (sum w)^2 / sum w^2 for rows with weights w. So a layer with few rows that matter is trusted less
            (shrinkage, Ledoit & Wolf, J. Multivariate Analysis 88, 2004). Positive.
        importance: Weight of each row that ``run`` sends through a layer, by name of the layer, as
            :func:`.row_importance` returns it. The rows of a missing layer have equal weights.

    Returns:
        One entry for each layer with a quantized weight, its errors under those weights. A layer stays unchanged where
        compensation does not help, the rank of its inputs is too low for the damping, or it has more than
        :data:`MAX_INPUTS`: ``reason`` says so.

    Raises:
        DataError: An input holds NaN or infinity, ``importance`` is of other rows than ``run`` sends (names the layer),
            or ``prior_rows`` is not positive.

    Example:
        >>> calibrate(model, lambda: model(samples))
        >>> report = round_weights_(model, lambda: model(samples))
    """
    if not 0 < prior_rows < math.inf:
        raise DataError(f'prior_rows={prior_rows} must be positive and finite: 32 is the usual value')
    layers = [(n, m) for n, m in model.named_modules() if is_quantized_layer(m) and m.weight_quantizer.mode == 'on']
    reasons = {name: _reason_to_leave(layer) for name, layer in layers}
    reports = {name: RoundedLayer(name, math.nan, math.nan, reason) for name, reason in reasons.items()}
    rounded = [(name, layer) for name, layer in layers if not reasons[name]]
    with stage('Rounding weights', len(rounded)) as rounding:
        for batch in _batches(rounded):
            with full_precision_weights(model):
                grams = _gather(batch, run, importance or {})
            for name, layer in batch:
                gram = grams.pop(name, None)
                if gram is None:
                    reports[name] = RoundedLayer(name, math.nan, math.nan, 'no sample went through it')
                else:
                    try:
                        reports[name] = _round_layer(name, layer, gram.matrix, gram.damping(prior_rows))
                    except DataError as error:
                        raise DataError(f'Layer {name!r}: {error}') from error
                rounding.advance()
    return [reports[name] for name, _ in layers]


class RoundingPlan(NamedTuple):
    """What :func:`round_weights_` will do with a model.

    Attributes:
        passes: How often the samples go through it.
        layers: (outputs, inputs) of the weight of each layer that is rounded, in order.
    """

    passes: int
    layers: List[Tuple[int, int]]


def rounding_plan(model: nn.Module) -> RoundingPlan:
    """See :class:`RoundingPlan`; the model need not be calibrated."""
    layers = [(n, m) for n, m in model.named_modules() if is_quantized_layer(m) and m.weight_quantizer.mode == 'on']
    rounded = [(name, layer) for name, layer in layers if not _reason_to_leave(layer)]
    return RoundingPlan(len(list(_batches(rounded))), [(len(layer.weight), _inputs(layer)) for _, layer in rounded])


def _inputs(layer: nn.Module) -> int:
    return layer.weight[0].numel()


def _reason_to_leave(layer: nn.Module) -> str:
    """Why a layer cannot be rounded; empty where it can."""
    if isinstance(layer, QuantConv2dMixin):
        if layer.groups != 1:
            return f'{layer.groups} groups'
        if isinstance(layer.padding, str) or layer.padding_mode != 'zeros':
            return f'padding {layer.padding!r}, {layer.padding_mode}'
    elif not isinstance(layer, QuantLinearMixin):
        return type(layer).__name__
    return f'{_inputs(layer)} inputs, more than {MAX_INPUTS}' if _inputs(layer) > MAX_INPUTS else ''


def _batches(layers: Sequence[NamedLayer]) -> Iterator[List[NamedLayer]]:
    """Layers in order, as many at a time as have Gram matrices within :data:`GRAM_BYTES`, and at least one."""
    batch: List[NamedLayer] = []
    used = 0
    for name, layer in layers:
        needed = 4 * _inputs(layer) ** 2
        if batch and used + needed > GRAM_BYTES:
            yield batch
            batch, used = [], 0
        batch.append((name, layer))
        used += needed
    if batch:
        yield batch


def _gather(
    layers: Sequence[NamedLayer], run: Callable[[], None], importance: Mapping[str, Tensor]
) -> Dict[str, '_Gram']:
    """Gram matrices of the quantized inputs of ``layers`` over one run of all ranks, of those that samples reach."""
    calls = getattr(importance, 'calls', {})
    # Hooks are on the input quantizers: layers whose owner multiplies for them (packed projections) are seen as well.
    grams = {layer.input_quantizer: _Gram(name, layer, importance.get(name), calls.get(name)) for name, layer in layers}
    with hooked(grams, lambda quantizer: quantizer.register_forward_hook(grams[quantizer].add)):
        run()
    for gram in grams.values():
        gram.check_all_used()
    rows = sum_(torch.tensor([gram.rows for gram in grams.values()], dtype=torch.float64)).tolist()
    return {gram.name: gram.summed(count) for gram, count in zip(grams.values(), rows) if count}


class _Gram:
    """Gram matrix of the inputs of a layer, summed over the calls of its input quantizer.

    Args:
        name: Of the layer.
        layer: Whose inputs they are.
        weights: Of the rows, (rows,), in their order; None where all weigh alike.
        calls: How many rows each call had, see :class:`.RowImportance`; None where their order says enough.

    Attributes:
        matrix: (inputs, inputs), float32.
        rows: How many rows it is the sum of.
    """

    def __init__(
        self, name: str, layer: nn.Module, weights: Optional[Tensor], calls: Optional[Sequence[int]] = None
    ) -> None:
        self.name, self.layer, self.weights, self.calls = name, layer, weights, calls
        self.rows = self.calls_seen = self.used = 0
        self._sum: Optional[Tensor] = None

    @property
    def matrix(self) -> Tensor:
        """The sum so far."""
        if self._sum is None:
            inputs = _inputs(self.layer)
            self._sum = torch.zeros(inputs, inputs, device=self.layer.weight.device)
        return self._sum

    def add(self, quantizer: nn.Module, args: Tuple, output: Tensor) -> None:
        """Hook of the layer's input quantizer."""
        rows = valid_rows_of(output, row_mask_given(args))
        self._begin_call(_count(self.layer, rows))
        # Sums of thousands of products need more than the 8 bits that autocast may leave.
        with torch.autocast(output.device.type, enabled=False):
            for part in _rows(self.layer, rows.float()):
                if self.weights is not None:
                    part = part * self._next_weights(self.weights, len(part)).sqrt()
                if self._sum is None:
                    self._sum = part.t() @ part
                else:
                    self._sum.addmm_(part.t(), part)

    def _begin_call(self, count: int) -> None:
        if self.calls is not None and self.calls[self.calls_seen : self.calls_seen + 1] != (count,):
            raise DataError(
                f'Layer {self.name!r}: weights of {sum(self.calls)} rows do not fit. It is called several times in a '
                f'pass, call {self.calls_seen + 1} has {count} rows, and the weights are of calls of '
                f'{", ".join(map(str, self.calls[:8]))} rows: put the same samples through in the same batches both '
                'times.'
            )
        self.calls_seen += 1
        self.rows += count

    def _next_weights(self, weights: Tensor, count: int) -> Tensor:
        """(count, 1)."""
        self.used += count
        if self.used > len(weights):
            self.check_all_used()
        return weights[self.used - count : self.used, None]

    def check_all_used(self) -> None:
        """DataError where the weights are not those of the rows that came."""
        if self.weights is not None and self.used != len(self.weights):
            raise DataError(
                f'Layer {self.name!r}: weights of {len(self.weights)} rows do not fit {self.used} rows: take both from '
                'the same samples, in the same order.'
            )

    def summed(self, rows: int) -> '_Gram':
        """Sum the matrix over the ranks, which saw ``rows`` rows together; itself."""
        self.rows = rows
        sum_(self.matrix)
        return self

    def damping(self, prior_rows: float) -> float:
        """``prior_rows`` relative to the effective number of rows; after :meth:`summed`."""
        if self.weights is None:
            return prior_rows / self.rows
        values = self.weights.double()
        total, squares = sum_(torch.stack([values.sum(), values.pow(2).sum()])).tolist()
        return prior_rows * squares / total**2


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
    """The vectors (rows, inputs) that the layer multiplies with; of a convolution an image, or a strip of one, each."""
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
    """Squared norm of X weight^T for X with X^T X = ``gram``; in float64, by strips of columns."""
    weight = weight.double()
    return float(
        sum(
            ((weight @ columns.double()) * part).sum()
            for columns, part in zip(gram.split(BLOCK, 1), weight.split(BLOCK, 1))
        )
    )
