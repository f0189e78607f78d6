# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Reversible Vision Transformer of mmpretrain.

Attention reads one stream and adds to the other, the feed-forward network the other way round (Reversible Vision
Transformers, CVPR 2022, section 3.2). Both begin as the same tokens, so that one rotation turns both.
"""

from typing import Tuple

from torch import Tensor, nn

from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, is_identity, outputs_are_edges, standard_parts
from psaq_mm.models.adapters.match import class_named
from psaq_mm.models.adapters.streams import LINEAR_HEADS, NamedStreams, Stream, need, stream
from psaq_mm.models.adapters.vit import QuantMultiheadAttentionMixin
from psaq_mm.quantization import AdapterSpec, StreamReader, apply_edge

__all__ = ['QuantReversibleLayerMixin', 'ReversibleViT']

_EDGES = ('patch_embed.norm', 'drop_after_pos')


class QuantReversibleLayerMixin:
    """A layer whose two sums are edges.

    The library's draws new seeds for all random numbers of the process in each call, to compute it once more backwards.
    This one is computed once, and leaves the random numbers alone.
    """

    def forward(self, x1: Tensor, x2: Tensor) -> Tuple[Tensor, Tensor]:
        """The two streams (B, N, C) behind the layer."""
        y1 = apply_edge(self.residual1_quantizer, x1 + self._dropped(self.attn(self.ln1(x2))))
        return y1, apply_edge(self.residual2_quantizer, x2 + self._dropped(self.ffn(self.ln2(y1))))

    def _dropped(self, x: Tensor) -> Tensor:
        """Stochastic depth, in training alone: whole pictures keep the branch with the probability of the config."""
        probability = self.drop_path_cfg['drop_prob']
        if not self.training or not probability:
            return x
        keep = x.new_empty(len(x), 1, 1).bernoulli_(1 - probability)
        return x * keep / (1 - probability)


def _convert_network(net: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    net.no_custom_backward = True  # a quantized sum has no inverse
    return outputs_are_edges(*_EDGES)(net, name, spec)


@register_backbone
class ReversibleViT(Backbone):
    """RevVisionTransformer of mmpretrain."""

    names = ('mmpretrain.models.backbones.revvit.RevVisionTransformer',)
    block_path = r'layers\.\d+'
    blocks = {'mmpretrain.models.backbones.revvit.RevTransformerEncoderLayer': QuantReversibleLayerMixin}
    attention = {'mmpretrain.models.utils.attention.MultiheadAttention': QuantMultiheadAttentionMixin}
    others = dict.fromkeys(names, _convert_network)

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        return standard_parts(block.ln1, block.attn, block.ln2, block.ffn)

    def prefix_tokens(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.prefix_tokens`."""
        return net.num_extra_tokens

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [('both streams', lambda: self._stream(model, net))]

    def _stream(self, model: nn.Module, net: nn.Module) -> Stream:
        head = getattr(model, 'head', None)
        need(
            class_named(head, LINEAR_HEADS)
            and getattr(model, 'neck', None) is None
            and net.out_type in ('avg_featmap', 'cls_token')
            and net.final_norm
            and net.fusion_layer.mode == 'concat',
            'its tokens are read by more than a known head of both streams',
        )
        need(is_identity(net.patch_embed.norm), 'a LayerNorm before the first block')
        last = StreamReader(net.ln1, (head.fc,), tokens=2)
        tokens = [net.cls_token, net.pos_embed]
        return stream(net.patch_embed.projection, map(self.parts, net.layers), [last], tokens)
