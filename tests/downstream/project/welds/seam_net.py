"""A backbone of this project. Seams are lines: tokens attend along their row of the map alone."""

from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import nn


class RowAttention(nn.Module):
    """Self-attention inside each row of a map (B, H, W, C)."""

    def __init__(self, channels, heads):
        super().__init__()
        self.num_heads = heads
        self.scale = (channels // heads) ** -0.5
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x):
        B, H, W, C = x.shape
        q, k, v = self.qkv(x).reshape(B * H, W, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, H, W, C))


class SeamBlock(nn.Module):
    """Attention and a feed-forward network, with a LayerNorm before each."""

    def __init__(self, channels, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = RowAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, 2 * channels)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(2 * channels, channels)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


@MODELS.register_module()
class SeamNet(BaseModule):
    """Two stages of blocks, of strides 8 and 16; the output of each is normalized."""

    def __init__(self, channels=(16, 32), heads=(1, 2), depth=2, init_cfg=None):
        super().__init__(init_cfg)
        self.stem = nn.Conv2d(3, channels[0], 8, 8)
        self.downsample = nn.Conv2d(channels[0], channels[1], 2, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(*(SeamBlock(width, number) for _ in range(depth))) for width, number in zip(channels, heads)
        )
        self.norms = nn.ModuleList(map(nn.LayerNorm, channels))

    def forward(self, images):
        outputs, x = [], self.stem(images)
        for number, (stage, norm) in enumerate(zip(self.stages, self.norms)):
            x = self.downsample(outputs[-1]) if number else x
            x = norm(stage(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
            outputs.append(x)
        return tuple(outputs)
