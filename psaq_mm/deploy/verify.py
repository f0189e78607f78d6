# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Comparison of an exported model's integer codes with those of the fake-quantized model.

It is done layer by layer: a copy of the graph is cut after every quantizer and before every LayerNorm, the pieces get
the fake-quantized model's tensors as inputs, and their codes are compared. So each layer has the same inputs, and a
difference is that of one layer. End to end the differences of layers add up; that is reported too.
"""

import copy
import math
from collections import defaultdict
from typing import Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from psaq_mm.contexts import evaluating, hooked
from psaq_mm.deploy.export import ExportedModel, GraphModel
from psaq_mm.deploy.lowering import LoweredGraph, replace_items, with_weights
from psaq_mm.deploy.parts import GraphParts
from psaq_mm.models import spec_of
from psaq_mm.quantization import LogQuantizer, Quantizer, log_quantize, quantize
from psaq_mm.quantization.logarithmic import BASES
from psaq_mm.quantization.primitives import along
from psaq_mm.runtime.bundle import read_manifest, read_weights
from psaq_mm.runtime.deployed import DeployedModel, load
from psaq_mm.runtime.kernels import EXPLAINED
from psaq_mm.runtime.registry import Runtime, start
from psaq_mm.tables import text_table

__all__ = ['LayerAgreement', 'OutputAgreement', 'Verification', 'verify', 'wrong_weights']

LEAST_SHARE = 0.999
GREATEST_STEP = 1
GREATEST_ERROR = 0.1
"""Of an output end to end, where activations have 6 bits or more. Ties that are rounded in another way add up to much
less. A runtime that executes the whole graph in another way than its pieces exceeds it."""
TIE = 1e-3
"""Of a step: a value this close to the edge between two codes is decided by the order of a sum. A wrong layer moves all
values, also those that are not."""
_CUT = '.given'


class LayerAgreement(NamedTuple):
    """Codes of one quantizer.

    Attributes:
        name: Of the quantizer.
        elements: Number of codes.
        equal: Share of equal codes.
        step: Greatest difference, in codes.
        edge: Greatest distance from the edge between two codes, in steps, of values whose codes differ.
    """

    name: str
    elements: int
    equal: float
    step: int
    edge: float = math.inf

    @property
    def ties(self) -> bool:
        """Whether all codes that differ are ties. Padded positions of windows all hold one value, so one tie may be
        there a hundred times.
        """
        return self.step <= GREATEST_STEP and self.edge <= TIE

    @property
    def good(self) -> bool:
        """Whether 99.9 % are equal or all others are ties, and none differs by more than one step."""
        return self.ties or self.equal >= LEAST_SHARE and self.step <= GREATEST_STEP


class OutputAgreement(NamedTuple):
    """An output of the whole graph.

    Attributes:
        name: Of the output.
        error: L2 error relative to the fake-quantized model.
        same_class: Share of positions with the same greatest channel.
        good: Whether the error is small enough.
    """

    name: str
    error: float
    same_class: float
    good: bool = True


class Verification(NamedTuple):
    """What :func:`verify` returns.

    Attributes:
        runtime: Its name.
        layers: One row for each quantizer.
        outputs: One row for each output of the graph.
        weights: Names of integer weights that differ from the fake-quantized model's.
        kernels: What the runtime ran the whole graph with, of :data:`.kernels.KERNELS`.
        size: Of the images, (height, width); None: unknown.
    """

    runtime: str
    layers: List[LayerAgreement]
    outputs: List[OutputAgreement]
    weights: List[str]
    kernels: Tuple[str, ...] = ()
    size: Optional[Tuple[int, int]] = None

    @property
    def equal(self) -> float:
        """Share of equal codes among all."""
        elements = sum(layer.elements for layer in self.layers)
        return sum(layer.elements * layer.equal for layer in self.layers) / elements if elements else 1.0

    @property
    def good(self) -> bool:
        """Whether every layer, weight and output is good, and 99.9 % of all codes are equal."""
        return not self.weights and self.equal >= LEAST_SHARE and all(row.good for row in (*self.layers, *self.outputs))

    def to_table(self, brief: bool = False) -> str:
        """Text with one line for each layer, the worst first, then the outputs.

        Args:
            brief: Leave out good layers, and all outputs but the worst one and those that are not good.
        """
        title = f'codes in {self.runtime}' + (f', {self.size[0]} x {self.size[1]}' if self.size else '')
        rows = [layer for layer in self.layers if not brief or not layer.good]
        cells = [
            (
                layer.name,
                str(layer.elements),
                f'{layer.equal:.4%}',
                str(layer.step),
                '<- too far' if not layer.good else 'ties' if layer.equal < LEAST_SHARE else '',
            )
            for layer in sorted(rows, key=lambda row: (row.equal, -row.step))
        ]
        total, step = (
            sum(layer.elements for layer in self.layers),
            max((layer.step for layer in self.layers), default=0),
        )
        cells.append(('all layers', str(total), f'{self.equal:.4%}', str(step), ''))
        lines = [text_table((title, 'elements', 'equal', 'greatest step', ''), cells, 'lrrrl', rule=False)]
        worst = max([output.error for output in self.outputs] + [0.0])
        lines += [
            f'end to end, {o.name}: relative error {o.error:.2e}, same greatest channel at {o.same_class:.3%} of '
            f'positions'
            f'{"" if o.good else "  <- too far"}'
            for o in self.outputs
            if not brief or not o.good or o.error == worst
        ]
        lines += [f'{self.runtime} ran the graph with {EXPLAINED[kernels]}' for kernels in self.kernels]
        lines.append(
            'integer weights: all as in the fake-quantized model'
            if not self.weights
            else f'integer weights that differ: {", ".join(self.weights)}'
        )
        return '\n'.join(lines)


# ---------------------------------------------------------------------- the fake-quantized side
def _recorded_inputs(model: nn.Module, parts: GraphParts, image: Tensor) -> Dict[str, List[Tensor]]:
    """Inputs of every quantizer and every LayerNorm in one forward, one for each call."""
    inputs: Dict[str, List[Tensor]] = {}
    names = {m: name for name, m in model.named_modules() if isinstance(m, (Quantizer, nn.LayerNorm))}

    def record(module: nn.Module, args: Tuple) -> None:
        inputs.setdefault(names[module], []).append(args[0].detach().clone())

    with torch.no_grad(), hooked(names, lambda module: module.register_forward_pre_hook(record)):
        GraphModel(model, parts)(image)
    return inputs


def _codes_of(quantizer: Quantizer, x: Tensor, shift: Optional[int]) -> np.ndarray:
    if isinstance(quantizer, LogQuantizer):
        return log_quantize(x, quantizer.scale, quantizer.bits, quantizer.base).numpy().astype(np.float32)
    codes = quantize(x, quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax)
    signed = quantizer.qmin < 0 or shift is not None
    return (codes.numpy() - (shift or 0)).astype(np.int8 if signed else np.uint8)


def _edge_distances(quantizer: Quantizer, x: Tensor) -> np.ndarray:
    """Distance of each value from the nearest edge between two codes, in steps."""
    if isinstance(quantizer, LogQuantizer):
        places = torch.log2(x / quantizer.scale) * BASES[quantizer.base]
    else:
        places = x / quantizer.scale
    return (places - places.floor() - 0.5).abs().numpy()


def _reordered(x: Tensor, order: Optional[Tensor]) -> Tensor:
    return x if order is None else x[..., order]


# ---------------------------------------------------------------------- the graph, cut
def _cut(graph: LoweredGraph, exported: ExportedModel, fed: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """A graph with its weights that reads the tensors of ``fed`` in place of computing them, and has all codes as
    outputs. The input for the tensor ``name`` is called ``name`` + :data:`_CUT`.
    """
    model = with_weights(graph, exported.weights)
    for node in model.graph.node:
        replace_items(node.input, [name + _CUT if name in fed else name for name in node.input])
    for name, value in fed.items():
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        model.graph.input.append(helper.make_tensor_value_info(name + _CUT, kind, value.shape))
    del model.graph.output[:]
    for code in sorted({code for names in graph.codes.values() for code in names}):
        integer = code in fed  # else logarithmic
        kind = helper.np_dtype_to_tensor_dtype(fed[code].dtype) if integer else TensorProto.FLOAT
        model.graph.output.append(helper.make_tensor_value_info(code, kind, None))
    return model


class _Expected(NamedTuple):
    """Codes that a quantizer of the fake-quantized model has for one input."""

    quantizer: str
    codes: np.ndarray
    x: Tensor


def _expected_tensors(
    modules: Mapping[str, nn.Module], exported: ExportedModel, graph: LoweredGraph, inputs: Dict[str, List[Tensor]]
) -> Tuple[Dict[str, _Expected], Dict[str, np.ndarray]]:
    """What the codes of a graph are to be, and what its cuts are fed, both by the name of a tensor."""
    exportable = exported.exportable
    expected: Dict[str, _Expected] = {}
    fed: Dict[str, np.ndarray] = {}
    for name, codes in graph.codes.items():
        for x, code, value in zip(inputs[name], codes, graph.values[name]):
            x = graph.layouts[name](x) if name in graph.layouts else _reordered(x, exportable.orders.get(name))
            expected[code] = _Expected(name, _codes_of(modules[name], x, exportable.quantizers[name].shift), x)
            if isinstance(modules[name], LogQuantizer):
                fed[value] = modules[name](x).detach().numpy()
            else:
                fed[code] = expected[code].codes
    values = {value for names in graph.values.values() for value in names}
    for name, tensors in graph.taps.items():
        for x, tensor in zip(inputs[name], tensors):
            if tensor not in values:
                fed[tensor] = _reordered(x, exportable.orders.get(name)).numpy()
    return expected, fed


class _Count:
    """Codes of one quantizer that were compared so far."""

    elements, equal, step, edge = 0, 0, 0, 0.0

    def add(self, quantizer: Quantizer, codes: np.ndarray, expected: _Expected) -> None:
        gap = np.abs(codes.astype(np.int32) - expected.codes.astype(np.int32))
        self.elements += gap.size
        self.equal += int((gap == 0).sum())
        self.step = max(self.step, int(gap.max()))
        if gap.any():
            self.edge = max(self.edge, float(_edge_distances(quantizer, expected.x)[gap > 0].max()))


def _layer_rows(
    model: nn.Module, exported: ExportedModel, images: Tensor, runtime: str, threads: Optional[int], kernels: str
) -> List[LayerAgreement]:
    graph = exported.graphs[tuple(images.shape[-2:])]
    modules = dict(model.named_modules())
    counts: Dict[str, _Count] = defaultdict(_Count)
    session: Optional[Runtime] = None
    for image in images.split(1):  # one at a time: a layer's inputs may be gigabytes
        inputs = _recorded_inputs(model, exported.parts, image)
        expected, fed = _expected_tensors(modules, exported, graph, inputs)
        del inputs
        if session is None:
            session = start(_cut(graph, exported, fed).SerializeToString(), runtime, threads, kernels)
        arrays = {'images': image.numpy(), **{name + _CUT: value for name, value in fed.items()}}
        codes = session.run({name: array for name, array in arrays.items() if name in session.input_names})
        del fed, arrays
        for code, row in expected.items():
            counts[row.quantizer].add(modules[row.quantizer], codes[code], row)
    return [LayerAgreement(name, c.elements, c.equal / c.elements, c.step, c.edge) for name, c in counts.items()]


# ---------------------------------------------------------------------- weights and outputs
def wrong_weights(model: nn.Module, exported: ExportedModel) -> List[str]:
    """Names of layers whose integer weight on disk differs from the one that the fake-quantized layer multiplies with.

    The sign of a channel may differ: folded batch normalization moves it from the scale into the codes.
    """
    weights = read_weights(exported.directory, read_manifest(exported.directory))
    modules, wrong = dict(model.named_modules()), []
    for name, integer in exported.exportable.weights.items():
        if integer.layer is None:
            continue
        codes = weights.get(f'{name}.weight.codes', integer.codes.numpy())
        layer = modules[integer.layer]
        order = exported.exportable.orders.get(f'{integer.layer}.input_quantizer')
        weight = _reordered(layer.weight.detach(), order)
        quantizer = layer.weight_quantizer
        wanted = quantize(
            weight, quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax, layer.output_axis
        )
        wanted = wanted - along(quantizer.zero_point, wanted, layer.output_axis)
        wanted = wanted.t() if isinstance(layer, nn.Linear) else wanted
        wanted = wanted if integer.channels is None else wanted[:, slice(*integer.channels)]
        zero = along(integer.zero_point.int(), wanted, integer.axis)
        gap = torch.from_numpy(codes.astype(np.int32)) - zero
        if not bool(((gap == wanted) | (gap == -wanted)).all()) and integer.layer not in wrong:
            wrong.append(integer.layer)
    return wrong


def _output_rows(
    model: nn.Module, exported: ExportedModel, deployed: DeployedModel, images: Tensor
) -> Iterator[OutputAgreement]:
    arrays = deployed.run(images.numpy())
    graph = GraphModel(model, exported.parts)
    with torch.no_grad():
        rows = [graph(images[i : i + 1]) for i in range(len(images))]
    for i, name in enumerate(graph.names):
        wanted = torch.cat([row[i] for row in rows]).numpy()
        error = np.linalg.norm(arrays[name] - wanted) / max(np.linalg.norm(wanted), 1e-12)
        good = error <= GREATEST_ERROR or spec_of(model).a_bits < 6
        yield OutputAgreement(
            name, float(error), float((arrays[name].argmax(1) == wanted.argmax(1)).mean()), bool(good)
        )


def verify(
    model: nn.Module,
    exported: ExportedModel,
    images: Tensor,
    runtime: str,
    threads: Optional[int] = None,
    kernels: str = 'auto',
) -> Verification:
    """Compare an exported model with the fake-quantized model.

    Args:
        model: The fake-quantized model, on any device: a copy on the CPU, where the runtime is, is compared.
        exported: What :func:`.export.export_model` returned.
        images: Normalized, (N, C, H, W), of an exported size. With a dynamic size: of the traced size; or of another
            size in multiples of :data:`.export.MULTIPLE`, for which only outputs are compared.
        runtime: Name of the runtime, one of :data:`psaq_mm.runtime.RUNTIMES`.
        threads: Of the runtime.
        kernels: See :func:`psaq_mm.runtime.start`.
    """
    if next(model.parameters()).device.type != 'cpu':
        model = copy.deepcopy(model).cpu()
    images = images.cpu()
    with evaluating(model):
        size = tuple(images.shape[-2:])
        deployed = load(exported.directory, runtime, threads, kernels)
        known = size in exported.graphs
        layers = _layer_rows(model, exported, images, runtime, threads, kernels) if known else []
        outputs = list(_output_rows(model, exported, deployed, images))
        return Verification(runtime, layers, outputs, wrong_weights(model, exported), deployed.kernels, size)
