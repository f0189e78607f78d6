# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Images per second of a whole detector or segmentor: PyTorch in float32 against the exported integer model, box decoding, RoI heads and
masks included, as ``tools/test.py`` calls it.

Without checkpoints, weights are random and the quantizers' ranges come from noise: neither changes what the graph costs. What random
weights change is how many boxes the RoI heads see: with the score threshold at 0 they keep as many as the config allows, the most that an
image can cost.

Example:
    python benchmarks/deploy_detector.py configs/mask_rcnn_swin_t_w8a8.py --size 800 1216
    python benchmarks/deploy_detector.py configs/demo/mask_rcnn_swin_demo_w8a8.py --checkpoint demo/checkpoints/mask_rcnn_swin_demo.pth
"""
import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from psaq_mm.commands.common import load_config  # noqa: E402
from psaq_mm.commands.export import default_sizes  # noqa: E402
from psaq_mm.deploy import export_model  # noqa: E402
from psaq_mm.deploy.runtime import RUNTIMES  # noqa: E402
from psaq_mm.engine.checkpoint import load_weights, read_checkpoint  # noqa: E402
from psaq_mm.engine.config import drop_pretrained, full_precision_model_config, quantized_model_config  # noqa: E402
from psaq_mm.models import TaskModel, deploy_model_  # noqa: E402
from psaq_mm.quantization import calibrate  # noqa: E402
from psaq_mm.synthesis import pink_noise  # noqa: E402


def build(config, settings, checkpoint):
    """A model of the config in evaluation mode; random weights without a checkpoint."""
    from mmengine.registry import MODELS, init_default_scope
    init_default_scope(config.get('default_scope', 'mmengine'))
    drop_pretrained(settings)
    torch.manual_seed(0)
    model = MODELS.build(settings)
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
    return [Sample(metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1., 1.)))]


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('--checkpoint', help='full-precision weights; random without')
    parser.add_argument('--size', nargs=2, type=int, metavar=('H', 'W'), help='defaults to the first that is exported for')
    parser.add_argument('--quant')
    parser.add_argument('--runtime', nargs='+', default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(args.threads)
    config = load_config(args.config, None, args.quant, None)
    size = tuple(args.size or default_sizes(config)[0])
    student = build(config, quantized_model_config(config), args.checkpoint)
    image = pink_noise(1, size, TaskModel(student).image_spec)
    calibrate(student, lambda: TaskModel(student).calibration_forward(image, student.quant_spec.scope), allow_unseen=True)
    models = {'PyTorch float32': build(config, full_precision_model_config(config.model), args.checkpoint)}
    kind = 'seg' if hasattr(student, 'decode_head') else 'det'
    with tempfile.TemporaryDirectory() as folder:
        label = export_model(student, os.path.join(folder, 'out'), [size]).manifest['label']
        for runtime in args.runtime:
            models[f'{label} {runtime}'] = deploy_model_(
                build(config, quantized_model_config(config), args.checkpoint), os.path.join(folder, 'out'), runtime, args.threads)
        del student
        seconds = {name: [] for name in models}
        with torch.no_grad():
            for i in range(args.rounds + 1):
                for name, model in models.items():
                    time.sleep(.05)
                    begun = time.perf_counter()
                    model.predict(image, samples(kind, size))
                    if i:
                        seconds[name].append(time.perf_counter() - begun)
    print(f'{os.path.basename(args.config)}, {size[0]} x {size[1]}, batch 1, {args.threads} threads, median of {args.rounds} in turn, '
          f'{args.checkpoint or "random weights"}')
    print(f'{"model":<24}  {"images/s":>8}  {"ms":>9}  {"speed-up":>8}')
    first = statistics.median(seconds['PyTorch float32'])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f'{name:<24}  {1 / median:>8.2f}  {1e3 * median:>9.1f}  {first / median:>8.2f}')


if __name__ == '__main__':
    main()
