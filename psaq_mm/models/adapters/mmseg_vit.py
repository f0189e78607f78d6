# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Vision Transformer of mmseg, whose attention is mmcv's wrapper around ``nn.MultiheadAttention``."""

from torch import Tensor, nn

from psaq_mm.models.adapters.attention import CheckpointedBlockMixin
from psaq_mm.models.adapters.edges import BlockParts, adopt_block, join, outputs_are_edges
from psaq_mm.models.adapters.match import Architecture, adapt, class_named
from psaq_mm.models.adapters.packed_attention import adopt_packed
from psaq_mm.quantization import AdapterSpec, apply_edge, register_adapter

__all__ = ['MMSEG_VIT_ARCHITECTURES', 'QuantMMSegEncoderLayerMixin']

_BACKBONE = ('mmseg.models.backbones.vit.VisionTransformer',)
_LAYER = ('mmseg.models.backbones.vit.TransformerEncoderLayer',)
_WRAPPER = ('mmcv.cnn.bricks.transformer.MultiheadAttention',)

MMSEG_VIT_ARCHITECTURES = (Architecture(_BACKBONE, r'layers\.\d+', _LAYER, _WRAPPER),)


class QuantMMSegEncoderLayerMixin(CheckpointedBlockMixin):
    """A transformer layer whose two residual sums are edges."""

    def _block(self, x: Tensor) -> Tensor:
        x = apply_edge(self.residual1_quantizer, self.attn(self.norm1(x), identity=x))
        return apply_edge(self.residual2_quantizer, self.ffn(self.norm2(x), identity=x))


def _convert_layer(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    attention = adopt_packed(module.attn.attn, join(name, 'attn.attn'), spec)
    parts = BlockParts(module.norm1, attention, module.norm2, module.ffn)
    return adopt_block(module, QuantMMSegEncoderLayerMixin, parts, name, spec)


register_adapter(
    lambda m: class_named(m, _LAYER) is not None and class_named(m.attn, _WRAPPER) is not None, _convert_layer
)
adapt(_BACKBONE, outputs_are_edges('patch_embed.norm', 'drop_after_pos', 'pre_ln'))
