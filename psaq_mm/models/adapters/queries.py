# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Attention outside of backbones, in encoders and decoders of queries.

Products and sampling that stay in floating point there are named.
"""

from torch import nn

from psaq_mm.models.adapters.attention import adopt_attention
from psaq_mm.models.adapters.match import adapt, class_named
from psaq_mm.models.adapters.packed_attention import QuantPackedAttentionMixin, adopt_packed
from psaq_mm.models.adapters.products import QuantProductsMixin
from psaq_mm.quantization import AdapterSpec, ConvertFn, computes_in_float, register_adapter

__all__ = ['QuantConditionalAttentionMixin', 'QuantFusionAttentionMixin', 'QuantHeadAttentionMixin']

_ATTENTION = ('torch.nn.modules.activation.MultiheadAttention',)
_CONDITIONAL = ('mmdet.models.layers.transformer.utils.ConditionalAttention',)
_FUSION = ('mmdet.models.utils.vlfuse_helper.BiMultiHeadAttention',)
_DEFORMABLE = ('mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttention',)
_MASK_HEADS = tuple(
    f'mmdet.models.dense_heads.{name}'
    for name in ('maskformer_head.MaskFormerHead', 'mask2former_head.Mask2FormerHead')
)
_CONTRASTIVE = ('mmdet.models.dense_heads.grounding_dino_head.ContrastiveEmbed',)


class QuantHeadAttentionMixin(QuantPackedAttentionMixin):
    """``nn.MultiheadAttention`` outside of a backbone: its tokens are queries or levels, and no patches of one map."""

    of_head = True

    def attention_parts(self) -> None:
        """None: patch similarity does not tap it, nor is it rotated."""


class QuantConditionalAttentionMixin(QuantProductsMixin):
    """Attention of Conditional DETR and DAB-DETR: contents and positions have projections of their own."""


class QuantFusionAttentionMixin(QuantProductsMixin):
    """Attention of pictures and words to each other: one product of scores, and one with the values of each."""

    product_names = ('qk', 'av', 'lv')


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is torch's attention, without keys and values that it adds of its own."""
    return class_named(module, _ATTENTION) is not None and module.bias_k is None and not module.add_zero_attn


def _convert_attention(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    return adopt_packed(module, name, spec, mixin=QuantHeadAttentionMixin)


def _products(mixin: type) -> ConvertFn:
    """The adapter of attention whose forward stays the library's."""
    return lambda module, name, spec: adopt_attention(module, mixin, name, spec)


def _named(reason: str) -> ConvertFn:
    """The adapter of a module that computes something in floating point."""

    def convert(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        return computes_in_float(module, reason)

    return convert


register_adapter(_is_plain, _convert_attention)
adapt(_CONDITIONAL, _products(QuantConditionalAttentionMixin))
adapt(_FUSION, _products(QuantFusionAttentionMixin))
adapt(_DEFORMABLE, _named('samples the values between their places, and weighs the samples, in floating point'))
adapt(_MASK_HEADS, _named('the product of mask embeddings and mask features is in floating point: it gives the masks'))
adapt(_CONTRASTIVE, _named('the product of queries and words is in floating point: it gives the class logits'))
