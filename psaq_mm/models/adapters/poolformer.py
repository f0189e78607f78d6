# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""PoolFormer of mmpretrain, which mmseg uses: pooling in the place of attention (arXiv 2111.11418, section 3).

It has no attention: patch similarity cannot be measured. Its norms are GroupNorms of one group, whose scales are not
folded.
"""

from typing import Tuple

from torch import Tensor, nn

from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, Feed, Writer
from psaq_mm.models.adapters.streams import NamedStreams, need
from psaq_mm.quantization import apply_edge

__all__ = ['PoolFormer', 'QuantPoolFormerBlockMixin']

_MODULE = 'mmpretrain.models.backbones.poolformer'


class QuantPoolFormerBlockMixin:
    """A block whose two residual sums are edges."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        scale1, scale2 = self.layer_scale_1[:, None, None], self.layer_scale_2[:, None, None]
        x = apply_edge(self.residual1_quantizer, x + self.drop_path(scale1 * self.token_mixer(self.norm1(x))))
        return apply_edge(self.residual2_quantizer, x + self.drop_path(scale2 * self.mlp(self.norm2(x))))


@register_backbone
class PoolFormer(Backbone):
    """PoolFormer of mmpretrain."""

    names = (f'{_MODULE}.PoolFormer',)
    block_path = r'network\.\d+\.\d+'
    blocks = {f'{_MODULE}.PoolFormerBlock': QuantPoolFormerBlockMixin}

    def attention_of(self, block: nn.Module) -> Tuple[nn.Module, ...]:
        """See :meth:`.Backbone.attention_of`."""
        return ()

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        feeds = (Feed(block.norm2, (block.mlp.fc1,)),)
        return BlockParts(feeds, (Writer(block.mlp.fc2, block.layer_scale_2),), (block.mlp.fc1,))

    def min_side(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.min_side`: one position of the last map."""
        side = self.patch(net)
        for part in net.network:
            side *= getattr(getattr(part, 'proj', None), 'stride', (1,))[0]
        return side

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [('the stream of each stage', lambda: need(False, 'a norm that is no LayerNorm'))]
