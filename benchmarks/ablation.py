# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What each part of the method is worth, against controls through the same quantizer, seed by seed.

    python benchmarks/ablation.py configs/demo/mask_rcnn_swin_demo_w4a8.py --variants gaussian real psaq_v2 --seeds 0 1
    2

Rows go to ``work_dirs/ablation/<config>.json`` as they come: a run that is stopped goes on where it was. The table has
the mean and, in brackets, the least and greatest of the seeds.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Dict, List, Sequence

ROOT = Path(__file__).resolve().parents[1]
OUT = Path('work_dirs/ablation')

VARIANTS: Dict[str, Dict] = {
    'full_precision': {},
    # ranges alone, nothing trained
    'gaussian': dict(preset='gaussian', iters=0, evolve_every=0, samples='gaussian'),
    'pink': dict(iters=0, evolve_every=0, samples='pink'),
    'real': dict(iters=0, evolve_every=0, samples='real'),
    'without_training': dict(iters=0, evolve_every=0),
    # trained on controls, at equal steps: one pool, made once
    'train_gaussian': dict(samples='gaussian'),
    'train_pink': dict(samples='pink'),
    'train_real': dict(samples='real'),
    # the method, and the method less a part
    'psaq_v2': {},
    'without_discrepancy': dict(generator=dict(discrepancy_weight=0.0)),
    'without_entropy': dict(generator=dict(entropy_weight=0.0)),
    'without_prior': dict(generator=dict(prior_weight=0.0)),
    'without_evolution': dict(evolve_every=0),
    'without_reobserving': dict(reobserve=False),
    'without_augmentation': dict(augment=False),
    'from_gaussian': dict(generator=dict(init='gaussian')),
}


def run(config_path: str, variant: str, seed: int, options: Dict) -> Dict[str, float]:
    """Quantize and evaluate once; the evaluator's metrics and the seconds of the data-free part."""
    from psaq_mm.commands.common import load_config
    from psaq_mm.commands.dfq_train import run_data_free
    from psaq_mm.commands.test import evaluate
    from psaq_mm.engine.checkpoint import read_checkpoint

    config = load_config(config_path, options)
    name = f'{Path(config_path).stem}_{variant}_{seed}_{time.time_ns()}'
    config.work_dir = str(OUT / Path(config_path).stem / f'{variant}_{seed}')
    config.experiment_name, config.log_level = name, 'ERROR'
    if config.get('visualizer'):
        config.visualizer.name = name
    if variant == 'full_precision':
        begun = time.perf_counter()
        return dict(
            evaluate(config, read_checkpoint(config.load_from), config.load_from, full_precision=True),
            seconds=time.perf_counter() - begun,
        )
    changes = dict(VARIANTS[variant])
    generator = {**config.dfq.get('generator', {}), **changes.pop('generator', {})}
    config.dfq = {
        **config.dfq,
        **changes,
        'generator': generator,
        'seed': seed,
        'checkpoint_interval': 0,
        'sheet_interval': 0,
    }
    begun = time.perf_counter()
    runner = run_data_free(config)
    seconds = time.perf_counter() - begun
    student = Path(runner.work_dir) / 'student.pth'
    config.experiment_name = name + '_test'
    if config.get('visualizer'):
        config.visualizer.name = config.experiment_name
    return dict(evaluate(config, read_checkpoint(student), str(student)), seconds=seconds)


def table(rows: List[Dict], keys: Sequence[str]) -> str:
    """Markdown: one line a variant, mean and (least to greatest) over the seeds."""
    lines = ['| variant | seeds | ' + ' | '.join(keys) + ' | seconds |', '|---' * (len(keys) + 3) + '|']
    for variant in dict.fromkeys(r['variant'] for r in rows):
        own = [r for r in rows if r['variant'] == variant]
        cells = []
        for key in keys:
            values = [r['metrics'][key] * (100 if key.startswith('coco/') else 1) for r in own]
            spread = f' ({min(values):.2f} to {max(values):.2f})' if len(values) > 1 else ''
            cells.append(f'{statistics.mean(values):.2f}{spread}')
        seconds = statistics.mean(r['metrics']['seconds'] for r in own)
        lines.append(f'| {variant} | {len(own)} | ' + ' | '.join(cells) + f' | {seconds:.0f} |')
    return '\n'.join(lines)


def main(argv: Sequence[str] = None) -> int:
    """Command line."""
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('--variants', nargs='+', choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    parser.add_argument('--name', help="of the file of rows; the config's by default")
    args = parser.parse_args(argv)
    warnings.filterwarnings('ignore')
    logging.disable(logging.WARNING)
    path = OUT / f'{args.name or Path(args.config).stem}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(path.read_text()) if path.is_file() else []
    wanted = [(v, s) for v in args.variants for s in (args.seeds if v != 'full_precision' else args.seeds[:1])]
    for variant, seed in wanted:
        if any(r['variant'] == variant and r['seed'] == seed for r in rows):
            continue
        with open(os.devnull, 'w') as quiet, warnings.catch_warnings():
            out, sys.stdout = sys.stdout, quiet
            try:
                metrics = run(args.config, variant, seed, args.cfg_options)
            finally:
                sys.stdout = out
        rows.append(dict(variant=variant, seed=seed, metrics=metrics))
        partial = path.with_suffix('.partial')
        partial.write_text(json.dumps(rows, indent=1))
        os.replace(partial, path)
        shown = {
            k: round(v, 4) for k, v in metrics.items() if k in ('coco/bbox_mAP', 'coco/segm_mAP', 'mIoU', 'seconds')
        }
        print(variant, seed, shown, flush=True)
    keys = [k for k in ('coco/bbox_mAP', 'coco/segm_mAP', 'mIoU') if k in rows[0]['metrics']]
    print(table(rows, keys))
    return 0


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main())
