# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How far a student is from full precision on drawn pictures that its calibration has not seen: an estimate of the
loss, without data and without labels.
"""

import math
import time
from typing import List, NamedTuple, Optional, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from psaq_mm.calibration import normalized_l1
from psaq_mm.models import TaskModel
from psaq_mm.models.tasks.detection import filling_samples, matched_boxes
from psaq_mm.pictures import DeadLeaves, Mixture, SampleStream, Scenes

__all__ = ['BOXES', 'Expected', 'MIN_IOU', 'expected_agreement', 'held_back']

MIN_IOU = 0.9
"""Least overlap of two boxes that are one detection: a box that moved counts as lost."""
BOXES = 10
"""Boxes of each model that are compared on a picture, those of the best scores. On drawn pictures few scores are high,
so there is no threshold beside the model's own."""
LEAST = 2
"""Pictures that are compared whatever the time."""


class Expected(NamedTuple):
    """What :func:`expected_agreement` found.

    Attributes:
        pictures: How many were compared.
        features: Error of the feature maps, see :func:`psaq_mm.calibration.normalized_l1`: 0 is equal, 1 no better than
            their mean.
        agreement: 0 to 1; None where there is nothing to compare.
        of: What agrees: ``'top-1 classes'``, ``'pixels'``, ``'boxes'``, or ``''``.
        divergence: Kullback-Leibler divergence of a classifier's probabilities from the teacher's, in nats a picture;
            None for other models.
        seconds: What it took.
        failed: Why predictions were not compared; ``''`` where they were.
    """

    pictures: int
    features: Optional[float]
    agreement: Optional[float] = None
    of: str = ''
    divergence: Optional[float] = None
    seconds: float = 0.0
    failed: str = ''

    def describe(self) -> str:
        """One sentence."""
        said = []
        if self.agreement is not None:
            said.append(f'{100 * self.agreement:.1f} % equal {self.of}')
        elif self.of:
            said.append(f'no {self.of} to compare')
        if self.divergence is not None:
            said.append(f'divergence {self.divergence:.3g} nats')
        said.append(f'error of feature maps {math.nan if self.features is None else self.features:.3f}')
        if self.failed:
            said.append(f'predictions not compared ({self.failed})')
        return f'{", ".join(said)}, on {self.pictures} drawn pictures that calibration has not seen'


def held_back(view: TaskModel, size: Tuple[int, int], seed: int) -> SampleStream:
    """Drawn pictures of numbers that no run calibrates on: scenes and dead leaves, as the method ``best`` has them.

    They are of the same kinds for every method, so that runs can be compared.

    Args:
        view: Of the model that gets them.
        size: (height, width) in pixels.
        seed: Of the run.
    """
    leaves = DeadLeaves(exponent=2.0, radius=(3.0, 0.5), color_blur=5)
    return SampleStream(Mixture([Scenes(color_blur=5), leaves], [1, 2]), size, view.image_spec, seed, 'held back')


@torch.no_grad()
def expected_agreement(
    teacher: TaskModel, student: TaskModel, stream: SampleStream, count: int, seconds: float = math.inf
) -> Expected:
    """Compare a student with its teacher, picture by picture.

    Args:
        teacher: In full precision.
        student: Calibrated, on the same device.
        stream: Gives the pictures.
        count: Pictures, 1 or more.
        seconds: Time after which no further picture is begun, but for the first :data:`LEAST`.
    """
    begun, seen = time.perf_counter(), 0
    compared, errors = _Compared(teacher, student), []
    while seen < count and (seen < LEAST or time.perf_counter() - begun < seconds):
        images = stream.take(1).to(next(student.model.parameters()).device)
        errors.append(compared.add(images))
        seen += 1
    return Expected(
        seen,
        sum(errors) / len(errors),
        compared.same / compared.out_of if compared.out_of else None,
        compared.of,
        sum(compared.divergences) / len(compared.divergences) if compared.divergences else None,
        round(time.perf_counter() - begun, 2),
        compared.failed,
    )


class _Compared:
    """Sums over pictures."""

    def __init__(self, teacher: TaskModel, student: TaskModel) -> None:
        self.kind = _kind(teacher)
        parts = tuple(part for part in teacher.parts if part != 'head' or self.kind != 'pixels')
        parts += ('head',) if self.kind == 'pixels' else ()
        self.views = [TaskModel(one.model, parts, block_stride=one.block_stride) for one in (teacher, student)]
        self.of, self.failed = self.kind, ''
        self.same = self.out_of = 0.0
        self.divergences: List[float] = []

    def add(self, images: Tensor) -> float:
        """Compare one picture; the error of its feature maps."""
        teacher, student = self.views
        with_logits = self.kind == 'top-1 classes'
        target = teacher.run(images, with_logits=with_logits)
        chosen = {} if target.chosen is None else dict(chosen=target.chosen)
        output = student.run(images, with_logits=with_logits, **chosen)
        wanted, found = list(target.parts), list(output.parts)
        if with_logits:
            self._count(output.logits.argmax(1) == target.logits.argmax(1))
            logs = [one.logits.float().log_softmax(1) for one in (output, target)]
            self.divergences.append(float(F.kl_div(*logs, reduction='batchmean', log_target=True)))
        elif self.kind == 'pixels':
            wanted_map, found_map = wanted.pop(), found.pop()
            self._count(_classes(found_map) == _classes(wanted_map))
        elif self.kind == 'boxes' and not self.failed:
            self._compare_boxes(images)
        return float(normalized_l1(found, wanted))

    def _count(self, equal: Tensor) -> None:
        self.same, self.out_of = self.same + float(equal.sum()), self.out_of + equal.numel()

    def _compare_boxes(self, images: Tensor) -> None:
        try:
            truth, found = (_boxes(view, images) for view in self.views)
        except Exception as error:  # of any detector's code: the run must not be lost for an estimate
            first = (str(error).strip().splitlines() or [''])[0]
            self.failed, self.of = f'{type(error).__name__}: {first}', ''
            return
        self.same += 2.0 * matched_boxes(found, truth, MIN_IOU)
        self.out_of += len(found) + len(truth)


def _kind(view: TaskModel) -> str:
    """What is compared beside feature maps."""
    name = view.task.name
    if name == 'classification' and view.num_classes is not None:
        settings = view.task.finish_settings(view.model, None, {})
        return '' if settings.get('several_labels') else 'top-1 classes'
    if name == 'segmentation' and view.task.dense_head(view.model) is not None:
        return 'pixels'
    return 'boxes' if view.task.field == 'pred_instances' and hasattr(view.model, 'predict') else ''


def _classes(maps: Tensor) -> Tensor:
    """The class of each pixel of logits (B, classes, H, W); of one class, whether it is there."""
    return maps.argmax(1) if maps.shape[1] > 1 else maps > 0


def _boxes(view: TaskModel, images: Tensor) -> np.ndarray:
    """The best detections in one picture, (n, 6): x1, y1, x2, y2, score, label."""
    instances = view.model.predict(images, filling_samples(images), rescale=False)[0].pred_instances
    best = instances[instances.scores.argsort(descending=True)[:BOXES]]
    boxes = getattr(best.bboxes, 'tensor', best.bboxes)
    columns = [boxes, best.scores[:, None], best.labels[:, None]]
    return np.concatenate([column.float().cpu().numpy() for column in columns], 1)
