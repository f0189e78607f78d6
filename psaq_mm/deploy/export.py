# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Export of a quantized model: a directory that a runtime executes with integers."""

import math
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

import psaq_mm
from psaq_mm.deploy.detectors import detector_settings, why_not_covered
from psaq_mm.deploy.exportable import ExportableModel, make_exportable
from psaq_mm.deploy.heads import HeadPlace, head_places, input_entry, trace_head, why_roi_apart
from psaq_mm.deploy.parts import GraphParts, NotInGraph, graph_parts, narrower, rest_state, with_task_of_outputs
from psaq_mm.deploy.tracing import state_shapes_, trace
from psaq_mm.errors import ConfigError, UnsupportedModelError
from psaq_mm.models import TaskModel, report_of, spec_of
from psaq_mm.models.adapters import backbone_of
from psaq_mm.models.network import find_backbone, network_of
from psaq_mm.models.task import reads_rgb
from psaq_mm.models.tasks import task_of
from psaq_mm.plain import to_plain
from psaq_mm.progress import stage, track
from psaq_mm.runtime.bundle import write_bundle

__all__ = ['ExportedModel', 'GraphModel', 'export_model', 'graph_parts', 'MIN_OPSET', 'OPSET']

MULTIPLE = 32
"""Height and width are multiples of it with a dynamic size: the side of the last stage's patches in pixels."""

OPSET = 17
MIN_OPSET = 17
"""The first with LayerNormalization."""


class ExportedModel(NamedTuple):
    """What :func:`export_model` returns.

    Attributes:
        directory: Where it was written.
        manifest: As it was written, without weights and files.
        exportable: The copy that was traced.
        graphs: :class:`.lowering.LoweredGraph` by size.
        weights: :class:`.bundle.Weight` by name.
        parts: What of the model is in the graphs.
        heads: Graphs of box and mask heads; none where the library runs them.
    """

    directory: Path
    manifest: Dict[str, Any]
    exportable: ExportableModel
    graphs: Mapping
    weights: Mapping
    parts: GraphParts
    heads: Sequence['HeadExport'] = ()


class GraphModel(nn.Module):
    """The part of a model that becomes the graph.

    Args:
        model: Quantized model, or an exportable copy of it.
        parts: What of it is in the graph.

    Attributes:
        names: Names of the outputs of the last forward, which are flat.
        levels: The same names, nested as the feature maps are; None without feature maps.
        dense: The same names, nested as the outputs of the dense head; None without a head.
    """

    def __init__(self, model: nn.Module, parts: GraphParts):
        super().__init__()
        self.inner, self.parts = model, parts
        self.names: List[str] = []
        self.levels: Any = None
        self.dense: Any = None

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Normalized images (N, C, H, W) to the outputs of the graph."""
        model, parts = self.inner, self.parts
        outputs: List[Tensor] = []
        self.names, self.levels, self.dense = [], None, None
        if parts.whole:
            network = task_of(model).whole_output(model) or model.model
            self.dense = self._name(network(images), 'logits', outputs)
            return tuple(outputs)
        levels = find_backbone(model)(images)
        if 'neck' in parts.prefixes:
            levels = model.neck(levels)
        if parts.with_levels:
            maps = [level.permute(0, 2, 3, 1) for level in levels] if parts.channel_last else levels
            self.levels = self._name(maps, 'level_0' if isinstance(levels, Tensor) else 'level', outputs)
            if parts.dense and not isinstance(levels, (tuple, list)):
                raise NotInGraph(f'it reads a {type(levels).__name__} that other parts read too')
        if parts.dense:
            self._run_head(getattr(model, parts.dense), levels, outputs)
        return tuple(outputs)

    def _run_head(self, head: nn.Module, levels: Any, outputs: List[Tensor]) -> None:
        before = dict(vars(head))
        dense = head(levels)
        kept = [name for name, value in vars(head).items() if before.get(name, before) is not value]
        if kept:
            raise NotInGraph(f'{type(head).__name__} keeps {kept[0]} from its forward for later')
        self.dense = self._name(dense, self.parts.output, outputs)

    def _name(self, value: Any, name: str, outputs: List[Tensor]) -> Any:
        """Add the tensors of a nested value to ``outputs``; ``value`` with names in their place."""
        if isinstance(value, Tensor):
            outputs.append(value)
            self.names.append(name)
            return name
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {key: self._name(v, f'{name}_{key}', outputs) for key, v in value.items()}
        if isinstance(value, (tuple, list)):
            return [self._name(v, f'{name}_{i}', outputs) for i, v in enumerate(value)]
        if value is None:
            return None
        raise NotInGraph(f'its outputs hold a {type(value).__name__}, which is no tensor')


def check_sizes(model: nn.Module, sizes: Sequence[Sequence[int]]) -> List[Tuple[int, int]]:
    """Image sizes as pairs, each once.

    Raises:
        ConfigError: One is no size, or the model takes only another one.
    """
    pairs: List[Tuple[int, int]] = []
    fixed = TaskModel(model).fixed_size
    for size in sizes:
        if len(size) != 2 or any(int(s) < 1 for s in size):
            raise ConfigError(f'size={tuple(size)} is no image size: give height and width in pixels')
        height, width = (int(s) for s in size)
        if fixed is not None and (height, width) != fixed:
            raise ConfigError(
                f'size={height} x {width} does not fit the position embedding, which takes {fixed[0]} x {fixed[1]} '
                f'alone: export with --size {fixed[0]} {fixed[1]}'
            )
        if (height, width) not in pairs:
            pairs.append((height, width))
    if not pairs:
        raise ConfigError('no image size is given to export for: give height and width')
    return pairs


def check_opset(opset: int) -> None:
    """Raises ConfigError where the opset is too old for the graph or too new for this PyTorch."""
    from torch.onnx import _constants

    newest = getattr(_constants, 'ONNX_TORCHSCRIPT_EXPORTER_MAX_OPSET', _constants.ONNX_MAX_OPSET)
    if opset < MIN_OPSET:
        raise ConfigError(
            f'opset={opset} is too old: LayerNormalization needs {MIN_OPSET}; leave --opset out, or give {MIN_OPSET} '
            f'or more'
        )
    if opset > newest:
        raise ConfigError(
            f'opset={opset} is newer than what PyTorch {torch.__version__} exports: leave --opset out, or give at most '
            f'{newest}'
        )


def check_dynamic(model: nn.Module, parts: GraphParts) -> None:
    """Raises UnsupportedModelError where a model cannot be exported with a dynamic size."""
    backbone = find_backbone(model)
    description = backbone_of(network_of(backbone))
    if description is None or not description.dynamic_size(backbone):
        raise UnsupportedModelError(
            f'{type(backbone).__name__} does not export with a dynamic size in this form: give its sizes, --size H W'
        )
    if spec_of(model).points == 'all':
        raise UnsupportedModelError(
            "points='all' does not export with a dynamic size, for which OpenVINO 2026.4 gives wrong results "
            '(seen: 17 % off): give the sizes, --size H W'
        )
    if parts.exact_size:
        raise UnsupportedModelError(f'{type(model).__name__} takes its exact size alone: export with --size H W')


def _trace(graph: GraphModel, size: Tuple[int, int], channels: int, opset: int, tracing, dynamic: bool):
    """Trace a graph.

    Returns:
        ONNX model, and the shapes of its outputs by name.
    """
    images = torch.zeros(1, channels, *size)
    tracing.begin(False)
    with torch.no_grad():
        outputs = graph(images)  # names the outputs
    shapes = {name: tuple(output.shape) for name, output in zip(graph.names, outputs)}
    tracing.begin(dynamic)
    axes: Dict[str, Dict[int, str]] = {}
    if dynamic:
        maps = [name for name, shape in shapes.items() if len(shape) == 4]
        first = {name: _height_axis(graph.parts, name) for name in ('images', *maps)}
        axes = {name: {axis: f'{name}_height', axis + 1: f'{name}_width'} for name, axis in first.items()}
    model = trace(graph, dict(images=images), graph.names, opset, axes)
    state_shapes_(model, shapes, axes)
    return model, shapes


def _trace_widest(exportable: ExportableModel, parts: GraphParts, size: Tuple[int, int], **settings):
    """Trace the widest graph of a model that can be traced.

    Returns:
        Its :class:`GraphModel`, and what :func:`_trace` returns.

    Raises:
        UnsupportedModelError: Not even the backbone can be traced.
    """
    while True:
        graph = GraphModel(exportable.model, parts).eval()
        try:
            traced, shapes = _trace(graph, size, tracing=exportable.tracing, **settings)
        except NotInGraph as error:
            remaining = narrower(parts, str(error))
            if remaining is None:
                what = type(find_backbone(exportable.model)).__name__
                raise UnsupportedModelError(
                    f'the backbone {what} does not export ({error}): build it without that, or keep the model in '
                    'PyTorch'
                ) from error
            parts = remaining
            continue
        known = with_task_of_outputs(parts, [len(shape) for shape in shapes.values()])
        if known == parts:
            return graph, traced, shapes
        parts = known


def _height_axis(parts: GraphParts, name: str) -> int:
    """The axis of the height of a map; that of the width follows."""
    return 1 if parts.channel_last and name.startswith('level_') else 2


def _strides(shapes: Mapping[str, Tuple[int, ...]], size: Tuple[int, int], parts: GraphParts) -> Dict[str, int]:
    """Number of pixels that one position stands for, by output that is a map."""
    strides = {}
    for name, shape in shapes.items():
        if len(shape) == 4:
            axis = _height_axis(parts, name)
            height, width = shape[axis : axis + 2]
            stride = 2 ** round(math.log2(size[0] / height))
            if -(-size[0] // stride) == height and -(-size[1] // stride) == width:
                strides[name] = stride
    return strides


def _image_settings(model: nn.Module) -> Dict[str, Any]:
    spec = TaskModel(model).image_spec
    # mmseg turns pictures of three channels alone, the others no picture of another number.
    return dict(
        channels=spec.channels,
        mean=list(spec.mean),
        std=list(spec.std),
        reverse_channels=reads_rgb(model) and spec.channels == 3,
    )


def _interface(model: nn.Module, graph: GraphModel, parts: GraphParts) -> Dict[str, Any]:
    """What the manifest says of the model and the graph's outputs."""
    outputs = dict(
        names=list(graph.names),
        levels=[n for n in graph.names if n.startswith('level_')],
        channel_last=[n for n in graph.names if n.startswith('level_')] if parts.channel_last else [],
        features=graph.levels,
        dense=graph.dense,
    )
    return dict(
        task=parts.task,
        model=type(model).__name__,
        exact_size=parts.exact_size,
        outputs=outputs,
        dense_head=parts.dense,
        replaced=list(parts.prefixes),
    )


def _rows(graphs: Sequence, exportable: ExportableModel, report, parts: GraphParts) -> List[Dict[str, Any]]:
    """Rows of the report: without weights outside of the graphs, and with a row for each part that runs in PyTorch."""
    from psaq_mm.deploy.report import tensor_rows

    inside = tuple(f'{p}.' if p else '' for p in parts.prefixes)
    rows: Dict[Tuple, Dict[str, Any]] = {}  # what several graphs hold has one
    for graph in graphs:
        for row in tensor_rows(graph, exportable, report):
            if row['kind'] != 'weight' or row['name'].startswith(inside):
                rows.setdefault(tuple(row.items()), row)
    return list(rows.values()) + [
        dict(name=name, kind='part', type='float32', reason=f'runs in PyTorch: {reason}')
        for name, reason in parts.outside.items()
    ]


class HeadExport(NamedTuple):
    """A box or mask head in an export.

    Attributes:
        place: Which one.
        graph: Its :class:`.lowering.LoweredGraph`.
        entry: Its entry in the manifest.
    """

    place: HeadPlace
    graph: Any
    entry: Dict[str, Any]


def _export_heads(model: nn.Module, exportable: ExportableModel, store: Any, opset: int) -> List[HeadExport]:
    from psaq_mm.deploy.lowering import lower

    heads = []
    for place in track(head_places(model), 'Tracing heads'):
        graph = lower(trace_head(exportable, place, opset), exportable, store)
        outputs = {name: name for name in place.outputs}
        entry = dict(file=place.file, weights=graph.weights, input=input_entry(exportable, place), outputs=outputs)
        heads.append(HeadExport(place, graph, entry))
    return heads


class _Detector(NamedTuple):
    """How the boxes of a detector are decoded.

    Attributes:
        settings: What the glue between the graphs needs; None: the library decodes them.
        reason: Then, why.
        part: The part that the library runs then.
    """

    settings: Optional[Dict[str, Any]]
    reason: Optional[str]
    part: str

    def parts(self, parts: GraphParts) -> GraphParts:
        """The parts of a graph: with the RoI heads, which have graphs too, or with the reason why not."""
        if parts.dense is None or parts.task != 'detection':
            return parts
        if self.settings is None:
            return parts._replace(outside={**parts.outside, self.part: self.reason or ''})
        return parts._replace(prefixes=(*parts.prefixes, self.part)) if self.part == 'roi_head' else parts


def _detector(model: nn.Module) -> _Detector:
    part = 'roi_head' if getattr(model, 'roi_head', None) is not None else 'decoding of boxes'
    reason = why_not_covered(model) or why_roi_apart(model)
    return _Detector(None if reason else detector_settings(model), reason, part)


def _is_complete(parts: GraphParts, detector: Optional[Mapping]) -> bool:
    """Whether an export gives final predictions without the library."""
    whole = parts.dense is not None or parts.whole  # without a cascade of decode heads, for one
    return detector is not None or parts.task in ('classification', 'segmentation') and whole and not parts.outside


@stage('Export')
def export_model(
    model: nn.Module,
    out: Union[str, os.PathLike],
    sizes: Sequence[Sequence[int]],
    opset: int = OPSET,
    classes: Optional[Sequence[str]] = None,
    dynamic: bool = False,
    preparation: Optional[Mapping[str, Any]] = None,
    one_file: bool = True,
) -> ExportedModel:
    """Export a calibrated, quantized model.

    Args:
        model: Detector, segmentor, classifier or backbone, quantized by psaq_mm. It is not changed.
        out: Directory to be written; an exported model that is there already is replaced.
        sizes: Image sizes (height, width), one graph for each.
        opset: Of ONNX, 17 or newer.
        classes: Names of the classes, for the manifest.
        dynamic: One graph for every size: images are padded to multiples of :data:`MULTIPLE`. ``sizes`` is then the one
            size that the graph is traced and verified with.
        preparation: Of test pictures, for the manifest: ``pipeline``, ``pad_divisor`` and ``slide`` of
            :class:`psaq_mm.engine.pipelines.PipelineSteps`, and ``palette``. Defaults to None: pictures are taken as
            they come.
        one_file: Refuse a graph that is too large for one ONNX file, as runtimes here start it. Such a one is only good
            for :func:`.plain_onnx.write_plain_onnx`.

    Raises:
        ConfigError: A size or the opset does not fit, or ``out`` exists and is no exported model.
        NotCalibratedError: A quantizer has no range.
        UnsupportedModelError: The model is not quantized, or of a kind that does not export.

    Example:
        >>> export_model(model, 'work_dirs/deployed', [(800, 1216), (1216, 800)])
    """
    try:
        from psaq_mm.deploy.lowering import WeightStore
        from psaq_mm.deploy.tensorrt import check_tensorrt
    except ImportError as error:
        raise ConfigError(f'the export needs the package onnx ({error}): pip install psaq_mm[deploy]') from error
    spec = spec_of(model)
    check_opset(opset)
    sizes = check_sizes(model, sizes)
    parts = graph_parts(model)
    if dynamic:
        check_dynamic(model, parts)
        sizes = [tuple(-(-s // MULTIPLE) * MULTIPLE for s in sizes[0])]
    decoding = _detector(model) if parts.task == 'detection' else None
    if decoding is not None and decoding.settings is not None and parts.dense:
        parts = parts._replace(channel_last=decoding.part == 'roi_head')
    exportable, store = make_exportable(model, spec.target), WeightStore()
    image = _image_settings(model)
    dense = _dense_graphs(exportable, parts, sizes, store, channels=image['channels'], opset=opset, dynamic=dynamic)
    parts = dense.graph.parts if decoding is None else decoding.parts(dense.graph.parts)
    detector = decoding.settings if decoding is not None and dense.graph.parts.dense else None
    heads = [] if detector is None else _export_heads(model, exportable, store, opset)
    if spec.target == 'tensorrt':
        check_tensorrt([g.model for g in (*dense.lowered.values(), *(head.graph for head in heads))], store.weights)
    graphs = [dense.lowered[sizes[0]], *(head.graph for head in heads)]
    manifest = dict(
        psaq_mm=psaq_mm.__version__,
        label=spec.label,
        quant=spec.to_dict(),
        opset=opset,
        classes=list(classes or ()),
        **to_plain(dict(preparation or {})),
        graphs=dense.entries,
        heads={kind: [h.entry for h in heads if h.place.kind == kind] for kind in ('box', 'mask')} if heads else None,
        detector=detector,
        complete=_is_complete(parts, detector),
        strides=dense.strides,
        tensors=_rows(graphs, exportable, report_of(model), parts),
        **image,
        **_interface(model, dense.graph, parts),
        **task_of(model).finish_settings(model, dense.graph.parts.dense, dense.shapes),
    )
    files = {entry['file']: dense.lowered[tuple(entry['size'])].model.SerializeToString() for entry in dense.entries}
    files.update({head.place.file: head.graph.model.SerializeToString() for head in heads})
    rest = {} if manifest['complete'] else rest_state(model, parts.prefixes)
    arrays = {name: value.detach().cpu().numpy() for name, value in rest.items()}
    directory = write_bundle(out, manifest, files, store.weights, arrays, one_file)
    return ExportedModel(directory, manifest, exportable, dense.lowered, store.weights, parts, heads)


class _Dense(NamedTuple):
    """The dense graphs of an export.

    Attributes:
        graph: Traced.
        lowered: By size.
        entries: Of the manifest.
        strides: See :func:`_strides`.
        shapes: Of the outputs, at the first size.
    """

    graph: GraphModel
    lowered: Dict[Tuple[int, int], Any]
    entries: List[Dict[str, Any]]
    strides: Dict[str, int]
    shapes: Mapping[str, Tuple[int, ...]]


def _dense_graphs(
    exportable: ExportableModel, parts: GraphParts, sizes: Sequence[Tuple[int, int]], store: Any, **tracing: Any
) -> _Dense:
    from psaq_mm.deploy.lowering import lower

    graph, traced, shapes = _trace_widest(exportable, parts, sizes[0], **tracing)
    first, strides, lowered, entries = shapes, {}, {}, []
    for size in track(sizes, 'Lowering graphs'):
        if size != sizes[0]:
            traced, shapes = _trace(graph, size, tracing=exportable.tracing, **tracing)
        strides = _strides(shapes, size, graph.parts)
        lowered[size] = lower(traced, exportable, store)
        name = 'graph_dynamic.onnx' if tracing['dynamic'] else f'graph_{size[0]}x{size[1]}.onnx'
        multiple = MULTIPLE if tracing['dynamic'] else None
        entries.append(dict(size=list(size), file=name, weights=lowered[size].weights, multiple=multiple))
    return _Dense(graph, lowered, entries, strides, first)
