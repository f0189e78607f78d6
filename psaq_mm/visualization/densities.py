# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How alike the patches of an image are in the eyes of each attention block: the quantity that PSAQ-ViT spreads out.

On pictures the patches of an image answer to different things and the density of their cosine similarity is wide; on
Gaussian noise all patches look the same to the model and the density is narrow (PSAQ-ViT, arXiv 2203.02250, figure 2).
"""

from typing import Callable, Dict, List, NamedTuple, Optional

import torch
from torch import Tensor, nn

from psaq_mm.errors import DataError
from psaq_mm.psaq_vit import AttentionTaps
from psaq_mm.quantization import RowMask

__all__ = ['BlockDensity', 'similarity_densities', 'pair_histogram']

_PAIRS = 1 << 24  # similarities held at a time


class BlockDensity(NamedTuple):
    """Density of patch similarity in one block, over all images given.

    Attributes:
        name: Dotted name of the attention module.
        centers: Middles of the bins of -1 .. 1, shape (bins,).
        density: Share of pairs in a bin divided by the bin's width, shape (bins,), float64; times the width it
            sums to one.
        entropy: Differential entropy of the density, in nats; at most log 2 = 0.69, the uniform one's.
    """

    name: str
    centers: Tensor
    density: Tensor
    entropy: float

    @property
    def mean(self) -> float:
        """Mean similarity, up to half a bin."""
        return float((self.centers * self.density).sum() / self.density.sum())

    @property
    def spread(self) -> float:
        """Standard deviation of the similarity, up to half a bin."""
        second = float((self.centers.square() * self.density).sum() / self.density.sum())
        return max(second - self.mean**2, 0.0) ** 0.5


def pair_histogram(tokens: Tensor, valid: Optional[Tensor], bins: int) -> Tensor:
    """Count pairs of different tokens of a group by their cosine similarity.

    Args:
        tokens: Shape (groups, N, D).
        valid: Boolean (groups, N), or (W, N) where the pattern repeats every W groups; tokens that are not valid
            take no part. None: all do.
        bins: Equal bins of -1 .. 1.

    Returns:
        Counts, shape (bins,), float64. A token with itself, always 1, says nothing about the image and is left out,
        unlike in the entropy that is optimized.

    Raises:
        DataError: A token is NaN or infinite.
    """
    tokens = tokens.detach().float()
    if not tokens.isfinite().all():
        raise DataError('an attention output holds NaN or infinite values: check the weights of the model')
    groups, length, _ = tokens.shape
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    pairs = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
    if valid is not None:
        valid = RowMask(valid).rows(tokens)
    counts = torch.zeros(bins, dtype=torch.float64)
    step = max(1, _PAIRS // length**2)
    for begin in range(0, groups, step):
        some = unit[begin : begin + step]
        taken = pairs.expand(len(some), -1, -1)
        if valid is not None:
            rows = valid[begin : begin + step]
            taken = taken & rows.unsqueeze(1) & rows.unsqueeze(2)
        similarity = (some @ some.transpose(1, 2))[taken].clamp_(-1, 1)
        index = ((similarity + 1) * (bins / 2)).long().clamp_(max=bins - 1)
        counts += torch.bincount(index, minlength=bins).double().cpu()
    return counts


@torch.no_grad()
def similarity_densities(
    model: nn.Module,
    samples: Tensor,
    forward: Optional[Callable[[Tensor], object]] = None,
    bins: int = 100,
    batch_size: int = 8,
    drop_tokens: int = 0,
) -> List[BlockDensity]:
    """Density of patch similarity in every attention block of ``model``, for a set of images.

    Args:
        model: A model with attention that :class:`psaq_mm.psaq_vit.AttentionTaps` finds. Rows of padded queries take
            no part where its attention tells them (:func:`psaq_mm.quantization.padded`), as quantized models' does,
            quantizers on or off.
        samples: Normalized images, shape (n, C, H, W), on any device.
        forward: Runs the blocks. Defaults to None: ``model.backbone``, or ``model`` where it is a backbone.
        bins: Equal bins of -1 .. 1.
        batch_size: Images in a forward pass.
        drop_tokens: Leading tokens that are no patch: 1 for a class token, 2 with a distillation token.

    Returns:
        One density a block, in the order of the calls.

    Raises:
        UnsupportedModelError: The model has no such attention.
        DataError: No images, or NaN in an attention output.

    Example:
        >>> wide = similarity_densities(model, samples)
        >>> narrow = similarity_densities(model, GaussianNoise()(8, (224, 224), spec))
    """
    if samples.dim() != 4 or not len(samples) or bins < 1:
        raise DataError(
            f'samples of shape {tuple(samples.shape)} in {bins} bins give no density: give (n, C, H, W) and a bin'
        )
    taps = AttentionTaps(model, drop_tokens)
    run = forward or getattr(model, 'backbone', model)
    counts: Dict[str, Tensor] = {}
    device = next((p.device for p in model.parameters()), samples.device)
    for batch in samples.split(batch_size):
        batch = batch.to(device)
        with taps.record(batch) as record:
            run(batch)
        for tap in record:
            histogram = pair_histogram(tap.tokens, tap.valid, bins)
            counts[tap.name] = counts[tap.name] + histogram if tap.name in counts else histogram
    return [_density(name, count) for name, count in counts.items()]


def _density(name: str, counts: Tensor) -> BlockDensity:
    width = 2 / len(counts)
    total = counts.sum()
    if total == 0:
        raise DataError(f'no group of {name} holds two patches, so there is no similarity to show: give larger samples')
    density = counts / (total * width)
    filled = density[density > 0]
    entropy = -float((filled * filled.log()).sum() * width)
    centers = -1 + width * (torch.arange(len(counts), dtype=torch.float64) + 0.5)
    return BlockDensity(name, centers, density, entropy)
