# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Classification: one label for an image, by mmpretrain's classifiers and timm's networks."""

from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from torch import Tensor, nn

from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models.network import find_backbone, is_timm
from psaq_mm.models.tasks.base import Compared, Task, register_task

__all__ = ['Classification', 'Label']


class Label(NamedTuple):
    """A prediction.

    Attributes:
        label: The top-1 class.
        correct: Whether it is the picture's; None where the test set does not tell.
        chances: Probabilities of all classes, (classes,), where the classifier gives them.
    """

    label: int
    correct: Optional[bool] = None
    chances: Optional[np.ndarray] = None


@register_task
class Classification(Task):
    """Compared by top-1 class, by what is right, and by class probabilities."""

    name = 'classification'
    output = 'logits'
    field = 'pred_label'
    kind = 'label'
    metrics = ('top1',)

    def matches(self, model: nn.Module) -> bool:
        """See :meth:`.Task.matches`. By module path: no library is imported to ask, and subclasses count."""
        known = any(base.__module__.startswith('mmpretrain.models.classifiers') for base in type(model).__mro__)
        return known or is_timm(find_backbone(model))

    def matches_outputs(self, dimensions: Sequence[int]) -> bool:
        """See :meth:`.Task.matches_outputs`: one vector for each image."""
        return list(dimensions) == [2]

    def num_classes(self, model: nn.Module) -> Optional[int]:
        """See :meth:`.Task.num_classes`; None without a head."""
        network = find_backbone(model)
        count = getattr(network if is_timm(network) else getattr(model, 'head', None), 'num_classes', None)
        return count if isinstance(count, int) and count > 0 else None

    def whole_output(self, model: nn.Module) -> Optional[Callable[[Tensor], Tensor]]:
        """See :meth:`.Task.whole_output`: a network of timm, if it has a head."""
        return model if is_timm(model) and self.num_classes(model) else None

    def dense_outputs(self, model: nn.Module, levels: Sequence[Tensor]) -> Any:
        """See :meth:`.Task.dense_outputs`; a network of timm holds its head itself."""
        network = find_backbone(model)
        return network.forward_head(levels[0]) if is_timm(network) else super().dense_outputs(model, levels)

    def finish_settings(self, model: nn.Module, dense: Optional[str], shapes: Mapping[str, Tuple[int, ...]]) -> Dict:
        """See :meth:`.Task.finish_settings`: whether a picture has several labels, so that each has a sigmoid."""
        several = any('MultiLabel' in base.__name__ for base in type(getattr(model, 'head', None)).__mro__)
        return dict(super().finish_settings(model, dense, shapes), several_labels=several)

    # ------------------------------------------------------------------ predictions
    def read(self, sample: Any) -> Label:
        """See :meth:`.Task.read`."""
        if sample.pred_label.numel() != 1:
            raise UnsupportedModelError(
                'a classifier with several labels a picture has no top-1 class: compare one with a single label'
            )
        label, truth, scores = int(sample.pred_label), sample.get('gt_label'), sample.get('pred_score')
        return Label(
            label,
            int(truth) == label if truth is not None and truth.numel() == 1 else None,
            scores.float().cpu().numpy() if scores is not None and scores.dim() == 1 else None,
        )

    def compare(self, prediction: Label, truth: Label, picture: str) -> Compared:
        """See :meth:`.Task.compare`."""
        difference = divergence = None
        if prediction.correct is not None and truth.correct is not None:
            difference = int(prediction.correct) - int(truth.correct)
        if prediction.chances is not None and truth.chances is not None:
            divergence = _divergence(truth.chances, prediction.chances)
        return Compared(float(prediction.label == truth.label), 1.0, difference, divergence)

    def pack(self, records: Sequence[Label]) -> Tuple[Dict[str, Any], Dict[str, np.ndarray]]:
        """See :meth:`.Task.pack`."""
        arrays = dict(labels=np.array([record.label for record in records], np.int64))
        if all(record.chances is not None for record in records):
            arrays['chances'] = np.array([record.chances for record in records], np.float32)
        return dict(correct=[record.correct for record in records]), arrays

    def unpack(self, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> List[Label]:
        """See :meth:`.Task.unpack`."""
        labels = arrays['labels'].tolist()
        chances = list(arrays['chances']) if 'chances' in arrays else [None] * len(labels)
        return [Label(*columns) for columns in zip(labels, header['correct'], chances)]


def _divergence(truth: np.ndarray, prediction: np.ndarray) -> float:
    """KL(truth || prediction) of two distributions over classes, in nats."""
    least = np.finfo(np.float32).tiny  # a softmax in float32 may say 0
    truth, prediction = (np.maximum(p.astype(np.float64), least) for p in (truth, prediction))
    return float((truth * np.log(truth / prediction)).sum())
