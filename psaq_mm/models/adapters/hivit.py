# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""HiViT of mmpretrain, and its relatives of masked pre-training: MAEHiViT and iTPNHiViT.

The first stages have blocks without attention (HiViT, arXiv 2205.14949, section 3.3), on tokens (B, patches, rows,
columns, C) inside of each patch.
"""

from typing import Optional, Tuple

from torch import Tensor, nn

from psaq_mm.models.adapters.attention import attend
from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, Feed, Writer
from psaq_mm.models.adapters.match import class_named
from psaq_mm.models.adapters.pretraining import FeaturesMixin, converts_network
from psaq_mm.models.adapters.streams import BEHIND_A_NORM, NamedStreams, Stream, need
from psaq_mm.models.adapters.windows import add_scores_edge
from psaq_mm.quantization import AdapterSpec, StreamReader, apply_edge

__all__ = ['HiViT', 'PretrainingHiViT', 'QuantHiViTAttentionMixin', 'QuantHiViTBlockMixin']

_MODULE = 'mmpretrain.models.backbones.hivit'
_MERGING = f'{_MODULE}.PatchMerge'


class QuantHiViTAttentionMixin:
    """Self-attention whose two matrix products are :class:`QuantMatMul`."""

    def forward(self, x: Tensor, rpe_index: Optional[bool] = None, mask: Optional[Tensor] = None) -> Tensor:
        """Self-attention.

        Args:
            x: (B, N, C).
            rpe_index: Not None: the relative position bias is added.
            mask: (B, N), 0 for keys that are left out, or None.

        Returns:
            (B, N, C).
        """

        def weights(scores: Tensor) -> Tensor:
            if rpe_index is not None:
                index = self.relative_position_index
                bias = self.relative_position_bias_table.t()[:, index.flatten()]
                scores = scores + bias.reshape(1, *scores.shape[1:])
            scores = apply_edge(self.scores_quantizer, scores)
            if mask is not None:
                scores = scores.masked_fill(~mask.bool()[:, None, None, :], float('-inf'))
            return self.attn_drop(self.softmax(scores))

        x, _ = attend(self, x, lambda q, k: (q * self.scale, k), weights)
        return self.proj_drop(self.proj(x))


class QuantHiViTBlockMixin:
    """A block, with or without attention, whose residual sums are edges."""

    def forward(self, x: Tensor, rpe_index: Optional[bool] = None, mask: Optional[Tensor] = None) -> Tensor:
        """(B, N, C), or without attention (..., C), to the same shape."""
        if self.attn is not None:
            branch = self.attn(self.norm1(x), rpe_index, mask)
            branch = branch if self.gamma_1 is None else self.gamma_1 * branch
            x = apply_edge(self.residual1_quantizer, x + self.drop_path(branch))
        branch = self.mlp(self.norm2(x))
        branch = branch if self.gamma_2 is None else self.gamma_2 * branch
        return apply_edge(self.residual2_quantizer, x + self.drop_path(branch))


class QuantHiViTMixin:
    """The network, whose position embedding is resized for plain numbers also in a trace."""

    keeps_name = True

    def interpolate_pos_encoding(self, x: Tensor, h: int, w: int) -> Tensor:
        """As the library's: position embedding (1, N, C) of an image of height ``h`` and width ``w``, in pixels."""
        return super().interpolate_pos_encoding(x, int(h), int(w))


class PretrainingHiViTMixin(FeaturesMixin, QuantHiViTMixin):
    """MAEHiViT and iTPNHiViT."""


@register_backbone
class HiViT(Backbone):
    """HiViT of mmpretrain."""

    names = (f'{_MODULE}.HiViT',)
    block_path = r'blocks\.\d+'
    blocks = {f'{_MODULE}.BlockWithRPE': QuantHiViTBlockMixin, _MERGING: None}
    attention = {f'{_MODULE}.Attention': QuantHiViTAttentionMixin}
    others = {f'{_MODULE}.HiViT': converts_network(QuantHiViTMixin, 'patch_embed.norm', 'pos_drop')}

    def attention_of(self, block: nn.Module) -> Tuple[nn.Module, ...]:
        """See :meth:`.Backbone.attention_of`."""
        attention = getattr(block, 'attn', None)
        return () if attention is None else (attention,)

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        if class_named(block, (_MERGING,)):
            return BlockParts((Feed(block.norm, (block.reduction,)),), ())
        feeds = (Feed(block.norm2, (block.mlp.fc1,)),)
        writers = (Writer(block.mlp.fc2, block.gamma_2),)
        if block.attn is not None:
            feeds = (Feed(block.norm1, (block.attn.qkv,)), *feeds)
            writers = (Writer(block.attn.proj, block.gamma_1), *writers)
        return BlockParts(feeds, writers, (block.mlp.fc1,))

    def convert_attention(self, attention: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_attention`; its scores are an edge."""
        return add_scores_edge(super().convert_attention(attention, name, spec), name, spec)

    def convert_block(self, block: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_block`; without attention there is one residual sum."""
        block = super().convert_block(block, name, spec)
        if not self.attention_of(block):
            block.residual1_quantizer = None
        return block

    def patch(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.patch`: a patch of the attention."""
        return net.patch_size

    def fixed_size(self, net: nn.Module) -> Optional[Tuple[int, int]]:
        """See :meth:`.Backbone.fixed_size`: the relative position bias has one size."""
        return tuple(net.patch_embed.img_size) if net.rpe else None

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [
            (f'the stream of stage {i + 1}', lambda i=i: self._stage(net, i))
            for i in range(len(self._mergings(net)) + 1)
        ]

    def _mergings(self, net: nn.Module) -> Tuple[int, ...]:
        return tuple(i for i, block in enumerate(net.blocks) if class_named(block, (_MERGING,)))

    def _stage(self, net: nn.Module, number: int) -> Stream:
        """The stream between two patch mergings: their norms and reductions bound it."""
        ends = self._mergings(net)
        need(number > 0, BEHIND_A_NORM)
        need(number < len(ends), 'it is an output of the backbone, which no LayerNorm reads')
        first, last = ends[number - 1], ends[number]
        need(not set(range(first, last)) & set(net.out_indices), 'it is an output of the backbone')
        parts = [self.parts(block) for block in net.blocks[first + 1 : last]]
        merging = net.blocks[last]
        readers = [StreamReader(feed.norm, feed.layers) for part in parts for feed in part.feeds]
        readers.append(StreamReader(merging.norm, (merging.reduction,), tokens=4))
        reduction = net.blocks[first].reduction
        writers = [Writer(reduction), *(writer for part in parts for writer in part.writers)]
        return Stream(reduction.out_features, writers, [], readers)


@register_backbone
class PretrainingHiViT(HiViT):
    """MAEHiViT and iTPNHiViT of mmpretrain, which extract features without a mask."""

    names = ('mmpretrain.models.selfsup.mae.MAEHiViT', 'mmpretrain.models.selfsup.itpn.iTPNHiViT')
    others = dict.fromkeys(names, converts_network(PretrainingHiViTMixin, 'patch_embed.norm', 'pos_drop'))
