# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""ONNX Runtime on the CPU. Its package is imported when a graph is started."""

import os
import tempfile
from typing import Any, Dict, List, Mapping, Optional, Set

import numpy as np

from psaq_mm.errors import ConfigError, nearest
from psaq_mm.runtime.registry import Product, Runtime, register_runtime

__all__ = ['OnnxRuntime']

_DISABLED = ('MatMulAddFusion', 'WeightBiasQuantization')
"""Optimizers that are off. A product and its bias made one Gemm would have a float kernel, as its output is float;
apart, the product is an integer one. And a bias is float32 in the model: it is not rounded to multiples of the two
scales."""

_INTEGER = ('MatMulIntegerToFloat', 'MatMulInteger', 'QLinearMatMul', 'QLinearConv', 'ConvInteger', 'QGemm')
_MOVES = ('ReorderInput', 'ReorderOutput', 'Transpose', 'Reshape', 'Unsqueeze', 'Squeeze', 'Gather', 'Concat')
_FLOAT = ('MatMul', 'Gemm', 'Conv', 'ConvTranspose', 'FusedMatMul', 'FusedConv', 'FusedGemm')


@register_runtime
class OnnxRuntime(Runtime):
    """A graph in ONNX Runtime, which runs products of activations in float by itself.

    ``device`` is the name of an execution provider, ``'CUDA'`` or ``'CUDAExecutionProvider'``; what that does not run
    is run on the CPU. A setting is an attribute of ``SessionOptions`` (``inter_op_num_threads``), an entry of the
    session's configuration (``session.intra_op.allow_spinning``), or ``provider_options``, a dict.

    The way ``'unsigned'`` is integer kernels on weights with 128 added. They do not saturate where those of
    ``'integer'`` do.
    """

    name = package = 'onnxruntime'
    title = 'ONNX Runtime'
    minimum = '1.18'
    ways = ('integer', 'unsigned', 'float')

    def __init__(
        self,
        graph: bytes,
        threads: Optional[int],
        way: str,
        device: Optional[str] = None,
        settings: Optional[Mapping[str, Any]] = None,
    ):
        self._place: Dict[str, Any] = dict(device=device, settings=settings)
        self.session = self._new_session(graph, threads, way, **self._place)
        self.way, self.kernels = way, 'float' if way == 'float' else 'integer'
        self.output_names = [output.name for output in self.session.get_outputs()]
        self.input_names = {port.name for port in self.session.get_inputs()}

    @classmethod
    def begin(cls, graph: bytes, threads: Optional[int], kernels: str, **place) -> 'OnnxRuntime':
        """A session with the kernels that are asked for."""
        way = kernels if kernels == 'float' else cls.exact_way(**place)
        if kernels != 'auto':
            return cls(graph, threads, 'integer' if kernels != 'float' and way == 'float' else way, **place)
        try:
            return cls(graph, threads, way, **place)
        except Exception:  # of the runtime's own
            # A graph of an earlier psaq_mm may read one weight in several products, which this way does not take.
            if way != 'unsigned':
                raise
            return cls(graph, threads, 'float', **place)

    @staticmethod
    def _new_session(
        graph: bytes,
        threads: Optional[int],
        way: str,
        optimized_path: Optional[str] = None,
        device: Optional[str] = None,
        settings: Optional[Mapping[str, Any]] = None,
    ) -> Any:
        """The runtime's own session; it writes the graph as it executes it to ``optimized_path``."""
        import onnxruntime

        providers: List[Any] = ['CPUExecutionProvider']
        if device is not None:
            providers = list(dict.fromkeys([_provider(onnxruntime, device), *providers]))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what cannot be started is raised
        if threads:
            options.intra_op_num_threads = threads
        if optimized_path:
            options.optimized_model_filepath = optimized_path
        options.add_session_config_entry('session.x64quantprecision', '1' if way == 'unsigned' else '0')
        options.add_session_config_entry('session.disable_quant_qdq', '1' if way == 'float' else '0')
        provider_options = _set_options_(options, settings or {})
        if provider_options:
            providers[0] = (providers[0], provider_options)
        try:
            return onnxruntime.InferenceSession(
                graph, options, providers=providers, disabled_optimizers=list(_DISABLED)
            )
        except Exception as error:  # of the runtime's own
            if not settings:
                raise
            raise ConfigError(
                f'ONNX Runtime does not start with settings={dict(settings)!r} ({str(error).strip().splitlines()[0]}): '
                'change them, or leave them out'
            ) from error

    def run(self, inputs: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """All outputs by name."""
        return dict(zip(self.output_names, self.session.run(None, dict(inputs))))

    def products(self, graph: bytes) -> List[Product]:
        """The products of the optimized graph, which is read with the package onnx."""
        import onnx

        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'optimized.onnx')
            self._new_session(graph, None, self.way, path, **self._place)
            optimized = onnx.load(path).graph
        reasons = _Reasons(optimized)
        return [
            Product(node.name, node.op_type, 'integer')
            if node.op_type in _INTEGER
            else Product(node.name, node.op_type, 'float', reasons.why_float(node))
            for node in optimized.node
            if node.op_type in _INTEGER + _FLOAT
        ]


class _Reasons:
    """Why a product of an optimized graph is float."""

    def __init__(self, graph: Any) -> None:
        self.producer = {name: node for node in graph.node for name in node.output}
        self.constants = {tensor.name for tensor in graph.initializer}
        self.outputs = {output.name for output in graph.output}
        self.readers: Dict[str, List[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def why_float(self, node: Any) -> str:
        """Reason of one product, in words."""
        varying = [name for name in node.input[:2] if name not in self.constants]
        if not all(self._is_of_codes(name) for name in varying):
            return 'an operand is not quantized'
        if len(varying) > 1:
            return 'a product of activations'
        if 'Conv' not in node.op_type:
            return 'its operands are of codes that the optimizers moved away from it'
        if len(node.input) > 3 and node.input[3]:
            return 'its output stays float for Add'
        others = sorted(self._float_readers(node.output[0]))
        if others:
            return f'its output stays float for {", ".join(others)}'
        return 'its bias would be rounded too far, or its output has less than 8 bits'

    def _is_of_codes(self, name: str) -> bool:
        node = self.producer.get(name)
        while node is not None and node.op_type in _MOVES:
            node = self.producer.get(node.input[0])
        return node is not None and node.op_type == 'DequantizeLinear'

    def _float_readers(self, name: str) -> Set[str]:
        """What else than quantizers reads a tensor, by the kind of operation."""
        kinds = {'an output'} if name in self.outputs else set()
        for node in self.readers.get(name, ()):
            if node.op_type in (*_MOVES, 'Relu', 'Clip'):
                kinds |= self._float_readers(node.output[0])
            elif node.op_type != 'QuantizeLinear':
                kinds.add(node.op_type)
        return kinds


_PROVIDER = 'ExecutionProvider'


def _provider(onnxruntime, device: str) -> str:
    """The execution provider of a device, with or without the ending of its name.

    Raises:
        ConfigError: This installation does not have it.
    """
    there = {name.removesuffix(_PROVIDER).lower(): name for name in onnxruntime.get_available_providers()}
    name = there.get(str(device).removesuffix(_PROVIDER).lower())
    if name is None:
        names = ', '.join(provider.removesuffix(_PROVIDER) for provider in there.values())
        raise ConfigError(
            f'device={device!r} is not there: this ONNX Runtime has {names}; another one needs a package of its own, '
            'such as onnxruntime-gpu'
        )
    return name


def _set_options_(options, settings: Mapping[str, Any]) -> Dict[str, Any]:
    """Set a user's settings on session options, in place.

    Returns:
        Those of the execution provider.

    Raises:
        ConfigError: One is not known, or has a value of another type.
    """
    known = [name for name, value in vars(type(options)).items() if isinstance(value, property)]
    for name, value in settings.items():
        try:
            if name in known:
                setattr(options, name, value)
            elif '.' in name:
                options.add_session_config_entry(name, str(value))
            elif name != 'provider_options':
                raise ConfigError(
                    f'settings={name!r} is not known to ONNX Runtime: {nearest(name, [*known, "provider_options"])}, '
                    'or an entry of its session configuration, which has a dot in its name'
                )
        except TypeError as error:
            raise ConfigError(
                f'settings={name!r} of ONNX Runtime does not take {value!r}: give a value such as its '
                f'{getattr(options, name)!r}'
            ) from error
    return dict(settings.get('provider_options') or {})
