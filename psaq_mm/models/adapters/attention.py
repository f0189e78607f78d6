# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What all adapters of self-attention and of transformer blocks share."""

from typing import Any, Callable, Optional, Sequence, Tuple

import torch
import torch.utils.checkpoint as cp
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from psaq_mm.errors import UnsupportedModelError
from psaq_mm.quantization import AdapterSpec, adopt, attention_products

__all__ = ['CheckpointedBlockMixin', 'QuantProductsMixin', 'adopt_attention', 'attend', 'attend_heads']


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
    return x.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)  # not len(): the tracer would keep a number


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


_PRODUCTS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)


class _Products(TorchFunctionMode):
    """Inside it, products of two activations are computed by ``matmuls``, in the order of the calls."""

    def __init__(self, matmuls: Sequence[nn.Module]) -> None:
        super().__init__()
        self.matmuls, self.calls = matmuls, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # A product of two plain matrices is not attention's: rounding gathers Gram matrices in hooks of its layers.
        if func not in _PRODUCTS or args[0].dim() < 3 or args[1].dim() < 3:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        if self.calls > len(self.matmuls):
            return func(*args, **(kwargs or {}))
        return self.matmuls[self.calls - 1](*args, **(kwargs or {}))  # outside of the mode, as this method is


class QuantProductsMixin:
    """Attention whose forward stays the library's: the products of two activations in it are :class:`QuantMatMul`.

    So attention with an unusual forward needs no copy of it. Products are ``@``, ``torch.matmul`` and ``torch.bmm`` of
    tensors of three or more dimensions.

    Attributes:
        product_names: Of the products, in the order of the calls: the scores first, then those with attention weights
            on their left. ``matmul_`` and the name are children of the module.
    """

    product_names: Tuple[str, ...] = ('qk', 'av')

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the library's.

        Raises:
            UnsupportedModelError: It has another number of products: some would stay in floating point silently.
        """
        with _Products([getattr(self, f'matmul_{name}') for name in self.product_names]) as products:
            out = super().forward(*args, **kwargs)
        if products.calls != len(self.product_names):
            raise UnsupportedModelError(
                f'{type(self).__name__} computes {products.calls} products of activations, and {self.product_names} '
                'are known: use the version of the library that it was written for'
            )
        return out


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
