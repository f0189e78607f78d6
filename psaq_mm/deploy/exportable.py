# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A copy of a quantized model that can be traced: quantizers and integer weights are symbols, and the forwards that do
not export well are replaced.

A forward computes the same as before. How it is written in ONNX is decided in ``lowering.py``. All that the export
knows of the modules is in the tables of :class:`ExportableModel`; a replaced forward is bound to its rows of them.
"""

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Callable, Dict, Mapping, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.deploy import symbols, windows
from psaq_mm.deploy.heads import read_channels_last_
from psaq_mm.deploy.pooling import LinearPooling
from psaq_mm.errors import NotCalibratedError, UnsupportedModelError
from psaq_mm.models.adapters.match import class_named
from psaq_mm.models.adapters.swin import PATCH_MERGING
from psaq_mm.models.adapters.windows import CutMixin, WindowAttentionMixin
from psaq_mm.quantization import (
    AffineQuantizer,
    LogQuantizer,
    Quantizer,
    apply_edge,
    is_quantized_layer,
    quantize,
    quantizers,
)
from psaq_mm.quantization.primitives import along

__all__ = ['Codes', 'ExportableModel', 'IntegerWeight', 'make_exportable']

_CONV_MODULE = ('mmcv.cnn.bricks.conv_module.ConvModule',)

TensorFunction = Callable[[Tensor], Tensor]

# The operator itself: attention whose forward is the library's takes torch.matmul for a product of activations.
_matmul = torch.ops.aten.matmul


@dataclass(frozen=True)
class Codes:
    """An activation quantizer.

    Attributes:
        scale: Of all codes. Logarithmic: the greatest value.
        zero_point: Of all codes. Logarithmic: 0.
        low: Least code.
        high: Greatest code.
        log_base: None, ``'log2'`` or ``'log_sqrt2'``.
        shift: What the graph subtracts from codes and zero point, so that the codes are int8; None: they are uint8.
    """

    scale: float
    zero_point: int
    low: int
    high: int
    log_base: Optional[str] = None
    shift: Optional[int] = None


@dataclass
class IntegerWeight:
    """A weight as integers.

    Attributes:
        codes: int8, in the layout that the graph multiplies with.
        scale: float32 (channels,).
        zero_point: int8, (channels,).
        axis: Axis of the output channels.
        bits: Width of a code.
        low: Least code, of all channels or (channels,) of each.
        bias: Float32 (channels,), or None: that of the layer, with what reparameterization and batch normalization add
            to it.
        layer: Name of its layer; None for a constant that the export adds.
        channels: The output channels of the layer that it holds, as (first, past the last); None: all.
        arrange: Codes of the layer's own weight to these; None: they have its layout (a linear map's, transposed).
        apart: Whether the zero points are left out of the product. The product is then of the codes alone, and what the
            zero points add to it (the sum of the input times one number for each channel) is added afterwards: no
            runtime has an integer kernel for weights with zero points of their channels.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int
    bits: int
    low: Union[int, Tensor]
    bias: Optional[Tensor] = None
    layer: Optional[str] = None
    channels: Optional[Tuple[int, int]] = None
    apart: bool = False
    arrange: Optional[TensorFunction] = None


@dataclass
class ExportableModel:
    """What :func:`make_exportable` returns.

    Attributes:
        model: The copy.
        quantizers: :class:`Codes` by name.
        weights: :class:`IntegerWeight` by name.
        products: By the name of a weight of a linear map, the product with it: dequantized codes with zero point 0 to
            the result with its bias.
        positions: By window attention, its relative position bias (heads, entries), and the entry of each pair of
            tokens (N, N).
        orders: By a module whose input has its last axis in another order than in the model, the place of each entry in
            the model.
        tracing: State of the current trace.
        notes: By layer, why a part of it is exported in another way than usual.
        names: Names of the modules of the copy.
        unshuffled: By transposed convolution that is an ordinary one and a shuffle (:func:`spread_out`), its forward
            before the shuffle.
        target: As :attr:`.QuantSpec.target`. For ``'tensorrt'`` every quantizer is a pair of QuantizeLinear and
            DequantizeLinear where the model has it: attention is plain, and nothing moves codes around.
    """

    model: nn.Module
    quantizers: Dict[str, Codes] = field(default_factory=dict)
    weights: Dict[str, IntegerWeight] = field(default_factory=dict)
    products: Dict[str, TensorFunction] = field(default_factory=dict)
    positions: Dict[str, Tuple[Tensor, Tensor]] = field(default_factory=dict)
    orders: Dict[str, Tensor] = field(default_factory=dict)
    tracing: windows.Tracing = field(default_factory=windows.Tracing)
    notes: Dict[str, str] = field(default_factory=dict)
    names: Dict[nn.Module, str] = field(default_factory=dict)
    unshuffled: Dict[str, TensorFunction] = field(default_factory=dict)
    target: str = 'default'


def make_exportable(model: nn.Module, target: str = 'default') -> ExportableModel:
    """Copy a calibrated, quantized model into a form that can be traced.

    Batch normalization after a convolution is folded into scale and bias of the *integer* weight: the codes are still
    those of the fake-quantized layer.

    Args:
        model: Quantized, in any mode; it is not changed.
        target: As :attr:`.QuantSpec.target` of the model.

    Raises:
        NotCalibratedError: A quantizer has no range.
        UnsupportedModelError: The model is not quantized.
    """
    exportable = ExportableModel(copy.deepcopy(model).cpu().float(), target=target)
    network = exportable.model
    network.eval()  # not chained: it returns None in mmdet and mmseg
    if next(quantizers(network), None) is None:
        raise UnsupportedModelError(
            f'{type(model).__name__} is not quantized, so there is nothing integer to export: build it with '
            "model = dict(type='psaq_mm.Quantized', ...)"
        )
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    originals = _separate_convolutions(network)
    modules = dict(network.named_modules())
    exportable.names.update({module: name for name, module in modules.items()})
    for name, module in modules.items():  # before weights become integers: this moves their channels
        if class_named(module, PATCH_MERGING):
            _rewrite_merging(exportable, name, module)
    exportable.orders.update(read_channels_last_(network))
    attentions = _rewrite_attentions(exportable, modules)
    operands = [o for row in attentions.values() for o in (row.operands or {}).values()]
    shifts = {operand.quantizer: operand.shift for operand in operands}
    split = {row.part('qkv') for row in attentions.values() if row.operands}
    folded = {id(m.conv): m for m in modules.values() if class_named(m, _CONV_MODULE) and _folds(m)}
    for name, module in modules.items():
        if isinstance(module, Quantizer) and module.mode != 'off' and not name.endswith('weight_quantizer'):
            _rewrite_quantizer(exportable, name, module, shifts.get(name))
        elif is_quantized_layer(module) and name not in split:
            _rewrite_layer(exportable, name, module, folded.get(id(module)), originals.get(name, name))
        elif isinstance(module, nn.LayerNorm):
            _tap_input(name, module)
        for key, child in list(module._modules.items()):  # named_children() leaves out a pooling's second name
            if type(child) is nn.AdaptiveAvgPool2d:
                setattr(module, key, LinearPooling(child.output_size, exportable.tracing))
    return exportable


def _rewrite_quantizer(exportable: ExportableModel, name: str, module: Quantizer, shift: Optional[int]) -> None:
    _require_range(name, module)
    exportable.quantizers[name] = Codes(
        float(module.scale),
        int(module.zero_point),
        module.qmin,
        module.qmax,
        module.base if isinstance(module, LogQuantizer) else None,
        shift,
    )
    module.forward = lambda x, valid=None: symbols.quantizer(x, name)


def _require_range(name: str, quantizer: Quantizer) -> None:
    if not bool(quantizer.calibrated):
        raise NotCalibratedError(
            f'Quantizer {name!r} has no range: calibrate the model or load a quantized checkpoint before the export.'
        )


def _tap_input(name: str, norm: nn.LayerNorm) -> None:
    library = norm.forward
    norm.forward = lambda x, *args, **kwargs: library(
        symbols.mark_tap(x, name), *args, **kwargs
    )  # a LayerNorm2d has more


# ---------------------------------------------------------------------- layers with weights
def _rewrite_layer(
    exportable: ExportableModel, name: str, layer: nn.Module, conv_module: Optional[nn.Module], original: str
) -> None:
    """Replace the forward of a layer.

    Args:
        exportable: Its tables get the rows of the layer.
        name: Of the layer in the copy.
        layer: A linear map or a convolution.
        conv_module: Module whose batch normalization is folded into the layer, or None.
        original: Name of the layer in the model. It differs where several layers of the copy share a layer's weights.
    """
    linear, sums = isinstance(layer, nn.Linear), None
    bias = layer.full_bias()
    bias = None if bias is None else bias.detach().clone()
    if layer.weight_quantizer.mode == 'off':
        exportable.notes[name] = 'its weight quantizer is switched off'
        weight = layer.weight.detach()

        def read(x: Tensor) -> Tensor:
            return weight.t() if linear else weight
    else:
        integer = exportable.weights[name] = _integer_weight(original, name, layer)
        if _is_spread(layer):
            _rewrite_spread(exportable, name, layer, bias)
            return
        integer.bias = bias = bias if conv_module is None else _fold_norm(exportable, name, integer, bias, conv_module)
        if linear and _is_affine(layer.input_quantizer) and exportable.target == 'default':
            _centre(integer, layer.input_quantizer)
            layer.forward = _product_forward(exportable, name, layer)
            return
        sums = None if linear else _sums_apart(exportable, name, layer)
        read = _reader(exportable, name)
    multiply = _linear if linear else partial(_transposed if isinstance(layer, nn.ConvTranspose2d) else _conv, layer)

    # further ones: the output size of a transposed convolution, a mask of rows, which only calibration reads
    def forward(x: Tensor, *args, **kwargs) -> Tensor:
        x = layer.input_quantizer(x)
        out = multiply(x, read(x), bias, *args, **kwargs)
        if sums is not None:
            out = out + multiply(x, sums.ones(x), None, *args, **kwargs) * sums.factors
        return apply_edge(layer.output_quantizer, out)

    layer.forward = forward


def _linear(x: Tensor, weight: Tensor, bias: Optional[Tensor], valid: Optional[Tensor] = None) -> Tensor:
    # A product and a sum, not a Gemm: runtimes know the pattern for inputs of any number of dimensions.
    x = _matmul(x, weight)
    return x if bias is None else x + bias


def _conv(layer: nn.Module, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    return layer._conv_forward(x, weight, bias)


def _transposed(layer: nn.Module, x: Tensor, weight: Tensor, bias: Optional[Tensor], output_size=None) -> Tensor:
    padding = layer._output_padding(x, output_size, layer.stride, layer.padding, layer.kernel_size, 2, layer.dilation)
    return F.conv_transpose2d(x, weight, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation)


def _is_spread(layer: nn.Module) -> bool:
    """Whether a layer is a transposed convolution whose kernel covers each output position once, as in mask heads: its
    stride is its size.
    """
    return (
        isinstance(layer, nn.ConvTranspose2d)
        and layer.kernel_size == layer.stride
        and len(set(layer.stride)) == 1
        and layer.groups == 1
        and set(layer.padding) | set(layer.output_padding) == {0}
        and layer.dilation == (1, 1)
    )


def spread_out(codes: Tensor) -> Tensor:
    """The kernel (in, out, k, k) of a transposed convolution of stride k as that of a 1 x 1 convolution, (out * k * k,
    in, 1, 1). A shuffle of channels to positions (``pixel_shuffle``) follows.
    """
    return codes.permute(1, 2, 3, 0).reshape(-1, codes.shape[0], 1, 1)


def _rewrite_spread(exportable: ExportableModel, name: str, layer: nn.Module, bias: Optional[Tensor]) -> None:
    """Replace the forward of a transposed convolution that :func:`_is_spread` by that of a 1 x 1 convolution and a
    shuffle: the same codes and scales. No runtime has an integer kernel for the transposed one.
    """
    weight, side = exportable.weights[name], layer.stride[0]

    def repeated(channels: Tensor) -> Tensor:
        return channels.repeat_interleave(side * side)

    weight.codes, weight.axis, weight.arrange = spread_out(weight.codes).contiguous(), 0, spread_out
    weight.scale, weight.zero_point = repeated(weight.scale), repeated(weight.zero_point)
    weight.low = repeated(weight.low) if isinstance(weight.low, Tensor) else weight.low
    weight.bias = None if bias is None else repeated(bias)
    sums, read = _sums_apart(exportable, name, layer), _reader(exportable, name)

    def unshuffled(x: Tensor) -> Tensor:
        x = layer.input_quantizer(x)
        out = F.conv2d(x, read(x), weight.bias)
        return out if sums is None else out + F.conv2d(x, sums.ones(x)) * sums.factors

    exportable.unshuffled[name] = unshuffled
    # The size of its output cannot be chosen: there is one.
    layer.forward = lambda x, output_size=None: apply_edge(layer.output_quantizer, F.pixel_shuffle(unshuffled(x), side))


def _product_forward(exportable: ExportableModel, name: str, layer: nn.Module) -> TensorFunction:
    """Forward of a linear map whose input is quantized: the product of codes, see :attr:`ExportableModel.products`."""
    quantizer, product = exportable.names[layer.input_quantizer], _add_product(exportable, name)

    def forward(x: Tensor, valid: Optional[Tensor] = None) -> Tensor:  # the mask is for calibration
        codes = symbols.codes(x, quantizer, torch.uint8)
        return apply_edge(layer.output_quantizer, product(symbols.values(codes, quantizer, centred=True)))

    return forward


def _add_product(exportable: ExportableModel, name: str) -> TensorFunction:
    """Add the product with the weight ``name`` to :attr:`ExportableModel.products`."""
    read, sums, bias = _reader(exportable, name), _sums_apart(exportable, name), exportable.weights[name].bias

    def product(x: Tensor) -> Tensor:
        out = _matmul(x, read(x))
        if sums is not None:
            out = out + _matmul(x, sums.ones(x)) * sums.factors
        return out if bias is None else out + bias

    exportable.products[name] = product
    return product


def _reader(exportable: ExportableModel, name: str) -> TensorFunction:
    """Function that gives the dequantized weight ``name`` to be multiplied with its argument."""
    shape = tuple(exportable.weights[name].codes.shape)  # read now, while nothing is traced
    return lambda x: symbols.weight(x, name, shape)


def _integer_weight(original: str, name: str, layer: nn.Module) -> IntegerWeight:
    quantizer, axis = layer.weight_quantizer, layer.output_axis
    _require_range(f'{name}.weight_quantizer', quantizer)
    codes = quantize(layer.weight.detach(), quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax, axis)
    zero_point, low = quantizer.zero_point, quantizer.qmin
    if quantizer.qmin == 0 and quantizer.bits < 8 and not quantizer.reduced_range:
        # Asymmetric codes of less than 8 bits are signed ones of a byte with their zero point taken from them: no
        # runtime multiplies with weights that have zero points.
        codes = codes - along(zero_point, codes, axis)
        zero_point, low = torch.zeros_like(zero_point), -zero_point
    elif quantizer.qmin == 0:  # counted from the middle
        middle = 2 ** (quantizer.bits - 1)
        codes, zero_point, low = codes - middle, zero_point - middle, -middle
    if isinstance(layer, nn.Linear):
        codes, axis = codes.t().contiguous(), 1
    scale, zero_point = quantizer.scale.detach().clone(), zero_point.to(torch.int8)
    return IntegerWeight(codes.to(torch.int8), scale, zero_point, axis, quantizer.bits, low, layer=original)


class _Sums(NamedTuple):
    """What the zero points of a weight add to a product: ``factors`` times the product with ones."""

    ones: TensorFunction
    factors: Tensor


def _sums_apart(exportable: ExportableModel, name: str, layer: Optional[nn.Module] = None) -> Optional[_Sums]:
    """Take the zero points of a weight out of its product, in place.

    Args:
        exportable: Its weights get one of ones.
        name: Of the weight.
        layer: A convolution; None for a linear map.

    Returns:
        What is to be added to the product; None where there are no zero points, or the convolution has groups, which
        have a sum each.
    """
    weight = exportable.weights[name]
    if not bool(weight.zero_point.any()) or getattr(layer, 'groups', 1) > 1:
        return None
    weight.apart = True
    shape = list(weight.codes.shape)
    shape[weight.axis] = 1
    # one for all layers of this shape: of two that read one tensor, a runtime sums it once
    label = f'ones.{"x".join(map(str, shape))}'
    ones, zero = torch.ones(shape, dtype=torch.int8), torch.zeros(1, dtype=torch.int8)
    exportable.weights.setdefault(label, IntegerWeight(ones, torch.ones(1), zero, weight.axis, 8, -128))
    factors = (-weight.scale.double() * weight.zero_point).float()
    return _Sums(_reader(exportable, label), factors if layer is None else factors[:, None, None])


def _is_affine(quantizer: Optional[Quantizer]) -> bool:
    return isinstance(quantizer, AffineQuantizer) and quantizer.mode != 'off'


def _centre(weight: IntegerWeight, inputs: Quantizer) -> None:
    """Move the zero point of a linear map's input into its bias, in place: the product is of the codes as they are, and
    nothing is subtracted from it for each channel afterwards.
    """
    sums = (weight.codes.long() - weight.zero_point.long()).sum(0).double()
    moved = -int(inputs.zero_point) * inputs.scale.double() * weight.scale.double() * sums
    weight.bias = (moved if weight.bias is None else weight.bias.double() + moved).float()


# ---------------------------------------------------------------------- window attention
def _rewrite_attentions(
    exportable: ExportableModel, modules: Mapping[str, nn.Module]
) -> Dict[str, windows.AttentionExport]:
    """Replace the forwards of window attentions and of the modules that shift them; what the forwards are bound to, by
    the name of the attention.
    """
    rows = {}
    for name, module in modules.items():
        if isinstance(module, WindowAttentionMixin):
            integer = exportable.target == 'default' and _has_integer_products(module)
            operands = _split_projection(exportable, name, module) if integer else None
            bias = module.position_bias()
            if bias is not None:
                exportable.positions[name] = module.position_values(bias.table.detach()).contiguous(), bias.index
            rows[name] = windows.AttentionExport(
                name,
                exportable.tracing,
                exportable.products,
                operands,
                bias is not None,
                _vanishing(module),
            )
            module.forward = partial(windows.window_attention, module, rows[name])
    for module in modules.values():
        if isinstance(module, CutMixin):
            attention = module.window_attention()
            row = rows[exportable.names[attention]]
            setattr(module, module.cut_method, partial(windows.cut_attention, module, attention, row))
    return rows


def _vanishing(attention: nn.Module) -> Tuple[bool, bool]:
    """See :attr:`.windows.AttentionExport.vanishing`."""
    if attention.query_factor is not None:
        return False, False
    layer = attention.qkv
    bias = layer.full_bias() if is_quantized_layer(layer) else layer.bias
    if bias is None:
        return True, True
    queries, keys, _ = bias.chunk(3)
    return not bool(queries.any()), not bool(keys.any())


def _has_integer_products(attention: nn.Module) -> bool:
    """Whether every product of a window attention is of codes, and nothing between them is quantized that is no operand
    of one.
    """
    qk, av = attention.matmul_qk, attention.matmul_av
    layers = attention.qkv, attention.proj
    edges = (
        attention.scores_quantizer,
        qk.output_quantizer,
        av.output_quantizer,
        *(getattr(layer, 'output_quantizer', None) for layer in layers),
    )
    if any(edge is not None for edge in edges) or not all(
        is_quantized_layer(layer) and layer.weight_quantizer.mode != 'off' for layer in layers
    ):
        return False
    operands = [layer.input_quantizer for layer in layers] + [qk.lhs_quantizer, qk.rhs_quantizer, av.rhs_quantizer]
    return all(map(_is_affine, operands))


def _split_projection(exportable: ExportableModel, name: str, attention: nn.Module) -> Dict[str, windows.Operand]:
    """Split ``qkv`` of the attention ``name`` into three products, for queries, keys and values. Each is quantized by
    itself, and a factor of the queries is part of the weight of the first.

    Returns:
        Operands of the attention's products, see :class:`.windows.AttentionExport`.
    """
    layer, qkv = attention.qkv, f'{name}.qkv'
    weight, bias, width = _integer_weight(qkv, qkv, layer), layer.full_bias(), layer.out_features // 3
    for i, (part, factor) in enumerate(dict(q=attention.query_factor or 1.0, k=1.0, v=1.0).items()):
        rows = slice(i * width, (i + 1) * width)
        exportable.weights[f'{qkv}.{part}'] = IntegerWeight(
            weight.codes[:, rows].contiguous(),
            (weight.scale[rows].double() * factor).float(),
            weight.zero_point[rows],
            1,
            weight.bits,
            weight.low[rows] if isinstance(weight.low, Tensor) else weight.low,
            None if bias is None else (bias.detach()[rows].double() * factor).float(),
            qkv,
            (rows.start, rows.stop),
        )
        _centre(exportable.weights[f'{qkv}.{part}'], layer.input_quantizer)
        _add_product(exportable, f'{qkv}.{part}')
    queries, keys, values = (
        attention.matmul_qk.lhs_quantizer,
        attention.matmul_qk.rhs_quantizer,
        attention.matmul_av.rhs_quantizer,
    )
    offset = int(queries.zero_point) - _signed(queries)
    if offset:
        _add_key_sums(exportable, f'{name}.key_sums', attention.num_heads, width, offset, queries.scale)
    # The zero point of values is no constant of anything: where int8 codes cannot have it at 0, their product stays
    # float.
    value_shift = _signed(values) if _signed(values) == int(values.zero_point) else None
    operands = dict(
        tokens=(layer.input_quantizer, None),
        q=(queries, _signed(queries)),
        k=(keys, _signed(keys)),
        v=(values, value_shift),
        out=(attention.proj.input_quantizer, None),
    )
    return {part: windows.Operand(exportable.names[quantizer], shift) for part, (quantizer, shift) in operands.items()}


def _add_key_sums(exportable: ExportableModel, name: str, heads: int, width: int, offset: int, scale: Tensor) -> None:
    """Add the product of keys with ones that corrects the scores for the zero point ``offset`` of the queries."""
    ones = torch.eye(heads, dtype=torch.int8).repeat_interleave(width // heads, 0)
    exportable.weights[name] = IntegerWeight(
        ones if offset < 0 else -ones,
        (abs(offset) * scale * torch.ones(heads)).float(),
        torch.zeros(heads, dtype=torch.int8),
        1,
        4,
        -8,
    )
    _add_product(exportable, name)


def _signed(quantizer: Quantizer) -> int:
    """What to subtract from codes for them to be signed. Where they are signed already, or have less than 8 bits, it is
    their zero point, which is 0 afterwards.
    """
    return int(quantizer.zero_point) if quantizer.bits < 8 or quantizer.qmin < 0 else 128


# ---------------------------------------------------------------------- batch normalization
def _separate_convolutions(model: nn.Module) -> Dict[str, str]:
    """Give each ConvModule a convolution for itself, in place. Weights and quantizers stay shared.

    A head may call one convolution for all levels and normalize each level by itself (RTMDet), and what is folded into
    a convolution belongs to one ConvModule only.

    Returns:
        By the name of each copy, the convolution's name in the model.
    """
    names = {id(module): name for name, module in model.named_modules()}
    parents: Dict[int, int] = {}
    for module in model.modules():
        for child in module._modules.values():
            parents[id(child)] = parents.get(id(child), 0) + 1
    originals = {}
    for name, module in list(model.named_modules()):
        if (
            class_named(module, _CONV_MODULE)
            and parents.get(id(module.conv), 0) > 1
            and is_quantized_layer(module.conv)
        ):
            originals[f'{name}.conv' if name else 'conv'] = names[id(module.conv)]
            module.conv = copy.copy(module.conv)
    return originals


def _folds(module: nn.Module) -> bool:
    """Whether a ConvModule is a quantized convolution with a batch normalization straight after it."""
    order = tuple(module.order)
    return (
        module.with_norm
        and is_quantized_layer(module.conv)
        and isinstance(module.conv, nn.Conv2d)
        and isinstance(module.norm, nn.modules.batchnorm._BatchNorm)
        and module.norm.track_running_stats
        and order.index('norm') == order.index('conv') + 1
    )


def _fold_norm(
    exportable: ExportableModel, name: str, weight: IntegerWeight, bias: Optional[Tensor], module: nn.Module
) -> Optional[Tensor]:
    """Fold the normalization of a ConvModule into an integer weight, in place.

    A channel with a negative gain changes the sign of its codes, as a scale is positive. Where that is not possible,
    the gain is 0 or a code has no negative, the normalization stays.

    Returns:
        The new bias.
    """
    norm = module.norm
    gain = (norm.weight.double() if norm.affine else 1.0) / torch.sqrt(norm.running_var.double() + norm.eps)
    gain = gain.expand(norm.num_features)
    flip = gain < 0
    codes = weight.codes.to(torch.int16)
    center = 2 * weight.zero_point.to(torch.int16)
    flipped = torch.where(flip[:, None, None, None], center[:, None, None, None] - codes, codes)
    low = weight.low
    if isinstance(low, Tensor):  # each channel has a least code: there a changed sign changes both ends
        low = torch.where(flip, -(low + 2**weight.bits - 1), low)[:, None, None, None]
    high = low + 2**weight.bits - 1
    scale = (weight.scale.double() * gain.abs()).float()
    if bool(((flipped < low) | (flipped > high)).any()) or not bool((scale > 0).all()):
        exportable.notes[name] = 'its batch normalization is not folded (a gain is 0, or a code has no negative)'
        return bias
    shift = -norm.running_mean.double() + (0.0 if bias is None else bias.double())
    new_bias = shift * gain + (norm.bias.double() if norm.affine else 0.0)
    weight.codes, weight.scale = flipped.to(weight.codes.dtype), scale
    weight.low = low.flatten() if isinstance(low, Tensor) else low
    setattr(module, module.norm_name, nn.Identity())
    return new_bias.float()


# ---------------------------------------------------------------------- patch merging
def _rewrite_merging(exportable: ExportableModel, name: str, module: nn.Module) -> None:
    sampler, padding = module.sampler, getattr(module, 'adap_padding', getattr(module, 'adaptive_padding', None))
    plain = (
        _pair(sampler.kernel_size) == _pair(sampler.stride) == (2, 2)
        and _pair(sampler.dilation) == (1, 1)
        and _pair(sampler.padding) == (0, 0)
        and padding is not None
        and padding.padding == 'corner'
        and is_quantized_layer(module.reduction)
        and (module.norm is None or isinstance(module.norm, nn.LayerNorm))
    )
    if not plain:
        return
    order = windows.patch_order(module.in_channels)
    norm_first = not getattr(module, 'use_post_norm', False)
    with torch.no_grad():
        if norm_first and module.norm is not None and module.norm.elementwise_affine:
            module.norm.weight.copy_(module.norm.weight[order])
            module.norm.bias.copy_(module.norm.bias[order])
        module.reduction.weight.copy_(module.reduction.weight[:, order])
    prefix = f'{name}.' if name else ''
    exportable.orders[f'{prefix}reduction.input_quantizer'] = order
    if norm_first:
        exportable.orders[f'{prefix}norm'] = order
    module.forward = partial(windows.merge_patches, module, exportable.tracing)


def _pair(value) -> Tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
