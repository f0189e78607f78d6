# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Swin Transformer of mmdet, mmseg and mmpretrain: window attention, its padding, and activation checkpointing.

The three libraries share one computation under three module paths. What differs (mmpretrain's ``pad_small_map``) is
handled where it matters. With every quantizer off, each forward below runs the library's own operations in the
library's own order, so that its output is the library's to the last bit.
"""

import math
from typing import Optional, Sequence, Tuple

from torch import Tensor, nn

from psaq_mm.models.adapters.attention import CheckpointedBlockMixin
from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, mark_norm, standard_parts
from psaq_mm.models.adapters.pretraining import FeaturesMixin, converts_network
from psaq_mm.models.adapters.streams import BEHIND_A_NORM, NamedStreams, Stream, need, output_reader, stream
from psaq_mm.models.adapters.windows import Cut, CutMixin, WindowAttentionMixin, add_scores_edge
from psaq_mm.quantization import AdapterSpec, StreamReader, adopt, apply_edge

__all__ = [
    'PATCH_MERGING',
    'PretrainingSwin',
    'QuantShiftWindowMSAMixin',
    'QuantSwinBlockMixin',
    'Swin',
    'convert_merging',
    'convert_shift',
    'cuts_any_size',
    'smallest_side',
]

_MODULES = ('mmdet.models.backbones.swin', 'mmseg.models.backbones.swin')
_MMPRETRAIN = 'mmpretrain.models.backbones.swin_transformer'
_ATTENTION_MODULES = (*_MODULES, 'mmpretrain.models.utils.attention')
PATCH_MERGING = (
    'mmdet.models.layers.transformer.utils.PatchMerging',
    'mmseg.models.utils.embed.PatchMerging',
    'mmcv.cnn.bricks.transformer.PatchMerging',
    'mmpretrain.models.utils.embed.PatchMerging',
)


class QuantShiftWindowMSAMixin(CutMixin):
    """The library's own shifting and padding, which also tells the attention inside which rows are padding."""

    def window_attention(self) -> nn.Module:
        """See :meth:`.CutMixin.window_attention`."""
        return self.w_msa

    def cut(self, height: int, width: int) -> Cut:
        """See :meth:`.CutMixin.cut`."""
        shift, window = self.shift_size, self.window_size
        # mmpretrain does not shift where one window holds the whole map; mmdet and mmseg always do.
        if not getattr(self, 'pad_small_map', True) and min(height, width) == window:
            shift = 0
        return Cut((window, window), (shift, shift))

    def forward(self, query: Tensor, hw_shape: Sequence[int]) -> Tensor:
        """As the library's: ``query`` (B, H * W, C) to (B, H * W, C)."""
        with self.cutting(*hw_shape, query.device):
            return super().forward(query, hw_shape)


class QuantSwinBlockMixin(CheckpointedBlockMixin):
    """A Swin block whose two residual sums are edges."""

    def _block(self, x: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
        x = apply_edge(self.residual1_quantizer, self.attn(self.norm1(x), hw_shape) + x)
        return apply_edge(self.residual2_quantizer, self.ffn(self.norm2(x), identity=x))


def convert_shift(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    """OpenMMLab's ``ShiftWindowMSA``, around window attention of any kind."""
    return adopt(module, QuantShiftWindowMSAMixin)


def convert_merging(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    """Patch merging: its LayerNorm feeds its reduction, unless it comes after that (mmpretrain's ``use_post_norm``)."""
    if not getattr(module, 'use_post_norm', False):
        mark_norm(module.norm, module.reduction)
    return module


def smallest_side(net: nn.Module, patch: int) -> Optional[int]:
    """The least side of a picture, in pixels, where mmpretrain does not pad maps that are smaller than a window; None
    where it does.

    Args:
        net: With ``stages``, each with half the side of the one before.
        patch: Pixels of a side of a patch.
    """
    sides = [
        patch * 2**number * module.window_size
        for number, stage in enumerate(net.stages)
        for module in stage.modules()
        if isinstance(getattr(module, 'window_size', None), int) and not getattr(module, 'pad_small_map', True)
    ]
    return max(sides, default=None)


def cuts_any_size(net: nn.Module) -> bool:
    """Whether a network of stages does the same for maps of all sizes. Without ``pad_small_map``, whether mmpretrain
    shifts depends on the size, and so does whether it resizes an absolute position embedding.
    """
    padded = all(getattr(module, 'pad_small_map', True) for module in net.modules())
    return padded and not getattr(net, 'use_abs_pos_embed', False)


@register_backbone
class Swin(Backbone):
    """Swin Transformer of mmdet, mmseg and mmpretrain."""

    names = (*(f'{module}.SwinTransformer' for module in _MODULES), f'{_MMPRETRAIN}.SwinTransformer')
    block_path = r'stages\.\d+\.blocks\.\d+'
    blocks = dict.fromkeys(
        (*(f'{module}.SwinBlock' for module in _MODULES), f'{_MMPRETRAIN}.SwinBlock'), QuantSwinBlockMixin
    )
    attention = dict.fromkeys((f'{module}.WindowMSA' for module in _ATTENTION_MODULES), WindowAttentionMixin)
    # What the first block reads: the patch embedding after its LayerNorm, with the position embedding where there is
    # one.
    edges = ('drop_after_pos',)
    others = {
        **dict.fromkeys((f'{module}.ShiftWindowMSA' for module in _ATTENTION_MODULES), convert_shift),
        **dict.fromkeys(PATCH_MERGING, convert_merging),
    }

    def attention_of(self, block: nn.Module) -> Tuple[nn.Module, ...]:
        """See :meth:`.Backbone.attention_of`."""
        return (block.attn.w_msa,)

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        return standard_parts(block.norm1, block.attn.w_msa, block.norm2, block.ffn, padded=True)

    def convert_attention(self, attention: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_attention`; its scores are an edge."""
        return add_scores_edge(super().convert_attention(attention, name, spec), name, spec)

    def fixed_size(self, net: nn.Module) -> Optional[Tuple[int, int]]:
        """See :meth:`.Backbone.fixed_size`: mmdet and mmseg add an absolute position embedding without resizing it."""
        absolute = getattr(net, 'absolute_pos_embed', None)
        if not getattr(net, 'use_abs_pos_embed', False) or hasattr(net, 'interpolate_mode'):
            return None
        side = math.isqrt(absolute.shape[1]) * self.patch(net)  # a square: pretrain_img_size is not kept
        return side, side

    def min_side(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.min_side`."""
        return smallest_side(net, self.patch(net)) or super().min_side(net)

    def dynamic_size(self, net: nn.Module) -> bool:
        """See :meth:`.Backbone.dynamic_size`."""
        return cuts_any_size(net)

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [
            (f'the stream of stage {i + 1}', lambda i=i: self._stage(model, net, i)) for i in range(len(net.stages))
        ]

    def _stage(self, model: nn.Module, net: nn.Module, number: int) -> Stream:
        need(number > 0, BEHIND_A_NORM)
        need(not getattr(net, 'out_after_downsample', False), 'outputs after the patch merging')
        stage, readers = net.stages[number], []
        if stage.downsample is not None:
            merging = stage.downsample
            readers.append(StreamReader(merging.norm, (merging.reduction,), tokens=4, interleaved=True))
        if number in net.out_indices:
            level = list(net.out_indices).index(number)
            readers.append(output_reader(model, getattr(net, f'norm{number}'), level, len(net.out_indices)))
        return stream(net.stages[number - 1].downsample.reduction, map(self.parts, stage.blocks), readers)


@register_backbone
class PretrainingSwin(Swin):
    """SimMIMSwinTransformer of mmpretrain, which extracts features without a mask."""

    names = ('mmpretrain.models.selfsup.simmim.SimMIMSwinTransformer',)
    edges = ()
    others = {**Swin.others, **dict.fromkeys(names, converts_network(FeaturesMixin, *Swin.edges))}
