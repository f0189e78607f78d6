# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A copy of a quantized model that can be traced: quantizers and integer weights as symbols, and what does not export
rewritten.

What a forward computes stays the same; nothing here decides how it is written in ONNX (``lowering.py`` does).
"""

import copy
import types
from dataclasses import dataclass, field
from typing import Callable, Dict, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.deploy import symbols, windows
from psaq_mm.deploy.pooling import LinearPooling
from psaq_mm.errors import NotCalibratedError, UnsupportedModelError
from psaq_mm.models.adapters.match import class_named
from psaq_mm.models.adapters.swin import _PATCH_MERGING, QuantShiftWindowMSAMixin, QuantWindowMSAMixin
from psaq_mm.models.adapters.timm_swin import QuantTimmSwinBlockMixin
from psaq_mm.quantization import AffineQuantizer, LogQuantizer, Quantizer, is_quantized_layer, quantize, quantizers
from psaq_mm.quantization.primitives import along

__all__ = ['Codes', 'ExportableModel', 'IntegerWeight', 'make_exportable']

_CONV_MODULE = ('mmcv.cnn.bricks.conv_module.ConvModule',)


@dataclass
class Codes:
    """An activation quantizer.

    Attributes:
        scale, zero_point: Of all codes. Logarithmic: the greatest value, and 0.
        low, high: Least and greatest code.
        log_base: None, ``'log2'`` or ``'log_sqrt2'``.
        shift: What is taken from codes and zero point in the graph, where they are int8; None where they are uint8.
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
        axis: Of the output channels.
        bits: Width of a code.
        low: Least code, of all channels or (channels,) of each.
        bias: Float32 (channels,), or None: the layer's own, with what reparameterization and batch normalization moved
            into it.
        layer: Name of the layer it belongs to; None for a constant of the export's own.
        channels: Which of the layer's output channels it has, first and past the last; None for all.
        apart: The zero points are no part of the product: it is of codes as they are, and what the zero points add to
            it, the sum of the input times one number a channel, is added afterwards. No runtime has an integer kernel
            for a weight with zero points of its channels.
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


@dataclass
class ExportableModel:
    """What :func:`make_exportable` returns.

    Attributes:
        model: The copy.
        quantizers: :class:`Codes` by name.
        weights: :class:`IntegerWeight` by name.
        positions: By window attention, its relative position bias (heads, entries) and, for two tokens, which entry is
            theirs (N, N).
        orders: For a quantizer whose input has its last axis in another order than the model's, where each entry comes
            from.
        tracing: The trace that the model takes part in.
        notes: By layer name, why something is not what one would expect of it.
    """

    model: nn.Module
    quantizers: Dict[str, Codes] = field(default_factory=dict)
    weights: Dict[str, IntegerWeight] = field(default_factory=dict)
    positions: Dict[str, Tuple[Tensor, Tensor]] = field(default_factory=dict)
    orders: Dict[str, Tensor] = field(default_factory=dict)
    tracing: windows.Tracing = field(default_factory=windows.Tracing)
    notes: Dict[str, str] = field(default_factory=dict)


def make_exportable(model: nn.Module) -> ExportableModel:
    """Copy a calibrated, quantized model into a form that can be traced.

    Batch normalization that follows a convolution is folded into scale and bias of the *integer* weight: the codes stay
    those of the fake-quantized layer.

    Args:
        model: Quantized, in any mode; it is not changed.

    Raises:
        NotCalibratedError: A quantizer has no range.
        UnsupportedModelError: The model is not quantized.
    """
    made = ExportableModel(copy.deepcopy(model).cpu().float())
    made.model.eval()  # which gives nothing back in mmdet and mmseg
    if next(quantizers(made.model), None) is None:
        raise UnsupportedModelError(
            f'{type(model).__name__} is not quantized, so there is nothing integer to export: build it with '
            "model = dict(type='psaq_mm.Quantized', ...)"
        )
    for parameter in made.model.parameters():
        parameter.requires_grad_(False)
    names = _own_convolutions(made.model)
    modules = list(made.model.named_modules())
    for name, module in modules:  # first what moves weights around, then what reads them
        if class_named(module, _PATCH_MERGING):
            _rewrite_merging(made, name, module)
    folded = {id(m.conv): m for _, m in modules if class_named(m, _CONV_MODULE) and _folds(m)}
    attentions = {
        f'{name}.qkv': module
        for name, module in modules
        if isinstance(module, QuantWindowMSAMixin) and _has_integer_products(module)
    }
    for name, attention in attentions.items():
        _split_projection(made, name, dict(modules)[name], attention)
    for name, module in modules:
        if isinstance(module, Quantizer) and module.mode != 'off' and not name.endswith('weight_quantizer'):
            _rewrite_quantizer(made, name, module)
        elif is_quantized_layer(module) and name not in attentions:
            _rewrite_layer(made, name, module, folded.get(id(module)), names.get(name, name))
        elif isinstance(module, QuantShiftWindowMSAMixin):
            module.forward = types.MethodType(windows.shift_attention, module)
        elif isinstance(module, QuantWindowMSAMixin):
            made.positions[name] = (
                module.relative_position_bias_table.detach().t().contiguous(),
                module.relative_position_index,
            )
            module.export_name = name
            module.export, module.tracing = getattr(module, 'export', None), made.tracing
            module.forward = types.MethodType(windows.window_attention, module)
        elif isinstance(module, QuantTimmSwinBlockMixin):
            module._attn = types.MethodType(windows.timm_attention, module)
        elif isinstance(module, nn.LayerNorm):
            _tap_input(name, module)
    for _, module in modules:
        for key, child in list(module._modules.items()):  # named_children() leaves out a pooling's second name
            if type(child) is nn.AdaptiveAvgPool2d:
                setattr(module, key, LinearPooling(child.output_size, made.tracing))
    return made


def _rewrite_quantizer(made: ExportableModel, name: str, module: Quantizer) -> None:
    if not bool(module.calibrated):
        raise NotCalibratedError(
            f'Quantizer {name!r} has no range: calibrate the model or load a quantized checkpoint before the export.'
        )
    made.quantizers[name] = Codes(
        float(module.scale),
        int(module.zero_point),
        module.qmin,
        module.qmax,
        module.base if isinstance(module, LogQuantizer) else None,
        getattr(module, 'export_shift', None),
    )
    module.export_name = name
    module.forward = lambda x, valid=None: symbols.quantizer(x, name)


def _tap_input(name: str, norm: nn.LayerNorm) -> None:
    library = norm.forward
    norm.forward = lambda x: library(symbols.mark_tap(x, name))


# ---------------------------------------------------------------------- layers with weights
def _rewrite_layer(
    made: ExportableModel, name: str, layer: nn.Module, conv_module: Optional[nn.Module], original: str
) -> None:
    """``original`` is what the model calls the layer: another name than ``name`` for one of several that share its
    weights.
    """
    quantizer = layer.weight_quantizer
    linear = isinstance(layer, nn.Linear)
    bias = layer.full_bias() if linear else layer.bias
    bias = None if bias is None else bias.detach().clone()
    if quantizer.mode == 'off':
        made.notes[name] = 'its weight quantizer is switched off'
        weight = layer.weight.detach()
    else:
        _require_range(name, layer)
        integer = _integer_weight(original, layer)
        if conv_module is not None:
            bias = _fold_norm(made, name, integer, bias, conv_module)
        integer.bias = bias
        made.weights[name] = integer
        weight = None
    sums = None if weight is not None or linear else _sums_apart(made, name, layer)
    shape = None if weight is not None else tuple(made.weights[name].codes.shape)

    def read(x: Tensor) -> Tensor:
        return symbols.weight(x, name, shape) if weight is None else (weight.t() if linear else weight)

    def linear_forward(x: Tensor) -> Tensor:
        # A product and a sum, not a Gemm: runtimes know the pattern for inputs of any number of dimensions.
        x = layer.input_quantizer(x)
        x = torch.matmul(x, read(x))
        return layer._finish(x if bias is None else x + bias)

    def product_forward(x: Tensor) -> Tensor:
        name = layer.input_quantizer.export_name
        return layer._finish(
            layer.export_product(symbols.values(symbols.codes(x, name, torch.uint8), name, centred=True))
        )

    def conv_forward(x: Tensor) -> Tensor:
        x = layer.input_quantizer(x)
        found = layer._conv_forward(x, read(x), bias)
        return layer._finish(
            found if sums is None else found + layer._conv_forward(x, sums.ones(x), None) * sums.factors
        )

    def transposed_forward(x: Tensor, output_size=None) -> Tensor:
        padding = layer._output_padding(
            x, output_size, layer.stride, layer.padding, layer.kernel_size, 2, layer.dilation
        )
        x = layer.input_quantizer(x)
        settings = layer.stride, layer.padding, padding, layer.groups, layer.dilation
        found = F.conv_transpose2d(x, read(x), bias, *settings)
        return layer._finish(
            found if sums is None else found + F.conv_transpose2d(x, sums.ones(x), None, *settings) * sums.factors
        )

    if linear and weight is None and _is_affine(layer.input_quantizer):
        _centre(made.weights[name], layer.input_quantizer)
        layer.export_product, layer.forward = _product(made, name), product_forward
        return
    layer.forward = (
        linear_forward if linear else (transposed_forward if isinstance(layer, nn.ConvTranspose2d) else conv_forward)
    )


def _integer_weight(name: str, layer: nn.Module) -> IntegerWeight:
    quantizer, axis = layer.weight_quantizer, layer.output_axis
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
    return IntegerWeight(
        codes.to(torch.int8),
        quantizer.scale.detach().clone(),
        zero_point.to(torch.int8),
        axis,
        quantizer.bits,
        low,
        layer=name,
    )


class _Sums(NamedTuple):
    """What the zero points of a weight add to a product: ``factors`` times the product with ones."""

    ones: Callable[[Tensor], Tensor]
    factors: Tensor


def _sums_apart(made: ExportableModel, name: str, layer: Optional[nn.Module] = None) -> Optional[_Sums]:
    """Take the zero points of a weight out of its product, in place; None where there are none, or groups of channels
    have sums of their own.

    Args:
        layer: A convolution; None for a Linear.
    """
    weight = made.weights[name]
    if not bool(weight.zero_point.any()) or getattr(layer, 'groups', 1) > 1:
        return None
    weight.apart = True
    shape = list(weight.codes.shape)
    shape[weight.axis] = 1
    # one for all layers of this shape: of two that read one tensor, a runtime sums it once
    label = f'ones.{"x".join(map(str, shape))}'
    made.weights.setdefault(
        label,
        IntegerWeight(
            torch.ones(shape, dtype=torch.int8), torch.ones(1), torch.zeros(1, dtype=torch.int8), weight.axis, 8, -128
        ),
    )
    factors = (-weight.scale.double() * weight.zero_point).float()
    return _Sums(lambda x: symbols.weight(x, label, tuple(shape)), factors if layer is None else factors[:, None, None])


def _is_affine(quantizer: Optional[Quantizer]) -> bool:
    return isinstance(quantizer, AffineQuantizer) and quantizer.mode != 'off'


def _centre(weight: IntegerWeight, inputs: Quantizer) -> None:
    """Move the zero point of a Linear's input into its bias, in place: the product is of codes as they are, with
    nothing to be taken from it for each channel afterwards.
    """
    sums = (weight.codes.long() - weight.zero_point.long()).sum(0).double()
    moved = -int(inputs.zero_point) * inputs.scale.double() * weight.scale.double() * sums
    weight.bias = (moved if weight.bias is None else weight.bias.double() + moved).float()


def _require_range(name: str, layer: nn.Module) -> None:
    if not bool(layer.weight_quantizer.calibrated):
        raise NotCalibratedError(
            f'Quantizer {name + ".weight_quantizer"!r} has no range: calibrate the model or load a quantized '
            'checkpoint before the export.'
        )


# ---------------------------------------------------------------------- window attention
def _has_integer_products(attention: nn.Module) -> bool:
    """Whether every product of a window attention is of codes, and nothing between them is quantized that is not an
    operand.
    """
    qk, av = attention.matmul_qk, attention.matmul_av
    layers = attention.qkv, attention.proj
    edges = (
        attention.scores_quantizer,
        qk.output_quantizer,
        av.output_quantizer,
        *(getattr(l, 'output_quantizer', None) for l in layers),
    )
    if any(edge is not None for edge in edges) or not all(
        is_quantized_layer(l) and l.weight_quantizer.mode != 'off' for l in layers
    ):
        return False
    operands = [l.input_quantizer for l in layers] + [qk.lhs_quantizer, qk.rhs_quantizer, av.rhs_quantizer]
    return all(map(_is_affine, operands))


def _split_projection(made: ExportableModel, name: str, layer: nn.Module, attention: nn.Module) -> None:
    """Queries, keys and values as three products of ``qkv`` (``name``), each quantized as it comes, with the scale of
    the scores in the weight of the first.
    """
    _require_range(name, layer)
    whole, bias = _integer_weight(name, layer), layer.full_bias()
    width, products = layer.out_features // 3, {}
    for i, (part, factor) in enumerate(dict(q=float(attention.scale), k=1.0, v=1.0).items()):
        begin, end = i * width, (i + 1) * width
        rows = slice(begin, end)
        made.weights[f'{name}.{part}'] = IntegerWeight(
            whole.codes[:, rows].contiguous(),
            (whole.scale[rows].double() * factor).float(),
            whole.zero_point[rows],
            1,
            whole.bits,
            whole.low[rows] if isinstance(whole.low, Tensor) else whole.low,
            None if bias is None else (bias.detach()[rows].double() * factor).float(),
            name,
            (begin, end),
        )
        _centre(made.weights[f'{name}.{part}'], layer.input_quantizer)
        products[part] = _product(made, f'{name}.{part}')
    queries, keys, values = (
        attention.matmul_qk.lhs_quantizer,
        attention.matmul_qk.rhs_quantizer,
        attention.matmul_av.rhs_quantizer,
    )
    queries.export_shift, keys.export_shift = _signed(queries), _signed(keys)
    # The zero point of values is no constant of anything: where int8 codes cannot have it at 0, their product stays
    # float.
    values.export_shift = _signed(values) if _signed(values) == int(values.zero_point) else None
    offset, sums = int(queries.zero_point) - queries.export_shift, None
    if offset:
        heads, label = attention.num_heads, f'{name.rpartition(".")[0]}.key_sums'
        ones = torch.eye(heads, dtype=torch.int8).repeat_interleave(width // heads, 0)
        made.weights[label] = IntegerWeight(
            ones if offset < 0 else -ones,
            (abs(offset) * queries.scale * torch.ones(heads)).float(),
            torch.zeros(heads, dtype=torch.int8),
            1,
            4,
            -8,
        )
        sums = _product(made, label)
    attention.export = windows.IntegerAttention(products, sums)


def _product(made: ExportableModel, name: str) -> Callable[[Tensor], Tensor]:
    weight = made.weights[name]
    shape = tuple(weight.codes.shape)  # while nothing is traced
    sums = _sums_apart(made, name)

    def product(x: Tensor) -> Tensor:
        found = torch.matmul(x, symbols.weight(x, name, shape))
        if sums is not None:
            found = found + torch.matmul(x, sums.ones(x)) * sums.factors
        return found if weight.bias is None else found + weight.bias

    return product


def _signed(quantizer: Quantizer) -> int:
    """What to take from codes for them to be signed: where they are already, or have less than 8 bits, the zero point,
    which is 0 then.
    """
    return int(quantizer.zero_point) if quantizer.bits < 8 or quantizer.qmin < 0 else 128


# ---------------------------------------------------------------------- batch normalization
def _own_convolutions(model: nn.Module) -> Dict[str, str]:
    """Give each ConvModule a convolution of its own, in place, with the weights and quantizers that they share: a head
    may call one convolution for all levels and normalize each level by itself (RTMDet), and what is folded into it is
    one ConvModule's alone.

    Returns:
        By the name of each copy, the convolution's name in the model.
    """
    names = {id(module): name for name, module in model.named_modules()}
    parents: Dict[int, int] = {}
    for module in model.modules():
        for child in module._modules.values():
            parents[id(child)] = parents.get(id(child), 0) + 1
    found = {}
    for name, module in list(model.named_modules()):
        if (
            class_named(module, _CONV_MODULE)
            and parents.get(id(module.conv), 0) > 1
            and is_quantized_layer(module.conv)
        ):
            found[f'{name}.conv' if name else 'conv'] = names[id(module.conv)]
            module.conv = copy.copy(module.conv)
    return found


def _folds(module: nn.Module) -> bool:
    """Whether a ConvModule is a quantized convolution straight before a batch normalization."""
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
    made: ExportableModel, name: str, weight: IntegerWeight, bias: Optional[Tensor], module: nn.Module
) -> Optional[Tensor]:
    """Fold the normalization of a ConvModule into an integer weight, in place; the new bias.

    A channel with a negative gain changes the sign of its codes, as a scale is positive. Where that is not possible,
    the gain is 0 or a code has no negative, the normalization stays.
    """
    norm = module.norm
    gain = (norm.weight.double() if norm.affine else 1.0) / torch.sqrt(norm.running_var.double() + norm.eps)
    gain = gain.expand(norm.num_features)
    flip = gain < 0
    codes = weight.codes.to(torch.int16)
    center = 2 * weight.zero_point.to(torch.int16)
    flipped = torch.where(flip[:, None, None, None], center[:, None, None, None] - codes, codes)
    low = weight.low
    if isinstance(low, Tensor):  # of the channel's own: there a changed sign changes both ends
        low = torch.where(flip, -(low + 2**weight.bits - 1), low)[:, None, None, None]
    high = low + 2**weight.bits - 1
    scale = (weight.scale.double() * gain.abs()).float()
    if bool(((flipped < low) | (flipped > high)).any()) or not bool((scale > 0).all()):
        made.notes[name] = 'its batch normalization is not folded (a gain is 0, or a code has no negative)'
        return bias
    shift = -norm.running_mean.double() + (0.0 if bias is None else bias.double())
    new = shift * gain + (norm.bias.double() if norm.affine else 0.0)
    weight.codes, weight.scale = flipped.to(weight.codes.dtype), scale
    weight.low = low.flatten() if isinstance(low, Tensor) else low
    setattr(module, module.norm_name, nn.Identity())
    return new.float()


# ---------------------------------------------------------------------- patch merging
def _rewrite_merging(made: ExportableModel, name: str, module: nn.Module) -> None:
    sampler, padding = module.sampler, getattr(module, 'adap_padding', None)
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
    with torch.no_grad():
        if module.norm is not None and module.norm.elementwise_affine:
            module.norm.weight.copy_(module.norm.weight[order])
            module.norm.bias.copy_(module.norm.bias[order])
        module.reduction.weight.copy_(module.reduction.weight[:, order])
    prefix = f'{name}.' if name else ''
    made.orders[f'{prefix}reduction.input_quantizer'] = order
    made.orders[f'{prefix}norm'] = order
    module.tracing = made.tracing
    module.forward = types.MethodType(windows.merge_patches, module)


def _pair(value) -> Tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
