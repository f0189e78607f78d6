# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Outputs of transformer blocks: what a student learns of a backbone without stages of several scales (ViT, DeiT)."""

from collections import Counter
from contextlib import contextmanager
from typing import Any, Iterator, List, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.calibration.attention import find_attention
from psaq_mm.contexts import hooked
from psaq_mm.errors import ConfigError, DataError, UnsupportedModelError

__all__ = ['BlockTaps', 'find_blocks']


def find_blocks(model: nn.Module) -> List[Tuple[str, nn.Module]]:
    """Names and modules of the transformer blocks of a model, in the order of definition.

    A block holds exactly one attention and is an element of a list of blocks. A module inside a block that holds the
    same attention (Swin's shifting around its window attention) is no block, nor is a stage around a list of one block.

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
    """Records the outputs of every ``stride``-th transformer block, and of the last one.

    Hooks are removed after the forward pass, so that a recomputation by activation checkpointing is not recorded.

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
            raise ConfigError(f'block_stride={stride} must be at least 1 (every block)')
        blocks = find_blocks(model)
        if not blocks:
            raise UnsupportedModelError(
                f'{type(model).__name__} has no transformer blocks with one attention each: take '
                "distil=('backbone', 'neck')"
            )
        self.blocks = [b for i, b in enumerate(blocks, 1) if i % stride == 0 or i == len(blocks)]

    @contextmanager
    def record(self, needs_grad: bool = False) -> Iterator[List[Tensor]]:
        """Record the forward pass that runs inside the ``with`` block.

        Args:
            needs_grad: Whether the input requires a gradient, so that every output has to carry one.

        Yields:
            List that holds the outputs in the order of the calls, each (B, N, C), once the block is left.

        Raises:
            UnsupportedModelError: On exit, if no block ran, or if reentrant activation checkpointing has cut an output
                off the graph.
            DataError: A block gives no tensor of tokens.
        """
        outputs: List[Tensor] = []
        calls: List[Tuple[nn.Module, Any]] = []
        names = {module: name for name, module in self.blocks}

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            # Nothing is computed in the hook: checkpointing compares the tensors a block saves with those of its
            # recomputation, which runs without it.
            calls.append((module, output))

        with hooked(names, lambda module: module.register_forward_hook(keep)):
            yield outputs
        for module, output in calls:
            tokens = _tokens(names[module], output)
            _check_graph(names[module], module, tokens, needs_grad)
            outputs.append(tokens)
        if not outputs:
            raise UnsupportedModelError(
                f'none of the blocks was called, the first is {self.blocks[0][0]!r}; run the whole '
                'backbone inside record()'
            )


def _tokens(name: str, output: Any) -> Tensor:
    """Tokens (B, N, C) out of a block's output: tokens, or a map with channels last, alone or first of a tuple."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(first, Tensor) or first.dim() < 3:
        shown = f'a tensor of shape {tuple(first.shape)}' if isinstance(first, Tensor) else type(first).__name__
        raise DataError(f"block {name!r} gives {shown}, not tokens (B, N, C): take distil=('backbone', 'neck')")
    return first.flatten(1, -2)


def _check_graph(name: str, module: nn.Module, tokens: Tensor, needs_grad: bool) -> None:
    expected = torch.is_grad_enabled() and (needs_grad or any(p.requires_grad for p in module.parameters()))
    if expected and not tokens.requires_grad:
        raise UnsupportedModelError(
            f'block {name!r} gives no gradient though its input or its weights require one: reentrant activation '
            'checkpointing cuts it off; use torch.utils.checkpoint with use_reentrant=False, or with_cp=False'
        )
