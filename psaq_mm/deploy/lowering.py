# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Lowering of the traced graph with its symbols to plain ONNX: quantizers become QuantizeLinear and DequantizeLinear,
weights become integers.

An affine quantizer becomes QuantizeLinear (codes, uint8) and DequantizeLinear. With fewer than 8 bits a Clip comes
before them, because QuantizeLinear saturates only at 0 and 255. A logarithmic quantizer becomes ordinary operations.
Large tensors are moved out of the graph, see :mod:`psaq_mm.runtime.bundle`.
"""

import hashlib
import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, List, Mapping, Set, Tuple, Union

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from psaq_mm.deploy.exportable import Codes, ExportableModel, IntegerWeight
from psaq_mm.deploy.products import Products
from psaq_mm.deploy.symbols import DOMAIN
from psaq_mm.quantization.logarithmic import BASES, LEAST
from psaq_mm.runtime.bundle import PACKED_BITS, Weight
from psaq_mm.runtime.kernels import NARROW

__all__ = ['LoweredGraph', 'Lowering', 'WeightStore', 'lower']

IN_GRAPH_BYTES = 1024
"""Tensors up to this size stay in the graph: shapes, scales of one value, the axes of a reduction."""


class WeightStore:
    """The weights of all graphs of a model, each content once.

    Attributes:
        weights: :class:`.bundle.Weight` by name.
    """

    def __init__(self):
        self.weights: Dict[str, Weight] = {}
        self._names: Dict[Tuple, str] = {}

    def add(self, name: str, array: np.ndarray, low: Union[int, np.ndarray, None] = None, shared: bool = True) -> str:
        """Add a weight.

        Args:
            name: What the graph calls it.
            array: Its content.
            low: See :class:`.bundle.Weight`.
            shared: Whether a weight of another name with the same content may replace it.

        Returns:
            The name that it is kept under: ``name``, that of a weight with the same content, or ``name`` with a number.
        """
        content = hashlib.sha256(array.tobytes()).digest(), None if low is None else np.asarray(low).tobytes()
        key = array.dtype.name, array.shape, *content, None if shared else name
        if key not in self._names:
            unique, count = name, 1
            while unique in self.weights:
                count += 1
                unique = f'{name}.{count}'
            self._names[key] = unique
            self.weights[unique] = Weight(array, low)
        return self._names[key]


@dataclass
class LoweredGraph:
    """A graph as it is written to disk.

    Attributes:
        model: Without the large tensors.
        weights: Names of the tensors that it needs.
        codes: By quantizer, the names of its tensors of codes, one for each call (a head's layers are called for each
            level); of a logarithmic one they are whole numbers in float32.
        values: By quantizer, the names of its dequantized tensors, one for each call.
        taps: By LayerNorm, the names of its inputs, one for each call.
        layouts: See :class:`.windows.Tracing`.
    """

    model: onnx.ModelProto
    weights: List[str] = field(default_factory=list)
    codes: Dict[str, List[str]] = field(default_factory=lambda: defaultdict(list))
    values: Dict[str, List[str]] = field(default_factory=lambda: defaultdict(list))
    taps: Dict[str, List[str]] = field(default_factory=lambda: defaultdict(list))
    layouts: Dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)


def replace_items(repeated: Any, items: Iterable) -> None:
    """Replace the content of a repeated field of an ONNX message."""
    items = list(items)
    del repeated[:]
    repeated.extend(items)


def mask_regions(height: int, width: int, rows: int, columns: int, down: int, across: int) -> np.ndarray:
    """The part of the image that each token of a shifted window comes from (Swin, arXiv 2103.14030, section 3.2, figure
    4).

    Two tokens of a window attend to each other if they come from the same part. The mask itself has the square of a
    window's tokens for each window; on disk these numbers replace it.

    Args:
        height: Of the padded token map, a multiple of ``rows``.
        width: Of the padded token map, a multiple of ``columns``.
        rows: Height of a window.
        columns: Width of a window.
        down: Cyclic shift of rows.
        across: Cyclic shift of columns.

    Returns:
        uint8 (windows, tokens of a window), row-major windows.
    """

    def parts(size: int, side: int, shift: int) -> np.ndarray:
        part = np.zeros(size, np.uint8)
        if shift:
            part[size - side : size - shift] = 1
            part[size - shift :] = 2
        return part

    regions = parts(height, rows, down)[:, None] * 3 + parts(width, columns, across)
    regions = regions.reshape(height // rows, rows, width // columns, columns).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(regions.reshape(-1, rows * columns))


def _least_codes(weight: IntegerWeight) -> Union[int, np.ndarray]:
    """See :class:`.bundle.Weight`."""
    if not isinstance(weight.low, Tensor):
        return weight.low
    shape = [-1 if axis == weight.axis else 1 for axis in range(weight.codes.dim())]
    return weight.low.numpy().astype(np.int8).reshape(shape)


def _numbered(name: str, calls: Mapping[str, List[str]]) -> str:
    """``name``, with the number of this call from the second one on."""
    count = len(calls[name])
    return f'{name}.{count + 1}' if count else name


def _dtype(codes: Codes):
    return np.int8 if codes.low < 0 or codes.shift is not None else np.uint8


class Lowering:
    """One graph on its way from symbols to ONNX operations. A target has its own operations in a subclass."""

    def __init__(self, model: onnx.ModelProto, exportable: ExportableModel, store: WeightStore):
        self.graph, self.exportable, self.store = model.graph, exportable, store
        self.out = LoweredGraph(model, layouts=dict(exportable.tracing.layouts))
        self.nodes: List[onnx.NodeProto] = []
        self.renamed: Dict[str, str] = {}
        self.constants: Dict[Tuple, str] = {}
        self.known: Dict[Tuple, str] = {}  # results by what they were computed from
        self.new_initializers: Dict[str, np.ndarray] = {}
        self.packed: Dict[str, Union[int, np.ndarray]] = {}
        self.unshared: Set[str] = set()
        self.quantized: Dict[Tuple[str, str], str] = {}

    # ------------------------------------------------------------------ building blocks
    def constant(self, name: str, array: np.ndarray) -> str:
        """Name of an initializer with this content."""
        key = array.dtype.name, array.shape, array.tobytes()
        if key not in self.constants:
            self.constants[key] = name
            self.new_initializers[name] = array
        return self.constants[key]

    def scalar(self, value: float, name: str) -> str:
        """Name of a float32 initializer of one value."""
        return self.constant(name, np.float32(value).reshape(()))

    def node(self, kind: str, inputs: Iterable[str], output: str, **attributes) -> str:
        """Add an operation of ONNX, which is called as its output is; the output."""
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    # ------------------------------------------------------------------ symbols
    def quantizer(self, x: str, name: str) -> str:
        """Name of ``x`` quantized and dequantized by the quantizer ``name``."""
        if (x, name) in self.quantized:
            return self.quantized[x, name]
        codes = self.exportable.quantizers[name]
        if codes.log_base is None:
            return self.values(self.codes(x, name), name)
        key = 'logarithmic', x, codes
        if key not in self.known:  # else one tensor that two layers read with the same range
            self.known[key] = self._log(x, _numbered(name, self.out.codes), codes)
        code, value = self.known[key]
        self.out.codes[name].append(code)
        self.out.values[name].append(value)
        return value

    def quantized_before(self, x: str, name: str, output: str) -> str:
        """``x`` is what :meth:`codes` or :meth:`quantizer` of ``output`` gives."""
        self.quantized[output, name] = x
        return output

    def codes(self, x: str, name: str) -> str:
        """Name of the codes of ``x``."""
        if (x, name) in self.quantized:  # no row of ``out.codes``: the graph does not compute them
            return self.quantized[x, name]
        codes = self.exportable.quantizers[name]
        key = 'codes', x, codes
        if key not in self.known:
            self.known[key] = self._quantize(x, _numbered(name, self.out.codes), codes)
        self.out.codes[name].append(self.known[key])
        return self.known[key]

    def values(self, codes: str, name: str, centred: bool = False) -> str:
        """Name of what codes stand for; ``centred``: as if the zero point were 0."""
        quantizer = self.exportable.quantizers[name]
        key = 'values', codes, quantizer.scale, quantizer.zero_point, centred
        if key not in self.known:
            label = _numbered(name, self.out.values)
            zero = 0 if centred else quantizer.zero_point - (quantizer.shift or 0)
            zero_point = self._zero_point(f'{label}.centred' if centred else label, quantizer, zero)
            scale = self.scalar(quantizer.scale, f'{label}.scale')
            self.known[key] = self.node('DequantizeLinear', [codes, scale, zero_point], f'{label}.value')
        self.out.values[name].append(self.known[key])
        return self.known[key]

    def _zero_point(self, name: str, codes: Codes, value: int) -> str:
        return self.constant(f'{name}.zero_point', np.array(value, _dtype(codes)))

    def _quantize(self, x: str, name: str, codes: Codes) -> str:
        dtype, shift = _dtype(codes), codes.shift or 0
        scale = np.float32(codes.scale)
        if (codes.low - shift, codes.high - shift) != (np.iinfo(dtype).min, np.iinfo(dtype).max):
            ends = [
                self.scalar((end - codes.zero_point) * scale, f'{name}.{which}')
                for end, which in ((codes.low, 'least'), (codes.high, 'greatest'))
            ]
            x = self.node('Clip', [x, *ends], f'{name}.clipped')
        zero_point = self._zero_point(name, codes, codes.zero_point - shift)
        return self.node('QuantizeLinear', [x, self.scalar(scale, f'{name}.scale'), zero_point], f'{name}.codes')

    def _log(self, x: str, name: str, codes: Codes) -> Tuple[str, str]:
        """Codes round(-m log2(x / delta)) and their values delta 2^(-code / m); the code after the last one is 0
        (quantization/logarithmic.py).
        """
        octave, zero_code = BASES[codes.log_base], codes.high + 1

        def node(kind: str, output: str, *inputs: str) -> str:
            return self.node(kind, inputs, f'{name}.{output}')

        def number(value: float, label: str) -> str:
            return self.scalar(value, f'{name}.{label}')

        ratio = node('Div', 'ratio', x, number(codes.scale, 'delta'))
        # The logarithm of 0 is infinite. Values that are too small for one get the code of zero below.
        log = node('Log', 'log', node('Max', 'above_zero', ratio, number(LEAST, 'tiny')))
        code = node('Round', 'whole_code', node('Mul', 'real_code', log, number(-octave / math.log(2), 'octaves')))
        code = node('Clip', 'nonzero_code', code, number(0, 'first'), number(zero_code, 'last'))
        tiny = node('Less', 'is_tiny', ratio, number(LEAST, 'tiny'))
        code = node('Where', 'codes', tiny, number(zero_code, 'last'), code)
        power = node('Exp', 'power', node('Mul', 'exponent', code, number(-math.log(2) / octave, 'octave')))
        value = node('Mul', 'level', power, number(codes.scale, 'delta'))
        zero = node('Greater', 'is_zero', code, number(zero_code - 0.5, 'past'))
        return code, node('Where', 'value', zero, number(0, 'zero'), value)

    def weight(self, name: str) -> str:
        """The dequantized weight. How each product reads it is decided afterwards, see :mod:`.products`."""
        key = 'weight', name
        if key not in self.known:
            weight = self.exportable.weights[name]
            codes, scale, zero_point = (f'{name}.weight.{part}' for part in ('codes', 'scale', 'zero_point'))
            zeros = np.zeros_like(weight.zero_point.numpy()) if weight.apart else weight.zero_point.numpy()
            self.new_initializers.update(
                zip((codes, scale, zero_point), (weight.codes.numpy(), weight.scale.numpy(), zeros))
            )
            if weight.bits <= PACKED_BITS:
                self.packed[codes] = _least_codes(weight)
            # Zero points, and codes where there are copies of them, are not shared with another weight: ONNX Runtime
            # replaces those of some weights by their names.
            self.unshared.add(zero_point)
            if int(weight.codes.to(torch.int16).abs().max()) > NARROW:
                self.unshared.add(codes)
            self.known[key] = self.node(
                'DequantizeLinear', [codes, scale, zero_point], f'{name}.weight.value', axis=weight.axis
            )
        return self.known[key]

    def weight_rows(self, places: str, name: str, output: str) -> str:
        """Rows of a weight, dequantized. Their scales are no constants, which DequantizeLinear would need."""
        weight, columns = self.exportable.weights[name], (-1, 1)
        codes = f'{name}.weight.codes'
        self.new_initializers[codes] = weight.codes.flatten(1).numpy()
        if weight.bits <= PACKED_BITS:
            low = _least_codes(weight)
            self.packed[codes] = low if isinstance(low, int) else low.reshape(columns)
        rows = self.node('Gather', [codes, places], f'{output}.codes', axis=0)
        value = self.node('Cast', [rows], f'{output}.numbers', to=TensorProto.FLOAT)
        if bool(weight.zero_point.any()):
            zero = self.constant(f'{name}.rows.zero_point', weight.zero_point.float().numpy().reshape(columns))
            value = self.node(
                'Sub', [value, self.node('Gather', [zero, places], f'{output}.zero')], f'{output}.centred'
            )
        scale = self.constant(f'{name}.rows.scale', weight.scale.numpy().reshape(columns))
        return self.node('Mul', [value, self.node('Gather', [scale, places], f'{output}.scale')], output)

    def position_bias(self, scores: str, name: str, output: str) -> str:
        """Scores plus the position bias. The runtime looks the table up when it loads."""
        table, index = self.exportable.positions[name]
        inputs = [
            self.constant(f'{name}.position_bias.table', table.numpy()),
            self.constant(f'{name}.position_bias.index', index.numpy().astype(np.int32)),
        ]
        return self.node('Add', [scores, self.node('Gather', inputs, f'{name}.position_bias', axis=1)], output)

    def window_mask(self, scores: str, windows: Tuple[int, ...], value: float, output: str) -> str:
        """Scores plus the mask (windows, 1, N, N). All blocks of a stage share the mask, and the runtime computes it
        when it loads.
        """
        key = 'mask', windows, value
        if key not in self.known:
            array = mask_regions(*windows)
            count, tokens = array.shape
            base = f'window_mask_{"x".join(map(str, windows))}'
            queries, keys = (
                self.regions(f'{base}.{which}', array.reshape(shape))
                for which, shape in (('queries', (count, 1, tokens, 1)), ('keys', (count, 1, 1, tokens)))
            )
            same = self.node('Equal', [queries, keys], f'{base}.same')
            ends = [self.scalar(0, f'{base}.zero'), self.scalar(value, f'{base}.masked')]
            self.known[key] = self.node('Where', [same, *ends], f'{base}.mask')
        return self.node('Add', [scores, self.known[key]], output)

    def regions(self, name: str, parts: np.ndarray) -> str:
        """Small numbers, uint8 on disk, as int32."""
        return self.node('Cast', [self.constant(name, parts)], f'{name}.int32', to=TensorProto.INT32)

    def look_up(self, rows: str, settings: Mapping, output: str) -> str:
        """Rows at places, which the runtime computes when it loads."""
        shapes = np.reshape(settings['shapes'], (settings['tables'], -1))
        key = 'places', tuple(settings['entries']), shapes.tobytes(), settings['limit']
        if key not in self.known:
            label, entries, place = f'places_{sum(k[0] == "places" for k in self.known)}', list(settings['entries']), ''
            for i, shape in enumerate(shapes):
                count = int(np.prod(shape))
                table = self.constant(f'{label}.table_{i}', np.array(entries[:count], np.int32).reshape(shape))
                entries = entries[count:]
                place = self.node('Add', [place, table], f'{label}.sum_{i}') if place else table
            if settings['limit'] >= 0:
                place = self.node(
                    'Min',
                    [place, self.constant(f'{label}.limit', np.array(settings['limit'], np.int32))],
                    f'{label}.limited',
                )
            self.known[key] = self.node('Reshape', [place, self.constant('flat', np.array([-1], np.int64))], label)
        return self.node('Gather', [rows, self.known[key]], output, axis=0)

    def tap(self, x: str, name: str) -> str:
        """Note ``x`` as an input of the LayerNorm ``name``; ``x``."""
        self.out.taps[name].append(x)
        return x

    # ------------------------------------------------------------------ the graph
    def run(self) -> LoweredGraph:
        """Lower all nodes and tidy the graph up."""
        for node in self.graph.node:
            inputs = [self.renamed.get(name, name) for name in node.input]
            if node.domain == DOMAIN:
                self._symbol(node, *inputs)
            else:
                replace_items(node.input, inputs)
                self.nodes.append(node)
        self._name_outputs()
        self.rewrite_products()
        self._drop_unused()
        self._move_weights()
        model = self.out.model
        replace_items(model.opset_import, [opset for opset in model.opset_import if opset.domain != DOMAIN])
        model.producer_name = 'psaq_mm'
        del model.graph.value_info[:]
        return self.out

    def _symbol(self, node: onnx.NodeProto, x: str = '') -> None:
        settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        name, output = settings.get('name', b'').decode(), node.output[0]
        tensor = {
            'Quantizer': lambda: self.quantizer(x, name),
            'Codes': lambda: self.codes(x, name),
            'Values': lambda: self.values(x, name, bool(settings['centred'])),
            'LookUp': lambda: self.look_up(x, settings, output),
            'Tap': lambda: self.tap(x, name),
            'Weight': lambda: self.weight(name),
            'WeightRows': lambda: self.weight_rows(x, name, output),
            'Quantized': lambda: self.quantized_before(x, name, output),
            'PositionBias': lambda: self.position_bias(x, name, output),
            'WindowMask': lambda: self.window_mask(x, tuple(settings['windows']), settings['value'], output),
        }[node.op_type]()
        if tensor != output:
            self.renamed[output] = tensor

    def _name_outputs(self) -> None:
        """Give the name of an output to the tensor that replaces a symbol there."""
        for output in self.graph.output:
            if output.name in self.renamed:
                self.nodes.append(
                    helper.make_node('Identity', [self.renamed[output.name]], [output.name], name=output.name)
                )

    def rewrite_products(self) -> None:
        """Write products so that runtimes have kernels for them."""
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.graph.initializer}
        constants.update(self.new_initializers)
        products = Products(self.nodes, constants, {output.name for output in self.graph.output})
        self.nodes = products.nodes
        self.new_initializers.update(products.constants)
        for name, original in products.copies.items():
            self.unshared.add(name)
            if original in self.packed:
                self.packed[name] = self.packed[original]

    def _drop_unused(self) -> None:
        needed = {o.name for o in self.graph.output}
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(node.input)
        replace_items(self.graph.node, reversed(kept))
        initializers = [i for i in self.graph.initializer if i.name in needed]
        initializers += [numpy_helper.from_array(a, n) for n, a in self.new_initializers.items() if n in needed]
        replace_items(self.graph.initializer, initializers)

    def _move_weights(self) -> None:
        """Move large initializers and constants to the store."""
        moved: Dict[str, str] = {}
        initializers, nodes = [], []
        for tensor in self.graph.initializer:
            if len(tensor.raw_data) > IN_GRAPH_BYTES:
                moved[tensor.name] = self.store.add(
                    tensor.name,
                    numpy_helper.to_array(tensor),
                    self.packed.get(tensor.name),
                    tensor.name not in self.unshared,
                )
            else:
                initializers.append(tensor)
        for node in self.graph.node:
            tensor = node.attribute[0].t if node.op_type == 'Constant' and node.attribute[0].name == 'value' else None
            if tensor is not None and len(tensor.raw_data) > IN_GRAPH_BYTES:
                moved[node.output[0]] = self.store.add(node.output[0], numpy_helper.to_array(tensor))
            else:
                nodes.append(node)
        for node in nodes:
            replace_items(node.input, [moved.get(name, name) for name in node.input])
        replace_items(self.graph.initializer, initializers)
        replace_items(self.graph.node, nodes)
        self.out.weights = sorted(set(moved.values()))


def lower(model: onnx.ModelProto, exportable: ExportableModel, store: WeightStore) -> LoweredGraph:
    """Replace the symbols of a traced graph by ONNX operations.

    Args:
        model: Traced by PyTorch's exporter from ``exportable.model``; it is changed.
        exportable: What the symbols stand for.
        store: Gets the large tensors.
    """
    kind = Lowering
    if exportable.target == 'tensorrt':
        from psaq_mm.deploy.tensorrt import TensorRTLowering as kind  # noqa: N813  # it derives from Lowering
    return kind(model, exportable, store).run()


def with_weights(graph: LoweredGraph, weights: Mapping[str, Weight]) -> onnx.ModelProto:
    """A copy of a graph with its weights as one ONNX message."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    model.graph.initializer.extend(numpy_helper.from_array(weights[name].array, name) for name in graph.weights)
    return model
