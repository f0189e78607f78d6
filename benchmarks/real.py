# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Real images and annotations through the user's own commands: ``make real DATA=folder``.

(a) The full-size Mask R-CNN Swin-T config at COCO resolution: data-free for a few steps, then ``tools/test.py`` on COCO
    photographs. Weights are random and the score threshold is 0: the point is that everything fits and runs, at what
    memory and speed. Its AP says nothing.
(b) A small UperNet with Swin, trained from scratch on CamVid: mIoU before and after data-free quantization.

The folder holds ``coco_mini/{val2017,annotations}`` and ``camvid/{images,annotations}/{train,val,test}``.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, Sequence

ROOT = Path(__file__).resolve().parents[1]
OUT = Path('work_dirs/real')
DETECTOR = 'configs/mask_rcnn_swin_t_w8a8.py'
SEGMENTOR = 'configs/upernet_swin_camvid.py'


def call(arguments: Sequence, environment: Dict[str, str], log: Path) -> Dict[str, float]:
    """Run a command with its output in ``log``; seconds and peak resident memory (GiB) of that process alone."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *map(str, arguments)]
    print('$', *['python', *command[1:]], flush=True)
    begun = time.perf_counter()
    with open(log, 'w') as file:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = '\n'.join(log.read_text(errors='replace').splitlines()[-8:])
        raise SystemExit(f'{arguments[0]} failed with status {process.returncode}; the end of {log}:\n{tail}')
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1024 if sys.platform != 'darwin' else 1
    return dict(seconds=time.perf_counter() - begun, peak_gib=usage.ru_maxrss * unit / 2**30)


def subset(annotations: Path, count: int, out: Path) -> Path:
    """The first ``count`` images of a COCO annotation file (all with 0), written to ``out``."""
    content = json.loads(annotations.read_text())
    if count:
        content['images'] = content['images'][:count]
        kept = {image['id'] for image in content['images']}
        content['annotations'] = [a for a in content['annotations'] if a['image_id'] in kept]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content))
    return out.resolve()


def student_steps(work_dir: Path) -> List[float]:
    """Seconds of each student step without a round of synthesis before it, from the log."""
    newest = max(work_dir.glob('*/vis_data/scalars.json'))
    entries = [json.loads(line) for line in newest.read_text().splitlines()]
    return [e['time'] - e['data_time'] for e in entries if 'loss' in e]


def random_checkpoint(config: str, out: Path) -> Path:
    """A checkpoint of the config's full-precision model with random weights."""
    import torch
    from mmengine.config import Config

    from psaq_mm.engine.building import build_model
    from psaq_mm.engine.config import full_precision_model_config

    cfg = Config.fromfile(ROOT / config)
    torch.manual_seed(0)
    model = build_model(cfg, full_precision_model_config(cfg.model))
    model.init_weights()
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state_dict=model.state_dict(), meta={}), out)
    return out


def detector(data: Path, args: argparse.Namespace, environment: Dict[str, str]) -> Dict:
    """Part (a)."""
    work = OUT / 'mask_rcnn_swin_t_w8a8'
    checkpoint = random_checkpoint(DETECTOR, OUT / 'mask_rcnn_swin_t_random.pth')
    options = [
        f'dfq.iters={args.steps}',
        'dfq.calibration_samples=1',
        'dfq.evolve_every=2',
        'dfq.evolve_samples=1',
        'dfq.log_interval=1',
        f'dfq.generator.steps={args.synthesis_steps}',
        'dfq.checkpoint_interval=0',
    ]
    train = call(
        ['tools/dfq_train.py', DETECTOR, '--checkpoint', checkpoint, '--work-dir', work, '--cfg-options', *options],
        environment,
        work / 'train.log',
    )
    coco = data / 'coco_mini'
    annotations = subset(
        next((coco / 'annotations').glob('instances_val*.json')), args.images, OUT / 'instances_val.json'
    )
    test = call(
        [
            'tools/test.py',
            DETECTOR,
            work / 'student.pth',
            '--work-dir',
            work,
            '--cfg-options',
            f'test_dataloader.dataset.data_root={coco.resolve()}',
            f'test_dataloader.dataset.ann_file={annotations}',
            'test_dataloader.num_workers=0',
            'test_dataloader.persistent_workers=False',
            f'test_evaluator.ann_file={annotations}',
            'model.test_cfg.rcnn.score_thr=0.0',
        ],
        environment,
        work / 'test.log',
    )
    import torch

    made = torch.load(work / 'student.pth', map_location='cpu')['meta']['psaq_mm']['dfq']
    rounds = made['rounds']
    images = len(json.loads(annotations.read_text())['images'])
    steps = student_steps(work)
    return dict(
        size=made['size'],
        data_free=train,
        test=test,
        images=images,
        seconds_per_synthesis_step=made['seconds']['synthesis'] / (rounds * args.synthesis_steps),
        seconds_per_student_step=sum(steps) / len(steps),
        seconds_per_image=test['seconds'] / images,
        metrics=json.loads((work / 'test_results.json').read_text())['quantized'],
    )


def segmentor(data: Path, args: argparse.Namespace, environment: Dict[str, str]) -> Dict:
    """Part (b)."""
    checkpoint = OUT / 'upernet_swin_camvid.pth'
    found = {}
    if not checkpoint.is_file():
        options = ['--cfg-options', f'train_cfg.max_iters={args.train_iters}'] if args.train_iters else []
        found['training'] = call(
            ['demo/train_full_precision.py', SEGMENTOR, '--out', checkpoint, *options],
            environment,
            OUT / 'train_camvid.log',
        )
    for bits in ('w8a8', 'w4a8'):
        config, work = f'configs/upernet_swin_camvid_{bits}.py', OUT / f'upernet_swin_camvid_{bits}'
        options = ['--cfg-options', f'dfq.iters={args.steps}'] if args.quick else []
        train = call(['tools/dfq_train.py', config, '--work-dir', work, *options], environment, work / 'train.log')
        call(
            ['tools/test.py', config, work / 'student.pth', '--full-precision', '--work-dir', work],
            environment,
            work / 'test.log',
        )
        result = json.loads((work / 'test_results.json').read_text())
        found[bits] = dict(data_free=train, full_precision=result['full_precision'], quantized=result['quantized'])
    return found


def main(argv: Sequence[str] = None) -> int:
    """Command line; writes ``work_dirs/real/summary.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', required=True, type=Path, help='folder with coco_mini/ and camvid/')
    parser.add_argument('--only', choices=['detector', 'segmentor'])
    parser.add_argument('--images', type=int, default=24, help='COCO photographs to evaluate, 0 for all')
    parser.add_argument('--steps', type=int, default=4, help='student steps at full size')
    parser.add_argument('--synthesis-steps', type=int, default=4)
    parser.add_argument('--train-iters', type=int, default=0, help="training steps on CamVid, 0 for the config's own")
    parser.add_argument('--quick', action='store_true', help='few steps on CamVid too: for tests')
    args = parser.parse_args(argv)
    parts = dict(detector=detector, segmentor=segmentor)
    if args.only:
        parts = {args.only: parts[args.only]}
    for part, folder in (('detector', 'coco_mini'), ('segmentor', 'camvid')):
        if part in parts and not (args.data / folder).is_dir():
            raise SystemExit(f'{args.data} has no folder {folder}: name the folder that holds coco_mini and camvid')
    environment = dict(os.environ, PSAQ_MM_DATA=str(args.data.resolve()), PYTHONPATH=str(ROOT))
    os.environ.update(PSAQ_MM_DATA=environment['PSAQ_MM_DATA'])
    os.chdir(ROOT)
    summary = {name: part(args.data.resolve(), args, environment) for name, part in parts.items()}
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / 'summary.json'
    earlier = json.loads(path.read_text()) if path.is_file() else {}  # of the part that --only left out
    path.write_text(json.dumps({**earlier, **summary}, indent=2))
    if 'detector' in summary:
        d = summary['detector']
        print(
            f'\nMask R-CNN Swin-T, random weights, {d["size"][0]} x {d["size"][1]}: data-free peak '
            f'{d["data_free"]["peak_gib"]:.1f} GiB, '
            f'{d["seconds_per_synthesis_step"]:.1f} s a synthesis step, {d["seconds_per_student_step"]:.1f} s a '
            f'student step; '
            f'test peak {d["test"]["peak_gib"]:.1f} GiB, {d["seconds_per_image"]:.1f} s an image ({d["images"]} '
            f'images); {d["metrics"]}'
        )
    for bits in ('w8a8', 'w4a8'):
        if 'segmentor' in summary:
            s = summary['segmentor'][bits]
            print(
                f'UperNet on CamVid, {bits.upper()}: mIoU {s["full_precision"]["mIoU"]:.2f} before, '
                f'{s["quantized"]["mIoU"]:.2f} after; '
                f'{s["data_free"]["seconds"]:.0f} s'
            )
    print(f'saved to {path}')
    return 0


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main())
