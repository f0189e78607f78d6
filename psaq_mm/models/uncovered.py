# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a quantized model computes in floating point inside its scope, seen while it runs.

Conversion knows classes of modules. A product that a forward writes itself (``@``, ``einsum``), a functional layer or
sampling at learned places belongs to no such class and would stay in floating point unseen. Here one pass is watched
operation by operation, and each such operation is named with the module that ran it.
"""

from collections import Counter
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from psaq_mm.contexts import hooked
from psaq_mm.models.quantized import report_of, spec_of
from psaq_mm.models.scope import scope_filter
from psaq_mm.models.task import TaskModel
from psaq_mm.quantization import QuantMatMul, in_mode, is_quantized_layer, quantizers

__all__ = ['Uncovered', 'uncovered', 'watch']

_PRODUCTS = (
    'matmul',
    '__matmul__',
    '__rmatmul__',
    'bmm',
    'mm',
    'mv',
    'baddbmm',
    'addmm',
    'addbmm',
    'einsum',
    'tensordot',
)
_ATTENTION = (
    'scaled_dot_product_attention',
    'multi_head_attention_forward',
    '_native_multi_head_attention',
    '_transformer_encoder_layer_fwd',
)
_LAYERS = (
    'linear', 'bilinear', 'conv1d', 'conv2d', 'conv3d', 'conv_transpose1d', 'conv_transpose2d', 'conv_transpose3d'
)  # fmt: skip
_SAMPLING = ('grid_sample',)


class Uncovered(NamedTuple):
    """An operation that ran in floating point.

    Attributes:
        module: Dotted name of the module whose forward ran it; ``''`` is the model itself.
        kind: Class of the module.
        operation: What ran: ``'matmul of two activations'``.
        calls: How often, in one pass.
    """

    module: str
    kind: str
    operation: str
    calls: int


def uncovered(model: nn.Module, size: Tuple[int, int]) -> List[Uncovered]:
    """Operations inside the scope of a quantized model that no quantizer covers, in one pass on noise.

    Args:
        model: Quantized; its quantizers need no ranges.
        size: (height, width) of the noise, in pixels.

    Returns:
        In the order of the first call. Products of two activations, products of an activation with a parameter outside
        of a layer, fused attention, layers called as functions, sampling at computed places, and layers of classes that
        have no quantized form. Sums, activations, norms and softmax are left out: they are edges, or in floating point
        in every model. So are layers that the conversion's report names already.
    """
    view, scope = TaskModel(model, ()), spec_of(model).scope
    told, covers = {row.name for row in report_of(model).floats}, scope_filter(model, scope)
    noise = torch.randn(1, view.image_spec.channels, *size, generator=torch.Generator().manual_seed(0))
    noise = noise.to(next(model.parameters()).device)
    with in_mode([quantizer for _, quantizer in quantizers(model)], 'off'):
        rows = watch(model, lambda: view.calibration_forward(noise, scope))
    modules = dict(model.named_modules())
    return [row for row in rows if row.module not in told and covers(row.module, modules[row.module])]


def watch(model: nn.Module, run: Callable[[], Any]) -> List[Uncovered]:
    """See :func:`uncovered`, in all of a model; ``run`` passes pictures through it that were there before."""
    names = {module: name for name, module in model.named_modules()}
    mode = _Watch(model)
    with _told_where(names, mode), mode, torch.no_grad():
        run()
    return [
        Uncovered(names.get(module, ''), type(module or model).__name__, operation, calls)
        for (module, operation), calls in mode.seen.items()
    ]


@contextmanager
def _told_where(names: Dict[nn.Module, str], mode: '_Watch') -> Iterator[None]:
    """Inside the block the mode knows which modules' forwards are running."""

    def enter(module: nn.Module, args: Any) -> None:
        mode.running.append(module)
        if type(module).__module__.startswith('mmcv.ops') and 'eform' in type(module).__name__:
            mode.note(module, 'sampling at computed places')

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        mode.running.pop()

    entering = hooked(names, lambda module: module.register_forward_pre_hook(enter))
    with entering, hooked(names, lambda module: module.register_forward_hook(leave)):
        yield


class _Watch(TorchFunctionMode):
    """Notes operations on activations that belong to no quantized module.

    Tensors that are made of parameters, buffers and constants alone are no activations.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.running: List[nn.Module] = []
        self.seen: Counter = Counter()
        self._constants: Dict[int, Tuple[Tensor, int]] = {}
        self._keep([*model.parameters(), *model.buffers()])

    def _keep(self, tensors: Iterable[Tensor]) -> None:
        """Take tensors for constants until something is written into them."""
        # By id: tensors compare element by element. They are held, so that no other tensor gets their id.
        self._constants.update((id(tensor), (tensor, tensor._version)) for tensor in tensors)

    def _is_constant(self, tensor: Tensor) -> bool:
        return self._constants.get(id(tensor), (None, None))[1] == tensor._version

    def note(self, module: Optional[nn.Module], operation: str) -> None:
        """Count an operation of a module, unless the module or one around it is quantized."""
        if not any(isinstance(one, QuantMatMul) or is_quantized_layer(one) for one in self.running):
            self.seen[module, operation] += 1

    def __torch_function__(self, function: Callable, types: Any, args: Tuple = (), kwargs: Optional[Dict] = None):
        result = function(*args, **(kwargs or {}))
        tensors, name = list(_tensors([args, kwargs or {}])), getattr(function, '__name__', '')
        activations = [tensor for tensor in tensors if not self._is_constant(tensor)]
        if not activations:
            self._keep(_tensors(result))
            return result
        operation = self._operation(name, tensors, activations)
        if operation:
            self.note(self.running[-1] if self.running else None, operation)
        return result

    def _operation(self, name: str, tensors: List[Tensor], activations: List[Tensor]) -> str:
        """What is told of an operation; ``''`` where nothing is."""
        if name in _PRODUCTS:
            title = 'matmul' if 'matmul' in name else name
            return f'{title} of two activations' if len(activations) > 1 else f'{title} with a parameter'
        if name in _ATTENTION:
            return 'fused attention'
        if name in _LAYERS:
            dynamic = not self._is_constant(tensors[1])
            return f'{name} whose weight is an activation' if dynamic else f'{name} in floating point'
        return 'sampling at computed places' if name in _SAMPLING else ''


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
