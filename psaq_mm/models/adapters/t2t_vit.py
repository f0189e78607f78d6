# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""T2T-ViT of mmpretrain: a Vision Transformer whose tokens are made by attention as well.

Its tokens-to-token module unfolds overlapping patches and attends over them twice, with a shortcut of the values in
place of the residual sum (T2T-ViT, arXiv 2101.11986, section 3.1). These tokens are finer than patches and many: 3136
at 224 pixels. Patch similarity is measured in the encoder alone.
"""

from torch import Tensor, nn

from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, Feed, standard_parts
from psaq_mm.models.adapters.match import class_named
from psaq_mm.models.adapters.streams import NamedStreams, Stream, need, stream
from psaq_mm.models.adapters.vit import CLASS_TOKEN_HEADS, QuantMultiheadAttentionMixin
from psaq_mm.quantization import AdapterSpec, StreamReader, adopt, apply_edge

__all__ = ['QuantT2TLayerMixin', 'T2TViT']


class QuantT2TLayerMixin:
    """A transformer layer whose two residual sums are edges; with ``v_shortcut`` the first one is the attention's."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, input_dims) to (B, N, embed_dims)."""
        attended = self.attn(self.ln1(x))
        x = apply_edge(self.residual1_quantizer, attended if self.v_shortcut else x + attended)
        return apply_edge(self.residual2_quantizer, self.ffn(self.ln2(x), identity=x))


class _FineAttentionMixin:
    """Attention over tokens that are no patches: it has no part in patch similarity."""

    def attention_parts(self) -> None:
        """See :func:`psaq_mm.quantization.attention_parts`."""
        return None


@register_backbone
class T2TViT(Backbone):
    """T2T_ViT of mmpretrain."""

    names = ('mmpretrain.models.backbones.t2t_vit.T2T_ViT',)
    block_path = r'encoder\.\d+|tokens_to_token\.attention\d'
    blocks = {'mmpretrain.models.backbones.t2t_vit.T2TTransformerLayer': QuantT2TLayerMixin}
    attention = {'mmpretrain.models.utils.attention.MultiheadAttention': QuantMultiheadAttentionMixin}
    edges = ('drop_after_pos',)

    def convert_block(self, block: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_block`."""
        if block.v_shortcut:
            block.attn = adopt(block.attn, _FineAttentionMixin)
        return super().convert_block(block, name, spec)

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`. A layer with a shortcut of the values begins a stream of another width."""
        if not block.v_shortcut:
            return standard_parts(block.ln1, block.attn, block.ln2, block.ffn)
        hidden = block.ffn.layers[0][0]
        return BlockParts((Feed(block.ln1, (block.attn.qkv,)), Feed(block.ln2, (hidden,))), (), (hidden,))

    def patch(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.patch`: the strides of the three unfoldings."""
        return 16

    def prefix_tokens(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.prefix_tokens`."""
        return net.num_extra_tokens

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [('the stream', lambda: self._stream(model, net))]

    def _stream(self, model: nn.Module, net: nn.Module) -> Stream:
        head = getattr(model, 'head', None)
        need(
            class_named(head, CLASS_TOKEN_HEADS)
            and getattr(model, 'neck', None) is None
            and net.out_type == 'cls_token'
            and net.final_norm
            and list(net.out_indices) == [len(net.encoder) - 1],
            'its tokens are read by more than a known head of class tokens',
        )
        first = getattr(head.layers, 'pre_logits', None) or head.layers.head
        tokens = [net.pos_embed, net.cls_token]
        last = StreamReader(net.norm, (first,))
        return stream(net.tokens_to_token.project, map(self.parts, net.encoder), [last], tokens)
