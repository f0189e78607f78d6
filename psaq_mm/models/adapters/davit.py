# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""DaViT of mmpretrain: attention among the tokens of a window, and attention among channels.

In channel attention (DaViT, arXiv 2204.03645, section 3.3) every channel of a head attends to the channels of that
head: the scores are products of keys with values, and what is weighted are the queries. The names of its products are
those of other attention.
"""

from typing import Any, Tuple

from torch import Tensor, nn

from psaq_mm.models.adapters.attention import CheckpointedBlockMixin
from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, standard_parts
from psaq_mm.models.adapters.match import class_named
from psaq_mm.models.adapters.products import QuantProductsMixin
from psaq_mm.models.adapters.streams import NamedStreams, need
from psaq_mm.models.adapters.swin import convert_shift, smallest_side
from psaq_mm.models.adapters.windows import WindowAttentionMixin, add_scores_edge
from psaq_mm.quantization import AdapterSpec, apply_edge, quantize_output_

__all__ = ['DaViT', 'QuantDaViTBlockMixin', 'QuantDaViTWindowMixin']

_MODULE = 'mmpretrain.models.backbones.davit'


class QuantDaViTWindowMixin(WindowAttentionMixin):
    """Window attention without a position bias."""

    def position_bias(self) -> None:
        """See :meth:`.WindowAttentionMixin.position_bias`."""
        return None


class QuantDaViTBlockMixin(CheckpointedBlockMixin):
    """A spatial or channel block whose residual sums are edges."""

    def _block(self, x: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
        x = self.cpe1(x, hw_shape)
        size: Tuple[Any, ...] = (hw_shape,) if hasattr(self.attn, 'w_msa') else ()
        x = self.cpe2(apply_edge(self.residual1_quantizer, self.attn(self.norm1(x), *size) + x), hw_shape)
        return apply_edge(self.residual2_quantizer, self.ffn(self.norm2(x), identity=x))


@register_backbone
class DaViT(Backbone):
    """DaViT of mmpretrain."""

    names = (f'{_MODULE}.DaViT',)
    block_path = r'stages\.\d+\.blocks\.\d+\.(spatial|channel)_block'
    blocks = dict.fromkeys((f'{_MODULE}.SpatialBlock', f'{_MODULE}.ChannelBlock'), QuantDaViTBlockMixin)
    attention = {
        f'{_MODULE}.DaViTWindowMSA': QuantDaViTWindowMixin,
        f'{_MODULE}.ChannelAttention': QuantProductsMixin,
    }
    edges = ('patch_embed.norm',)
    others = {
        'mmpretrain.models.utils.attention.ShiftWindowMSA': convert_shift,
        # A sum of its own: a convolution that tells positions, added to the stream.
        f'{_MODULE}.ConvPosEnc': quantize_output_,
    }

    def attention_of(self, block: nn.Module) -> Tuple[nn.Module, ...]:
        """See :meth:`.Backbone.attention_of`."""
        return (getattr(block.attn, 'w_msa', block.attn),)

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        (attention,) = self.attention_of(block)
        return standard_parts(block.norm1, attention, block.norm2, block.ffn, padded=attention is not block.attn)

    def convert_attention(self, attention: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_attention`; the scores of windows are an edge."""
        attention = super().convert_attention(attention, name, spec)
        return add_scores_edge(attention, name, spec) if isinstance(attention, WindowAttentionMixin) else attention

    def min_side(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.min_side`."""
        return smallest_side(net, self.patch(net)) or super().min_side(net)

    def rotates_heads(self, attention: nn.Module) -> Tuple[bool, bool]:
        """See :meth:`.Backbone.rotates_heads`: in channel attention a rotation would mix what is attended to."""
        windows = class_named(attention, (f'{_MODULE}.DaViTWindowMSA',)) is not None
        return windows, windows

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [('the streams', lambda: need(False, 'depthwise convolutions read them channel by channel'))]
