# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Attention whose forward stays the library's: its products are quantized where it calls them.

The forward runs under a ``TorchFunctionMode`` (torch.overrides), which sees every call of torch before it is computed.
"""

import math
from contextlib import contextmanager
from threading import local
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from psaq_mm.contexts import hooked
from psaq_mm.errors import UnsupportedModelError
from psaq_mm.quantization import QuantMatMul, class_before, is_quantized_layer, quantizers, row_mask_of

__all__ = ['QuantProductsMixin']

_PRODUCTS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)


class _Active(local):
    """Modes that are entered, in each thread; the last one is the innermost module's."""

    def __init__(self) -> None:
        self.modes: List['_Products'] = []


_ACTIVE = _Active()


class _Products(TorchFunctionMode):
    """Inside it, products of two activations are computed by ``matmuls``, in the order of the calls.

    Attributes:
        valid: Mask of the rows of left operands that take part in calibration, or None.
        calls: Products that were called.
        inside: Depth of modules inside that are quantized already.
    """

    def __init__(self, matmuls: Sequence[nn.Module], valid: Optional[Tensor] = None) -> None:
        super().__init__()
        self.matmuls, self.valid, self.calls, self.inside = matmuls, valid, 0, 0

    def __enter__(self) -> '_Products':
        _ACTIVE.modes.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _ACTIVE.modes.remove(self)
        super().__exit__(*error)

    def __torch_function__(self, func: Callable, types: Any, args: Tuple = (), kwargs: Optional[Dict] = None) -> Any:
        kwargs = kwargs or {}
        if self.inside or _ACTIVE.modes[-1] is not self:
            return func(*args, **kwargs)
        if func in _PRODUCTS and not kwargs and _of_attention(*args):
            return self._product(*args)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > len(self.matmuls):
            return a @ b  # an error follows
        return self.matmuls[self.calls - 1](a, b, self.valid)  # outside of the mode, as this method is

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Optional[Tensor] = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: Optional[float] = None,
        **more: Any,
    ) -> Tensor:
        """Fused attention in its parts, with the arguments of ``F.scaled_dot_product_attention``."""
        if any(more.values()):
            raise UnsupportedModelError(
                f'the fused attention has {more}, which has no quantized form: build the model without it'
            )
        query = query / math.sqrt(query.shape[-1]) if scale is None else query * scale
        scores = self._product(query, key.transpose(-2, -1))
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return self._product(F.dropout(scores.softmax(dim=-1), dropout_p), value)


def _of_attention(a: Tensor, b: Tensor) -> bool:
    """Whether a product is one of attention. A product of two plain matrices is none: rounding gathers Gram matrices in
    hooks of the layers inside.
    """
    return min(a.dim(), b.dim()) > 2 and not _is_parameter(a) and not _is_parameter(b)


def _is_parameter(tensor: Any) -> bool:
    """Whether a tensor is a parameter or a view of one: its transpose."""
    return isinstance(tensor, nn.Parameter) or isinstance(getattr(tensor, '_base', None), nn.Parameter)


class QuantProductsMixin:
    """Attention whose forward stays the library's: the products of two activations in it are :class:`QuantMatMul`.

    So attention with an unusual forward needs no copy of it. Products are ``@``, ``torch.matmul``, ``torch.bmm`` and
    the two of ``F.scaled_dot_product_attention``, which runs unfused. A product with a parameter stays as it is, and so
    does ``einsum``: ``psaq-inspect`` names it. Attention weights must be the left operand of their product. Where the
    tokens are padded (:func:`psaq_mm.quantization.padded`), left operands are (groups, heads, N, width).

    Attributes:
        product_names: Of the products, in the order of the calls: the scores first, then those with attention weights
            on their left, which get the quantizer of nonnegative values that the spec names. ``matmul_`` and the name
            are children of the module.
    """

    product_names: Tuple[str, ...] = ('qk', 'av')

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the library's.

        Raises:
            UnsupportedModelError: It has another number of products: some would stay in floating point silently.
        """
        matmuls = [getattr(self, f'matmul_{name}') for name in self.product_names]
        others = [part for part in self.modules() if isinstance(part, QuantMatMul) or is_quantized_layer(part)]
        padding = row_mask_of(self)
        valid = None if padding is None else padding.valid[:, None]  # of all heads
        with _Products(matmuls, valid) as products, _left_alone(products, others):
            out = super().forward(*args, **kwargs)
        if products.calls != len(self.product_names):
            name = next((one.name for matmul in matmuls for _, one in quantizers(matmul) if one.name), '')
            raise UnsupportedModelError(
                f'{name.rsplit(".", 2)[0] or "a module"} of class {class_before(type(self)).__name__} computes '
                f'{products.calls} products of activations, and {self.product_names} are known: use the version of the '
                'library that it was written for'
            )
        return out


@contextmanager
def _left_alone(products: _Products, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the block, the mode does not see what ``modules`` compute: what is quantized already, by products of
    activations where an export has replaced its forward. Nor does it see what other hooks of them compute.
    """

    def enter(module: nn.Module, args: Any) -> None:
        products.inside += 1

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        products.inside -= 1

    entering = hooked(modules, lambda module: module.register_forward_pre_hook(enter, prepend=True))
    with entering, hooked(modules, lambda module: module.register_forward_hook(leave)):
        yield
