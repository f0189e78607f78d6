# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""One step of the synthesis against forward and backward (to the pixels) of the teacher alone: time and peak memory.

    python benchmarks/synthesis_step.py [--quick] [--device cuda]

A step is that of ``SampleGenerator`` with all it does: move, forward, patch similarity of every pair of tokens of every
block, total variation, backward to the pixels, Adam, clamp. The control is the network that it runs, frozen: its
outputs' mean and the gradient of that by the pixels. Weights are random. Both are taken in turn in one process for
time, of which the best counts (what else the machine does only adds), and each in a process of its own for memory,
which counts what the call adds to the network and one batch.

The library's own float network, before any layer was swapped, stands beside them: timm's attention is fused, and saves
the scores. ``--quick``: the same batches, but Swin-S at 400 x 608; one step a call, two repeats, without the library's
network, and memory measured one after the other in one process, over what that held before. ``--device cuda`` adds the
share of a step that is spent in no kernel of the network.
"""

import copy
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import Row, forget_peak, in_turn, peak_apart, peak_of, resident, row, run_script  # noqa: E402
from psaq_mm.pictures import ImageSpec  # noqa: E402
from psaq_mm.psaq_vit import Objective, SampleGenerator  # noqa: E402
from psaq_mm.tables import markdown_table  # noqa: E402

IMAGENET = ImageSpec((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
TIME_BOUND, MEMORY_BOUND = 1.25, 1.2
STEPS = 2
"""Of one measured call of the generator, as Adam's state is there from the second one on."""


def deit_tiny() -> nn.Module:
    """Timm's network."""
    import timm

    return timm.create_model('deit_tiny_patch16_224')


def swin(depths: Tuple[int, ...]) -> nn.Module:
    """Mmdet's backbone."""
    from mmdet.models import SwinTransformer

    return SwinTransformer(embed_dims=96, depths=depths, num_heads=[3, 6, 12, 24], window_size=7)


class Workload(NamedTuple):
    """A network and the batch that is made for it."""

    name: str
    batch: int
    size: Tuple[int, int]
    prefix_tokens: int
    build: Callable[..., nn.Module]
    arguments: Tuple[Any, ...] = ()

    @property
    def title(self) -> str:
        return f'{self.name}, {self.batch} x {self.size[0]} x {self.size[1]}'


WORKLOADS = (
    Workload('DeiT-Tiny', 32, (224, 224), 1, deit_tiny),
    Workload('Swin-T', 8, (224, 224), 0, swin, ([2, 2, 6, 2],)),
    Workload('Swin-S', 1, (800, 1216), 0, swin, ([2, 2, 18, 2],)),
)
QUICK = WORKLOADS[:2] + (WORKLOADS[2]._replace(size=(400, 608)),)


def networks(workload: Workload, device: str) -> Tuple[nn.Module, nn.Module]:
    """The library's own network, and the teacher: the same with its layers swapped and every quantizer off."""
    from psaq_mm.models import quantize_model_
    from psaq_mm.quantization import set_mode

    torch.manual_seed(0)
    library = workload.build(*workload.arguments)
    library.eval()
    library.requires_grad_(False)
    teacher = copy.deepcopy(library)
    quantize_model_(teacher, 'w4a8')
    set_mode(teacher, 'off')
    teacher.eval()
    return library.to(device), teacher.requires_grad_(False).to(device)


def calls(workload: Workload, device: str, steps: int = STEPS) -> Dict[str, Callable[[], None]]:
    """The synthesis, and the networks alone, each for as many steps."""
    library, teacher = networks(workload, device)
    images = torch.randn(workload.batch, 3, *workload.size, device=device)
    generator = SampleGenerator(size=workload.size, batch_size=workload.batch, steps=steps)

    def alone(network: nn.Module) -> None:
        for _ in range(steps):
            pixels = images.requires_grad_()
            torch.autograd.grad(sum(output.mean() for output in _tensors(network(pixels))), pixels)
            images.requires_grad_(False)

    return dict(
        synthesis=lambda: _quiet(
            generator.generate,
            teacher,
            IMAGENET,
            Objective(prefix_tokens=workload.prefix_tokens),
            init=images,
        ),
        teacher=lambda: alone(teacher),
        library=lambda: alone(library),
    )


def call(workload: Workload, device: str, name: str) -> Callable[[], None]:
    """One of :func:`calls`, for a process of its own."""
    return calls(workload, device)[name]


def _tensors(output: Any) -> List[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def _quiet(function: Callable, *args, **kwargs) -> None:
    function(*args, **kwargs)  # what it returns would have to be sent from process to process


def peaks(workload: Workload, device: str, measured: Dict[str, Callable[[], None]], apart: bool) -> Dict[str, int]:
    """Bytes that each call adds at most."""
    if apart:
        return {name: peak_apart(call, workload, device, name, device=device).grown for name in measured}
    if torch.device(device).type == 'cpu':
        forget_peak()
    before = resident() if torch.device(device).type == 'cpu' else torch.cuda.memory_allocated(device)
    # The teacher first: what the allocator keeps of a call counts against the next one.
    return {name: peak_of(measured[name], device).total - before for name in sorted(measured, reverse=True)}


def own_share(workload: Workload, device: str) -> float:
    """Share of a step on a CUDA device that is not the network's own: 1 - kernels of the teacher alone / duration of
    the step.
    """
    from torch.profiler import ProfilerActivity, profile

    measured = calls(workload, device)
    for name in ('synthesis', 'teacher'):
        measured[name]()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        measured['teacher']()
        torch.cuda.synchronize(device)
    kernels = (
        sum(
            event.self_device_time_total if hasattr(event, 'self_device_time_total') else event.self_cuda_time_total
            for event in trace.key_averages()
        )
        / 1e6
    )
    return 1 - kernels / min(in_turn(dict(synthesis=measured['synthesis']), 3, device)['synthesis'])


def rows(quick: bool, device: str) -> List[Row]:
    """See the module."""
    found, lines = [], []
    on_gpu = torch.device(device).type == 'cuda'
    for workload in QUICK if quick else WORKLOADS:
        steps = 1 if quick else STEPS
        measured = calls(workload, device, steps)
        if quick:
            del measured['library']
        held = peaks(workload, device, measured, apart=not quick)
        seconds = in_turn(measured, 2 if quick else 3, device)
        time, memory = min(seconds['synthesis']) / min(seconds['teacher']), held['synthesis'] / held['teacher']
        more = dict(own_share=round(own_share(workload, device), 4)) if on_gpu else {}
        for name in seconds:
            lines.append(
                (
                    workload.title,
                    name,
                    min(seconds[name]) / steps,
                    min(seconds[name]) / min(seconds['teacher']),
                    held[name] / 2**20,
                    held[name] / held['teacher'],
                    *([more['own_share'] if name == 'synthesis' else 0.0] if on_gpu else []),
                )
            )
        found += [
            row(f'synthesis step, time, {workload.title}', time, TIME_BOUND, **more),
            row(f'synthesis step, memory, {workload.title}', memory, MEMORY_BOUND),
        ]
        print(f'{workload.title}: measured', file=sys.stderr, flush=True)
    header = ('workload', 'what runs', 's a step', 'time / teacher', 'peak MiB', 'memory / teacher')
    print(markdown_table(header + (('share outside the network',) if on_gpu else ()), lines))
    return found


if __name__ == '__main__':
    sys.exit(run_script(rows, __doc__))
