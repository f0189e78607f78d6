# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Outputs of transformer blocks: what a student learns where a backbone has no stages of several scales (ViT, DeiT)."""

from collections import Counter
from contextlib import contextmanager
from typing import Any, Iterator, List, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.calibration.attention import find_attention
from psaq_mm.errors import ConfigError, DataError, UnsupportedModelError

__all__ = ['BlockTaps', 'find_blocks']


def find_blocks(model: nn.Module) -> List[Tuple[str, nn.Module]]:
    """Names and modules of the transformer blocks of a model, in the order of definition.

    A block holds exactly one attention and is an element of a list of blocks; what the libraries nest inside it (Swin's
    shifting around its window attention) and what they put around a list of length one (a stage) is none.

    Args:
        model: A backbone with attention as :func:`psaq_mm.calibration.is_attention` tells it.
    """
    modules = dict(model.named_modules())
    attention = [name for name, _ in find_attention(model)]
    held = Counter(ancestor for name in attention for ancestor in _ancestors(name))
    blocks = {}
    for name in attention:
        alone = [ancestor for ancestor in _ancestors(name) if ancestor and held[ancestor] == 1]
        listed = [a for a in alone if isinstance(modules[a.rpartition('.')[0]], (nn.ModuleList, nn.Sequential))]
        if alone:
            block = listed[0] if listed else alone[-1]
            blocks[block] = modules[block]
    return list(blocks.items())


def _ancestors(name: str) -> List[str]:
    """Names of the modules around ``name``, the nearest first, the model itself ('') last."""
    parts = name.split('.')
    return ['.'.join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]


class BlockTaps:
    """Records what every ``stride``-th transformer block gives, and the last one.

    Hooks are there while a forward pass runs and no longer: a recomputation by activation checkpointing is not
    recorded.

    Args:
        model: The backbone.
        stride: With 3, blocks 3, 6, 9, ... counted from 1, and the last.

    Raises:
        ConfigError: ``stride`` is below 1.
        UnsupportedModelError: The model has no such blocks.

    Example:
        >>> taps = BlockTaps(vit)
        >>> with taps.record() as outputs:
        ...     vit(images)
        >>> [tuple(tokens.shape) for tokens in outputs]   # twelve blocks
        [(8, 197, 192), (8, 197, 192), (8, 197, 192), (8, 197, 192)]
    """

    def __init__(self, model: nn.Module, stride: int = 3) -> None:
        if stride < 1:
            raise ConfigError(f'dfq.block_stride={stride} must be at least 1 (every block)')
        blocks = find_blocks(model)
        if not blocks:
            raise UnsupportedModelError(
                f'{type(model).__name__} has no transformer blocks with one attention each: take '
                "dfq.distil=('backbone', 'neck')"
            )
        self.blocks = [b for i, b in enumerate(blocks, 1) if i % stride == 0 or i == len(blocks)]

    @contextmanager
    def record(self, needs_grad: bool = False) -> Iterator[List[Tensor]]:
        """Records the forward pass that runs inside the ``with`` block.

        Args:
            needs_grad: Whether the input requires a gradient, so that every output has to carry one.

        Yields:
            List that holds the outputs in the order of the calls, each (B, N, C), once the block is left.

        Raises:
            UnsupportedModelError: On exit, if no block ran, or if reentrant activation checkpointing has cut an output
                off the graph.
            DataError: A block gives no tensor of tokens.
        """
        found: List[Tensor] = []
        calls: List[Tuple[str, nn.Module, Any]] = []
        handles = []
        try:
            for name, module in self.blocks:
                # Nothing is computed in the hook: checkpointing compares the tensors a block saves with those of its
                # recomputation, which runs without it.
                handles.append(
                    module.register_forward_hook(
                        lambda module, inputs, output, name=name: calls.append((name, module, output))
                    )
                )
            yield found
        finally:
            for handle in handles:
                handle.remove()
        for name, module, output in calls:
            tokens = _tokens(name, output)
            _check_graph(name, module, tokens, needs_grad)
            found.append(tokens)
        if not found:
            raise UnsupportedModelError(
                f'none of the blocks was called, the first is {self.blocks[0][0]!r}; run the whole '
                'backbone inside record()'
            )


def _tokens(name: str, output: Any) -> Tensor:
    """(B, N, C) of what a block returns: tokens, or a map of them with its channels last, alone or first of several."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(first, Tensor) or first.dim() < 3:
        shown = f'a tensor of shape {tuple(first.shape)}' if isinstance(first, Tensor) else type(first).__name__
        raise DataError(f"block {name!r} gives {shown}, not tokens (B, N, C): take dfq.distil=('backbone', 'neck')")
    return first.flatten(1, -2)


def _check_graph(name: str, module: nn.Module, tokens: Tensor, needs_grad: bool) -> None:
    expected = torch.is_grad_enabled() and (needs_grad or any(p.requires_grad for p in module.parameters()))
    if expected and not tokens.requires_grad:
        raise UnsupportedModelError(
            f'block {name!r} gives no gradient though its input or its weights require one: reentrant activation '
            'checkpointing cuts it off; use torch.utils.checkpoint with use_reentrant=False, or with_cp=False'
        )
