# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What making procedural samples costs, beside the step of the student that learns on them.

    python benchmarks/sources.py --threads 1 [--quick]

Two workloads: 32 pictures of 224 x 224 for a DeiT-Tiny, and 2 of 800 x 1216 for the backbone of a Swin-T detector; neck
and heads left out, which would make the step longer. A step is the teacher's forward pass, the student's at W4A8
(fake-quantized), and its backward pass; weights are random. The share is that of a run whose every batch is made anew
(``dfq.fresh=1``), time of making it / (time of making it + time of the step); a run that replays a pool makes fewer.
Best of the repeats; seconds of the processor, not of the wall, so that other work on the machine counts less.

The exit code is 1 where a share is above ``--limit`` per cent.
"""

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import Row, row  # noqa: E402
from psaq_mm.engine.presets import resolve_dfq  # noqa: E402
from psaq_mm.pictures import DeadLeaves, GaussianNoise, ImageSpec, PinkNoise, Scenes, Source, source_of  # noqa: E402
from psaq_mm.tables import markdown_table  # noqa: E402

LIMIT = 5.0
"""Per cent."""
IMAGENET = ImageSpec((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
SOURCES: Dict[str, Source] = {
    'Gaussian noise': GaussianNoise(),
    '1/f noise': PinkNoise(),
    'dead leaves': DeadLeaves(),
    'scenes': Scenes(),
    'half 1/f, half dead leaves': source_of('mixture'),
    'pictures of fast': source_of(resolve_dfq('fast')['samples']),
    'pictures of best': source_of(resolve_dfq('best')['samples']),
}


class Workload(NamedTuple):
    """A model, and the batch that its student learns on."""

    name: str
    batch: int
    size: Tuple[int, int]
    build: Callable[[], nn.Module]


def deit_tiny() -> nn.Module:
    """Timm's network, weights random."""
    import timm

    return timm.create_model('deit_tiny_patch16_224')


def swin_tiny() -> nn.Module:
    """Mmdet's backbone as Mask R-CNN has it, weights random."""
    from mmdet.models import SwinTransformer

    return SwinTransformer(embed_dims=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7)


WORKLOADS = (Workload('DeiT-Tiny', 32, (224, 224), deit_tiny), Workload('Swin-T backbone', 2, (800, 1216), swin_tiny))
QUICK = (Workload('DeiT-Tiny', 2, (224, 224), deit_tiny), Workload('Swin-T backbone', 1, (224, 320), swin_tiny))


def best(run: Callable[[], object], repeats: int) -> float:
    """Least processor seconds of a call, the first one not counted."""
    run()
    found = []
    for _ in range(repeats):
        begun = time.process_time()
        run()
        found.append(time.process_time() - begun)
    return min(found)


def student_step(workload: Workload, repeats: int) -> float:
    """Processor seconds of one step of the student, forward and backward."""
    from psaq_mm.calibration import normalized_l1
    from psaq_mm.models import TaskModel, quantize_model_
    from psaq_mm.quantization import calibrate, set_mode

    torch.manual_seed(0)
    student = workload.build()
    student.eval()
    quantize_model_(student, 'w4a8')
    teacher = copy.deepcopy(student)
    set_mode(teacher, 'off')
    teacher.requires_grad_(False)
    images = PinkNoise().draw(range(workload.batch), workload.size, IMAGENET)
    teacher, student = TaskModel(teacher), TaskModel(student)
    calibrate(student.model, lambda: student.calibration_forward(images[:1]))

    def step() -> None:
        with torch.no_grad():
            taught = teacher.outputs(images)
        normalized_l1(student.outputs(images), taught).backward()

    return best(step, repeats)


def measure(workload: Workload, repeats: int) -> Tuple[float, Dict[str, float]]:
    """Seconds of the student's step, and of a batch of each source."""
    step = student_step(workload, max(1, repeats // 3))
    return step, {
        name: best(lambda source=source: source.draw(range(workload.batch), workload.size, IMAGENET), repeats)
        for name, source in SOURCES.items()
    }


def table(found: Sequence[Tuple[Workload, float, Dict[str, float]]]) -> str:
    """Markdown: one line a workload and source."""
    lines = []
    for workload, step, seconds in found:
        shown = f'{workload.name}, {workload.batch} x 3 x {workload.size[0]} x {workload.size[1]}'
        for name, made in seconds.items():
            each, share = f'{1000 * made / workload.batch:.1f} ms', f'{share_of(made, step):.1f} %'
            lines.append((shown, name, each, f'{made:.3f} s', f'{step:.2f} s', share))
    head = ('workload', 'source', 'a picture', 'a batch', "student's step", 'share of a run')
    return markdown_table(head, lines, 'llrrrr')


def share_of(made: float, step: float) -> float:
    """Per cent of a run that making its samples takes, where every batch is made anew."""
    return 100 * made / (made + step)


def rows(quick: bool, device: str) -> List[Row]:
    """See the module; on the CPU alone, where samples are made. ``quick``: the DeiT-Tiny's batch, 8 of it, and one
    repeat.
    """
    if torch.device(device).type != 'cpu':
        print('Sources: measured on the CPU alone, where samples are made')
        return []
    workloads = (WORKLOADS[0]._replace(batch=8),) if quick else WORKLOADS
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # seconds of the processor: a thread that waits for another one would count
    try:
        found = [(workload, *measure(workload, 2 if quick else 5)) for workload in workloads]
    finally:
        torch.set_num_threads(threads)
    print(table(found))
    return [
        row(f'making a batch anew, share of a run, {name}, {workload.name}', share_of(made, step) / 100, LIMIT / 100)
        for workload, step, seconds in found
        for name, made in seconds.items()
    ]


def main(argv: Sequence[str] = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--threads', type=int, default=1, help='of torch (default: %(default)s)')
    parser.add_argument('--repeats', type=int, default=5, help='of which the best counts (default: %(default)s)')
    parser.add_argument('--limit', type=float, default=LIMIT, help='greatest share in per cent (default: %(default)g)')
    parser.add_argument('--quick', action='store_true', help='small batches, to see that it runs; nothing is judged')
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    found: List[Tuple[Workload, float, Dict[str, float]]] = []
    for workload in QUICK if args.quick else WORKLOADS:
        found.append((workload, *measure(workload, 1 if args.quick else args.repeats)))
        print(f'{workload.name} measured', file=sys.stderr, flush=True)
    print(table(found))
    over = [
        f'{w.name}, {name}: {share_of(made, step):.1f} %'
        for w, step, seconds in found
        for name, made in seconds.items()
        if share_of(made, step) > args.limit
    ]
    if over and not args.quick:
        print(f'above the limit of {args.limit:g} %: {"; ".join(over)}')
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
