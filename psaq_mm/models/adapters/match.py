# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Recognizing a library's class without importing the library."""

import re
from typing import Collection, List, NamedTuple, Optional, Tuple

from torch import nn

from psaq_mm.quantization import ConvertFn, register_adapter

__all__ = ['Architecture', 'adapt', 'class_named', 'qualified_name']


def qualified_name(cls: type) -> str:
    """``module.ClassName`` of a class."""
    return f'{cls.__module__}.{cls.__qualname__}'


def class_named(module: object, names: Collection[str], method: str = 'forward') -> Optional[str]:
    """The qualified name in ``names`` whose computation ``module`` inherits unchanged.

    A downstream project may subclass a library's attention to change its constructor. Its computation is still the
    library's as long as ``method`` is not overridden. A class that overrides it computes something unknown, and must
    not be replaced.

    Args:
        module: The instance looked at.
        names: Qualified names of known classes.
        method: The method that must come from the known class.

    Returns:
        The name found, or None.
    """
    cls = type(module)
    for base in cls.__mro__:
        if qualified_name(base) in names:
            same = getattr(cls, method, None) is getattr(base, method, None)
            return qualified_name(base) if same else None
    return None


def adapt(names: Collection[str], convert: ConvertFn) -> None:
    """Register an adapter of the classes ``names``; see :func:`.convert.register_adapter`."""
    register_adapter(lambda module: class_named(module, names) is not None, convert)


class Architecture(NamedTuple):
    """A kind of backbone whose blocks the adapters know.

    Attributes:
        backbones: Qualified names of the backbone's class.
        block_path: Regular expression over the dotted names, inside the backbone, of its transformer blocks.
        blocks: Qualified names of their class; attention is their child ``attn``.
        attention: Qualified names of its class.
    """

    backbones: Tuple[str, ...]
    block_path: str
    blocks: Tuple[str, ...]
    attention: Tuple[str, ...]

    def strangers(self, backbone: nn.Module) -> List[Tuple[str, nn.Module]]:
        """Names and modules of the blocks and attention modules of ``backbone`` that are of another class.

        Such attention would stay in floating point silently: a parallel block, or attention that pools the tokens.
        """
        strangers: List[Tuple[str, nn.Module]] = []
        inside: Tuple[str, ...] = ()
        for name, module in backbone.named_modules():
            if re.fullmatch(self.block_path, name):
                inside = (name + '.',)
                if not class_named(module, self.blocks):
                    strangers.append((name, module))
                elif not class_named(module.attn, self.attention):
                    strangers.append((f'{name}.attn', module.attn))
            elif isinstance(getattr(module, 'num_heads', None), int) and not name.startswith(inside):
                strangers.append((name, module))
        return strangers

    def has_blocks(self, backbone: nn.Module) -> bool:
        """Whether ``backbone`` has any transformer block where this architecture has them."""
        return any(re.fullmatch(self.block_path, name) for name, _ in backbone.named_modules())
