# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Whether an exported model gives the integer codes of the fake-quantized one.

Layer by layer: a copy of the graph is cut behind every quantizer and before every LayerNorm, each cut is fed what the
fake-quantized model has there, and the codes that come out are compared. So each layer sees the same inputs, and a
difference belongs to the layer that shows it; end to end the layers' differences add up, which is reported beside it.
"""

import copy
import math
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from psaq_mm.deploy.export import ExportedModel, _Graph
from psaq_mm.deploy.lowering import LoweredGraph, with_weights
from psaq_mm.deploy.parts import GraphParts
from psaq_mm.models import spec_of
from psaq_mm.quantization import LogQuantizer, Quantizer, log_quantize, quantize
from psaq_mm.quantization.logarithmic import BASES
from psaq_mm.quantization.primitives import along
from psaq_mm.runtime.bundle import read_manifest, read_weights
from psaq_mm.runtime.deployed import DeployedModel, load
from psaq_mm.runtime.kernels import EXPLAINED
from psaq_mm.runtime.registry import start

__all__ = ['LayerAgreement', 'OutputAgreement', 'Verification', 'verify', 'wrong_weights']

LEAST_SHARE = 0.999
GREATEST_STEP = 1
GREATEST_ERROR = 0.1
"""Of an output end to end, where activations have 6 bits or more. Ties that fall the other way add up to far less; a
runtime that takes the whole graph for another one than its pieces does not."""
TIE = 1e-3
"""Of a step: a value this close to the edge of two codes is decided by the order of a sum. A wrong layer moves all
values, these too."""
_FALSE_CUT = '.given'


class LayerAgreement(NamedTuple):
    """Codes of one quantizer.

    Attributes:
        name: Of the quantizer.
        elements: How many codes.
        equal: The share of them that is equal.
        step: The greatest difference, in codes.
        edge: Of the values whose codes differ, the greatest distance from the edge between two codes, in steps.
    """

    name: str
    elements: int
    equal: float
    step: int
    edge: float = math.inf

    @property
    def ties(self) -> bool:
        """Whether all that differ lie on an edge. Padded positions of windows hold one value: a hundred times the same
        tie.
        """
        return self.step <= GREATEST_STEP and self.edge <= TIE

    @property
    def good(self) -> bool:
        """Whether 99.9 % agree or the others are ties, and none is further off than one step."""
        return self.ties or self.equal >= LEAST_SHARE and self.step <= GREATEST_STEP


class OutputAgreement(NamedTuple):
    """An output of the whole graph: its error relative to the fake-quantized one (L2), and the share of positions whose
    greatest channel is the same.
    """

    name: str
    error: float
    same_class: float
    good: bool = True


class Verification(NamedTuple):
    """What :func:`verify` returns.

    Attributes:
        runtime: Its name.
        layers: One row a quantizer.
        outputs: One row an output of the graph.
        weights: Names of integer weights that are not the fake-quantized model's.
        kernels: What the runtime ran the whole graph with, of :data:`.kernels.KERNELS`.
        size: Of the images, (height, width); None where it was not told.
    """

    runtime: str
    layers: List[LayerAgreement]
    outputs: List[OutputAgreement]
    weights: List[str]
    kernels: Tuple[str, ...] = ()
    size: Optional[Tuple[int, int]] = None

    @property
    def equal(self) -> float:
        """Share of all codes that are equal."""
        elements = sum(layer.elements for layer in self.layers)
        return sum(layer.elements * layer.equal for layer in self.layers) / elements if elements else 1.0

    @property
    def good(self) -> bool:
        """Whether every layer, every weight and every output is, and 99.9 % of all codes are equal."""
        return not self.weights and self.equal >= LEAST_SHARE and all(row.good for row in (*self.layers, *self.outputs))

    def to_table(self, brief: bool = False) -> str:
        """Text: one line a layer, the worst first, then the outputs.

        Args:
            brief: Leave out the layers that are good, and of the outputs those that are better than another one.
        """
        title = f'codes in {self.runtime}' + (f', {self.size[0]} x {self.size[1]}' if self.size else '')
        rows = [layer for layer in self.layers if not brief or not layer.good]
        width = max([len(layer.name) for layer in rows] + [len(title)])
        lines = [f'{title:<{width}}  {"elements":>10}  {"equal":>9}  greatest step']
        for layer in sorted(rows, key=lambda l: (l.equal, -l.step)):
            mark = '  <- too far' if not layer.good else '  ties' if layer.equal < LEAST_SHARE else ''
            lines.append(f'{layer.name:<{width}}  {layer.elements:>10}  {layer.equal:>9.4%}  {layer.step:>13}{mark}')
        total = sum(layer.elements for layer in self.layers)
        lines.append(
            f'{"all layers":<{width}}  {total:>10}  {self.equal:>9.4%}  {max([l.step for l in self.layers] + [0]):>13}'
        )
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
class _Recorder:
    """What enters every quantizer and every LayerNorm in one forward, call by call."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.inputs: Dict[str, List[Tensor]] = {}

    def __enter__(self):
        self.handles = []
        for name, module in self.model.named_modules():
            if isinstance(module, (Quantizer, nn.LayerNorm)):
                self.handles.append(module.register_forward_pre_hook(self._hook(name)))
        return self

    def _hook(self, name: str):
        return lambda module, args: self.inputs.setdefault(name, []).append(args[0].detach().clone())

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


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
def _cut(graph: LoweredGraph, exported: ExportedModel, given: Dict[str, Tuple[str, np.ndarray]]) -> onnx.ModelProto:
    """A whole graph that reads the tensors of ``given`` instead of working them out, and has all codes as outputs.

    Args:
        given: By the name of the tensor, a name for the input and its content.
    """
    model = with_weights(graph, exported.weights)
    codes = {code for names in graph.codes.values() for code in names}
    for node in model.graph.node:
        inputs = [given[name][0] if name in given else name for name in node.input]
        del node.input[:]
        node.input.extend(inputs)
    for input_name, value in given.values():
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        model.graph.input.append(helper.make_tensor_value_info(input_name, kind, value.shape))
    del model.graph.output[:]
    kinds = {node.output[0]: node.op_type for node in model.graph.node}
    for code in sorted(codes):
        value = given[code][1] if code in given else None
        kind = TensorProto.FLOAT if kinds[code] != 'QuantizeLinear' else helper.np_dtype_to_tensor_dtype(value.dtype)
        model.graph.output.append(helper.make_tensor_value_info(code, kind, None))
    return model


def _records(model: nn.Module, parts: GraphParts, image: Tensor) -> Dict[str, List[Tensor]]:
    with torch.no_grad(), _Recorder(model) as recorder:
        _Graph(model, parts)(image)
    return recorder.inputs


def _layer_rows(
    model: nn.Module, exported: ExportedModel, images: Tensor, runtime: str, threads, kernels: str
) -> Iterator[LayerAgreement]:
    size = tuple(images.shape[-2:])
    graph = exported.graphs[size]
    modules = dict(model.named_modules())
    counts: Dict[str, List[float]] = {}
    session = None
    for i in range(len(images)):
        # of one image at a time: a layer's inputs may be gigabytes
        records = _records(model, exported.parts, images[i : i + 1])
        expected: Dict[str, Tuple[str, np.ndarray, Tensor]] = {}
        given: Dict[str, Tuple[str, np.ndarray]] = {}
        for name, codes in graph.codes.items():
            for x, code, value in zip(records[name], codes, graph.values[name]):
                x = graph.layouts[name](x) if name in graph.layouts else _reordered(x, exported.made.orders.get(name))
                found = _codes_of(modules[name], x, exported.made.quantizers[name].shift)
                expected[code] = name, found, x
                if isinstance(modules[name], LogQuantizer):
                    given[value] = value + _FALSE_CUT, modules[name](x).detach().numpy()
                else:
                    given[code] = code + _FALSE_CUT, found
        values = {value for names in graph.values.values() for value in names}
        for name, tensors in graph.taps.items():
            for x, tensor in zip(records[name], tensors):
                if tensor not in values:
                    given[tensor] = tensor + _FALSE_CUT, _reordered(x, exported.made.orders.get(name)).numpy()
        inputs = {input_name: value for input_name, value in given.values()}
        inputs['images'] = images[i : i + 1].numpy()
        if session is None:
            session = start(_cut(graph, exported, given).SerializeToString(), runtime, threads, kernels)
        del records
        found = session.run(_of_session(session, inputs))
        del inputs, given
        for code, (name, wanted, x) in expected.items():
            gap = np.abs(found[code].astype(np.int32) - wanted.astype(np.int32))
            row = counts.setdefault(name, [0, 0, 0, 0.0])
            row[0] += gap.size
            row[1] += int((gap == 0).sum())
            row[2] = max(row[2], int(gap.max()))
            if gap.any():
                row[3] = max(row[3], float(_edge_distances(modules[name], x)[gap > 0].max()))
    for name, (elements, equal, step, edge) in counts.items():
        yield LayerAgreement(name, elements, equal / elements, step, edge)


def _of_session(session, inputs: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
    """The inputs that a graph still has: a runtime may drop what nothing reads."""
    known = getattr(session, 'input_names', None)
    return inputs if known is None else {k: v for k, v in inputs.items() if k in known}


# ---------------------------------------------------------------------- weights and outputs
def wrong_weights(model: nn.Module, exported: ExportedModel) -> List[str]:
    """Names of layers whose integer weight on disk is not the one that the fake-quantized layer multiplies with.

    A channel may have its sign on the other side: folded batch normalization moves it from the scale into the codes.
    """
    weights = read_weights(exported.directory, read_manifest(exported.directory))
    modules, wrong = dict(model.named_modules()), []
    for name, integer in exported.made.weights.items():
        if integer.layer is None:
            continue
        codes = weights.get(f'{name}.weight.codes', integer.codes.numpy())
        layer = modules[integer.layer]
        order = exported.made.orders.get(f'{integer.layer}.input_quantizer')
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
    found = deployed.run(images.numpy())
    graph = _Graph(model, exported.parts)
    with torch.no_grad():
        rows = [graph(images[i : i + 1]) for i in range(len(images))]
    for i, name in enumerate(graph.names):
        wanted = torch.cat([row[i] for row in rows]).numpy()
        error = np.linalg.norm(found[name] - wanted) / max(np.linalg.norm(wanted), 1e-12)
        good = error <= GREATEST_ERROR or spec_of(model).a_bits < 6
        yield OutputAgreement(name, float(error), float((found[name].argmax(1) == wanted.argmax(1)).mean()), bool(good))


def verify(
    model: nn.Module,
    exported: ExportedModel,
    images: Tensor,
    runtime: str,
    threads: Optional[int] = None,
    kernels: str = 'auto',
) -> Verification:
    """Compare an exported model with the fake-quantized one it was made of.

    Args:
        model: The fake-quantized model, on any device: a copy on the CPU, where the runtime is, is compared.
        exported: What :func:`.export.export_model` returned.
        images: Normalized, (N, C, H, W), of an exported size; with a dynamic size, of the traced one, or of another one
            in multiples of :data:`.export.MULTIPLE`, whose outputs alone are compared.
        runtime: Name of the runtime, one of :data:`psaq_mm.runtime.RUNTIMES`.
        threads: Of the runtime.
        kernels: See :func:`.runtime.start`.
    """
    if next(model.parameters()).device.type != 'cpu':
        model = copy.deepcopy(model).cpu()
    images = images.cpu()
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        size = tuple(images.shape[-2:])
        deployed = load(exported.directory, runtime, threads, kernels)
        layers = (
            list(_layer_rows(model, exported, images, runtime, threads, kernels)) if size in exported.graphs else []
        )
        outputs = list(_output_rows(model, exported, deployed, images))
        return Verification(runtime, layers, outputs, wrong_weights(model, exported), deployed.kernels, size)
    finally:
        for module in was_training:
            module.training = True
