# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Time and memory of a step of the synthesis and of a student's step against image size, batch and ranks.

    python benchmarks/scaling.py [--quick] [--device cuda] [--plot docs/images/scaling.png]

The backbone of a Swin-T detector under W4A8, weights random: one image of 224 x 224 to 800 x 1333, and 1 to 32 images
of 112 x 112, each in a process of its own. A line is fitted to the logarithms: an exponent of 1 is linear, one below it
is a cost that is there for any size; the bound leaves 0.1 for window padding and caches. Memory is what a step adds to
the networks.

Two ranks (gloo, on this machine, a thread each, half of the batch each) are compared with one rank of two threads: the
same work, and what the ranks tell each other comes on top. On a GPU that is left out, as one machine rarely has two
alike.

``--quick``: a small Swin, three sizes and three batches, all in one process and without a plot.
"""

import argparse
import copy
import math
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import Row, in_turn, peak_apart, peak_of, row, run_script  # noqa: E402
from psaq_mm.calibration import Calibration, CalibrationSettings, TrainingSettings  # noqa: E402
from psaq_mm.pictures import Generated, SampleStream  # noqa: E402
from psaq_mm.psaq_vit import CoEvolution, SampleGenerator, Synthesis  # noqa: E402
from psaq_mm.ranks import sum_gradients_  # noqa: E402
from psaq_mm.tables import markdown_table  # noqa: E402

SWIN_TINY = dict(embed_dims=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24])
SMALL = dict(embed_dims=32, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8])
SIZES, BATCHES = ((224, 224), (320, 533), (480, 800), (640, 1066), (800, 1333)), (1, 2, 4, 8, 16, 32)
QUICK_SIZES, QUICK_BATCHES = ((224, 224), (448, 448), (800, 1333)), (1, 8, 32)
SIDE = 112
"""Of the images whose number grows."""
STEPS = ('synthesis', 'student')
EXPONENT, RANKS = 1.1, 1.25


class Point(NamedTuple):
    """What one measurement is of."""

    swin: Dict[str, Any]
    batch: int
    size: Tuple[int, int]

    @property
    def title(self) -> str:
        return f'{self.batch} x {self.size[0]} x {self.size[1]}'

    @property
    def pixels(self) -> int:
        return self.batch * self.size[0] * self.size[1]


class Cost(NamedTuple):
    """Of one step."""

    seconds: float
    bytes: int


Measured = List[Tuple[Point, Dict[str, Cost]]]


def steps_of(point: Point, device: str) -> Dict[str, Callable[[], None]]:
    """A step of the synthesis and one of the student, both of this rank's part of the batch."""
    from mmdet.models import SwinTransformer

    from psaq_mm.models import TaskModel, quantize_model_
    from psaq_mm.quantization import set_mode

    torch.manual_seed(0)
    student = SwinTransformer(window_size=7, **point.swin)
    student.eval()  # returns None
    quantize_model_(student, 'w4a8')
    teacher = copy.deepcopy(student)
    set_mode(teacher, 'off')
    teacher.requires_grad_(False)
    teacher, size = TaskModel(teacher.to(device)), point.size
    calibration = Calibration(
        TaskModel(student.to(device)), CalibrationSettings(batch_size=point.batch, calibration_samples=point.batch)
    )
    generator = SampleGenerator(size=size, batch_size=point.batch, steps=1)
    synthesis = Synthesis(teacher, generator, size, random=calibration.random)
    settings = TrainingSettings(pool_size=2 * point.batch, evolve_samples=point.batch)
    stream = SampleStream(Generated(), size, teacher.image_spec)
    evolution = CoEvolution(teacher, calibration, stream, synthesis, settings)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    evolution.prepare(torch.randn(2 * point.batch, 3, *point.size, generator=torch.Generator().manual_seed(0)))

    def make() -> None:
        synthesis.make(point.batch * _world())

    def learn() -> None:
        optimizer.zero_grad()
        evolution.learn(evolution.draw(), torch.Tensor.backward)
        sum_gradients_(student.parameters())
        optimizer.step()

    return dict(synthesis=make, student=learn)


def _world() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def costs(point: Point, device: str, repeats: int) -> Dict[str, Cost]:
    """Both steps, in this process."""
    steps = steps_of(point, device)
    steps['student']()  # the optimizer's state and the gradients stay
    memory = {name: peak_of(step, device).grown for name, step in steps.items()}
    seconds = in_turn(steps, repeats, device, warm_up=0)
    return {name: Cost(min(seconds[name]), memory[name]) for name in STEPS}


def measurement(point: Point, device: str, repeats: int) -> Callable[[], Dict[str, Cost]]:
    """For a process of its own."""
    return lambda: costs(point, device, repeats)


def exponent(pixels: Sequence[int], values: Sequence[float]) -> float:
    """Slope of the line through the logarithms, by least squares."""
    x, y = ([math.log(v) for v in numbers] for numbers in (pixels, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


# ---------------------------------------------------------------------- ranks
def _rank(rank: int, world: int, folder: str, threads: int, point: Point, repeats: int, queue) -> None:
    os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')
    torch.set_num_threads(threads)
    if world > 1:
        torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=world)
    found = costs(point, 'cpu', repeats)
    queue.put((rank, found))
    queue.close()
    queue.join_thread()
    if world > 1:
        os._exit(0)  # taking gloo's connections down may wait for ever for a rank that is gone already


def on_ranks(world: int, point: Point, repeats: int, threads: int) -> Dict[str, Cost]:
    """Costs of rank 0 of ``world``, each with its part of the batch and of the threads."""
    context = multiprocessing.get_context('spawn')
    queue = context.Queue()
    part = point._replace(batch=point.batch // world)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(r, world, folder, max(1, threads // world), part, repeats, queue))
            for r in range(world)
        ]
        for process in processes:
            process.start()
        found = dict(queue.get(timeout=600) for _ in processes)
        for process in processes:
            process.join()
    return found[0]


# ---------------------------------------------------------------------- rows
def draw(path: Path, by_size: Measured, by_batch: Measured) -> None:
    """Seconds and GiB against megapixels, PNG."""
    from psaq_mm.visualization import Line, Panel, line_chart, write_png

    panels = []
    for axis, value in (
        ('seconds a step', lambda cost: cost.seconds),
        ('GiB that a step adds', lambda cost: cost.bytes / 2**30),
    ):
        lines = []
        for title, points in (('larger images', by_size), ('more images', by_batch)):
            lines += [
                Line(
                    f'{name}, {title}',
                    [point.pixels / 1e6 for point, _ in points],
                    [value(cost[name]) for _, cost in points],
                )
                for name in STEPS
            ]
        panels.append(Panel('million pixels in the batch', axis, lines))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(
        line_chart(
            f'A step of a Swin-T backbone, W4A8: one image of 224 x 224 to 800 x 1333, or 1 to 32 images of {SIDE} x '
            f'{SIDE}',
            panels,
        ),
        path,
    )


def rows(quick: bool, device: str, plot: Optional[Path] = None) -> List[Row]:
    """See the module."""
    swin, repeats = (SMALL, 1) if quick else (SWIN_TINY, 2)
    sizes, batches = (QUICK_SIZES, QUICK_BATCHES) if quick else (SIZES, BATCHES)
    series: Dict[str, Measured] = {'image size': [], 'batch': []}
    given = dict(
        zip(series, ([Point(swin, 1, size) for size in sizes], [Point(swin, batch, (SIDE, SIDE)) for batch in batches]))
    )
    found, lines = [], []
    for title, points in given.items():
        for point in points:
            cost = (
                costs(point, device, repeats)
                if quick
                else peak_apart(measurement, point, device, repeats, device=device).result
            )
            series[title].append((point, cost))
            lines += [
                (
                    title,
                    point.title,
                    name,
                    cost[name].seconds,
                    1e6 * cost[name].seconds / point.pixels,
                    cost[name].bytes / 2**20,
                    cost[name].bytes / point.pixels / 1024,
                )
                for name in STEPS
            ]
            print(f'{point.title}: measured', file=sys.stderr, flush=True)
        pixels = [point.pixels for point in points]
        for name in STEPS:
            for what, value in (('time', lambda cost: cost.seconds), ('memory', lambda cost: cost.bytes)):
                slope = exponent(pixels, [value(cost[name]) for _, cost in series[title]])
                found.append(row(f'scaling, exponent of {what} in pixels, {name} step by {title}', slope, EXPONENT))
    print(markdown_table(('by', 'images', 'step', 'seconds', 'us a pixel', 'peak MiB', 'KiB a pixel'), lines))
    if torch.device(device).type == 'cpu':
        found += _rank_rows(Point(swin, 8, (224, 224)), repeats + 1)
    if plot is not None:
        draw(plot, *series.values())
        print(f'Wrote {plot}')
    return found


def _rank_rows(point: Point, repeats: int) -> List[Row]:
    one, two = (on_ranks(world, point, repeats, 2) for world in (1, 2))
    print(
        markdown_table(
            ('ranks', 'step', 'seconds', 'peak MiB a rank'),
            [
                (world, name, cost[name].seconds, cost[name].bytes / 2**20)
                for world, cost in ((1, one), (2, two))
                for name in STEPS
            ],
        )
    )
    return [
        row(
            f'scaling, time of two ranks with a thread each / one with two, {name} step, {point.title}',
            two[name].seconds / one[name].seconds,
            RANKS,
        )
        for name in STEPS
    ]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--plot', type=Path)
    args, rest = parser.parse_known_args(argv)
    return run_script(lambda quick, device: rows(quick, device, args.plot), __doc__, argv=rest)


if __name__ == '__main__':
    sys.exit(main())
