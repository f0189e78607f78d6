# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What fake quantization adds to forward and backward of a Swin-T at 512 x 512.

    python benchmarks/fake_quantization.py [--quick] [--part network | compile] [--device cuda]

- ``network``: the backbone (mmdet's, weights random, one image), float and quantized, in training: forward with
  gradients towards all weights, and backward. Forward and backward pass are timed apart, networks in turn, and the
  ratio is the median of the ratios of each turn. Ranges come from one picture and another one is run, so that some
  values are clipped. The weights are quantized in every forward pass, as one optimizer step after each pass asks for;
  ``held`` is the pass in which ``psaq_mm.quantization.hold_weights`` has them from a pass before (accumulated batches,
  activation checkpointing).
- ``compile``: the arithmetic of one large activation, value alone, against the plain formula under ``torch.compile``
  (needs a C++ compiler) and against ``torch.fake_quantize_per_tensor_affine``, with the share of codes in which each
  differs from ``quantize``. No claim is judged by it.

``--quick``: W8A8 alone, three turns, without ``held``, and no compilation.
"""

import copy
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import Row, in_turn, ratio_of, row, run_script  # noqa: E402
from psaq_mm.tables import markdown_table  # noqa: E402

PARTS = ('network', 'compile')
BOUND = 1.25
SIZE = 512
SPECS = ('w8a8', 'w4a8', 'w4a4')


def swin_tiny() -> nn.Module:
    """Mmdet's backbone as Mask R-CNN has it, weights random."""
    from mmdet.models import SwinTransformer

    torch.manual_seed(0)
    net = SwinTransformer(embed_dims=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7)
    net.eval()  # no DropPath, as in a run; gradients flow all the same
    return net


def pictures(size: int, device: str) -> List[Tensor]:
    """One picture for the ranges, and one to run: dead leaves."""
    from psaq_mm.pictures import DeadLeaves, ImageSpec

    spec = ImageSpec((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    return list(DeadLeaves().draw(range(2), (size, size), spec).to(device).split(1))


class Passes:
    """Forward and backward of a network, to be timed apart.

    Args:
        net: Backbone.
        image: What it sees.
    """

    def __init__(self, net: nn.Module, image: Tensor):
        self.net, self.image = net, image
        self.loss: Optional[Tensor] = None
        self.held = None

    def forward(self) -> None:
        self.net.zero_grad(set_to_none=True)
        self.loss = None
        self.loss = sum(stage.square().mean() for stage in self.net(self.image))

    def backward(self) -> None:
        self.loss.backward()

    def hold(self) -> None:
        from psaq_mm.quantization import hold_weights

        self.held = hold_weights(self.net)
        self.held.__enter__()

    def let_go(self) -> None:
        self.held.__exit__(None, None, None)


def network_rows(quick: bool, device: str) -> List[Row]:
    """Ratios of forward and backward, with and without quantizers."""
    from psaq_mm.models import quantize_model_
    from psaq_mm.quantization import calibrate

    size = SIZE
    first, image = pictures(size, device)
    base = swin_tiny().to(device)
    students = {}
    for spec in SPECS[:1] if quick else SPECS:
        net = copy.deepcopy(base)
        quantize_model_(net, spec)
        net.eval()
        calibrate(net, lambda net=net: net(first))
        students[spec] = Passes(net, image)
    control = Passes(base, image)
    calls: Dict[str, Callable[[], Any]] = {'float forward': control.forward, 'float backward': control.backward}
    for spec, passes in students.items():
        calls.update({f'{spec} forward': passes.forward, f'{spec} backward': passes.backward})
        if not quick:
            calls.update(
                {
                    f'{spec} hold': passes.hold,
                    f'{spec} fill': passes.forward,
                    f'{spec} held': passes.forward,
                    f'{spec} rest': passes.backward,
                    f'{spec} let go': passes.let_go,
                }
            )
    seconds = in_turn(calls, 3 if quick else 9, device)
    lines, found = [], []
    for spec in ('float', *students):
        part = {
            kind: seconds[f'{spec} {kind}'] for kind in ('forward', 'backward', 'held') if f'{spec} {kind}' in seconds
        }
        ratios = {
            kind: ratio_of(part[kind], seconds[f'float {"backward" if kind == "backward" else "forward"}'])
            for kind in part
        }
        lines.append(
            (
                spec,
                *(x for kind in ('forward', 'backward') for x in (_median(part[kind]), ratios[kind])),
                f'{_median(part["held"]):.3f} ({ratios["held"]:.3f})' if 'held' in part else '',
            )
        )
        found += [
            row(f'{kind} of Swin-T, {size} x {size}, {spec} over float', ratios[kind], BOUND)
            for kind in ('forward', 'backward')
            if spec != 'float'
        ]
    print(
        markdown_table(
            (f'Swin-T, {size} x {size}', 'forward s', 'ratio', 'backward s', 'ratio', 'forward, weights held'), lines
        ),
        flush=True,
    )
    return found


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def plain(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The formula as one writes it down, 8 bits."""
    offset = zero_point.to(torch.float32)
    return (((x / scale).round() + offset).clamp(0, 255) - offset) * scale


def compare_compiled(device: str) -> None:
    """Prints seconds and exactness of the plain formula, compiled and not, of torch's own kernel, and of ours."""
    from psaq_mm.quantization import choose_qparams, dequantize, fake_quantize, quantize

    torch.manual_seed(0)
    x = torch.randn(16384, 384, device=device)  # what fc2 of the first stage reads
    scale, zero_point = choose_qparams(x.min(), x.max(), 8, False)
    # Ties, where a multiplication with the inverse goes wrong.
    x[:64] = (torch.arange(64 * 384, device=device).view(64, 384) % 255 - zero_point + 0.5) * scale
    calls: Dict[str, Callable[[], Tensor]] = {
        'psaq_mm fake_quantize': lambda: fake_quantize(x, scale, zero_point, 0, 255),
        'plain formula': lambda: plain(x, scale, zero_point),
        'torch.fake_quantize_per_tensor_affine': lambda: torch.fake_quantize_per_tensor_affine(
            x, scale, zero_point, 0, 255
        ),
    }
    begun = time.perf_counter()
    try:
        compiled = torch.compile(plain)
        compiled(x, scale, zero_point)
        calls['plain formula, torch.compile'] = lambda: compiled(x, scale, zero_point)
        print(f'compiled in {time.perf_counter() - begun:.1f} s')
    except Exception as error:  # no compiler, or a platform without one: the reason is the result
        print(f'torch.compile does not work here: {type(error).__name__}: {str(error).splitlines()[0]}')
    expected = dequantize(quantize(x, scale, zero_point, 0, 255), scale, zero_point)
    seconds = in_turn(calls, 15, device, warm_up=3)
    lines = [
        (name, 1e9 * _median(seconds[name]) / x.numel(), int((call() != expected).sum()))
        for name, call in calls.items()
    ]
    print(
        markdown_table((f'{x.shape[0]} x {x.shape[1]}, without gradient', 'ns a value', 'values that differ'), lines),
        flush=True,
    )


def rows(quick: bool, device: str, parts: Sequence[str] = PARTS) -> List[Row]:
    """All claims of this script."""
    found: List[Row] = []
    if 'network' in parts:
        found += network_rows(quick, device)
    if 'compile' in parts and not quick:
        compare_compiled(device)
    return found


if __name__ == '__main__':
    sys.exit(run_script(rows, __doc__, PARTS))
