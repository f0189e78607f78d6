# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""All that psaq_mm needs to know of one kind of model, in one class, and the registry of these classes."""

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type, TypeVar

import numpy as np
from torch import Tensor, nn

from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models.network import takes_levels_alone

__all__ = ['Compared', 'Task', 'register_task', 'task_of', 'task_predicting', 'tasks']

T = TypeVar('T', bound=Type['Task'])


class Compared(NamedTuple):
    """Two models' predictions for one picture, compared.

    Attributes:
        same: How much of them is the same. Sums of ``same`` and of ``of`` over pictures give the agreement.
        of: Out of how much.
        difference: 1 where only the first model is right, -1 where only the second one is, else 0; None without labels.
        divergence: Kullback-Leibler divergence of the first one's class probabilities from the second one's, in nats.
    """

    same: float
    of: float
    difference: Optional[int] = None
    divergence: Optional[float] = None


class Task:
    """A kind of model: how it is told, what its dense part is, how its predictions are read and compared.

    This class itself stands for models of no known task: they have one ``head``, which reads the levels of the neck,
    and predictions that nothing reads. A subclass is registered with :func:`register_task`, and is all that a new task
    needs; outputs of its exports are post-processed by a function of :func:`psaq_mm.runtime.glue.register_finisher`
    under the task's name, where there is one.

    Attributes:
        name: In manifests of exported models.
        heads: Names of the dense head, which reads all levels of the neck at once: a model has one of them.
        output: Name of the dense head's outputs in a graph.
        exact_size: Whether a graph takes images of exactly its size. If not, smaller images are padded.
        field: Of a data sample, which holds the predictions; ``''``: they cannot be read.
        title: What is read from them, for messages.
        kind: Of predictions, in the files that keep them.
        metrics: Endings of the evaluators' metrics that tables show.

    Example:
        >>> @register_task
        ... class Pose(Task):
        ...     name, kind, field, title = 'pose', 'heatmaps', 'pred_fields', "a pose estimator's heatmaps"
        ...     def matches(self, model):
        ...         return hasattr(model, 'keypoint_head')
    """

    name = 'other'
    heads: Tuple[str, ...] = ('head',)
    output = 'dense'
    exact_size = True
    field = ''
    title = ''
    kind = 'other'
    metrics: Tuple[str, ...] = ()

    # ------------------------------------------------------------------ the model
    def matches(self, model: nn.Module) -> bool:
        """Whether a model is of this task."""
        return False

    def matches_outputs(self, dimensions: Sequence[int]) -> bool:
        """Whether a model that no task matches is of this one, by the numbers of dimensions of its graph's outputs."""
        return False

    def dense_head(self, model: nn.Module) -> Optional[str]:
        """Name of a model's dense head. None where it has none, or a list of them, as a cascade of decode heads has."""
        for name in self.heads:
            head = getattr(model, name, None)
            if isinstance(head, nn.Module) and not isinstance(head, nn.ModuleList):
                return name
        return None

    def is_query_based(self, model: nn.Module) -> bool:
        """Whether a model's head reads queries, and not the levels of the neck."""
        return False

    def num_classes(self, model: nn.Module) -> Optional[int]:
        """Number of logits of a model that gives one vector of them for an image; None for any other."""
        return None

    # ------------------------------------------------------------------ calibration and distillation
    def dense_outputs(self, model: nn.Module, levels: Sequence[Tensor]) -> Any:
        """Outputs of the dense head, nested as it gives them; empty without one.

        Args:
            model: The model.
            levels: Outputs of its neck, or of its backbone where it has no neck.

        Raises:
            UnsupportedModelError: The head needs more than the levels.
        """
        name = self.dense_head(model)
        if name is None:
            return []
        head = getattr(model, name)
        if not takes_levels_alone(head):
            raise UnsupportedModelError(
                f'{name} of {type(model).__name__} ({type(head).__name__}) needs more than the levels of the '
                "neck: distil backbone and neck, and use scope='backbone'"
            )
        return head(tuple(levels))

    def run_heads(self, model: nn.Module, images: Tensor, levels: Sequence[Tensor], max_proposals: int) -> None:
        """Run every head once, so that calibration sees all of their layers.

        Args:
            model: The model.
            images: (B, C, H, W).
            levels: Outputs of its neck for them.
            max_proposals: RoIs for each image, for models with RoI heads.
        """
        self.dense_outputs(model, levels)

    def proposals(
        self, model: nn.Module, images: Tensor, levels: Sequence[Tensor], max_proposals: int
    ) -> Optional[List[Tensor]]:
        """Boxes for the second stage, (n, 4) for each image; None for models of one stage. Arguments are those of
        :meth:`run_heads`.
        """
        return None

    def roi_outputs(
        self, model: nn.Module, images: Tensor, levels: Sequence[Tensor], proposals: Sequence[Tensor]
    ) -> List[Tensor]:
        """Outputs of the second stage for ``proposals``. The other arguments are those of :meth:`run_heads`."""
        return []

    def calibrated_parts(self, model: nn.Module) -> Tuple[str, ...]:
        """Names of the parts, beside backbone and neck, that :meth:`run_heads` runs. A dot separates part and child
        where only some children of a part run.
        """
        name = self.dense_head(model)
        return () if name is None else (name,)

    def check_full_scope(self, model: nn.Module) -> None:
        """Refuse a model whose heads cannot be quantized or calibrated.

        Raises:
            UnsupportedModelError: The message names the part.
        """

    # ------------------------------------------------------------------ export
    def others_read_levels(self, model: nn.Module, dense: str) -> bool:
        """Whether parts that stay in PyTorch read the levels of the neck, though the dense head is in the graph."""
        return False

    def finish_settings(self, model: nn.Module, dense: Optional[str], shapes: Mapping[str, Tuple[int, ...]]) -> Dict:
        """Entries of the manifest that the post-processing reads.

        Args:
            model: The model.
            dense: Name of its dense head, where the graph holds it.
            shapes: Of the graph's outputs, by name.
        """
        return dict(labels=None, align_corners=False)

    # ------------------------------------------------------------------ predictions
    def reads(self, sample: Any) -> bool:
        """Whether an OpenMMLab data sample holds predictions of this task."""
        return bool(self.field) and self.field in sample

    def read(self, sample: Any) -> Any:
        """The prediction in a data sample, as little of it as a comparison needs: an array, if :meth:`pack` is not
        overridden.
        """
        raise NotImplementedError

    def compare(self, prediction: Any, truth: Any, picture: str) -> Compared:
        """Compare predictions of two models, the second of which counts as the truth.

        Args:
            prediction: From :meth:`read`.
            truth: The other model's, for the same picture.
            picture: Its name, for messages.
        """
        raise NotImplementedError

    def compress(self, prediction: Any) -> Any:
        """What is kept of a prediction in memory."""
        return prediction

    def decompress(self, record: Any) -> Any:
        """The prediction out of what :meth:`compress` gave."""
        return record

    def pack(self, records: Sequence[Any]) -> Tuple[Dict[str, Any], Dict[str, np.ndarray]]:
        """What :meth:`compress` gave for all pictures as entries of a JSON header, and arrays by name."""
        return {}, {f'record_{i}': np.asarray(record) for i, record in enumerate(records)}

    def unpack(self, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> List[Any]:
        """Undo :meth:`pack`. The header has ``names`` of all pictures, too."""
        return [arrays[f'record_{i}'] for i in range(len(header['names']))]


_TASKS: List[Task] = []
_OTHER = Task()


def register_task(cls: T) -> T:
    """Register a :class:`Task`. Of several that match a model the last registered one counts."""
    _TASKS.insert(0, cls())
    return cls


def tasks() -> List[Task]:
    """All registered tasks."""
    return list(_TASKS)


def task_of(model: nn.Module) -> Task:
    """The task of a model; ``name`` is ``'other'`` where no task matches."""
    return next((task for task in _TASKS if task.matches(model)), _OTHER)


def task_predicting(sample: Any, model: Optional[nn.Module] = None) -> Task:
    """The task whose predictions a data sample holds.

    Args:
        sample: An OpenMMLab data sample.
        model: The model that predicted it, for the message.

    Raises:
        UnsupportedModelError: No task reads them.
    """
    for task in _TASKS:
        if task.reads(sample):
            return task
    whose = '' if model is None else f' of {type(model).__name__}'
    raise UnsupportedModelError(
        f'predictions{whose} ({", ".join(sample.keys()) or "nothing"}) cannot be compared: '
        f'{", ".join(task.title for task in reversed(_TASKS))} can, or those of a task registered with '
        'psaq_mm.models.tasks.register_task'
    )
