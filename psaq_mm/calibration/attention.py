# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which modules of a model are self-attention."""

from typing import List, Tuple

from torch import nn

__all__ = ['find_attention', 'is_attention']


def is_attention(module: nn.Module) -> bool:
    """Whether a module is self-attention with ``num_heads``, one ``qkv`` projection and an output ``proj``."""
    return isinstance(getattr(module, 'num_heads', None), int) and all(
        isinstance(getattr(module, name, None), nn.Linear) for name in ('qkv', 'proj')
    )


def find_attention(model: nn.Module) -> List[Tuple[str, nn.Module]]:
    """Names and modules of all attention of a model, in the order of definition."""
    return [(name, module) for name, module in model.named_modules() if is_attention(module)]
