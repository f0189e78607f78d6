# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What finding the ranges costs beside the float forward of the same images, in time and in memory.

    python benchmarks/calibration.py [--quick] [--part time | memory] [--device cuda]

The backbone of a Swin-S detector (weights random), images of 800 x 1216 one at a time, every quantizer of W8A8 in
place: ranges of weights and of activations, the search for percentiles included.

- ``time``: ``calibrate`` with 8 images over the float backbone's forward pass of the same images without gradients, in
  turn. The last column is the quantized model with its quantizers off.
- ``memory``: growth of the peak over what was held before the first image, in a process of its own, with 2, 4 and 8
  images made one at a time, free blocks given back to the system. The claim is that of 8 over 2.

``--quick``: 2 images of 448 x 608 for the time; 2 and 4 for the memory, min-max alone.
"""

import copy
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import Row, in_turn, peak_apart, ratio_of, row, run_script  # noqa: E402
from psaq_mm.tables import markdown_table  # noqa: E402

PARTS = ('time', 'memory')
BOUNDS = dict(minmax=1.15, percentile=1.5)
SIZE, QUICK_SIZE = (800, 1216), (448, 608)


def swin_small(device: str) -> nn.Module:
    """Mmdet's backbone as Mask R-CNN has it, weights random."""
    from mmdet.models import SwinTransformer

    torch.manual_seed(0)
    net = SwinTransformer(embed_dims=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7)
    net.eval()
    return net.to(device)


def quantized(net: nn.Module, observer: str) -> nn.Module:
    """An uncalibrated copy at W8A8."""
    from psaq_mm.models import quantize_model_

    net = copy.deepcopy(net)
    quantize_model_(net, dict(w_bits=8, a_bits=8, a_observer=observer))
    net.eval()
    return net


def passing(net: nn.Module, images: int, size: Tuple[int, int], device: str) -> Callable[[], None]:
    """What puts images through, each made when it is its turn, the same ones in each call."""

    def run() -> None:
        with torch.no_grad():
            for seed in range(images):
                net(torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed)).to(device))

    return run


def calibration(observer: str, images: int, size: Tuple[int, int], device: str) -> Callable[[], None]:
    """A calibration whose memory is measured."""
    from psaq_mm.quantization import calibrate

    net = quantized(swin_small(device), observer)
    return lambda: calibrate(net, passing(net, images, size, device))


def forward(images: int, size: Tuple[int, int], device: str) -> Callable[[], None]:
    """The float forward pass that it is compared with."""
    return passing(swin_small(device), images, size, device)


def time_rows(quick: bool, device: str) -> List[Row]:
    """Seconds of a calibration over those of the float forward pass."""
    from psaq_mm.quantization import calibrate, set_mode

    images, size = (2, QUICK_SIZE) if quick else (8, SIZE)
    net = swin_small(device)
    calls: Dict[str, Callable[[], Any]] = {'float': passing(net, images, size, device)}
    for observer in BOUNDS:
        model = quantized(net, observer)
        calls[observer] = lambda model=model: calibrate(model, passing(model, images, size, device))
    off = quantized(net, 'minmax')
    set_mode(off, 'off')
    calls['off'] = passing(off, images, size, device)
    calls['float']() if quick else passing(off, 1, size, device)()  # what is loaded and reserved once
    seconds = in_turn(calls, 1 if quick else 3, device, warm_up=0)
    what = f'{images} images of {size[0]} x {size[1]}'
    lines = [
        (name, sorted(found)[len(found) // 2], ratio_of(found, seconds['float'])) for name, found in seconds.items()
    ]
    print(markdown_table((f'Swin-S, {what}', 'seconds', 'over float'), lines), flush=True)
    return [
        row(
            f'calibration of Swin-S, {observer}, {what}: time over the float forward',
            ratio_of(seconds[observer], seconds['float']),
            bound,
        )
        for observer, bound in BOUNDS.items()
    ]


def memory_rows(quick: bool, device: str) -> List[Row]:
    """Peak memory with many images over that with two."""
    counts, size = ((2, 4), QUICK_SIZE) if quick else ((2, 4, 8), SIZE)
    lines, found = [], []
    if not quick:
        grown = peak_apart(forward, 2, size, device, device=device, give_back=True).grown / 2**20
        lines.append(('float forward', 2, grown))
    for observer in ('minmax',) if quick else BOUNDS:
        grown = [
            peak_apart(calibration, observer, count, size, device, device=device, give_back=True).grown
            for count in counts
        ]
        lines += [(observer, count, size_ / 2**20) for count, size_ in zip(counts, grown)]
        found.append(
            row(
                f'calibration of Swin-S, {observer}, {size[0]} x {size[1]}: peak memory with {counts[-1]} images over '
                f'{counts[0]}',
                grown[-1] / grown[0],
                1.05,
            )
        )
    print(markdown_table((f'Swin-S, {size[0]} x {size[1]}', 'images', 'MiB grown'), lines), flush=True)
    return found


def rows(quick: bool, device: str, parts: Sequence[str] = PARTS) -> List[Row]:
    """All claims of this script."""
    found: List[Row] = []
    if 'time' in parts:
        found += time_rows(quick, device)
    if 'memory' in parts:
        found += memory_rows(quick, device)
    return found


if __name__ == '__main__':
    sys.exit(run_script(rows, __doc__, PARTS))
