# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Tensors in the encoding of an ONNX file, without the onnx package.

An ONNX file is one Protocol Buffers message. A reader merges two messages that are written one after the other: it
merges fields that are messages and joins repeated fields (Protocol Buffers, "Encoding", section "Last One Wins"). So
initializers are added to a graph by appending a second message that holds nothing else. A loader can widen packed
weights and needs no more of the format than this file.
"""

from typing import Dict, Iterable, List, Mapping, NamedTuple, Sequence, Tuple, Union

import numpy as np

from psaq_mm.errors import UnsupportedModelError

__all__ = ['MESSAGE_LIMIT', 'Node', 'append_initializers', 'check_message_size', 'message_size', 'small_model']

MESSAGE_LIMIT = 2**31 - 1
"""Bytes that a message, and so an ONNX file with its weights, may have (Protocol Buffers, "Encoding", section "Message
Structure")."""

# onnx.proto3: fields of ModelProto, GraphProto, NodeProto, AttributeProto, ValueInfoProto, and of TensorProto.
_IR_VERSION, _GRAPH, _OPSET, _OPSET_VERSION = 1, 7, 8, 2
_NODE, _GRAPH_NAME, _INITIALIZER, _INPUT, _OUTPUT = 1, 2, 5, 11, 12
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _OPERATION, _ATTRIBUTE = 1, 2, 3, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_INTS, _ATTRIBUTE_TYPE = 1, 3, 8, 20
_VALUE_NAME, _VALUE_TYPE, _TENSOR_TYPE, _ELEMENT_TYPE, _SHAPE, _DIM, _DIM_VALUE = 1, 2, 1, 1, 2, 1, 1
_INT, _INTS = 2, 7
_DIMS, _DATA_TYPE, _NAME, _RAW_DATA = 1, 2, 8, 9
_VARINT, _BYTES = 0, 2

_DATA_TYPES = {'float32': 1, 'uint8': 2, 'int8': 3, 'int32': 6, 'int64': 7, 'bool': 9}


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value)


def _blob(field: int, *parts: bytes) -> Iterable[bytes]:
    yield _varint(field << 3 | _BYTES) + _varint(sum(map(len, parts)))
    yield from parts


def message_size(model_bytes: int, tensors: Mapping[str, np.ndarray]) -> int:
    """Bytes of an ONNX file with these initializers, rather too many than too few."""
    return model_bytes + sum(
        array.nbytes + len(name.encode()) + 16 * (array.ndim + 3) for name, array in tensors.items()
    )


def check_message_size(name: str, model_bytes: int, tensors: Mapping[str, np.ndarray]) -> None:
    """A graph is started from one message that holds its weights.

    Raises:
        UnsupportedModelError: It would be larger than :data:`MESSAGE_LIMIT`.
    """
    size = message_size(model_bytes, tensors)
    if size > MESSAGE_LIMIT:
        raise UnsupportedModelError(
            f'{name} with its weights has {size / 2**30:.2f} GiB, and ONNX allows {MESSAGE_LIMIT / 2**30:.2f} GiB in '
            'one piece: export with --format onnx alone, which then writes the weights beside the graph'
        )


def append_initializers(model: bytes, tensors: Mapping[str, np.ndarray]) -> bytes:
    """Add initializers to an ONNX file.

    Args:
        model: Content of an ONNX file.
        tensors: Arrays by name, float32, uint8, int8, int32, int64 or bool.

    Returns:
        Content of an ONNX file whose graph has all of them.

    Raises:
        UnsupportedModelError: It would be larger than :data:`MESSAGE_LIMIT`.
    """
    check_message_size('the graph', len(model), tensors)
    initializers: List[bytes] = []
    for name, array in tensors.items():
        fields = [_number(_DIMS, size) for size in array.shape]
        fields.append(_number(_DATA_TYPE, _DATA_TYPES[array.dtype.name]))
        fields += _blob(_NAME, name.encode())
        # The format is little-endian on every machine.
        fields += _blob(
            _RAW_DATA, np.ascontiguousarray(array).astype(array.dtype.newbyteorder('<'), copy=False).tobytes()
        )
        initializers += _blob(_INITIALIZER, *fields)
    return b''.join([model, *_blob(_GRAPH, *initializers)]) if initializers else model


class Node(NamedTuple):
    """An operation of :func:`small_model`; its name is that of its output."""

    kind: str
    inputs: Sequence[str]
    output: str
    attributes: Mapping[str, Union[int, Sequence[int]]] = {}


def _message(field: int, parts: Iterable[bytes]) -> bytes:
    return b''.join(_blob(field, b''.join(parts)))


def _text(field: int, text: str) -> bytes:
    return _message(field, [text.encode()])


def _attribute(name: str, value: Union[int, Sequence[int]]) -> bytes:
    if isinstance(value, int):
        numbers, kind = [_number(_ATTRIBUTE_INT, value)], _INT
    else:
        numbers, kind = [_number(_ATTRIBUTE_INTS, v) for v in value], _INTS
    return _message(_ATTRIBUTE, [_text(_ATTRIBUTE_NAME, name), *numbers, _number(_ATTRIBUTE_TYPE, kind)])


def _float_tensor(field: int, name: str, shape: Sequence[int]) -> bytes:
    dims = _message(_SHAPE, [_message(_DIM, [_number(_DIM_VALUE, size)]) for size in shape])
    tensor = _message(_TENSOR_TYPE, [_number(_ELEMENT_TYPE, _DATA_TYPES['float32']), dims])
    return _message(field, [_text(_VALUE_NAME, name), _message(_VALUE_TYPE, [tensor])])


def small_model(
    nodes: Sequence[Node],
    inputs: Mapping[str, Tuple[int, ...]],
    outputs: Mapping[str, Tuple[int, ...]],
    constants: Dict[str, np.ndarray],
    opset: int = 17,
) -> bytes:
    """Write an ONNX file of float32 inputs and outputs.

    Args:
        nodes: In the order of execution.
        inputs: Shapes by name.
        outputs: Shapes by name.
        constants: Initializers by name, of the types of :func:`append_initializers`.
        opset: Of ONNX's own operations.
    """
    operations = [
        _message(
            _NODE,
            [
                *(_text(_NODE_INPUT, name) for name in node.inputs),
                _text(_NODE_OUTPUT, node.output),
                _text(_NODE_NAME, node.output),
                _text(_OPERATION, node.kind),
                *(_attribute(*item) for item in node.attributes.items()),
            ],
        )
        for node in nodes
    ]
    ends = [_float_tensor(_INPUT, *item) for item in inputs.items()]
    ends += [_float_tensor(_OUTPUT, *item) for item in outputs.items()]
    model = [
        _number(_IR_VERSION, 8),
        _message(_GRAPH, [*operations, _text(_GRAPH_NAME, 'graph'), *ends]),
        _message(_OPSET, [_number(_OPSET_VERSION, opset)]),
    ]
    return append_initializers(b''.join(model), constants)
