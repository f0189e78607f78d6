# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Backbones of masked pre-training, which are called as the backbones that they derive from."""

from typing import Any

from torch import Tensor, nn

from psaq_mm.models.adapters.blocks import outputs_are_edges
from psaq_mm.quantization import AdapterSpec, ConvertFn, adopt

__all__ = ['FeaturesMixin', 'converts_network']


class FeaturesMixin:
    """A backbone of masked pre-training (MAE, SimMIM, iTPN, MixMIM): it gives features of whole images.

    The libraries' forwards take a mask, or draw one where none is given. What is quantized is the extraction of
    features, which is what such a backbone is used for afterwards, and has no mask.
    """

    keeps_name = True

    def forward(self, x: Tensor, mask: Any = None) -> Any:
        """Features of images (B, C, H, W), as the backbone gives them that this one derives from."""
        return super().forward(x, mask)


def converts_network(mixin: type, *edges: str) -> ConvertFn:
    """The adapter of a network that ``mixin`` adopts, and whose children ``edges`` have outputs that are edges."""
    quantize_edges = outputs_are_edges(*edges)

    def convert(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        return adopt(quantize_edges(module, name, spec), mixin)

    return convert
