# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Models whose head decodes queries: the DETR family, MaskFormer and Mask2Former, of mmdet and mmseg.

Their heads read more than feature maps: the size of the pictures, masks of their padding, texts. They are run as the
library runs them, on pictures that fill their batch and have no labels. Predictions are boxes, label maps and panoptic
maps, which the other tasks read.
"""

import contextlib
import sys
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from psaq_mm.contexts import replaced
from psaq_mm.errors import ConfigError
from psaq_mm.models.adapters.match import inherits
from psaq_mm.models.tasks.base import register_task
from psaq_mm.models.tasks.detection import Detection, filling_samples
from psaq_mm.models.tasks.panoptic import Panoptic
from psaq_mm.models.tasks.segmentation import Segmentation

__all__ = ['PROMPTS', 'MaskQueries', 'QueryDetection', 'QuerySegmentation']

PROMPTS = (
    'person, car, bus, train, boat, bird, cat, dog, horse, cow, bottle, cup, chair, couch, plant, table, television, '
    'book, clock, ball'
).split(', ')
"""What a detector with a language model is asked for, where nobody tells it classes."""

_MOST_PROMPTS = 80
_DETECTORS = 'mmdet.models.detectors'
_DETR = f'{_DETECTORS}.base_detr.DetectionTransformer'
_DEFORMABLE = f'{_DETECTORS}.deformable_detr.DeformableDETR'
_DINO = f'{_DETECTORS}.dino.DINO'
_DDQ = f'{_DETECTORS}.ddq_detr.DDQDETR'
_GROUNDING = f'{_DETECTORS}.grounding_dino.GroundingDINO'
_MASK_FORMER = f'{_DETECTORS}.maskformer.MaskFormer'
_MASK_HEAD = 'mmdet.models.dense_heads.maskformer_head.MaskFormerHead'

_SUPPRESSING = (_DDQ.rpartition('.')[0], 'mmdet.models.layers.transformer.ddq_detr_layers')

# Every child of a detector that its forward runs in evaluation, as far as it has layers.
_DETR_PARTS = (
    'encoder',
    'decoder',
    'bbox_head',
    'memory_trans_fc',
    'pos_trans_fc',
    'reference_points_fc',
    'query_map',
    'text_feat_map',
)


class _Choices(TorchFunctionMode):
    """Records what a detector chooses as queries among the places of its encoder, or makes it take earlier choices.

    Args:
        earlier: What another model chose for the same pictures; None: the detector chooses itself.

    Attributes:
        made: Indices of the chosen places, one tensor for each choice.
    """

    def __init__(self, earlier: Optional[Sequence[Tensor]] = None) -> None:
        super().__init__()
        self.made: List[Tensor] = []
        self._earlier = earlier

    def _choose(self, proposed: Tensor) -> Tensor:
        self.made.append(proposed if self._earlier is None else self._earlier[len(self.made)])
        return self.made[-1]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func not in (torch.topk, Tensor.topk):
            return result
        indices = self._choose(result.indices)
        dim = kwargs.get('dim', args[2] if len(args) > 2 else -1)
        return torch.return_types.topk((args[0].gather(dim, indices), indices))

    def around(self, suppression: Callable) -> Callable:
        """A ``batched_nms`` of mmcv whose choices are these."""

        def batched_nms(boxes: Tensor, scores: Tensor, *args: Any, **kwargs: Any) -> Tuple[Tensor, Tensor]:
            kept = self._choose(suppression(boxes, scores, *args, **kwargs)[1])
            return torch.cat([boxes[kept], scores[kept, None]], 1), kept

        return batched_nms


@contextlib.contextmanager
def _choices(earlier: Optional[Sequence[Tensor]] = None) -> Iterator[_Choices]:
    """Inside it, a detector chooses its queries, or takes those chosen before; see :class:`_Choices`.

    The two-stage detectors decode the places with the greatest scores, in their order; DDQ-DETR those that non-maximum
    suppression leaves. Where scores differ a little the order is another one: the same query of two models would stand
    for two places.
    """
    with contextlib.ExitStack() as stack:
        choices = _Choices(earlier)
        for name in _SUPPRESSING:
            module = sys.modules.get(name)  # not imported: there is no such detector
            if module is not None:
                stack.enter_context(replaced(module, 'batched_nms', choices.around(module.batched_nms)))
        stack.enter_context(choices)
        yield choices


@register_task
class QueryDetection(Detection):
    """The DETR family of mmdet. Its outputs are class logits and boxes of the last decoder layer."""

    field = ''  # its predictions are boxes as any

    def matches(self, model: nn.Module) -> bool:
        """See :meth:`.Task.matches`."""
        return inherits(model, _DETR)

    def dense_head(self, model: nn.Module) -> Optional[str]:
        """See :meth:`.Task.dense_head`: its head reads queries."""
        return None

    def chooses_queries(self, model: nn.Module) -> bool:
        """See :meth:`.Task.chooses_queries`: the two-stage detectors do."""
        return inherits(model, _DINO) or bool(inherits(model, _DEFORMABLE) and model.as_two_stage)

    # ------------------------------------------------------------------ calibration and distillation
    def calibrated_parts(self, model: nn.Module) -> Tuple[str, ...]:
        """See :meth:`.Task.calibrated_parts`."""
        return tuple(name for name in _DETR_PARTS if isinstance(getattr(model, name, None), nn.Module))

    def float_parts(self, model: nn.Module) -> Dict[str, str]:
        """See :meth:`.Task.float_parts`: a language model, and what DDQ-DETR has for its dense queries."""
        floats = {}
        if isinstance(getattr(model, 'language_model', None), nn.Module):
            floats['language_model'] = 'it reads texts, and no picture calibrates it'
        if inherits(model, _DDQ):
            last = len(model.bbox_head.cls_branches) - 1
            names = 'aux_cls_branches', 'aux_reg_branches', f'cls_branches.{last}', f'reg_branches.{last}'
            floats.update({f'bbox_head.{name}': 'it is used in training alone' for name in names})
        return floats

    def check_full_scope(self, model: nn.Module) -> None:
        """See :meth:`.Task.check_full_scope`: every head of the family runs."""

    def head_outputs(
        self, model: nn.Module, images: Tensor, levels: Sequence[Tensor], chosen: Any = None
    ) -> Tuple[Any, Any]:
        """See :meth:`.Task.head_outputs`.

        Returns:
            Class logits (B, queries, classes), or of each token of the text, and boxes (B, queries, 4) of the last
            decoder layer, as fractions of the picture; and the places of the encoder that became queries.

        Raises:
            ConfigError: The encoder has fewer places than the detector has queries.
        """
        texts = _texts(model, len(images)) if inherits(model, _GROUNDING) else {}
        self._check_places(model, levels)
        samples = filling_samples(images)
        with _choices(chosen) as choices:
            inputs = model.forward_transformer(tuple(levels), **texts, batch_data_samples=samples)
        classes, boxes = model.bbox_head(**inputs)
        logits = classes[-1]
        if texts:  # places without a token are -inf
            tokens = texts['text_dict']['text_token_mask'][0]
            logits = logits[..., : len(tokens)][..., tokens]
        return [logits, boxes[-1]], choices.made or None

    def _check_places(self, model: nn.Module, levels: Sequence[Tensor]) -> None:
        places = sum(level.shape[-2] * level.shape[-1] for level in levels)
        if self.chooses_queries(model) and not inherits(model, _DDQ) and places < model.num_queries:
            raise ConfigError(
                f'pictures of this size give {places} places, of which {type(model).__name__} chooses num_queries='
                f'{model.num_queries}: give a larger dfq.size'
            )

    def run_heads(self, model: nn.Module, images: Tensor, levels: Sequence[Tensor], max_proposals: int) -> None:
        """See :meth:`.Task.run_heads`."""
        self.head_outputs(model, images, levels)

    # ------------------------------------------------------------------ export
    def outside_graph(self, model: nn.Module) -> Dict[str, str]:
        """See :meth:`.Task.outside_graph`."""
        reasons = dict(
            encoder='it attends to pictures of several levels, with masks of their padding',
            decoder='it decodes queries, not the levels of the neck',
            bbox_head=f'{type(getattr(model, "bbox_head", None)).__name__} reads queries, not the levels of the neck',
            language_model='it reads texts',
        )
        if inherits(model, _DEFORMABLE):
            reasons['encoder'] = 'deformable attention samples the levels in floating point'
        between = 'it stands between encoder and decoder'
        reasons.update({name: between for name in self.calibrated_parts(model) if name not in reasons})
        return {name: reason for name, reason in reasons.items() if isinstance(getattr(model, name, None), nn.Module)}


def _texts(model: nn.Module, count: int) -> Dict[str, Dict[str, Tensor]]:
    """What a detector with a language model reads beside ``count`` pictures: its classes, or :data:`PROMPTS`.

    The language model stays in floating point and is not trained: no gradient goes through it.
    """
    names = list(getattr(model, 'psaq_mm_classes', None) or PROMPTS)[:_MOST_PROMPTS]
    caption, _ = model.to_plain_text_prompts([name.replace('_', ' ') for name in names])
    with torch.no_grad():
        text = model.language_model([caption] * count)
    if model.text_feat_map is not None:
        text['embedded'] = model.text_feat_map(text['embedded'])
    return dict(text_dict=text)


class _MaskOutputs:
    """What MaskFormer's head gives, whatever model it is in: ``masks_of`` names it."""

    masks_of = ''

    def calibrated_parts(self, model: nn.Module) -> Tuple[str, ...]:
        """See :meth:`.Task.calibrated_parts`."""
        return (self.masks_of,)

    def head_outputs(
        self, model: nn.Module, images: Tensor, levels: Sequence[Tensor], chosen: Any = None
    ) -> Tuple[Any, Any]:
        """See :meth:`.Task.head_outputs`: class logits (B, queries, classes + 1) and mask logits (B, queries, h, w) of
        the last decoder layer.
        """
        classes, masks = getattr(model, self.masks_of)(tuple(levels), filling_samples(images))
        return [classes[-1], masks[-1]], None

    def run_heads(self, model: nn.Module, images: Tensor, levels: Sequence[Tensor], max_proposals: int) -> None:
        """See :meth:`.Task.run_heads`."""
        self.head_outputs(model, images, levels)

    def dense_head(self, model: nn.Module) -> Optional[str]:
        """See :meth:`.Task.dense_head`: its head reads queries."""
        return None

    def outside_graph(self, model: nn.Module) -> Dict[str, str]:
        """See :meth:`.Task.outside_graph`: the head, and its pixel decoder by name."""
        head = getattr(model, self.masks_of)
        decoder = type(head.pixel_decoder).__name__
        reason = ', and samples in floating point' if 'Deform' in decoder else ''
        return {
            self.masks_of: f'{type(head).__name__} needs more than the levels of the neck: it decodes queries',
            f'{self.masks_of}.pixel_decoder': f'{decoder} runs inside of {type(head).__name__}{reason}',
        }


@register_task
class MaskQueries(_MaskOutputs, Panoptic):
    """MaskFormer and Mask2Former of mmdet, for panoptic and for instance segmentation."""

    field = ''  # its predictions are panoptic maps or boxes as any
    masks_of = 'panoptic_head'

    def matches(self, model: nn.Module) -> bool:
        """See :meth:`.Task.matches`."""
        return inherits(model, _MASK_FORMER)


@register_task
class QuerySegmentation(_MaskOutputs, Segmentation):
    """mmseg's segmentors with the head of MaskFormer or Mask2Former."""

    field = ''  # its predictions are label maps as any
    masks_of = 'decode_head'

    def matches(self, model: nn.Module) -> bool:
        """See :meth:`.Task.matches`."""
        return inherits(getattr(model, 'decode_head', None), _MASK_HEAD)
