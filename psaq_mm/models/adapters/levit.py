# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""LeViT of mmpretrain (arXiv 2104.01136, section 4): a batch normalization behind every Linear layer in the place of
norms before it, which its form for deployment has folded.
"""

from typing import Optional, Tuple

from torch import nn

from psaq_mm.models.adapters.backbone import register_backbone
from psaq_mm.models.adapters.blocks import BlockParts, Writer, mark_parts, quantize_outputs
from psaq_mm.models.adapters.le_attention import LeBackbone, QuantLeAttentionMixin, linear_of
from psaq_mm.models.adapters.match import class_named
from psaq_mm.quantization import AdapterSpec, feeds_activation, quantize_output_

__all__ = ['LeViT']

_MODULE = 'mmpretrain.models.backbones.levit'
_SUBSAMPLE = f'{_MODULE}.AttentionSubsample'
_ATTENTION = f'{_MODULE}.Attention'


def _convert_normalized(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    """A batch normalization follows the layer."""
    feeds_activation(linear_of(module))
    return module


@register_backbone
class LeViT(LeBackbone):
    """LeViT of mmpretrain, also built with ``deploy=True``."""

    names = (f'{_MODULE}.LeViT',)
    block_path = r'stages\.\d+\.\d+'
    blocks = {f'{_MODULE}.Residual': None, _SUBSAMPLE: QuantLeAttentionMixin}
    attention = dict.fromkeys((_ATTENTION, _SUBSAMPLE), QuantLeAttentionMixin)
    edges = ('patch_embed',)
    others = dict.fromkeys(
        (f'{_MODULE}.ConvolutionBatchNorm', f'{_MODULE}.LinearBatchNorm'),
        _convert_normalized,
    )
    unrotatable = 'batch normalizations stand behind the layers that write to it'

    def attention_of(self, block: nn.Module) -> Tuple[nn.Module, ...]:
        """See :meth:`.Backbone.attention_of`. Attention between two stages is a block itself."""
        attention = getattr(block, 'block', block)
        return (attention,) if class_named(attention, self.attention) else ()

    def parts(self, block: nn.Module) -> BlockParts:
        """See :meth:`.Backbone.parts`. No norm stands before a layer."""
        if self.attention_of(block):
            return BlockParts((), (Writer(linear_of(self.attention_of(block)[0].proj)),))
        mlp = block.block
        return BlockParts((), (Writer(linear_of(mlp.linear2)),), (linear_of(mlp.linear1),))

    def convert_attention(self, attention: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_attention`; what its projections give is an edge."""
        projections = ('kv', 'q.1') if class_named(attention, (_SUBSAMPLE,)) else ('qkv',)
        quantize_outputs(attention, name, spec, (one for one in projections if not _is_layer(attention, one)))
        return super().convert_attention(attention, name, spec)

    def convert_block(self, block: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """See :meth:`.Backbone.convert_block`; its sum is an edge."""
        mark_parts(self.parts(block))
        if class_named(block, (_SUBSAMPLE,)):
            return self.convert_attention(block, name, spec)
        return quantize_output_(block, name, spec)

    def patch(self, net: nn.Module) -> int:
        """See :meth:`.Backbone.patch`: four convolutions of stride 2."""
        return 16

    def fixed_size(self, net: nn.Module) -> Optional[Tuple[int, int]]:
        """See :meth:`.Backbone.fixed_size`: that of the position bias."""
        side = net.resolutions[0] * self.patch(net)
        return side, side


def _is_layer(attention: nn.Module, name: str) -> bool:
    """Whether a child is a Linear layer, which has an output quantizer of its own."""
    return isinstance(attention.get_submodule(name), nn.Linear)
