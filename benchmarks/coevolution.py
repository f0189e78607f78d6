# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What samples and quantizers add to distillation: the steps of a co-evolution beside those of a full-precision
student.

    python benchmarks/coevolution.py [--quick] [--device cuda]

The backbone of a Swin-T detector (mmdet's, weights random), W8A8, batches of 2 images of 512 x 512, stages distilled,
Adam. The pieces, each timed in turn with the others:

- ``plain``: plain distillation: the teacher's forward pass; forward, backward and optimizer step of a full-precision
  student.
- ``student``: the same with the quantized student, as :meth:`CoEvolution.learn` does it.
- ``sample``: one step of the synthesis as :class:`CoEvolution` runs it: teacher and quantized student forward, patch
  similarity, total variation and discrepancy, the gradient to the pixels, and the pixels' optimizer.
- ``plain sample``: its control: teacher and full-precision student forward, the discrepancy alone, and its gradient to
  the pixels.
- ``ranges``: the student's ranges anew on one batch, as after each round.

A step of the co-evolution is one step of the samples and one of the student. Judged at 1.5: (sample + student) / (plain
sample + plain), which is what patch similarity, prior and quantizers add.

Measured beside it: (sample + student) / plain; and the same a student step of the default preset, whose rounds are
``evolve_samples / batch_size * steps`` steps of the samples, and new ranges on ``calibration_samples``, every
``evolve_every`` steps of the student. A step of the samples goes through teacher and student forward and backward,
which is what a plain step costs already.

The process keeps freed memory as the commands do (``psaq_mm/commands/allocator.py``), for all pieces alike; any setting
of malloc in the environment, such as glibc's own ``MALLOC_ARENA_TEST=8``, leaves it as it is.

``--quick``: 1 image of 224 x 224.
"""

import copy
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import Row, in_turn, ratio_of, row, run_script  # noqa: E402
from psaq_mm.tables import markdown_table  # noqa: E402

BOUND = 1.5


def swin_tiny() -> nn.Module:
    """Mmdet's backbone as Mask R-CNN has it, weights random."""
    from mmdet.models import SwinTransformer

    torch.manual_seed(0)
    net = SwinTransformer(embed_dims=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7)
    net.eval()
    return net


def frozen(net: nn.Module) -> nn.Module:
    return net.requires_grad_(False)


def pieces(batch: int, size: Tuple[int, int], device: str) -> Dict[str, Callable[[], Any]]:
    """The four steps, by name."""
    from psaq_mm.calibration import Calibration, CalibrationSettings, TrainingSettings, normalized_l1
    from psaq_mm.models import TaskModel, quantize_model_
    from psaq_mm.pictures import Generated, SampleStream
    from psaq_mm.psaq_vit import CoEvolution, SampleGenerator, Synthesis
    from psaq_mm.quantization import set_mode

    base = swin_tiny().to(device)
    student = copy.deepcopy(base)
    quantize_model_(student, 'w8a8')
    student.eval()
    teacher = copy.deepcopy(student)
    set_mode(teacher, 'off')
    teacher, student, float_teacher, float_student = map(
        TaskModel, (frozen(teacher), student, frozen(copy.deepcopy(base)), base)
    )
    generator = SampleGenerator(size=size, batch_size=batch, steps=1, init='pink')
    calibration = Calibration(student, CalibrationSettings(batch_size=batch, calibration_samples=batch))
    synthesis = Synthesis(teacher, generator, size, random=calibration.random)
    stream = SampleStream(Generated(), size, teacher.image_spec)
    settings = TrainingSettings(pool_size=2 * batch, evolve_samples=batch)
    evolution = CoEvolution(teacher, calibration, stream, synthesis, settings)
    evolution.prepare()
    images = evolution.draw()
    optimizer = torch.optim.Adam(student.model.parameters(), lr=1e-6)
    float_optimizer = torch.optim.Adam(float_student.model.parameters(), lr=1e-6)

    def student_step() -> None:
        evolution.learn(images, Tensor.backward)
        optimizer.step()
        optimizer.zero_grad()

    def plain_step() -> None:
        with torch.no_grad():
            taught = float_teacher.outputs(images)
        normalized_l1(float_student.outputs(images), taught).backward()
        float_optimizer.step()
        float_optimizer.zero_grad()

    def sample_step() -> None:
        synthesis.make(batch, student)

    def plain_sample() -> None:
        pixels = images.clone().requires_grad_()
        loss = normalized_l1(float_student.outputs(pixels), float_teacher.outputs(pixels))
        torch.autograd.grad(loss, pixels)

    return {
        'plain': plain_step,
        'student': student_step,
        'plain sample': plain_sample,
        'sample': sample_step,
        'ranges': lambda: calibration.observe(images.cpu()),
    }


def schedule() -> Tuple[float, float]:
    """Of the default preset, a step of the student: steps of the samples, and batches that ranges are set on."""
    from psaq_mm.engine.presets import resolve_dfq

    preset = resolve_dfq('psaq_v2')
    per_step = 1 / preset['batch_size'] / preset['evolve_every']
    return preset['evolve_samples'] * preset['generator']['steps'] * per_step, preset['calibration_samples'] * per_step


def rows(quick: bool, device: str) -> List[Row]:
    """All claims of this script."""
    batch, size = (1, (224, 224)) if quick else (2, (512, 512))
    what, seconds = (
        f'Swin-T, {batch} x 3 x {size[0]} x {size[1]}',
        in_turn(pieces(batch, size, device), 2 if quick else 5, device),
    )
    median = {name: sorted(found)[len(found) // 2] for name, found in seconds.items()}
    share, ranges = schedule()
    both = [a + b for a, b in zip(seconds['sample'], seconds['student'])]
    control = [a + b for a, b in zip(seconds['plain sample'], seconds['plain'])]
    amortised = [
        share * a + b + ranges * c for a, b, c in zip(seconds['sample'], seconds['student'], seconds['ranges'])
    ]
    lines = [(name, median[name], ratio_of(found, seconds['plain'])) for name, found in seconds.items()]
    lines += [
        (name, sorted(found)[len(found) // 2], ratio_of(found, seconds['plain']))
        for name, found in (
            ('sample + student', both),
            (f'default preset: student + {share:g} sample + ranges', amortised),
        )
    ]
    print(markdown_table((what, 'seconds', 'over plain'), lines), flush=True)
    return [row(f'co-evolution step of {what}, over one of a full-precision student', ratio_of(both, control), BOUND)]


if __name__ == '__main__':
    sys.exit(run_script(rows, __doc__))
