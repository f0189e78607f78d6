# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Graphs of the box and mask heads of a two-stage detector: RoI features in, scores, deltas and masks out.

Features are channel-last, (N, h, w, C), as NumPy's RoIAlign makes them, and N is free. Where one layer alone reads them
and its input is quantized, the graph takes their codes, a byte each.
"""

from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.deploy import symbols
from psaq_mm.deploy.tracing import trace
from psaq_mm.models import spec_of
from psaq_mm.models.adapters.match import class_named
from psaq_mm.quantization import AffineQuantizer, is_quantized_layer
from psaq_mm.quantization.layers import quant_class_of

__all__ = [
    'BoxGraph',
    'HeadPlace',
    'MaskGraph',
    'head_places',
    'input_entry',
    'read_channels_last_',
    'trace_head',
    'why_roi_apart',
]

_ROI_HEADS = (
    'mmdet.models.roi_heads.standard_roi_head.StandardRoIHead',
    'mmdet.models.roi_heads.cascade_roi_head.CascadeRoIHead',
)
_ROI_METHODS = ('predict', 'predict_bbox', 'predict_mask', '_bbox_forward', '_mask_forward')
_BOX_HEADS = ('mmdet.models.roi_heads.bbox_heads.convfc_bbox_head.ConvFCBBoxHead',)
_MASK_HEADS = ('mmdet.models.roi_heads.mask_heads.fcn_mask_head.FCNMaskHead',)
_UPSAMPLING = (None, 'deconv', 'nearest', 'bilinear')
_TRACED_ROIS = 2
"""Number of RoIs that a graph is traced with."""


class HeadPlace(NamedTuple):
    """A head of a two-stage detector.

    Attributes:
        kind: ``'box'`` or ``'mask'``.
        stage: Of a cascade, from 0 on.
        path: Dotted name of its module.
        features: Height, width and channels of its RoI features.
    """

    kind: str
    stage: int
    path: str
    features: Tuple[int, int, int]

    @property
    def file(self) -> str:
        """Name of its graph in an export."""
        return f'{self.kind}_{self.stage}.onnx'

    @property
    def outputs(self) -> Tuple[str, ...]:
        """Names of its graph's outputs."""
        return ('scores', 'deltas') if self.kind == 'box' else ('masks',)


def head_places(model: nn.Module) -> List[HeadPlace]:
    """The box and mask heads of a model, stage by stage; none without RoI heads."""
    roi_head = getattr(model, 'roi_head', None)
    places = []
    for kind, name in (('box', 'bbox'), ('mask', 'mask')):
        heads = getattr(roi_head, f'{name}_head', None)
        if heads is None:
            continue
        many = isinstance(heads, nn.ModuleList)
        extractors = getattr(roi_head, f'{name}_roi_extractor')
        for stage in range(len(heads) if many else 1):
            extractor = extractors[stage] if isinstance(extractors, nn.ModuleList) else extractors
            height, width = extractor.roi_layers[0].output_size
            path = f'roi_head.{name}_head' + (f'.{stage}' if many else '')
            places.append(HeadPlace(kind, stage, path, (int(height), int(width), int(extractor.out_channels))))
    return places


def why_roi_apart(model: nn.Module) -> Optional[str]:
    """Why the RoI heads of a model cannot be graphs; None where they can, or there are none."""
    roi_head = getattr(model, 'roi_head', None)
    if roi_head is None:
        return None
    kind = type(roi_head).__name__
    own = next((method for method in _ROI_METHODS if class_named(roi_head, _ROI_HEADS, method) is None), None)
    if own:
        return f'the RoI head {kind} has a {own} of its own'
    if spec_of(model).points == 'all':
        # Outputs of a mask head are 15 % off in OpenVINO 2026.4 then, as they are with images of a dynamic size.
        return "points='all' has no exact kernels in OpenVINO where the number of RoIs is free"
    if getattr(roi_head, 'with_shared_head', False):
        return f'the RoI head {kind} has a {type(roi_head.shared_head).__name__} that boxes and masks share'
    for name in ('bbox_head', 'mask_head'):
        heads = getattr(roi_head, name, None)
        for head in heads if isinstance(heads, nn.ModuleList) else [heads] if heads is not None else []:
            reason = _why_box_apart(head) if name == 'bbox_head' else _why_mask_apart(head)
            if reason:
                return reason
    return None


def _why_box_apart(head: nn.Module) -> Optional[str]:
    if class_named(head, _BOX_HEADS) is None:
        return f'the box head {type(head).__name__} has a forward of its own'
    if not (head.with_cls and head.with_reg):
        return f'the box head {type(head).__name__} gives no {"deltas" if head.with_cls else "scores"}'
    return None


def _why_mask_apart(head: nn.Module) -> Optional[str]:
    kind = type(head).__name__
    if class_named(head, _MASK_HEADS) is None:
        return f'the mask head {kind} has a forward of its own'
    if head.upsample_method not in _UPSAMPLING:
        return f'the mask head {kind} upsamples with {head.upsample_method}, which ONNX does not have'
    if not _is_pointwise(head.conv_logits):
        return f'the mask head {kind} has logits that are no 1 x 1 convolution'
    return None


def _is_pointwise(layer: nn.Module) -> bool:
    plain = is_quantized_layer(layer) or quant_class_of(layer)[0] is not None  # mmcv wraps PyTorch's
    return plain and isinstance(layer, nn.Conv2d) and layer.kernel_size == layer.stride == (1, 1) and layer.groups == 1


# ---------------------------------------------------------------------- what reads the features
class _Reader(NamedTuple):
    """A layer that reads RoI features.

    Attributes:
        layer: A convolution or a linear map.
        path: Dotted name in the head.
        flat: Whether it reads them flattened.
    """

    layer: nn.Module
    path: str
    flat: bool


def _box_readers(head: nn.Module) -> List[_Reader]:
    """The layers that read the features of a box head; none where they are pooled first."""
    for branches in (('shared',), ('cls', 'reg')):
        readers = [_first_of_branch(head, branch) for branch in branches]
        if any(reader is not None for reader in readers):
            # a branch without layers ends in the prediction itself
            ends = [
                _Reader(getattr(head, f'fc_{branch}'), f'fc_{branch}', True)
                for branch in branches
                if branch != 'shared'
            ]
            found = [reader or end for reader, end in zip(readers, ends)] if ends else readers
            return [r for r in found if r is not None and not (r.flat and head.with_avg_pool)]
    return []


def _first_of_branch(head: nn.Module, branch: str) -> Optional[_Reader]:
    convs, linears = getattr(head, f'{branch}_convs'), getattr(head, f'{branch}_fcs')
    if len(convs):
        return _Reader(convs[0].conv, f'{branch}_convs.0.conv', False)
    return _Reader(linears[0], f'{branch}_fcs.0', True) if len(linears) else None


def _mask_readers(head: nn.Module) -> List[_Reader]:
    if len(head.convs):
        return [_Reader(head.convs[0].conv, 'convs.0.conv', False)]
    if head.upsample_method == 'deconv':
        return [_Reader(head.upsample, 'upsample', False)]
    return []


def feature_quantizer(place: HeadPlace, head: nn.Module) -> Optional[AffineQuantizer]:
    """The quantizer whose codes a graph takes in place of features; None where it takes float32."""
    readers = _box_readers(head) if place.kind == 'box' else _mask_readers(head)
    pooled = place.kind == 'box' and head.with_avg_pool and any(reader.flat for reader in _box_readers(head))
    if len(readers) != 1 or pooled:
        return None
    layer = readers[0].layer
    if not is_quantized_layer(layer) or layer.weight_quantizer.mode == 'off':
        return None
    quantizer = layer.input_quantizer
    return quantizer if isinstance(quantizer, AffineQuantizer) and quantizer.mode != 'off' else None


def channels_last(height: int, width: int, channels: int) -> Tensor:
    """By its place in flattened (h, w, C), the place of each feature in flattened (C, h, w)."""
    return torch.arange(channels * height * width).reshape(channels, height, width).permute(1, 2, 0).flatten()


def read_channels_last_(model: nn.Module) -> Dict[str, Tensor]:
    """Permute the columns of the linear maps that read flattened RoI features, in place, for channel-last ones.

    Returns:
        By the names of their input quantizers, the place of each column in the model.
    """
    orders: Dict[str, Tensor] = {}
    if why_roi_apart(model):
        return orders
    for place in head_places(model):
        if place.kind != 'box':
            continue
        order = channels_last(*place.features)
        for layer, path, flat in _box_readers(model.get_submodule(place.path)):
            if flat:
                with torch.no_grad():
                    layer.weight.copy_(layer.weight[:, order])
                orders[f'{place.path}.{path}.input_quantizer'] = order
    return orders


# ---------------------------------------------------------------------- graphs
class _HeadGraph(nn.Module):
    """A head whose features are channel-last.

    Args:
        head: Of an exportable copy.
        place: Of the head.
        quantizer: Name of the quantizer whose codes the features are; None: they are float32.
    """

    def __init__(self, head: nn.Module, place: HeadPlace, quantizer: Optional[str]):
        super().__init__()
        self.head, self.place, self.quantizer = head, place, quantizer

    def _features(self, features: Tensor, flat: bool) -> Tensor:
        """The features as a layer reads them: flattened, (N, h * w * C), or (N, C, h, w)."""
        if self.quantizer is None:
            return features.flatten(1) if flat else features.permute(0, 3, 1, 2)
        if flat:
            return symbols.quantized(features.flatten(1), self.quantizer)
        # OpenVINO has no integer convolution where codes are transposed before they are dequantized.
        values = symbols.values(features, self.quantizer)
        return symbols.quantized(values.permute(0, 3, 1, 2), self.quantizer)


class BoxGraph(_HeadGraph):
    """mmdet's ConvFCBBoxHead: shared layers, then a branch for scores and one for deltas."""

    def forward(self, features: Tensor) -> Tuple[Tensor, Tensor]:
        """Features (N, h, w, C), float32 or codes, to scores (N, classes [+ 1]) and deltas (N, 4 or 4 * classes)."""
        head = self.head
        flat = {path.split('.')[0].split('_')[0]: flat for _, path, flat in _box_readers(head)}
        if len(head.shared_convs) or len(head.shared_fcs):
            shared = self._features(features, flat.get('shared', False))
            for conv in head.shared_convs:
                shared = conv(shared)
            if len(head.shared_fcs):
                shared = self._linears(shared, head.shared_fcs)
            branches = {'cls': shared, 'reg': shared}
        else:
            branches = {name: self._features(features, flat[name]) for name in ('cls', 'reg')}
        scores = self._branch(branches['cls'], head.cls_convs, head.cls_fcs, head.fc_cls)
        return scores, self._branch(branches['reg'], head.reg_convs, head.reg_fcs, head.fc_reg)

    def _branch(self, x: Tensor, convs: nn.ModuleList, linears: nn.ModuleList, last: nn.Module) -> Tensor:
        for conv in convs:
            x = conv(x)
        return last(self._linears(x, linears))

    def _linears(self, x: Tensor, linears: nn.ModuleList) -> Tensor:
        if x.dim() > 2:
            x = (self.head.avg_pool(x) if self.head.with_avg_pool else x).flatten(1)
        for linear in linears:
            x = F.relu(linear(x))
        return x


class MaskGraph(_HeadGraph):
    """mmdet's FCNMaskHead, of which only the logits of each RoI's own class are computed.

    Args:
        head, place, quantizer: See :class:`_HeadGraph`.
        unshuffled: The forward of a transposed convolution before its shuffle; None: it has no such.
        logits: Name of the integer weight of the logits; None: it is float32.
        plain: Whether the logits of all classes are one convolution, of which the wanted ones are taken.
    """

    def __init__(
        self,
        head: nn.Module,
        place: HeadPlace,
        quantizer: Optional[str],
        unshuffled: Optional[Callable[[Tensor], Tensor]] = None,
        logits: Optional[str] = None,
        plain: bool = False,
    ):
        super().__init__(head, place, quantizer)
        self.unshuffled, self.logits, self.plain = unshuffled, logits, plain

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Features (N, h, w, C), float32 or codes, and labels int64 (N,) to masks (N, H, W)."""
        x, side = self._features(features, False), 1
        for conv in self.head.convs:
            x = conv(x)
        if self.head.upsample is not None:
            if self.unshuffled is None:
                x = self.head.upsample(x)
            else:
                # The shuffle comes after the product of the logits, where it moves one channel.
                x, side = self.unshuffled(x), int(self.head.upsample.stride[0])
            x = F.relu(x) if self.head.upsample_method == 'deconv' else x
        if self.head.class_agnostic:
            labels = torch.zeros_like(labels)
        if self.plain:
            x = self.head.conv_logits(x)
            return x.gather(1, labels[:, None, None, None].expand(-1, 1, *(int(s) for s in x.shape[2:])))[:, 0]
        return self._logits(x, side, labels)

    def _logits(self, x: Tensor, side: int, labels: Tensor) -> Tensor:
        layer = self.head.conv_logits
        height, width, channels = int(x.shape[2]), int(x.shape[3]), int(layer.in_channels)
        if is_quantized_layer(layer):
            x = layer.input_quantizer(x)
        if self.logits is not None:
            rows = symbols.weight_rows(labels, self.logits, channels)
        else:
            rows = layer.weight.detach().flatten(1)[labels]
        out = torch.matmul(rows[:, None], x.reshape(-1, channels, side * side * height * width))
        if layer.bias is not None:
            out = out + layer.bias.detach()[labels][:, None, None]
        out = out.reshape(-1, side * side, height, width)
        return (F.pixel_shuffle(out, side) if side > 1 else out)[:, 0]


def head_graph(exportable: Any, place: HeadPlace) -> _HeadGraph:
    """The graph of a head of an :class:`.exportable.ExportableModel`."""
    head = exportable.model.get_submodule(place.path)
    plain = exportable.target == 'tensorrt'  # which reads codes, and rows of codes, nowhere but between Q and DQ
    quantizer = None if plain else feature_quantizer(place, head)
    name = None if quantizer is None else exportable.names[quantizer]
    if place.kind == 'box':
        return BoxGraph(head, place, name).eval()
    if plain:
        return MaskGraph(head, place, None, plain=True).eval()
    logits = f'{place.path}.conv_logits'
    logits_weight = logits if logits in exportable.weights else None
    return MaskGraph(head, place, name, exportable.unshuffled.get(f'{place.path}.upsample'), logits_weight).eval()


def trace_head(exportable: Any, place: HeadPlace, opset: int) -> Any:
    """Trace a head of an :class:`.exportable.ExportableModel`; the ONNX model with its symbols."""
    graph = head_graph(exportable, place)
    codes = None if graph.quantizer is None else exportable.quantizers[graph.quantizer]
    exportable.tracing.begin(False)
    if getattr(graph, 'unshuffled', None) is not None:
        side = int(graph.head.upsample.stride[0])
        exportable.tracing.layouts[f'{place.path}.conv_logits.input_quantizer'] = lambda x: F.pixel_unshuffle(x, side)
    kind = torch.float32 if codes is None else torch.int8 if codes.low < 0 else torch.uint8
    inputs = dict(features=torch.zeros(_TRACED_ROIS, *place.features, dtype=kind))
    if place.kind == 'mask':
        inputs['labels'] = torch.zeros(_TRACED_ROIS, dtype=torch.int64)
    dynamic: Mapping[str, Mapping[int, str]] = {name: {0: 'rois'} for name in (*inputs, *place.outputs)}
    has_symbols = any(name.startswith(f'{place.path}.') for name in (*exportable.quantizers, *exportable.weights))
    return trace(graph, inputs, place.outputs, opset, dynamic, has_symbols)


def input_entry(exportable: Any, place: HeadPlace) -> Dict[str, Any]:
    """What a manifest says of the features of a head."""
    quantizer = head_graph(exportable, place).quantizer
    if quantizer is None:
        return dict(name='features', quantizer=None)
    codes = exportable.quantizers[quantizer]
    settings = dict(scale=codes.scale, zero_point=codes.zero_point, low=codes.low, high=codes.high)
    return dict(name='features', quantizer=dict(settings, dtype='int8' if codes.low < 0 else 'uint8'))
