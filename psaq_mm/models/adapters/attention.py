# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What all adapters of self-attention and of transformer blocks share."""

from typing import Any, Callable, Optional, Tuple

import torch.utils.checkpoint as cp
from torch import Tensor, nn

from psaq_mm.quantization import AdapterSpec, adopt, attention_products

__all__ = ['CheckpointedBlockMixin', 'adopt_attention', 'attend', 'attend_heads']


def attend(
    attention: nn.Module,
    x: Tensor,
    scaled: Callable[[Tensor, Tensor], Tuple[Tensor, Tensor]],
    weights: Callable[[Tensor], Tensor],
    valid: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """Self-attention before its output projection, with two products that are :class:`QuantMatMul`.

    Libraries differ in the operations on queries and scores. Each adapter gives its library's own, so that the outputs
    are equal to the last bit.

    Args:
        attention: Converted by :func:`adopt_attention`; it has ``qkv`` and ``num_heads``.
        x: (B, N, C).
        scaled: Queries and keys (B, heads, N, D) to those whose product are the scores.
        weights: Scores (B, heads, N, N) to attention weights: softmax, and what the library has around it.
        valid: Mask of the queries (B, N) that take part in calibration, or None.

    Returns:
        Outputs of all heads (B, N, heads * D), and the values (B, heads, N, D).
    """
    B, N, _ = x.shape
    q, k, v = attention.qkv(x).reshape(B, N, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = scaled(q, k)
    return attend_heads(attention, q, k, v, weights, valid), v


def attend_heads(
    attention: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Callable[[Tensor], Tensor],
    valid: Optional[Tensor] = None,
) -> Tensor:
    """Attention of projected heads, whose two products are :class:`QuantMatMul`.

    Args:
        attention: Converted by :func:`adopt_attention`.
        q: Queries (B, heads, N, D), scaled.
        k: Keys (B, heads, M, D).
        v: Values (B, heads, M, D).
        weights: As for :func:`attend`, of scores (B, heads, N, M).
        valid: Mask of the queries (B, N) that take part in calibration, or None.

    Returns:
        Outputs of all heads, (B, N, heads * D).
    """
    heads_valid = None if valid is None else valid[:, None]
    scores = attention.matmul_qk(q, k.transpose(-2, -1), valid=heads_valid)
    x = attention.matmul_av(weights(scores), v, valid=heads_valid)
    return x.transpose(1, 2).flatten(2)  # no number of tokens, which the tracer would keep


def adopt_attention(module: nn.Module, mixin: type, name: str, spec: AdapterSpec) -> nn.Module:
    """Make ``module`` an instance of ``mixin`` too, with its products; the module.

    They are ``matmul_qk`` and ``matmul_av``, or those that ``product_names`` of the mixin says.
    """
    module = adopt(module, mixin)
    scores, *weighted = getattr(mixin, 'product_names', ('qk', 'av'))
    for product in weighted:
        pair = attention_products(spec, name, product)
        for part, matmul in zip((scores, product), pair):
            setattr(module, f'matmul_{part}', matmul)
    return module


class CheckpointedBlockMixin:
    """A transformer block whose activation checkpointing keeps the graph of what hooks see inside it.

    The libraries' ``with_cp`` uses reentrant checkpointing. Hooks then see an attention output that is detached, and
    see it twice: the gradient of the patch similarity entropy would vanish silently.
    """

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """(B, N, C) to (B, N, C), as the library's."""
        if getattr(self, 'with_cp', False) and x.requires_grad:
            return cp.checkpoint(self._block, x, *args, use_reentrant=False)
        return self._block(x, *args)
