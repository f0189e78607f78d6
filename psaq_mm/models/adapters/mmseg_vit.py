# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Vision Transformer of mmseg, whose attention is mmcv's wrapper around ``nn.MultiheadAttention``.

``nn.MultiheadAttention`` holds its three input projections in one parameter, ``in_proj_weight``, which belongs to no
layer, and reads the weight of ``out_proj`` without calling it. Here both are layers that are called, so that they are
quantized, calibrated and tapped as any other. Every parameter keeps its place and its key.
"""

from typing import Optional, Tuple

import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models.adapters.attention import CheckpointedBlockMixin, adopt_attention, attend
from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, adopt_block, join, standard_parts
from psaq_mm.quantization import AdapterSpec, apply_edge, is_quantized_layer

__all__ = ['MMSegVisionTransformer', 'PackedProjection', 'QuantPackedAttentionMixin', 'QuantMMSegEncoderLayerMixin']


class PackedProjection(nn.Linear):
    """The packed query, key and value projection of an ``nn.MultiheadAttention``, as a layer.

    It owns no parameter: ``weight`` and ``bias`` are the attention's ``in_proj_weight`` and ``in_proj_bias``, looked up
    at each use, so that loading, moving or averaging may replace them. Its only state-dict keys are its quantizers'.

    Args:
        attention: Whose projection it is: one width of queries, keys and values.
    """

    def __init__(self, attention: nn.MultiheadAttention):
        nn.Module.__init__(self)
        self.in_features = attention.embed_dim
        self.out_features = 3 * attention.embed_dim
        # In a tuple: as an attribute of its own, the parent would become a child of its child.
        self._attention = (attention,)

    @property
    def weight(self) -> Tensor:
        """(3 * embed_dim, embed_dim)."""
        return self._attention[0].in_proj_weight

    @property
    def bias(self) -> Optional[Tensor]:
        """(3 * embed_dim), or None."""
        return self._attention[0].in_proj_bias


class QuantPackedAttentionMixin:
    """Self-attention of ``nn.MultiheadAttention`` as explicit products; ``qkv`` is a :class:`PackedProjection`.

    It computes batch first, which changes only the order of rows in its projections: the output is the library's to
    rounding.
    """

    @property
    def proj(self) -> nn.Linear:
        """The output projection, under the name that attention has elsewhere."""
        return self.out_proj

    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor] = None,
        value: Optional[Tensor] = None,
        attn_mask: Optional[Tensor] = None,
        key_padding_mask: Optional[Tensor] = None,
    ) -> Tuple[Tensor, None]:
        """Self-attention of ``query``, which ``key`` and ``value`` equal.

        Args:
            query: (N, B, C), or (B, N, C) with ``batch_first``.
            key: Not read.
            value: Not read.
            attn_mask: None.
            key_padding_mask: None.

        Returns:
            Output, shaped as ``query``, and None in place of the attention weights.

        Raises:
            UnsupportedModelError: A mask is given, which no Vision Transformer of the library does.
        """
        if attn_mask is not None or key_padding_mask is not None:
            raise UnsupportedModelError(
                "attn_mask and key_padding_mask are not supported in the quantized attention of mmseg's "
                'VisionTransformer: leave them None'
            )
        x = query if self.batch_first else query.transpose(0, 1)
        x, _ = attend(
            self,
            x,
            lambda q, k: (q / self.head_dim**0.5, k),
            lambda scores: F.dropout(scores.softmax(dim=-1), self.dropout, self.training),
        )
        x = self.out_proj(x)
        return (x if self.batch_first else x.transpose(0, 1)), None

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # The projection cannot tell by itself that full-precision weights are loaded: their key is not its own.
        if f'{prefix}in_proj_weight' in state_dict and f'{prefix}qkv.input_quantizer.fill' not in state_dict:
            if is_quantized_layer(self.qkv):
                self.qkv.input_quantizer.forget_folding()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class QuantMMSegEncoderLayerMixin(CheckpointedBlockMixin):
    """A transformer layer whose two residual sums are edges."""

    def _block(self, x: Tensor) -> Tensor:
        x = apply_edge(self.residual1_quantizer, self.attn(self.norm1(x), identity=x))
        return apply_edge(self.residual2_quantizer, self.ffn(self.norm2(x), identity=x))


@register_backbone
class MMSegVisionTransformer(Backbone):
    """VisionTransformer of mmseg."""

    names = ('mmseg.models.backbones.vit.VisionTransformer',)
    block_path = r'layers\.\d+'
    blocks = {'mmseg.models.backbones.vit.TransformerEncoderLayer': QuantMMSegEncoderLayerMixin}
    attention = {'mmcv.cnn.bricks.transformer.MultiheadAttention': None}  # converted with its block
    edges = ('patch_embed.norm', 'drop_after_pos', 'pre_ln')

    def convert_block(self, block: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_block`."""
        attention = adopt_attention(block.attn.attn, QuantPackedAttentionMixin, join(name, 'attn.attn'), spec)
        attention.qkv = PackedProjection(attention)
        # torch's own class for it is a Linear in all but name: the name keeps torch's converters away, as nobody calls
        # it.
        attention.out_proj.__class__ = nn.Linear
        return adopt_block(block, QuantMMSegEncoderLayerMixin, self.parts(block), name, spec)

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        return standard_parts(block.norm1, block.attn.attn, block.norm2, block.ffn)

    def prefix_tokens(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.prefix_tokens`; the parameter is there all the same."""
        return int(net.with_cls_token)
