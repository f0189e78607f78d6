# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which modules of a model are self-attention."""

from typing import List, Tuple

from torch import nn

from psaq_mm.quantization.attention import AttentionParts, attention_parts

__all__ = ['AttentionParts', 'attention_parts', 'find_attention', 'is_attention']


def is_attention(module: nn.Module) -> bool:
    """Whether a module is attention whose projections are known, see :func:`attention_parts`."""
    return attention_parts(module) is not None


def find_attention(model: nn.Module) -> List[Tuple[str, nn.Module]]:
    """Names and modules of all attention of a model, in the order of definition."""
    return [(name, module) for name, module in model.named_modules() if is_attention(module)]
