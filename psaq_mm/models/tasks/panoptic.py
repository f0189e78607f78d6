# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Panoptic segmentation: a class and an object for each pixel, by mmdet's models."""

from typing import Any, Dict, Tuple

import numpy as np
from torch import nn

from psaq_mm.errors import DataError
from psaq_mm.models.tasks.base import Compared, register_task
from psaq_mm.models.tasks.segmentation import Segmentation

__all__ = ['Panoptic', 'matched_pixels']

_OFFSET = 1000
"""mmdet's ``INSTANCE_OFFSET``: a pixel has class + 1000 * object."""


@register_task
class Panoptic(Segmentation):
    """Compared by pixels of segments that both maps have. Maps are kept as label maps are."""

    name = 'panoptic'
    heads = ()
    output = 'dense'
    field = 'pred_panoptic_seg'
    kind = 'panoptic'
    metrics = ('PQ',)

    def matches(self, model: nn.Module) -> bool:
        """See :meth:`.Task.matches`: another task runs the heads."""
        return False

    def finish_settings(self, model: nn.Module, dense: Any, shapes: Any) -> Dict:
        """See :meth:`.Task.finish_settings`: the library finishes."""
        return dict(labels=None, align_corners=False)

    def reads(self, sample: Any) -> bool:
        """See :meth:`.Task.reads`."""
        return super().reads(sample) and 'sem_seg' in sample.pred_panoptic_seg

    def read(self, sample: Any) -> np.ndarray:
        """See :meth:`.Task.read`: the panoptic map, (H, W)."""
        return sample.pred_panoptic_seg.sem_seg.squeeze(0).cpu().numpy().astype(np.int32)

    def compare(self, prediction: np.ndarray, truth: np.ndarray, picture: str) -> Compared:
        """See :meth:`.Task.compare`.

        Raises:
            DataError: The maps have several sizes.
        """
        if prediction.shape != truth.shape:
            raise DataError(
                f'the panoptic map of {picture} is {prediction.shape}, that of full precision {truth.shape}: use one '
                'test pipeline'
            )
        return Compared(float(matched_pixels(prediction, truth)), float(prediction.size))


def matched_pixels(prediction: np.ndarray, truth: np.ndarray) -> int:
    """Pixels common to a segment of each map that are one segment.

    Two segments of one class are one where their intersection over union exceeds 0.5. A segment then has at most one
    partner, whatever the numbers of its object (Kirillov et al., arXiv 1801.00868, section 4.1).

    Args:
        prediction: (H, W), class + 1000 * object.
        truth: (H, W), the same.
    """
    areas: Tuple[Dict[int, int], ...] = tuple(
        dict(zip(*(part.tolist() for part in np.unique(segments, return_counts=True))))
        for segments in (prediction, truth)
    )
    pairs, common = np.unique(np.stack([prediction.ravel(), truth.ravel()]), axis=1, return_counts=True)
    matched = 0
    for (one, other), shared in zip(pairs.T.tolist(), common.tolist()):
        union = areas[0][one] + areas[1][other] - shared
        matched += shared if one % _OFFSET == other % _OFFSET and 2 * shared > union else 0
    return matched
