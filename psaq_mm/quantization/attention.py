# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Where the projections of an attention module are: which rows of which layers are queries, keys and values."""

from typing import NamedTuple, Optional

from torch import nn

__all__ = ['AttentionParts', 'Projection', 'attention_parts']


class Projection(NamedTuple):
    """Rows of a Linear layer that are the queries, keys or values of all heads, head by head.

    Attributes:
        layer: Its weight is (rows of all projections in it, input channels).
        first: Index of the first row.
        rows: Their number: heads times width of a head.
        bias: (rows,), a parameter that is the bias of these rows where it is no part of the layer's own. None: the
            bias is the layer's.
    """

    layer: nn.Module
    first: int
    rows: int
    bias: Optional[nn.Parameter] = None


class AttentionParts(NamedTuple):
    """The layers of an attention module.

    Attributes:
        heads: Number of heads.
        queries: Projection of the queries.
        keys: Projection of the keys.
        values: Projection of the values.
        proj: Output projection. Its input is (..., heads * width of the values).
    """

    heads: int
    queries: Projection
    keys: Projection
    values: Projection
    proj: nn.Module

    def with_biases_of(self, module: nn.Module) -> 'AttentionParts':
        """These parts, with the biases ``q_bias`` and ``v_bias`` of a module that keeps them apart from its layers."""
        queries, values = (
            projection._replace(bias=getattr(module, name, None))
            for projection, name in ((self.queries, 'q_bias'), (self.values, 'v_bias'))
        )
        return self._replace(queries=queries, values=values)

    @classmethod
    def packed(cls, qkv: nn.Module, proj: nn.Module, heads: int) -> 'AttentionParts':
        """Parts of attention with one layer for all three projections, one after the other."""
        rows = qkv.out_features // 3
        queries, keys, values = (Projection(qkv, i * rows, rows) for i in range(3))
        return cls(heads, queries, keys, values, proj)


def attention_parts(module: nn.Module) -> Optional[AttentionParts]:
    """Parts of an attention module, or None where ``module`` is none.

    A module tells its parts by a method ``attention_parts()``. Without one, attention has ``num_heads``, one Linear
    ``qkv`` and an output projection ``proj``, as in most libraries; ``q_bias`` and ``v_bias`` where these are apart.
    """
    tell = getattr(module, 'attention_parts', None)
    if callable(tell):
        return tell()
    heads, qkv, proj = (getattr(module, name, None) for name in ('num_heads', 'qkv', 'proj'))
    if isinstance(heads, int) and isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear):
        return AttentionParts.packed(qkv, proj, heads).with_biases_of(module)
    return None
