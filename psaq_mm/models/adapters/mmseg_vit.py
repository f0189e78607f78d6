# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Vision Transformer of mmseg, whose attention is mmcv's wrapper around ``nn.MultiheadAttention``."""

from torch import Tensor, nn

from psaq_mm.models.adapters.attention import CheckpointedBlockMixin
from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, join, standard_parts
from psaq_mm.models.adapters.packed_attention import adopt_packed
from psaq_mm.quantization import AdapterSpec, apply_edge

__all__ = ['MMSegVisionTransformer', 'QuantMMSegEncoderLayerMixin']


class QuantMMSegEncoderLayerMixin(CheckpointedBlockMixin):
    """A transformer layer whose two residual sums are edges."""

    def _block(self, x: Tensor) -> Tensor:
        x = apply_edge(self.residual1_quantizer, self.attn(self.norm1(x), identity=x))
        return apply_edge(self.residual2_quantizer, self.ffn(self.norm2(x), identity=x))


@register_backbone
class MMSegVisionTransformer(Backbone):
    """VisionTransformer of mmseg."""

    names = ('mmseg.models.backbones.vit.VisionTransformer',)
    block_path = r'layers\.\d+'
    blocks = {'mmseg.models.backbones.vit.TransformerEncoderLayer': QuantMMSegEncoderLayerMixin}
    attention = {'mmcv.cnn.bricks.transformer.MultiheadAttention': None}  # converted with its block
    edges = ('patch_embed.norm', 'drop_after_pos', 'pre_ln')

    def convert_block(self, block: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_block`."""
        adopt_packed(block.attn.attn, join(name, 'attn.attn'), spec, ('qkv',))
        return super().convert_block(block, name, spec)

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        return standard_parts(block.norm1, block.attn.attn, block.norm2, block.ffn)

    def prefix_tokens(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.prefix_tokens`; the parameter is there all the same."""
        return int(net.with_cls_token)
