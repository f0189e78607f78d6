# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a model says of one picture."""

import dataclasses
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from psaq_mm.errors import DataError

__all__ = ['Prediction', 'class_name', 'run_lengths']


def class_name(classes: Sequence[str], label: int) -> str:
    """The name of a class, or its number where the export has no names."""
    return str(classes[label]) if 0 <= label < len(classes) else f'class {label}'


@dataclasses.dataclass(eq=False)
class Prediction:
    """What a model says of one picture. What its task does not give is None.

    Attributes:
        task: ``'detection'``, ``'segmentation'`` or ``'classification'``.
        size: (height, width) of the picture; boxes, masks and label maps are of this size.
        classes: Names of all classes; empty where the export has none.
        boxes: float32 (n, 4): x1, y1, x2, y2 in pixels, by falling score.
        scores: float32 (n,). Of a classifier: of all classes, by falling score.
        labels: int64 (n,): the class of each score.
        names: Names of ``labels``.
        masks: bool (n, H, W).
        label_map: int64 (H, W), the class of each pixel.
        logits: Of a classifier (classes,). Of a segmentor (classes, h, w), as its head gives them; of one with a
            sliding window, at the size of the resized picture.
        probabilities: Of a classifier, float32 (classes,).
        palette: A colour (red, green, blue) for each class, where the data set has one.

    Example:
        >>> prediction = model.predict('street.jpg')
        >>> cv2.imwrite('shown.jpg', prediction.draw(cv2.imread('street.jpg')))
    """

    task: str
    size: Tuple[int, int]
    classes: Sequence[str] = ()
    boxes: Optional[np.ndarray] = None
    scores: Optional[np.ndarray] = None
    labels: Optional[np.ndarray] = None
    names: Optional[List[str]] = None
    masks: Optional[np.ndarray] = None
    label_map: Optional[np.ndarray] = None
    logits: Optional[np.ndarray] = None
    probabilities: Optional[np.ndarray] = None
    palette: Optional[Sequence[Sequence[int]]] = None

    def draw(self, picture: Any, score_threshold: float = 0.3) -> np.ndarray:
        """Draw the prediction onto a copy of its picture.

        Args:
            picture: uint8 (H, W, 3), blue first, or (H, W, 1); or the path of a file.
            score_threshold: Boxes of a lower score are left out.

        Returns:
            uint8 (H, W, 3), blue first.

        Raises:
            DataError: The picture has another size than the predicted one.
            ConfigError: OpenCV is not installed.
        """
        from psaq_mm.runtime.drawing import drawn
        from psaq_mm.runtime.preparation import as_picture

        grey = getattr(picture, 'ndim', 3) == 3 and getattr(picture, 'shape', (0, 0, 3))[2] == 1
        array = as_picture(picture, 1 if grey else 3)
        if array.shape[:2] != self.size:
            raise DataError(
                f'a picture of {array.shape[0]} x {array.shape[1]} is not the predicted one, which has '
                f'{self.size[0]} x {self.size[1]}: give that one'
            )
        return drawn(self, array, score_threshold)

    def above(self, score_threshold: float) -> 'Prediction':
        """The prediction without boxes of a lower score; another task's as it is."""
        if self.boxes is None or self.scores is None:
            return self
        kept = np.flatnonzero(self.scores >= score_threshold)
        return dataclasses.replace(
            self,
            boxes=self.boxes[kept],
            scores=self.scores[kept],
            labels=None if self.labels is None else self.labels[kept],
            names=None if self.names is None else [self.names[i] for i in kept],
            masks=None if self.masks is None else self.masks[kept],
        )

    def shares(self) -> Dict[str, float]:
        """Of a segmentor: the share of pixels of each class that occurs, largest first, by its name."""
        if self.label_map is None:
            return {}
        labels, counts = np.unique(self.label_map, return_counts=True)
        order = np.argsort(-counts, kind='stable')
        return {class_name(self.classes, int(labels[i])): float(counts[i] / self.label_map.size) for i in order}

    def describe(self, count: int = 3) -> str:
        """A line with the first ``count`` classes."""
        if self.task == 'segmentation':
            parts = [f'{name} {share:.1%}' for name, share in self.shares().items()]
        else:
            parts = [
                f'{name} {score:.2f}'
                for name, score in zip(self.names or (), self.scores if self.scores is not None else ())
            ]
        more = f' and {len(parts) - count} more' if len(parts) > count and self.task != 'classification' else ''
        return (', '.join(parts[:count]) or 'nothing') + more

    def __repr__(self) -> str:
        height, width = self.size
        kind = dict(detection=f'{len(self.names or ())} boxes: ').get(self.task, '')
        return f'Prediction({self.task}, {height} x {width}, {kind}{self.describe()})'

    def to_plain(self, top: int = 5) -> Dict[str, Any]:
        """Plain values for JSON. Masks are run lengths of COCO's kind, not compressed (see :func:`run_lengths`).

        Args:
            top: Number of classes of a classifier.
        """
        plain: Dict[str, Any] = dict(task=self.task, size=list(self.size))
        if self.task == 'segmentation' and self.label_map is not None:
            plain['segments'] = [
                dict(label=int(i), name=class_name(self.classes, int(i)), mask=run_lengths(self.label_map == i))
                for i in np.unique(self.label_map)
            ]
            return plain
        count = top if self.task == 'classification' else None
        rows = zip(
            self.labels if self.labels is not None else (),
            self.names or (),
            self.scores if self.scores is not None else (),
        )
        plain['predictions'] = [dict(label=int(label), name=name, score=float(score)) for label, name, score in rows][
            :count
        ]
        for i, row in enumerate(plain['predictions']):
            if self.boxes is not None:
                row['box'] = [float(v) for v in self.boxes[i]]
            if self.masks is not None:
                row['mask'] = run_lengths(self.masks[i])
        return plain


def run_lengths(mask: np.ndarray) -> Dict[str, Any]:
    """A mask as COCO's run lengths: ``size`` (height, width), and ``counts`` of zeros and ones in turn, by columns.

    Example:
        >>> run_lengths(np.array([[0, 1], [0, 1]], bool))
        {'size': [2, 2], 'counts': [2, 2]}
    """
    flat = mask.reshape(mask.shape[0], -1).T.reshape(-1).astype(bool)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return dict(size=list(mask.shape), counts=([0] if flat.size and flat[0] else []) + counts)
