# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""All that psaq_mm needs to know of one kind of model, in one class, and the registry of these classes."""

from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type, TypeVar

import numpy as np
from torch import Tensor, nn

from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models.network import takes_levels_alone

__all__ = ['TASKS', 'Compared', 'Task', 'register_task', 'task_of', 'task_predicting']

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
    """A kind of model: how to recognize it, its dense head, how its predictions are read and compared.

    This class itself stands for models of no known task: their ``head`` reads the levels of the neck, and nothing reads
    their predictions. A new task is a subclass with :func:`register_task`. If its exports need post-processing, a
    function with :func:`psaq_mm.runtime.glue.register_finisher` does it, under the same name.

    ``levels`` are the outputs of the neck, or of the backbone without one, for ``images`` (B, C, H, W).

    Attributes:
        name: In manifests of exported models.
        heads: Names of the dense head, which reads all levels at once: a model has one of them.
        shared_levels: Those of ``heads`` whose levels other heads read too.
        output: Name of the dense head's outputs in a graph.
        exact_size: Whether a graph takes images of exactly its size. If not, smaller images are padded.
        field: Of a data sample, which holds the predictions; ``''``: they cannot be read.
        kind: Of predictions, in the files that keep them.
        metrics: Endings of the evaluators' metrics that tables show.

    Example:
        >>> @register_task
        ... class Pose(Task):
        ...     name, kind, heads, field = 'pose', 'heatmaps', ('keypoint_head',), 'pred_fields'
        ...     def matches(self, model):
        ...         return hasattr(model, 'keypoint_head')
    """

    name = 'other'
    heads: Tuple[str, ...] = ('head',)
    shared_levels: Tuple[str, ...] = ()
    output = 'dense'
    exact_size = True
    field = ''
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
        heads = {name: getattr(model, name, None) for name in self.heads}
        single = (n for n, head in heads.items() if isinstance(head, nn.Module) and not isinstance(head, nn.ModuleList))
        return next(single, None)

    def chooses_queries(self, model: nn.Module) -> bool:
        """Whether a model decodes queries that it chooses by scores of its own."""
        return False

    def num_classes(self, model: nn.Module) -> Optional[int]:
        """Number of classes of a model with one vector of logits for an image; None for any other."""
        return None

    def whole_output(self, model: nn.Module) -> Optional[Callable[[Tensor], Tensor]]:
        """From images to the output of a model's task, by the model's own forward: of a model that is a network with
        its head in it. None for one that is put together of backbone, neck and heads, as those of OpenMMLab are.
        """
        return None

    # ------------------------------------------------------------------ calibration and distillation
    def dense_outputs(self, model: nn.Module, levels: Sequence[Tensor]) -> Any:
        """Outputs of the dense head, nested as it gives them; empty without one.

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

    def head_outputs(
        self, model: nn.Module, images: Tensor, levels: Sequence[Tensor], chosen: Any = None
    ) -> Tuple[Any, Any]:
        """Outputs of the head that a student learns, nested as it gives them, and what the model chose on the way.

        Args:
            model: The model.
            images: Normalized, (B, C, H, W).
            levels: Of the neck.
            chosen: What another model chose for the same images, to be taken in place of this one's own choice; see
                :meth:`chooses_queries`. None: it chooses itself.
        """
        return self.dense_outputs(model, levels), None

    def run_heads(self, model: nn.Module, images: Tensor, levels: Sequence[Tensor], max_proposals: int) -> None:
        """Run every head once, so that calibration sees all layers; RoI heads on ``max_proposals`` boxes an image."""
        self.dense_outputs(model, levels)

    def proposals(
        self, model: nn.Module, images: Tensor, levels: Sequence[Tensor], max_proposals: int
    ) -> Optional[List[Tensor]]:
        """Boxes for RoI heads, (n, 4) for each image; None for models without."""
        return None

    def roi_outputs(
        self, model: nn.Module, images: Tensor, levels: Sequence[Tensor], proposals: Sequence[Tensor]
    ) -> List[Tensor]:
        """Outputs of the RoI heads for :meth:`proposals`."""
        return []

    def calibrated_parts(self, model: nn.Module) -> Tuple[str, ...]:
        """Names of the parts that :meth:`run_heads` runs: ``'part'``, or ``'part.child'`` if only some children run."""
        name = self.dense_head(model)
        return () if name is None else (name,)

    def float_parts(self, model: nn.Module) -> Dict[str, str]:
        """Why parts of a model stay in floating point in every scope, by their dotted names."""
        return {}

    def check_full_scope(self, model: nn.Module) -> None:
        """Raises UnsupportedModelError where a head of a model cannot be calibrated; the message names it."""

    # ------------------------------------------------------------------ export
    def outside_graph(self, model: nn.Module) -> Dict[str, str]:
        """Why parts of a model stay in PyTorch beside its graph, by their dotted names, as far as the task knows."""
        return {}

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
        """The prediction in a data sample, as little of it as a comparison needs. An array needs no :meth:`pack`."""
        raise NotImplementedError

    def compare(self, prediction: Any, truth: Any, picture: str) -> Compared:
        """Compare predictions for one picture, whose name is for messages; the second one counts as the truth."""
        raise NotImplementedError

    def compress(self, prediction: Any) -> Any:
        """A prediction as it is kept in memory."""
        return prediction

    def decompress(self, record: Any) -> Any:
        """Undo :meth:`compress`."""
        return record

    def pack(self, records: Sequence[Any]) -> Tuple[Dict[str, Any], Dict[str, np.ndarray]]:
        """Compressed predictions of all pictures, for a file: entries of its JSON header, and arrays by name."""
        return {}, {f'record_{i}': np.asarray(record) for i, record in enumerate(records)}

    def unpack(self, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> List[Any]:
        """Undo :meth:`pack`. The header has the ``names`` of all pictures, too."""
        return [arrays[f'record_{i}'] for i in range(len(header['names']))]


TASKS: List[Task] = []
"""All registered tasks. Of several that match a model the first one counts."""


def register_task(cls: T) -> T:
    """Register a :class:`Task`, before those that are registered already."""
    TASKS.insert(0, cls())
    return cls


def task_of(model: nn.Module) -> Task:
    """The task of a model; a plain :class:`Task`, whose name is ``'other'``, where none matches."""
    return next((task for task in TASKS if task.matches(model)), Task())


def task_predicting(sample: Any, model: Optional[nn.Module] = None) -> Task:
    """The task whose predictions an OpenMMLab data sample holds; ``model``, which predicted it, is for the message.

    Raises:
        UnsupportedModelError: No task reads them.
    """
    for task in TASKS:
        if task.reads(sample):
            return task
    whose = '' if model is None else f' of {type(model).__name__}'
    raise UnsupportedModelError(
        f'predictions{whose} ({", ".join(sample.keys()) or "nothing"}) cannot be compared: those of '
        f'{", ".join(task.name for task in reversed(TASKS) if task.field)} can, and of a task of your own, see '
        'psaq_mm.models.tasks.register_task'
    )
