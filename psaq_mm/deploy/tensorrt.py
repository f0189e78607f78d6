# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Graphs for a strongly typed TensorRT, and a check of its rules on any ONNX graph.

The rules are those of NVIDIA's "Explicit Quantization" and of the operator table of its ONNX parser (TensorRT 10.15).
They tell whether a graph has the form that the parser takes, not how fast an engine runs it. No TensorRT is needed.
"""

from typing import Any, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Set, Tuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from psaq_mm.deploy.lowering import Lowering
from psaq_mm.errors import UnsupportedModelError, first_of
from psaq_mm.runtime.bundle import Weight

__all__ = ['OPERATORS', 'TensorRTLowering', 'check_tensorrt', 'violations']

OPERATORS = frozenset(
    'Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape Conv '
    'ConvTranspose Cos DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand Flatten Floor Gather '
    'GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GroupNormalization '
    'HardSigmoid HardSwish Identity InstanceNormalization LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax '
    'MatMul Max MaxPool Mean Min Mish Mod Mul Neg Not OneHot Or PRelu Pad Pow QuantizeLinear Range Reciprocal ReduceL2 '
    'ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape Resize Round ScatterElements ScatterND Selu '
    'Shape Sigmoid Sign Sin Slice Softmax Softplus SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh Tile TopK '
    'Transpose Trilu Unsqueeze Upsample Where Xor'.split()
)
"""Operators of ONNX that PyTorch's exporter writes for networks without loops, and TensorRT's parser supports."""

OPSETS = (13, 24)
"""Least opset with scales of channels in DequantizeLinear, greatest that the parser supports."""

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)

_PARSED_TYPES = (*_FLOATS, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL)
"""Types of tensors beside the codes of a quantized one. TensorRT has uint8 for inputs and outputs alone."""

_WEIGHT_AXIS = {'Conv': 0, 'ConvTranspose': 1, 'MatMul': -1, 'Gemm': 1}
"""Axis of the output channels of a weight, the second input."""

_LARGEST_K = 3840

_RESIZE = {
    'mode': (b'nearest', b'linear'),
    'coordinate_transformation_mode': (
        b'half_pixel',
        b'pytorch_half_pixel',
        b'tf_half_pixel_for_nn',
        b'asymmetric',
        b'align_corners',
    ),
    'nearest_mode': (b'floor', b'ceil', b'round_prefer_floor', b'round_prefer_ceil'),
    'antialias': (0,),
    'keep_aspect_ratio_policy': (b'stretch',),
}


class TensorRTLowering(Lowering):
    """Lowering to a graph whose integers are codes between QuantizeLinear and DequantizeLinear alone, or indices."""

    def regions(self, name: str, parts: np.ndarray) -> str:
        """As :meth:`.Lowering.regions`, without a tensor of uint8, which TensorRT does not have inside a network."""
        return self.constant(name, parts.astype(np.int32))

    def rewrite_products(self) -> None:
        """Nothing: products are of dequantized weights, and their biases are float."""


class _Constant(NamedTuple):
    """A tensor that is known before the graph runs.

    Attributes:
        kind: Type, of :class:`onnx.TensorProto`.
        array: Its content.
    """

    kind: int
    array: np.ndarray


class _Checker:
    """The rules, one method for a kind of node. A method yields a sentence for each rule that a node breaks."""

    def __init__(self, model: onnx.ModelProto, outside: Mapping[str, Weight]):
        self.model, self.graph, self.outside = model, model.graph, outside
        self.constants: Dict[str, _Constant] = {
            tensor.name: _Constant(tensor.data_type, numpy_helper.to_array(tensor)) for tensor in self.graph.initializer
        }
        for node in self.graph.node:
            if node.op_type == 'Constant':
                value = helper.get_attribute_value(node.attribute[0])
                if not isinstance(value, onnx.TensorProto):  # a number, or several
                    kind = np.float32 if 'float' in node.attribute[0].name else np.int64
                    value = numpy_helper.from_array(np.array(value, kind))
                self.constants[node.output[0]] = _Constant(value.data_type, numpy_helper.to_array(value))
        for name, weight in outside.items():
            kind = helper.np_dtype_to_tensor_dtype(weight.array.dtype)
            self.constants[name] = _Constant(kind, weight.array)
        self.producer = {output: node for node in self.graph.node for output in node.output}
        self.readers: Dict[str, List[Tuple[onnx.NodeProto, int]]] = {}
        for node in self.graph.node:
            for place, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((node, place))
        self.outputs: Set[str] = {output.name for output in self.graph.output}

    def run(self) -> Iterator[str]:
        """All violations, graph first."""
        yield from self._check_interface()
        for node in self.graph.node:
            what = f'{node.op_type} {node.name or (node.output[0] if node.output else "")}'
            if node.domain not in ('', 'ai.onnx') or node.op_type not in OPERATORS:
                yield f'{what}: TensorRT does not have this operator'
                continue
            check = getattr(self, f'_check_{node.op_type.lower()}', None)
            settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            for problem in check(node, settings) if check else ():
                yield f'{what}: {problem}'

    # ------------------------------------------------------------------ the graph
    def _check_interface(self) -> Iterator[str]:
        opset = next((o.version for o in self.model.opset_import if o.domain in ('', 'ai.onnx')), 0)
        if not OPSETS[0] <= opset <= OPSETS[1]:
            yield f'opset {opset} is none of {OPSETS[0]} to {OPSETS[1]}'
        constants = set(self.constants)
        for value in (*self.graph.input, *self.graph.output):
            kind = value.type.tensor_type.elem_type
            if value.name not in constants and kind not in _PARSED_TYPES:
                yield f'{value.name}: an input or output has the type {_type_name(kind)}, not a float or an index'
        used = {name for node in self.graph.node for name in node.input}
        for name, constant in self.constants.items():
            if name not in used:
                continue
            is_code = constant.kind == TensorProto.INT8 and all(
                node.op_type in ('QuantizeLinear', 'DequantizeLinear') for node, _ in self.readers[name]
            )
            if constant.kind not in _PARSED_TYPES and not is_code:
                yield f'{name}: a constant of the type {_type_name(constant.kind)} is not read by a DequantizeLinear'

    # ------------------------------------------------------------------ quantization
    def _check_quantizelinear(self, node: onnx.NodeProto, settings: Mapping[str, Any]) -> Iterator[str]:
        explicit = settings.get('output_dtype', 0)
        if len(node.input) < 3 and explicit != TensorProto.INT8:
            yield 'without a zero point its codes are uint8: only int8 is quantized'
        yield from self._check_scale(node, per_tensor=True)
        if node.input[0] in self.constants:
            yield 'it quantizes a constant: store the codes'
        output = node.output[0]
        if output in self.outputs:
            yield 'its codes are an output of the network'
        readers = self.readers.get(output, [])
        if any(reader.op_type != 'DequantizeLinear' for reader, _ in readers):
            names = sorted({r.op_type for r, _ in readers if r.op_type != 'DequantizeLinear'})
            yield f'its codes are read by {" and ".join(names)}, not by a DequantizeLinear'
        for reader, _ in readers:
            if reader.op_type == 'DequantizeLinear' and not self._same_values(node, reader):
                yield f'{reader.name} reads its codes with another scale'

    def _check_dequantizelinear(self, node: onnx.NodeProto, settings: Mapping[str, Any]) -> Iterator[str]:
        source = node.input[0]
        before = self.producer.get(source)
        if source in self.constants:
            yield from self._check_weight(node, settings)
        elif before is None or before.op_type != 'QuantizeLinear':
            yield 'its codes come neither from a QuantizeLinear nor from a constant'
        else:
            yield from self._check_scale(node, per_tensor=True)
        for reader, place in self.readers.get(node.output[0], []):
            if reader.op_type in ('Conv', 'ConvTranspose', 'Gemm') and place == 2:
                yield f'it is the bias of {reader.name}: a bias is float'

    def _check_weight(self, node: onnx.NodeProto, settings: Mapping[str, Any]) -> Iterator[str]:
        yield from self._check_scale(node, per_tensor=False)
        codes, scale = self.constants[node.input[0]], self.constants.get(node.input[1])
        if codes.kind != TensorProto.INT8:
            yield f'its codes are {_type_name(codes.kind)}: only int8 is checked'
        if node.output[0] in self.outputs:
            yield 'a weight is an output of the network'
        for reader, place in self.readers.get(node.output[0], []):
            axis = _WEIGHT_AXIS.get(reader.op_type)
            if axis is None or place > 1:
                if place != 2:  # a bias has its own sentence
                    yield f'{reader.op_type} {reader.name} reads its weight: a product does, directly'
                continue
            if reader.op_type == 'Gemm' and _attribute(reader, 'transB', 0):
                axis = 0
            if place != 1:
                yield f'it is the first input of {reader.name}: a weight is the second'
            elif scale is not None and scale.array.size > 1:
                dimensions = codes.array.ndim
                has = settings.get('axis', 1) % dimensions
                if has != axis % dimensions:
                    yield f'its scales lie along axis {has}, those of {reader.op_type} along axis {axis % dimensions}'
                elif scale.array.shape != (codes.array.shape[has],):
                    yield f'it has {scale.array.size} scales for {codes.array.shape[has]} channels'

    def _check_scale(self, node: onnx.NodeProto, per_tensor: bool) -> Iterator[str]:
        scale = self.constants.get(node.input[1])
        if scale is None:
            yield 'its scale is no constant'
        else:
            if scale.kind not in _FLOATS:
                yield f'its scale is {_type_name(scale.kind)}, not a float of 32 or 16 bits'
            if per_tensor and scale.array.size != 1:
                yield f'an activation has {scale.array.size} scales: one for the tensor'
            numbers = scale.array.astype(np.float32)
            if not (np.isfinite(numbers) & (numbers > 0)).all():
                yield 'a scale is not positive'
        if len(node.input) > 2 and node.input[2]:
            zero = self.constants.get(node.input[2])
            if zero is None:
                yield 'its zero point is no constant'
            elif zero.kind != TensorProto.INT8:
                yield f'its codes are {_type_name(zero.kind)}: only int8 is quantized'
            elif zero.array.any():
                yield 'its zero point is not 0'

    def _same_values(self, one: onnx.NodeProto, other: onnx.NodeProto) -> bool:
        scales = [self.constants.get(node.input[1]) for node in (one, other)]
        return any(scale is None for scale in scales) or np.array_equal(scales[0].array, scales[1].array)

    # ------------------------------------------------------------------ other operators with restrictions
    def _check_conv(self, node: onnx.NodeProto, settings: Mapping[str, Any]) -> Iterator[str]:
        weight = self.producer.get(node.input[1])
        known = node.input[1] in self.constants or (
            weight is not None and weight.op_type == 'DequantizeLinear' and weight.input[0] in self.constants
        )
        if not known:
            yield 'its weight is no constant'

    _check_convtranspose = _check_conv

    def _check_cast(self, node: onnx.NodeProto, settings: Mapping[str, Any]) -> Iterator[str]:
        if settings['to'] not in _PARSED_TYPES:
            yield f'it casts to {_type_name(settings["to"])}: only floats, int32, int64 and bool are cast to'

    def _check_topk(self, node: onnx.NodeProto, settings: Mapping[str, Any]) -> Iterator[str]:
        k = self.constants.get(node.input[1])
        if k is None or int(k.array.max()) >= _LARGEST_K:
            yield f'its K is {"no constant" if k is None else int(k.array.max())}: less than {_LARGEST_K} is supported'
        if not settings.get('sorted', 1):
            yield 'its values are not sorted'

    def _check_resize(self, node: onnx.NodeProto, settings: Mapping[str, Any]) -> Iterator[str]:
        for key, allowed in _RESIZE.items():
            if settings.get(key, allowed[0]) not in allowed:
                yield f'{key}={settings[key]!r} is not supported'

    def _check_layernormalization(self, node: onnx.NodeProto, settings: Mapping[str, Any]) -> Iterator[str]:
        if any(node.output[1:]):
            yield 'its mean or deviation is read: only its first output is supported'

    def _check_maxpool(self, node: onnx.NodeProto, settings: Mapping[str, Any]) -> Iterator[str]:
        if any(node.output[1:]):
            yield 'its indices are read: only its first output is supported'

    def _check_pad(self, node: onnx.NodeProto, settings: Mapping[str, Any]) -> Iterator[str]:
        if settings.get('mode', b'constant') not in (b'constant', b'edge', b'reflect'):
            yield f'mode={settings["mode"]!r} is not supported'


def _type_name(kind: int) -> str:
    return TensorProto.DataType.Name(kind).lower()


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def violations(model: onnx.ModelProto, outside: Optional[Mapping[str, Weight]] = None) -> List[str]:
    """What a strongly typed TensorRT would refuse in a graph, or run in another way than as integers.

    Checked: int8 codes, zero points 0, one scale for an activation and constant scales; QuantizeLinear read by
    DequantizeLinear alone; weights as constant codes with their scales along the output channels (Conv 0, ConvTranspose
    1, MatMul the last axis), read by a product directly; biases without codes; operators, casts and types of tensors
    that the parser has; TopK, Resize and a few more restrictions.

    Args:
        model: Any ONNX graph.
        outside: Tensors of the graph that are not in ``model``, by name.

    Returns:
        One sentence for each violation, with the name of the node; empty: none.

    Example:
        >>> violations(onnx.load('onnx/graph_800x1216.onnx'))
        []
    """
    return list(_Checker(model, outside or {}).run())


def check_tensorrt(graphs: Iterable[onnx.ModelProto], weights: Mapping[str, Weight]) -> None:
    """Raise UnsupportedModelError where a graph breaks a rule of :func:`violations`.

    Args:
        graphs: Without their large tensors.
        weights: Large tensors of all of them.
    """
    problems = list(dict.fromkeys(problem for graph in graphs for problem in violations(graph, weights)))
    if problems:
        raise UnsupportedModelError(
            f"the export is no graph for target='tensorrt' in {len(problems)} places ({first_of(problems)}): keep the "
            "part that they belong to out of the quantization, or export a student without target='tensorrt'"
        )
