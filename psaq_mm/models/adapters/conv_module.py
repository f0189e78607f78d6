# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""mmcv's ConvModule: convolution, normalization and activation as one layer; the edge is the output of the last."""

from torch import nn

from psaq_mm.models.adapters.match import adapt
from psaq_mm.quantization import AdapterSpec, feeds_activation

_CONV_MODULE = ('mmcv.cnn.bricks.conv_module.ConvModule',)


def _convert(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    # Batch normalization is folded into the convolution at export, so no quantizer may be between the two.
    if module.with_norm or module.with_activation:
        feeds_activation(module.conv)
    return module


adapt(_CONV_MODULE, _convert)
