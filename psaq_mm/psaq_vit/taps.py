# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Taps on the attention of a model: the features that its blocks have of the patches of an image."""

from contextlib import contextmanager
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from psaq_mm.calibration.attention import find_attention
from psaq_mm.contexts import hooked
from psaq_mm.errors import DataError, UnsupportedModelError
from psaq_mm.quantization import RowMask, row_mask_of

__all__ = ['AttentionTap', 'AttentionTaps']


class AttentionTap(NamedTuple):
    """Attention output of one block in one forward pass.

    Attributes:
        name: Dotted name of the attention module.
        tokens: Attention output before ``proj``, averaged over the heads, shape (groups, N, D).
        valid: Boolean (groups or fewer, N), False for padded queries; None if all are valid.
        groups_per_image: Groups (windows) of one image; 1 for global attention.
    """

    name: str
    tokens: Tensor
    valid: Optional[Tensor]
    groups_per_image: int


class AttentionTaps:
    """Records the attention output of every block of a model.

    The tap is the input of ``proj``: (groups, N, heads * D), averaged over the heads. A recomputation after the
    recorded forward pass, as activation checkpointing does it, is not recorded.

    Args:
        model: Model with attention as :func:`is_attention` tells it. Padded queries are those that the mask of an
            attention module tells (:func:`psaq_mm.quantization.padded`).
        drop_tokens: Leading tokens of each group to leave out: 1 for a class token, 2 with a distillation token.

    Raises:
        UnsupportedModelError: If the model has no such attention.

    Example:
        >>> taps = AttentionTaps(model, drop_tokens=1)
        >>> with taps.record(images) as record:
        ...     model(images)
        >>> loss = -sum(patch_similarity_entropy(t.tokens, t.valid, groups_per_image=t.groups_per_image)
        ...             for t in record)
    """

    def __init__(self, model: nn.Module, drop_tokens: int = 0) -> None:
        self.attention = find_attention(model)
        self.drop_tokens = drop_tokens
        if drop_tokens < 0:
            raise DataError(f'drop_tokens={drop_tokens} must not be negative')
        if not self.attention:
            raise UnsupportedModelError(
                f'{type(model).__name__} has no self-attention whose projections are known, so patch similarity '
                "cannot be measured: use a method that synthesizes nothing, such as 'fast' or 'best', or set the "
                'weight of the entropy to 0'
            )

    @contextmanager
    def record(self, images: Union[Tensor, int]) -> Iterator[List[AttentionTap]]:
        """Record one forward pass that runs inside the ``with`` block.

        Args:
            images: The batch the model is about to see, or its size. A batch that requires gradients must give taps
                that do.

        Yields:
            List that holds one :class:`AttentionTap` for each attention call, in the order of the calls, once the
            block is left.

        Raises:
            UnsupportedModelError: On exit, if no attention was called, or if reentrant activation checkpointing has
                cut the taps off the graph.
            DataError: In the forward pass, if the groups do not divide by the batch or no token is left.
        """
        batch = len(images) if isinstance(images, Tensor) else images
        needs_grad = isinstance(images, Tensor) and images.requires_grad and torch.is_grad_enabled()
        record: List[AttentionTap] = []
        calls: List[AttentionTap] = []
        attention_of: Dict[nn.Module, Tuple[str, nn.Module]] = {m.proj: (name, m) for name, m in self.attention}

        def tap(projection: nn.Module, inputs: Tuple[Tensor, ...]) -> None:
            # The mean of the heads is taken at once, so that no block's whole output is held until the last one has
            # run. Checkpointing compares the tensors a block saves with those of its recomputation, which runs without
            # the hook: it must not count these.
            with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
                name, module = attention_of[projection]
                calls.append(self._tap(name, module, inputs[0], row_mask_of(module), batch))

        with hooked(attention_of, lambda projection: projection.register_forward_pre_hook(tap)):
            yield record
        record.extend(calls)
        if not record:
            raise UnsupportedModelError(
                f'none of the {len(self.attention)} attention modules was called, the first is '
                f'{self.attention[0][0]!r}; run the whole backbone inside record()'
            )
        cut = [tap.name for tap in record if not tap.tokens.requires_grad]
        if needs_grad and cut:
            raise UnsupportedModelError(
                f'attention {cut[0]!r} gives no gradient though its input requires one: reentrant activation '
                'checkpointing cuts it off; use torch.utils.checkpoint with use_reentrant=False, or with_cp=False'
            )

    def _tap(self, name: str, module: nn.Module, output: Tensor, mask: Optional[RowMask], batch: int) -> AttentionTap:
        groups, length, channels = output.shape
        if groups % batch:
            raise DataError(f'attention {name!r} saw {groups} groups, which do not divide by the batch of {batch}')
        if length <= self.drop_tokens:
            raise DataError(f'attention {name!r} has {length} tokens, none is left with drop_tokens={self.drop_tokens}')
        heads = output.reshape(groups, length, module.num_heads, -1)[:, self.drop_tokens :]
        tokens = heads.sum(2) / module.num_heads  # a mean would keep the heads for its backward pass
        return AttentionTap(name, tokens, None if mask is None else mask.valid[:, self.drop_tokens :], groups // batch)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
