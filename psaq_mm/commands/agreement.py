# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How far a quantized model's predictions are those of full precision, picture by picture, on the same test set.

Accuracy on a few hundred pictures moves by more than two quantizers differ; agreement and the paired difference move
far less, since both models see the same pictures.
"""

import io
import json
import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
from mmengine.hooks import Hook

from psaq_mm.errors import DataError, UnsupportedModelError

__all__ = ['Agreement', 'AgreementHook', 'MIN_IOU', 'MIN_SCORE', 'Predictions', 'RecordHook', 'matched_boxes']

MIN_IOU = 0.5
"""Least intersection over union of two boxes that are one detection."""
MIN_SCORE = 0.3
"""Least score of a detection that counts, on both sides."""

_COLUMNS = 6  # x1, y1, x2, y2, score, label


def matched_boxes(found: np.ndarray, truth: np.ndarray, min_iou: float = MIN_IOU) -> int:
    """How many detections of ``found`` are one of ``truth``, each of which is matched at most once.

    Greedy: in the order of their scores, each takes the free box of its class with the largest overlap.

    Args:
        found: Shape (n, 6): x1, y1, x2, y2 in pixels, score, label.
        truth: Shape (m, 6), the same columns.
        min_iou: Least overlap.
    """
    if not len(found) or not len(truth):
        return 0
    found = found[np.argsort(-found[:, 4], kind='stable')]
    corner = np.maximum(found[:, None, :2], truth[None, :, :2])
    sides = np.clip(np.minimum(found[:, None, 2:4], truth[None, :, 2:4]) - corner, 0, None)
    common = sides[..., 0] * sides[..., 1]
    area, other = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (found, truth))
    overlap = common / np.maximum(area[:, None] + other[None] - common, 1e-9)
    overlap[found[:, None, 5] != truth[None, :, 5]] = -1.0
    matches = 0
    for row in overlap:
        best = int(row.argmax())
        if row[best] >= min_iou:
            overlap[:, best] = -1.0
            matches += 1
    return matches


# ---------------------------------------------------------------------- one picture
def _label(sample) -> int:
    if sample.pred_label.numel() != 1:
        raise UnsupportedModelError(
            'a classifier with several labels a picture has no top-1 class: compare one with a single label'
        )
    return int(sample.pred_label)


def _correct(sample) -> Optional[bool]:
    truth = sample.get('gt_label')
    return int(truth) == int(sample.pred_label) if truth is not None and truth.numel() == 1 else None


def _chances(sample) -> Optional[np.ndarray]:
    """Probabilities of the classes, (classes,), of a classifier that gives them."""
    scores = sample.get('pred_score')
    return scores.float().cpu().numpy() if scores is not None and scores.dim() == 1 else None


def _divergence(truth: np.ndarray, found: np.ndarray) -> float:
    """KL(truth || found) of two distributions over classes, in nats."""
    least = np.finfo(np.float32).tiny  # a softmax in float32 may say 0
    truth, found = (np.maximum(p.astype(np.float64), least) for p in (truth, found))
    return float((truth * np.log(truth / found)).sum())


def _map(sample) -> np.ndarray:
    labels = sample.pred_sem_seg.data.squeeze(0).cpu().numpy()
    return labels.astype(np.uint8 if labels.max(initial=0) < 256 else np.uint16)


def _boxes(sample) -> np.ndarray:
    found = sample.pred_instances
    boxes = getattr(found.bboxes, 'tensor', found.bboxes)
    kept = found.scores >= MIN_SCORE
    columns = [
        boxes[kept].float().cpu().numpy(),
        found.scores[kept, None].float().cpu().numpy(),
        found.labels[kept, None].float().cpu().numpy(),
    ]
    return np.concatenate(columns, 1).astype(np.float32)


_READERS = dict(label=('pred_label', _label), map=('pred_sem_seg', _map), boxes=('pred_instances', _boxes))


def _kind(sample) -> str:
    for kind, (field, _) in _READERS.items():
        if field in sample:
            return kind
    raise UnsupportedModelError(
        f"predictions of {', '.join(sample.keys()) or 'nothing'} cannot be compared: a classifier's "
        "label, a segmentor's map or a detector's boxes can"
    )


def _name(sample) -> str:
    """What tells pictures of a test set apart."""
    return str(next((v for key in ('img_path', 'img_id', 'sample_idx') if (v := sample.get(key)) is not None), ''))


# ---------------------------------------------------------------------- a test set
class Predictions:
    """Predictions of one model on a test set, in its order, as little of them as a comparison needs.

    A label a picture, and the probabilities of all classes where the classifier gives them, 4 bytes each; or a label
    map, compressed; or the boxes of at least :data:`MIN_SCORE`. COCO's 5000 pictures take some megabytes.
    """

    def __init__(self):
        self.kind: Optional[str] = None
        self.names: List[str] = []
        self.correct: List[Optional[bool]] = []
        self.chances: List[Optional[np.ndarray]] = []
        self._records: List[Any] = []
        self.metrics: Dict[str, float] = {}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Union[int, np.ndarray]:
        """A label, a label map (H, W) or boxes (n, 6)."""
        record = self._records[index]
        if self.kind != 'map':
            return record
        shape, kind, packed = record
        return np.frombuffer(zlib.decompress(packed), kind).reshape(shape)

    def add(self, sample) -> None:
        """Keep what the model predicted for a picture; ``sample`` is an OpenMMLab data sample."""
        self.kind = self.kind or _kind(sample)
        prediction = _READERS[self.kind][1](sample)
        self.names.append(_name(sample))
        self.correct.append(_correct(sample) if self.kind == 'label' else None)
        self.chances.append(_chances(sample) if self.kind == 'label' else None)
        if self.kind == 'map':
            prediction = (prediction.shape, prediction.dtype.str, zlib.compress(prediction.tobytes(), 6))
        self._records.append(prediction)

    def save(self, path: Union[str, os.PathLike]) -> None:
        """Write to one file, whole or not at all."""
        path = Path(path)
        partial = path.with_name(f'.{path.name}.partial')
        header = dict(kind=self.kind, names=self.names, correct=self.correct, metrics=self.metrics)
        arrays: Dict[str, np.ndarray] = {}
        if self.kind == 'label':
            arrays['labels'] = np.array(self._records, np.int64)
            if all(chances is not None for chances in self.chances):
                arrays['chances'] = np.array(self.chances, np.float32)
        elif self.kind == 'boxes':
            arrays['boxes'] = np.concatenate([np.zeros((0, _COLUMNS), np.float32), *self._records])
            arrays['counts'] = np.array([len(r) for r in self._records], np.int64)
        elif self.kind == 'map':
            header['maps'] = [[*shape, kind] for shape, kind, _ in self._records]
            arrays['packed'] = np.frombuffer(b''.join(r[2] for r in self._records), np.uint8)
            arrays['counts'] = np.array([len(r[2]) for r in self._records], np.int64)
        try:
            with open(partial, 'wb') as file:
                np.savez_compressed(file, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Union[str, os.PathLike]) -> 'Predictions':
        """Undo :meth:`save`.

        Raises:
            DataError: The file is damaged.
        """
        self = cls()
        try:
            with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as content:
                header = json.loads(content['header'].tobytes())
                self.kind, self.names, self.metrics = header['kind'], header['names'], header['metrics']
                self.correct = header['correct']
                self.chances = list(content['chances']) if 'chances' in content else [None] * len(self.names)
                if self.kind == 'label':
                    self._records = content['labels'].tolist()
                elif self.kind == 'boxes':
                    self._records = np.split(content['boxes'], np.cumsum(content['counts'])[:-1])
                elif self.kind == 'map':
                    packed, ends = content['packed'].tobytes(), np.cumsum(content['counts']).tolist()
                    self._records = [
                        ((height, width), kind, packed[begin:end])
                        for (height, width, kind), begin, end in zip(header['maps'], [0, *ends], ends)
                    ]
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f'{path} is damaged ({error}): delete it, and full precision is evaluated again') from error
        return self


class RecordHook(Hook):
    """Collects the predictions of a test run."""

    def __init__(self):
        self.predictions = Predictions()

    def after_test_iter(self, runner, batch_idx: int, data_batch=None, outputs: Optional[Sequence] = None) -> None:
        """Called by the runner after each batch."""
        for sample in outputs or ():
            self.predictions.add(sample)


class Agreement:
    """Compares predictions with those of another model, one picture at a time; none of them is kept.

    Args:
        truth: The other model's, usually full precision's, on the same test set.
    """

    def __init__(self, truth: Predictions):
        self.truth = truth
        self._same, self._of = 0.0, 0.0
        self._differences: List[int] = []
        self._divergences: List[float] = []

    def add(self, index: int, sample) -> None:
        """Compare what the model predicted for picture ``index`` of the test set; ``sample`` is an OpenMMLab data
        sample.

        Raises:
            DataError: The picture is not the one that the other model saw at this place.
        """
        truth, name = self.truth, _name(sample)
        if index >= len(truth) or truth.names[index] != name:
            expected = truth.names[index] if index < len(truth) else 'none'
            raise DataError(
                f'picture {index} of the test set is {name}, that of full precision was {expected}: the test set has '
                'to come in the same order each time, set test_dataloader.sampler.shuffle=False'
            )
        if _kind(sample) != truth.kind:
            raise DataError(
                f'predictions of kind {_kind(sample)!r} cannot be compared with {truth.kind!r}: use one config for both'
            )
        found, expected = _READERS[truth.kind][1](sample), truth[index]
        same, of = _agreed(truth.kind, found, expected, name)
        self._same, self._of = self._same + same, self._of + of
        if truth.kind == 'label' and truth.correct[index] is not None:
            self._differences.append(int(_correct(sample)) - int(truth.correct[index]))
        chances = _chances(sample)
        if truth.kind == 'label' and truth.chances[index] is not None and chances is not None:
            self._divergences.append(_divergence(truth.chances[index], chances))

    def result(self) -> Dict[str, Optional[float]]:
        """What the comparison came to.

        Returns:
            ``agreement``, 0 to 1: the share of pictures with the same top-1 class; of pixels with the same class; of a
            detector, the F1 score of its boxes with the other's as truth. None where there is nothing to compare, as
            where neither detects anything. ``difference`` and ``difference_se``, in percentage points of top-1: the
            mean over pictures of correct minus the other's correct, and its standard error; None without labels.
            ``divergence``: the mean over pictures of the Kullback-Leibler divergence of the class probabilities from
            the other's, in nats; None where no classifier gives them. It tells students apart that agree on as many
            pictures.
        """
        count = len(self._differences)
        mean = sum(self._differences) / count if count else None
        error = None
        if count > 1:
            squares = sum((d - mean) ** 2 for d in self._differences)
            error = 100 * math.sqrt(squares / (count - 1) / count)
        return dict(
            agreement=self._same / self._of if self._of else None,
            difference=None if mean is None else 100 * mean,
            difference_se=error,
            divergence=sum(self._divergences) / len(self._divergences) if self._divergences else None,
        )


class AgreementHook(Hook):
    """Compares the predictions of a test run with those of another model, as they come.

    Args:
        truth: As for :class:`Agreement`.
    """

    def __init__(self, truth: Predictions):
        self._agreement = Agreement(truth)
        self._position = 0

    def after_test_iter(self, runner, batch_idx: int, data_batch=None, outputs: Optional[Sequence] = None) -> None:
        """Called by the runner after each batch.

        Raises:
            DataError: The picture is not the one that the other model saw at this place.
        """
        for sample in outputs or ():
            self._agreement.add(self._position, sample)
            self._position += 1

    def result(self) -> Dict[str, Optional[float]]:
        """See :meth:`Agreement.result`."""
        return self._agreement.result()


def _agreed(kind: str, found, truth, name: str) -> Tuple[float, float]:
    """What is the same, out of what: sums of both over pictures give the agreement."""
    if kind == 'label':
        return float(found == truth), 1.0
    if kind == 'boxes':  # F1 = 2 matches / (detections of one + of the other)
        return 2.0 * matched_boxes(found, truth), float(len(found) + len(truth))
    if found.shape != truth.shape:
        raise DataError(
            f'the label map of {name} is {found.shape}, that of full precision {truth.shape}: use one test pipeline'
        )
    return float((found == truth).sum()), float(found.size)
