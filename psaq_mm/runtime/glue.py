# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Post-processing of a graph's outputs in NumPy: one function for each task that needs one."""

from typing import Any, Callable, Dict, Mapping, Sequence, Tuple

import numpy as np

__all__ = ['finish', 'register_finisher']

Outputs = Dict[str, np.ndarray]
Finisher = Callable[[Outputs, Mapping[str, Any], Tuple[int, int]], Outputs]

_FINISHERS: Dict[str, Finisher] = {}
"""By the name of a task, as manifests have it."""


def register_finisher(task: str) -> Callable[[Finisher], Finisher]:
    """Register the post-processing of a task.

    The function takes the outputs of the graph by name, the manifest, and the (height, width) of the images. It returns
    the outputs and what it adds to them. ``task`` is the name in manifests.

    Example:
        >>> @register_finisher('pose')
        ... def keypoints(outputs, manifest, size):
        ...     return {**outputs, 'keypoints': peaks(outputs['dense'])}
    """

    def register(finisher: Finisher) -> Finisher:
        _FINISHERS[task] = finisher
        return finisher

    return register


def finish(outputs: Outputs, manifest: Mapping[str, Any], size: Tuple[int, int]) -> Outputs:
    """Outputs of a graph for images of a (height, width), after the post-processing of the manifest's task."""
    finisher = _FINISHERS.get(manifest['task'])
    return outputs if finisher is None else finisher(outputs, manifest, size)


@register_finisher('segmentation')
def segmentation(outputs: Outputs, manifest: Mapping[str, Any], size: Tuple[int, int]) -> Outputs:
    """Adds ``labels`` (N, H, W), the class of each pixel, where the graph gives logits that have classes."""
    rule = manifest.get('labels', dict(rule='argmax'))  # exports of earlier versions have no such key
    if not rule or 'logits' not in outputs:
        return outputs
    logits = upsample(outputs['logits'], size, manifest['align_corners'])
    return {**outputs, 'labels': pixel_classes(logits, rule)}


def pixel_classes(logits: np.ndarray, rule: Mapping[str, Any]) -> np.ndarray:
    """The class of each pixel, (N, C, H, W) to (N, H, W).

    Args:
        logits: Of all classes, or of one.
        rule: ``rule='argmax'``: the class of the greatest logit. ``rule='threshold'``: 1 where the sigmoid of the only
            logit exceeds ``threshold``, else 0.
    """
    if rule['rule'] == 'argmax':
        return logits.argmax(1)
    with np.errstate(over='ignore'):
        return (1 / (1 + np.exp(-logits[:, 0])) > np.float32(rule['threshold'])).astype(np.int64)


def upsample(maps: np.ndarray, size: Sequence[int], align_corners: bool) -> np.ndarray:
    """Bilinear interpolation, (N, C, h, w) to (N, C, H, W), as PyTorch's ``interpolate``."""
    low, high, weight = _neighbours(maps.shape[2], size[0], align_corners)
    maps = maps[:, :, low] * (1 - weight)[:, None] + maps[:, :, high] * weight[:, None]
    low, high, weight = _neighbours(maps.shape[3], size[1], align_corners)
    return maps[..., low] * (1 - weight) + maps[..., high] * weight


def _neighbours(size: int, target: int, align_corners: bool) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each target position its two source positions, and the weight of the second one."""
    if align_corners:
        position = np.linspace(0, size - 1, target)
    else:
        position = np.maximum((np.arange(target) + 0.5) * size / target - 0.5, 0)
    low = np.minimum(position.astype(np.int64), size - 1)
    return low, np.minimum(low + 1, size - 1), (position - low).astype(np.float32)
