# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Packed projections whose bias is two parameters of the attention: queries and values have one, keys have none."""

from typing import Optional

import torch
from torch import Tensor, nn

__all__ = ['SplitBiasProjection']


class SplitBiasProjection(nn.Linear):
    """The projection ``qkv`` of an attention module with parameters ``q_bias`` and ``v_bias`` (Swin V2, BEiT).

    The libraries pass its weight and the joined biases to a function and never call the layer. Here it is a layer that
    is called. The weight keeps its key; the biases stay the attention's and are looked up at each use, so that loading,
    moving or averaging may replace them.

    Args:
        attention: Has ``qkv``, a Linear without bias, and ``q_bias`` and ``v_bias``, parameters (C,) or None.
    """

    def __init__(self, attention: nn.Module):
        nn.Module.__init__(self)
        self.in_features, self.out_features = attention.qkv.in_features, attention.qkv.out_features
        self.weight = attention.qkv.weight
        # In a tuple: as an attribute of its own, the parent would become a child of its child.
        self._attention = (attention,)

    @property
    def bias(self) -> Optional[Tensor]:
        """(3 * C,), or None."""
        attention = self._attention[0]
        if attention.q_bias is None:
            return None
        return torch.cat((attention.q_bias, torch.zeros_like(attention.v_bias, requires_grad=False), attention.v_bias))
