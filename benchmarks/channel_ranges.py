# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Percentile ranges of every channel of a LayerNorm output, against the same search channel by channel.

What calibration for RepQ-ViT's reparameterization spends on one LayerNorm::

    python benchmarks/channel_ranges.py --threads 1 [--quick] [--images 8 --tokens 3136 --channels 384]

- ``ours``: ``FeatureObserver`` with the rule ``Percentile``, updated image by image.
- ``loop``: all images' tokens side by side, then for each channel one ``torch.quantile`` for all candidates (one sort),
  and each candidate's squared error on the channel's values.

Both choose from the same candidates by the squared error of the same quantizer. Each is measured in a process of its
own, in turns, the best of the repeats counts. Peak memory is the growth of the resident set over its size with the
images in place: its high-water mark as the kernel (Linux) counts it.

The scales may differ by what a bin of the histogram holds. The last lines tell by how much they do, and how much more
squared error the raw values then have; the exit code is 1 where that is over a percent in total.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List, Tuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import Row, row  # noqa: E402
from psaq_mm.quantization import ChannelGrid, FeatureObserver, Percentile  # noqa: E402

CANDIDATES = (1.0, 0.99999, 0.9999, 0.999)
ERROR = 0.01
"""Greatest excess of squared error."""
QUICK = ('--quick', '--images', '4', '--bits', '4')
QParams = Tuple[Tensor, Tensor]


def layer_norm_outputs(images: int, tokens: int, channels: int) -> List[Tensor]:
    """Tokens as a norm in a transformer gives them: gains and shifts differ by channel, a few channels are far off, and
    some channels have rare large values.
    """
    generator = torch.Generator().manual_seed(0)
    gain = torch.randn(channels, generator=generator).mul_(0.7).exp_()
    gain[::97] *= 20
    shift = torch.randn(channels, generator=generator) * gain
    rare = torch.rand(channels, generator=generator) * 8
    result = []
    for _ in range(images):
        x = torch.randn(tokens, channels, generator=generator)
        x += torch.where(torch.rand(tokens, channels, generator=generator) < 3e-4, rare * x, 0.0)
        result.append(x * gain + shift)
    return result


def ours(images: List[Tensor], bits: int) -> QParams:
    observer = FeatureObserver(Percentile(CANDIDATES))
    for image in images:
        observer.observe(image)
    return observer.qparams(ChannelGrid(bits))


def error_of(values: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Squared error of the quantizer on one channel's values."""
    codes = (values / scale).round_().add_(zero_point).clamp_(0, 2**bits - 1)
    return codes.sub_(zero_point).mul_(scale).sub_(values).square_().sum(dtype=torch.float64)


def loop(images: List[Tensor], bits: int) -> QParams:
    tokens = torch.cat(images)
    quantiles = torch.tensor([1 - p for p in CANDIDATES] + list(CANDIDATES))
    scales, zero_points = [], []
    for channel in range(tokens.shape[1]):
        values = tokens[:, channel].contiguous()
        lows, highs = torch.quantile(values, quantiles).chunk(2)
        best = None
        for low, high in zip(lows, highs):
            scale = (high - low) / (2**bits - 1)
            zero_point = (-low / scale).round()
            error = error_of(values, scale, zero_point, bits)
            if best is None or error < best[0]:
                best = error, scale, zero_point
        scales.append(best[1])
        zero_points.append(best[2])
    return torch.stack(scales), torch.stack(zero_points)


METHODS = {'ours': ours, 'loop': loop}


def resident(kind: str) -> int:
    """Bytes of memory of this process: ``'VmRSS'`` now, ``'VmHWM'`` at most since :func:`forget_peak`."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind + ':'))


def forget_peak() -> None:
    """Start the high-water mark anew: loading PyTorch and the images took more than they keep."""
    Path('/proc/self/clear_refs').write_text('5')


def measure(method: str, file: str, bits: int, threads: int) -> Dict[str, object]:
    """Times, peak memory and outcome of one search on the images of a file, in this process."""
    torch.set_num_threads(threads)
    images = torch.load(file)
    METHODS[method]([torch.randn(50, 4)], bits)  # loads what is loaded lazily
    forget_peak()
    before = resident('VmRSS')
    start, start_busy = time.perf_counter(), time.process_time()
    scale, zero_point = METHODS[method](images, bits)
    seconds, busy = time.perf_counter() - start, time.process_time() - start_busy
    peak = resident('VmHWM') - before
    return dict(seconds=seconds, busy=busy, bytes=peak, scale=scale.tolist(), zero_point=zero_point.tolist())


def measure_apart(*arguments: object) -> Dict[str, object]:
    """:func:`measure` in a process of its own."""
    # Threads that spin while they wait would measure what else runs on the machine.
    environment = dict(os.environ, OMP_WAIT_POLICY='PASSIVE')
    command = [sys.executable, __file__, '--measure', json.dumps(arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)


def errors(images: List[Tensor], result: Dict[str, object], bits: int) -> Tensor:
    """Squared error of every channel on the raw values, ``(C,)``."""
    tokens = torch.cat(images).double()
    qparams = zip(result['scale'], result['zero_point'])
    return torch.stack([error_of(tokens[:, c], *pair, bits) for c, pair in enumerate(qparams)])


def compare(arguments: argparse.Namespace, file: Path) -> List[Row]:
    """Measure, print the table and the checks. A row says what share of the loop's time or memory ours takes, or its
    excess error.
    """
    found = []
    repeats = 1 if arguments.quick else 5
    size = [arguments.images, arguments.tokens, arguments.channels]
    print(
        f'torch {torch.__version__}, threads: {arguments.threads}, best of {repeats}, '
        f'{size[0]} images x {size[1]} tokens x {size[2]} channels'
    )
    print(f'{"bits":>4}  {"method":<8}{"seconds":>9}{"CPU s":>8}{"peak MiB":>10}{"time ratio":>12}{"CPU ratio":>11}')
    images, checks, worst = layer_norm_outputs(*size), [], 0.0
    torch.save(images, file)  # made in the measured process, they would leave memory to be used again
    for bits in arguments.bits:
        runs = [
            {name: measure_apart(name, str(file), bits, arguments.threads) for name in METHODS} for _ in range(repeats)
        ]
        best = {
            name: {key: min(run[name][key] for run in runs) for key in ('seconds', 'busy', 'bytes')} for name in METHODS
        }
        for name, numbers in best.items():
            ratios = (
                ''
                if name == 'ours'
                else (
                    f'{numbers["seconds"] / best["ours"]["seconds"]:>11.1f}x'
                    f'{numbers["busy"] / best["ours"]["busy"]:>10.1f}x'
                )
            )
            print(
                f'{bits:>4}  {name:<8}{numbers["seconds"]:>9.3f}{numbers["busy"]:>8.3f}'
                f'{numbers["bytes"] / 2**20:>10.1f}{ratios}',
                flush=True,
            )
        result = runs[0]
        ratio = torch.tensor(result['ours']['scale']) / torch.tensor(result['loop']['scale'])
        near = ((ratio - 1).abs() < 0.01).double().mean()
        excess = errors(images, result['ours'], bits).sum() / errors(images, result['loop'], bits).sum() - 1
        worst = max(worst, float(excess))
        found += [
            row(
                f'channel percentiles, {what} / channel by channel, {bits} bits',
                best['ours'][key] / max(best['loop'][key], 1e-9),
                1.0,
            )
            for what, key in (('time', 'seconds'), ('memory', 'bytes'))
        ]
        checks.append(
            f'{bits} bits: {near:.1%} of the channels have the same scale within 1 %, median difference '
            f'{(ratio - 1).abs().median():.1e}; squared error {excess:+.2%}'
        )
    print('\n'.join(checks))
    return found + [row('channel percentiles, squared error above that of channel by channel', worst, ERROR)]


def rows(quick: bool, device: str) -> List[Row]:
    """See the module; on the CPU alone. ``quick``: half of the images, 4 bits."""
    if torch.device(device).type != 'cpu':
        print('Channel percentiles: measured on the CPU alone')
        return []
    arguments = _parser().parse_args(['--threads', str(torch.get_num_threads()), *(QUICK if quick else ())])
    with tempfile.TemporaryDirectory() as folder:
        return compare(arguments, Path(folder) / 'images.pt')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=8)
    parser.add_argument('--tokens', type=int, default=3136, help='tokens an image')
    parser.add_argument('--channels', type=int, default=384)
    parser.add_argument('--bits', type=int, nargs='+', default=[4, 8])
    parser.add_argument('--threads', type=int, default=1, help='threads of PyTorch')
    parser.add_argument('--quick', action='store_true', help='one repeat in place of five')
    parser.add_argument('--measure', help=argparse.SUPPRESS)
    return parser


def main() -> int:
    """Command line."""
    arguments = _parser().parse_args()
    if arguments.measure:
        print(json.dumps(measure(*json.loads(arguments.measure))))
        return 0

    with tempfile.TemporaryDirectory() as folder:
        found = compare(arguments, Path(folder) / 'images.pt')
    return int(not found[-1]['ok'])  # another machine may be slower at either


if __name__ == '__main__':
    sys.exit(main())
