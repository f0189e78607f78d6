"""Ranges of activations learned with the weights, by the gradient of the step size."""

from typing import Iterator, List

import torch
from torch import Tensor, nn

from psaq_mm.errors import DataError
from psaq_mm.quantization.convert import quantizers
from psaq_mm.quantization.primitives import MIN_SCALE
from psaq_mm.quantization.quantizers import AffineQuantizer

__all__ = ['learn_ranges_', 'learned_ranges', 'update_ranges_']

MAX_SCALE = torch.finfo(torch.float32).max / 2**9
"""Codes, less their zero point, are below 2**9: products with them stay finite too."""


def learn_ranges_(model: nn.Module) -> List[Tensor]:
    """Give each activation quantizer of a model something to learn its scale by.

    Source: learned step sizes (LSQ, Esser et al., arXiv 1902.08153, section 2.1), here of the scale's logarithm, so
    that one learning rate serves scales of any magnitude, and the scale stays positive. The zero point stays.
    Logarithmic quantizers, and weights, keep their scales.

    Args:
        model: Quantized model, on its device.

    Returns:
        One scalar a quantizer, a leaf that is 0: after an optimizer's step it is how far the scale's logarithm moves,
        which :func:`update_ranges_` does. None of them is in the state dict, as 0 is all that they ever are between two
        steps.

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
    """What :func:`learn_ranges_` made, in the order of the model's quantizers; empty without it."""
    return [quantizer.log_ratio for quantizer in _learning(model)]


@torch.no_grad()
def update_ranges_(model: nn.Module) -> None:
    """Move each learned scale as far as the optimizer has moved its logarithm, which is 0 again afterwards.

    A scale stays a normal, finite float32, however large the step.

    Raises:
        DataError: The optimizer has made a logarithm NaN (names the quantizer). No scale has moved then.
    """
    learning = list(_learning(model))
    if learning and bool(torch.stack([quantizer.log_ratio for quantizer in learning]).isnan().any()):
        name = next(quantizer.name for quantizer in learning if bool(quantizer.log_ratio.isnan()))
        raise DataError(
            f'The learned scale of quantizer {name!r} became NaN: lower its learning rate, or leave out steps whose '
            f'gradients '
            'are not finite.'
        )
    for quantizer in learning:
        quantizer.scale.mul_(quantizer.log_ratio.exp()).clamp_(MIN_SCALE, MAX_SCALE)
        quantizer.log_ratio.zero_()


def _learning(model: nn.Module) -> Iterator[AffineQuantizer]:
    return (quantizer for _, quantizer in quantizers(model) if getattr(quantizer, 'log_ratio', None) is not None)
