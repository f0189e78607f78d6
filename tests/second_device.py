"""A second device in one process without a GPU: finds what on a GPU would be "two devices" in one operation.

Tensors stay ordinary ones of the CPU, and so do their values and their gradients. Which of them are said to be on the
other device is known by their storage, so views, parameters and what ``module.to`` puts into them need nothing more.
Two modes of PyTorch keep it: one sees what Python calls (``device=``, ``.to``, ``.cpu``, ``.numpy``,
``tensor.device``), the other every operation under that, in backward too; it says on which device the outcome lies, and
raises as PyTorch does where an operation gets two.

Not seen: streams, what a kernel itself computes, and libraries that are bound past PyTorch (mmcv's are wrapped).
"""

import contextlib
import inspect

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICES = (
    'emulated',
    pytest.param(
        'cuda',
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')],
    ),
)
"""Parameters of a fixture: a device that is emulated here, and a GPU where there is one."""

_INDEXED = {'aten::index', 'aten::index_put', 'aten::index_put_', 'aten::_index_put_impl_', 'aten::_unsafe_index'}
"""Their indices may lie on the CPU."""

_TO_HOST = {'item', 'tolist', '__bool__', '__float__', '__int__', '__index__', 'nonzero', 'numpy'}


def _tensors(*values):
    """The tensors in any nesting of lists, tuples and dicts."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(*value)
        elif isinstance(value, dict):
            found += _tensors(*value.values())
    return found


def _address(x):
    """Of a tensor's storage, None where it has none."""
    return x.untyped_storage()._cdata if x.layout is torch.strided and not x.is_meta else None


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, device, there):
        ctx.device, ctx.back = device, not there
        return device.place(x.detach().clone(), there)

    @staticmethod
    def backward(ctx, grad):
        ctx.device.inherit = ctx.back  # the nodes before it are on that device
        return ctx.device.place(grad.clone(), ctx.back), None, None


class SecondDevice:
    """Inside the ``with`` block there is a device more.

    Args:
        kind: ``'cuda'``, or ``'mps'``, which has no float64.

    Attributes:
        device: ``torch.device`` of that kind.
        waits: Names of the calls so far for which the host has waited to read a value from it.

    Example:
        >>> with SecondDevice() as second:
        ...     torch.ones(2, device='cuda') + torch.ones(2)
        RuntimeError: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!
    """

    def __init__(self, kind='cuda'):
        self.kind, self.device, self.waits = kind, torch.device(kind, 0), []
        self.here = {}  # storages on the device; a weak reference keeps their addresses from being used again
        self.inherit = False  # whether what is made out of no tensor belongs there
        self.stack = contextlib.ExitStack()

    def __enter__(self):
        self.stack.enter_context(_Operations(self))
        self.stack.enter_context(_Calls(self))
        return self

    @contextlib.contextmanager
    def paused(self):
        """Nothing is seen inside, such as while a graph is traced, which the modes disturb."""
        self.stack.close()
        try:
            yield
        finally:
            self.__enter__()

    def __exit__(self, *error):
        self.stack.close()

    # ------------------------------------------------------------------ where tensors are
    def has(self, x):
        """Whether a tensor is on the device."""
        with torch._C.DisableTorchFunction():
            return _address(x) in self.here

    def place(self, x, there):
        """Say that a tensor's storage is there, or here; the tensor."""
        with torch._C.DisableTorchFunction():
            if _address(x) is not None:
                storage = x.untyped_storage()
                address = storage._cdata
                if not there:
                    self.here.pop(address, None)
                elif address not in self.here:
                    if self.kind == 'mps' and x.dtype == torch.float64:
                        raise TypeError(
                            "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support "
                            'float64. '
                            'Please use float32 instead.'
                        )
                    self.here[address] = StorageWeakRef(storage)
                    self._forget()
        return x

    def _forget(self):
        if len(self.here) % 1000 == 0:
            self.here = {address: storage for address, storage in self.here.items() if not storage.expired()}

    def place_new(self, made, given):
        """Outcomes that lie in no memory of what was given."""
        with torch._C.DisableTorchFunction():
            known = {*map(_address, given)}
            for x in made:
                if _address(x) not in known:
                    self.place(x, True)

    def moved(self, x, there):
        return x if self.has(x) == there else _Move.apply(x, self, there)

    @contextlib.contextmanager
    def inheriting(self, there):
        before, self.inherit = self.inherit, there
        try:
            yield
        finally:
            self.inherit = before

    def wrapped(self, function):
        """A function of a library that is bound past PyTorch."""

        def call(*args, **kwargs):
            with self.inheriting(any(map(self.has, _tensors(args, kwargs)))):
                return function(*args, **kwargs)

        return call


class _Calls(TorchFunctionMode):
    """What Python calls."""

    def __init__(self, second):
        self.second = second

    def __torch_function__(self, func, types, args=(), kwargs=None):
        second, kwargs, name = self.second, dict(kwargs or {}), getattr(func, '__name__', '')
        if name in ('__get__', '__set__'):
            return self._attribute(func, name, args, kwargs)
        given = _tensors(args, kwargs)
        there = any(map(second.has, given))
        if there and name in _TO_HOST:
            second.waits.append(name)
        if name in ('numpy', '__array__') and there:
            raise TypeError(
                f"can't convert {second.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to "
                f'host memory '
                'first.'
            )
        if name in ('to', 'cpu', 'cuda') and given:
            return self._moved(func, name, args, kwargs)
        target = kwargs.get('device')
        if target is not None:
            target, kwargs['device'] = torch.device(target).type == second.kind, 'cpu'
        generator = kwargs.get('generator')
        if generator is not None and generator.device.type == 'cpu' and (there if target is None else target):
            raise RuntimeError(f"Expected a '{second.kind}' device type for generator but found 'cpu'")
        with second.inheriting(there if target is None else target):
            out = func(*args, **kwargs)
        if name in ('backward', 'grad'):
            return out
        if target is not None and isinstance(out, torch.Tensor):
            kept = any(out.untyped_storage()._cdata == x.untyped_storage()._cdata for x in given)
            return second.moved(out, target) if kept else second.place(out, target)
        if there:
            second.place_new(_tensors(out), given)
        return out

    def _attribute(self, func, name, args, kwargs):
        second, attribute, x = self.second, func.__self__.__name__, args[0]
        if name == '__get__' and attribute in ('device', 'is_cuda', 'is_mps', 'is_cpu') and second.has(x):
            return second.device if attribute == 'device' else attribute == f'is_{second.kind}'
        if name == '__set__' and attribute == 'grad' and args[1] is not None and second.has(x) != second.has(args[1]):
            raise RuntimeError('assigned grad has data located on a different device')
        return func(*args, **kwargs)

    def _moved(self, func, name, args, kwargs):
        second, x, target = self.second, args[0], None
        if name == 'to':
            rest, like = [], None
            for value in (*args[1:], kwargs.pop('device', None), kwargs.pop('other', None)):
                if isinstance(value, torch.Tensor):
                    target, like = second.has(value), value
                elif isinstance(value, (str, int, torch.device)) and not isinstance(value, bool):
                    target = torch.device(value).type == second.kind
                elif isinstance(value, torch.dtype):
                    rest.append(value)
            if like is not None:
                rest = [like.dtype]
            kwargs.pop('non_blocking', None)
        else:
            rest, kwargs, target = [], {}, name != 'cpu'
        if target is False and second.has(x):
            second.waits.append(name)
        if target is not None:
            x = second.moved(x, target)
        if not rest and not kwargs:
            return x
        out = torch.Tensor.to(x, *rest, **kwargs)
        return second.place(out, True) if second.has(x) and out is not x else out


class _Operations(TorchDispatchMode):
    """Every operation of PyTorch, below autograd."""

    def __init__(self, second):
        super().__init__()
        self.second = second

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        second, kwargs = self.second, kwargs or {}
        with torch._C.DisableTorchFunction():
            given = _tensors(args, kwargs)
            there = [_address(x) in second.here for x in given]
            if any(there) and not all(there):
                self._check(func, args, kwargs, given, there)
            if func is torch.ops.aten._local_scalar_dense.default and any(there) and not second.inherit:
                second.waits.append('_local_scalar_dense')
            out = func(*args, **kwargs)
            if any(there) if given else second.inherit:
                second.place_new(_tensors(out), given)
            return out

    def _check(self, func, args, kwargs, given, there):
        if func._schema.name == 'aten::copy_':
            return
        second, name = self.second, func._schema.name
        if name in _INDEXED:
            if second.has(args[0]):
                wrong = [x for x in _tensors(args[2:3]) if x.dim() and not second.has(x)]
                wrong = wrong if len(args) > 2 else []
            else:
                wrong = [x for x in _tensors(args[1:3]) if second.has(x)]
        else:
            wrong = [x for x, on in zip(given, there) if not on and x.dim()]
            written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
            for argument, value in [*zip([a.name for a in func._schema.arguments], args), *kwargs.items()]:
                if argument in written:
                    wrong += [x for x in _tensors(value) if not second.has(x)]
        if wrong:
            raise RuntimeError(
                f'Expected all tensors to be on the same device, but found at least two devices, {second.device} and '
                f'cpu! '
                f'({name})'
            )


@contextlib.contextmanager
def second_device(kind='cuda'):
    """A :class:`SecondDevice` that MMEngine's runners take, and mmcv's operations know."""
    import mmengine.device.utils as chosen
    from mmcv import _ext

    second = SecondDevice(kind)
    functions = {name: function for name, function in vars(_ext).items() if inspect.isbuiltin(function)}
    before, chosen.DEVICE = chosen.DEVICE, kind
    for name, function in functions.items():
        setattr(_ext, name, second.wrapped(function))
    try:
        with second:
            yield second
    finally:
        chosen.DEVICE = before
        for name, function in functions.items():
            setattr(_ext, name, function)
