# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""ONNX Runtime on the CPU. Its package is imported when a graph is started."""

import os
import tempfile
from typing import Any, Dict, List, Mapping, Optional

import numpy as np

from psaq_mm.runtime.registry import Product, Runtime, register_runtime

__all__ = ['OnnxRuntime']

_DISABLED = ('MatMulAddFusion', 'WeightBiasQuantization')
"""Optimizers that are off. A product and its bias made one Gemm would have a float kernel, as its output is float;
apart, the product is an integer one. And a bias is float32 in the model: it is not rounded to multiples of the two
scales."""

_INTEGER = ('MatMulIntegerToFloat', 'MatMulInteger', 'QLinearMatMul', 'QLinearConv', 'ConvInteger', 'QGemm')
_FLOAT = ('MatMul', 'Gemm', 'Conv', 'ConvTranspose', 'FusedMatMul', 'FusedConv', 'FusedGemm')


@register_runtime
class OnnxRuntime(Runtime):
    """A graph in ONNX Runtime, which runs products of activations in float by itself.

    The way ``'unsigned'`` is integer kernels on weights with 128 added. They do not saturate where those of
    ``'integer'`` do.
    """

    name = package = 'onnxruntime'
    title = 'ONNX Runtime'
    ways = ('integer', 'unsigned', 'float')

    def __init__(self, graph: bytes, threads: Optional[int], way: str):
        self.session = self._new_session(graph, threads, way)
        self.way, self.kernels = way, 'float' if way == 'float' else 'integer'
        self.output_names = [output.name for output in self.session.get_outputs()]
        self.input_names = {port.name for port in self.session.get_inputs()}

    @classmethod
    def begin(cls, graph: bytes, threads: Optional[int], kernels: str) -> 'OnnxRuntime':
        """A session with the kernels that are asked for."""
        way = kernels if kernels == 'float' else cls.exact_way()
        if kernels != 'auto':
            return cls(graph, threads, 'integer' if kernels != 'float' and way == 'float' else way)
        try:
            return cls(graph, threads, way)
        except Exception:  # of the runtime's own
            # A graph of an earlier psaq_mm may read one weight in several products, which this way does not take.
            if way != 'unsigned':
                raise
            return cls(graph, threads, 'float')

    @staticmethod
    def _new_session(graph: bytes, threads: Optional[int], way: str, optimized_path: Optional[str] = None) -> Any:
        """The runtime's own session; it writes the graph as it executes it to ``optimized_path``."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what cannot be started is raised
        if threads:
            options.intra_op_num_threads = threads
        if optimized_path:
            options.optimized_model_filepath = optimized_path
        options.add_session_config_entry('session.x64quantprecision', '1' if way == 'unsigned' else '0')
        options.add_session_config_entry('session.disable_quant_qdq', '1' if way == 'float' else '0')
        return onnxruntime.InferenceSession(
            graph, options, providers=['CPUExecutionProvider'], disabled_optimizers=list(_DISABLED)
        )

    def run(self, inputs: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """All outputs by name."""
        return dict(zip(self.output_names, self.session.run(None, dict(inputs))))

    def products(self, graph: bytes) -> List[Product]:
        """The products of the optimized graph, which is read with the package onnx."""
        import onnx

        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'optimized.onnx')
            self._new_session(graph, None, self.way, path)
            nodes = onnx.load(path).graph.node
        return [
            Product(node.name, node.op_type, 'integer' if node.op_type in _INTEGER else 'float')
            for node in nodes
            if node.op_type in _INTEGER + _FLOAT
        ]
