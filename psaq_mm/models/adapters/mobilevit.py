# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""MobileViT of mmpretrain: layers of a ViT between the convolutions of a MobileNetV2.

A MobileViT block (arXiv 2110.02178, section 3.1) lays a map out as tokens (B * pixels of a patch, patches, C): the
pixels at the same place of every patch attend to each other. Its transformer layers are those of mmpretrain's ViT, and
the norm behind them feeds one 1 x 1 convolution.
"""

import math
from typing import Dict, Iterator, Tuple

from torch import nn

from psaq_mm.models.adapters.backbone import register_backbone
from psaq_mm.models.adapters.blocks import mark_norm
from psaq_mm.models.adapters.match import class_named
from psaq_mm.models.adapters.streams import NamedStreams, Stream, stream
from psaq_mm.models.adapters.vit import VisionTransformer
from psaq_mm.quantization import AdapterSpec, ConvertFn, StreamReader, quantize_output_

__all__ = ['MobileViT']

_MODULE = 'mmpretrain.models.backbones.mobilevit'
_LAYER = f'{_MODULE}.MobileVitBlock'


def _convert_layer(layer: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    mark_norm(layer.global_rep[-1], layer.conv_proj.conv)
    return layer


@register_backbone
class MobileViT(VisionTransformer):
    """MobileViT of mmpretrain."""

    names = (f'{_MODULE}.MobileViT',)
    block_path = r'layers\.\d+\.\d+\.global_rep\.\d+'
    edges = ()
    others: Dict[str, ConvertFn] = {
        _LAYER: _convert_layer,
        # What its convolutions give, with or without a sum: batch normalization comes last.
        'mmpretrain.models.backbones.mobilenet_v2.InvertedResidual': quantize_output_,
    }

    def block_list(self, net: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
        """See :meth:`.Backbone.block_list`: without the norms, the last entries of the lists."""
        return ((name, part) for name, part in super().block_list(net) if not isinstance(part, nn.LayerNorm))

    def prefix_tokens(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.prefix_tokens`."""
        return 0

    def min_side(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.min_side`: one position of the last map, which is resized to a whole patch."""
        return self.patch(net) * math.prod(layer[0].stride for layer in net.layers)

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`: one in each MobileViT block, between two 1 x 1 convolutions."""
        layers = [part for part in net.modules() if class_named(part, (_LAYER,))]
        return [
            (f'the stream of MobileViT block {i + 1}', lambda layer=layer: self._stream_of(layer))
            for i, layer in enumerate(layers)
        ]

    def _stream_of(self, layer: nn.Module) -> Stream:
        *blocks, norm = layer.global_rep
        reader = StreamReader(norm, (layer.conv_proj.conv,))
        return stream(layer.local_rep[1].conv, map(self.parts, blocks), [reader])
