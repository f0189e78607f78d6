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
from typing import Any, Dict, List, Optional, Sequence, Union

import numpy as np
from mmengine.hooks import Hook

from psaq_mm.errors import DataError
from psaq_mm.files import whole_file
from psaq_mm.models.tasks import TASKS, Task, task_predicting

__all__ = ['Agreement', 'AgreementHook', 'Predictions', 'RecordHook']


def _name(sample: Any) -> str:
    """What tells pictures of a test set apart."""
    return str(next((v for key in ('img_path', 'img_id', 'sample_idx') if (v := sample.get(key)) is not None), ''))


class Predictions:
    """Predictions of one model on a test set, in its order, as little of them as a comparison needs.

    A task says what that is: a label a picture, and the probabilities of all classes where the classifier gives them; a
    label map, compressed; the boxes of at least :data:`psaq_mm.models.tasks.detection.MIN_SCORE`. COCO's 5000 pictures
    take some megabytes.

    Attributes:
        task: The task that read them; None before the first one.
        names: Of the pictures.
        metrics: Of the whole test set, by the evaluator's keys.
    """

    def __init__(self):
        self.task: Optional[Task] = None
        self.names: List[str] = []
        self.metrics: Dict[str, float] = {}
        self._records: List[Any] = []

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Any:
        """The prediction for a picture, as :meth:`.Task.read` gave it."""
        return self.task.decompress(self._records[index])

    def add(self, sample: Any, model: Any = None) -> None:
        """Keep what a model predicted for a picture.

        Args:
            sample: An OpenMMLab data sample.
            model: The model, for messages.
        """
        self.task = self.task or task_predicting(sample, model)
        self._records.append(self.task.compress(self.task.read(sample)))
        self.names.append(_name(sample))

    def save(self, path: Union[str, os.PathLike]) -> None:
        """Write to one file, whole or not at all."""
        entries, arrays = ({}, {}) if self.task is None else self.task.pack(self._records)
        kind = None if self.task is None else self.task.kind
        header = dict(kind=kind, names=self.names, metrics=self.metrics, **entries)
        with whole_file(path) as partial, open(partial, 'wb') as file:
            np.savez_compressed(file, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)

    @classmethod
    def load(cls, path: Union[str, os.PathLike]) -> 'Predictions':
        """Undo :meth:`save`.

        Raises:
            DataError: The file is damaged, or holds predictions of a task that is not registered.
        """
        self = cls()
        try:
            with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as content:
                header = json.loads(content['header'].tobytes())
                self.names, self.metrics = header['names'], header['metrics']
                if header['kind'] is not None:
                    self.task = {task.kind: task for task in reversed(TASKS) if task.field}[header['kind']]
                    self._records = self.task.unpack(header, content)
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
            self.predictions.add(sample, getattr(runner, 'model', None))


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

    def add(self, index: int, sample: Any, model: Any = None) -> None:
        """Compare what a model predicted for a picture.

        Args:
            index: Of the picture in the test set.
            sample: An OpenMMLab data sample.
            model: The model, for messages.

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
        task = task_predicting(sample, model)
        if task is not truth.task:
            raise DataError(
                f'predictions of kind {task.kind!r} cannot be compared with {truth.task.kind!r}: use one config for '
                'both'
            )
        compared = task.compare(task.read(sample), truth[index], name)
        self._same, self._of = self._same + compared.same, self._of + compared.of
        if compared.difference is not None:
            self._differences.append(compared.difference)
        if compared.divergence is not None:
            self._divergences.append(compared.divergence)

    def result(self) -> Dict[str, Optional[float]]:
        """The comparison of all pictures so far.

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
            self._agreement.add(self._position, sample, getattr(runner, 'model', None))
            self._position += 1

    def result(self) -> Dict[str, Optional[float]]:
        """See :meth:`Agreement.result`."""
        return self._agreement.result()
