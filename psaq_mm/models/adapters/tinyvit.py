# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""TinyViT of mmpretrain (arXiv 2207.10666, section 3.2): a stage of convolutions, then attention in windows without a
shift, each with a depthwise convolution behind it.
"""

from typing import Optional, Tuple

from torch import Tensor, nn

from psaq_mm.models.adapters.backbone import register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, Feed, Writer, mark_parts, quantize_outputs
from psaq_mm.models.adapters.le_attention import LeBackbone, QuantLeAttentionMixin
from psaq_mm.models.adapters.match import class_named
from psaq_mm.models.adapters.windows import valid_query_rows
from psaq_mm.quantization import AdapterSpec, adopt, feeds_activation, padded, quantize_output_

__all__ = ['QuantTinyViTBlockMixin', 'TinyViT']

_MODULE = 'mmpretrain.models.backbones.tinyvit'
_CONVOLUTIONS = f'{_MODULE}.MBConvBlock'


class QuantTinyViTBlockMixin:
    """A block that tells its attention which rows are padding of a window."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H * W, C) to (B, H * W, C)."""
        with padded(self.attn, valid_query_rows(*self.img_size, self.window_size, device=x.device)):
            return super().forward(x)


def _convert_convolution(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    """A batch normalization follows the convolution."""
    feeds_activation(module.conv2d)
    return module


@register_backbone
class TinyViT(LeBackbone):
    """TinyViT of mmpretrain."""

    names = (f'{_MODULE}.TinyViT',)
    block_path = r'stages\.\d+\.blocks\.\d+'
    blocks = {f'{_MODULE}.TinyViTBlock': QuantTinyViTBlockMixin, _CONVOLUTIONS: None}
    attention = {'mmpretrain.models.utils.attention.LeAttention': QuantLeAttentionMixin}
    edges = ('patch_embed',)
    others = {f'{_MODULE}.ConvBN2d': _convert_convolution}

    def attention_of(self, block: nn.Module) -> Tuple[nn.Module, ...]:
        """See :meth:`.Backbone.attention_of`."""
        return () if class_named(block, (_CONVOLUTIONS,)) else (block.attn,)

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`. Attention normalizes behind the padding of its windows."""
        if class_named(block, (_CONVOLUTIONS,)):
            return BlockParts((), (Writer(block.conv3.conv2d),))
        attention, mlp = block.attn, block.mlp
        feeds = Feed(attention.norm, (attention.qkv,)), Feed(mlp.norm, (mlp.fc1,))
        return BlockParts(feeds, (Writer(attention.proj), Writer(mlp.fc2)), (mlp.fc1,))

    def convert_block(self, block: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_block`; edges are what a block adds by a convolution, and its last sum."""
        quantize_outputs(block, name, spec, ['conv3', 'local_conv'])
        mixin = self.blocks[class_named(block, self.blocks)]
        mark_parts(self.parts(block))
        return quantize_output_(block if mixin is None else adopt(block, mixin), name, spec)

    def patch(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.patch`: two convolutions of stride 2."""
        return 4

    def fixed_size(self, net: nn.Module) -> Optional[Tuple[int, int]]:
        """See :meth:`.Backbone.fixed_size`: each block knows the size of its map."""
        return tuple(net.img_size)

    def unsupported(self, net: nn.Module) -> Optional[str]:
        """See :meth:`.Backbone.unsupported`."""
        if any(stage.use_checkpoint for stage in net.stages):
            return 'its checkpointing is reentrant, which cuts gradients off; build it with use_checkpoint=False'
        return None
