# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Images per second of a whole detector or segmentor: PyTorch in float32 against the exported integer model, box
decoding, RoI heads and masks included, as ``tools/test.py`` calls it.

Without checkpoints, weights are random and the quantizers' ranges come from noise: neither changes what the graph
costs. What random weights change is how many boxes the RoI heads see. So every score threshold is 0 and the RPN's
suppression is off: boxes are as many as the config allows, the most that an image can cost (1000 proposals and 100
detections with their masks in the configs of COCO). Their numbers are printed, and a detector that gives fewer ends the
benchmark.

Example:
    python benchmarks/deploy_detector.py configs/mask_rcnn_swin_t_w8a8.py --size 800 1216
    python benchmarks/deploy_detector.py configs/demo/mask_rcnn_swin_demo_w8a8.py --checkpoint
    demo/checkpoints/mask_rcnn_swin_demo.pth
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
import warnings
from typing import NamedTuple, Optional

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from psaq_mm.commands.common import load_config  # noqa: E402
from psaq_mm.commands.export import default_sizes  # noqa: E402
from psaq_mm.contexts import replaced  # noqa: E402
from psaq_mm.deploy import export_model  # noqa: E402
from psaq_mm.deploy.serving import deploy_model_  # noqa: E402
from psaq_mm.engine.building import build_model  # noqa: E402
from psaq_mm.engine.checkpoint import load_weights, read_checkpoint  # noqa: E402
from psaq_mm.engine.config import full_precision_model_config, quantized_model_config  # noqa: E402
from psaq_mm.models import TaskModel  # noqa: E402
from psaq_mm.pictures import PinkNoise  # noqa: E402
from psaq_mm.quantization import calibrate  # noqa: E402
from psaq_mm.runtime import RUNTIMES  # noqa: E402
from psaq_mm.tables import text_table  # noqa: E402


def build(config, settings, checkpoint):
    """A model of the config in evaluation mode; random weights without a checkpoint."""
    torch.manual_seed(0)
    model = build_model(config, settings)
    if checkpoint:
        load_weights(model, read_checkpoint(checkpoint), checkpoint)
    model.eval()
    return model


def samples(kind, size):
    """Metainfo as the libraries' test pipelines give it."""
    if kind == 'det':
        from mmdet.structures import DetDataSample as Sample
    else:
        from mmseg.structures import SegDataSample as Sample
    return [
        Sample(
            metainfo=dict(
                img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0)
            )
        )
    ]


class Boxes(NamedTuple):
    """Boxes of one image: those that enter the RoI heads, and those that come out of the detector; None where there are
    none such.
    """

    proposals: Optional[int]
    detections: Optional[int]


def without_thresholds(settings):
    """Set every score threshold of a model's config to 0 and the RPN's suppression to none, in place; how many boxes
    are left then.
    """
    test_cfg = settings.get('test_cfg') or {}
    rpn, rcnn = test_cfg.get('rpn'), test_cfg.get('rcnn', test_cfg)
    if rpn:
        rpn.nms.iou_threshold = 1.0
    if 'max_per_img' not in rcnn:  # a segmentor
        return Boxes(None, None)
    rcnn.score_thr = 0.0
    return Boxes(rpn.max_per_img if rpn else None, rcnn.max_per_img)


def boxes_of(model, image, kind):
    """How many boxes a model has on an image."""
    proposals, head = [], getattr(model, 'roi_head', None)
    library = getattr(head, 'predict', None)

    def predict(levels, of_images, *args, **kwargs):
        proposals.extend(map(len, of_images))
        return library(levels, of_images, *args, **kwargs)

    with contextlib.nullcontext() if head is None else replaced(head, 'predict', predict):
        sample = model.predict(image, samples(kind, tuple(image.shape[-2:])))[0]
    detections = len(sample.pred_instances) if 'pred_instances' in sample else None
    return Boxes(proposals[0] if proposals else None, detections)


def check_boxes(name, found, wanted):
    """Exit where a detector has other numbers of boxes than it is measured with."""
    if found != wanted:
        raise SystemExit(
            f'{name} has {found.proposals} proposals and {found.detections} detections on the image, not '
            f'{wanted.proposals} and '
            f'{wanted.detections}: its RoI heads have less to do than is to be measured; give a larger --size'
        )


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('--checkpoint', help='full-precision weights; random without')
    parser.add_argument(
        '--size', nargs=2, type=int, metavar=('H', 'W'), help='defaults to the first that is exported for'
    )
    parser.add_argument('--quant')
    parser.add_argument('--runtime', nargs='+', default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument(
        '--processor-time',
        action='store_true',
        help='count what the processor spends on it: for a machine that has other '
        'work, with --threads 1, as waiting threads count too',
    )
    args = parser.parse_args()
    clock = time.process_time if args.processor_time else time.perf_counter
    warnings.simplefilter('ignore')
    torch.set_num_threads(args.threads)
    config = load_config(args.config, None, args.quant, None)
    size = tuple(args.size or default_sizes(config)[0])
    wanted = without_thresholds(config.model)
    student = build(config, quantized_model_config(config), args.checkpoint)
    image = PinkNoise()(1, size, TaskModel(student).image_spec)
    calibrate(
        student, lambda: TaskModel(student).calibration_forward(image, student.quant_spec.scope), allow_unseen=True
    )
    models = {'PyTorch float32': build(config, full_precision_model_config(config.model), args.checkpoint)}
    kind = 'seg' if hasattr(student, 'decode_head') else 'det'
    with tempfile.TemporaryDirectory() as folder:
        label = export_model(student, os.path.join(folder, 'out'), [size]).manifest['label']
        for runtime in args.runtime:
            models[f'{label} {runtime}'] = deploy_model_(
                build(config, quantized_model_config(config), args.checkpoint),
                os.path.join(folder, 'out'),
                runtime,
                args.threads,
            )
        with torch.no_grad():
            for name, model in models.items():
                check_boxes(name, boxes_of(model, image, kind), wanted)
        seconds = {name: [] for name in models}
        with torch.no_grad():
            for i in range(args.rounds + 1):
                for name, model in models.items():
                    time.sleep(0.05)
                    begun = clock()
                    model.predict(image, samples(kind, size))
                    if i:
                        seconds[name].append(clock() - begun)
    print(
        f'{os.path.basename(args.config)}, {size[0]} x {size[1]}, batch 1, {args.threads} threads, median of '
        f'{args.rounds} in turn, '
        f'{args.checkpoint or "random weights"}{", processor time" if args.processor_time else ""}'
    )
    if wanted.detections is not None:
        print(f'{wanted.detections} detections' + (f' of {wanted.proposals} proposals' if wanted.proposals else ''))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = medians['PyTorch float32']
    rows = [(name, f'{1 / m:.2f}', f'{1e3 * m:.1f}', f'{first / m:.2f}') for name, m in medians.items()]
    print(text_table(('model', 'images/s', 'ms', 'speed-up'), rows, 'lrrr', rule=False))


if __name__ == '__main__':
    main()
