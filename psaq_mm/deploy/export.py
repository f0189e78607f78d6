# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A quantized model to a directory that ONNX Runtime and OpenVINO run as integers."""
import inspect
import io
import math
import os
import warnings
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

import psaq_mm
from psaq_mm.errors import ConfigError, UnsupportedModelError
from psaq_mm.models import TaskModel, report_of, spec_of
from psaq_mm.models.adapters.match import class_named
from psaq_mm.models.adapters.swin import SWIN_BACKBONES
from psaq_mm.models.scope import find_backbone
from psaq_mm.models.task import turns_channels

from .bundle import write_bundle
from .exportable import ExportableModel, make_exportable
from .symbols import DOMAIN

__all__ = ['ExportedModel', 'export_model', 'graph_parts', 'MIN_OPSET', 'OPSET']

MULTIPLE = 32
"""Of height and width with a dynamic size: what the last stage's patches and those that are merged before it make together."""

OPSET = 17
MIN_OPSET = 17
"""LayerNormalization came with 17."""

_DENSE_HEADS = ('rpn_head', 'decode_head', 'bbox_head', 'head')


class ExportedModel(NamedTuple):
    """What :func:`export_model` returns.

    Attributes:
        directory: Where it was written.
        manifest: As it was written, without weights and files.
        made: The exportable copy.
        graphs: :class:`.lowering.LoweredGraph` by size.
        weights: :class:`.bundle.Weight` by name.
    """
    directory: Path
    manifest: Dict[str, Any]
    made: ExportableModel
    graphs: Mapping
    weights: Mapping


class GraphParts(NamedTuple):
    """What of a model becomes the graph.

    Attributes:
        task: ``'classification'``, ``'segmentation'``, ``'detection'`` or ``'backbone'``.
        dense: Name of the head inside the graph, or None.
        with_levels: Whether feature maps are outputs.
        prefixes: Names of the model's children that the graph replaces.
    """
    task: str
    dense: Optional[str]
    with_levels: bool
    prefixes: Tuple[str, ...]


def graph_parts(model: nn.Module) -> GraphParts:
    """What of a detector, segmentor, classifier or backbone becomes the graph.

    Raises:
        UnsupportedModelError: A detector without feature maps that a graph could end at.
    """
    backbone = find_backbone(model)
    if backbone is model:
        return GraphParts('backbone', None, True, ('', ))
    if getattr(model, 'model', None) is backbone:  # timm's whole network
        return GraphParts('classification', None, False, ('model', ))
    dense = next((n for n in _DENSE_HEADS if isinstance(getattr(model, n, None), nn.Module)
                  and not isinstance(getattr(model, n), nn.ModuleList)), None)
    task = {'decode_head': 'segmentation', 'head': 'classification'}.get(dense, 'detection')
    if task == 'detection' and hasattr(model, 'encoder'):
        raise UnsupportedModelError(f'{type(model).__name__} decodes its features with attention to queries, which this export does not '
                                    'cover: export its backbone alone, export_model(model.backbone, ...)')
    prefixes = tuple(n for n in ('backbone', 'neck', dense) if n and getattr(model, n, None) is not None)
    return GraphParts(task, dense, dense in ('rpn_head', None), prefixes)


class _Graph(nn.Module):
    """The part of a model that becomes the graph; outputs are flat, and named as :attr:`names` says after a forward."""

    def __init__(self, model: nn.Module, parts: GraphParts):
        super().__init__()
        self.inner, self.parts = model, parts
        self.names: List[str] = []
        self.dense: Any = None  # the nested names of the head's outputs

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        model, parts = self.inner, self.parts
        self.names, found = [], []
        if parts.task == 'classification' and parts.dense is None:
            found, self.dense, self.names = [model.model(images)], 'logits', ['logits']
            return tuple(found)
        levels = find_backbone(model)(images)
        if parts.task != 'backbone' and getattr(model, 'neck', None) is not None:
            levels = model.neck(levels)
        levels = tuple(levels) if isinstance(levels, (tuple, list)) else (levels, )
        if parts.with_levels:
            found = list(levels)
            self.names = [f'level_{i}' for i in range(len(levels))]
        if parts.dense:
            self.dense = self._name(getattr(model, parts.dense)(levels), 'logits' if parts.task != 'detection' else 'dense', found)
        return tuple(found)

    def _name(self, value: Any, name: str, found: List[Tensor]) -> Any:
        if isinstance(value, Tensor):
            found.append(value)
            self.names.append(name)
            return name
        return [self._name(v, f'{name}_{i}', found) for i, v in enumerate(value)]


def check_sizes(model: nn.Module, sizes: Sequence[Sequence[int]]) -> List[Tuple[int, int]]:
    """Image sizes as pairs.

    Raises:
        ConfigError: One is no size, or the model takes another one alone.
    """
    found = []
    fixed = TaskModel(model).fixed_size
    for size in sizes:
        if len(size) != 2 or any(int(s) < 1 for s in size):
            raise ConfigError(f'size={tuple(size)} is no image size: give height and width in pixels')
        height, width = (int(s) for s in size)
        if fixed is not None and (height, width) != fixed:
            raise ConfigError(f'size={height} x {width} does not fit the position embedding, which takes {fixed[0]} x {fixed[1]} alone: '
                              f'export with --size {fixed[0]} {fixed[1]}')
        if (height, width) not in found:
            found.append((height, width))
    if not found:
        raise ConfigError('no image size is given to export for: give height and width')
    return found


def check_opset(opset: int) -> None:
    """Raises ConfigError where the opset is too old for the graph or too new for this PyTorch."""
    from torch.onnx import _constants
    newest = getattr(_constants, 'ONNX_TORCHSCRIPT_EXPORTER_MAX_OPSET', _constants.ONNX_MAX_OPSET)
    if opset < MIN_OPSET:
        raise ConfigError(f'opset={opset} is too old: LayerNormalization needs {MIN_OPSET}; leave --opset out, or give {MIN_OPSET} or more')
    if opset > newest:
        raise ConfigError(f'opset={opset} is newer than what PyTorch {torch.__version__} exports: leave --opset out, or give at most '
                          f'{newest}')


def check_dynamic(model: nn.Module, parts: GraphParts) -> None:
    """Raises UnsupportedModelError where a graph cannot find out its sizes when it runs."""
    backbone = find_backbone(model)
    # Without pad_small_map, mmpretrain shifts or does not as the size has it.
    if class_named(backbone, SWIN_BACKBONES) is None or not all(getattr(m, 'pad_small_map', True) for m in backbone.modules()):
        raise UnsupportedModelError(f'{type(backbone).__name__} does not export with a dynamic size, which the Swin of mmdet and mmseg '
                                    'does: give its sizes, --size H W')
    if spec_of(model).points == 'all':
        raise UnsupportedModelError('points=\'all\' does not export with a dynamic size, for which OpenVINO 2026.4 gives wrong results '
                                    '(seen: 17 % off): give the sizes, --size H W')
    if parts.task == 'classification':
        raise UnsupportedModelError(f'{type(model).__name__} takes its exact size alone: export with --size H W')


def _trace(graph: _Graph, size: Tuple[int, int], channels: int, opset: int, tracing, dynamic: bool):
    """ONNX model, and shapes of its outputs by name."""
    import onnx
    images = torch.zeros(1, channels, *size)
    tracing.begin(False)
    with torch.no_grad():
        outputs = graph(images)  # names the outputs
    shapes = {name: tuple(output.shape) for name, output in zip(graph.names, outputs)}
    tracing.begin(dynamic)
    file = io.BytesIO()
    settings: Dict[str, Any] = dict(input_names=['images'], output_names=list(graph.names), opset_version=opset,
                                    custom_opsets={DOMAIN: 1}, do_constant_folding=True)
    if dynamic:
        maps = [name for name, shape in shapes.items() if len(shape) == 4]
        settings['dynamic_axes'] = {name: {2: f'{name}_height', 3: f'{name}_width'} for name in ('images', *maps)}
    if 'dynamo' in inspect.signature(torch.onnx.export).parameters:
        settings['dynamo'] = False  # newer PyTorch has another exporter as its default, which does not know the symbols
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')  # sizes become constants: that is what is wanted, unless it is dynamic
        torch.onnx.export(graph, (images, ), file, **settings)
    return onnx.load_model_from_string(file.getvalue()), shapes


def _strides(shapes: Mapping[str, Tuple[int, ...]], size: Tuple[int, int]) -> Dict[str, int]:
    """By output that is a map, how many pixels one of its positions stands for."""
    found = {}
    for name, shape in shapes.items():
        if len(shape) == 4:
            stride = 2**round(math.log2(size[0] / shape[2]))
            if -(-size[0] // stride) == shape[2] and -(-size[1] // stride) == shape[3]:
                found[name] = stride
    return found


def _image_settings(model: nn.Module) -> Dict[str, Any]:
    spec, turned = TaskModel(model).image_spec, bool(turns_channels(model))
    # mmseg turns pictures of three channels alone, the others no picture of another number.
    return dict(channels=spec.channels, mean=list(spec.mean), std=list(spec.std), reverse_channels=turned and spec.channels == 3)


def _rest(model: nn.Module, parts: GraphParts) -> Dict[str, Any]:
    """Weights that the graph does not hold and evaluation needs."""
    if parts.task != 'detection':
        return {}
    skipped = tuple(f'{p}.' for p in (*parts.prefixes, 'data_preprocessor', 'auxiliary_head'))
    return {k: v.detach().cpu().numpy() for k, v in model.state_dict().items() if not k.startswith(skipped)}


def export_model(model: nn.Module,
                 out: Union[str, os.PathLike],
                 sizes: Sequence[Sequence[int]],
                 opset: int = OPSET,
                 classes: Optional[Sequence[str]] = None,
                 dynamic: bool = False) -> ExportedModel:
    """Export a calibrated, quantized model.

    Args:
        model: Detector, segmentor, classifier or backbone, quantized by psaq_mm. It is not changed.
        out: Directory to be written; an exported model that stands there is replaced.
        sizes: Image sizes (height, width), one graph for each.
        opset: Of ONNX, 17 or newer.
        classes: Names of the classes, for the manifest.
        dynamic: One graph for every size, worked out when it runs: images are padded to multiples of :data:`MULTIPLE`. ``sizes`` is one
            then, which the graph is traced and verified with.

    Raises:
        ConfigError: A size or the opset does not fit, or ``out`` is something else than an exported model.
        NotCalibratedError: A quantizer has no range.
        UnsupportedModelError: The model is not quantized, or of a kind that does not export.

    Example:
        >>> export_model(model, 'work_dirs/deployed', [(800, 1216), (1216, 800)])
    """
    try:
        from .lowering import WeightStore, lower
    except ImportError as error:
        raise ConfigError(f'the export needs the package onnx ({error}): pip install psaq_mm[deploy]') from error
    from .report import tensor_rows
    spec = spec_of(model)
    check_opset(opset)
    sizes = check_sizes(model, sizes)
    parts = graph_parts(model)
    if dynamic:
        check_dynamic(model, parts)
        sizes = [tuple(-(-s // MULTIPLE) * MULTIPLE for s in sizes[0])]
    made = make_exportable(model)
    graph = _Graph(made.model, parts).eval()
    image = _image_settings(model)
    store, lowered, entries, strides = WeightStore(), {}, [], {}
    for size in sizes:
        traced, shapes = _trace(graph, size, image['channels'], opset, made.tracing, dynamic)
        strides = _strides(shapes, size)
        lowered[size] = lower(traced, made, store)
        name = 'graph_dynamic.onnx' if dynamic else f'graph_{size[0]}x{size[1]}.onnx'
        entries.append(dict(size=list(size), file=name, weights=lowered[size].weights, multiple=MULTIPLE if dynamic else None))
    head = getattr(model, parts.dense, None) if parts.dense else None
    manifest = dict(
        psaq_mm=psaq_mm.__version__, task=parts.task, model=type(model).__name__, label=spec.label, quant=spec.to_dict(), opset=opset,
        **image, classes=list(classes or ()), exact_size=parts.task == 'classification', graphs=entries,
        outputs=dict(names=list(graph.names), levels=[n for n in graph.names if n.startswith('level_')], dense=graph.dense),
        dense_head=parts.dense, replaced=list(parts.prefixes), strides=strides, align_corners=bool(getattr(head, 'align_corners', False)),
        tensors=tensor_rows(lowered[sizes[0]], made, report_of(model)))
    files = {entry['file']: lowered[tuple(entry['size'])].model.SerializeToString() for entry in entries}
    directory = write_bundle(out, manifest, files, store.weights, _rest(model, parts))
    return ExportedModel(directory, manifest, made, lowered, store.weights)
