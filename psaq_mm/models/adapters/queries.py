# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What encoders and decoders of queries have beside ``nn.MultiheadAttention`` (:mod:`.multihead`): attention of other
kinds, and products and sampling that stay in floating point and are named.
"""

from torch import nn

from psaq_mm.models.adapters.match import adapt
from psaq_mm.quantization import AdapterSpec, ConvertFn, computes_in_float

_DEFORMABLE = ('mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttention',)
_MASK_HEADS = tuple(
    f'mmdet.models.dense_heads.{name}'
    for name in ('maskformer_head.MaskFormerHead', 'mask2former_head.Mask2FormerHead')
)
_CONTRASTIVE = ('mmdet.models.dense_heads.grounding_dino_head.ContrastiveEmbed',)


def _named(reason: str) -> ConvertFn:
    """The adapter of a module that computes something in floating point."""

    def convert(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        return computes_in_float(module, reason)

    return convert


adapt(_DEFORMABLE, _named('samples the values between their places, and weighs the samples, in floating point'))
adapt(_MASK_HEADS, _named('the product of mask embeddings and mask features is in floating point: it gives the masks'))
adapt(_CONTRASTIVE, _named('the product of queries and words is in floating point: it gives the class logits'))
