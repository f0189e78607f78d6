# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""EVA-02 of mmpretrain, and Eva of timm (EVA, EVA-02).

A Vision Transformer with rotary position embeddings of queries and keys, a gated feed-forward network (SwiGLU), and
optionally a LayerNorm inside of it and behind the heads (EVA-02, arXiv 2303.11331, section 2.1). The rotary embedding
turns pairs of channels by the position of a token: queries and keys cannot be rotated besides.
"""

from typing import Optional, Tuple

from torch import nn

from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, Feed, is_identity, standard_parts
from psaq_mm.models.adapters.products import QuantProductsMixin
from psaq_mm.models.adapters.streams import NamedStreams, Stream, need, stream
from psaq_mm.models.adapters.timm_vit import strict_size
from psaq_mm.models.adapters.vit import tokens_reader
from psaq_mm.quantization import AdapterSpec, AttentionParts, Projection, StreamReader

__all__ = ['EVA02', 'QuantTimmEvaAttentionMixin', 'TimmEva']


class _RotaryBackbone(Backbone):
    """What both have in common."""

    def rotates_heads(self, attention: nn.Module) -> Tuple[bool, bool]:
        """See :meth:`.Backbone.rotates_heads`."""
        return False, is_identity(getattr(attention, 'norm', None))


@register_backbone
class EVA02(_RotaryBackbone):
    """ViTEVA02 of mmpretrain."""

    names = ('mmpretrain.models.backbones.vit_eva02.ViTEVA02',)
    block_path = r'layers\.\d+'
    blocks = {'mmpretrain.models.backbones.vit_eva02.EVA02EndcoderLayer': None}
    attention = {'mmpretrain.models.backbones.vit_eva02.AttentionWithRoPE': QuantProductsMixin}
    edges = ('patch_embed.norm', 'drop_after_pos', 'pre_norm')

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        parts = standard_parts(block.norm1, block.attn, block.norm2, block.mlp)
        return parts._replace(inner=(Feed(block.mlp.norm, (block.mlp.w3,)),))

    def prefix_tokens(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.prefix_tokens`."""
        return net.num_extra_tokens

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [('the stream', lambda: self._stream(model, net))]

    def _stream(self, model: nn.Module, net: nn.Module) -> Stream:
        last = tokens_reader(model, net)
        need(is_identity(net.pre_norm, net.patch_embed.norm), 'a LayerNorm before the first block')
        first, tokens = net.patch_embed.projection, [net.cls_token, net.pos_embed]
        return stream(first, map(self.parts, net.layers), [last], tokens)


class QuantTimmEvaAttentionMixin(QuantProductsMixin):
    """timm's attention, whatever ``fused_attn`` says; queries, keys and values have one projection or three."""

    def attention_parts(self) -> AttentionParts:
        """See :func:`psaq_mm.quantization.attention_parts`."""
        if self.qkv is None:
            layers = self.q_proj, self.k_proj, self.v_proj
            return AttentionParts(self.num_heads, *(Projection(x, 0, x.out_features) for x in layers), self.proj)
        return AttentionParts.packed(self.qkv, self.proj, self.num_heads).with_biases_of(self)


@register_backbone
class TimmEva(_RotaryBackbone):
    """Eva of timm."""

    names = ('timm.models.eva.Eva',)
    block_path = r'blocks\.\d+'
    blocks = {'timm.models.eva.EvaBlock': None}
    attention = {'timm.models.eva.EvaAttention': QuantTimmEvaAttentionMixin}
    edges = ('pos_drop', 'norm_pre')

    def convert_attention(self, attention: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_attention`. The bias of queries and values is added behind the layer, so that
        the layer is called.
        """
        attention = super().convert_attention(attention, name, spec)
        attention.fused_attn = False
        attention.qkv_bias_separate = True
        return attention

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        parts = standard_parts(block.norm1, block.attn, block.norm2, block.mlp, block.gamma_1, block.gamma_2)
        inner = [(block.attn.norm, block.attn.proj)]
        inner += [(getattr(block.mlp, 'norm', None), getattr(block.mlp, 'fc2', None))]
        return parts._replace(inner=tuple(Feed(norm, (layer,)) for norm, layer in inner if not is_identity(norm)))

    def fixed_size(self, net: nn.Module) -> Optional[Tuple[int, int]]:
        """See :meth:`.Backbone.fixed_size`."""
        return strict_size(net)

    def prefix_tokens(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.prefix_tokens`."""
        return net.num_prefix_tokens

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [('the stream', lambda: self._stream(net))]

    def _stream(self, net: nn.Module) -> Stream:
        need(is_identity(getattr(net, 'norm_pre', None)), 'a LayerNorm before the first block')
        norms = [norm for norm in (net.norm, net.fc_norm) if not is_identity(norm)]
        need(len(norms) == 1 and isinstance(net.head, nn.Linear), 'no linear head behind one LayerNorm')
        tokens = [getattr(net, name, None) for name in ('cls_token', 'pos_embed', 'reg_token')]
        reader = StreamReader(norms[0], (net.head,))
        return stream(net.patch_embed.proj, map(self.parts, net.blocks), [reader], tokens)
