# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How products with integer weights are written, so that every runtime has a kernel for them.

OpenVINO multiplies integers wherever both operands are dequantized codes. ONNX Runtime does so for a linear product,
and for a convolution only where its output is codes again and its bias is int32 (its QLinearConv). Any other
convolution is a float one there, for which it would dequantize the weight in every call, unless the weight is written
as a cast and a multiplication, which it computes when it loads. For OpenVINO the two ways are the same.

So a convolution whose output only one quantizer reads gets an int32 bias in units of its products, and the weight of
what is float in ONNX Runtime is cast and multiplied. Where maps are joined before they are quantized, and a convolution
makes one of them, each is quantized before they are joined: the codes are the same.
"""

from collections import Counter, defaultdict
from typing import Dict, Iterable, List, Mapping, Optional, Set, Tuple

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from psaq_mm.deploy.symbols import CAST_VALUE
from psaq_mm.runtime.kernels import NARROW

__all__ = ['Products']

_MOVES = ('Transpose', 'Reshape', 'Unsqueeze', 'Squeeze', 'Flatten', 'Slice', 'Concat', 'Gather', 'DepthToSpace')
"""Operations that move codes and change none."""

_GREATEST_BIAS = 2**30
_GREATEST_SHARE = 5e-4
"""Of codes that the rounding of a bias may change: the mean distance that it moves a value, in steps of the output.
Where weights have few bits the unit of a bias is coarse, and the convolution keeps its float one."""


class Products:
    """The products of a graph, rewritten.

    Args:
        nodes: Of the graph, in the order of execution. Weights are DequantizeLinear, each once.
        constants: Tensors by name.
        outputs: Names of the graph's outputs.

    Attributes:
        nodes: The new ones. Nodes that nothing reads any more are still there.
        constants: New tensors by name.
        copies: By the name of a new tensor, that of the tensor of weight codes or zero points that it is a copy of.
    """

    def __init__(self, nodes: Iterable[NodeProto], constants: Mapping[str, np.ndarray], outputs: Set[str]):
        self._old, self._outputs = constants, outputs
        self.nodes: List[NodeProto] = []
        self.constants: Dict[str, np.ndarray] = {}
        self.copies: Dict[str, str] = {}
        self._uses: Counter = Counter()  # by weight, integer products that read it
        nodes = list(nodes)
        self._index(nodes)
        self._replaced: Set[str] = set()  # joined maps that nothing reads any more
        nodes = [part for node in nodes for part in self._quantized_apart(node)]
        nodes = [node for node in nodes if not self._replaced.intersection(node.output)]
        self._index(nodes)
        for node in nodes:
            if node.op_type in ('Conv', 'ConvTranspose', 'MatMul'):
                self._rewrite(node)
            self.nodes.append(node)

    def _index(self, nodes: List[NodeProto]) -> None:
        self._producer = {output: node for node in nodes for output in node.output}
        self._readers: Dict[str, List[NodeProto]] = defaultdict(list)
        for node in nodes:
            if node.op_type != 'Shape':  # which a runtime knows when it loads the graph, unless it is dynamic
                for name in node.input:
                    self._readers[name].append(node)

    def _quantized_apart(self, node: NodeProto) -> List[NodeProto]:
        """What takes the place of a node: several, where it quantizes joined maps of which a convolution makes one."""
        joined = self._producer.get(node.input[0]) if node.op_type == 'QuantizeLinear' else None
        if joined is None or joined.op_type != 'Concat' or self._only_reader(joined) is not node:
            return [node]
        if not any(self._is_from_convolution(name) for name in joined.input):
            return [node]
        self._replaced.update(joined.output)
        codes = node.output[0]
        parts = [
            helper.make_node('QuantizeLinear', [name, *node.input[1:]], [f'{codes}.{i}'], name=f'{codes}.{i}')
            for i, name in enumerate(joined.input)
        ]
        axis = next(helper.get_attribute_value(a) for a in joined.attribute if a.name == 'axis')
        return [*parts, helper.make_node('Concat', [p.output[0] for p in parts], [codes], name=codes, axis=axis)]

    def _is_from_convolution(self, name: str) -> bool:
        """Whether a map comes from a convolution with at most an activation function after it, and nothing else reads
        either of them.
        """
        for _ in range(2):
            node = self._producer.get(name)
            if node is None or len(self._readers[name]) > 1 or name in self._outputs:
                return False
            if node.op_type == 'Conv':
                return True
            if node.op_type not in ('Relu', 'Clip'):
                return False
            name = node.input[0]
        return False

    def _rewrite(self, node: NodeProto) -> None:
        """Change the inputs of a product in place, if it is one with a weight."""
        weight = self._producer.get(node.input[1])
        if weight is None or weight.op_type != 'DequantizeLinear' or weight.input[0] not in self._old:
            return
        if node.op_type == 'MatMul':
            integer = self._dequantizer_before(node.input[0]) is not None
        else:
            integer = node.op_type == 'Conv' and self._gets_integer_bias(node, weight)
        node.input[1] = self._own_weight(weight) if integer else self._cast_weight(weight)

    def _dequantizer_before(self, name: str) -> Optional[NodeProto]:
        """What dequantizes the codes that a tensor is of, which may have been moved; None for one of none."""
        node = self._producer.get(name)
        while node is not None and node.op_type in _MOVES:
            node = self._producer.get(node.input[0])
        codes = node is not None and node.op_type == 'DequantizeLinear' and node.input[0] not in self._old
        return node if codes else None

    # ------------------------------------------------------------------ weights
    def _own_weight(self, weight: NodeProto) -> str:
        """Name of a dequantized weight for one more integer product.

        Each product with a wide weight has its own copy, under another name: where ONNX Runtime multiplies with wide
        weights plus 128, it makes these for each product by the name of the codes, and does not start if two have one
        name. On disk the copies are one tensor.
        """
        codes, scale, zero_point = weight.input
        self._uses[codes] += 1
        count = self._uses[codes]
        if count == 1 or int(np.abs(self._old[codes].astype(np.int16)).max()) <= NARROW:
            return weight.output[0]
        names = [f'{name.rpartition(".")[0]}.{count}.{name.rpartition(".")[2]}' for name in (codes, zero_point)]
        for name, old in zip(names, (codes, zero_point)):
            self.constants[name], self.copies[name] = self._old[old], old
        value = f'{names[0].rpartition(".")[0]}.value'
        self._add('DequantizeLinear', [names[0], scale, names[1]], value, axis=_axis(weight))
        return value

    def _cast_weight(self, weight: NodeProto) -> str:
        """Name of a dequantized weight that is written as a cast and a multiplication."""
        codes, scale, zero_point = weight.input
        base = codes.rpartition('.')[0]
        value = f'{base}{CAST_VALUE}'
        if value in self._producer:
            return value
        shape = [1] * self._old[codes].ndim
        shape[_axis(weight)] = -1
        x = self._add('Cast', [codes], f'{base}.cast', to=TensorProto.FLOAT)
        if self._old[zero_point].any():
            zeros = self._constant(f'{base}.cast_zero_point', self._old[zero_point].astype(np.float32).reshape(shape))
            x = self._add('Sub', [x, zeros], f'{base}.cast_centred')
        factors = self._constant(f'{base}.cast_scale', self._old[scale].reshape(shape))
        return self._add('Mul', [x, factors], value)

    # ------------------------------------------------------------------ biases
    def _gets_integer_bias(self, node: NodeProto, weight: NodeProto) -> bool:
        """Whether a convolution is of codes, and its output becomes codes at once. Its bias is int32 then, in place."""
        source, quantizer = self._dequantizer_before(node.input[0]), self._quantizer_after(node)
        if source is None or quantizer is None:
            return False
        zero_points = [self._old[side.input[2]] for side in (source, quantizer)]
        if zero_points[0].dtype != zero_points[1].dtype or self._old[weight.input[2]].any():
            return False
        step = self._old[quantizer.input[1]]
        unit = self._old[source.input[1]] * self._old[weight.input[1]]  # float32, as runtimes multiply them
        bias = self._bias(node)
        if bias is not None:
            whole = np.rint(bias / unit.astype(np.float64))
            moved = np.abs(whole * unit - bias).mean() / step
            if not np.isfinite(whole).all() or np.abs(whole).max() > _GREATEST_BIAS or moved > _GREATEST_SHARE:
                return False
            self._write_bias(node, whole, unit)
        quantizer.input[0] = node.output[0]
        return True

    def _quantizer_after(self, node: NodeProto) -> Optional[NodeProto]:
        """The quantizer that is the only reader of a tensor. An activation function between the two that changes no
        code does not count.
        """
        reader = self._only_reader(node)
        bounds = (-np.inf, np.inf) if reader is None else self._bounds(reader)
        if reader is not None and bounds is not None:
            reader = self._only_reader(reader)
        if reader is None or reader.op_type != 'QuantizeLinear':
            return None
        scale, zero_point = (self._old[name] for name in reader.input[1:])
        ends = np.iinfo(zero_point.dtype)
        low, high = np.rint(np.array(bounds or (-np.inf, np.inf), np.float32) / scale) + np.float32(zero_point)
        return reader if low <= ends.min and high >= ends.max else None

    def _only_reader(self, node: NodeProto) -> Optional[NodeProto]:
        readers = self._readers[node.output[0]]
        return readers[0] if len(readers) == 1 and node.output[0] not in self._outputs else None

    def _bounds(self, node: NodeProto) -> Optional[Tuple[float, float]]:
        """What an activation function clips to; None if it is none that clips."""
        if node.op_type == 'Relu':
            return 0.0, np.inf
        if node.op_type != 'Clip':
            return None
        ends = [self._array(name) if name else np.array(end) for name, end in zip(node.input[1:], (-np.inf, np.inf))]
        return None if len(ends) < 2 or any(end is None for end in ends) else (float(ends[0]), float(ends[1]))

    def _bias(self, node: NodeProto) -> Optional[np.ndarray]:
        """Bias of a convolution, in double precision; None without one. One that is computed is none of numbers."""
        if len(node.input) < 3 or not node.input[2]:
            return None
        bias = self._array(node.input[2])
        return np.array(np.nan) if bias is None else bias.astype(np.float64)

    def _array(self, name: str) -> Optional[np.ndarray]:
        """A constant tensor; PyTorch's exporter gives some a second name by Identity."""
        node = self._producer.get(name)
        while node is not None and node.op_type == 'Identity':
            name, node = node.input[0], self._producer.get(node.input[0])
        if node is not None and node.op_type == 'Constant':
            return numpy_helper.to_array(node.attribute[0].t) if node.attribute[0].name == 'value' else None
        return self._old.get(name)

    def _write_bias(self, node: NodeProto, whole: np.ndarray, unit: np.ndarray) -> None:
        base = f'{node.name or node.output[0]}.bias'
        parameters = [
            self._constant(f'{base}.codes', whole.astype(np.int32)),
            self._constant(f'{base}.scale', unit),
        ]
        node.input[2] = self._add('DequantizeLinear', parameters, f'{base}.value', axis=0)

    # ------------------------------------------------------------------ building blocks
    def _constant(self, name: str, array: np.ndarray) -> str:
        self.constants[name] = array
        return name

    def _add(self, kind: str, inputs: List[str], output: str, **attributes) -> str:
        node = helper.make_node(kind, inputs, [output], name=output, **attributes)
        self.nodes.append(node)
        self._producer[output] = node
        return output


def _axis(weight: NodeProto) -> int:
    return next(helper.get_attribute_value(a) for a in weight.attribute if a.name == 'axis')
