# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a detector does between and after its layers, in NumPy (``psaq_mm.runtime.detection``) against mmdet and mmcv.

Maps are random and of an image of 800 x 1216, with 256 channels, 1000 proposals and 100 detections with masks, RoIs
log-uniform from 16 to 700 pixels: what Mask R-CNN has on COCO. Both sides read the same maps, in turn. The row of a
step is our time in mmdet's; those in seconds are ours alone. Differences of the results are printed::

    python benchmarks/glue.py --threads 2 [--quick]

With pictures, detections of a trained detector are compared instead. The config's test pipeline prepares each picture;
``--score-threshold 0`` compares as many detections as the config allows::

    python benchmarks/glue.py --config configs/demo/mask_rcnn_swin_demo.py --checkpoint
    demo/checkpoints/mask_rcnn_swin_demo.pth --pictures work_dirs/demo/scenes/detection/val

On a machine that does other work too, ``--processor-time`` counts what the processor spends, with ``--threads 1``, as
waiting threads count too.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import Row, begin, row, table_of  # noqa: E402
from psaq_mm.runtime.detection.dense import proposals  # noqa: E402
from psaq_mm.runtime.detection.detector import ImageInfo, box_candidates  # noqa: E402
from psaq_mm.runtime.detection.masks import paste  # noqa: E402
from psaq_mm.runtime.detection.roi_align import Rois, roi_align  # noqa: E402
from psaq_mm.runtime.detection.settings import DetectorSettings  # noqa: E402
from psaq_mm.tables import text_table  # noqa: E402

CHANNELS, CLASSES = 256, 80
SECONDS = {'RoIAlign 7x7': 0.2, 'RoIAlign 14x14': 0.04, 'masks': 0.045, 'all steps': 0.3}
"""Bounds of our own time, with two threads, at the full size."""


class Step(NamedTuple):
    """One step, by both sides, and how far their results lie apart."""

    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    difference: Callable[[Any, Any], str]


def detector():
    """A Mask R-CNN of COCO with a backbone that nobody runs."""
    import mmdet.models  # noqa: F401
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    config = Config.fromfile(str(ROOT / 'configs' / 'mask_rcnn_swin_t_w8a8.py')).model
    for key in ('base_type', 'quant'):
        config.pop(key, None)
    config.update(type='MaskRCNN', data_preprocessor=None)
    config.backbone.update(depths=[1, 1, 1, 1], init_cfg=None)
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(config).eval()


def random_rois(count: int, height: int, width: int, rng) -> np.ndarray:
    """Boxes of log-uniform sizes and uniform places."""
    side, ratio = np.exp(rng.uniform(np.log(16), np.log(700), count)), np.exp(rng.uniform(-0.35, 0.35, count))
    w, h = np.minimum(side * ratio, width), np.minimum(side / ratio, height)
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return np.stack([x, y, x + w, y + h], 1).astype(np.float32)


def largest(a: np.ndarray, b: np.ndarray) -> float:
    """Greatest difference of arrays of one shape; infinity where shapes differ."""
    return float(np.abs(a - b).max(initial=0)) if a.shape == b.shape else float('inf')


def steps(quick: bool, threads: int) -> Dict[str, Step]:
    """All steps, by name."""
    from psaq_mm.deploy.detectors import detector_settings

    rng = np.random.default_rng(0)
    height, width, count, detections = (192, 288, 100, 20) if quick else (800, 1216, 1000, 100)
    model = detector()
    settings = DetectorSettings.from_dict(detector_settings(model))
    info = ImageInfo((height, width), (height, width))
    meta = dict(img_shape=info.shape, ori_shape=info.original, scale_factor=info.scale)
    rois = random_rois(count, height, width, rng)
    return {
        'proposals': proposal_step(model, settings, info, meta, rng),
        'RoIAlign 7x7': align_step(model.roi_head.bbox_roi_extractor, settings.box[0].align, rois, info, threads, rng),
        'boxes': box_step(model.roi_head, settings, rois, info, meta, rng),
        'RoIAlign 14x14': align_step(
            model.roi_head.mask_roi_extractor, settings.mask[0].align, rois[:detections], info, threads, rng
        ),
        'masks': mask_step(model.roi_head, settings, rois[:detections], info, meta, rng),
    }


def proposal_step(model, settings, info, meta, rng) -> Step:
    """RPN maps to proposals."""
    sizes = [(-(-info.shape[0] // int(s)), -(-info.shape[1] // int(s))) for s, _ in settings.dense.priors.strides]
    scores = [rng.normal(-4, 2, (1, 3, *size)).astype(np.float32) for size in sizes]
    deltas = [rng.normal(0, 0.3, (1, 12, *size)).astype(np.float32) for size in sizes]
    tensors = [torch.from_numpy(s) for s in scores], [torch.from_numpy(d) for d in deltas]
    maps = [[s[0] for s in scores], [d[0] for d in deltas]]

    def difference(ours, theirs):
        same = len(ours.boxes) == len(theirs.bboxes)
        return f'{len(ours.boxes)} boxes{"" if same else " !"}, {largest(ours.boxes, theirs.bboxes.numpy()):.1e} px'

    return Step(
        lambda: proposals(settings.dense, maps, info.shape),
        lambda: model.rpn_head.predict_by_feat(*tensors, batch_img_metas=[meta], rescale=False)[0],
        difference,
    )


def align_step(extractor, settings, rois, info, threads, rng) -> Step:
    """Levels to RoI features."""
    sizes = [(-(-info.shape[0] // int(s)), -(-info.shape[1] // int(s))) for s in settings.strides]
    levels = [rng.standard_normal((1, *size, CHANNELS), dtype=np.float32) for size in sizes]
    tensors = [torch.from_numpy(level).permute(0, 3, 1, 2).contiguous() for level in levels]
    tensor_rois = torch.cat([torch.zeros(len(rois), 1), torch.from_numpy(rois)], 1)
    numbered = Rois(rois, np.zeros(len(rois), np.int64))
    return Step(
        lambda: roi_align(settings, levels, numbered, threads),
        lambda: extractor(tensors, tensor_rois),
        lambda ours, theirs: f'{largest(ours, theirs.permute(0, 2, 3, 1).numpy()):.1e}',
    )


def box_step(roi_head, settings, rois, info, meta, rng) -> Step:
    """Outputs of the box head to detections. Of each third RoI a class stands out."""
    logits = rng.normal(0, 1, (len(rois), CLASSES + 1)).astype(np.float32)
    logits[:, -1] += 6
    logits[::3][np.arange(len(logits[::3])), rng.integers(0, CLASSES, len(logits[::3]))] += 6
    deltas = rng.normal(0, 1, (len(rois), 4 * CLASSES)).astype(np.float32)
    tensor_rois = torch.cat([torch.zeros(len(rois), 1), torch.from_numpy(rois)], 1)

    def difference(ours, theirs):
        same = len(ours.boxes) == len(theirs.bboxes)
        return f'{len(ours.boxes)} boxes{"" if same else " !"}, {largest(ours.boxes, theirs.bboxes.numpy()):.1e} px'

    return Step(
        lambda: box_candidates(settings, settings.box[0], rois, logits, deltas, info),
        lambda: roi_head.bbox_head.predict_by_feat(
            (tensor_rois,),
            (torch.from_numpy(logits),),
            (torch.from_numpy(deltas),),
            [meta],
            roi_head.test_cfg,
        )[0],
        difference,
    )


def mask_step(roi_head, settings, boxes, info, meta, rng) -> Step:
    """Masks of detections to masks of the picture."""
    from mmengine.structures import InstanceData

    logits = rng.normal(0, 2, (len(boxes), 1, 28, 28)).astype(np.float32)
    tensor, head = torch.from_numpy(logits).expand(-1, CLASSES, -1, -1), roi_head.mask_head
    labels = torch.zeros(len(boxes), dtype=torch.long)

    def theirs():
        results = InstanceData(bboxes=torch.from_numpy(boxes.copy()), labels=labels)
        return head.predict_by_feat([tensor], [results], [meta], roi_head.test_cfg, rescale=True)[0].masks

    def ours():
        values = 1 / (1 + np.exp(-logits[:, 0]))
        return paste(values, boxes / np.array([*info.scale] * 2, np.float32), info.original, settings.mask_threshold)

    return Step(ours, theirs, lambda a, b: f'{int((a != b.numpy()).sum())} of {a.size} pixels')


def measured(step: Step, rounds: int, clock: Callable[[], float]) -> Tuple[float, float]:
    """Median seconds of both sides, in turn."""
    seconds: Tuple[List[float], List[float]] = ([], [])
    for turn in range(rounds + 1):
        for call, times in zip((step.ours, step.theirs), seconds):
            begun = clock()
            call()
            if turn:
                times.append(clock() - begun)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def rows(quick: bool, device: str, clock: Callable[[], float] = time.perf_counter) -> List[Row]:
    """Measure, print the table, and return a row for each step."""
    threads, table, found = torch.get_num_threads(), [], []
    total = np.zeros(2)
    for name, step in steps(quick, threads).items():
        ours, theirs = measured(step, 2 if quick else 7, clock)
        total += ours, theirs
        table.append((name, f'{ours * 1e3:.1f}', f'{theirs * 1e3:.1f}', step.difference(step.ours(), step.theirs())))
        found.append(row(f'glue: {name}, time in that of mmdet', ours / theirs, 1.0))
        if name in SECONDS:
            found.append(row(f'glue: {name}, seconds', ours, SECONDS[name]))
    found.append(row('glue: all steps, seconds', total[0], SECONDS['all steps']))
    table.append(('all steps', *(f'{seconds * 1e3:.1f}' for seconds in total), ''))
    print(text_table(('step', 'NumPy, ms', 'mmdet, ms', 'difference'), table, 'lrrl'), flush=True)
    return found


def compare_pictures(config: str, checkpoint: str, folder: str, score_threshold: Optional[float]) -> bool:
    """Print how the glue's detections of all pictures of a folder differ from mmdet's; whether none differs too far."""
    from mmcv.transforms import Compose
    from mmdet.apis import init_detector
    from mmdet.utils import get_test_pipeline_cfg

    from psaq_mm.deploy.glue_check import GlueAgreement, compare_glue

    model = init_detector(config, checkpoint, device='cpu')
    if score_threshold is not None:
        (getattr(model, 'roi_head', None) or model.bbox_head).test_cfg.score_thr = score_threshold
    steps = [step for step in get_test_pipeline_cfg(model.cfg) if step['type'] != 'LoadAnnotations']
    prepare = Compose(steps)
    total, good = GlueAgreement(), 0
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in ('.jpg', '.jpeg', '.png'))
    for path in paths:
        data = prepare(dict(img_path=str(path), img_id=0))
        images = model.data_preprocessor(dict(inputs=[data['inputs']], data_samples=[data['data_samples']]))['inputs']
        meta = data['data_samples'].metainfo
        info = ImageInfo(meta['img_shape'][:2], meta['ori_shape'][:2], meta['scale_factor'])
        agreement = compare_glue(model, images, [info], torch.get_num_threads())
        good += agreement.good
        total = total.plus(agreement)
        if not agreement.good:
            print(f'{path.name}: {agreement}', flush=True)
    print(f'{total}\n{good} of {len(paths)} pictures have the same detections')
    return good == len(paths)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='small sizes and few repeats')
    parser.add_argument('--threads', type=int, default=2, help='of both sides (default: %(default)s)')
    parser.add_argument('--processor-time', action='store_true', help='see above')
    parser.add_argument('--config', help='of a detector, for --pictures')
    parser.add_argument('--checkpoint', help='full-precision weights, for --pictures')
    parser.add_argument('--pictures', help='folder: compare the detections of its pictures')
    parser.add_argument('--score-threshold', type=float, help='defaults to that of the config')
    args = parser.parse_args()
    begin('cpu', args.threads)
    if args.pictures:
        return int(not compare_pictures(args.config, args.checkpoint, args.pictures, args.score_threshold))
    found = rows(args.quick, 'cpu', time.process_time if args.processor_time else time.perf_counter)
    print(table_of(found), flush=True)
    return int(not args.quick and not all(r['ok'] for r in found))


if __name__ == '__main__':
    sys.exit(main())
