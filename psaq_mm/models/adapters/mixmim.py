# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""MixMIM of mmpretrain: Swin's window attention without shifts, on maps of one size."""

from typing import Optional, Tuple

import torch.utils.checkpoint as cp
from torch import Tensor, nn

from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, standard_parts
from psaq_mm.models.adapters.match import class_named
from psaq_mm.models.adapters.pretraining import FeaturesMixin, converts_network
from psaq_mm.models.adapters.streams import BEHIND_A_NORM, NamedStreams, Stream, need, stream
from psaq_mm.models.adapters.swin import convert_merging
from psaq_mm.models.adapters.windows import Cut, CutMixin, WindowAttentionMixin, add_scores_edge
from psaq_mm.quantization import AdapterSpec, StreamReader, adopt, apply_edge

__all__ = ['MixMIM', 'PretrainingMixMIM', 'QuantMixMIMBlockMixin', 'QuantMixMIMLayerMixin']

_MODULE = 'mmpretrain.models.backbones.mixmim'


class QuantMixMIMBlockMixin(CutMixin):
    """A block whose two residual sums are edges."""

    cut_method = '_attend'

    def window_attention(self) -> nn.Module:
        """See :meth:`.CutMixin.window_attention`."""
        return self.attn

    def cut(self, height: int, width: int) -> Cut:
        """See :meth:`.CutMixin.cut`. Nothing is padded: the library takes multiples of a window alone."""
        return Cut((self.window_size, self.window_size))

    def _attend(self, x: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
        (height, width), side = hw_shape, self.window_size
        windows = self.window_partition(x.view(len(x), height, width, -1), side).flatten(1, 2)
        windows = self.attn(windows).unflatten(1, (side, side))
        return self.window_reverse(windows, height, width, side).view(x.shape)

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None) -> Tensor:
        """(B, H * W, C) to (B, H * W, C).

        Raises:
            UnsupportedModelError: A mask is given, as in pre-training.
        """
        if attn_mask is not None:
            raise UnsupportedModelError(
                'attn_mask is not supported in the quantized MixMIMTransformer: leave it None, or use the float model'
            )
        x = apply_edge(self.residual1_quantizer, x + self.drop_path(self._attend(self.ln1(x), self.input_resolution)))
        return apply_edge(self.residual2_quantizer, self.ffn(self.ln2(x), identity=x))


class QuantMixMIMLayerMixin:
    """A stage whose activation checkpointing keeps the graph of what hooks see, as :class:`.CheckpointedBlockMixin`."""

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None) -> Tensor:
        """(B, H * W, C) to the tokens of the next stage."""
        for block in self.blocks:
            if self.use_checkpoint and x.requires_grad:
                x = cp.checkpoint(block, x, attn_mask, use_reentrant=False)
            else:
                x = block(x, attn_mask)
        return x if self.downsample is None else self.downsample(x, self.input_resolution)[0]


def _convert_layer(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    return adopt(module, QuantMixMIMLayerMixin)


@register_backbone
class MixMIM(Backbone):
    """MixMIMTransformer of mmpretrain."""

    names = (f'{_MODULE}.MixMIMTransformer',)
    block_path = r'layers\.\d+\.blocks\.\d+'
    blocks = {f'{_MODULE}.MixMIMBlock': QuantMixMIMBlockMixin}
    attention = {f'{_MODULE}.MixMIMWindowAttention': WindowAttentionMixin}
    edges = ('drop_after_pos',)
    others = {
        f'{_MODULE}.MixMIMLayer': _convert_layer,
        'mmcv.cnn.bricks.transformer.PatchMerging': convert_merging,
    }

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        return standard_parts(block.ln1, block.attn, block.ln2, block.ffn)

    def convert_attention(self, attention: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_attention`; its scores are an edge."""
        return add_scores_edge(super().convert_attention(attention, name, spec), name, spec)

    def fixed_size(self, net: nn.Module) -> Tuple[int, int]:
        """See :meth:`.Backbone.fixed_size`: position embedding and maps have one size."""
        patch = self.patch(net)
        return tuple(side * patch for side in net.patch_resolution)

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [
            (f'the stream of stage {i + 1}', lambda i=i: self._stage(model, net, i)) for i in range(len(net.layers))
        ]

    def _stage(self, model: nn.Module, net: nn.Module, number: int) -> Stream:
        need(number > 0, BEHIND_A_NORM)
        layer = net.layers[number]
        if layer.downsample is not None:
            merging = layer.downsample
            reader = StreamReader(merging.norm, (merging.reduction,), tokens=4, interleaved=True)
        else:
            head = getattr(model, 'head', None)
            need(
                getattr(model, 'neck', None) is None
                and class_named(head, ('mmpretrain.models.heads.linear_head.LinearClsHead',)),
                'no linear head that reads it',
            )
            reader = StreamReader(net.norm, (head.fc,))
        return stream(net.layers[number - 1].downsample.reduction, map(self.parts, layer.blocks), [reader])


@register_backbone
class PretrainingMixMIM(MixMIM):
    """MixMIMPretrainTransformer of mmpretrain, which extracts features without a mask."""

    names = ('mmpretrain.models.selfsup.mixmim.MixMIMPretrainTransformer',)
    edges = ()
    others = {**MixMIM.others, **dict.fromkeys(names, converts_network(FeaturesMixin, *MixMIM.edges))}
