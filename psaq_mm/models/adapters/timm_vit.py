# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Vision Transformer and DeiT of timm, as mmpretrain's ``TimmClassifier`` and ``TIMMBackbone`` build them.

With every quantizer off, the output is that of timm's own unfused attention to the last bit, and that of its fused one
to rounding.
"""

from typing import Optional, Tuple

from torch import Tensor, nn

from psaq_mm.models.adapters.attention import attend
from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import (
    BlockParts,
    is_identity,
    layer_scale,
    outputs_are_edges,
    quantize_outputs,
    standard_parts,
)
from psaq_mm.models.adapters.streams import NamedStreams, Stream, need, stream
from psaq_mm.quantization import AdapterSpec, StreamReader, apply_edge

__all__ = ['QuantTimmAttentionMixin', 'QuantTimmBlockMixin', 'TimmVisionTransformer', 'strict_size', 'timm_parts']


class QuantTimmAttentionMixin:
    """Self-attention whose two matrix products are :class:`QuantMatMul`, whatever ``fused_attn`` says."""

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None) -> Tensor:
        """Self-attention.

        Args:
            x: (B, N, C).
            attn_mask: None, or an additive mask that broadcasts to (B, heads, N, N) (newer versions of timm).

        Returns:
            (B, N, C).
        """
        x, _ = attend(
            self,
            x,
            lambda q, k: (self.q_norm(q) * self.scale, self.k_norm(k)),
            lambda scores: self.attn_drop((scores if attn_mask is None else scores + attn_mask).softmax(dim=-1)),
        )
        norm = getattr(self, 'norm', None)  # newer versions of timm
        return self.proj_drop(self.proj(x if norm is None else norm(x)))


class QuantTimmBlockMixin:
    """A transformer block whose two residual sums are edges."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(B, N, C) to (B, N, C); what else is given (newer versions of timm) goes to the attention."""
        x = apply_edge(
            self.residual1_quantizer, x + self.drop_path1(self.ls1(self.attn(self.norm1(x), *args, **kwargs)))
        )
        return apply_edge(self.residual2_quantizer, x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))


def timm_parts(block: nn.Module, padded: bool = False) -> BlockParts:
    """Parts of a block of timm's VisionTransformer or SwinTransformer."""
    scales = (layer_scale(getattr(block, name, None)) for name in ('ls1', 'ls2'))
    return standard_parts(block.norm1, block.attn, block.norm2, block.mlp, *scales, padded=padded)


def strict_size(net: nn.Module) -> Optional[Tuple[int, int]]:
    """The size that timm's patch embedding was built for, where it takes no other."""
    size = getattr(net.patch_embed, 'img_size', None)
    if not size or not getattr(net.patch_embed, 'strict_img_size', False):
        return None
    return (size, size) if isinstance(size, int) else tuple(size)


@register_backbone
class TimmVisionTransformer(Backbone):
    """VisionTransformer and VisionTransformerDistilled of timm."""

    names = ('timm.models.vision_transformer.VisionTransformer', 'timm.models.deit.VisionTransformerDistilled')
    block_path = r'blocks\.\d+'
    blocks = {'timm.models.vision_transformer.Block': QuantTimmBlockMixin}
    # Newer versions of timm have moved the attention among the layers.
    attention = {
        'timm.models.vision_transformer.Attention': QuantTimmAttentionMixin,
        'timm.layers.attention.Attention': QuantTimmAttentionMixin,
    }
    edges = ('pos_drop', 'norm_pre')
    others = {'timm.layers.patch_embed.PatchEmbed': outputs_are_edges('norm')}

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        return timm_parts(block)

    def convert_attention(self, attention: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_attention`."""
        quantize_outputs(attention, name, spec, ('q_norm', 'k_norm'))
        return super().convert_attention(attention, name, spec)

    def prefix_tokens(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.prefix_tokens`."""
        return net.num_prefix_tokens

    def fixed_size(self, net: nn.Module) -> Optional[Tuple[int, int]]:
        """See :meth:`.Backbone.fixed_size`."""
        return strict_size(net)

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [('the stream', lambda: self._stream(net))]

    def _stream(self, net: nn.Module) -> Stream:
        need(is_identity(net.norm_pre, net.patch_embed.norm), 'a LayerNorm before the first block')
        need(
            is_identity(getattr(net, 'attn_pool', None)) and isinstance(net.head, nn.Linear),
            'no linear head that reads it',
        )
        norms = [norm for norm in (net.norm, net.fc_norm) if not is_identity(norm)]
        need(len(norms) == 1, 'not one LayerNorm before the head')
        heads = tuple(head for head in (net.head, getattr(net, 'head_dist', None)) if isinstance(head, nn.Linear))
        tokens = [getattr(net, name, None) for name in ('pos_embed', 'cls_token', 'dist_token', 'reg_token')]
        return stream(net.patch_embed.proj, map(self.parts, net.blocks), [StreamReader(norms[0], heads)], tokens)
