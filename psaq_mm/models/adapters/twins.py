# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Twins: PCPVT and SVT of mmseg and mmpretrain.

PCPVT attends to reduced maps; SVT does so in every second block, and attends inside of windows in the others (Twins,
arXiv 2104.13840, section 3). The two libraries share the attention inside of windows. That to reduced maps is MiT's in
mmseg, and has layers ``q`` and ``kv`` in mmpretrain.
"""

from typing import Any, List, Mapping, Optional, Tuple

import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.models.adapters.attention import attend, attend_heads
from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import (
    BlockParts,
    Feed,
    Writer,
    feed_forward,
    join,
    quantize_outputs,
    standard_parts,
)
from psaq_mm.models.adapters.pyramid import (
    adopt_reduced_attention,
    divides_graphs,
    reduced_attention_parts,
    smallest_side,
)
from psaq_mm.models.adapters.streams import BEHIND_A_NORM, NamedStreams, need
from psaq_mm.models.adapters.windows import fill_padding, valid_query_rows
from psaq_mm.quantization import AdapterSpec, AttentionParts, Projection, apply_edge, apply_layer, padded, row_mask_of

__all__ = [
    'MMSegTwins',
    'QuantGlobalAttentionMixin',
    'QuantLocalAttentionMixin',
    'QuantMMSegGlobalBlockMixin',
    'QuantTwinsBlockMixin',
    'Twins',
]

_MMSEG, _MMPRETRAIN = 'mmseg.models.backbones.twins', 'mmpretrain.models.backbones.twins'


class QuantTwinsBlockMixin:
    """A block whose two residual sums are edges."""

    attention_options: Mapping[str, Any] = {}

    def forward(self, x: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
        """(B, H * W, C) to (B, H * W, C)."""
        attended = self.attn(self.norm1(x), hw_shape, **self.attention_options)
        x = apply_edge(self.residual1_quantizer, x + self.drop_path(attended))
        return apply_edge(self.residual2_quantizer, x + self.drop_path(self.ffn(self.norm2(x))))


class QuantMMSegGlobalBlockMixin(QuantTwinsBlockMixin):
    """mmseg's block with attention to a reduced map, which would add its input a second time."""

    attention_options = dict(identity=0.0)


class QuantLocalAttentionMixin:
    """Attention inside of windows (``LocallyGroupedSelfAttention``), which cuts the map by itself.

    The output projection runs before the windows are joined: padded rows then take no part in calibration, and patch
    similarity is that of a window, as in Swin.
    """

    def forward(self, x: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
        """(B, H * W, C) to (B, H * W, C)."""
        batch, tokens, channels = x.shape
        (height, width), window = hw_shape, self.window_size
        valid = valid_query_rows(height, width, window, device=x.device)
        x = F.pad(x.view(batch, height, width, channels), (0, 0, 0, -width % window, 0, -height % window))
        down, across = x.shape[1] // window, x.shape[2] // window
        x = x.reshape(batch, down, window, across, window, channels).transpose(2, 3).flatten(0, 2).flatten(1, 2)
        with padded(self, valid):
            x = self._attend(x, _mask(valid, height, width, window))
        x = x.reshape(batch, down, across, window, window, channels).transpose(2, 3)
        x = x.reshape(batch, down * window, across * window, channels)[:, :height, :width]
        return x.reshape(batch, tokens, channels)

    def _attend(self, x: Tensor, mask: Optional[Tensor]) -> Tensor:
        """Tokens of windows, (B * windows, N, C) to (B * windows, N, C)."""
        padding = row_mask_of(self)
        rows = None if padding is None else padding.rows(x)
        if rows is not None:
            x = fill_padding(x, rows, self.qkv)

        def weights(scores: Tensor) -> Tensor:
            scores = scores * self.scale
            if mask is not None:
                scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
            return self.attn_drop(scores.softmax(dim=-1))

        x, _ = attend(self, x, lambda q, k: (q, k), weights, rows)
        return self.proj_drop(apply_layer(self.proj, x, rows))


def _mask(valid: Optional[Tensor], height: int, width: int, window: int) -> Optional[Tensor]:
    """What the libraries add to the scores of padded windows, (windows, N, N); None: nothing.

    Tokens do not attend to padding, nor padding to tokens. Where only one side of the map is padded the libraries mark
    every token (their slice from -0 on is all of it), and so mask nothing.
    """
    if valid is None or not height % window or not width % window:
        return None
    return (valid[:, :, None] != valid[:, None]).float() * -1000.0


class QuantGlobalAttentionMixin:
    """mmpretrain's attention to a reduced map (``GlobalSubsampledAttention``) with explicit products."""

    def attention_parts(self) -> AttentionParts:
        """See :func:`psaq_mm.quantization.attention_parts`."""
        width = self.embed_dims
        projections = Projection(self.q, 0, width), Projection(self.kv, 0, width), Projection(self.kv, width, width)
        return AttentionParts(self.num_heads, *projections, self.proj)

    def forward(self, x: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
        """(B, H * W, C) to (B, H * W, C)."""
        q = self._heads(self.q(x), 1)[0]
        if self.sr_ratio > 1:
            x = self.sr(x.permute(0, 2, 1).unflatten(2, tuple(hw_shape)))
            x = self.norm(x.flatten(2).permute(0, 2, 1))
        k, v = self._heads(self.kv(x), 2)
        # Given a qk_scale, whatever its value, the library divides by head_dims ** -0.5.
        divisor = getattr(self.scaled_dot_product_attention, 'keywords', {}).get('scale', self.head_dims**0.5)
        x = attend_heads(
            self, q / divisor, k, v, lambda scores: F.dropout(scores.softmax(dim=-1), self.attn_drop, self.training)
        )
        x = self.out_drop(self.proj_drop(self.proj(x)))
        return v.squeeze(1) + x if self.v_shortcut else x

    def _heads(self, x: Tensor, parts: int) -> Tuple[Tensor, ...]:
        """(B, N, parts * C) to each part as (B, heads, N, head_dims)."""
        return x.unflatten(-1, (parts, self.num_heads, self.head_dims)).permute(2, 0, 3, 1, 4).unbind(0)


class _Twins(Backbone):
    """What PCPVT and SVT of both libraries have in common. ``stages`` is the name of the list of lists of blocks."""

    stages = ''

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        if not hasattr(block.attn, 'sr_ratio'):
            return standard_parts(block.norm1, block.attn, block.norm2, block.ffn, padded=True)
        feed, inner, writer = reduced_attention_parts(block.norm1, block.attn)
        network = feed_forward(block.ffn)
        writers = (writer, Writer(network.last))
        return BlockParts((feed, Feed(block.norm2, network.first)), writers, network.hidden, inner)

    def min_side(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.min_side`: windows are padded, so that the reduced maps alone count."""
        ratios = [max(getattr(block.attn, 'sr_ratio', 1) for block in blocks) for blocks in getattr(net, self.stages)]
        return smallest_side(zip(_strides(net), ratios))

    def dynamic_size(self, net: nn.Module) -> bool:
        """See :meth:`.Backbone.dynamic_size`: how windows are padded is fixed in a graph."""
        return divides_graphs(_strides(net)) and all(
            hasattr(block.attn, 'sr_ratio') for _, block in self.block_list(net)
        )

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`: each stage begins behind a LayerNorm."""
        count = len(getattr(net, self.stages))
        return [(f'the stream of stage {i + 1}', lambda: need(False, BEHIND_A_NORM)) for i in range(count)]


def _strides(net: nn.Module) -> List[int]:
    return [max(embedding.projection.stride) for embedding in net.patch_embeds]


def _stage_edges(net: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    """What blocks read: the embedding of each stage, and its map with the positions that follow from its content."""
    stages = range(len(net.patch_embeds))
    drops = [f'position_encoding_drops.{i}' for i in stages]
    quantize_outputs(net, name, spec, [*drops, *(f'position_encodings.{i}' for i in stages)])
    return net


@register_backbone
class MMSegTwins(_Twins):
    """PCPVT and SVT of mmseg."""

    names = f'{_MMSEG}.PCPVT', f'{_MMSEG}.SVT'
    stages = 'layers'
    block_path = r'layers\.\d+\.\d+'
    blocks = {
        f'{_MMSEG}.GSAEncoderLayer': QuantMMSegGlobalBlockMixin,
        f'{_MMSEG}.LSAEncoderLayer': QuantTwinsBlockMixin,
    }
    attention = {
        'mmseg.models.backbones.mit.EfficientMultiheadAttention': None,  # converted with its block
        f'{_MMSEG}.LocallyGroupedSelfAttention': QuantLocalAttentionMixin,
    }
    others = dict.fromkeys(names, _stage_edges)

    def convert_block(self, block: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_block`."""
        if hasattr(block.attn, 'sr_ratio'):
            adopt_reduced_attention(block.attn, join(name, 'attn'), spec)
        return super().convert_block(block, name, spec)


@register_backbone
class Twins(_Twins):
    """PCPVT and SVT of mmpretrain."""

    names = f'{_MMPRETRAIN}.PCPVT', f'{_MMPRETRAIN}.SVT'
    stages = 'stages'
    block_path = r'stages\.\d+\.\d+'
    blocks = dict.fromkeys((f'{_MMPRETRAIN}.GSAEncoderLayer', f'{_MMPRETRAIN}.LSAEncoderLayer'), QuantTwinsBlockMixin)
    attention = {
        f'{_MMPRETRAIN}.GlobalSubsampledAttention': QuantGlobalAttentionMixin,
        f'{_MMPRETRAIN}.LocallyGroupedSelfAttention': QuantLocalAttentionMixin,
    }
    others = dict.fromkeys(names, _stage_edges)
