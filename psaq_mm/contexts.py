# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""State of a model that is changed for a while and put back, also when an error ends the block."""

import contextlib
from typing import Any, Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

__all__ = ['evaluating', 'frozen', 'hooked', 'replaced']


@contextlib.contextmanager
def frozen(tensors: Iterable[Tensor]) -> Iterator[None]:
    """No gradients for ``tensors`` (such as ``model.parameters()``) inside the block."""
    learned = [tensor for tensor in tensors if tensor.requires_grad]
    for tensor in learned:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in learned:
            tensor.requires_grad_(True)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode inside the block; then each module has the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield model
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def hooked(
    modules: Iterable[nn.Module], register: Callable[[nn.Module], torch.utils.hooks.RemovableHandle]
) -> Iterator[None]:
    """Hooks on ``modules`` inside the block.

    Args:
        modules: Where hooks go.
        register: Registers the hook of one module and returns its handle.

    Example:
        >>> with hooked(layers, lambda layer: layer.register_forward_hook(record)):
        ...     model(images)
    """
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(register(module).remove)
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Attribute ``name`` of ``owner`` is ``value`` inside the block; then it is what it was, or is removed again."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
