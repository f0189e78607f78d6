# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Rotating a whole model: its heads, and those of its residual streams whose readers are known."""

from typing import List, NamedTuple, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.calibration import find_attention
from psaq_mm.errors import DataError, UnsupportedModelError
from psaq_mm.models.adapters.streams import is_identity, streams_of
from psaq_mm.models.scope import find_backbone, network_of
from psaq_mm.models.task import TaskModel
from psaq_mm.quantization import full_float32, in_mode, quantizers, random_rotation, rotate_heads_, rotate_stream_

__all__ = ['RotationReport', 'rotate_model_']

TOLERANCE = 1e-3
"""Greatest change of an output, beside its own spread: float32 alone gives 1e-6 to 1e-5, and TF32, which is off here,
up to 2e-3."""


class RotationReport(NamedTuple):
    """What :func:`rotate_model_` did.

    Attributes:
        heads: Heads whose queries, keys or values were rotated.
        streams: Names and widths of the residual streams that were.
        left: Why others were not, one line each.
    """

    heads: int
    streams: List[Tuple[str, int]]
    left: List[str]

    def __str__(self) -> str:
        streams = ', '.join(f'{name} ({width} channels)' for name, width in self.streams)
        left = f'; left as they are: {"; ".join(self.left)}' if self.left else ''
        return f'{self.heads} heads{" and " + streams if streams else ""}{left}'


@torch.no_grad()
def rotate_model_(model: nn.Module, size: Tuple[int, int], seed: int = 0) -> RotationReport:
    """Rotate what a model computes in, in place, before it is calibrated: in full precision it stays the same function.

    Random rotations, from ``seed`` alone: the same for every rank and every time. Norms that read a rotated stream end
    with gains of 1, and the maps that a backbone hands to a known neck or head are rotated too, with the convolutions
    that read them.

    Args:
        model: Detector, segmentor, classifier or backbone with full-precision weights, its layers quantized already or
            not.
        size: (height, width) of the noise that it is checked with.
        seed: Seed of the rotations.

    Returns:
        What was rotated, and what was not and why.

    Raises:
        UnsupportedModelError: The outputs came out otherwise than before. The model has its old weights then.
    """
    backbone, heads = find_backbone(model), 0
    streams, left = streams_of(model, network_of(backbone))
    parts = _parts(model) if streams else ('backbone',)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    outputs = _outputs(model, parts, size)
    generator = torch.Generator().manual_seed(seed)
    for _, attention in find_attention(backbone):
        scores = is_identity(getattr(attention, 'q_norm', None), getattr(attention, 'k_norm', None))
        values = is_identity(getattr(attention, 'norm', None)) and not getattr(attention, 'v_shortcut', False)
        rotate_heads_(attention.qkv, attention.proj, attention.num_heads, generator, scores=scores, values=values)
        heads += attention.num_heads if scores or values else 0
    done = []
    for stream in streams:
        try:
            rotate_stream_(
                random_rotation(stream.channels, generator, keep_mean=True),
                stream.writers,
                stream.tokens,
                stream.readers,
            )
        except DataError as error:
            left.append(f'{stream.name}: {error}')
        else:
            done.append((stream.name, stream.channels))
    change = max((_change(old, new) for old, new in zip(outputs, _outputs(model, parts, size))), default=0.0)
    if not change <= TOLERANCE:
        for name, value in model.named_parameters():
            value.copy_(before[name])
        raise UnsupportedModelError(
            f'rotating {type(model).__name__} changed its outputs by {change:.1%} of their spread, so something '
            'reads its tokens that is not known here: set dfq.rotate=False'
        )
    return RotationReport(heads, done, left)


def _parts(model: nn.Module) -> Tuple[str, ...]:
    """What lies behind everything that reads a rotated stream: a detector's neck, any other model's head."""
    return ('neck',) if any(hasattr(model, name) for name in ('rpn_head', 'bbox_head')) else ('head',)


def _outputs(model: nn.Module, parts: Tuple[str, ...], size: Tuple[int, int]) -> List[Tensor]:
    """What parts of a model give in full precision for an image of noise."""
    view = TaskModel(model, parts)
    noise = torch.randn(1, view.image_spec.channels, *size, generator=torch.Generator().manual_seed(0))
    with full_float32(), in_mode([quantizer for _, quantizer in quantizers(model)], 'off'):
        return [out.float().clone() for out in view.outputs(noise.to(next(model.parameters()).device))]


def _change(old: Tensor, new: Tensor) -> float:
    return float((new - old).abs().max() / old.std(correction=0).clamp_min(torch.finfo(torch.float32).tiny))
