# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Swin Transformer V2 of timm, as mmpretrain's ``TimmClassifier`` and ``TIMMBackbone`` build it; see ``swin_v2.py``."""

from typing import Optional, Tuple

from torch import Tensor, nn

from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, quantize_outputs
from psaq_mm.models.adapters.match import class_named
from psaq_mm.models.adapters.streams import NamedStreams
from psaq_mm.models.adapters.swin_v2 import (
    CosineWindowAttentionMixin,
    convert_cosine_attention,
    post_norm_parts,
    post_norm_streams,
)
from psaq_mm.models.adapters.timm_swin import TimmCutMixin
from psaq_mm.models.adapters.timm_vit import strict_size
from psaq_mm.models.adapters.windows import add_scores_edge
from psaq_mm.quantization import AdapterSpec, apply_edge

__all__ = ['QuantTimmSwinV2BlockMixin', 'TimmSwinV2']


class QuantTimmSwinV2BlockMixin(TimmCutMixin):
    """A Swin V2 block whose two residual sums are edges, and which tells its attention which rows are padding."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        B, H, W, C = x.shape
        x = apply_edge(self.residual1_quantizer, x + self.drop_path1(self.norm1(self._attn(x))))
        x = x.reshape(B, -1, C)
        x = apply_edge(self.residual2_quantizer, x + self.drop_path2(self.norm2(self.mlp(x))))
        return x.reshape(B, H, W, C)


@register_backbone
class TimmSwinV2(Backbone):
    """SwinTransformerV2 of timm. With ``features_only=True`` only its stages are left, see :class:`.TimmSwin`."""

    names = ('timm.models.swin_transformer_v2.SwinTransformerV2',)
    wrappers = ('timm.models._features.FeatureListNet',)
    post_norm = True
    block_path = r'layers[._]\d+\.blocks\.\d+'
    blocks = {'timm.models.swin_transformer_v2.SwinTransformerV2Block': QuantTimmSwinV2BlockMixin}
    attention = {'timm.models.swin_transformer_v2.WindowAttention': CosineWindowAttentionMixin}

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        return post_norm_parts(block.mlp)

    def unsupported(self, net: nn.Module) -> Optional[str]:
        """See :meth:`.Backbone.unsupported`."""
        if any(class_named(block, self.blocks, '_attn') is None for _, block in self.block_list(net)):
            return 'its blocks override _attn'
        return None

    def convert_block(self, block: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_block`; the outputs of the norms are edges."""
        quantize_outputs(block, name, spec, ('norm1', 'norm2'))
        return super().convert_block(block, name, spec)

    def convert_attention(self, attention: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_attention`; its scores are an edge."""
        attention = add_scores_edge(super().convert_attention(attention, name, spec), name, spec)
        return convert_cosine_attention(attention)

    def fixed_size(self, net: nn.Module) -> Optional[Tuple[int, int]]:
        """See :meth:`.Backbone.fixed_size`."""
        return strict_size(net) if hasattr(net, 'patch_embed') else None

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return post_norm_streams()
