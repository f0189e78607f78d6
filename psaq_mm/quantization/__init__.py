"""Affine quantization with PyTorch alone: primitives -> observers -> quantizers -> layers -> conversion."""

from .convert import (ADAPTERS, Adapter, ConversionReport, FloatLayer, QuantizedLayer, calibrate, is_quantizer_key,
                      quantize_, quantizer_state_keys, quantizers, register_adapter, set_mode)
from .layers import (SAME_AS_CONV2D, SAME_AS_CONVTRANSPOSE2D, SAME_AS_LINEAR, QuantConv2d, QuantConvTranspose2d,
                     QuantLinear, QuantMatMul, adopt, is_quantized_layer)
from .observers import MinMaxObserver, MSEObserver, PercentileObserver, build_observer
from .primitives import choose_qparams, dequantize, fake_quantize, qrange, quantize
from .quantizers import AffineQuantizer
from .spec import LayerSpec, Override, QuantSpec

__all__ = [
    'ADAPTERS', 'Adapter', 'AffineQuantizer', 'ConversionReport', 'FloatLayer', 'LayerSpec', 'MSEObserver',
    'MinMaxObserver', 'Override', 'PercentileObserver', 'QuantConv2d', 'QuantConvTranspose2d', 'QuantLinear',
    'QuantMatMul', 'QuantSpec', 'QuantizedLayer', 'SAME_AS_CONV2D', 'SAME_AS_CONVTRANSPOSE2D', 'SAME_AS_LINEAR',
    'adopt', 'build_observer', 'calibrate', 'choose_qparams', 'dequantize', 'fake_quantize', 'is_quantized_layer',
    'is_quantizer_key', 'qrange', 'quantize', 'quantize_', 'quantizer_state_keys', 'quantizers', 'register_adapter',
    'set_mode'
]
