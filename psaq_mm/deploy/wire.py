# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Tensors in the encoding of an ONNX file, without the onnx package.

An ONNX file is one Protocol Buffers message. Of two such messages written one after the other, a reader makes their union: single
fields of message type are merged, repeated ones joined (Protocol Buffers, "Encoding", section "Last One Wins"). So initializers
become part of a graph by appending a second message that holds nothing else, and a loader can widen packed weights without
knowing any more of the format than this file does.
"""
from typing import Iterable, Mapping

import numpy as np

__all__ = ['append_initializers']

# onnx.proto3: ModelProto.graph, GraphProto.initializer, and the fields of TensorProto.
_GRAPH, _INITIALIZER = 7, 5
_DIMS, _DATA_TYPE, _NAME, _RAW_DATA = 1, 2, 8, 9
_VARINT, _BYTES = 0, 2

_DATA_TYPES = {'float32': 1, 'uint8': 2, 'int8': 3, 'int32': 6, 'int64': 7, 'bool': 9}


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7f:
        out.append(value & 0x7f | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value)


def _blob(field: int, *parts: bytes) -> Iterable[bytes]:
    yield _varint(field << 3 | _BYTES) + _varint(sum(map(len, parts)))
    yield from parts


def append_initializers(model: bytes, tensors: Mapping[str, np.ndarray]) -> bytes:
    """An ONNX file with more initializers.

    Args:
        model: Content of an ONNX file.
        tensors: Arrays by name, float32, uint8, int8, int32, int64 or bool.

    Returns:
        Content of an ONNX file whose graph has all of them.
    """
    initializers = []
    for name, array in tensors.items():
        fields = [_number(_DIMS, size) for size in array.shape]
        fields.append(_number(_DATA_TYPE, _DATA_TYPES[array.dtype.name]))
        fields += _blob(_NAME, name.encode())
        # The format is little-endian on every machine.
        fields += _blob(_RAW_DATA, np.ascontiguousarray(array).astype(array.dtype.newbyteorder('<'), copy=False).tobytes())
        initializers += _blob(_INITIALIZER, *fields)
    return b''.join([model, *_blob(_GRAPH, *initializers)]) if initializers else model
