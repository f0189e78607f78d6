"""Train a full-precision model from its config and keep what others need of it: weights, class names, the log.

Example:
    python demo/scenes.py --out work_dirs/demo/scenes
    python demo/train_full_precision.py configs/demo/mask_rcnn_swin_demo.py --out
    demo/checkpoints/mask_rcnn_swin_demo.pth
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Dict, List, Sequence

import torch
from mmengine.config import Config, DictAction
from mmengine.runner import Runner

from psaq_mm.commands.common import load_config
from psaq_mm.files import whole_file, write_whole

# What a checkpoint's meta keeps: nothing in it names a machine or holds a class that `weights_only` loading refuses.
META_KEYS = ('dataset_meta', 'cfg', 'iter', 'seed', 'mmengine_version', 'experiment_name')


def read_log(scalars: Path) -> List[Dict]:
    """Records of mmengine's ``scalars.json``: one JSON object a line, losses or metrics with their ``step``."""
    return [json.loads(line) for line in scalars.read_text(encoding='utf-8').splitlines() if line]


def strip(checkpoint: Dict) -> Dict:
    """The weights and the plain part of the meta of a training checkpoint, as small as a repository wants them.

    Matrices and kernels are kept in half precision, which halves the file and moves no metric in its third digit; they
    become float32 again as they are copied into a model. Vectors (biases, norms, running statistics) stay float32:
    they are few, and a running variance may be out of half precision's range.

    Args:
        checkpoint: What mmengine's CheckpointHook saved.

    Returns:
        dict with ``meta`` and ``state_dict`` (on the CPU); no optimizer, no schedule, no message hub.
    """
    weights = {}
    for key, value in checkpoint['state_dict'].items():
        value = value.detach().cpu()
        if value.is_floating_point():
            value = value.half() if value.dim() > 1 else value.float()
        weights[key] = value
    meta = {key: checkpoint['meta'][key] for key in META_KEYS if key in checkpoint['meta']}
    return dict(meta=meta, state_dict=weights)


def train(cfg: Config, out: Path) -> Dict:
    """Train, then write ``out`` (weights only) and ``out`` with the suffix ``.log.json``.

    Args:
        cfg: Config of a full-precision model.
        out: The checkpoint to write; an existing one is replaced once the training is done.

    Returns:
        Metrics of the last validation.
    """
    runner = Runner.from_cfg(cfg)
    runner.train()
    last = Path(runner.work_dir, 'last_checkpoint').read_text(encoding='utf-8').strip()
    records = read_log(Path(runner.log_dir, 'vis_data', 'scalars.json'))
    # weights_only=False: this training wrote the file a moment ago, with mmengine's own classes in its message hub
    trained = strip(torch.load(last, map_location='cpu', weights_only=False))
    with whole_file(out) as partial:
        torch.save(trained, partial)
    text = '[\n' + ',\n'.join(json.dumps(record) for record in records) + '\n]\n'
    write_whole(out.with_suffix('.log.json'), text)
    metrics = [record for record in records if 'loss' not in record]
    return metrics[-1] if metrics else {}


def main(argv: Sequence[str] = None) -> int:
    parser = argparse.ArgumentParser(description='Train a full-precision model and keep its weights and its log.')
    parser.add_argument('config', help='config of the model')
    parser.add_argument('--out', required=True, type=Path, help='checkpoint to write; its log goes beside it')
    parser.add_argument('--work-dir', help='folder of the training (default: work_dirs/<config name>)')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={}, help='settings to override, key=value'
    )
    args = parser.parse_args(argv)
    cfg = load_config(args.config, args.cfg_options)
    cfg.work_dir = args.work_dir or os.path.join('work_dirs', Path(args.config).stem)
    print(json.dumps(train(cfg, args.out)))
    return 0


if __name__ == '__main__':
    sys.exit(main())
