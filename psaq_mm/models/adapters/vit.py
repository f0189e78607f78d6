# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Vision Transformer and DeiT of mmpretrain.

The library's attention is fused; here its two products are explicit. The output is equal to rounding, and to the
library's own unfused fallback to the last bit where the square root of a head's width is a power of two (64 in every
zoo model).
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.models.adapters.attention import attend
from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, is_identity, layer_scale, standard_parts
from psaq_mm.models.adapters.match import class_named, qualified_name
from psaq_mm.models.adapters.pretraining import FeaturesMixin, converts_network
from psaq_mm.models.adapters.streams import LINEAR_HEADS, NamedStreams, Stream, need, stream
from psaq_mm.quantization import AdapterSpec, StreamReader, apply_edge, keep_float

__all__ = [
    'CLASS_TOKEN_HEADS',
    'QuantDeiT3EncoderLayerMixin',
    'QuantEncoderLayerMixin',
    'QuantMultiheadAttentionMixin',
    'VisionTransformer',
    'tokens_reader',
]

_VITS = tuple(
    f'mmpretrain.models.backbones.{name}'
    for name in ('vision_transformer.VisionTransformer', 'deit.DistilledVisionTransformer')
)
_DEIT3 = 'mmpretrain.models.backbones.deit3.DeiT3'
_MASKED = tuple(
    f'mmpretrain.models.selfsup.{name}' for name in ('mae.MAEViT', 'milan.MILANViT', 'maskfeat.MaskFeatViT')
)
_MFF = 'mmpretrain.models.selfsup.mff.MFFViT'
CLASS_TOKEN_HEADS = tuple(
    f'mmpretrain.models.heads.{name}'
    for name in ('vision_transformer_head.VisionTransformerClsHead', 'deit_head.DeiTClsHead')
)


class QuantMultiheadAttentionMixin:
    """Self-attention whose two matrix products are :class:`QuantMatMul`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, input_dims) to (B, N, embed_dims)."""
        # Given a qk_scale, whatever its value, the library divides by head_dims ** -0.5.
        divisor = getattr(self.scaled_dot_product_attention, 'keywords', {}).get('scale', self.head_dims**0.5)
        x, v = attend(
            self,
            x,
            lambda q, k: (q / divisor, k),
            lambda scores: F.dropout(scores.softmax(dim=-1), self.attn_drop, self.training),
        )
        x = self.out_drop(self.gamma1(self.proj_drop(self.proj(x))))
        return v.squeeze(1) + x if self.v_shortcut else x


class QuantEncoderLayerMixin:
    """A transformer layer whose two residual sums are edges."""

    ffn_norm = 'ln2'

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        x = apply_edge(self.residual1_quantizer, x + self.attn(self.ln1(x)))
        return apply_edge(self.residual2_quantizer, self.ffn(getattr(self, self.ffn_norm)(x), identity=x))


class QuantDeiT3EncoderLayerMixin(QuantEncoderLayerMixin):
    """mmpretrain's DeiT3 layer, which normalizes before the feed-forward network with ``ln1`` once more, never with
    ``ln2``.
    """

    ffn_norm = 'ln1'


class _MFFFeaturesMixin(FeaturesMixin):
    """MFF's backbone drops patches without a mask as well: its features are those of the VisionTransformer below."""

    def forward(self, x: Tensor, mask: Any = None) -> Any:
        """As :meth:`.FeaturesMixin.forward`."""
        return next(base for base in type(self).__mro__ if qualified_name(base) == _VITS[0]).forward(self, x)


def _convert_mff(net: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    keep_float(net.proj_layers, 'it fuses layers in pre-training alone')
    return converts_network(_MFFFeaturesMixin, *VisionTransformer.edges)(net, name, spec)


@register_backbone
class VisionTransformer(Backbone):
    """VisionTransformer, DistilledVisionTransformer and DeiT3 of mmpretrain, and the backbones of its pre-training."""

    names = (*_VITS, _DEIT3, *_MASKED, _MFF)
    block_path = r'layers\.\d+'
    blocks = {
        'mmpretrain.models.backbones.vision_transformer.TransformerEncoderLayer': QuantEncoderLayerMixin,
        'mmpretrain.models.backbones.deit3.DeiT3TransformerEncoderLayer': QuantDeiT3EncoderLayerMixin,
    }
    attention = {'mmpretrain.models.utils.attention.MultiheadAttention': QuantMultiheadAttentionMixin}
    edges = ('patch_embed.norm', 'drop_after_pos', 'pre_norm')
    others = {
        **dict.fromkeys(_MASKED, converts_network(FeaturesMixin, *edges)),
        _MFF: _convert_mff,
    }

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        # A converted block has its mixin's forward, and is of none of these classes any more.
        mixin = block if isinstance(block, QuantEncoderLayerMixin) else self.blocks[class_named(block, self.blocks)]
        norm2 = getattr(block, mixin.ffn_norm)
        return standard_parts(block.ln1, block.attn, norm2, block.ffn, layer_scale(block.attn.gamma1))

    def prefix_tokens(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.prefix_tokens`."""
        return net.num_extra_tokens

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [('the stream', lambda: self._stream(model, net))]

    def _stream(self, model: nn.Module, net: nn.Module) -> Stream:
        last = tokens_reader(model, net)
        need(is_identity(getattr(net, 'pre_norm', None), net.patch_embed.norm), 'a LayerNorm before the first block')
        need(not any(layer.attn.v_shortcut for layer in net.layers), 'a shortcut around the attention')
        tokens = [getattr(net, name, None) for name in ('pos_embed', 'cls_token', 'dist_token')]
        return stream(net.patch_embed.projection, map(self.parts, net.layers), [last], tokens)


def tokens_reader(model: nn.Module, net: nn.Module) -> StreamReader:
    """The norm behind the blocks of a Vision Transformer of mmpretrain, and the layers of the head that read it.

    Args:
        model: The classifier.
        net: Its network, with the outputs of mmpretrain's VisionTransformer.

    Raises:
        Unrotatable: More reads the tokens, or a head that is not known here.
    """
    head, kind = getattr(model, 'head', None), (net.out_type, bool(net.final_norm))
    alone = getattr(model, 'neck', None) is None and list(net.out_indices) == [len(net.layers) - 1]
    if alone and class_named(head, LINEAR_HEADS) and kind == ('avg_featmap', False):
        return StreamReader(net.ln2, (head.fc,))
    if alone and class_named(head, LINEAR_HEADS) and kind == ('cls_token', True):
        return StreamReader(net.ln1, (head.fc,))
    need(
        alone and class_named(head, CLASS_TOKEN_HEADS) and kind == ('cls_token', True),
        'its tokens are read by more than a known head of class tokens or of their mean',
    )
    linears = [getattr(head.layers, name, None) for name in ('pre_logits', 'head', 'head_dist')]
    behind = linears[:1] if linears[0] is not None else [layer for layer in linears if layer is not None]
    return StreamReader(net.ln1, tuple(behind))
