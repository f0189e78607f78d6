# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""An exported model as plain ONNX files, which any program that reads ONNX opens without psaq_mm.

``*.onnx``
    The graphs of the exported model with their weights; codes of 4 bits are widened to int8. All operations are ONNX's
    own.
``weights.data``
    Weights of graphs that do not hold them, as ONNX external data. All graphs share the file. It is missing where
    there are none.
``model.json``
    What stands around the graphs: preprocessing, inputs and outputs, sizes, classes, settings of the detector.
``README.txt``
    The same, in words.

It needs NumPy, safetensors and the package onnx.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Container, Dict, List, Mapping, Optional, Tuple, Union

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from psaq_mm.files import whole_folder
from psaq_mm.runtime.bundle import PLAIN, graph_entries, read_graph, read_manifest, read_weights, replaceable
from psaq_mm.runtime.wire import MESSAGE_LIMIT

__all__ = ['DATA', 'README', 'write_plain_onnx']

DATA, README = 'weights.data', 'README.txt'
ALIGNMENT = 4096
"""Weights in :data:`DATA` begin at multiples of it, so that they can be mapped (onnx, "External Data")."""

PathLike = Union[str, os.PathLike]


class _Data:
    """The file of external data, in which each content stands once."""

    def __init__(self, path: Path):
        self.path = path
        self.places: Dict[bytes, Tuple[int, int]] = {}

    def add(self, tensor: TensorProto, array: np.ndarray) -> None:
        """Write an array; ``tensor`` gets its place instead of its content."""
        content = np.asarray(array, order='C').astype(array.dtype.newbyteorder('<'), copy=False).tobytes()
        digest = hashlib.sha256(content).digest()
        if digest not in self.places:
            with open(self.path, 'ab') as file:
                start = file.tell()
                file.write(bytes(-start % ALIGNMENT))
                self.places[digest] = file.tell(), len(content)
                file.write(content)
        offset, length = self.places[digest]
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (('location', DATA), ('offset', offset), ('length', length)):
            tensor.external_data.add(key=key, value=str(value))


def write_plain_onnx(bundle: PathLike, out: PathLike, external_data: bool = False) -> Path:
    """Write plain ONNX files of an exported model. It is written whole or not at all.

    Args:
        bundle: Directory of the exported model, of any version.
        out: Directory to be written; an export that is there already is replaced.
        external_data: Write the weights beside the graphs, which then share them. It is done in any case for a graph
            that would be larger than what ONNX allows in one file.

    Returns:
        Its path.

    Raises:
        CheckpointError: ``bundle`` holds no exported model, or is not whole.
        ConfigError: ``out`` exists and is no export.
    """
    out, bundle = replaceable(out), Path(bundle)
    manifest = read_manifest(bundle)
    with whole_folder(out) as folder:
        data = _Data(folder / DATA)
        graphs = []
        for entry in graph_entries(manifest):
            apart = external_data or _bytes_with_weights(bundle, manifest, entry) > MESSAGE_LIMIT - _ROOM
            model = _with_weights(bundle, manifest, entry, data if apart else None)
            if manifest['quant'].get('target') != 'tensorrt':
                _hold_concatenations_(model)
            _state_types_(model, set(entry['weights']))
            _describe_(model, manifest, entry)
            (folder / entry['file']).write_bytes(model.SerializeToString())
            graphs.append(_row(model, manifest, entry))
        described = _description(manifest, graphs)
        (folder / PLAIN).write_text(json.dumps(described, indent=1), encoding='utf-8')
        (folder / README).write_text(_readme(described, data.path.exists()), encoding='utf-8')
    return out


_ROOM = 2**20
"""Bytes for names, types and descriptions that are not counted."""


def _bytes_with_weights(bundle: Path, manifest: Mapping, entry: Mapping) -> int:
    # One at a time: all together may be gigabytes.
    sizes = (read_weights(bundle, manifest, [name])[name].nbytes for name in entry['weights'])
    return len(read_graph(bundle, manifest, entry)) + sum(sizes)


def _with_weights(bundle: Path, manifest: Mapping, entry: Mapping, data: Optional[_Data]) -> onnx.ModelProto:
    """A graph with its weights, which are in the message where there is no ``data``."""
    model = onnx.load_model_from_string(read_graph(bundle, manifest, entry))
    for name in entry['weights']:
        array = read_weights(bundle, manifest, [name])[name]
        if data is None:
            model.graph.initializer.append(numpy_helper.from_array(array, name))
        else:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            data.add(model.graph.initializer.add(name=name, data_type=kind, dims=array.shape), array)
    return model


def _state_types_(model: onnx.ModelProto, weights: Container[str]) -> None:
    """Write types and shapes of all values into a graph. Its ``weights`` are inputs meanwhile: their content, which may
    be gigabytes or in another file, is not needed.
    """
    graph = model.graph
    probe = helper.make_model(
        helper.make_graph(
            graph.node,
            graph.name,
            [*graph.input, *(_value_info(tensor) for tensor in graph.initializer if tensor.name in weights)],
            graph.output,
            [tensor for tensor in graph.initializer if tensor.name not in weights],
        ),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )
    inferred = onnx.shape_inference.infer_shapes(probe, check_type=True, strict_mode=True, data_prop=True)
    for field in ('value_info', 'output'):
        graph.ClearField(field)
        getattr(graph, field).extend(getattr(inferred.graph, field))


def _hold_concatenations_(model: onnx.ModelProto) -> None:
    """Keep quantizers with signed codes behind the concatenation that they read, in place.

    OpenVINO 2026.4 moves them before it and gives a wrong product of their codes, see the runtime's own
    ``_hold_concatenations_``. It does not find the concatenation behind a maximum with the least number, which changes
    no value.
    """
    graph, nodes = model.graph, []
    producers = {name: node for node in graph.node for name in node.output}
    kinds = {i.name: i.data_type for i in graph.initializer}
    least = numpy_helper.from_array(np.finfo(np.float32).min.reshape(1), 'least_number')
    for node in graph.node:
        if node.op_type == 'QuantizeLinear' and kinds.get(node.input[2]) == TensorProto.INT8:
            first = producers.get(node.input[0])
            sources = [producers.get(name) for name in first.input] if first is not None else []
            if any(source is not None and source.op_type == 'Concat' for source in (first, *sources)):
                held = f'{node.output[0]}.held'
                nodes.append(helper.make_node('Max', [node.input[0], least.name], [held], name=held))
                node.input[0] = held
        nodes.append(node)
    if len(nodes) > len(graph.node):
        del graph.node[:]
        graph.node.extend(nodes)
        graph.initializer.append(least)


def _value_info(tensor: TensorProto) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))


# ---------------------------------------------------------------------- what stands around the graphs
_IMAGES = 'normalized images, channels in front (preprocessing: see model.json)'
_PORTS = dict(
    images=_IMAGES,
    features='features of each box, channels last: RoIAlign of the level that its size belongs to',
    labels='the class of each box',
    scores='logits of the classes of each box',
    deltas='changes of each box, to be decoded',
    masks='logits of the mask of each box, of its own class',
    logits='logits of the classes',
)


def _port_text(name: str, entry: Mapping) -> str:
    if name == 'features' and entry['input'].get('quantizer'):
        return f'{_PORTS[name]}; as codes: {_codes_text(entry["input"]["quantizer"])}'
    if name.startswith('level_'):
        return 'a feature map'
    return _PORTS.get(name, 'an output of the dense head')


def _codes_text(quantizer: Mapping) -> str:
    return (
        f'clip(round(x / {quantizer["scale"]!r}) + {quantizer["zero_point"]}, {quantizer["low"]}, '
        f'{quantizer["high"]}) in float32, halves to even, as {quantizer["dtype"]}'
    )


def _describe_(model: onnx.ModelProto, manifest: Mapping, entry: Mapping) -> None:
    """Write what programs show of a file: producer, descriptions, properties."""
    graph = model.graph
    for port in (*graph.input, *graph.output):
        port.doc_string = _port_text(port.name, entry)
    graph.name = Path(entry['file']).stem
    model.producer_name, model.producer_version = 'psaq_mm', str(manifest['psaq_mm'])
    model.doc_string = (
        f'{manifest["model"]}, {manifest["task"]}, quantized to {manifest["label"]}: weights int8, activations '
        'QuantizeLinear and DequantizeLinear. See README.txt beside it.'
    )
    model.ClearField('metadata_props')
    properties = dict(task=manifest['task'], quantization=manifest['label'], classes=json.dumps(manifest['classes']))
    helper.set_model_props(model, dict(properties, preprocessing=json.dumps(_preprocessing(manifest))))


def _preprocessing(manifest: Mapping) -> Dict[str, Any]:
    return dict(
        channels=manifest['channels'],
        channel_order='RGB' if manifest['reverse_channels'] else 'as read by OpenCV (BGR)',
        mean=manifest['mean'],
        std=manifest['std'],
        pipeline=manifest.get('pipeline'),
        pad_divisor=manifest.get('pad_divisor'),
        exact_size=manifest['exact_size'],
    )


def _shape(port: onnx.ValueInfoProto) -> List[Union[int, str]]:
    return [dim.dim_value if dim.HasField('dim_value') else dim.dim_param for dim in port.type.tensor_type.shape.dim]


def _ports(ports: Any, strides: Mapping) -> List[Dict[str, Any]]:
    rows = []
    for port in ports:
        dtype = helper.tensor_dtype_to_np_dtype(port.type.tensor_type.elem_type).name
        rows.append(dict(name=port.name, dtype=dtype, shape=_shape(port), description=port.doc_string))
        rows[-1].update(dict(stride=strides[port.name]) if port.name in strides else {})
    return rows


def _row(model: onnx.ModelProto, manifest: Mapping, entry: Mapping) -> Dict[str, Any]:
    """What :data:`.bundle.PLAIN` says of a graph."""
    strides = manifest['strides'] if 'size' in entry else {}
    row = {key: entry[key] for key in ('file', 'size', 'multiple') if entry.get(key) is not None}
    if entry.get('input', {}).get('quantizer'):
        row['quantizer'] = entry['input']['quantizer']
    return dict(row, inputs=_ports(model.graph.input, strides), outputs=_ports(model.graph.output, strides))


def _description(manifest: Mapping, graphs: List[Dict[str, Any]]) -> Dict[str, Any]:
    """Content of :data:`.bundle.PLAIN`."""
    dense, heads = len(manifest['graphs']), manifest.get('heads') or {}
    boxes = dense + len(heads.get('box') or ())
    outputs = manifest['outputs']
    return dict(
        producer='psaq_mm',
        psaq_mm=manifest['psaq_mm'],
        model=manifest['model'],
        task=manifest['task'],
        quantization=manifest['label'],
        opset=manifest['opset'],
        classes=manifest['classes'],
        preprocessing=_preprocessing(manifest),
        graphs=graphs[:dense],
        box_heads=graphs[dense:boxes],
        mask_heads=graphs[boxes:],
        levels=outputs['features'] if 'features' in outputs else outputs['levels'],
        dense_head=outputs['dense'],
        segmentation={key: manifest[key] for key in ('labels', 'align_corners') if key in manifest} or None,
        detector=manifest.get('detector'),
    )


_SETTINGS = """Settings of the runtimes that keep the integers of the model as they are:

  ONNX Runtime  disabled_optimizers=['MatMulAddFusion', 'WeightBiasQuantization']
  OpenVINO      INFERENCE_PRECISION_HINT=f32, DYNAMIC_QUANTIZATION_GROUP_SIZE=0
                (ovc and save_model: compress_to_fp16=False)
  without VNNI  ONNX Runtime: session.x64quantprecision=1; OpenVINO: LP_TRANSFORMS_MODE=NO

docs/reference/integer_models.md of psaq_mm, "Other runtimes", says what each one does.
"""


def _readme(described: Mapping, with_data: bool) -> str:
    """Content of :data:`README`, from that of :data:`.bundle.PLAIN`."""
    kinds = dict(graphs='pictures', box_heads='boxes', mask_heads='boxes')
    lines = [
        f'{described["model"]} ({described["task"]}), quantized to {described["quantization"]} with psaq_mm '
        f'{described["psaq_mm"]}.',
        f'Plain ONNX, opset {described["opset"]}: every operation is one of the standard.',
        '',
        'Preprocessing',
        *(f'  {line}' for line in _preprocessing_lines(described)),
        '',
        'Files',
    ]
    for key, what in kinds.items():
        for row in described[key]:
            lines.append(f'  {row["file"]}, for {what}')
            lines += [f'    {side[:-1]:6} {_port_line(port)}' for side in ('inputs', 'outputs') for port in row[side]]
    lines += [f'  {DATA}: weights of the graphs (ONNX external data); keep it beside them'] if with_data else []
    lines += [f'  {PLAIN}: all of this for programs, with classes', '']
    return '\n'.join(lines) + '\n' + _SETTINGS


def _port_line(port: Mapping) -> str:
    stride = f', one value for {port["stride"]} pixels' if 'stride' in port else ''
    return f'{port["name"]}: {port["dtype"]} {" x ".join(map(str, port["shape"]))}, {port["description"]}{stride}'


def _preprocessing_lines(described: Mapping) -> List[str]:
    steps = _steps(described['preprocessing'], described['graphs'])
    return [f'{number}. {step}' for number, step in enumerate(steps, 1)]


def _steps(made: Mapping, graphs: List[Mapping]) -> List[str]:
    steps = [json.dumps(step) for step in made['pipeline'] or ()]
    steps.append(f'{made["channels"]} channels, {made["channel_order"]}, as float32')
    if made['mean']:
        steps.append(f'(value - mean) / std, mean {made["mean"]}, std {made["std"]}')
    steps.append('channels in front: (1, channels, height, width)')
    if made['exact_size']:
        return steps
    multiple = graphs[0].get('multiple') if graphs else None
    to = f'multiples of {multiple}' if multiple else 'the size of a graph'
    first = f'multiples of {made["pad_divisor"]}, then to ' if made['pad_divisor'] else ''
    return [*steps, f'zeros at the right and at the bottom, up to {first}{to}']
