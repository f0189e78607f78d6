# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a detector does between its layers, as plain values that a manifest can hold."""

import dataclasses
import math
from typing import Any, Dict, Mapping, Optional, Tuple, Type, TypeVar

from psaq_mm.errors import ConfigError
from psaq_mm.plain import to_plain
from psaq_mm.settings import Settings, setting

__all__ = [
    'BoxCoding',
    'BoxStage',
    'DenseSettings',
    'DetectorSettings',
    'MaskStage',
    'Priors',
    'RoiAlignSettings',
    'Suppression',
]

S = TypeVar('S', bound='_Nested')


def _group(group: type, default: Any, doc: str, many: bool = False) -> Any:
    return dataclasses.field(default=default, metadata=dict(doc=doc, group=group, many=many))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _check(name: str, value: Any, known: Tuple) -> None:
    if value not in known:
        raise ConfigError(f'{name}={value!r} is not known: use one of {", ".join(map(str, known))}')


class _Nested(Settings):
    """Settings whose fields may be groups of settings themselves."""

    @classmethod
    def from_dict(cls: Type[S], given: Optional[Mapping[str, Any]] = None) -> S:
        """Settings out of plain values, groups inside included; what is left out has its default.

        Raises:
            ConfigError: A key is not known, or a value is out of range.
        """
        values = dict(given or {})
        for field in dataclasses.fields(cls):
            group, value = field.metadata.get('group'), values.get(field.name)
            if value is None:
                continue
            if group is None:
                values[field.name] = _tuples(value)
            elif field.metadata['many']:
                values[field.name] = tuple(_of(group, item) for item in value)
            else:
                values[field.name] = _of(group, value)
        return super().from_dict(values)

    def to_dict(self) -> Dict[str, Any]:
        """Plain values for JSON, groups inside included."""
        return to_plain(dataclasses.asdict(self))


def _of(group: Type[S], value: Any) -> S:
    return value if isinstance(value, group) else group.from_dict(value)


@dataclasses.dataclass(frozen=True)
class Suppression(_Nested):
    """Non-maximum suppression of boxes that have a class (or a level) each: mmcv's ``batched_nms``."""

    prefix = 'nms.'

    kind: str = setting('nms', "'nms', 'soft_nms', or 'none': boxes are sorted by their scores alone.")
    iou_threshold: float = setting(0.5, 'A box is suppressed whose overlap with a better one is larger.')
    class_agnostic: bool = setting(False, 'Whether a box suppresses boxes of other classes, too.')
    split_at: int = setting(10000, 'From this number of boxes on, classes are suppressed one after the other.')
    max_num: int = setting(-1, 'Greatest number of boxes that are kept; 0 or less: all.')
    sigma: float = setting(0.5, "Of soft suppression with method 'gaussian'.")
    min_score: float = setting(1e-3, 'Boxes whose score falls below are dropped by soft suppression.')
    method: str = setting('linear', "How soft suppression lowers scores: 'naive', 'linear' or 'gaussian'.")

    def __post_init__(self):
        _check('nms.kind', self.kind, ('nms', 'soft_nms', 'none'))
        _check('nms.method', self.method, ('naive', 'linear', 'gaussian'))


@dataclasses.dataclass(frozen=True)
class BoxCoding(_Nested):
    """How numbers of a head become a box."""

    prefix = 'coding.'

    kind: str = setting(
        'delta', "'delta': of centre and size (Faster R-CNN); 'distance': from a point to the sides (FCOS)."
    )
    means: Tuple[float, ...] = setting((0.0, 0.0, 0.0, 0.0), 'Added to deltas, after ``stds``.')
    stds: Tuple[float, ...] = setting((1.0, 1.0, 1.0, 1.0), 'Deltas are multiplied by these.')
    clip: bool = setting(True, 'Whether boxes are cut at the sides of the picture.')
    center_clamp: Optional[float] = setting(None, 'Greatest shift of a centre in pixels, on an axis (YOLOF).')
    max_ratio: float = setting(
        abs(math.log(16 / 1000)), 'Greatest logarithm of the ratio between the size of a box and that of its prior.'
    )

    def __post_init__(self):
        _check('coding.kind', self.kind, ('delta', 'distance'))


@dataclasses.dataclass(frozen=True)
class Priors(_Nested):
    """Anchors or points of each level."""

    prefix = 'priors.'

    kind: str = setting('anchors', "'anchors': boxes; 'points': one a cell.")
    strides: Tuple[Tuple[float, float], ...] = setting((), 'Width and height of a cell in pixels, of each level.')
    base_anchors: Tuple[Tuple[Tuple[float, ...], ...], ...] = setting(
        (), 'Of each level, the anchors (x1, y1, x2, y2) of its first cell.'
    )
    offset: float = setting(0.5, 'Of a point from the corner of its cell, as a share of the cell.')
    centers: bool = setting(False, 'Whether boxes are decoded from the centres of the anchors (GFL).')

    def __post_init__(self):
        _check('priors.kind', self.kind, ('anchors', 'points'))


@dataclasses.dataclass(frozen=True)
class DenseSettings(_Nested):
    """From the maps of a dense head to boxes: an RPN, or the head of a one-stage detector."""

    prefix = 'dense.'

    priors: Priors = _group(Priors, Priors(), 'Where boxes start from.')
    coding: BoxCoding = _group(BoxCoding, BoxCoding(), 'How they are decoded.')
    nms: Suppression = _group(Suppression, Suppression(), 'Which boxes are kept.')
    activation: str = setting('sigmoid', "'sigmoid', or 'softmax' with the background as the last class.")
    channels: int = setting(1, 'Scores of a prior, the background among them if there is one.')
    score_threshold: float = setting(0.0, 'Boxes of an RPN have none.')
    nms_pre: int = setting(-1, 'Greatest number of boxes of a level before suppression.')
    max_per_image: int = setting(100, 'Greatest number of boxes of a picture.')
    min_size: float = setting(-1.0, 'Smaller boxes are dropped, in pixels; negative: none.')
    reg_max: Optional[int] = setting(
        None, 'Distances are expectations over 0 to ``reg_max``, in strides (GFL); None: they are numbers.'
    )

    def __post_init__(self):
        _check('dense.activation', self.activation, ('sigmoid', 'softmax'))


@dataclasses.dataclass(frozen=True)
class RoiAlignSettings(_Nested):
    """RoI features of a pyramid: each RoI reads the level that fits its size."""

    prefix = 'align.'

    size: Tuple[int, int] = setting((7, 7), 'Bins of a RoI, (height, width).')
    strides: Tuple[float, ...] = setting((), 'Of the levels that are read.')
    channels: int = setting(256, 'Of a level.')
    sampling_ratio: int = setting(0, 'Points of a bin on an axis; 0: one a cell of the level.')
    aligned: bool = setting(True, 'Whether cells are shifted by half a pixel.')
    finest_scale: float = setting(56.0, 'RoIs of less than twice this size read the first level.')


@dataclasses.dataclass(frozen=True)
class BoxStage(_Nested):
    """A box head and what is done with its outputs."""

    prefix = 'box.'

    align: RoiAlignSettings = _group(RoiAlignSettings, RoiAlignSettings(), 'Its features.')
    coding: BoxCoding = _group(BoxCoding, BoxCoding(), 'How boxes are decoded.')
    class_agnostic: bool = setting(False, 'Whether all classes of a RoI share a box.')


@dataclasses.dataclass(frozen=True)
class MaskStage(_Nested):
    """A mask head."""

    prefix = 'mask.'

    align: RoiAlignSettings = _group(RoiAlignSettings, RoiAlignSettings(size=(14, 14)), 'Its features.')


@dataclasses.dataclass(frozen=True)
class DetectorSettings(_Nested):
    """A one-stage detector, or a two-stage one (``box`` is not empty), Cascade R-CNN with several box stages.

    Example:
        >>> settings = DetectorSettings.from_dict(manifest['detector'])
        >>> detections = detect(settings, levels, dense, heads, images)
    """

    prefix = 'detector.'

    classes: int = setting(1, 'Number of classes, without the background.')
    dense: DenseSettings = _group(DenseSettings, DenseSettings(), 'RPN, or head of a one-stage detector.')
    box: Tuple[BoxStage, ...] = _group(BoxStage, (), 'Box stages; none: a one-stage detector.', many=True)
    mask: Tuple[MaskStage, ...] = _group(MaskStage, (), 'Mask stages, whose masks are averaged.', many=True)
    score_threshold: float = setting(0.05, 'Least score of a detection of a two-stage detector, not included.')
    nms: Suppression = _group(Suppression, Suppression(), 'Of the detections of a two-stage detector.')
    max_per_image: int = setting(100, 'Greatest number of detections of a two-stage detector; 0 or less: all.')
    mask_threshold: float = setting(0.5, 'Least value of a pixel that belongs to a mask.')

    def __post_init__(self):
        if self.mask and not self.box:
            raise ConfigError('detector.mask needs detector.box: one-stage detectors have no mask head')
