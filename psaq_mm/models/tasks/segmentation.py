# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Semantic segmentation: a class for each pixel, by mmseg's segmentors."""

import zlib
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from torch import nn

from psaq_mm.errors import DataError
from psaq_mm.models.adapters.match import class_named
from psaq_mm.models.tasks.base import Compared, Task, register_task

__all__ = ['Segmentation']

_DEPTH = ('mmseg.models.segmentors.depth_estimator.DepthEstimator',)

Packed = Tuple[Tuple[int, int], str, bytes]
"""Shape, type and compressed bytes of a label map."""


@register_task
class Segmentation(Task):
    """Compared by pixels. Exports get their labels from :func:`psaq_mm.runtime.glue.segmentation`."""

    name = 'segmentation'
    heads = ('decode_head',)
    output = 'logits'
    exact_size = False
    field = 'pred_sem_seg'
    kind = 'map'
    metrics = ('mIoU',)

    def matches(self, model: nn.Module) -> bool:
        """See :meth:`.Task.matches`. A list of decode heads is a module too."""
        return isinstance(getattr(model, 'decode_head', None), nn.Module)

    def finish_settings(self, model: nn.Module, dense: Optional[str], shapes: Mapping[str, Tuple[int, ...]]) -> Dict:
        """See :meth:`.Task.finish_settings`: how logits become classes, as mmseg's ``postprocess_result`` has it."""
        head = getattr(model, dense) if dense else None
        settings: Dict[str, Any] = dict(labels=None, align_corners=bool(getattr(head, 'align_corners', False)))
        if 'logits' not in shapes or class_named(model, _DEPTH, 'postprocess_result'):  # depths have no classes
            return settings
        if shapes['logits'][1] > 1:
            return dict(settings, labels=dict(rule='argmax'))
        threshold = getattr(head, 'threshold', None)
        if threshold is not None:
            settings['labels'] = dict(rule='threshold', threshold=float(threshold))
        return settings

    # ------------------------------------------------------------------ predictions
    def read(self, sample: Any) -> np.ndarray:
        """See :meth:`.Task.read`: the label map, (H, W)."""
        labels = sample.pred_sem_seg.data.squeeze(0).cpu().numpy()
        return labels.astype(np.uint8 if labels.max(initial=0) < 256 else np.uint16)

    def compare(self, prediction: np.ndarray, truth: np.ndarray, picture: str) -> Compared:
        """See :meth:`.Task.compare`.

        Raises:
            DataError: The maps have several sizes.
        """
        if prediction.shape != truth.shape:
            raise DataError(
                f'the label map of {picture} is {prediction.shape}, that of full precision {truth.shape}: use one test '
                'pipeline'
            )
        return Compared(float((prediction == truth).sum()), float(prediction.size))

    def compress(self, prediction: np.ndarray) -> Packed:
        """See :meth:`.Task.compress`."""
        return prediction.shape, prediction.dtype.str, zlib.compress(prediction.tobytes(), 6)

    def decompress(self, record: Packed) -> np.ndarray:
        """See :meth:`.Task.decompress`."""
        shape, kind, packed = record
        return np.frombuffer(zlib.decompress(packed), kind).reshape(shape)

    def pack(self, records: Sequence[Packed]) -> Tuple[Dict[str, Any], Dict[str, np.ndarray]]:
        """See :meth:`.Task.pack`."""
        header = dict(maps=[[*shape, kind] for shape, kind, _ in records])
        packed = np.frombuffer(b''.join(record[2] for record in records), np.uint8)
        return header, dict(packed=packed, counts=np.array([len(record[2]) for record in records], np.int64))

    def unpack(self, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> List[Packed]:
        """See :meth:`.Task.unpack`."""
        packed, ends = arrays['packed'].tobytes(), np.cumsum(arrays['counts']).tolist()
        return [
            ((height, width), kind, packed[begin:end])
            for (height, width, kind), begin, end in zip(header['maps'], [0, *ends], ends)
        ]
