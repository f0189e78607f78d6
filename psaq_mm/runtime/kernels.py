# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A test whether a runtime's integer kernels are exact on this processor: small products of extreme codes, compared
with exact integers.

x86 processors without VNNI have one instruction for products of 8-bit codes that adds two neighbours in 16 bits, where
2 * 255 * 127 does not fit: it saturates. (Signed activations are made unsigned for it, by adding 128.) The flags of the
processor alone do not say which kernels a runtime takes, so this is measured. It needs NumPy only.
"""

from typing import Callable, Dict, List, Mapping, NamedTuple, Sequence

import numpy as np

from psaq_mm.runtime.wire import Node, small_model

__all__ = ['EXPLAINED', 'KERNELS', 'NARROW', 'Probe', 'is_exact', 'make_probe']

KERNELS = ('auto', 'integer', 'weights', 'float')
"""What a graph is run with. ``'integer'``: integer kernels wherever the runtime has one. ``'weights'``: integer kernels
for products with weights, float kernels for products of activations. ``'float'``: float kernels for all products, on
the values of the codes. ``'auto'``: the first of these that is exact."""

EXPLAINED = dict(
    integer='integer kernels',
    weights='integer kernels, but float ones for products of activations',
    float='float kernels',
)
"""What messages call :data:`KERNELS`."""

NARROW = 64
"""Weights whose codes have at most this magnitude (7 bits) never saturate: 2 * 255 * 64 fits into 16 bits."""

_TOKENS, _CHANNELS, _SIDE = 48, 64, 9
_TOLERANCE = 1e-4  # of the greatest output: sums of float32; what saturates is 10 % off and more


class Probe(NamedTuple):
    """A small graph with inputs and the exact outputs.

    Attributes:
        graph: Content of an ONNX file.
        inputs: Arrays by name.
        wanted: Exact outputs by name.
    """

    graph: bytes
    inputs: Dict[str, np.ndarray]
    wanted: Dict[str, np.ndarray]


class _Writer:
    """A graph as exports write it, with all scales 1."""

    def __init__(self) -> None:
        self.nodes: List[Node] = []
        self.constants: Dict[str, np.ndarray] = {'one': np.ones((), np.float32)}

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes) -> str:
        self.nodes.append(Node(kind, list(inputs), output, attributes))
        return output

    def constant(self, name: str, array: np.ndarray) -> str:
        self.constants[name] = array
        return name

    def codes(self, x: str, dtype: str) -> str:
        """Quantize and dequantize ``x``."""
        zero = self.constant(f'zero.{dtype}', np.zeros((), dtype))
        codes = self.node('QuantizeLinear', [x, 'one', zero], f'{x}.codes.{dtype}')
        return self.node('DequantizeLinear', [codes, 'one', zero], f'{x}.value.{dtype}')

    def weight(self, name: str, codes: np.ndarray, axis: int) -> str:
        """A weight for one product: ONNX Runtime may not start where several products read one."""
        count, codes = codes.shape[axis], codes.astype(np.int8)
        parameters = [
            self.constant(f'{name}.scale', np.ones(count, np.float32)),
            self.constant(f'{name}.zero', np.zeros(count, np.int8)),
        ]
        return self.node(
            'DequantizeLinear', [self.constant(f'{name}.codes', codes), *parameters], f'{name}.value', axis=axis
        )


def _convolved(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    views: np.ndarray = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(2, 3))  # type: ignore
    return np.einsum('nchwyx,ocyx->nohw', views, weight)


def make_probe(greatest: int) -> Probe:
    """Make products with a weight and of activations, with unsigned and signed activations, and convolutions.

    Args:
        greatest: Greatest magnitude of the weights' codes.
    """
    rng, write = np.random.default_rng(0), _Writer()

    def extreme(shape, *codes) -> np.ndarray:
        return rng.choice(np.array(codes, np.float32), shape)

    ends = -greatest, 1 - greatest, greatest - 1, greatest
    tokens, image = (1, _TOKENS, _CHANNELS), (1, _CHANNELS // 2, _SIDE, _SIDE)
    inputs = dict(
        unsigned=extreme(tokens, 0, 254, 255, 255),
        signed=extreme(tokens, -128, -127, 126, 127),
        queries=extreme(tokens, -128, -127, 126, 127),
        keys=extreme(tokens, -128, -127, 126, 127),
        image=extreme(image, 0, 254, 255, 255),
    )
    matrix, kernel = (extreme(shape, *ends) for shape in ((_CHANNELS, _CHANNELS), (_CHANNELS, _CHANNELS // 2, 3, 3)))
    unsigned, signed, queries, keys, picture = (
        write.codes(x, 'uint8' if x in ('unsigned', 'image') else 'int8') for x in inputs
    )
    exact = {k: v.astype(np.float64) for k, v in dict(inputs, matrix=matrix, kernel=kernel).items()}
    turned = write.node('Transpose', [keys], 'turned', perm=[0, 2, 1])
    wanted = {
        write.node('MatMul', [unsigned, write.weight('matrix', matrix, 1)], 'of_unsigned'): exact['unsigned']
        @ exact['matrix'],
        write.node('MatMul', [signed, write.weight('matrix.again', matrix, 1)], 'of_signed'): exact['signed']
        @ exact['matrix'],
        write.node('MatMul', [queries, turned], 'scores'): exact['queries'] @ exact['keys'].transpose(0, 2, 1),
        write.node('Conv', [picture, write.weight('kernel', kernel, 0)], 'map'): _convolved(
            exact['image'], exact['kernel']
        ),
    }
    # ONNX Runtime has an integer kernel for a convolution only where its output is quantized.
    greatest_map = np.abs(wanted['map']).max()
    step = write.constant('step', np.array(greatest_map / 100, np.float32))
    again = write.node('Conv', [picture, write.weight('kernel.again', kernel, 0)], 'map.again')
    requantized = write.node('QuantizeLinear', [again, step, 'zero.int8'], 'map.codes')
    wanted[write.node('DequantizeLinear', [requantized, step, 'zero.int8'], 'coarse_map')] = wanted['map']
    graph = small_model(
        write.nodes, {k: v.shape for k, v in inputs.items()}, {k: v.shape for k, v in wanted.items()}, write.constants
    )
    return Probe(graph, inputs, wanted)


def is_exact(run: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]], probe: Probe) -> bool:
    """Whether a session computes the exact outputs of a probe."""
    outputs = run(probe.inputs)
    for name, wanted in probe.wanted.items():
        allowed = (0.01 if name == 'coarse_map' else _TOLERANCE) * np.abs(wanted).max()  # a step is a hundredth
        if not np.abs(outputs[name] - wanted).max() <= allowed:
            return False
    return True
