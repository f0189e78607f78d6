# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Attention as LeViT has it: a bias of each offset is added to the scores, and queries and keys may be narrower than
values (LeViT, arXiv 2104.01136, section 4.2). TinyViT and EfficientFormer have it too, each in a class of its own.
"""

from typing import Any, Tuple

from torch import nn

from psaq_mm.contexts import replaced
from psaq_mm.models.adapters.backbone import Backbone
from psaq_mm.models.adapters.products import QuantProductsMixin
from psaq_mm.models.adapters.streams import NamedStreams, need
from psaq_mm.quantization import AttentionParts, Projection

__all__ = ['LeBackbone', 'QuantLeAttentionMixin', 'linear_of']


def linear_of(module: nn.Module) -> nn.Module:
    """The Linear layer or convolution that a batch normalization may follow, or that it was folded into."""
    return next(part for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv2d)))


class QuantLeAttentionMixin(QuantProductsMixin):
    """Attention of tokens (B, N, C) with ``attention_biases`` and ``attention_bias_idxs``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the library's, with the biases that the module has now.

        In eval mode the libraries keep a copy without gradient, which a student would not learn.
        """
        if self.training:
            return super().forward(*args, **kwargs)
        with replaced(self, 'ab', self.attention_biases[:, self.attention_bias_idxs]):
            return super().forward(*args, **kwargs)

    def attention_parts(self) -> AttentionParts:
        """See :func:`psaq_mm.quantization.attention_parts`. Queries, keys and values of one head follow each other, so
        each projection is told as the layer with all rows.
        """
        queries, values = (linear_of(getattr(self, name, None) or self.qkv) for name in ('q', 'kv'))
        read, weighted = (Projection(layer, 0, layer.out_features) for layer in (queries, values))
        return AttentionParts(self.num_heads, read, weighted, weighted, self.proj)


class LeBackbone(Backbone):
    """What backbones with such attention have in common.

    Attributes:
        unrotatable: Why its streams cannot be rotated.
    """

    unrotatable = 'depthwise convolutions read its channels one by one'

    def rotates_heads(self, attention: nn.Module) -> Tuple[bool, bool]:
        """See :meth:`.Backbone.rotates_heads`: rows of one kind are no run."""
        return False, False

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """See :meth:`.Backbone.streams`."""
        return [('the stream of each stage', lambda: need(False, self.unrotatable))]
