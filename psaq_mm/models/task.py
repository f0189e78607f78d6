# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A view of a detector, segmentor or classifier of any library, with all that a data-free run asks of it."""

from contextlib import nullcontext
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.calibration import find_attention
from psaq_mm.calibration.blocks import BlockTaps
from psaq_mm.errors import ConfigError
from psaq_mm.models.adapters import Backbone, backbone_of
from psaq_mm.models.network import find_backbone, is_pretraining, is_timm, network_of
from psaq_mm.models.tasks import task_of
from psaq_mm.pictures import ImageSpec
from psaq_mm.quantization import attention_parts

__all__ = ['ModelInput', 'TaskModel', 'TaskOutputs', 'PARTS', 'default_parts', 'input_channels', 'reads_rgb']

PARTS = ('blocks', 'backbone', 'neck', 'head')
"""Parts whose outputs can be distilled. ``blocks``: the tokens of every few transformer blocks, for backbones without
stages of several scales. ``head``: RPN maps of a two-stage detector, per-pixel logits of a segmentor, dense head maps
of a one-stage detector, class logits with boxes or masks of the last decoder layer of a model with queries, logits of a
classifier."""


class ModelInput(NamedTuple):
    """A model's input, as its config describes it beside ``data_preprocessor``.

    :func:`psaq_mm.engine.inputs.set_input_` keeps it as ``model.psaq_mm_input``; copies of the model have it too.

    Attributes:
        spec: Normalization, by pipeline and preprocessor together, and the range of raw values.
        turned: Whether the pipeline reverses the order of the channels. The preprocessor may do that again.
    """

    spec: ImageSpec
    turned: bool = False


class TaskOutputs(NamedTuple):
    """One forward pass of a model.

    Attributes:
        parts: The tensors of the parts asked for.
        logits: (B, classes) of a classifier, else None.
        chosen: What a detector chose as queries, see :meth:`.Task.chooses_queries`; None for every other model.
    """

    parts: List[Tensor]
    logits: Optional[Tensor]
    chosen: Any = None


def default_parts(model: nn.Module) -> Tuple[str, ...]:
    """The parts that the student learns if the config names none.

    Stages and neck levels if the backbone has outputs of several scales (Swin in a detector or segmentor), or no
    attention (ConvNeXt). Transformer blocks if all tokens have one width (ViT, DeiT), or if only the last stage is an
    output. A classifier's logits are
    left out: a student of DeiT-Tiny that learns them beside the blocks does worse, see docs/method.md.
    """
    backbone = find_backbone(model)
    widths = {attention_parts(module).queries.layer.in_features for _, module in find_attention(backbone)}
    stages = getattr(backbone, 'out_indices', None)
    pyramid = (
        len(widths) != 1 and not is_timm(backbone) and not (isinstance(stages, (tuple, list)) and len(stages) == 1)
    )
    return ('backbone', 'neck') if pyramid or not widths else ('blocks',)


def input_channels(model: nn.Module) -> int:
    """Channels of a model's input: those of its first convolution."""
    return next((module.in_channels for module in find_backbone(model).modules() if isinstance(module, nn.Conv2d)), 3)


def turns_channels(model: nn.Module) -> Optional[bool]:
    """Whether a model's pipeline and preprocessor together reverse the channels, which the libraries load blue first;
    None where neither says so.
    """
    preprocessor, known = getattr(model, 'data_preprocessor', None), getattr(model, 'psaq_mm_input', None)
    # mmdet, mmseg and mmpretrain have three names for it.
    flags = [
        bool(getattr(preprocessor, n))
        for n in ('_channel_conversion', 'channel_conversion', 'to_rgb')
        if hasattr(preprocessor, n)
    ]
    if not flags and not (known and known.turned):
        return None
    return any(flags) != bool(known and known.turned)


def reads_rgb(model: nn.Module) -> bool:
    """Whether a model takes RGB: its pipeline or preprocessor reverses the channels, which are loaded blue first.

    A model without a data preprocessor is none of OpenMMLab's and takes RGB.
    """
    if getattr(model, 'data_preprocessor', None) is None:
        return turns_channels(model) is not False
    return bool(turns_channels(model))


def _tensors(outputs) -> List[Tensor]:
    """The tensors of a nested tuple/list/dict, in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = outputs.values()
    if isinstance(outputs, (tuple, list)) or hasattr(outputs, '__iter__'):
        return [t for o in outputs for t in _tensors(o)]
    return []


def _logits(outputs: List[Tensor]) -> Tensor:
    """A classifier's logits; several heads (Conformer's) are added, as its prediction adds them."""
    return outputs[0] if len(outputs) == 1 else torch.stack(outputs).sum(0)


class TaskModel:
    """A thin view of a model: its colour range, its outputs to distil, and a forward that runs every layer.

    It has no state beside the model, so that a teacher and a student can each have one.

    Args:
        model: A built detector, segmentor, classifier or backbone.
        parts: Which outputs :meth:`outputs` returns, out of :data:`PARTS`. Parts that the model lacks are left out.
            Defaults to None, :func:`default_parts`.
        max_proposals: RoIs for each image in :meth:`calibration_forward`. They are the RPN's best, without a score
            threshold: on synthetic images a threshold may leave a mask head without any data.
        block_stride: Of the part ``blocks``: 3 is every third one, see
            :class:`psaq_mm.calibration.blocks.BlockTaps`.

    Raises:
        ConfigError: A part that does not exist.
        UnsupportedModelError: ``blocks`` of a model that has none.
    """

    def __init__(
        self, model: nn.Module, parts: Optional[Sequence[str]] = None, max_proposals: int = 100, block_stride: int = 3
    ):
        parts = default_parts(model) if parts is None else parts
        unknown = [p for p in parts if p not in PARTS]
        if unknown:
            raise ConfigError(
                f'distil={list(parts)} names no part {unknown[0]!r} of a model: use some of {", ".join(PARTS)}'
            )
        self.task = task_of(model)
        self.model = model
        self.parts = tuple(parts)
        self.max_proposals = max_proposals
        self.block_stride = block_stride
        self._blocks = BlockTaps(find_backbone(model), block_stride) if 'blocks' in self.parts else None

    @property
    def image_spec(self) -> ImageSpec:
        """Colour normalization, channels and range: from the config (:class:`ModelInput`), else from
        ``data_preprocessor`` and the first layer, for pictures of 8 bits.

        Raises:
            ConfigError: The preprocessor's mean and std are not of pictures of 8 bits, or of another number of
                channels.
        """
        known = getattr(self.model, 'psaq_mm_input', None)
        if known is not None:
            return known.spec
        channels = input_channels(self.model)
        spec = ImageSpec.from_preprocessor(getattr(self.model, 'data_preprocessor', None), channels=channels)
        if spec.channels != channels and 4 * spec.channels != channels:  # YOLOX puts four pixels into one first
            raise ConfigError(
                f'data_preprocessor.mean has {spec.channels} values and the model takes {channels} channels: give one '
                'value, or one of each channel'
            )
        return spec

    @property
    def min_size(self) -> int:
        """The least image side, in pixels: one attention window, or one patch under global attention."""
        return self._description.min_side(find_backbone(self.model))

    @property
    def fixed_size(self) -> Optional[Tuple[int, int]]:
        """The only (height, width) that the position embedding takes; None where it takes several."""
        return self._description.fixed_size(network_of(find_backbone(self.model)))

    @property
    def prefix_tokens(self) -> int:
        """Tokens before those of the patches: 0 for Swin, 1 for ViT and DeiT, 2 for a distilled DeiT."""
        return self._description.prefix_tokens(network_of(find_backbone(self.model)))

    @property
    def _description(self) -> Backbone:
        return backbone_of(network_of(find_backbone(self.model))) or Backbone()

    @property
    def num_classes(self) -> Optional[int]:
        """Classes of a classifier; None for every other task, and for a classifier without a head."""
        return self.task.num_classes(self.model)

    # ------------------------------------------------------------------ forwards
    def features(self, images: Tensor) -> Tuple[List[Tensor], List[Tensor]]:
        """Outputs of backbone and neck for normalized ``images`` (B, C, H, W). Without a neck, or with one of
        pre-training, those of the backbone twice.
        """
        backbone = find_backbone(self.model)
        stages = backbone.forward_features(images) if is_timm(backbone) else backbone(images)
        stages = list(stages) if isinstance(stages, (tuple, list)) else [stages]
        neck = getattr(self.model, 'neck', None)
        if backbone is self.model or neck is None or is_pretraining(self.model):
            return stages, stages
        levels = neck(tuple(stages))
        return stages, list(levels) if isinstance(levels, (tuple, list)) else [levels]

    def outputs(self, images: Tensor, chosen: Any = None) -> List[Tensor]:
        """The tensors that the student learns from the teacher, in this order: blocks, stages, neck levels, those of
        the head.

        Args:
            images: Normalized, (B, C, H, W).
            chosen: As for :meth:`run`.
        """
        return self.run(images, chosen=chosen).parts

    def run(self, images: Tensor, with_logits: bool = False, chosen: Any = None) -> TaskOutputs:
        """One forward pass: the outputs to distil, and a classifier's logits where ``with_logits`` asks for them.

        Args:
            images: Normalized, (B, C, H, W).
            with_logits: Run a classifier's head, also where it is not distilled.
            chosen: :attr:`TaskOutputs.chosen` of another model's pass over the same images: a student decodes the
                queries of its teacher, so that each has the same meaning in both.
        """
        recording = nullcontext([]) if self._blocks is None else self._blocks.record(images.requires_grad)
        with recording as blocks:
            stages, levels = self.features(images)
        tensors: List[Tensor] = list(blocks)
        if 'backbone' in self.parts:
            tensors += _tensors(stages)
        if 'neck' in self.parts and levels is not stages:
            tensors += levels
        wants_logits = with_logits and self.num_classes is not None
        dense: List[Tensor] = []
        if 'head' in self.parts or wants_logits:
            outputs, chosen = self.task.head_outputs(self.model, images, levels, chosen)
            dense = _tensors(outputs)
        if 'head' in self.parts:
            tensors += dense
        return TaskOutputs(tensors, _logits(dense) if wants_logits else None, chosen)

    @torch.no_grad()
    def calibration_forward(self, images: Tensor, scope: str = 'backbone') -> None:
        """Run every layer that ``scope`` quantizes once on ``images`` (B, C, H, W)."""
        if scope == 'backbone':
            find_backbone(self.model)(images)  # a timm network holds its head: it runs too
            return
        self.task.run_heads(self.model, images, self.features(images)[1], self.max_proposals)

    # ------------------------------------------------------------------ RoI heads
    @torch.no_grad()
    def proposals(self, images: Tensor) -> Optional[List[Tensor]]:
        """The RPN's best boxes for ``images`` (B, C, H, W), (n, 4) an image; None without RoI heads."""
        return self.task.proposals(self.model, images, self.features(images)[1], self.max_proposals)

    @torch.no_grad()
    def roi_outputs(self, images: Tensor, proposals: List[Tensor]) -> List[Tensor]:
        """Class scores, box deltas and masks of every stage of the RoI heads on given boxes, one row a RoI."""
        return self.task.roi_outputs(self.model, images, self.features(images)[1], proposals)
