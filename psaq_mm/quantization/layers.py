"""Quantized layers, and how a float layer becomes one in place.

A quantized layer is the float layer with two more quantizers: same class hierarchy, same parameters, same state-dict
keys plus ``input_quantizer.*`` and ``weight_quantizer.*``. Biases stay in floating point.
"""

from contextlib import ExitStack, contextmanager
from typing import Any, ContextManager, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple, Type, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.contexts import replaced
from psaq_mm.quantization.primitives import Rounded, straight_through
from psaq_mm.quantization.quantizers import AffineQuantizer, LogQuantizer, Quantizer, in_mode
from psaq_mm.quantization.reparam import ReparameterizedQuantizer, norm_before
from psaq_mm.quantization.spec import AdapterSpec, LayerSpec

SAME_AS_LINEAR: Set[str] = {'mmcv.cnn.bricks.wrappers.Linear'}
"""Subclasses of ``Linear``, as ``'module.ClassName'``, that override ``forward`` without changing its outcome: they are
converted as the class itself. Open to additions.
"""

SAME_AS_CONV2D: Set[str] = {'mmcv.cnn.bricks.wrappers.Conv2d'}
"""As :data:`SAME_AS_LINEAR`, of ``Conv2d``."""

SAME_AS_CONVTRANSPOSE2D: Set[str] = {'mmcv.cnn.bricks.wrappers.ConvTranspose2d'}
"""As :data:`SAME_AS_LINEAR`, of ``ConvTranspose2d``."""


class _CachedWeight(NamedTuple):
    """A quantized weight, and what it was computed from."""

    sources: Tuple[Tensor, Tensor, Tensor]
    stamps: Tuple[Tuple[int, int], ...]
    value: Union[Tensor, Rounded]


class _QuantizedWeightLayer(nn.Module):
    """What the quantized layers share: building the quantizers, and the cache of the quantized weight.

    Attributes:
        input_quantizer: Per tensor, asymmetric unless the target says otherwise.
        weight_quantizer: Per output channel.
        output_quantizer: As the input's; None unless every edge is quantized (``points='all'``).
    """

    output_axis = 0  # of the weight
    _weight_cache: Optional[_CachedWeight] = None
    _weight_is_held = False
    input_quantizer: AffineQuantizer
    weight_quantizer: AffineQuantizer
    output_quantizer: Optional[AffineQuantizer]

    def add_quantizers(self, spec: LayerSpec, output: Optional[LayerSpec] = None) -> None:
        """Add uncalibrated quantizers on the device of the weight.

        Args:
            spec: Of input and weight.
            output: Of the output, None to leave it in floating point.
        """
        device = self.weight.device
        if spec.reparameterize and norm_before(self) is not None:
            outputs, inputs = self.weight.shape[:2]
            self.input_quantizer = ReparameterizedQuantizer(
                spec.a_bits,
                inputs,
                outputs,
                spec.a_observer,
                spec.a_symmetric,
                axis=-1 if self.weight.dim() == 2 else 1,
            ).to(device)
        else:
            self.input_quantizer = activation_quantizer(spec).to(device)
        self.weight_quantizer = AffineQuantizer(
            spec.w_bits,
            spec.w_symmetric,
            channel_axis=self.output_axis,
            num_channels=self.weight.shape[self.output_axis],
            observer=spec.w_observer,
            full_range=spec.w_full_range,
        ).to(device)
        self.weight_quantizer.reduced_range = spec.w_reduce_range
        self.output_quantizer = None
        if output is not None and not getattr(self, 'output_feeds_activation', False):
            self.output_quantizer = activation_quantizer(output).to(device)

    def full_bias(self) -> Optional[Tensor]:
        """The layer's own bias plus the part that reparameterization folded into it."""
        return self.input_quantizer.shifted(self.bias, self.weight.dtype)

    def _finish(self, out: Tensor, valid: Optional[Tensor] = None) -> Tensor:
        return apply_edge(self.output_quantizer, out, valid)

    def quantized_weight(self) -> Tensor:
        """The weight as the layer multiplies with it.

        Kept between calls until the weight or its scale changes: where no gradient is needed, and inside
        :func:`hold_weights`. (A change through ``weight.data`` leaves no trace on the weight: call ``train()`` or
        ``eval()`` after it, which drops the cache.)
        """
        weight, quantizer = self.weight, self.weight_quantizer
        needs_grad = weight.requires_grad and torch.is_grad_enabled()
        kept = self._weight_is_held or not needs_grad
        if quantizer.mode != 'on' or not kept or weight.is_inference() or quantizer.scale.is_inference():
            return quantizer(weight)
        quantizer.require_calibrated()
        tensors = (weight, quantizer.scale, quantizer.zero_point)
        stamps = tuple((t._version, t.data_ptr()) for t in tensors)
        # Of a view, made anew at each use, the tensor that it is a view of.
        sources = tuple(t if t._base is None else t._base for t in tensors)
        cache = self._weight_cache
        if (
            cache is None
            or cache.stamps != stamps
            or any(a is not b for a, b in zip(cache.sources, sources))
            or (needs_grad and not isinstance(cache.value, Rounded))
        ):
            # Not an inference tensor: a later forward with gradients towards the input must be able to save it.
            with torch.inference_mode(False), torch.no_grad():
                value = quantizer.round_once(weight) if needs_grad else quantizer(weight)
            cache = self._weight_cache = _CachedWeight(sources, stamps, value)
        if not isinstance(cache.value, Rounded):
            return cache.value
        return straight_through(weight, cache.value) if needs_grad else cache.value.values

    def drop_weight_cache(self) -> None:
        """Forget the quantized weight; the next forward computes it anew."""
        self._weight_cache = None

    def train(self, mode: bool = True):
        self.drop_weight_cache()
        return super().train(mode)

    def _apply(self, fn, *args, **kwargs):
        self.drop_weight_cache()
        return super()._apply(fn, *args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        self.drop_weight_cache()
        if f'{prefix}weight' in state_dict and f'{prefix}input_quantizer.fill' not in state_dict:
            self.input_quantizer.forget_folding()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self):
        # Copies and pickles hold no cache.
        return {k: v for k, v in vars(self).items() if k not in ('_weight_cache', '_weight_is_held')}


@contextmanager
def hold_weights(model: nn.Module) -> Iterator[None]:
    """Quantize each weight once for all forward passes with gradients inside the ``with`` block.

    For a training step of several passes (accumulated batches, a head that every level goes through, blocks that
    activation checkpointing runs twice). The gradients are the same as without it. In-place changes of a weight are
    still noticed. At the end the quantized weights are dropped, because some optimizers change a weight without a
    trace.

    Args:
        model: Quantized model.

    Example:
        >>> with hold_weights(student):
        ...     for part in images.chunk(4):
        ...         loss(student(part)).backward()
        >>> optimizer.step()
    """
    with ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, _QuantizedWeightLayer) and not layer._weight_is_held:
                stack.callback(layer.drop_weight_cache)
                stack.enter_context(replaced(layer, '_weight_is_held', True))
        yield


class QuantLinearMixin(_QuantizedWeightLayer):
    """Forward of a quantized linear layer."""

    def forward(self, input: Tensor, valid: Optional[Tensor] = None) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``.

        Args:
            input: As for ``nn.Linear``.
            valid: None, or a mask of the rows that take part in calibration (:class:`.RowMask`).
        """
        out = F.linear(self.input_quantizer(input, valid), self.quantized_weight(), self.full_bias())
        return self._finish(out, valid)


class QuantConv2dMixin(_QuantizedWeightLayer):
    """Forward of a quantized convolution."""

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C', H', W')``."""
        return self._finish(self._conv_forward(self.input_quantizer(input), self.quantized_weight(), self.full_bias()))


class QuantConvTranspose2dMixin(_QuantizedWeightLayer):
    """Forward of a quantized transposed convolution.

    Its weight is ``(in_channels, out_channels / groups, kH, kW)``, with one scale for each index of axis 1, as ONNX can
    express it. With groups, the channels at the same place of each group share a scale.
    """

    output_axis = 1

    def forward(self, input: Tensor, output_size: Optional[List[int]] = None) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C', H', W')``; ``output_size`` as for ``nn.ConvTranspose2d``."""
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        return self._finish(
            F.conv_transpose2d(
                self.input_quantizer(input),
                self.quantized_weight(),
                self.bias,
                self.stride,
                self.padding,
                output_padding,
                self.groups,
                self.dilation,
            )
        )


class QuantLinear(QuantLinearMixin, nn.Linear):
    """Linear layer with quantized input and weight; made by ``quantize_``."""


class QuantConv2d(QuantConv2dMixin, nn.Conv2d):
    """Convolution with quantized input and weight; made by ``quantize_``."""


class QuantConvTranspose2d(QuantConvTranspose2dMixin, nn.ConvTranspose2d):
    """Transposed convolution with quantized input and weight; made by ``quantize_``."""


class QuantMatMul(nn.Module):
    """Product of two activations, both quantized per tensor.

    Args:
        lhs_bits: Bits of the left operand, None to leave it in floating point.
        rhs_bits: Bits of the right operand, None to leave it in floating point.
        observer: Name of the observer of both.
        lhs_kind: ``'affine'``, or ``'log2'`` or ``'log_sqrt2'`` for a nonnegative left operand.
        output_bits: Bits of the product, None to leave it in floating point.
        symmetric: Of the left operand, the right one and the product, whether codes are signed and the zero point is 0.
            Affine quantizers only.

    Example:
        >>> matmul = QuantMatMul(8, 8)
        >>> out = matmul(attention_weights, values)  # (B, h, N, M) @ (B, h, M, d), after calibration
    """

    def __init__(
        self,
        lhs_bits: Optional[int] = 8,
        rhs_bits: Optional[int] = 8,
        observer: str = 'minmax',
        lhs_kind: str = 'affine',
        output_bits: Optional[int] = None,
        symmetric: Tuple[bool, bool, bool] = (False, False, False),
    ):
        super().__init__()
        self.lhs_quantizer: Optional[Quantizer]
        if lhs_bits is None:
            self.lhs_quantizer = None
        elif lhs_kind == 'affine':
            self.lhs_quantizer = AffineQuantizer(lhs_bits, symmetric[0], observer=observer)
        else:
            self.lhs_quantizer = LogQuantizer(lhs_bits, lhs_kind)
        self.rhs_quantizer = None if rhs_bits is None else AffineQuantizer(rhs_bits, symmetric[1], observer=observer)
        self.output_quantizer = (
            None if output_bits is None else AffineQuantizer(output_bits, symmetric[2], observer=observer)
        )

    @classmethod
    def from_spec(
        cls,
        spec: Optional[LayerSpec],
        quantize_lhs: bool = True,
        lhs_kind: str = 'affine',
        symmetric: Tuple[bool, bool, bool] = (False, False, False),
    ) -> 'QuantMatMul':
        """Product with the activation bits of a layer spec; all in floating point where the spec is None.

        Args:
            spec: As :meth:`.QuantSpec.resolve` returns it.
            quantize_lhs: False leaves the left operand in floating point, such as the attention weights.
            lhs_kind: As for the class.
            symmetric: As for the class; all, where the spec has symmetric activations.
        """
        if spec is None:
            return cls(None, None)
        symmetric = (True, True, True) if spec.a_symmetric else symmetric
        return cls(spec.a_bits if quantize_lhs else None, spec.a_bits, spec.a_observer, lhs_kind, symmetric=symmetric)

    def forward(self, a: Tensor, b: Tensor, valid: Optional[Tensor] = None) -> Tensor:
        """``a @ b``.

        Args:
            a: ``(..., N, K)``.
            b: ``(..., K, M)``.
            valid: None, or a mask of the rows of ``a`` that take part in calibration (:class:`.RowMask`).

        Returns:
            ``(..., N, M)``.
        """
        a = apply_edge(self.lhs_quantizer, a, valid)
        b = apply_edge(self.rhs_quantizer, b)
        return apply_edge(self.output_quantizer, a @ b, valid)


def attention_products(spec: AdapterSpec, name: str, weighted: str = 'av') -> Tuple[QuantMatMul, QuantMatMul]:
    """The two products of an attention module: scores ``q @ k.T``, and ``softmax(scores) @ v``.

    With ``points='all'`` q, k and v come quantized out of their projection, as one tensor, and the scores are quantized
    after the product; otherwise the operands of both products are.

    Args:
        spec: As an adapter gets it.
        name: Dotted name of the attention module; the products are its children ``matmul_qk`` and ``matmul_av``.
        weighted: What the second one is called, where a module has several.
    """
    qk, av = spec.resolve(f'{name}.matmul_qk'), spec.resolve(f'{name}.matmul_{weighted}')
    kind, quantize_softmax = spec.softmax_quantizer, spec.quantize_softmax
    if spec.points == 'all':
        scores, product = QuantMatMul(None, None), QuantMatMul(None, None)
        if qk is not None:
            scores = QuantMatMul(
                None, None, output_bits=qk.a_bits, observer=qk.a_observer, symmetric=(False, False, qk.a_symmetric)
            )
        if av is not None and quantize_softmax:
            product = QuantMatMul(av.a_bits, None, av.a_observer, kind, symmetric=(av.a_symmetric, False, False))
        return scores, product
    queries, values = (spec.symmetric_attention, False, False), (False, spec.symmetric_attention, False)
    return QuantMatMul.from_spec(qk, symmetric=queries), QuantMatMul.from_spec(av, quantize_softmax, kind, values)


def edge_quantizer(spec: AdapterSpec, name: str) -> Optional[AffineQuantizer]:
    """Quantizer of an activation that is no layer's own, such as a residual sum; None unless ``points='all'``.

    Args:
        spec: As an adapter gets it.
        name: Name of the edge for overrides: the owner's dotted name and one more component. The owner keeps the
            quantizer in an attribute of that component's name and ``_quantizer``.
    """
    edge = spec.resolve(name) if spec.points == 'all' else None
    return None if edge is None else activation_quantizer(edge)


def activation_quantizer(spec: LayerSpec) -> AffineQuantizer:
    """Quantizer of an activation, with one scale for the tensor."""
    return AffineQuantizer(spec.a_bits, spec.a_symmetric, observer=spec.a_observer)


def apply_layer(layer: nn.Module, x: Tensor, valid: Optional[Tensor]) -> Tensor:
    """``layer(x, valid)`` where the layer is quantized and there is a mask, else ``layer(x)``."""
    return layer(x, valid) if valid is not None and is_quantized_layer(layer) else layer(x)


def apply_edge(quantizer: Optional[Quantizer], x: Tensor, valid: Optional[Tensor] = None) -> Tensor:
    """``quantizer(x, valid)``, or ``x`` itself without a quantizer."""
    return x if quantizer is None else quantizer(x, valid)


class QuantOutputMixin(nn.Module):
    """Any module with one tensor as output, which ``output_quantizer`` quantizes."""

    output_quantizer: Quantizer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the module's own forward, quantized."""
        return self.output_quantizer(super().forward(*args, **kwargs))


def quantize_output_(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    """Quantize the output of ``module`` (a LayerNorm, a dropout after a sum), in place; only with ``points='all'``.

    Args:
        module: Any module but a quantized layer, which has an output quantizer of its own.
        name: Its dotted name.
        spec: As an adapter gets it.

    Returns:
        ``module``.
    """
    quantizer = edge_quantizer(spec, f'{name}.output')
    if quantizer is not None:
        module = adopt(module, QuantOutputMixin)
        module.output_quantizer = quantizer
    return module


def feeds_activation(layer: nn.Module) -> nn.Module:
    """Mark a layer whose output only an activation function or a normalization reads: it is not an edge. The layer."""
    layer.output_feeds_activation = True  # type: ignore[assignment]  # of nn.Module's annotations
    return layer


_ADOPTED: Dict[Tuple[type, type], Any] = {}


def _rebuild_adopted(quant_class: Type[nn.Module], base: Type[nn.Module]) -> nn.Module:
    cls = _adopted_class(quant_class, base)
    return cls.__new__(cls)


def _reduce_adopted(self: Any, protocol: int) -> Tuple:
    # The class is made at run time and cannot be imported by name. Its two bases can.
    state = self.__getstate__() if hasattr(self, '__getstate__') else dict(vars(self))
    return _rebuild_adopted, self._adopted_from, state


def _adopted_class(quant_class: Type[nn.Module], base: Type[nn.Module]) -> Type[nn.Module]:
    if issubclass(quant_class, base):
        return quant_class
    key = quant_class, base
    if key not in _ADOPTED:
        namespace: Dict[str, Any] = dict(
            __module__=quant_class.__module__,
            __doc__=quant_class.__doc__,
            __reduce_ex__=_reduce_adopted,
            _adopted_from=key,
        )
        name = base.__name__ if getattr(quant_class, 'keeps_name', False) else quant_class.__name__
        _ADOPTED[key] = type(name, (quant_class, base), namespace)
    return _ADOPTED[key]


def class_before(cls: type) -> type:
    """The class that a module had before :func:`adopt`, for the one that it has; any other class itself."""
    while '_adopted_from' in vars(cls):
        cls = vars(cls)['_adopted_from'][1]
    return cls


def adopt(module: nn.Module, quant_class: Type[nn.Module]) -> nn.Module:
    """Make a module an instance of ``quant_class`` too, in place.

    Parameters, buffers, hooks and every other attribute stay, and so do ``isinstance`` checks for the module's own
    class: the new class derives from both. The object stays the same, so whoever holds it (several parents, a hook)
    needs no change. Deep copies and pickles work.

    Args:
        module: Any module.
        quant_class: Class whose ``forward`` takes over. If it has ``keeps_name = True``, messages call the module by
            the name of its own class.

    Returns:
        ``module``.
    """
    module.__class__ = _adopted_class(quant_class, type(module))
    return module


def is_quantized_layer(module: nn.Module) -> bool:
    """Whether a module is one of the quantized layers with a weight."""
    return isinstance(module, _QuantizedWeightLayer)


def full_precision_weights(model: nn.Module) -> ContextManager[None]:
    """Inside the ``with`` block the weights of a model's quantized layers are not quantized; activations are."""
    return in_mode([m.weight_quantizer for m in model.modules() if is_quantized_layer(m)], 'off')


_FLOAT_LAYERS = (
    (nn.Linear, QuantLinear, SAME_AS_LINEAR),
    (nn.Conv2d, QuantConv2d, SAME_AS_CONV2D),
    (nn.ConvTranspose2d, QuantConvTranspose2d, SAME_AS_CONVTRANSPOSE2D),
)


def keep_float(module: nn.Module, reason: str) -> None:
    """Leave the layers of a module in floating point; a report names each with the reason.

    Args:
        module: A layer, or what holds some. For an adapter, which knows that a layer computes a constant, for example.
            A module without layers is named itself: one that multiplies activations in a way that has no quantizer.
        reason: Such as ``'a constant of the size'``.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, tuple(row[0] for row in _FLOAT_LAYERS))]
    for part in layers or [module]:
        vars(part)['float_reason'] = reason


def computes_in_float(module: nn.Module, reason: str) -> nn.Module:
    """Have a report name a module whose layers are quantized, and which computes something else in floating point.

    Args:
        module: Any module but a layer.
        reason: What it computes.

    Returns:
        ``module``.
    """
    vars(module)['float_reason'] = reason
    return module


def quant_class_of(module: nn.Module) -> Tuple[Optional[type], str]:
    """Quantized class for a float layer.

    Returns:
        ``(class, '')``, or ``(None, reason)`` for a Linear or convolution whose forward is not the known one and for
        what :func:`keep_float` keeps, or ``(None, '')`` for any other module.
    """
    if 'float_reason' in vars(module):
        return None, vars(module)['float_reason']
    for float_class, quant_class, same in _FLOAT_LAYERS:
        if not isinstance(module, float_class):
            continue
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return None, 'its weight is used by the attention function, its forward is never called'
        if isinstance(getattr(module, 'weight', None), nn.parameter.UninitializedParameter):
            return None, 'its shape is not known yet (lazy module)'
        if 'forward' in vars(module):
            return None, 'its forward was replaced on the instance'
        definer = next(cls for cls in type(module).__mro__ if 'forward' in vars(cls))
        if definer is not float_class and f'{definer.__module__}.{definer.__qualname__}' not in same:
            return None, f'{definer.__name__} has a forward of its own'
        return quant_class, ''
    return None, ''
