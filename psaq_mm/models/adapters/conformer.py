# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Convolutions and blocks of ViT side by side or one after the other: Conformer and MobileViT of mmpretrain.

Their blocks of attention are those of mmpretrain's Vision Transformer.
"""

from typing import Iterator, Tuple

from torch import nn

from psaq_mm.models.adapters.backbone import register_backbone
from psaq_mm.models.adapters.streams import NamedStreams, need
from psaq_mm.models.adapters.vit import VisionTransformer
from psaq_mm.quantization import AdapterSpec, feeds_activation

__all__ = ['Conformer', 'MobileViT']

_CONFORMER = 'mmpretrain.models.backbones.conformer'
_MOBILE = 'mmpretrain.models.backbones.mobilevit'
_LAYER = 'mmpretrain.models.backbones.vision_transformer.TransformerEncoderLayer'


def _convert_normalized(*names: str):
    """The adapter of a module whose convolutions of these names have a normalization or an activation behind them."""

    def convert(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        for child in names:
            if hasattr(module, child):
                feeds_activation(getattr(module, child))
        return module

    return convert


class _Mixed(VisionTransformer):
    """What both have in common.

    Attributes:
        unrotatable: Why its stream cannot be rotated.
    """

    names: Tuple[str, ...] = ()
    blocks = {_LAYER: VisionTransformer.blocks[_LAYER]}
    edges = ()
    unrotatable = ''

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [('the stream', lambda: need(False, self.unrotatable))]


@register_backbone
class Conformer(_Mixed):
    """Conformer (arXiv 2105.03889, section 3.1): a branch of convolutions and one of attention exchange their maps."""

    names = (f'{_CONFORMER}.Conformer',)
    block_path = r'trans_1|conv_trans_\d+\.trans_block'
    others = {
        f'{_CONFORMER}.Conformer': _convert_normalized('conv1'),
        f'{_CONFORMER}.ConvBlock': _convert_normalized('conv1', 'conv2', 'conv3', 'residual_conv'),
        f'{_CONFORMER}.FCUUp': _convert_normalized('conv_project'),
    }
    unrotatable = 'convolutions read it and write to it in each block'

    def prefix_tokens(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.prefix_tokens`."""
        return int(net.with_cls_token)

    def patch(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.patch`: a stem of stride 4, and the convolution behind it."""
        return 4 * net.trans_patch_conv.stride[0]

    def min_side(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.min_side`: one position of the last map."""
        return max(self.patch(net), 32)


@register_backbone
class MobileViT(_Mixed):
    """MobileViT (arXiv 2110.02178, section 3.1): attention among the tokens at one place of each patch."""

    names = (f'{_MOBILE}.MobileViT',)
    block_path = r'layers\.\d+\.\d+\.global_rep\.\d+'
    unrotatable = 'convolutions stand between its blocks'

    def block_list(self, net: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
        """See :meth:`.Backbone.block_list`; a norm stands behind the blocks, in one list with them."""
        return ((name, part) for name, part in super().block_list(net) if not isinstance(part, nn.LayerNorm))

    def prefix_tokens(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.prefix_tokens`."""
        return 0

    def min_side(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.min_side`: two positions of the last map, a patch of its attention."""
        return 64
