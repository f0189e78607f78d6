# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""OpenVINO on the CPU. Its package is imported when a graph is started."""

import contextlib
import ctypes
import io
import sys
import threading
from typing import Any, Dict, Iterator, List, Mapping, Optional

import numpy as np

from psaq_mm.errors import ConfigError, nearest
from psaq_mm.runtime.kernels import NARROW
from psaq_mm.runtime.registry import Product, Runtime, register_runtime

__all__ = ['OpenVino']

_SETTINGS: Dict[str, Any] = {
    'PERFORMANCE_HINT': 'LATENCY',
    # What is float in the graph is float32 at run time too: a CPU with bfloat16 or float16 units would otherwise use
    # those.
    'INFERENCE_PRECISION_HINT': 'f32',
    # And what is quantized is so by the ranges of the model alone: where it has no integer kernel, OpenVINO would
    # quantize the activations by ranges of its own.
    'DYNAMIC_QUANTIZATION_GROUP_SIZE': '0',
}


class _SignalStack(ctypes.Structure):
    """``stack_t`` of Linux."""

    _fields_ = [('address', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]


_DISABLED = 2
"""``SS_DISABLE``: the thread has no alternate signal stack."""


@contextlib.contextmanager
def _signal_stack_kept() -> Iterator[None]:
    """The calling thread has the same alternate signal stack after the block as before.

    OpenVINO 2026.4 sets one of its own as a core loads the plugin of the CPU. As the plugin is unloaded it frees that
    stack, and sets the one before again if its own is still set. Of two plugins, the second one so sets the stack that
    the first one has freed, and the next handler ends the process: Python's handlers run on that stack, and PyTorch's
    data loader leaves one of SIGCHLD behind. A plugin that finds another stack than its own sets none.
    """
    if sys.platform != 'linux':
        yield
        return
    sigaltstack = ctypes.CDLL(None).sigaltstack
    before = _SignalStack()
    sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        # Refused where it has no room for registers that the process has asked for meanwhile (AMX). None is safe too.
        if sigaltstack(ctypes.byref(before), None):
            sigaltstack(ctypes.byref(_SignalStack(flags=_DISABLED)), None)


@register_runtime
class OpenVino(Runtime):
    """A graph in OpenVINO.

    Args:
        graph, threads, way: See :class:`.registry.Runtime`.
        device: ``'CPU'``, ``'GPU'``, ``'AUTO'``, ``'HETERO:GPU,CPU'`` and so on.
        settings: Of ``compile_model``, such as ``{'NUM_STREAMS': 2}``.
        check_weights: Take float kernels in place of ``'weights'`` where a weight has codes beyond
            :data:`.kernels.NARROW`.
    """

    name = package = 'openvino'
    title = 'OpenVINO'
    minimum = '2024.4'
    ways = ('integer', 'weights', 'float')

    @_signal_stack_kept()
    def __init__(
        self,
        graph: bytes,
        threads: Optional[int],
        way: str,
        device: Optional[str] = None,
        settings: Optional[Mapping[str, Any]] = None,
        check_weights: bool = False,
    ):
        import openvino

        core = openvino.Core()
        device = 'CPU' if device is None else _checked_device(core, device)
        model = core.read_model(io.BytesIO(graph))
        self.output_names = [output.get_any_name() for output in model.outputs]
        self.input_names = {name for port in model.inputs for name in port.get_names()}
        if way == 'weights' and check_weights and _has_wide_weights(model):
            way = 'float'
        if way == 'weights' and not _make_activation_products_float_(model):
            way = 'integer'
        own = {**_SETTINGS, **({'INFERENCE_NUM_THREADS': threads} if threads else {})}
        if way == 'float':
            own['LP_TRANSFORMS_MODE'] = 'NO'
        else:
            _hold_concatenations_(model)
        self.kernels = way
        self.compiled = _compiled(core, model, device, own, dict(settings or {}))
        self.request = self.compiled.create_infer_request()
        self.lock = threading.Lock()

    @classmethod
    def begin(cls, graph: bytes, threads: Optional[int], kernels: str, **place) -> 'OpenVino':
        """A session with the kernels that are asked for."""
        if kernels == 'auto':
            return cls(graph, threads, cls.exact_way(**place), **place, check_weights=True)
        return cls(graph, threads, kernels, **place)

    def run(self, inputs: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """All outputs by name. Threads wait for each other, as there is one request."""
        with self.borrowed(inputs) as outputs:
            return {name: np.array(output) for name, output in outputs.items()}

    @contextlib.contextmanager
    def borrowed(self, inputs: Mapping[str, np.ndarray]) -> Iterator[Dict[str, np.ndarray]]:
        """All outputs by name, in the request's memory, which the next run writes to. Threads wait for each other."""
        with self.lock:
            # Inputs and outputs are read where they lie.
            outputs = self.request.infer(dict(inputs), share_inputs=True, share_outputs=True)
            yield {name: outputs[i] for i, name in enumerate(self.output_names)}

    def products(self, graph: bytes) -> List[Product]:
        """The products of the compiled graph: the name of a primitive ends in its precision."""
        products = []
        for node in self.compiled.get_runtime_model().get_ordered_ops():
            info = {key: value.astype(str) for key, value in node.get_rt_info().items() if key in _INFO}
            kind, primitive = info.get('layerType', ''), info.get('primitiveType', '')
            name, described = node.get_friendly_name(), f'{kind}, {primitive}'
            if kind == 'Subgraph':
                merged = info.get('originalLayersNames', '').split(',')
                if sum(layer.rpartition('/')[2].startswith('MatMul') for layer in merged) > 1:
                    products.append(Product(name, described, 'fused'))
            elif kind in ('MatMul', 'FullyConnected', 'Convolution', 'Deconvolution'):
                integer = primitive.lower().endswith(('i8', 'u8'))
                products.append(Product(name, described, 'integer' if integer else 'float'))
        return products


_CHOOSING = ('AUTO', 'MULTI', 'HETERO', 'BATCH')
"""Devices that stand for others."""


def _checked_device(core, device: str) -> str:
    """The name of a device as OpenVINO writes it.

    Raises:
        ConfigError: It is not there.
    """
    kind, _, others = str(device).upper().partition(':')
    there = core.available_devices
    named = [kind] if kind not in _CHOOSING else [name.partition('(')[0].lstrip('-') for name in others.split(',')]
    plain = [name.partition('.')[0] for name in there]
    if not all(name in (*there, *plain) for name in named if name):
        raise ConfigError(
            f'device={device!r} is not there: OpenVINO finds {", ".join(there)} on this machine (and AUTO, which '
            'chooses one of them)'
        )
    return f'{kind}:{others}' if others else kind


def _compiled(core, model, device: str, own: Mapping[str, Any], settings: Mapping[str, Any]):
    """Compile a model.

    Args:
        core: OpenVINO's.
        model: As it read it.
        device: Name of the device.
        own: psaq_mm's settings; a device that does not know one of them gets the others.
        settings: The user's.

    Raises:
        ConfigError: A setting is not known, or has a wrong value.
    """
    kind = device.partition(':')[0]
    chooses = kind in _CHOOSING
    known = {
        str(name)
        for asked in (kind, *(core.available_devices if chooses else ()))
        for name, access in core.get_property(asked, 'SUPPORTED_PROPERTIES').items()
        if access != 'RO'
    }
    hidden = {'LP_TRANSFORMS_MODE'}  # taken, but not told
    if chooses:  # it passes on what the chosen one tells of; what is hidden is set for this core's CPU itself
        if 'CPU' in core.available_devices:
            core.set_property('CPU', {name: value for name, value in own.items() if name in hidden})
        own = {name: value for name, value in own.items() if name not in hidden}
    else:
        own = {name: value for name, value in own.items() if name in known | hidden}
    foreign = sorted(set(settings) - known - hidden)
    if foreign:
        raise ConfigError(
            f'settings={foreign[0]!r} is not known to OpenVINO on {device}: {nearest(foreign[0], sorted(known))}'
        )
    try:
        return core.compile_model(model, device, {**own, **settings})
    except RuntimeError as error:
        if not settings and device == 'CPU':
            raise
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), '')
        raise ConfigError(
            f'OpenVINO does not start with device={device!r} and settings={dict(settings)!r} ({reason.strip()}): '
            'change them, or leave them out'
        ) from error


_INFO = ('layerType', 'primitiveType', 'originalLayersNames')


def _has_wide_weights(model) -> bool:
    """Whether a weight of an OpenVINO model has codes beyond :data:`.kernels.NARROW`. Zero points and look-up tables
    are no matrices of int8.
    """
    for node in model.get_ops():
        if (
            node.get_type_name() == 'Constant'
            and node.get_element_type().get_type_name() == 'i8'
            and len(node.get_output_shape(0)) > 1
        ):
            codes = np.asarray(node.data)
            if codes.size and max(-int(codes.min()), int(codes.max())) > NARROW:
                return True
    return False


def _hold_concatenations_(model) -> int:
    """Keep quantizers with signed codes behind the concatenation that they read, in place.

    OpenVINO 2026.4 moves them before it, makes their codes unsigned, and gives a wrong product of them (seen: 28 %
    off). It does not find the concatenation behind a maximum with the least number, which changes no value.

    Returns:
        How many there are.
    """
    from openvino import opset8

    found = []
    for node in model.get_ordered_ops():
        if node.get_type_name() == 'FakeQuantize':
            source = node.input(0).get_source_output().get_node()
            readers = [port.get_node() for port in node.output(0).get_target_inputs()]
            signed = any(reader.get_element_type().get_type_name() == 'i8' for reader in readers)
            if signed and 'Concat' in (source.get_type_name(), *_sources_of(source)):
                found.append(node.input(0))
    for port in found:
        least = opset8.constant(np.full(1, np.finfo(np.float32).min, np.float32))
        port.replace_source_output(opset8.maximum(port.get_source_output(), least).output(0))
    return len(found)


def _sources_of(node) -> List[str]:
    return [port.get_source_output().get_node().get_type_name() for port in node.inputs()]


def _make_activation_products_float_(model) -> int:
    """Make the products of activations in an OpenVINO model float ones, in place.

    A maximum with the least number changes no value, and OpenVINO does not find the codes before it.

    Returns:
        How many there are.
    """
    from openvino import opset8

    from_inputs, products = set(), []
    for node in model.get_ordered_ops():
        sources = [port.get_source_output().get_node() for port in node.inputs()]
        varies = [source.get_friendly_name() in from_inputs for source in sources]
        if node.get_type_name() == 'Parameter' or any(varies):
            from_inputs.add(node.get_friendly_name())
        if node.get_type_name() == 'MatMul' and all(varies) and node.get_element_type().get_type_name() == 'f32':
            products.append(node)
    for node in products:
        port = node.input(1)
        least = opset8.constant(np.full(1, np.finfo(np.float32).min, np.float32))
        port.replace_source_output(opset8.maximum(port.get_source_output(), least).output(0))
    return len(products)
