"""Swin Transformer in plain PyTorch under the names of its own releases, written from the paper (arXiv 2103.14030) for
comparison."""

import torch
import torch.nn.functional as F
from torch import nn


class _Attention(nn.Module):
    """Section 3.2: scaled dot products inside a window plus a bias by relative position, equation 4."""

    def __init__(self, width, window, heads):
        super().__init__()
        self.window, self.heads = window, heads
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        place = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing='ij')).flatten(1)
        offset = place[:, :, None] - place[:, None, :] + window - 1  # of a query from a key, 0 .. 2 window - 2
        self.register_buffer('relative_position_index', offset[0] * (2 * window - 1) + offset[1])

    def forward(self, x, mask=None):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5
        scores = scores + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            scores = (scores.view(-1, len(mask), *scores.shape[1:]) + mask[:, None]).view(scores.shape)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


class _Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    """Figure 3 (b): window attention, shifted by half a window in every second block, and an MLP."""

    def __init__(self, width, window, heads, shift):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = (
            nn.LayerNorm(width),
            _Attention(width, window, heads),
            nn.LayerNorm(width),
            _Mlp(width),
        )
        self.window, self.shift = window, shift

    def _cut(self, x):
        n, height, width, channels = x.shape
        x = x.view(n, height // self.window, self.window, width // self.window, self.window, channels)
        return x.transpose(2, 3).reshape(-1, self.window**2, channels)

    def _paste(self, windows, n, height, width):
        x = windows.view(n, height // self.window, width // self.window, self.window, self.window, -1)
        return x.transpose(2, 3).reshape(n, height, width, -1)

    def _mask(self, height, width):
        """Tokens that the cyclic shift brought together do not see each other (section 3.2, figure 4)."""
        regions = torch.zeros(1, height, width, 1)
        for row, rows in enumerate(
            (slice(0, -self.window), slice(-self.window, -self.shift), slice(-self.shift, None))
        ):
            for column, columns in enumerate(
                (slice(0, -self.window), slice(-self.window, -self.shift), slice(-self.shift, None))
            ):
                regions[:, rows, columns] = 3 * row + column
        region = self._cut(regions)[..., 0]
        return torch.where(region[:, None] == region[:, :, None], 0.0, -100.0)

    def forward(self, x):
        n, height, width, _ = x.shape
        y = F.pad(self.norm1(x), (0, 0, 0, -width % self.window, 0, -height % self.window))
        rows, columns = y.shape[1:3]
        mask = self._mask(rows, columns) if self.shift else None
        y = self._cut(torch.roll(y, (-self.shift, -self.shift), (1, 2)))
        y = torch.roll(self._paste(self.attn(y, mask), n, rows, columns), (self.shift, self.shift), (1, 2))
        x = x + y[:, :height, :width]
        return x + self.mlp(self.norm2(x))


class _Merging(nn.Module):
    """Section 3.1: the four neighbours side by side, rows first, then half as many channels."""

    def __init__(self, width):
        super().__init__()
        self.reduction, self.norm = nn.Linear(4 * width, 2 * width, bias=False), nn.LayerNorm(4 * width)

    def forward(self, x):
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
        return self.reduction(self.norm(x))


class _Stage(nn.Module):
    def __init__(self, width, depth, heads, window, last):
        super().__init__()
        self.blocks = nn.ModuleList(_Block(width, window, heads, window // 2 * (i % 2)) for i in range(depth))
        self.downsample = None if last else _Merging(width)


class _PatchEmbed(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(3, width, 4, 4), nn.LayerNorm(width)


class OriginalSwin(nn.Module):
    """Backbone of a detector: the stages' outputs, each after a LayerNorm of its own.

    Args:
        width: Channels of the first stage.
        depths, heads: A number a stage.
        window: Side of a window in tokens.
        positions: Tokens a side of an absolute position embedding, (1, C, H, W) as the detectors have it; None without.
    """

    def __init__(self, width=16, depths=(2, 2, 2), heads=(1, 2, 4), window=7, positions=None):
        super().__init__()
        self.patch_embed = _PatchEmbed(width)
        self.absolute_pos_embed = (
            None if positions is None else nn.Parameter(torch.randn(1, width, positions, positions))
        )
        self.layers = nn.ModuleList(
            _Stage(width * 2**i, depth, heads[i], window, i == len(depths) - 1) for i, depth in enumerate(depths)
        )
        for i in range(len(depths)):
            self.add_module(f'norm{i}', nn.LayerNorm(width * 2**i))

    def forward(self, images):
        """(B, 3, H, W) to one (B, C, h, w) a stage."""
        x = self.patch_embed.norm(self.patch_embed.proj(images).permute(0, 2, 3, 1))
        if self.absolute_pos_embed is not None:
            x = x + self.absolute_pos_embed.permute(0, 2, 3, 1)
        found = []
        for i, stage in enumerate(self.layers):
            for block in stage.blocks:
                x = block(x)
            found.append(getattr(self, f'norm{i}')(x).permute(0, 3, 1, 2))
            x = x if stage.downsample is None else stage.downsample(x)
        return found
