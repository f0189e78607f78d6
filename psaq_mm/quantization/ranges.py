"""Activation scales that are learned with the weights, by the gradient of the step size."""

from typing import Iterator, List, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.errors import DataError
from psaq_mm.quantization.convert import quantizers
from psaq_mm.quantization.primitives import MIN_SCALE
from psaq_mm.quantization.quantizers import AffineQuantizer

__all__ = ['learn_ranges_', 'learned_ranges', 'update_ranges_']

MAX_SCALE = torch.finfo(torch.float32).max / 2**9
"""A code minus its zero point is below 2**9, so that products with the scale stay finite."""


def learn_ranges_(model: nn.Module) -> List[Tensor]:
    """Add to each activation quantizer of a model a parameter that learns its scale.

    Source: learned step sizes (LSQ, Esser et al., arXiv 1902.08153, section 2.1), here of the scale's logarithm, so
    that one learning rate fits scales of any magnitude, and the scale stays positive. The zero point is not learned.
    Logarithmic quantizers and weights keep their scales.

    Args:
        model: Quantized model, on its device.

    Returns:
        One scalar per quantizer, a leaf that is 0. After an optimizer's step it is the change of the scale's logarithm,
        which :func:`update_ranges_` applies. It is not in the state dict, because it is 0 between two steps.

    Example:
        >>> optimizer = torch.optim.Adam(learn_ranges_(student), lr=1e-3)
        >>> loss(student(images)).backward()
        >>> optimizer.step()
        >>> update_ranges_(student)
    """
    for _, quantizer in quantizers(model):
        if isinstance(quantizer, AffineQuantizer) and quantizer.channel_axis is None:
            quantizer.log_ratio = torch.zeros((), device=quantizer.scale.device).requires_grad_()
    return learned_ranges(model)


def learned_ranges(model: nn.Module) -> List[Tensor]:
    """The parameters of :func:`learn_ranges_`, in the order of the model's quantizers; empty without it."""
    return [log_ratio for _, log_ratio in _learning(model)]


@torch.no_grad()
def update_ranges_(model: nn.Module) -> None:
    """Apply to each learned scale the change of its logarithm, which is 0 again afterwards.

    A scale stays a normal, finite float32, however large the step.

    Raises:
        DataError: The optimizer has made a logarithm NaN (names the quantizer). No scale has changed then.
    """
    learning = list(_learning(model))
    if learning and bool(torch.stack([log_ratio for _, log_ratio in learning]).isnan().any()):
        name = next(quantizer.name for quantizer, log_ratio in learning if bool(log_ratio.isnan()))
        raise DataError(
            f'The learned scale of quantizer {name!r} became NaN: lower its learning rate, or leave out steps whose '
            'gradients are not finite.'
        )
    for quantizer, log_ratio in learning:
        quantizer.scale.mul_(log_ratio.exp()).clamp_(MIN_SCALE, MAX_SCALE)
        log_ratio.zero_()


def _learning(model: nn.Module) -> Iterator[Tuple[AffineQuantizer, Tensor]]:
    for _, quantizer in quantizers(model):
        if isinstance(quantizer, AffineQuantizer) and quantizer.log_ratio is not None:
            yield quantizer, quantizer.log_ratio
