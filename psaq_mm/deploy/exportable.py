# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A copy of a quantized model that can be traced: quantizers and integer weights as symbols, and what does not export rewritten.

What a forward computes stays the same; nothing here decides how it is written in ONNX (``lowering.py`` does).
"""
import copy
import types
from dataclasses import dataclass, field
from typing import Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.errors import NotCalibratedError, UnsupportedModelError
from psaq_mm.models.adapters.match import class_named
from psaq_mm.models.adapters.swin import (_PATCH_MERGING, QuantShiftWindowMSAMixin, QuantWindowMSAMixin)
from psaq_mm.models.adapters.timm_swin import QuantTimmSwinBlockMixin
from psaq_mm.quantization import LogQuantizer, Quantizer, is_quantized_layer, quantize, quantizers

from . import symbols, windows
from .pooling import LinearPooling

__all__ = ['Codes', 'ExportableModel', 'IntegerWeight', 'make_exportable']

_CONV_MODULE = ('mmcv.cnn.bricks.conv_module.ConvModule', )


@dataclass
class Codes:
    """An activation quantizer.

    Attributes:
        scale, zero_point: Of all codes. Logarithmic: the greatest value, and 0.
        low, high: Least and greatest code.
        log_base: None, ``'log2'`` or ``'log_sqrt2'``.
    """
    scale: float
    zero_point: int
    low: int
    high: int
    log_base: Optional[str] = None


@dataclass
class IntegerWeight:
    """A weight as integers.

    Attributes:
        codes: int8, or uint8 for asymmetric codes; in the layout that the graph multiplies with.
        scale: float32 (channels,).
        zero_point: Of the dtype of the codes, (channels,).
        axis: Of the output channels.
        bits: Width of a code.
        low: Least code.
        bias: Float32 (channels,), or None: the layer's own, with what reparameterization and batch normalization moved into it.
    """
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int
    bits: int
    low: int
    bias: Optional[Tensor] = None


@dataclass
class ExportableModel:
    """What :func:`make_exportable` returns.

    Attributes:
        model: The copy.
        quantizers: :class:`Codes` by name.
        weights: :class:`IntegerWeight` by name.
        positions: By window attention, its relative position bias (heads, entries) and, for two tokens, which entry is theirs (N, N).
        orders: For a quantizer whose input has its last axis in another order than the model's, where each entry comes from.
        notes: By layer name, why something is not what one would expect of it.
    """
    model: nn.Module
    quantizers: Dict[str, Codes] = field(default_factory=dict)
    weights: Dict[str, IntegerWeight] = field(default_factory=dict)
    positions: Dict[str, Tuple[Tensor, Tensor]] = field(default_factory=dict)
    orders: Dict[str, Tensor] = field(default_factory=dict)
    notes: Dict[str, str] = field(default_factory=dict)


def make_exportable(model: nn.Module) -> ExportableModel:
    """Copy a calibrated, quantized model into a form that can be traced.

    Batch normalization that follows a convolution is folded into scale and bias of the *integer* weight: the codes stay those of
    the fake-quantized layer.

    Args:
        model: Quantized, in any mode; it is not changed.

    Raises:
        NotCalibratedError: A quantizer has no range.
        UnsupportedModelError: The model is not quantized.
    """
    made = ExportableModel(copy.deepcopy(model).cpu().float())
    made.model.eval()  # which gives nothing back in mmdet and mmseg
    if next(quantizers(made.model), None) is None:
        raise UnsupportedModelError(f'{type(model).__name__} is not quantized, so there is nothing integer to export: build it with '
                                    'model = dict(type=\'psaq_mm.Quantized\', ...)')
    for parameter in made.model.parameters():
        parameter.requires_grad_(False)
    modules = list(made.model.named_modules())
    for name, module in modules:  # first what moves weights around, then what reads them
        if class_named(module, _PATCH_MERGING):
            _rewrite_merging(made, name, module)
    folded = {id(m.conv): m for _, m in modules if class_named(m, _CONV_MODULE) and _folds(m)}
    for name, module in modules:
        if isinstance(module, Quantizer) and module.mode != 'off' and not name.endswith('weight_quantizer'):
            _rewrite_quantizer(made, name, module)
        elif is_quantized_layer(module):
            _rewrite_layer(made, name, module, folded.get(id(module)))
        elif isinstance(module, QuantShiftWindowMSAMixin):
            module.forward = types.MethodType(windows.shift_attention, module)
        elif isinstance(module, QuantWindowMSAMixin):
            made.positions[name] = module.relative_position_bias_table.detach().t().contiguous(), module.relative_position_index
            module.export_name = name
            module.forward = types.MethodType(windows.window_attention, module)
        elif isinstance(module, QuantTimmSwinBlockMixin):
            module._attn = types.MethodType(windows.timm_attention, module)
        elif isinstance(module, nn.LayerNorm):
            _tap_input(name, module)
    for _, module in modules:
        for key, child in list(module.named_children()):
            if type(child) is nn.AdaptiveAvgPool2d:
                setattr(module, key, LinearPooling(child.output_size))
    return made


def _rewrite_quantizer(made: ExportableModel, name: str, module: Quantizer) -> None:
    if not bool(module.calibrated):
        raise NotCalibratedError(f'Quantizer {name!r} has no range: calibrate the model or load a quantized checkpoint before the export.')
    made.quantizers[name] = Codes(
        float(module.scale), int(module.zero_point), module.qmin, module.qmax, module.base if isinstance(module, LogQuantizer) else None)
    module.forward = lambda x, valid=None: symbols.quantizer(x, name)


def _tap_input(name: str, norm: nn.LayerNorm) -> None:
    library = norm.forward
    norm.forward = lambda x: library(symbols.mark_tap(x, name))


# ---------------------------------------------------------------------- layers with weights
def _rewrite_layer(made: ExportableModel, name: str, layer: nn.Module, conv_module: Optional[nn.Module]) -> None:
    quantizer = layer.weight_quantizer
    linear = isinstance(layer, nn.Linear)
    bias = layer.full_bias() if linear else layer.bias
    bias = None if bias is None else bias.detach().clone()
    if quantizer.mode == 'off':
        made.notes[name] = 'its weight quantizer is switched off'
        weight = layer.weight.detach()
    else:
        if not bool(quantizer.calibrated):
            raise NotCalibratedError(f'Quantizer {name + ".weight_quantizer"!r} has no range: calibrate the model or load a quantized '
                                     'checkpoint before the export.')
        integer = _integer_weight(name, layer)
        if conv_module is not None:
            bias = _fold_norm(made, name, integer, bias, conv_module)
        integer.bias = bias
        made.weights[name] = integer
        weight = None
    shape = None if weight is not None else tuple(made.weights[name].codes.shape)

    def read(x: Tensor) -> Tensor:
        return symbols.weight(x, name, shape) if weight is None else (weight.t() if linear else weight)

    def linear_forward(x: Tensor) -> Tensor:
        # A product and a sum, not a Gemm: runtimes know the pattern for inputs of any number of dimensions.
        x = layer.input_quantizer(x)
        x = torch.matmul(x, read(x))
        return layer._finish(x if bias is None else x + bias)

    def conv_forward(x: Tensor) -> Tensor:
        x = layer.input_quantizer(x)
        return layer._finish(layer._conv_forward(x, read(x), bias))

    def transposed_forward(x: Tensor, output_size=None) -> Tensor:
        padding = layer._output_padding(x, output_size, layer.stride, layer.padding, layer.kernel_size, 2, layer.dilation)
        x = layer.input_quantizer(x)
        return layer._finish(
            F.conv_transpose2d(x, read(x), bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation))

    layer.forward = linear_forward if linear else (transposed_forward if isinstance(layer, nn.ConvTranspose2d) else conv_forward)


def _integer_weight(name: str, layer: nn.Module) -> IntegerWeight:
    quantizer, axis = layer.weight_quantizer, layer.output_axis
    codes = quantize(layer.weight.detach(), quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax, axis)
    dtype = torch.int8 if quantizer.qmin < 0 else torch.uint8
    if isinstance(layer, nn.Linear):
        codes, axis = codes.t().contiguous(), 1
    return IntegerWeight(codes.to(dtype), quantizer.scale.detach().clone(), quantizer.zero_point.to(dtype), axis, quantizer.bits,
                         quantizer.qmin)


# ---------------------------------------------------------------------- batch normalization
def _folds(module: nn.Module) -> bool:
    """Whether a ConvModule is a quantized convolution straight before a batch normalization."""
    order = tuple(module.order)
    return (module.with_norm and is_quantized_layer(module.conv) and isinstance(module.conv, nn.Conv2d)
            and isinstance(module.norm, nn.modules.batchnorm._BatchNorm) and module.norm.track_running_stats
            and order.index('norm') == order.index('conv') + 1)


def _fold_norm(made: ExportableModel, name: str, weight: IntegerWeight, bias: Optional[Tensor], module: nn.Module) -> Optional[Tensor]:
    """Fold the normalization of a ConvModule into an integer weight, in place; the new bias.

    A channel with a negative gain changes the sign of its codes, as a scale is positive. Where that is not possible, the gain is
    0 or a code has no negative, the normalization stays.
    """
    norm = module.norm
    gain = (norm.weight.double() if norm.affine else 1.) / torch.sqrt(norm.running_var.double() + norm.eps)
    gain = gain.expand(norm.num_features)
    flip = gain < 0
    codes = weight.codes.to(torch.int16)
    center = 2 * weight.zero_point.to(torch.int16)
    flipped = torch.where(flip[:, None, None, None], center[:, None, None, None] - codes, codes)
    high = weight.low + 2**weight.bits - 1
    scale = (weight.scale.double() * gain.abs()).float()
    if bool(((flipped < weight.low) | (flipped > high)).any()) or not bool((scale > 0).all()):
        made.notes[name] = 'its batch normalization is not folded (a gain is 0, or a code has no negative)'
        return bias
    shift = -norm.running_mean.double() + (0. if bias is None else bias.double())
    new = shift * gain + (norm.bias.double() if norm.affine else 0.)
    weight.codes, weight.scale = flipped.to(weight.codes.dtype), scale
    setattr(module, module.norm_name, nn.Identity())
    return new.float()


# ---------------------------------------------------------------------- patch merging
def _rewrite_merging(made: ExportableModel, name: str, module: nn.Module) -> None:
    sampler, padding = module.sampler, getattr(module, 'adap_padding', None)
    plain = (_pair(sampler.kernel_size) == _pair(sampler.stride) == (2, 2) and _pair(sampler.dilation) == (1, 1)
             and _pair(sampler.padding) == (0, 0) and padding is not None and padding.padding == 'corner'
             and is_quantized_layer(module.reduction) and (module.norm is None or isinstance(module.norm, nn.LayerNorm)))
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
    module.forward = types.MethodType(windows.merge_patches, module)


def _pair(value) -> Tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
