# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Small transformers with the attention layout of ViT and Swin."""

from typing import List, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from psaq_mm.quantization import padded


class Attention(nn.Module):
    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, channels = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, channels))


class Block(nn.Module):
    def __init__(self, channels: int, num_heads: int, window: Optional[int] = None) -> None:
        super().__init__()
        self.norm, self.attn, self.window = nn.LayerNorm(channels), Attention(channels, num_heads), window
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + (self.attn(self.norm(x)) if self.window is None else self.windows(x))
        return x + self.mlp(x)

    def windows(self, x: Tensor) -> Tensor:
        """Attention inside windows of (batch, height, width, channels), padded at the right and below."""
        side = self.window
        batch, height, width, channels = x.shape
        down, right = -height % side, -width % side
        x = F.pad(self.norm(x), (0, 0, 0, right, 0, down))
        rows, columns = x.shape[1] // side, x.shape[2] // side
        real = torch.zeros(rows * side, columns * side, dtype=torch.bool)
        real[:height, :width] = True
        x = x.view(batch, rows, side, columns, side, channels).transpose(2, 3).reshape(-1, side**2, channels)
        with padded(self.attn, real.view(rows, side, columns, side).transpose(1, 2).reshape(-1, side**2)):
            x = self.attn(x).view(batch, rows, columns, side, side, channels).transpose(2, 3)
        return x.reshape(batch, rows * side, columns * side, channels)[:, :height, :width]


class ToyTransformer(nn.Module):
    """Two blocks on patches of 4 x 4; with a window, Swin's layout without class token, else ViT's with one.

    Args:
        checkpointing: None, 'reentrant' or 'plain' activation checkpointing of the blocks.
    """

    def __init__(
        self, window: Optional[int] = None, channels: int = 3, checkpointing: Optional[str] = None, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Conv2d(channels, 16, 4, 4)
            self.token = nn.Parameter(torch.randn(1, 1, 16))
            self.blocks = nn.ModuleList(Block(16, 2, window) for _ in range(2))
            self.head = nn.Linear(16, 5)
        self.window, self.checkpointing = window, checkpointing

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        if self.window is None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        else:
            x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing == 'reentrant')
        return self.head(x.flatten(1, -2).mean(1))


class Outputs(NamedTuple):
    parts: List[Tensor]
    logits: Optional[Tensor]


class ToyTask:
    """What :class:`psaq_mm.calibration.Network` asks of a network, around a :class:`ToyTransformer`."""

    min_size, fixed_size, prefix_tokens, num_classes = 4, None, 1, 5

    def __init__(self, model: nn.Module, image_spec) -> None:
        self.model, self.image_spec, self.calls = model, image_spec, 0

    def run(self, images: Tensor, with_logits: bool = False) -> Outputs:
        logits = self.model(images)
        return Outputs([logits, 2 * logits], logits if with_logits else None)

    def outputs(self, images: Tensor) -> List[Tensor]:
        return self.run(images).parts

    @torch.no_grad()
    def calibration_forward(self, images: Tensor, scope: str = 'backbone') -> None:
        self.calls += 1
        self.model(images)
