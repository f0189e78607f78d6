"""Quantization with PyTorch alone: primitives -> observers -> quantizers -> layers -> conversion, reparameterization."""

from .convert import (ADAPTERS, Adapter, ConversionReport, FloatLayer, QuantizedLayer, calibrate, is_quantizer_key,
                      quantize_, quantizer_state_keys, quantizers, register_adapter, set_mode)
from .importance import RowImportance, row_importance
from .layers import (SAME_AS_CONV2D, SAME_AS_CONVTRANSPOSE2D, SAME_AS_LINEAR, QuantConv2d, QuantConvTranspose2d,
                     QuantLinear, QuantMatMul, adopt, apply_edge, attention_products, edge_quantizer, feeds_activation,
                     full_precision_weights, hold_weights, is_quantized_layer, quantize_output_)
from .channel_observers import ChannelMinMaxObserver, ChannelMSEObserver, ChannelPercentileObserver, build_channel_observer
from .logarithmic import LogObserver, fake_log_quantize, log2_form, log_dequantize, log_quantize
from .observers import MinMaxObserver, MSEObserver, PercentileObserver, build_observer
from .precision import full_float32, use_full_float32
from .primitives import choose_qparams, dequantize, fake_quantize, qrange, quantize
from .quantizers import AffineQuantizer, LogQuantizer, Quantizer, in_mode
from .ranges import learn_ranges_, learned_ranges, update_ranges_
from .reparam import ReparameterizedQuantizer, norm_before, norm_feeds, reparameterize_
from .rotation import StreamReader, random_rotation, rotate_heads_, rotate_stream_
from .rounding import RoundedLayer, compensated_rounding, round_weights_
from .spec import RECIPES, LayerSpec, Override, QuantSpec

__all__ = [
    'ADAPTERS', 'Adapter', 'AffineQuantizer', 'ChannelMSEObserver', 'ChannelMinMaxObserver',
    'ChannelPercentileObserver', 'ConversionReport', 'FloatLayer', 'LayerSpec', 'LogObserver', 'LogQuantizer',
    'MSEObserver', 'MinMaxObserver', 'Override', 'PercentileObserver', 'QuantConv2d', 'QuantConvTranspose2d',
    'QuantLinear', 'QuantMatMul', 'QuantSpec', 'QuantizedLayer', 'Quantizer', 'RECIPES', 'ReparameterizedQuantizer',
    'RoundedLayer', 'RowImportance', 'StreamReader', 'SAME_AS_CONV2D', 'SAME_AS_CONVTRANSPOSE2D', 'SAME_AS_LINEAR', 'adopt', 'apply_edge',
    'attention_products', 'build_channel_observer', 'build_observer', 'calibrate', 'choose_qparams',
    'compensated_rounding', 'dequantize', 'edge_quantizer', 'fake_log_quantize', 'fake_quantize', 'feeds_activation', 'full_float32', 'full_precision_weights',
    'hold_weights', 'in_mode', 'is_quantized_layer', 'is_quantizer_key', 'learn_ranges_', 'learned_ranges', 'log2_form', 'log_dequantize',
    'log_quantize', 'norm_before', 'norm_feeds', 'qrange', 'quantize', 'quantize_', 'quantize_output_', 'quantizer_state_keys', 'quantizers',
    'random_rotation', 'register_adapter', 'reparameterize_', 'rotate_heads_', 'rotate_stream_', 'round_weights_', 'row_importance',
    'set_mode', 'update_ranges_', 'use_full_float32'
]
