# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Peak memory of whole data-free runs at the resolution of detection and segmentation.

    python benchmarks/memory.py [--quick]

The real tool, ``tools/dfq_train.py``, in a process of its own, on the leaf configs of Swin-S at W8A8 and their own
sizes: Mask R-CNN at 800 x 1216, one image a batch, and UperNet at 512 x 512, four; each without and with activation
checkpointing (``with_cp``). Weights are random, from a full-precision checkpoint that this script writes. A run has
every phase of a long one (synthesis, calibration, training with its optimizer, a second round of synthesis against the
student, saving), and few steps of each: more of them take more time and no more memory, but for the pool of samples,
which grows to ``dfq.pool_size``. What is missing of that is added.

The figure is the greatest resident set of the process as the kernel counts it, in GiB, interpreter and libraries
included. ``--quick``: a single and shorter run of Mask R-CNN, with checkpointing, one sample, and no round of synthesis
against the student. The device is the CPU.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List, NamedTuple, Tuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import Row, row, run_script  # noqa: E402
from psaq_mm.tables import markdown_table  # noqa: E402


class Workload(NamedTuple):
    """A leaf config and the samples of its run."""

    name: str
    config: str
    batch: int
    size: Tuple[int, int]
    pool: int


WORKLOADS = (
    Workload('Mask R-CNN Swin-S, 1 x 800 x 1216', 'configs/mask_rcnn_swin_s_w8a8.py', 1, (800, 1216), 32),
    Workload('UperNet Swin-S, 4 x 512 x 512', 'configs/upernet_swin_s_w8a8.py', 4, (512, 512), 64),
)
GIB = 2**30
BOUNDS = {False: 12.0, True: 8.0}
"""GiB without and with activation checkpointing."""


def write_checkpoint(config: str, path: Path) -> None:
    """Random weights of a config's full-precision model, as its library saves them."""
    import torch
    from mmengine.config import Config

    from psaq_mm.engine.building import build_model
    from psaq_mm.engine.config import full_precision_model_config

    loaded = Config.fromfile(str(ROOT / config))
    torch.manual_seed(0)
    model = build_model(loaded, full_precision_model_config(loaded.model))
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=('a',)))), path)


def run(workload: Workload, checkpoint: Path, with_cp: bool, threads: int, quick: bool) -> Tuple[float, float]:
    """Peak memory, in GiB, and seconds of one run of the tool."""
    steps, first, later = (1, 1, 0) if quick else (2, 2, 1)
    options = {
        'generator.steps': steps,
        'iters': steps,
        'calibration_samples': first * workload.batch,
        'evolve_every': later,
        'evolve_samples': workload.batch,
        'checkpoint_interval': 1,
        'sheet_interval': 0,
    }
    with tempfile.TemporaryDirectory() as folder:
        given = [f'dfq.{key}={value}' for key, value in options.items()] + [f'model.backbone.with_cp={with_cp}']
        command = [
            sys.executable,
            str(ROOT / 'tools' / 'dfq_train.py'),
            str(ROOT / workload.config),
            '--checkpoint',
            str(checkpoint),
            '--work-dir',
            folder,
            '--cfg-options',
            *given,
        ]
        program = (
            'import resource, subprocess, sys, time; begun = time.perf_counter(); found = subprocess.run(sys.argv[1:], '
            'stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True); print(found.stdout[-3000:] if '
            'found.returncode else "", '
            'file=sys.stderr); print(found.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, '
            'time.perf_counter() - begun)'
        )
        # One process between, which has no other child: the kernel keeps the greatest of all children.
        environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS=str(threads))
        found = subprocess.run(
            [sys.executable, '-c', program, *command], stdout=subprocess.PIPE, text=True, env=environment, check=True
        )
    status, peak, seconds = found.stdout.split()
    if status != '0':
        raise RuntimeError(f'{" ".join(command)} ended with exit code {status}; its last lines are above')
    missing = 4 * 3 * workload.size[0] * workload.size[1] * (workload.pool - (first + later) * workload.batch)
    return (int(peak) * 1024 + missing) / GIB, float(seconds)


def rows(quick: bool, device: str) -> List[Row]:
    """See the module."""
    import torch

    if torch.device(device).type != 'cpu':
        print('Memory of the whole run: measured on the CPU alone, where the resident set is all there is')
        return []
    found, lines = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, workload in enumerate(WORKLOADS[:1] if quick else WORKLOADS):
            checkpoint = Path(folder) / f'{number}.pth'
            # Apart, as all that is measured: a model that was built here would stay with this process.
            subprocess.run(
                [sys.executable, __file__, '--write', workload.config, str(checkpoint)],
                check=True,
                env=dict(os.environ, PYTHONPATH=str(ROOT)),
                stdout=subprocess.DEVNULL,
            )
            for with_cp in (True,) if quick else (False, True):
                peak, seconds = run(workload, checkpoint, with_cp, torch.get_num_threads(), quick)
                name = f'{workload.name}, {"with_cp" if with_cp else "without checkpointing"}'
                lines.append((name, peak, BOUNDS[with_cp], round(seconds)))
                found.append(row(f'memory of the whole run, {name} (GiB)', peak, BOUNDS[with_cp]))
                print(f'{name}: {peak:.2f} GiB in {seconds:.0f} s', file=sys.stderr, flush=True)
    print(markdown_table(('whole data-free run', 'peak GiB', 'bound', 'seconds'), lines))
    return found


if __name__ == '__main__':
    if sys.argv[1:2] == ['--write']:
        write_checkpoint(sys.argv[2], Path(sys.argv[3]))
        sys.exit(0)
    sys.exit(run_script(rows, __doc__))
