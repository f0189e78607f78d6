# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""From the traced graph with its symbols to plain ONNX: quantizers as QuantizeLinear and DequantizeLinear, weights as
integers.

An affine quantizer becomes QuantizeLinear (codes, uint8) and DequantizeLinear; with fewer than 8 bits a Clip stands
before the two, because QuantizeLinear saturates at 0 and 255 alone. A logarithmic quantizer becomes ordinary
operations. The larger tensors leave the graph for :mod:`.bundle`.
"""

import hashlib
import math
from collections import Counter
from typing import Callable, Dict, Iterable, List, Mapping, Set, Tuple, Union

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from psaq_mm.deploy.exportable import Codes, ExportableModel, IntegerWeight
from psaq_mm.deploy.symbols import DOMAIN
from psaq_mm.quantization.logarithmic import BASES, LEAST
from psaq_mm.runtime.bundle import PACKED_BITS, Weight
from psaq_mm.runtime.kernels import NARROW

__all__ = ['LoweredGraph', 'WeightStore', 'lower']

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
        """The name under which ``array`` is kept: ``name``, another one's that has the same content, or ``name`` with a
        number.

        Args:
            name: What the graph calls it.
            array: Its content.
            low: See :class:`.bundle.Weight`.
            shared: Whether a tensor of another name may stand for it.
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


class LoweredGraph:
    """A graph as it is written to disk.

    Attributes:
        model: Without the larger tensors.
        weights: Names of the tensors it needs.
        codes: By quantizer, the names of its tensors of codes, one a call (a head's layers are called for each level);
            whole numbers in float32 for a logarithmic one.
        values: The same, of the dequantized tensors.
        taps: The same, of the tensors that enter a LayerNorm, by the LayerNorm's name.
        layouts: See :class:`.windows.Tracing`.
    """

    def __init__(self, model: onnx.ModelProto):
        self.model = model
        self.weights: List[str] = []
        self.codes: Dict[str, List[str]] = {}
        self.values: Dict[str, List[str]] = {}
        self.taps: Dict[str, List[str]] = {}
        self.layouts: Dict[str, Callable[[Tensor], Tensor]] = {}


def mask_regions(height: int, width: int, rows: int, columns: int, down: int, across: int) -> np.ndarray:
    """Which part of the image each token of a shifted window comes from (Swin, arXiv 2103.14030, section 3.2, figure
    4).

    Two tokens of one window attend to each other if they are of one part. The mask itself has the square of a window's
    tokens for each window: these numbers stand for it on disk.

    Args:
        height, width: Of the padded token map, multiples of the window.
        rows, columns: Of a window.
        down, across: The cyclic shift.

    Returns:
        uint8 (windows, tokens of a window), row-major windows.
    """

    def parts(size: int, side: int, moved: int) -> np.ndarray:
        found = np.zeros(size, np.uint8)
        if moved:
            found[size - side : size - moved] = 1
            found[size - moved :] = 2
        return found

    regions = parts(height, rows, down)[:, None] * 3 + parts(width, columns, across)
    regions = regions.reshape(height // rows, rows, width // columns, columns).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(regions.reshape(-1, rows * columns))


def _least_codes(weight: IntegerWeight) -> Union[int, np.ndarray]:
    """See :class:`.bundle.Weight`."""
    if not isinstance(weight.low, Tensor):
        return weight.low
    return (
        weight.low.numpy()
        .astype(np.int8)
        .reshape([-1 if axis == weight.axis else 1 for axis in range(weight.codes.dim())])
    )


def _dtype(codes: Codes):
    return np.int8 if codes.low < 0 or codes.shift is not None else np.uint8


def _content(codes: Codes) -> Tuple:
    return codes.scale, codes.zero_point, codes.low, codes.high, codes.log_base, codes.shift


class _Lowering:
    def __init__(self, model: onnx.ModelProto, exportable: ExportableModel, store: WeightStore):
        self.graph, self.exportable, self.store = model.graph, exportable, store
        self.out = LoweredGraph(model)
        self.out.layouts = dict(exportable.tracing.layouts)
        self.nodes: List[onnx.NodeProto] = []
        self.renamed: Dict[str, str] = {}
        self.constants: Dict[Tuple, str] = {}
        self.known: Dict[Tuple, str] = {}  # results by what they were computed from
        self.new_initializers: Dict[str, np.ndarray] = {}
        self.packed: Dict[str, Union[int, np.ndarray]] = {}
        self.unshared: Set[str] = set()
        self.readers: Counter = Counter()

    # ------------------------------------------------------------------ building blocks
    def constant(self, name: str, array: np.ndarray) -> str:
        """Name of an initializer with this content."""
        key = array.dtype.name, array.shape, array.tobytes()
        if key not in self.constants:
            self.constants[key] = name
            self.new_initializers[name] = array
        return self.constants[key]

    def scalar(self, value: float, name: str) -> str:
        return self.constant(name, np.float32(value).reshape(()))

    def node(self, kind: str, inputs: Iterable[str], output: str, **attributes) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    # ------------------------------------------------------------------ symbols
    def quantizer(self, x: str, name: str) -> str:
        codes = self.exportable.quantizers[name]
        if codes.log_base is None:
            return self.values(self.codes(x, name), name)
        key = 'logarithmic', x, *_content(codes)
        if key not in self.known:  # else one tensor that two layers read with the same range
            self.known[key] = self._log(x, self._label(name), codes)
        code, value = self.known[key]
        self.out.codes.setdefault(name, []).append(code)
        self.out.values.setdefault(name, []).append(value)
        return value

    def codes(self, x: str, name: str) -> str:
        codes = self.exportable.quantizers[name]
        key = 'codes', x, *_content(codes)
        if key not in self.known:
            self.known[key] = self._quantize(x, self._label(name), codes)
        self.out.codes.setdefault(name, []).append(self.known[key])
        return self.known[key]

    def values(self, codes: str, name: str, centred: bool = False) -> str:
        quantizer = self.exportable.quantizers[name]
        key = 'values', codes, quantizer.scale, quantizer.zero_point, centred
        if key not in self.known:
            count = len(self.out.values.get(name, ()))
            label = f'{name}.{count + 1}' if count else name
            zero = 0 if centred else quantizer.zero_point - (quantizer.shift or 0)
            zero_point = self._zero_point(f'{label}.centred' if centred else label, quantizer, zero)
            self.known[key] = self.node(
                'DequantizeLinear',
                [codes, self.scalar(np.float32(quantizer.scale), f'{label}.scale'), zero_point],
                f'{label}.value',
            )
        self.out.values.setdefault(name, []).append(self.known[key])
        return self.known[key]

    def _label(self, name: str) -> str:
        calls = len(self.out.codes.get(name, ()))
        return f'{name}.{calls + 1}' if calls else name

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
        """Codes round(-m log2(x / delta)), values delta 2^(-code / m), and 0 from the last code on
        (quantization/logarithmic.py).
        """
        octave = BASES[codes.log_base]
        zero_code = codes.high + 1
        ratio = self.node('Div', [x, self.scalar(codes.scale, f'{name}.delta')], f'{name}.ratio')
        # The logarithm of 0 is infinite: values that small have the code of zero, and are told by themselves.
        log = self.node(
            'Log', [self.node('Max', [ratio, self.scalar(LEAST, f'{name}.tiny')], f'{name}.above_zero')], f'{name}.log'
        )
        code = self.node(
            'Round',
            [self.node('Mul', [log, self.scalar(-octave / math.log(2), f'{name}.octaves')], f'{name}.real_code')],
            f'{name}.whole_code',
        )
        code = self.node(
            'Clip',
            [code, self.scalar(0, f'{name}.first'), self.scalar(zero_code, f'{name}.last')],
            f'{name}.nonzero_code',
        )
        tiny = self.node('Less', [ratio, self.scalar(LEAST, f'{name}.tiny')], f'{name}.is_tiny')
        code = self.node('Where', [tiny, self.scalar(zero_code, f'{name}.last'), code], f'{name}.codes')
        power = self.node(
            'Exp',
            [self.node('Mul', [code, self.scalar(-math.log(2) / octave, f'{name}.octave')], f'{name}.exponent')],
            f'{name}.power',
        )
        value = self.node('Mul', [power, self.scalar(codes.scale, f'{name}.delta')], f'{name}.level')
        none = self.node('Greater', [code, self.scalar(zero_code - 0.5, f'{name}.past')], f'{name}.is_zero')
        return code, self.node('Where', [none, self.scalar(0, f'{name}.zero'), value], f'{name}.value')

    def weight(self, name: str) -> str:
        """The dequantized weight; each product that reads a wide one has its own, under names of its own. Where ONNX
        Runtime multiplies with wide weights plus 128, it makes these for each product by the name of the codes, and
        does not start if two have one name.
        """
        weight = self.exportable.weights[name]
        wide = int(weight.codes.to(torch.int16).abs().max()) > NARROW
        self.readers[name] += 1
        copy = f'.{self.readers[name]}' if wide and self.readers[name] > 1 else ''
        key = 'weight', f'{name}{copy}'
        if key not in self.known:
            codes, value = f'{name}.weight{copy}.codes', f'{name}.weight{copy}.value'
            self.new_initializers[codes] = weight.codes.numpy()
            if wide:
                self.unshared.add(codes)
            if weight.bits <= PACKED_BITS:
                self.packed[codes] = _least_codes(weight)
            # Neither is shared with another weight: ONNX Runtime replaces the zero points of some weights, each by its
            # name.
            parameters = [f'{name}.weight.scale', f'{name}.weight{copy}.zero_point']
            zero_point = weight.zero_point.numpy()
            self.new_initializers.update(
                zip(parameters, (weight.scale.numpy(), np.zeros_like(zero_point) if weight.apart else zero_point))
            )
            self.unshared.add(parameters[1])
            self.known[key] = self.node('DequantizeLinear', [codes, *parameters], value, axis=weight.axis)
        return self.known[key]

    def position_bias(self, scores: str, name: str, output: str) -> str:
        """The table is looked up by the runtime when it loads."""
        table, index = self.exportable.positions[name]
        inputs = [
            self.constant(f'{name}.position_bias.table', table.numpy()),
            self.constant(f'{name}.position_bias.index', index.numpy().astype(np.int32)),
        ]
        return self.node('Add', [scores, self.node('Gather', inputs, f'{name}.position_bias', axis=1)], output)

    def window_mask(self, scores: str, windows: Tuple[int, ...], value: float, output: str) -> str:
        """The mask, (windows, 1, N, N), is worked out once for all blocks of a stage, and by the runtime when it
        loads.
        """
        key = 'mask', windows, value
        if key not in self.known:
            array = mask_regions(*windows)
            count, tokens = array.shape
            base = f'window_mask_{"x".join(map(str, windows))}'
            queries, keys = (
                self.node(
                    'Cast',
                    [self.constant(f'{base}.{which}', array.reshape(shape))],
                    f'{base}.{which}.int32',
                    to=TensorProto.INT32,
                )
                for which, shape in (('queries', (count, 1, tokens, 1)), ('keys', (count, 1, 1, tokens)))
            )
            same = self.node('Equal', [queries, keys], f'{base}.same')
            ends = [self.scalar(0, f'{base}.zero'), self.scalar(value, f'{base}.masked')]
            self.known[key] = self.node('Where', [same, *ends], f'{base}.mask')
        return self.node('Add', [scores, self.known[key]], output)

    def look_up(self, rows: str, settings: Mapping, output: str) -> str:
        """The places are worked out by the runtime when it loads."""
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

    # ------------------------------------------------------------------ the whole
    def run(self) -> LoweredGraph:
        for node in self.graph.node:
            inputs = [self.renamed.get(name, name) for name in node.input]
            settings = {a.name: helper.get_attribute_value(a) for a in node.attribute} if node.domain == DOMAIN else {}
            name = settings['name'].decode() if 'name' in settings else ''
            if node.domain != DOMAIN:
                del node.input[:]
                node.input.extend(inputs)
                self.nodes.append(node)
            elif node.op_type == 'Quantizer':
                self.renamed[node.output[0]] = self.quantizer(inputs[0], name)
            elif node.op_type == 'Codes':
                self.renamed[node.output[0]] = self.codes(inputs[0], name)
            elif node.op_type == 'Values':
                self.renamed[node.output[0]] = self.values(inputs[0], name, bool(settings['centred']))
            elif node.op_type == 'LookUp':
                self.look_up(inputs[0], settings, node.output[0])
            elif node.op_type == 'Tap':
                self.out.taps.setdefault(name, []).append(inputs[0])
                self.renamed[node.output[0]] = inputs[0]
            elif node.op_type == 'Weight':
                self.renamed[node.output[0]] = self.weight(name)
            elif node.op_type == 'PositionBias':
                self.position_bias(inputs[0], name, node.output[0])
            elif node.op_type == 'WindowMask':
                self.window_mask(inputs[0], tuple(settings['windows']), settings['value'], node.output[0])
            else:
                raise AssertionError(node.op_type)
        self._name_outputs()
        self._drop_unused()
        self._move_weights()
        model = self.out.model
        kept = [o for o in model.opset_import if o.domain != DOMAIN]
        del model.opset_import[:]
        model.opset_import.extend(kept)
        model.producer_name = 'psaq_mm'
        del model.graph.value_info[:]
        return self.out

    def _name_outputs(self) -> None:
        """A graph whose output was a symbol's: give the tensor the name of the output."""
        for output in self.graph.output:
            if output.name in self.renamed:
                self.nodes.append(
                    helper.make_node('Identity', [self.renamed[output.name]], [output.name], name=output.name)
                )

    def _drop_unused(self) -> None:
        needed = {o.name for o in self.graph.output}
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(node.input)
        del self.graph.node[:]
        self.graph.node.extend(reversed(kept))
        initializers = [i for i in self.graph.initializer if i.name in needed]
        initializers += [numpy_helper.from_array(a, n) for n, a in self.new_initializers.items() if n in needed]
        del self.graph.initializer[:]
        self.graph.initializer.extend(initializers)

    def _move_weights(self) -> None:
        """Larger initializers and constants out of the graph, under the names of the store."""
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
            inputs = [moved.get(name, name) for name in node.input]
            del node.input[:]
            node.input.extend(inputs)
        del self.graph.initializer[:]
        del self.graph.node[:]
        self.graph.initializer.extend(initializers)
        self.graph.node.extend(nodes)
        self.out.weights = sorted(set(moved.values()))


def lower(model: onnx.ModelProto, exportable: ExportableModel, store: WeightStore) -> LoweredGraph:
    """Write out the symbols of a traced graph.

    Args:
        model: As PyTorch's exporter made it from ``exportable.model``; it is changed.
        exportable: What the symbols stand for.
        store: Where the larger tensors go.
    """
    return _Lowering(model, exportable, store).run()


def with_weights(graph: LoweredGraph, weights: Mapping[str, Weight]) -> onnx.ModelProto:
    """A copy of the whole graph as one ONNX message, its weights included."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    model.graph.initializer.extend(numpy_helper.from_array(weights[name].array, name) for name in graph.weights)
    return model
