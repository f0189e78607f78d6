# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Swin Transformer of timm, as mmpretrain's ``TimmClassifier`` and ``TIMMBackbone`` build it.

It differs from OpenMMLab's in the order of two steps: timm shifts the token map first and pads it afterwards, so that
the padding is at the right and at the bottom whatever the shift. With every quantizer off, the output is that of timm's
own unfused attention to the last bit.
"""

from typing import Optional, Tuple

from torch import Tensor, nn

from psaq_mm.models.adapters.backbone import Backbone, register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, is_identity
from psaq_mm.models.adapters.match import class_named
from psaq_mm.models.adapters.streams import BEHIND_A_NORM, NamedStreams, Stream, need, stream
from psaq_mm.models.adapters.swin import convert_merging
from psaq_mm.models.adapters.timm_vit import strict_size, timm_parts
from psaq_mm.models.adapters.windows import Cut, CutMixin, WindowAttentionMixin, add_scores_edge
from psaq_mm.quantization import AdapterSpec, StreamReader, apply_edge

__all__ = ['QuantTimmSwinBlockMixin', 'TimmCutMixin', 'TimmSwin']


class TimmCutMixin(CutMixin):
    """timm's shifting and padding in a method of the block."""

    cut_method = '_attn'

    def window_attention(self) -> nn.Module:
        """See :meth:`.CutMixin.window_attention`."""
        return self.attn

    def cut(self, height: int, width: int) -> Cut:
        """See :meth:`.CutMixin.cut`."""
        return Cut(tuple(self.window_size), tuple(self.shift_size), pad_first=False)

    def _attn(self, x: Tensor) -> Tensor:
        with self.cutting(*x.shape[1:3], x.device):
            return super()._attn(x)


class QuantTimmSwinBlockMixin(TimmCutMixin):
    """A Swin block whose two residual sums are edges, and which tells its attention which rows are padding."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        B, H, W, C = x.shape
        x = apply_edge(self.residual1_quantizer, x + self.drop_path1(self._attn(self.norm1(x))))
        x = x.reshape(B, -1, C)
        x = apply_edge(self.residual2_quantizer, x + self.drop_path2(self.mlp(self.norm2(x))))
        return x.reshape(B, H, W, C)


@register_backbone
class TimmSwin(Backbone):
    """SwinTransformer of timm. With ``features_only=True``, timm takes the model apart: only its stages are left, as
    ``layers_0``, ``layers_1``, ...
    """

    names = ('timm.models.swin_transformer.SwinTransformer',)
    wrappers = ('timm.models._features.FeatureListNet',)
    block_path = r'layers[._]\d+\.blocks\.\d+'
    blocks = {'timm.models.swin_transformer.SwinTransformerBlock': QuantTimmSwinBlockMixin}
    attention = {'timm.models.swin_transformer.WindowAttention': WindowAttentionMixin}
    others = {'timm.models.swin_transformer.PatchMerging': convert_merging}

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`."""
        return timm_parts(block, padded=True)

    def unsupported(self, net: nn.Module) -> Optional[str]:
        """See :meth:`.Backbone.unsupported`."""
        if any(class_named(block, self.blocks, '_attn') is None for _, block in self.block_list(net)):
            return 'its blocks override _attn'
        return None

    def convert_attention(self, attention: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_attention`; its scores are an edge."""
        return add_scores_edge(super().convert_attention(attention, name, spec), name, spec)

    def fixed_size(self, net: nn.Module) -> Optional[Tuple[int, int]]:
        """See :meth:`.Backbone.fixed_size`."""
        return strict_size(net) if hasattr(net, 'patch_embed') else None

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        layers = getattr(net, 'layers', ())  # none where timm has taken the model apart
        return [(f'the stream of stage {i + 1}', lambda i=i: self._stage(net, i)) for i in range(len(layers))]

    def _stage(self, net: nn.Module, number: int) -> Stream:
        need(number > 0, BEHIND_A_NORM)
        stage = net.layers[number]
        if number + 1 < len(net.layers):
            merging = net.layers[number + 1].downsample
            reader = StreamReader(merging.norm, (merging.reduction,), tokens=4)
        else:
            need(
                isinstance(getattr(net.head, 'fc', None), nn.Linear) and is_identity(getattr(net.head, 'norm', None)),
                'no linear head that reads it',
            )
            reader = StreamReader(net.norm, (net.head.fc,))
        return stream(stage.downsample.reduction, map(self.parts, stage.blocks), [reader])
