# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Patch similarity entropy against its plain formula: time and peak memory of value and gradient.

Each measurement runs in a process of its own, with the tokens of all attention blocks of one model at once, as one
step of synthesis has them::

    python benchmarks/entropy.py --threads 2 [--quick]

On a machine that does other work too, the CPU seconds of the process tell more than the clock.

The rivals are written with autograd alone (``tests/psaq_vit/reference.py``):

- ``plain``: unit tokens, their matrix product, and the kernel on (images, points, pairs).
- ``released``: the same, with the similarities by broadcasting every pair of tokens, as the released code of PSAQ-ViT
  does it. Only without ``--quick``, on the blocks that fit in ``--memory``.

Peak memory is the growth of the resident set over its size with the tokens in place: its high-water mark as the
kernel counts it. The rivals do not leave out padded queries, the function here does on Swin.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from benchmarks.measuring import Row, row  # noqa: E402
from psaq_mm.psaq_vit import patch_similarity_entropy  # noqa: E402

WINDOW = 7
BOUND = 0.5
"""Of our time and memory, in those of a rival: what is not clearly better needs no code of its own."""
Block = Tuple[Tensor, Optional[Tensor], int]


def deit_tiny() -> List[Block]:
    """12 blocks, 32 images of 224 x 224: 196 patches of 64 channels (heads averaged)."""
    return [(tokens(32, 196, 64), None, 1) for _ in range(12)]


def swin_small() -> List[Block]:
    """24 blocks, one image of 800 x 1216: windows of 49 patches of 32 channels, those at the edges padded."""
    blocks = []
    for stage, depth in enumerate((2, 2, 18, 2)):
        height, width = 200 >> stage, 304 >> stage
        rows, columns = -(-height // WINDOW), -(-width // WINDOW)
        real = torch.zeros(rows * WINDOW, columns * WINDOW, dtype=torch.bool)
        real[:height, :width] = True
        valid = real.view(rows, WINDOW, columns, WINDOW).transpose(1, 2).reshape(-1, WINDOW**2)
        blocks += [(tokens(len(valid), WINDOW**2, 32), valid, len(valid)) for _ in range(depth)]
    return blocks


WORKLOADS = {'DeiT-T, 32 x 224 x 224': deit_tiny, 'Swin-S, 1 x 800 x 1216': swin_small}


def tokens(groups: int, length: int, channels: int) -> Tensor:
    """Tokens with a common direction and own ones of random strength: similarities from below 0 to 1."""
    own = torch.randn(groups, length, channels) * torch.rand(groups, 1, 1)
    return (torch.randn(channels) * 0.3 + own).requires_grad_()


def ours(blocks: List[Block]) -> Tensor:
    return sum(patch_similarity_entropy(t, valid, groups_per_image=n) for t, valid, n in blocks)


def plain(blocks: List[Block], broadcast: bool = False) -> Tensor:
    from psaq_vit import reference

    return sum(reference.patch_similarity_entropy(t, groups_per_image=n, broadcast=broadcast) for t, _, n in blocks)


def released(blocks: List[Block]) -> Tensor:
    return plain(blocks, broadcast=True)


METHODS = {'ours': ours, 'plain': plain, 'released': released}


def resident() -> int:
    """Bytes of memory of this process now."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def measure(method: str, workload: str, blocks: int, repeats: int, threads: int) -> Dict[str, float]:
    """Best times and peak memory of one value and gradient, in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layers = WORKLOADS[workload]()[:blocks]
    METHODS[method]([(torch.randn(2, 9, 4, requires_grad=True), None, 1)]).backward()  # loads what is loaded lazily
    before = resident()
    seconds, busy = [], []
    for _ in range(repeats):
        start, start_busy = time.perf_counter(), time.process_time()
        METHODS[method](layers).backward()
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - start_busy)
        for layer, _, _ in layers:
            layer.grad = None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return dict(seconds=min(seconds), busy=min(busy), bytes=peak - before)


def measure_apart(*arguments: object) -> Dict[str, float]:
    """:func:`measure` in a process of its own."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    command = [sys.executable, __file__, '--measure', json.dumps(arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)


def broadcast_blocks(workload: str, memory: float) -> int:
    """How many blocks of a workload the broadcast rival can hold: some four tensors of (groups, N, N, channels)."""
    total, count = 0.0, 0
    for layer, _, _ in WORKLOADS[workload]():
        groups, length, channels = layer.shape
        total += 4 * 4 * groups * length**2 * channels
        if total > memory * 2**30:
            break
        count += 1
    return max(count, 1)


def compared(quick: bool, threads: int, memory: float) -> List[Row]:
    """Measures and prints the table; the rows say what share of its rival the function here takes."""
    repeats, found = 1 if quick else 3, []
    print(f'torch {torch.__version__}, {threads} threads, best of {repeats}, value and gradient')
    print(
        f'{"workload":<24}{"blocks":>7}  {"method":<10}{"seconds":>9}{"CPU s":>8}{"peak MiB":>10}'
        f'{"time ratio":>12}{"CPU ratio":>11}{"memory ratio":>14}'
    )
    for workload, build in WORKLOADS.items():
        rivals = [('plain', len(build()))]
        if not quick:
            rivals.append(('released', broadcast_blocks(workload, memory)))
        for rival, blocks in rivals:
            mine = measure_apart('ours', workload, blocks, repeats, threads)
            other = measure_apart(rival, workload, blocks, repeats, threads)
            for name, result in (('ours', mine), (rival, other)):
                ratios = (
                    ''
                    if name == 'ours'
                    else (
                        f'{other["seconds"] / mine["seconds"]:>11.1f}x{other["busy"] / mine["busy"]:>10.1f}x'
                        f'{other["bytes"] / max(mine["bytes"], 1):>13.1f}x'
                    )
                )
                print(
                    f'{workload:<24}{blocks:>7}  {name:<10}{result["seconds"]:>9.3f}{result["busy"]:>8.2f}'
                    f'{math.ceil(result["bytes"] / 2**20):>10}{ratios}',
                    flush=True,
                )
            for what, key in (('time', 'seconds'), ('memory', 'bytes')):
                found.append(
                    row(
                        f'patch similarity entropy, {what} / {rival} formula, {workload}', mine[key] / other[key], BOUND
                    )
                )
    return found


def rows(quick: bool, device: str) -> List[Row]:
    """See the module; on the CPU alone, as its memory is counted by the kernel."""
    if torch.device(device).type != 'cpu':
        print('Patch similarity entropy: measured on the CPU alone')
        return []
    return compared(quick, torch.get_num_threads(), 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--threads', type=int, default=2, help='threads of PyTorch')
    parser.add_argument('--quick', action='store_true', help='one repeat, without the broadcast rival')
    parser.add_argument('--memory', type=float, default=6, help='GiB the broadcast rival may take, about')
    parser.add_argument('--measure', help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*json.loads(arguments.measure))))
        return
    compared(arguments.quick, arguments.threads, arguments.memory)


if __name__ == '__main__':
    main()
