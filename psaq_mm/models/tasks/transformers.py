# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Classifiers and segmentors of the library ``transformers``: networks with their heads in them."""

from functools import partial
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple

from torch import Tensor, nn

from psaq_mm.models.network import is_transformers
from psaq_mm.models.tasks.base import register_task
from psaq_mm.models.tasks.classification import Classification
from psaq_mm.models.tasks.segmentation import Segmentation

__all__ = ['TransformersClassification', 'TransformersSegmentation']


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return model(pixel_values=images, return_dict=True).logits


class _Whole:
    """A model whose own forward gives its logits, beside other outputs."""

    endings: Tuple[str, ...] = ()

    def matches(self, model: nn.Module) -> bool:
        """See :meth:`.Task.matches`."""
        return is_transformers(model) and type(model).__name__.endswith(self.endings)

    def whole_output(self, model: nn.Module) -> Optional[Callable[[Tensor], Tensor]]:
        """See :meth:`.Task.whole_output`."""
        return partial(_logits, model)

    def head_outputs(
        self, model: nn.Module, images: Tensor, levels: Sequence[Tensor], chosen: Any = None
    ) -> Tuple[Any, Any]:
        """See :meth:`.Task.head_outputs`."""
        return _logits(model, images), None

    def run_heads(self, model: nn.Module, images: Tensor, levels: Sequence[Tensor], max_proposals: int) -> None:
        """See :meth:`.Task.run_heads`."""
        _logits(model, images)

    def calibrated_parts(self, model: nn.Module) -> Tuple[str, ...]:
        """See :meth:`.Task.calibrated_parts`: all of them."""
        return tuple(name for name, _ in model.named_children())


@register_task
class TransformersClassification(_Whole, Classification):
    """Models named ``...ForImageClassification``."""

    endings = ('ForImageClassification', 'ForImageClassificationWithTeacher')

    def num_classes(self, model: nn.Module) -> Optional[int]:
        """See :meth:`.Task.num_classes`."""
        return model.config.num_labels or None


@register_task
class TransformersSegmentation(_Whole, Segmentation):
    """Models named ``...ForSemanticSegmentation``."""

    endings = ('ForSemanticSegmentation',)

    def finish_settings(self, model: nn.Module, dense: Optional[str], shapes: Mapping[str, Tuple[int, ...]]) -> Dict:
        """See :meth:`.Task.finish_settings`: logits of a quarter of the size, one of each class."""
        return dict(labels=dict(rule='argmax'), align_corners=False)
