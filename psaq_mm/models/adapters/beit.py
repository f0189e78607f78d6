# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""BEiT and BEiT v2 of mmpretrain, BEiT and MAE of mmseg, Beit of timm.

A Vision Transformer whose scores have a learned bias for the relative position of two tokens, of each block or shared
by all, and whose keys have no bias (BEiT, arXiv 2106.08254, section 2.1 and its released code). The table of a position
bias is that of one size of pictures.
"""

from typing import Optional, Tuple

from torch import Tensor, nn

from psaq_mm.models.adapters.attention import attend
from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, is_identity, standard_parts
from psaq_mm.models.adapters.match import class_named
from psaq_mm.models.adapters.pretraining import FeaturesMixin, converts_network
from psaq_mm.models.adapters.split_bias import SplitBiasProjection
from psaq_mm.models.adapters.streams import LINEAR_HEADS, NamedStreams, Stream, need, stream
from psaq_mm.models.adapters.timm_vit import strict_size
from psaq_mm.quantization import AdapterSpec, StreamReader, apply_edge

__all__ = ['Beit', 'MMSegBeit', 'QuantBeitAttentionMixin', 'QuantBeitBlockMixin', 'TimmBeit']


class QuantBeitAttentionMixin:
    """Self-attention with a position bias, whose two matrix products are :class:`QuantMatMul`."""

    def forward(self, x: Tensor, rel_pos_bias: Optional[Tensor] = None) -> Tensor:
        """Self-attention.

        Args:
            x: (B, N, C).
            rel_pos_bias: Position bias that all blocks share, (heads, N, N), or None.

        Returns:
            (B, N, C).
        """

        def weights(scores: Tensor) -> Tensor:
            if self.relative_position_bias_table is not None:
                scores = scores + self._position_bias()
            if rel_pos_bias is not None:
                scores = scores + rel_pos_bias
            return self.attn_drop(scores.softmax(dim=-1))

        x, _ = attend(self, x, lambda q, k: (q * self.scale, k), weights)
        return self.proj_drop(self.proj(x))

    def _position_bias(self) -> Tensor:
        """Bias of the scores for the relative position of two tokens, (1, heads, N, N)."""
        index = self.relative_position_index
        bias = self.relative_position_bias_table[index.view(-1)].view(*index.shape, -1)
        return bias.permute(2, 0, 1).contiguous().unsqueeze(0)


class QuantTimmBeitAttentionMixin(QuantBeitAttentionMixin):
    """timm's, whatever ``fused_attn`` says."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Optional[Tensor] = None) -> Tensor:
        """As :meth:`QuantBeitAttentionMixin.forward`."""
        return super().forward(x, shared_rel_pos_bias)

    def _position_bias(self) -> Tensor:
        return self._get_rel_pos_bias()


class QuantBeitBlockMixin:
    """A transformer block whose two residual sums are edges."""

    def forward(self, x: Tensor, *args: Optional[Tensor], **kwargs: Optional[Tensor]) -> Tensor:
        """(B, N, C) to (B, N, C); what else is given, a shared position bias, goes to the attention."""
        norm1, norm2, ffn, drop1, drop2 = _members(self)
        attended, first, second = self.attn(norm1(x), *args, **kwargs), self.gamma_1, self.gamma_2
        x = apply_edge(self.residual1_quantizer, x + drop1(attended if first is None else first * attended))
        out = ffn(norm2(x))
        return apply_edge(self.residual2_quantizer, x + drop2(out if second is None else second * out))


def _members(block: nn.Module) -> Tuple[nn.Module, ...]:
    """Norms, feed-forward network and the two drops of a block, which each library names in its way."""
    if hasattr(block, 'mlp'):
        return block.norm1, block.norm2, block.mlp, block.drop_path1, block.drop_path2
    norms = (block.ln1, block.ln2) if hasattr(block, 'ln1') else (block.norm1, block.norm2)
    return (*norms, block.ffn, block.drop_path, block.drop_path)


class _BeitFamily(Backbone):
    """What all of them share."""

    block_path = r'(layers|blocks)\.\d+'

    def convert_attention(self, attention: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_attention`; the projection becomes a layer that is called."""
        attention = super().convert_attention(attention, name, spec)
        if getattr(attention, 'q_bias', None) is not None:
            attention.qkv = SplitBiasProjection(attention)
        return attention

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        norm1, norm2, ffn, *_ = _members(block)
        return standard_parts(norm1, block.attn, norm2, ffn, block.gamma_1, block.gamma_2)

    def fixed_size(self, net: nn.Module) -> Optional[Tuple[int, int]]:
        """See :meth:`.Backbone.fixed_size`: a position bias is that of one size."""
        shared = getattr(net, 'rel_pos_bias', None)
        windows = [
            getattr(module, 'window_size', None) for module in (shared, *(b.attn for _, b in self.block_list(net)))
        ]
        window = next((window for window in windows if window is not None), None)
        return None if window is None else tuple(side * self.patch(net) for side in window)

    def min_side(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.min_side`: the window is the whole picture."""
        return self.patch(net)

    def prefix_tokens(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.prefix_tokens`."""
        return 1 if net.cls_token is not None else 0


@register_backbone
class Beit(_BeitFamily):
    """BEiTViT of mmpretrain, and the backbones of its pre-training."""

    names = (
        'mmpretrain.models.backbones.beit.BEiTViT',
        'mmpretrain.models.selfsup.beit.BEiTPretrainViT',
        'mmpretrain.models.selfsup.cae.CAEPretrainViT',
    )
    blocks = {'mmpretrain.models.backbones.beit.BEiTTransformerEncoderLayer': QuantBeitBlockMixin}
    attention = {'mmpretrain.models.utils.attention.BEiTAttention': QuantBeitAttentionMixin}
    edges = ('patch_embed.norm', 'drop_after_pos')
    others = {'mmpretrain.models.selfsup.beit.BEiTPretrainViT': converts_network(FeaturesMixin, *edges)}

    def unsupported(self, net: nn.Module) -> Optional[str]:
        """See :meth:`.Backbone.unsupported`."""
        if class_named(net, ('mmpretrain.models.selfsup.cae.CAEPretrainViT',)):
            return 'it encodes visible patches of a mask alone: load its weights into a BEiTViT and quantize that'
        return None

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [('the stream', lambda: self._stream(model, net))]

    def _stream(self, model: nn.Module, net: nn.Module) -> Stream:
        head = getattr(model, 'head', None)
        need(
            class_named(head, LINEAR_HEADS)
            and getattr(model, 'neck', None) is None
            and net.out_type == 'avg_featmap'
            and not net.final_norm
            and list(net.out_indices) == [len(net.layers) - 1],
            'its tokens are read by more than a known head of their mean',
        )
        need(is_identity(net.patch_embed.norm), 'a LayerNorm before the first block')
        reader = StreamReader(net.ln2, (head.fc,))
        return stream(net.patch_embed.projection, map(self.parts, net.layers), [reader], [net.cls_token, net.pos_embed])


@register_backbone
class MMSegBeit(_BeitFamily):
    """BEiT and MAE of mmseg."""

    names = ('mmseg.models.backbones.beit.BEiT', 'mmseg.models.backbones.mae.MAE')
    blocks = dict.fromkeys(
        (
            'mmseg.models.backbones.beit.BEiTTransformerEncoderLayer',
            'mmseg.models.backbones.mae.MAETransformerEncoderLayer',
        ),
        QuantBeitBlockMixin,
    )
    attention = dict.fromkeys(
        ('mmseg.models.backbones.beit.BEiTAttention', 'mmseg.models.backbones.mae.MAEAttention'),
        QuantBeitAttentionMixin,
    )
    edges = ('patch_embed.norm',)


@register_backbone
class TimmBeit(_BeitFamily):
    """Beit of timm."""

    names = ('timm.models.beit.Beit',)
    blocks = {'timm.models.beit.Block': QuantBeitBlockMixin}
    attention = {'timm.models.beit.Attention': QuantTimmBeitAttentionMixin}
    edges = ('pos_drop',)

    def fixed_size(self, net: nn.Module) -> Optional[Tuple[int, int]]:
        """See :meth:`.Backbone.fixed_size`."""
        return strict_size(net) or super().fixed_size(net)

    def prefix_tokens(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.prefix_tokens`."""
        return net.num_prefix_tokens

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [('the stream', lambda: self._stream(net))]

    def _stream(self, net: nn.Module) -> Stream:
        norms = [norm for norm in (net.norm, net.fc_norm) if not is_identity(norm)]
        need(len(norms) == 1 and isinstance(net.head, nn.Linear), 'no linear head behind one LayerNorm')
        reader = StreamReader(norms[0], (net.head,))
        return stream(net.patch_embed.proj, map(self.parts, net.blocks), [reader], [net.cls_token, net.pos_embed])
