# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Post-processing of a graph's outputs in NumPy: one function for each task that needs one."""

from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import numpy as np

__all__ = ['finish', 'label_map', 'register_finisher', 'slide', 'windows']

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


# ---------------------------------------------------------------------- pictures of any size
def label_map(
    logits: np.ndarray, sizes: Sequence[Sequence[int]], align_corners: bool, rule: Mapping[str, Any]
) -> np.ndarray:
    """The class of each pixel after several interpolations in turn, as mmseg's ``predict_by_feat`` and
    ``postprocess_result`` make them.

    Interpolation is linear in each axis, so all of them together are one matrix for rows and one for columns. Classes
    are interpolated one by one: a map of all of them at a picture's size would fill gigabytes.

    Args:
        logits: float32 (C, h, w).
        sizes: Pairs (height, width): interpolated to, then cut to, and so on, in turn. A size to cut to follows each
            one but the last.
        align_corners: Of PyTorch's ``interpolate``.
        rule: See :func:`pixel_classes`.

    Returns:
        int64 (H, W).
    """
    rows, columns = (
        _resampling(logits.shape[1 + axis], [size[axis] for size in sizes], align_corners) for axis in (0, 1)
    )

    def interpolated(plane: np.ndarray) -> np.ndarray:
        return rows @ plane @ columns.T

    best = interpolated(logits[0])
    if rule['rule'] != 'argmax':
        return pixel_classes(best[None, None], rule)[0]
    labels = np.zeros(best.shape, np.int64)
    for number, plane in enumerate(logits[1:], start=1):
        plane = interpolated(plane)
        greater = plane > best
        labels[greater] = number
        np.maximum(best, plane, out=best)
    return labels


def _resampling(size: int, targets: Sequence[int], align_corners: bool) -> np.ndarray:
    """float32 (last of ``targets``, size): the interpolations of one axis as a matrix. See :func:`label_map`."""
    matrix = np.eye(size, dtype=np.float32)
    for number, target in enumerate(targets):
        if number % 2:
            matrix = matrix[:target]
        elif len(matrix) != target:
            low, high, weight = _neighbours(len(matrix), target, align_corners)
            matrix = matrix[low] * (1 - weight)[:, None] + matrix[high] * weight[:, None]
    return matrix


def windows(size: Tuple[int, int], crop: Sequence[int], stride: Sequence[int]) -> List[Tuple[int, int, int, int]]:
    """Windows (top, left, bottom, right) over a picture, as mmseg's ``slide_inference`` places them."""
    spans = []
    for length, side, step in zip(size, crop, stride):
        count = max(length - side + step - 1, 0) // step + 1
        ends = [min(number * step + side, length) for number in range(count)]
        spans.append([(max(end - side, 0), end) for end in ends])
    return [(top, left, bottom, right) for top, bottom in spans[0] for left, right in spans[1]]


def slide(
    run: Callable[[np.ndarray], np.ndarray], image: np.ndarray, settings: Mapping[str, Any], align_corners: bool
) -> np.ndarray:
    """Logits of a picture as the mean of those of its windows, mmseg's ``slide_inference``.

    Args:
        run: From a window (1, C, h, w) to logits (1, classes, ...) of any resolution.
        image: Normalized, (1, C, H, W).
        settings: ``crop_size`` and ``stride``, (height, width) each.
        align_corners: Of PyTorch's ``interpolate``.

    Returns:
        float32 (1, classes, H, W).
    """
    size = image.shape[2], image.shape[3]
    total, count = np.zeros(0, np.float32), np.zeros(size, np.float32)
    for top, left, bottom, right in windows(size, settings['crop_size'], settings['stride']):
        logits = run(image[:, :, top:bottom, left:right])
        if not total.size:
            total = np.zeros((1, logits.shape[1], *size), np.float32)
        total[:, :, top:bottom, left:right] += upsample(logits, (bottom - top, right - left), align_corners)
        count[top:bottom, left:right] += 1
    return total / count
