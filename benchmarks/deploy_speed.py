# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Exported integer backbone against the same runtime's float32, and against NNCF's integer model where nncf is
installed.

Each pair is measured in one process, the two in turn, so that what else the machine does hits both; the figure is the
ratio of the medians. Weights are random and the ranges come from noise: neither changes what a kernel costs.

Example:
    python benchmarks/deploy_speed.py --threads 2
    python benchmarks/deploy_speed.py --size 224 224 --runtime openvino --rounds 5 --nncf

``--nncf`` takes a Python that has nncf and openvino; by default this one. NNCF wants a newer PyTorch than OpenMMLab's
wheels allow, so it is run without any.
"""

import argparse
import inspect
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks.measuring import busy_share, processor  # noqa: E402
from psaq_mm.deploy import export_model, load  # noqa: E402
from psaq_mm.models import quantize_model_  # noqa: E402
from psaq_mm.quantization import calibrate  # noqa: E402
from psaq_mm.runtime import RUNTIMES, start  # noqa: E402

SIZES = ((224, 224), (800, 1216))
SWIN_T = dict(
    type='mmdet.SwinTransformer',
    embed_dims=96,
    depths=[2, 2, 6, 2],
    num_heads=[3, 6, 12, 24],
    window_size=7,
    drop_path_rate=0.2,
)


def backbone():
    """Swin-T with random weights; of LayerNorm too, as a runtime leaves out gains of 1 and offsets of 0, which no
    trained model has.
    """
    import mmdet.models  # noqa: F401
    from mmengine.registry import MODELS

    torch.manual_seed(0)
    model = MODELS.build(SWIN_T)
    model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def float_graph(model, size):
    """The library's own model as PyTorch's exporter writes it: what a user without quantization runs."""
    file = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # sizes become constants
        legacy = dict(dynamo=False) if 'dynamo' in inspect.signature(torch.onnx.export).parameters else {}
        torch.onnx.export(model, (torch.zeros(1, 3, *size),), file, input_names=['images'], opset_version=17, **legacy)
    return file.getvalue()


NNCF = """
import sys
sys.modules['torch'] = None
import nncf, numpy, openvino
graph, images, out = sys.argv[1:]
images = numpy.load(images)
data = nncf.Dataset([{'images': image[None]} for image in images])
model = openvino.Core().read_model(graph)
model = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images))
openvino.save_model(model, out, compress_to_fp16=False)
"""


def nncf_model(content, images, folder, python):
    """NNCF's post-training quantization of the float graph; the path of OpenVINO's model."""
    graph, data, out = (os.path.join(folder, name) for name in ('float.onnx', 'images.npy', 'nncf.xml'))
    with open(graph, 'wb') as file:
        file.write(content)
    np.save(data, images)
    subprocess.run([python, '-c', NNCF, graph, data, out], check=True, stdout=subprocess.DEVNULL)
    return out


class _Nncf:
    """NNCF's model with the settings of :mod:`psaq_mm.runtime.deployed`."""

    def __init__(self, model, threads):
        import openvino

        settings = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': threads}
        self.request = openvino.Core().compile_model(model, 'CPU', settings).create_infer_request()

    def run(self, inputs):
        """One inference."""
        self.request.infer(inputs)


def medians(sessions, inputs, rounds):
    """Median milliseconds of each session, measured in turn after two warm-ups. Threads of a runtime look out for more
    work for a while after a run, and would be in the way of the next one: each waits.
    """
    seconds = {name: [] for name in sessions}
    for i in range(rounds + 2):
        for name, session in sessions.items():
            time.sleep(0.05)
            begun = time.perf_counter()
            session.run(inputs)
            if i >= 2:
                seconds[name].append(time.perf_counter() - begun)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def exported(settings, images, directory):
    """The backbone quantized with these settings, calibrated and exported; the directory."""
    model = backbone()
    quantize_model_(model, settings)
    with torch.no_grad():
        calibrate(model, lambda: model(images))
    return export_model(model, directory, [tuple(images.shape[2:])]).directory


def measure(size, runtimes, quant, threads, rounds, nncf):
    """Rows of the table for one size: runtime, name, milliseconds, times the float32 of the runtime."""
    images = torch.randn(2, 3, *size)
    graph = float_graph(backbone(), size)
    with tempfile.TemporaryDirectory() as folder:
        directories = {
            name: exported(settings, images[:1], os.path.join(folder, str(i)))
            for i, (name, settings) in enumerate(
                (
                    (f'psaq_mm {quant}', dict(preset=quant)),
                    (f'{quant}, symmetric', dict(preset=quant, symmetric_attention=True)),
                )
            )
        }
        for runtime in runtimes:
            sessions = {
                'float32': start(graph, runtime, threads),
                **{name: load(directory, runtime, threads).session(size) for name, directory in directories.items()},
            }
            if nncf and runtime == 'openvino':
                sessions['NNCF int8'] = _Nncf(nncf_model(graph, images.numpy(), folder, nncf), threads)
            found = medians(sessions, {'images': images[:1].numpy().astype(np.float32)}, rounds)
            yield from ((runtime, name, ms, found['float32'] / ms) for name, ms in found.items())


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--size', nargs=2, type=int, action='append', metavar=('H', 'W'), help='defaults to 224 224 and 800 1216'
    )
    parser.add_argument('--runtime', nargs='+', default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument('--quant', default='w8a8')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument(
        '--nncf', nargs='?', const=sys.executable, metavar='PYTHON', help="measure NNCF's model beside it"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    busy = busy_share()
    print(processor())
    print(
        f'Swin-T backbone, batch 1, {args.threads} threads, median of {args.rounds} in turn; CPU time that others took '
        f'before: '
        f'{"not known" if busy is None else f"{busy:.0%}"}'
    )
    print(f'{"size":>12}  {"runtime":<12}  {"model":<16}  {"ms":>9}  {"speed-up":>8}')
    for size in args.size or SIZES:
        for runtime, name, ms, ratio in measure(
            tuple(size), args.runtime, args.quant, args.threads, args.rounds, args.nncf
        ):
            print(f'{size[0]:>5} x {size[1]:<4}  {runtime:<12}  {name:<16}  {ms:>9.1f}  {ratio:>8.2f}', flush=True)
    if busy is not None and busy > 0.1:
        print('The machine was busy: these ratios are no result.')


if __name__ == '__main__':
    main()
