# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Box and mask heads of an exported detector in a runtime. RoI features are quantized here, once, and handed over as
codes of a byte each.
"""

from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import numpy as np

from psaq_mm.runtime.registry import Runtime

__all__ = ['HeadSessions', 'quantize_features']

_BLOCK = 1 << 15
"""Elements that are quantized at a time: they stay in the processor's cache from one operation to the next."""


def quantize_features(features: np.ndarray, quantizer: Optional[Mapping[str, Any]]) -> np.ndarray:
    """RoI features as a head's graph takes them.

    Args:
        features: float32, of any shape.
        quantizer: ``scale``, ``zero_point``, ``low``, ``high`` and ``dtype`` of the manifest; None: they stay float32.

    Returns:
        ``clip(rint(x / scale) + zero_point, low, high)``, computed in float32, as ``dtype``.
    """
    if quantizer is None:
        return np.ascontiguousarray(features, np.float32)
    features = np.ascontiguousarray(features, np.float32)
    codes = np.empty(features.shape, quantizer['dtype'])
    flat, out = features.reshape(-1), codes.reshape(-1)
    scale, zero_point, low, high = (np.float32(quantizer[key]) for key in ('scale', 'zero_point', 'low', 'high'))
    buffer = np.empty(min(_BLOCK, flat.size), np.float32)
    for start in range(0, flat.size, _BLOCK):
        part = flat[start : start + _BLOCK]
        values = buffer[: part.size]
        np.divide(part, scale, out=values)
        np.rint(values, out=values)
        if zero_point:
            values += zero_point
        np.maximum(values, low, out=values)
        np.minimum(values, high, out=values)
        out[start : start + _BLOCK] = values
    return codes


class HeadSessions:
    """The heads that :func:`psaq_mm.runtime.detection.detect` calls. A graph is started when it is first called.

    Args:
        entries: ``heads`` of the manifest.
        session: The session of an entry's graph.
    """

    def __init__(self, entries: Mapping[str, Any], session: Callable[[Mapping[str, Any]], Runtime]):
        self.entries, self._session = entries, session

    def box(self, stage: int, features: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """RoI features float32 (N, h, w, C) to class logits (N, classes + 1) and deltas (N, 4 or 4 * classes)."""
        outputs = self._run(self.entries['box'][stage], features)
        return outputs['scores'], outputs['deltas']

    def mask(self, stage: int, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """RoI features float32 (N, h, w, C) and classes int64 (N,) to logits (N, H, W) of each one's class."""
        return self._run(self.entries['mask'][stage], features, dict(labels=labels.astype(np.int64)))['masks']

    def _run(
        self, entry: Mapping[str, Any], features: np.ndarray, others: Mapping[str, np.ndarray] = {}
    ) -> Dict[str, np.ndarray]:
        codes = quantize_features(features, entry['input'].get('quantizer'))
        session = self._session(entry)
        inputs = {entry['input']['name']: codes, **others}
        return session.run({name: value for name, value in inputs.items() if name in session.input_names})
