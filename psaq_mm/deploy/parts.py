# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which parts of a model become the graph, and which stay in PyTorch beside it.

The widest graph is backbone, neck and dense head. A part is left to PyTorch where a graph could not stand for it: a
head that reads more than the levels of the neck, a prediction that is not made from the outputs of the head's forward,
an operator that ONNX does not have.
"""

import copy
import inspect
from typing import Mapping, NamedTuple, Optional, Tuple

from torch import nn

from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models.scope import TRAINING_ONLY, dense_head_name, find_backbone, is_query_based, takes_levels_alone
from psaq_mm.models.task import is_classifier

__all__ = ['GraphParts', 'NotInGraph', 'graph_parts', 'narrower']

_LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain', 'mmpose')


class NotInGraph(UnsupportedModelError):
    """A part of a model has no place in a graph; the message says why."""


class GraphParts(NamedTuple):
    """What of a model becomes the graph.

    Attributes:
        task: ``'classification'``, ``'segmentation'``, ``'detection'``, ``'backbone'``, or ``'other'`` for a model that
            is none of these.
        dense: Name of the head inside the graph, or None.
        with_levels: Whether feature maps are outputs.
        prefixes: Names of the model's children that the graph replaces.
        outside: By the name of a neck or dense head that stays in PyTorch, why.
    """

    task: str
    dense: Optional[str]
    with_levels: bool
    prefixes: Tuple[str, ...]
    outside: Mapping[str, str] = {}


def graph_parts(model: nn.Module) -> GraphParts:
    """The widest graph of a detector, segmentor, classifier or backbone, as far as it can be told without running
    it.
    """
    backbone = find_backbone(model)
    if backbone is model:
        return GraphParts('backbone', None, True, ('',))
    if getattr(model, 'model', None) is backbone:  # timm's whole network
        return GraphParts('classification', None, False, ('model',))
    dense, reason = dense_head_name(model), None
    parts = GraphParts(
        _task(model, dense),
        dense,
        _others_read_levels(model, dense),
        tuple(n for n in ('backbone', 'neck', dense) if n and getattr(model, n, None) is not None),
    )
    if dense is not None:
        reason = _why_apart(model, getattr(model, dense))
        parts = _without(parts, dense, reason) if reason else parts
    reason = _why_neck_apart(model)
    last = 'neck' if 'neck' in parts.prefixes else parts.dense
    return _without(parts, last, reason) if last and reason else parts


def narrower(parts: GraphParts, reason: str) -> Optional[GraphParts]:
    """The same graph without its last part, which stays in PyTorch for ``reason``; None where it is the backbone
    alone.
    """
    last = parts.dense or ('neck' if 'neck' in parts.prefixes else None)
    return _without(parts, last, reason) if last and parts.task != 'backbone' else None


def _without(parts: GraphParts, name: str, reason: str) -> GraphParts:
    outside = {**parts.outside, name: reason}
    if name == 'neck':
        outside.update({parts.dense: 'it reads the neck, which runs in PyTorch'} if parts.dense else {})
    dropped = (name, parts.dense)
    return parts._replace(
        dense=None, with_levels=True, prefixes=tuple(p for p in parts.prefixes if p not in dropped), outside=outside
    )


def _task(model: nn.Module, dense: Optional[str]) -> str:
    if isinstance(getattr(model, 'decode_head', None), nn.Module):  # or a cascade of them
        return 'segmentation'
    if is_classifier(model):
        return 'classification'
    of_mmdet = any(base.__module__.startswith('mmdet.models.detectors') for base in type(model).__mro__)
    if of_mmdet or any(hasattr(model, name) for name in ('rpn_head', 'bbox_head', 'roi_head')):
        return 'detection'
    return 'classification' if dense == 'head' else 'other'  # the shape of the outputs decides


def _others_read_levels(model: nn.Module, dense: Optional[str]) -> bool:
    """Whether a model has parts beside the dense head, such as RoI, mask and semantic heads, which may read the levels,
    or predicts in a way of its own.
    """
    known = ('neck', dense, *TRAINING_ONLY)
    backbone = find_backbone(model)
    others = any(part is not backbone and name not in known for name, part in model.named_children())
    return dense in (None, 'rpn_head') or others or _is_own(model, 'predict')


def _is_own(model: nn.Module, method: str) -> bool:
    """Whether a method of a model is none of the libraries', but of a downstream project."""
    found = getattr(type(model), method, None)
    return found is not None and found.__module__.split('.')[0] not in _LIBRARIES


def _why_neck_apart(model: nn.Module) -> Optional[str]:
    """Why what reads the backbone cannot be in the graph; None where it can."""
    neck = getattr(model, 'neck', None)
    if isinstance(neck, nn.Module) and not takes_levels_alone(neck):
        return f'{type(neck).__name__} needs more than the levels of the backbone'
    if _is_own(model, 'extract_feat'):
        return f'{type(model).__name__} has an extract_feat of its own, which may do more than backbone and neck'
    return None


def _why_apart(model: nn.Module, head: nn.Module) -> Optional[str]:
    """Why the dense head of a model cannot be in the graph; None where it can."""
    kind = type(head).__name__
    if is_query_based(model):
        return f'{kind} reads queries, not the levels of the neck'
    if not takes_levels_alone(head):
        return f'{kind} needs more than the levels of the neck'
    if not _predicts_from_levels(head):
        return f'{kind} does not predict from the outputs of its forward on the levels alone'
    return None


class _Asked(Exception):
    """Raised with its arguments where a forward is called."""


class _Levels(tuple):
    """Stands for the levels of a neck. It is empty, as the graph hands out none where it holds the only head."""


class _Meta(dict):
    """Metainfo of an image, as mmseg hands it to a head; the others hand over a data sample that has it."""

    @property
    def metainfo(self) -> dict:
        return self


def _predicts_from_levels(head: nn.Module) -> bool:
    """Whether the first thing that a head does to predict is its own forward, on the levels alone: a rehearsal on a
    copy, without levels.

    All its prediction reads then is what the graph gives. A head that hands the levels to heads inside it, or reads
    them itself, is none of these.
    """
    predict = getattr(type(head), 'predict', None)
    if predict is None:
        return True
    head, levels = copy.copy(head), _Levels()

    def forward(*args, **kwargs):
        raise _Asked(args, kwargs)

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
    except _Asked as asked:
        args, kwargs = asked.args
        return len(args) == 1 and args[0] is levels and not kwargs
    except Exception:  # whatever it does with levels that are none
        return False
    return False
