# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which parts of a model become the graph, and which stay in PyTorch beside it.

The widest graph is backbone, neck and dense head. A part stays in PyTorch where a graph cannot replace it: a head that
reads more than the levels of the neck, a prediction that is not made from the outputs of the head's forward, an
operator that ONNX does not have.
"""

import copy
import inspect
from typing import Dict, Mapping, NamedTuple, Optional, Sequence, Tuple

from torch import Tensor, nn

from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models.network import TRAINING_ONLY, find_backbone, is_pretraining, takes_levels_alone
from psaq_mm.models.tasks import TASKS, Task, task_of

__all__ = ['GraphParts', 'NotInGraph', 'graph_parts', 'narrower', 'rest_state', 'with_task_of_outputs']

_LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain', 'mmpose')


class NotInGraph(UnsupportedModelError):
    """A part of a model cannot be in a graph; the message says why."""


class GraphParts(NamedTuple):
    """What of a model becomes the graph.

    Attributes:
        task: Name of the model's task (:mod:`psaq_mm.models.tasks`): ``'other'`` where no task matches,
            ``'backbone'`` where the model is one.
        dense: Name of the head inside the graph, or None.
        with_levels: Whether feature maps are outputs.
        prefixes: Names of the model's children that the graph replaces.
        outside: By the name of a neck or dense head that stays in PyTorch, why.
        exact_size: Whether the graph takes images of exactly its size.
        output: Name of the head's outputs.
        channel_last: Whether feature maps are (N, h, w, C), as NumPy's RoIAlign reads them.
    """

    task: str
    dense: Optional[str]
    with_levels: bool
    prefixes: Tuple[str, ...]
    outside: Mapping[str, str] = {}
    exact_size: bool = False
    output: str = 'dense'
    channel_last: bool = False

    @property
    def whole(self) -> bool:
        """Whether the graph is a network with its head in it."""
        return self.dense is None and not self.with_levels

    def of_task(self, task: Task) -> 'GraphParts':
        """The same parts of a model of another task."""
        return self._replace(task=task.name, exact_size=task.exact_size, output=task.output)


def graph_parts(model: nn.Module) -> GraphParts:
    """The widest graph of a model, as far as that is known without running it."""
    backbone, task = find_backbone(model), task_of(model)
    if task.whole_output(model) is not None:
        return GraphParts('', None, False, ('',)).of_task(task)
    if backbone is model:
        return GraphParts('backbone', None, True, ('',))
    if getattr(model, 'model', None) is backbone:  # timm's whole network
        return GraphParts('', None, False, ('model',)).of_task(task)
    dense = task.dense_head(model)
    prefixes = tuple(n for n in ('backbone', 'neck', dense) if n and getattr(model, n, None) is not None)
    outside = task.outside_graph(model)
    parts = GraphParts('', dense, _others_read_levels(model, task, dense), prefixes, outside).of_task(task)
    if dense is not None:
        reason = _why_apart(getattr(model, dense))
        parts = _without(parts, dense, reason) if reason else parts
    reason = _why_neck_apart(model)
    last = 'neck' if 'neck' in parts.prefixes else parts.dense
    return _without(parts, last, reason) if last and reason else parts


def with_task_of_outputs(parts: GraphParts, dimensions: Sequence[int]) -> GraphParts:
    """The parts that were traced. If no task matched the model, its task is told by ``dimensions``, the numbers of
    dimensions of the outputs.
    """
    if parts.task != Task.name or parts.dense is None:
        return parts
    return next((parts.of_task(task) for task in TASKS if task.matches_outputs(dimensions)), parts)


def rest_state(model: nn.Module, prefixes: Sequence[str]) -> Dict[str, Tensor]:
    """Weights that evaluation needs beside a graph of these ``prefixes`` (:class:`GraphParts`)."""
    if '' in prefixes:
        return {}
    skipped = tuple(f'{name}.' for name in (*prefixes, *TRAINING_ONLY))
    return {name: value for name, value in model.state_dict().items() if not name.startswith(skipped)}


def narrower(parts: GraphParts, reason: str) -> Optional[GraphParts]:
    """The same graph without its last part, which stays in PyTorch for ``reason``; None for a backbone alone."""
    last = parts.dense or ('neck' if 'neck' in parts.prefixes else None)
    return _without(parts, last, reason) if last and parts.task != 'backbone' else None


def _without(parts: GraphParts, name: str, reason: str) -> GraphParts:
    outside = {**parts.outside, name: reason}
    if name == 'neck':
        outside.update({parts.dense: 'it reads the neck, which runs in PyTorch'} if parts.dense else {})
    dropped = (name, parts.dense)
    return parts._replace(
        dense=None,
        with_levels=True,
        prefixes=tuple(p for p in parts.prefixes if p not in dropped),
        outside=outside,
        channel_last=False,
    )


def _others_read_levels(model: nn.Module, task: Task, dense: Optional[str]) -> bool:
    """Whether a model has parts beside the dense head that may read the levels (RoI, mask and semantic heads), or a
    ``predict`` of its own.
    """
    known = ('neck', dense, *TRAINING_ONLY)
    backbone = find_backbone(model)
    others = any(part is not backbone and name not in known for name, part in model.named_children())
    return dense is None or dense in task.shared_levels or others or _is_own(model, 'predict')


def _is_own(model: nn.Module, method: str) -> bool:
    """Whether a method of a model comes from a downstream project, and not from one of the libraries."""
    function = getattr(type(model), method, None)
    return function is not None and function.__module__.split('.')[0] not in _LIBRARIES


def _why_neck_apart(model: nn.Module) -> Optional[str]:
    """Why the parts after the backbone cannot be in the graph; None where they can."""
    neck = getattr(model, 'neck', None)
    if isinstance(neck, nn.Module) and not takes_levels_alone(neck):
        return f'{type(neck).__name__} needs more than the levels of the backbone'
    if is_pretraining(model):
        return f'{type(model).__name__} restores masked pictures with it'
    if _is_own(model, 'extract_feat'):
        return f'{type(model).__name__} has an extract_feat of its own, which may do more than backbone and neck'
    return None


def _why_apart(head: nn.Module) -> Optional[str]:
    """Why a dense head cannot be in the graph; None where it can."""
    kind = type(head).__name__
    if not takes_levels_alone(head):
        return f'{kind} needs more than the levels of the neck'
    if not _predicts_from_levels(head):
        return f'{kind} does not predict from the outputs of its forward on the levels alone'
    return None


class _ForwardCalled(Exception):
    """Raised by a forward, with its arguments."""


class _Levels(tuple):
    """In place of the levels of a neck. It is empty: a graph with the only head in it has no levels as outputs."""


class _Meta(dict):
    """Metainfo of an image, as mmseg passes it to a head; the other libraries pass a data sample that has it."""

    @property
    def metainfo(self) -> dict:
        return self


def _predicts_from_levels(head: nn.Module) -> bool:
    """Whether ``predict`` of a head first calls its own forward, on the levels alone. It is called on a copy of the
    head, without levels.

    Then the prediction is made from the graph's outputs alone. Other heads pass the levels to heads inside of them, or
    read them themselves.
    """
    predict = getattr(type(head), 'predict', None)
    if predict is None:
        return True
    head, levels = copy.copy(head), _Levels()

    def forward(*args, **kwargs):
        raise _ForwardCalled(args, kwargs)

    head.forward = forward
    image = _Meta(
        img_shape=(32, 32), ori_shape=(32, 32), pad_shape=(32, 32), batch_input_shape=(32, 32), scale_factor=(1.0, 1.0)
    )
    required = [
        p
        for p in list(inspect.signature(predict).parameters.values())[3:]
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    try:
        head.predict(levels, [image], *({} for _ in required))
    except _ForwardCalled as call:
        args, kwargs = call.args
        return len(args) == 1 and args[0] is levels and not kwargs
    except Exception:  # whatever it does with empty levels
        return False
    return False
