# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The formulas of PSAQ-ViT written down plainly, everything expanded, gradients by autograd."""

import math
from typing import Optional

import torch
from torch import Tensor


def similarities(tokens: Tensor, broadcast: bool = False) -> Tensor:
    """All-pairs cosine similarity (groups, N, N), by a matrix product or by broadcasting every pair."""
    if broadcast:
        return torch.cosine_similarity(tokens.unsqueeze(1), tokens.unsqueeze(2), dim=3)
    norm = tokens.norm(dim=-1, keepdim=True)
    unit = torch.where(norm > 1e-8, tokens / norm.clamp(min=1e-8), torch.zeros_like(tokens))
    return unit @ unit.transpose(1, 2)


def kernel_density(samples: Tensor, grid: Tensor, bandwidth: float) -> Tensor:
    """Density (points,) or (images, points) of samples (..., M) at grid (points,)."""
    offsets = grid.unsqueeze(1) - samples.unsqueeze(-2)
    kernel = torch.exp(-offsets.pow(2) / (2 * bandwidth**2))
    return (kernel / math.sqrt(2 * math.pi * bandwidth**2)).mean(-1)


def differential_entropy(density: Tensor, grid: Tensor, eps: float = 1e-4) -> Tensor:
    density = density + eps
    return torch.trapz(-density * density.log(), grid.expand_as(density), dim=-1)


def patch_similarity_entropy(
    tokens: Tensor,
    valid: Optional[Tensor] = None,
    points: int = 10,
    bandwidth: float = 0.01,
    eps: float = 1e-4,
    groups_per_image: int = 1,
    broadcast: bool = False,
) -> Tensor:
    groups, length, _ = tokens.shape
    images = groups // groups_per_image
    sims = similarities(tokens, broadcast)
    if valid is None:
        samples = list(sims.view(images, -1)) if not broadcast else sims.view(images, -1)
    else:
        valid = valid.repeat(groups // len(valid), 1)
        pairs = (valid.unsqueeze(1) & valid.unsqueeze(2)).view(images, -1)
        samples = [image[mask] for image, mask in zip(sims.view(images, -1), pairs)]
    low = min(s.min().item() for s in samples)
    high = max(s.max().item() for s in samples)
    grid = torch.linspace(low, high, points, dtype=tokens.dtype, device=tokens.device)
    if isinstance(samples, list) and valid is not None:
        density = torch.stack([kernel_density(s, grid, bandwidth) for s in samples])
    else:
        density = kernel_density(sims.view(images, -1), grid, bandwidth)
    return differential_entropy(density, grid, eps).mean()
