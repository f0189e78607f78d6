# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Conformer of mmpretrain: the layers of a ViT beside a network of convolutions (arXiv 2105.03889, section 3).

Each block adds a map of the convolutions to the tokens, behind a 1 x 1 convolution, a pooling, a LayerNorm and an
activation, and the tokens to a map. The transformer layers are those of mmpretrain's ViT.
"""

from typing import Dict, Tuple

from torch import Tensor, nn

from psaq_mm.models.adapters.backbone import register_backbone
from psaq_mm.models.adapters.blocks import join, quantize_outputs
from psaq_mm.models.adapters.streams import NamedStreams, need
from psaq_mm.models.adapters.vit import VisionTransformer
from psaq_mm.quantization import AdapterSpec, ConvertFn, adopt, apply_edge, edge_quantizer, feeds_activation

__all__ = ['Conformer', 'QuantConvTransBlockMixin']

_MODULE = 'mmpretrain.models.backbones.conformer'


class QuantConvTransBlockMixin:
    """Convolutions and a transformer layer side by side; what the transformer layer reads is an edge."""

    def forward(self, cnn_input: Tensor, trans_input: Tensor) -> Tuple[Tensor, Tensor]:
        """A map (B, C, H, W) and tokens (B, N, D) to another pair."""
        x, inner = self.cnn_block(cnn_input, out_conv2=True)
        height, width = (side // self.down_stride for side in inner.shape[2:])
        tokens = apply_edge(self.tokens_quantizer, self.squeeze_block(inner, trans_input) + trans_input)
        tokens = self.trans_block(tokens)
        x = self.fusion_block(x, fusion_features=self.expand_block(tokens, height, width), out_conv2=False)
        return x, tokens


def _convert_pair(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    module = adopt(module, QuantConvTransBlockMixin)
    module.tokens_quantizer = edge_quantizer(spec, join(name, 'tokens'))
    return module


def _convert_convolutions(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    """Batch normalization behind every convolution is folded into it; the activation of the sum is an edge."""
    for layer in module.children():
        if isinstance(layer, nn.Conv2d):
            feeds_activation(layer)
    quantize_outputs(module, name, spec, ['act3'])
    return module


def _convert_network(net: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    feeds_activation(net.conv1)
    return net


@register_backbone
class Conformer(VisionTransformer):
    """Conformer of mmpretrain."""

    names = (f'{_MODULE}.Conformer',)
    block_path = r'trans_1|conv_trans_\d+\.trans_block'
    edges = ()
    others: Dict[str, ConvertFn] = {
        **dict.fromkeys(names, _convert_network),
        f'{_MODULE}.ConvTransBlock': _convert_pair,
        f'{_MODULE}.ConvBlock': _convert_convolutions,
        f'{_MODULE}.FCUUp': _convert_convolutions,
    }

    def prefix_tokens(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.prefix_tokens`."""
        return int(net.with_cls_token)

    def patch(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.patch`: the convolution and the pooling before have a stride of 2 each."""
        return 4 * net.trans_patch_conv.stride[0]

    def min_side(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.min_side`: one patch."""
        return self.patch(net)

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [('the stream', lambda: need(False, 'each block adds activations of a map to it'))]
