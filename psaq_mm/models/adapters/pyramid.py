# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""MixVisionTransformer (MiT, of SegFormer) of mmseg, PyramidVisionTransformer and its version 2 of mmdet.

Both attend from every position to a reduced map (spatial reduction: a convolution whose stride is its size, and a
LayerNorm), so that queries have one projection, and keys and values together another one. Their feed-forward network is
of convolutions: 1 x 1, a depthwise 3 x 3 in MiT and in PVT v2, 1 x 1 (SegFormer, arXiv 2105.15203, section 3.1; PVT v2,
arXiv 2106.13797, section 3.3).
"""

import math
from typing import Iterable, Tuple

from torch import Tensor, nn

from psaq_mm.models.adapters.attention import CheckpointedBlockMixin
from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, Feed, Writer, join, quantize_outputs
from psaq_mm.models.adapters.packed_attention import adopt_packed
from psaq_mm.models.adapters.streams import BEHIND_A_NORM, NamedStreams, need
from psaq_mm.quantization import AdapterSpec, apply_edge, attention_parts

__all__ = ['MixVisionTransformer', 'PyramidVisionTransformer', 'QuantPyramidBlockMixin', 'adopt_reduced_attention']


class QuantPyramidBlockMixin(CheckpointedBlockMixin):
    """A block whose two residual sums are edges."""

    def _block(self, x: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
        x = apply_edge(self.residual1_quantizer, self.attn(self.norm1(x), hw_shape, identity=x))
        return apply_edge(self.residual2_quantizer, self.ffn(self.norm2(x), hw_shape, identity=x))


def adopt_reduced_attention(attention: nn.Module, name: str, spec: AdapterSpec) -> None:
    """Convert the ``nn.MultiheadAttention`` inside of attention to a reduced map (``sr_ratio``), in place."""
    inputs = ('q', 'kv') if attention.sr_ratio > 1 else ('qkv',)
    adopt_packed(attention.attn, join(name, 'attn'), spec, inputs)


def reduced_attention_parts(norm: nn.Module, attention: nn.Module) -> Tuple[Feed, Tuple[Feed, ...], Writer]:
    """Parts of attention to a reduced map: what ``norm`` before it feeds, the norm inside of it, and its writer.

    Args:
        norm: Before the attention. With a reduction, queries and the reducing convolution both read it.
        attention: Has ``sr_ratio``, ``sr`` and ``norm``; :func:`psaq_mm.quantization.attention_parts` tells the parts
            of ``attention.attn`` or, without that, of itself.
    """
    parts = attention_parts(getattr(attention, 'attn', attention))
    if attention.sr_ratio <= 1:
        read = dict.fromkeys((parts.queries.layer, parts.keys.layer))
        return Feed(norm, tuple(read)), (), Writer(parts.proj)
    inner = Feed(attention.norm, (parts.keys.layer,))
    return Feed(norm, (parts.queries.layer, attention.sr)), (inner,), Writer(parts.proj)


def smallest_side(stages: Iterable[Tuple[int, int]]) -> int:
    """The least side of a picture in pixels, of (stride, reduction) of each stage: each reduced map has a position."""
    total, sides = 1, []
    for stride, reduction in stages:
        total *= stride
        sides.append(total * reduction)
    return max(sides)


def divides_graphs(strides: Iterable[int]) -> bool:
    """Whether the embeddings of all stages cut a picture whose sides are multiples of 32 pixels, as a graph of every
    size takes them, without a rest.
    """
    return 32 % math.prod(strides) == 0


class _Pyramid(Backbone):
    """What the three have in common: stages of (embedding, blocks, norm)."""

    block_path = r'layers\.\d+\.1\.\d+'

    def convert_block(self, block: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_block`."""
        adopt_reduced_attention(block.attn, join(name, 'attn'), spec)
        return super().convert_block(block, name, spec)

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`. The first layer of the feed-forward network is a 1 x 1 convolution, which takes
        the scales of the norm before it.
        """
        feed, inner, writer = reduced_attention_parts(block.norm1, block.attn)
        convolutions = [layer for layer in block.ffn.layers if isinstance(layer, nn.Conv2d)]
        feeds = (feed, Feed(block.norm2, (convolutions[0],)))
        # The activation is behind the depthwise convolution where there is one.
        return BlockParts(feeds, (writer, Writer(convolutions[-1])), (convolutions[-2],), inner)

    def min_side(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.min_side`."""
        return smallest_side(zip(net.strides, net.sr_ratios))

    def dynamic_size(self, net: nn.Module) -> bool:
        """See :meth:`.Backbone.dynamic_size`."""
        return divides_graphs(net.strides)

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`: each stage begins behind a LayerNorm."""
        return [(f'the stream of stage {i + 1}', lambda: need(False, BEHIND_A_NORM)) for i in range(len(net.layers))]


def _stage_edges(net: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    """What the first block of each stage reads: the embedding after its norm, and with the positions of PVT."""
    for i, (_, blocks, _) in enumerate(net.layers):
        positions = [f'layers.{i}.1.0.drop'] if hasattr(blocks[0], 'pos_embed') else []
        quantize_outputs(net, name, spec, [f'layers.{i}.0.norm', *positions])
    return net


@register_backbone
class MixVisionTransformer(_Pyramid):
    """MixVisionTransformer of mmseg."""

    names = ('mmseg.models.backbones.mit.MixVisionTransformer',)
    blocks = {'mmseg.models.backbones.mit.TransformerEncoderLayer': QuantPyramidBlockMixin}
    attention = {'mmseg.models.backbones.mit.EfficientMultiheadAttention': None}  # converted with its block
    others = dict.fromkeys(names, _stage_edges)


@register_backbone
class PyramidVisionTransformer(_Pyramid):
    """PyramidVisionTransformer and PyramidVisionTransformerV2 of mmdet. The position embedding is resized."""

    names = tuple(f'mmdet.models.backbones.pvt.PyramidVisionTransformer{version}' for version in ('', 'V2'))
    blocks = {'mmdet.models.backbones.pvt.PVTEncoderLayer': QuantPyramidBlockMixin}
    attention = {'mmdet.models.backbones.pvt.SpatialReductionAttention': None}  # converted with its block
    others = dict.fromkeys(names, _stage_edges)

    def block_list(self, net: nn.Module) -> Iterable[Tuple[str, nn.Module]]:
        """See :meth:`.Backbone.block_list`: without the position embeddings, the first entries of the lists."""
        return ((name, part) for name, part in super().block_list(net) if not hasattr(part, 'pos_embed'))
