# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a quantized model computes in floating point inside its scope, seen while it runs.

Conversion knows classes of modules. A product that a forward writes itself (``@``, ``einsum``), a functional layer or
sampling at learned places belongs to no such class and would stay in floating point unseen. Here two passes on
different pictures are watched operation by operation, and each such operation is named with the module that ran it. An
operand that is the same in both passes is a parameter or made of parameters, and no activation.
"""

from collections import Counter
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from psaq_mm.contexts import hooked
from psaq_mm.models.quantized import report_of, spec_of
from psaq_mm.models.scope import scope_filter
from psaq_mm.models.task import TaskModel
from psaq_mm.quantization import QuantMatMul, class_before, in_mode, is_quantized_layer, quantizers

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
_SAMPLING = ('grid_sample', 'deformable')
_NAMES = frozenset((*_PRODUCTS, *_ATTENTION, *_LAYERS, *_SAMPLING))


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


def uncovered(model: nn.Module, size: Tuple[int, int], with_told: bool = False) -> List[Uncovered]:
    """Operations inside the scope of a quantized model that no quantizer covers, in two passes on noise.

    Args:
        model: Quantized; its quantizers need no ranges.
        size: (height, width) of the noise, in pixels.
        with_told: Also those of modules that the conversion's report names as floating point.

    Returns:
        In the order of the first call. Products of two activations, products of an activation with a parameter outside
        of a layer, fused attention, layers called as functions, sampling at computed places, and layers of classes that
        have no quantized form. Sums, activations, norms and softmax are left out: they are edges, or in floating point
        in every model.
    """
    view, scope = TaskModel(model, ()), spec_of(model).scope
    covers, told = scope_filter(model, scope), set() if with_told else {row.name for row in report_of(model).floats}
    noise = torch.randn(1, view.image_spec.channels, *size, generator=torch.Generator().manual_seed(0))
    noise = noise.to(next(model.parameters()).device)
    with in_mode([quantizer for _, quantizer in quantizers(model)], 'off'):
        rows = watch(model, lambda pictures: view.calibration_forward(pictures, scope), noise)
    modules = dict(model.named_modules())
    return [row for row in rows if row.module not in told and covers(row.module, modules[row.module])]


def watch(model: nn.Module, run: Callable[[Tensor], Any], pictures: Tensor) -> List[Uncovered]:
    """See :func:`uncovered`, in all of a model.

    Args:
        model: Quantized or not.
        run: Passes pictures through it.
        pictures: Those of the first pass, (B, C, H, W). The second pass gets others.
    """
    names = {module: name for name, module in model.named_modules()}
    passes = []
    for images in (pictures, pictures.flip(-1) * 0.5 + 0.1):
        mode = _Watch()
        with _told_where(names, mode), mode, torch.no_grad():
            run(images)
        passes.append(mode.calls)
    seen: Counter = Counter()
    for first, second in zip_longest(*passes):
        operation = _operation(first, second)
        if operation:
            seen[(first or second).module, operation] += 1
    return [
        Uncovered(names.get(module, ''), class_before(type(module or model)).__name__, operation, calls)
        for (module, operation), calls in seen.items()
    ]


class _Call(NamedTuple):
    """An operation of a module.

    Attributes:
        module: Whose forward ran it; None outside of all.
        name: Of the function of torch.
        operands: Two sums of each tensor that it got: equal in both passes, where it does not depend on the pictures.
    """

    module: Optional[nn.Module]
    name: str
    operands: List[Tuple[float, float]]


def _operation(first: Optional[_Call], second: Optional[_Call]) -> str:
    """What is told of a call in two passes; ``''`` where no operand depends on the pictures."""
    call = first or second
    if first is None or second is None or first[:2] != second[:2] or len(first.operands) != len(second.operands):
        depends = [True] * len(call.operands)  # the passes took different ways
    else:
        depends = [a != b for a, b in zip(first.operands, second.operands)]
    if not any(depends):
        return ''
    if call.name in _PRODUCTS:
        title = 'matmul' if 'matmul' in call.name else call.name
        return f'{title} of two activations' if sum(depends) > 1 else f'{title} with a parameter'
    if call.name in _LAYERS:
        return f'{call.name} whose weight is an activation' if depends[1] else f'{call.name} in floating point'
    return 'fused attention' if call.name in _ATTENTION else 'sampling at computed places'


@contextmanager
def _told_where(names: Dict[nn.Module, str], mode: '_Watch') -> Iterator[None]:
    """Inside the block the mode knows which modules' forwards are running."""

    def enter(module: nn.Module, args: Any) -> None:
        mode.running.append(module)
        if type(module).__module__.startswith('mmcv.ops') and 'eform' in type(module).__name__:
            mode.note('deformable', _tensors(args))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        mode.running.pop()

    entering = hooked(names, lambda module: module.register_forward_pre_hook(enter))
    with entering, hooked(names, lambda module: module.register_forward_hook(leave)):
        yield


class _Watch(TorchFunctionMode):
    """Notes the operations of interest that belong to no quantized module, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.running: List[nn.Module] = []
        self.calls: List[_Call] = []

    def note(self, name: str, operands: Iterable[Tensor]) -> None:
        """Note an operation of the module that is running, unless it or one around it is quantized."""
        if not any(isinstance(one, QuantMatMul) or is_quantized_layer(one) for one in self.running):
            sums = [(float(one.double().sum()), float(one.double().abs().sum())) for one in operands]
            self.calls.append(_Call(self.running[-1] if self.running else None, name, sums))

    def __torch_function__(
        self, function: Callable, types: Any, args: Tuple = (), kwargs: Optional[Dict] = None
    ) -> Any:
        name = getattr(function, '__name__', '')
        if name in _NAMES:
            self.note(name, list(_tensors([args, kwargs or {}])))
        return function(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
