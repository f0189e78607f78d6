# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How long ``import psaq_mm`` takes beyond ``import torch``, and which libraries it loads.

    python benchmarks/startup.py [--quick]

Each time in a new process that imports torch first; the median counts. Beside it, without a bound: all parts of the
library that need PyTorch alone. Neither may load anything of OpenMMLab.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import List, Tuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import Row, row, run_script  # noqa: E402
from psaq_mm.tables import markdown_table  # noqa: E402

PARTS = (
    'psaq_mm.quantization',
    'psaq_mm.pictures',
    'psaq_mm.calibration',
    'psaq_mm.psaq_vit',
    'psaq_mm.visualization',
    'psaq_mm.runtime',
)
LIBRARIES = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'timm')
SECONDS = 0.2

PROGRAM = """
import importlib, json, sys, time
begun = time.perf_counter()
import torch
middle = time.perf_counter()
for name in sys.argv[2:]:
    importlib.import_module(name)
seconds = time.perf_counter() - middle
found = sorted(set(json.loads(sys.argv[1])) & {name.partition('.')[0] for name in sys.modules})
print(json.dumps([middle - begun, seconds, found]))
"""


def imported(*modules: str) -> Tuple[float, float, List[str]]:
    """Seconds of importing torch and then the modules, in a new process, and which of :data:`LIBRARIES` that loaded."""
    command = [sys.executable, '-c', PROGRAM, json.dumps(LIBRARIES), *modules]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    return tuple(
        json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)
    )


def rows(quick: bool, device: str) -> List[Row]:
    """See the module."""
    found, lines, loaded = [], [], []
    imported('psaq_mm', *PARTS)  # compiles what is not compiled yet
    for modules in (('psaq_mm',), PARTS):
        measured = [imported(*modules) for _ in range(2 if quick else 7)]
        seconds = statistics.median(extra for _, extra, _ in measured)
        loaded += measured[0][2]
        lines.append((', '.join(modules), statistics.median(torch for torch, _, _ in measured), seconds))
        if modules == ('psaq_mm',):
            found.append(row('import psaq_mm beyond import torch (s)', seconds, SECONDS))
    found.append(row('libraries of OpenMMLab loaded before a config asks', len(loaded), 0))
    print(markdown_table(('imported after torch', 'torch s', 'beyond it s'), lines))
    return found


if __name__ == '__main__':
    sys.exit(run_script(rows, __doc__))
