# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""RepQ-ViT as its released procedure runs, written down once more in the plainest way, beside this package's own.

What the method itself loses on the images at hand, so that a loss of ours can be told from one of the method's::

    python benchmarks/repq_reference.py CONFIG [--bits 4 6] [--seeds 0 1 2] [--images 32]

CONFIG is a classifier of timm's VisionTransformer or DeiT with a training and a test set, such as
``benchmarks/image_folder.py`` writes. Both are calibrated on the same images of the training set and tested on the
whole test set.

- ``reference``: arXiv 2212.08254 and what its released code adds. Every quantizer takes its range from the first batch
  that reaches it, all quantizers before it switched on (layer after layer); a Python loop over channels; candidates
  .999, .9999, .99999 by squared error; the mean zero point of the channels is no integer, unless
  ``--integer-zero-point``; weights again after folding.
- ``ours``: the preset ``repq``, ranges from one full-precision pass, histograms instead of sorted values, integer zero
  points.

Prints top-1, the paired difference to full precision and the agreement with it, a line a seed, and the means.
"""

import argparse
import copy
import math
import sys
import time
from pathlib import Path
from typing import Callable, List, Optional, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CANDIDATES = (0.999, 0.9999, 0.99999)


def steps_of(values: Tensor, bits: int) -> Tuple[float, float]:
    """Scale and zero point of the candidate range of least squared error."""
    flat = values.reshape(-1).numpy()
    highs, lows = np.quantile(flat, CANDIDATES), np.quantile(flat, [1 - c for c in CANDIDATES])
    best = (math.inf, 1.0, 0.0)
    for low, high in zip(lows.tolist(), highs.tolist()):
        scale = max((high - low) / (2**bits - 1), 1e-8)
        zero = float(round(-low / scale))
        error = float((affine(values, scale, zero, bits) - values).pow(2).mean())
        best = min(best, (error, scale, zero))
    return best[1:]


def affine(x: Tensor, scale, zero, bits: int) -> Tensor:
    return (((x / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale


class Activation:
    """A quantizer that sets itself on what it sees first."""

    def __init__(self, bits: int, channels: bool = False):
        self.bits, self.channels, self.steps = bits, channels, None

    def __call__(self, x: Tensor) -> Tensor:
        if self.steps is None:
            self.steps = self._each_channel(x) if self.channels else steps_of(x, self.bits)
        return affine(x, *self.steps, self.bits)

    def _each_channel(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        found = [steps_of(x[..., c], self.bits) for c in range(x.shape[-1])]
        scale, zero = torch.tensor([s for s, _ in found]), torch.tensor([z for _, z in found])
        dead = scale < 1e-4 * scale.mean()  # a constant channel has no scale; DeiT-Tiny has one
        scale[dead], zero[dead] = scale[~dead].mean(), 0.0
        return scale, zero


class Softmax:
    """Log-sqrt2 codes (section 3.3)."""

    def __init__(self, bits: int):
        self.levels, self.delta = 2**bits, None

    def codes(self, x: Tensor, delta: float) -> Tensor:
        codes = (-2 * (x / delta).log2()).round()
        kept = codes.clamp(0, self.levels - 1)
        values = 2 ** -(kept / 2).ceil() * torch.where(kept % 2 == 1, math.sqrt(2), 1.0) * delta
        return torch.where(codes >= self.levels, 0.0, values)

    def __call__(self, x: Tensor) -> Tensor:
        if self.delta is None:
            deltas = np.quantile(x.reshape(-1).numpy(), CANDIDATES).tolist()
            self.delta = min(deltas, key=lambda d: float((self.codes(x, d) - x).pow(2).mean()))
        return self.codes(x, self.delta)


class Layer(nn.Module):
    """Linear or convolution with quantized input and weight."""

    def __init__(self, layer: nn.Module, bits: int, input_bits: Optional[int] = None, channels: bool = False):
        super().__init__()
        self.layer, self.bits, self.input = layer, bits, Activation(input_bits or bits, channels)
        self.weight: Optional[Tensor] = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        if self.weight is None:
            rows = [affine(row, *steps_of(row, self.bits), self.bits) for row in self.layer.weight.flatten(1)]
            self.weight = torch.stack(rows).view_as(self.layer.weight)
        if isinstance(self.layer, nn.Conv2d):
            return F.conv2d(x, self.weight, self.layer.bias, self.layer.stride)
        return F.linear(x, self.weight, self.layer.bias)


def attention_forward(attention: nn.Module, bits: int) -> Callable[[Tensor], Tensor]:
    query, key, value, weights = Activation(bits), Activation(bits), Activation(bits), Softmax(bits)

    def forward(x: Tensor, *_, **__) -> Tensor:
        B, N, C = x.shape
        q, k, v = attention.qkv(x).reshape(B, N, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = query(q) @ key(k).transpose(-2, -1) * attention.scale
        out = weights(scores.softmax(-1)) @ value(v)
        return attention.proj(out.transpose(1, 2).reshape(B, N, C))

    return forward


def fold(norm: nn.LayerNorm, layer: Layer, integer: bool) -> None:
    """Equations 6 to 8: one scale and zero point for all channels, the rest into the LayerNorm and the Linear."""
    scale, zero = layer.input.steps
    one_scale, one_zero = scale.mean(), zero.mean().round() if integer else zero.mean()
    ratio, shift = scale / one_scale, -zero * one_scale + one_zero * one_scale
    weight = layer.layer.weight.data
    norm.weight.data, norm.bias.data = norm.weight.data / ratio, norm.bias.data / ratio - shift
    layer.layer.bias.data += weight @ (ratio * shift)
    layer.layer.weight.data = weight * ratio
    layer.input.steps, layer.input.channels, layer.weight = (one_scale, one_zero), False, None


@torch.no_grad()
def reference(network: nn.Module, images: Tensor, bits: int, integer: bool) -> nn.Module:
    """Timm's VisionTransformer, quantized on ``images``."""
    network = copy.deepcopy(network)
    network.patch_embed.proj = Layer(network.patch_embed.proj, bits, input_bits=8)
    network.head = Layer(network.head, bits)
    for block in network.blocks:
        block.attn.qkv, block.attn.proj = Layer(block.attn.qkv, bits, channels=True), Layer(block.attn.proj, bits)
        block.mlp.fc1, block.mlp.fc2 = Layer(block.mlp.fc1, bits, channels=True), Layer(block.mlp.fc2, bits)
        block.attn.forward = attention_forward(block.attn, bits)
    network(images)
    for block in network.blocks:
        fold(block.norm1, block.attn.qkv, integer)
        fold(block.norm2, block.mlp.fc1, integer)
    network(images)  # the weights' ranges anew
    return network


@torch.no_grad()
def ours(config, build: Callable, images: Tensor, bits: int) -> nn.Module:
    from psaq_mm.quantization import calibrate

    model = build(dict(preset=f'repq_w{bits}a{bits}', scope='full'))
    calibrate(model, lambda: model.model(images))
    return model.model


@torch.no_grad()
def predictions(network: nn.Module, batches: List[Tensor]) -> Tensor:
    return torch.cat([network(batch).argmax(1) for batch in batches])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('--bits', type=int, nargs='+', default=[4], choices=range(3, 9))
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--images', type=int, default=32)
    parser.add_argument('--integer-zero-point', action='store_true')
    args = parser.parse_args()

    from mmengine.registry import DATASETS

    from psaq_mm.commands.common import load_config
    from psaq_mm.commands.quiet import silence
    from psaq_mm.engine.building import build_model
    from psaq_mm.engine.checkpoint import load_weights, read_checkpoint
    from psaq_mm.engine.samples import build_source
    from psaq_mm.pictures import ImageSpec, SampleStream
    from psaq_mm.quantization import is_quantizer_key, set_mode

    config = load_config(args.config)
    checkpoint = read_checkpoint(config.load_from)

    def build(quant) -> nn.Module:
        model = build_model(config, dict(config.model, quant=quant))
        load_weights(model, checkpoint, config.load_from)
        return model.eval()

    with silence():
        float_model = build(dict(preset='w8a8', scope='full'))
        set_mode(float_model, 'off')
        dataset = DATASETS.build(config.test_dataloader.dataset)
        batches, labels = [], []
        for first in range(0, len(dataset), 50):
            items = [dataset[i] for i in range(first, min(first + 50, len(dataset)))]
            data = dict(inputs=[i['inputs'] for i in items], data_samples=[i['data_samples'] for i in items])
            batches.append(float_model.data_preprocessor(data, training=False)['inputs'])
            labels += [int(i['data_samples'].gt_label) for i in items]
    truth, network = torch.tensor(labels), float_model.model
    if not all(hasattr(network, name) for name in ('blocks', 'patch_embed', 'head')):
        print(f'{type(network).__name__} is no VisionTransformer of timm: the reference knows no other')
        return 2
    import timm

    plain = timm.create_model(config.model.model_name, pretrained=False).eval()
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if not is_quantizer_key(k)})
    full = predictions(network, batches)
    accuracy = (full == truth).float()
    print(f'full precision: top-1 {100 * accuracy.mean():.2f} of {len(truth)} images')
    for bits in args.bits:
        for name in ('reference', 'ours'):
            rows = []
            for seed in args.seeds:
                source = build_source('real', float_model, config, seed)
                images = SampleStream(source, tuple(batches[0].shape[-2:]), ImageSpec(), seed).take(args.images)
                begun = time.perf_counter()
                made = (
                    reference(plain, images, bits, args.integer_zero_point)
                    if name == 'reference'
                    else ours(config, build, images, bits)
                )
                seconds = time.perf_counter() - begun
                found = predictions(made, batches)
                difference = ((found == truth).float() - accuracy).mean()
                rows.append((100 * float(difference), 100 * float((found == full).float().mean())))
                print(
                    f'W{bits}A{bits} {name:9s} seed {seed}: top-1 {100 * accuracy.mean() + rows[-1][0]:.2f}  '
                    f'difference {rows[-1][0]:+.2f}  agreement {rows[-1][1]:.1f}  {seconds:.1f} s',
                    flush=True,
                )
            low, high = min(r[0] for r in rows), max(r[0] for r in rows)
            print(
                f'W{bits}A{bits} {name:9s} mean of {len(rows)}: difference {np.mean([r[0] for r in rows]):+.2f} '
                f'({low:+.1f} to {high:+.1f})  '
                f'agreement {np.mean([r[1] for r in rows]):.1f}',
                flush=True,
            )
    return 0


if __name__ == '__main__':
    sys.exit(main())
