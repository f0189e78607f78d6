# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""RIFormer of mmpretrain: a scale and an offset of each channel in the place of attention.

While it is trained, they are a 1 x 1 depthwise convolution behind a norm (RIFormer, arXiv 2304.05659, section 3.3); in
its deployed form they are folded into that norm, and the branch has no layer. It has no attention: patch similarity
cannot be measured. Its norms are GroupNorms of one group, whose scales are not folded.
"""

import math
from typing import Tuple

from torch import Tensor, nn

from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, Feed, Writer
from psaq_mm.models.adapters.streams import NamedStreams, need
from psaq_mm.quantization import apply_edge

__all__ = ['QuantRIFormerBlockMixin', 'RIFormer']

_MODULE = 'mmpretrain.models.backbones.riformer'


class QuantRIFormerBlockMixin:
    """A block whose two residual sums are edges."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        branch = self.norm_reparam(x) if hasattr(self, 'norm_reparam') else self.token_mixer(self.norm1(x))
        scale1, scale2 = (scale[:, None, None] for scale in (self.layer_scale_1, self.layer_scale_2))
        x = apply_edge(self.residual1_quantizer, x + self.drop_path(scale1 * branch))
        return apply_edge(self.residual2_quantizer, x + self.drop_path(scale2 * self.mlp(self.norm2(x))))


@register_backbone
class RIFormer(Backbone):
    """RIFormer of mmpretrain, as it is trained and deployed."""

    names = (f'{_MODULE}.RIFormer',)
    block_path = r'network\.\d+\.\d+'
    blocks = {f'{_MODULE}.RIFormerBlock': QuantRIFormerBlockMixin}

    def attention_of(self, block: nn.Module) -> Tuple[nn.Module, ...]:
        """See :meth:`.Backbone.attention_of`."""
        return ()

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        feeds: Tuple[Feed, ...] = (Feed(block.norm2, (block.mlp.fc1,)),)
        writers: Tuple[Writer, ...] = (Writer(block.mlp.fc2, block.layer_scale_2),)
        if not hasattr(block, 'norm_reparam'):
            affine = block.token_mixer.affine
            feeds, writers = (Feed(block.norm1, (affine,)), *feeds), (Writer(affine, block.layer_scale_1), *writers)
        return BlockParts(feeds, writers, (block.mlp.fc1,))

    def min_side(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.min_side`: one position of the last map."""
        convolutions = (part.proj for part in net.modules() if hasattr(part, 'proj'))
        return math.prod(convolution.stride[0] for convolution in convolutions)

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [('the stream of each stage', lambda: need(False, 'it has norms that are no LayerNorm'))]
