# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""ConvNeXt of mmpretrain, which mmdet and mmseg use, and of timm; version 2, with global response normalization, too.

A block is a depthwise convolution, a LayerNorm, and a feed-forward network of Linear layers or 1 x 1 convolutions
(ConvNeXt, arXiv 2201.03545, section 2.6). It has no attention: patch similarity cannot be measured. Global response
normalization (ConvNeXt V2, arXiv 2301.00808, section 3) multiplies an activation with a statistic of itself and stays
in floating point; reports name it.
"""

import math
from typing import Optional, Tuple

from torch import Tensor, nn

from psaq_mm.contexts import replaced
from psaq_mm.models.adapters.attention import CheckpointedBlockMixin
from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, Feed, Writer, join, mark_norm, mark_parts, quantize_outputs
from psaq_mm.models.adapters.match import class_named
from psaq_mm.models.adapters.streams import NamedStreams, need
from psaq_mm.quantization import AdapterSpec, adopt, apply_edge, edge_quantizer, feeds_activation, keep_float

__all__ = ['ConvNeXt', 'QuantConvNeXtBlockMixin', 'TimmConvNeXt']

_SPARSE = ('mmpretrain.models.backbones.sparse_convnext.SparseConvNeXt',)


class QuantConvNeXtBlockMixin(CheckpointedBlockMixin):
    """A block whose residual sum, its output, is an edge."""

    def _block(self, x: Tensor) -> Tensor:
        with replaced(self, 'with_cp', False):  # the library's own checkpointing is reentrant
            x = super(CheckpointedBlockMixin, self).forward(x)
        return apply_edge(self.residual_quantizer, x)


def _convert_response_norm(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    keep_float(module, 'multiplies an activation with a statistic of itself')
    return module


class _ConvNeXt(Backbone):
    """What both libraries' have in common."""

    def attention_of(self, block: nn.Module) -> Tuple[nn.Module, ...]:
        """See :meth:`.Backbone.attention_of`."""
        return ()

    def convert_block(self, block: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_block`."""
        mark_parts(self.parts(block))
        block = adopt(block, QuantConvNeXtBlockMixin)
        block.residual_quantizer = edge_quantizer(spec, join(name, 'residual'))
        return block

    def min_side(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.min_side`: one position of the last map."""
        convolutions = (part for part in net.modules() if isinstance(part, nn.Conv2d) and part.groups == 1)
        return math.prod(max(part.stride) for part in convolutions)

    def dynamic_size(self, net: nn.Module) -> bool:
        """See :meth:`.Backbone.dynamic_size`; the head that a timm network holds takes one size."""
        return not hasattr(net, 'forward_head')

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        reason = 'depthwise convolutions read its channels one by one'
        return [('the stream of each stage', lambda: need(False, reason))]


def _convert_network(net: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    """The stem ends in a LayerNorm, which the first block reads, and each later stage begins with one."""
    stem, *others = net.downsample_layers
    feeds_activation(stem[0])
    quantize_outputs(net, name, spec, ['downsample_layers.0.1'])
    for downsample in others:
        mark_norm(*downsample)
    return net


@register_backbone
class ConvNeXt(_ConvNeXt):
    """ConvNeXt of mmpretrain."""

    names = ('mmpretrain.models.backbones.convnext.ConvNeXt',)
    block_path = r'stages\.\d+\.\d+'
    blocks = {'mmpretrain.models.backbones.convnext.ConvNeXtBlock': QuantConvNeXtBlockMixin}
    others = {
        **dict.fromkeys(names, _convert_network),
        'mmpretrain.models.utils.norm.GRN': _convert_response_norm,
    }

    def describes(self, net: nn.Module) -> bool:
        """See :meth:`.Backbone.describes`. The form for pretraining is refused with a reason of its own."""
        return super().describes(net) or class_named(net, _SPARSE) is not None

    def unsupported(self, net: nn.Module) -> Optional[str]:
        """See :meth:`.Backbone.unsupported`."""
        if class_named(net, _SPARSE):
            return 'its masks are made while it is pretrained; load its weights into mmpretrain.ConvNeXt'
        return None

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`. The norm reads a branch, not the stream."""
        hidden = block.depthwise_conv, block.pointwise_conv1
        inner = Feed(block.norm, (block.pointwise_conv1,))
        return BlockParts((), (Writer(block.pointwise_conv2, block.gamma),), hidden, (inner,))


def _convert_timm_network(net: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    """As :func:`_convert_network`, of the stem."""
    feeds_activation(net.stem[-2])
    quantize_outputs(net, name, spec, [f'stem.{len(net.stem) - 1}'])
    return net


def _convert_timm_stage(stage: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    if isinstance(stage.downsample, nn.Sequential):
        mark_norm(*stage.downsample)
    return stage


@register_backbone
class TimmConvNeXt(_ConvNeXt):
    """ConvNeXt of timm. With ``features_only=True``, timm takes the model apart: its stages are ``stages_0``, ..."""

    names = ('timm.models.convnext.ConvNeXt',)
    wrappers = ('timm.models._features.FeatureListNet',)
    block_path = r'stages[._]\d+\.blocks\.\d+'
    blocks = {'timm.models.convnext.ConvNeXtBlock': QuantConvNeXtBlockMixin}
    others = {
        **dict.fromkeys(names, _convert_timm_network),
        'timm.models.convnext.ConvNeXtStage': _convert_timm_stage,
        'timm.layers.grn.GlobalResponseNorm': _convert_response_norm,
    }

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`. The norm reads a branch, not the stream."""
        inner = Feed(block.norm, (block.mlp.fc1,))
        return BlockParts((), (Writer(block.mlp.fc2, block.gamma),), (block.conv_dw, block.mlp.fc1), (inner,))
