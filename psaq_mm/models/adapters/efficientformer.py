# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""EfficientFormer of mmpretrain (arXiv 2206.01191, section 4.1): blocks of pooling and convolutions on maps, then
blocks of attention on tokens.
"""

import math
from typing import Iterator, Optional, Tuple

from torch import nn

from psaq_mm.models.adapters.backbone import register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, Feed, Writer, layer_scale, mark_parts, quantize_outputs
from psaq_mm.models.adapters.le_attention import LeBackbone, QuantLeAttentionMixin
from psaq_mm.models.adapters.match import class_named
from psaq_mm.quantization import AdapterSpec, quantize_output_

__all__ = ['EfficientFormer']

_MODULE = 'mmpretrain.models.backbones.efficientformer'
_ATTENTION_BLOCK = f'{_MODULE}.Meta3D'
_BETWEEN = (f'{_MODULE}.Flat', 'mmcv.cnn.bricks.conv_module.ConvModule')


@register_backbone
class EfficientFormer(LeBackbone):
    """EfficientFormer of mmpretrain."""

    names = (f'{_MODULE}.EfficientFormer',)
    block_path = r'network\.\d+\.\d+'
    blocks = {_ATTENTION_BLOCK: None, f'{_MODULE}.Meta4D': None}
    attention = {f'{_MODULE}.AttentionWithBias': QuantLeAttentionMixin}
    edges = ('patch_embed',)
    unrotatable = 'a pooling and batch normalizations read its channels one by one'

    def block_list(self, net: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
        """See :meth:`.Backbone.block_list`; what makes the next stage stands among the blocks."""
        return ((name, part) for name, part in super().block_list(net) if not class_named(part, _BETWEEN))

    def attention_of(self, block: nn.Module) -> Tuple[nn.Module, ...]:
        """See :meth:`.Backbone.attention_of`."""
        return (block.token_mixer,) if class_named(block, (_ATTENTION_BLOCK,)) else ()

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`. A block of convolutions has a batch normalization behind each."""
        attention, mlp, scales = block.token_mixer, block.mlp, [layer_scale(part) for part in (block.ls1, block.ls2)]
        if not class_named(block, (_ATTENTION_BLOCK,)):
            return BlockParts((), (Writer(mlp.fc2, scales[1]),), (mlp.fc1, mlp.fc2))
        feeds = Feed(block.norm1, (attention.qkv,)), Feed(block.norm2, (mlp.fc1,))
        return BlockParts(feeds, (Writer(attention.proj, scales[0]), Writer(mlp.fc2, scales[1])), (mlp.fc1,))

    def convert_block(self, block: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_block`; its last sum is an edge."""
        mark_parts(self.parts(block))
        quantize_outputs(block, name, spec, ['mlp.norm2'])
        return quantize_output_(block, name, spec)

    def fixed_size(self, net: nn.Module) -> Optional[Tuple[int, int]]:
        """See :meth:`.Backbone.fixed_size`: that of the position bias, of 7 x 7 tokens."""
        attention = [part for part in net.modules() if class_named(part, self.attention)]
        side = math.isqrt(len(attention[0].attention_bias_idxs)) * self.min_side(net) if attention else None
        return None if side is None else (side, side)

    def min_side(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.min_side`: one position of the last map."""
        return 4 * 2 ** sum(map(bool, net.downsamples))
