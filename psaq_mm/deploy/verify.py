# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Comparison of an exported model's integer codes with those of the fake-quantized model.

It is done layer by layer: a copy of the graph is cut after every quantizer and before every LayerNorm, the pieces get
the fake-quantized model's tensors as inputs, and their codes are compared. So each layer has the same inputs, and a
difference is that of one layer. End to end the differences of layers add up; that is reported too. Box and mask heads
are compared so on the RoI features that the fake-quantized model has on its own proposals.
"""

import copy
import math
from collections import defaultdict
from functools import partial
from typing import Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from psaq_mm.contexts import evaluating, hooked
from psaq_mm.deploy.export import ExportedModel, GraphModel, HeadExport
from psaq_mm.deploy.glue_check import GlueAgreement, compare_glue
from psaq_mm.deploy.heads import feature_quantizer
from psaq_mm.deploy.lowering import LoweredGraph, replace_items, with_weights
from psaq_mm.models import spec_of
from psaq_mm.models.tasks import task_of
from psaq_mm.quantization import LogQuantizer, Quantizer, log_quantize, quantize, set_mode
from psaq_mm.quantization.logarithmic import BASES
from psaq_mm.quantization.primitives import along
from psaq_mm.runtime.bundle import read_manifest, read_weights
from psaq_mm.runtime.deployed import DeployedModel, load
from psaq_mm.runtime.detection import ImageInfo
from psaq_mm.runtime.heads import quantize_features
from psaq_mm.runtime.kernels import EXPLAINED
from psaq_mm.runtime.registry import Runtime, start
from psaq_mm.tables import text_table

__all__ = ['LayerAgreement', 'OutputAgreement', 'Verification', 'verify', 'verify_glue', 'wrong_weights']

LEAST_SHARE = 0.999
GREATEST_STEP = 1
GREATEST_ERROR = 0.1
"""Of an output end to end, where activations have 6 bits or more. Ties that are rounded in another way add up to much
less. A runtime that executes the whole graph in another way than its pieces exceeds it."""
TIE = 1e-3
"""Of a step: a value this close to the edge between two codes is decided by the order of a sum. A wrong layer moves all
values, also those that are not."""
VERIFIED_ROIS = 100
"""Of each image: the RPN's best boxes."""
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
        outputs: One row for each output of the graphs.
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
class _Recorded(NamedTuple):
    """What modules of the fake-quantized model read for one image.

    Attributes:
        inputs: By quantizer and LayerNorm, one for each call.
        features: By box or mask head, RoI features (N, C, h, w).
    """

    inputs: Dict[str, List[Tensor]]
    features: Dict[str, Tensor]


def _recorded(model: nn.Module, exported: ExportedModel, image: Tensor) -> _Recorded:
    """Run the dense graph's part of a model, and its heads on its own proposals."""
    inputs: Dict[str, List[Tensor]] = {}
    features: Dict[str, Tensor] = {}
    names = {m: name for name, m in model.named_modules() if isinstance(m, (Quantizer, nn.LayerNorm))}
    heads = {model.get_submodule(head.place.path): head.place.path for head in exported.heads}

    def record(module: nn.Module, args: Tuple) -> None:
        if module in heads:
            features[heads[module]] = args[0].detach().clone()
        else:
            inputs.setdefault(names[module], []).append(args[0].detach().clone())

    with torch.no_grad(), hooked([*names, *heads], lambda module: module.register_forward_pre_hook(record)):
        graph = GraphModel(model, exported.parts)
        outputs = graph(image)
        if heads:
            dense, task = dict(inputs), task_of(model)
            levels = [output.permute(0, 3, 1, 2) for output in outputs[: len(graph.levels)]]
            inputs.clear()
            task.roi_outputs(model, image, levels, task.proposals(model, image, levels, VERIFIED_ROIS))
            inputs.update(dense)  # the RPN ran again
    return _Recorded(inputs, features)


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
def _cut(
    graph: LoweredGraph, exported: ExportedModel, fed: Mapping[str, np.ndarray], free: bool = False
) -> onnx.ModelProto:
    """A graph with its weights that reads the tensors of ``fed`` in place of computing them, and has all codes as
    outputs. The input for the tensor ``name`` is called ``name`` + :data:`_CUT`; with ``free`` the size of its first
    axis is not fixed.
    """
    model = with_weights(graph, exported.weights)
    for node in model.graph.node:
        replace_items(node.input, [name + _CUT if name in fed else name for name in node.input])
    for name, value in fed.items():
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        shape = ('rois', *value.shape[1:]) if free else value.shape
        model.graph.input.append(helper.make_tensor_value_info(name + _CUT, kind, shape))
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


class _Pieces:
    """A graph that is cut, and its session, which is started with the first image.

    Args:
        graph: A dense graph, or that of a head.
        exported: That it is of.
        start_session: Starts a graph.
        free: See :func:`_cut`.
    """

    def __init__(
        self,
        graph: LoweredGraph,
        exported: ExportedModel,
        start_session: Callable[[bytes], Runtime],
        free: bool = False,
    ):
        self.graph, self.exported, self.free = graph, exported, free
        self._start = start_session
        self._session: Optional[Runtime] = None

    def count(
        self,
        modules: Mapping[str, nn.Module],
        inputs: Dict[str, List[Tensor]],
        arrays: Mapping[str, np.ndarray],
        counts: Dict[str, _Count],
    ) -> None:
        """Compare the codes for one image.

        Args:
            modules: Of the fake-quantized model, by name.
            inputs: Of its quantizers, see :class:`_Recorded`.
            arrays: Inputs of the graph.
            counts: By quantizer; they are added to.
        """
        expected, fed = _expected_tensors(modules, self.exported, self.graph, inputs)
        if self._session is None:
            cut = _cut(self.graph, self.exported, fed, self.free)
            self._session = self._start(cut.SerializeToString()) if expected else None
        if self._session is None:  # a graph that quantizes nothing
            return
        given = {**arrays, **{name + _CUT: value for name, value in fed.items()}}
        codes = self._session.run({name: value for name, value in given.items() if name in self._session.input_names})
        for code, row in expected.items():
            counts[row.quantizer].add(modules[row.quantizer], codes[code], row)


def _layer_rows(
    model: nn.Module, exported: ExportedModel, images: Tensor, start_session: Callable[[bytes], Runtime]
) -> List[LayerAgreement]:
    modules = dict(model.named_modules())
    counts: Dict[str, _Count] = defaultdict(_Count)
    dense = _Pieces(exported.graphs[tuple(images.shape[-2:])], exported, start_session)
    heads = [(head, _Pieces(head.graph, exported, start_session, free=True)) for head in exported.heads]
    for image in images.split(1):  # one at a time: a layer's inputs may be gigabytes
        recorded = _recorded(model, exported, image)
        dense.count(modules, recorded.inputs, dict(images=image.numpy()), counts)
        for head, pieces in heads:
            features = recorded.features[head.place.path]
            codes = head.entry['input']['quantizer'] is not None
            quantizer = feature_quantizer(head.place, modules[head.place.path]) if codes else None
            arrays = _head_inputs(head, features, modules)
            if quantizer is not None:
                name = next(name for name, module in modules.items() if module is quantizer)
                row = _Expected(name, _codes_of(quantizer, features, None), features)
                counts[name].add(quantizer, arrays['features'].transpose(0, 3, 1, 2), row)
            pieces.count(modules, recorded.inputs, arrays, counts)
    return [LayerAgreement(name, c.elements, c.equal / c.elements, c.step, c.edge) for name, c in counts.items()]


def _head_inputs(head: HeadExport, features: Tensor, modules: Mapping[str, nn.Module]) -> Dict[str, np.ndarray]:
    """RoI features (N, C, h, w) as a head's graph takes them, and classes for the RoIs, each one in turn."""
    maps = features.permute(0, 2, 3, 1).numpy()
    arrays = dict(features=quantize_features(maps, head.entry['input']['quantizer']))
    if head.place.kind == 'mask':
        classes = modules[head.place.path].num_classes
        arrays['labels'] = np.arange(len(maps), dtype=np.int64) % classes
    return arrays


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
        codes = weights.get(f'{name}.weight.codes', integer.codes.numpy()).reshape(integer.codes.shape)
        layer = modules[integer.layer]
        order = exported.exportable.orders.get(f'{integer.layer}.input_quantizer')
        weight = _reordered(layer.weight.detach(), order)
        quantizer = layer.weight_quantizer
        wanted = quantize(
            weight, quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax, layer.output_axis
        )
        wanted = wanted - along(quantizer.zero_point, wanted, layer.output_axis)
        wanted = wanted.t() if isinstance(layer, nn.Linear) else wanted
        wanted = wanted if integer.arrange is None else integer.arrange(wanted)
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
    last = exported.manifest['outputs']['channel_last']
    for i, name in enumerate(graph.names):
        wanted = torch.cat([row[i] for row in rows]).numpy()
        yield _output_row(model, name, arrays[name], wanted, -1 if name in last else 1)


def _output_row(model: nn.Module, name: str, array: np.ndarray, wanted: np.ndarray, classes: int) -> OutputAgreement:
    """One output; ``classes`` is the axis of its channels."""
    error = np.linalg.norm(array - wanted) / max(np.linalg.norm(wanted), 1e-12)
    good = error <= GREATEST_ERROR or spec_of(model).a_bits < 6
    same = array.argmax(classes) == wanted.argmax(classes)
    return OutputAgreement(name, float(error), float(same.mean()), bool(good))


def _head_rows(
    model: nn.Module, exported: ExportedModel, deployed: DeployedModel, images: Tensor
) -> Iterator[OutputAgreement]:
    """Outputs of the heads' whole graphs, for the RoI features that the fake-quantized model has."""
    modules = dict(model.named_modules())
    features = _recorded(model, exported, images[:1]).features if exported.heads else {}
    for head in exported.heads:
        place, maps = head.place, features[head.place.path]
        session, arrays = deployed.head_session(place.kind, place.stage), _head_inputs(head, maps, modules)
        outputs = session.run({name: array for name, array in arrays.items() if name in session.input_names})
        with torch.no_grad():
            wanted = modules[place.path](maps)
        if place.kind == 'mask':
            labels = torch.from_numpy(arrays['labels']) * (not modules[place.path].class_agnostic)
            wanted = (wanted[torch.arange(len(labels)), labels],)
        for name, value in zip(place.outputs, wanted):
            yield _output_row(model, f'{place.file} {name}', outputs[name], value.numpy(), 1)


def verify_glue(model: nn.Module, images: Tensor) -> GlueAgreement:
    """Compare what mmdet and the glue in NumPy make of the maps of the fake-quantized model. The quantizers of the RoI
    heads are off: RoI features differ by rounding, and a code that is a tie would differ by a step.

    Args:
        model: A detector that was exported as a whole, on any device.
        images: Normalized, (N, C, H, W).
    """
    model = copy.deepcopy(model).cpu()
    height, width = (int(side) for side in images.shape[-2:])
    # Resized to a picture a little smaller than the padded one, out of one of another size.
    shape = height - height // 16, width - width // 32
    info = ImageInfo(shape, (shape[0] // 2, shape[1] // 2), (shape[1] / (shape[1] // 2), shape[0] / (shape[0] // 2)))
    if hasattr(model, 'roi_head'):
        set_mode(model.roi_head, 'off')
    agreement = compare_glue(model, images.cpu(), [info] * len(images))
    if not agreement.detections:  # on pictures of nothing
        head = model.roi_head if hasattr(model, 'roi_head') else model.bbox_head
        head.test_cfg = copy.deepcopy(head.test_cfg)
        head.test_cfg['score_thr'] = 0.0
        if hasattr(model, 'roi_head'):
            model.rpn_head.test_cfg = copy.deepcopy(model.rpn_head.test_cfg)
            model.rpn_head.test_cfg['max_per_img'] = min(VERIFIED_ROIS, model.rpn_head.test_cfg['max_per_img'])
        agreement = compare_glue(model, images.cpu(), [info] * len(images))
    return agreement


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
        started = partial(start, runtime=runtime, threads=threads, kernels=kernels)
        layers = _layer_rows(model, exported, images, started) if known else []
        outputs = list(_output_rows(model, exported, deployed, images))
        outputs += _head_rows(model, exported, deployed, images)
        return Verification(runtime, layers, outputs, wrong_weights(model, exported), deployed.kernels, size)
