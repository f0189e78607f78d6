# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A quantized model to ONNX with integer weights and activations: ``tools/export.py CONFIG STUDENT.pth --out DIR``."""
import argparse
from typing import List, Mapping, Optional, Sequence, Tuple

from psaq_mm.commands.common import add_config_arguments, add_quant_arguments, load_config, run_command
from psaq_mm.errors import CheckpointError, ConfigError, PsaqError

__all__ = ['main', 'build_student', 'default_sizes', 'export']

_RESIZES = ('Resize', 'ResizeShortestEdge')
_RATIOS = (4 / 3, 3 / 2)  # of most photographs


def _round_up(value: float) -> int:
    return -int(-value // 32) * 32


def default_sizes(config) -> List[Tuple[int, int]]:
    """Sizes (height, width) that hold what a config's test pipeline makes.

    Where the ratio of an image is kept, these are its bound and the sizes of 4:3 and 3:2 photographs, upright and across, in multiples of
    32. Everything else has the size that it is calibrated on, as a segmentor has that looks at one crop after the other.
    """
    from psaq_mm.engine.config import sample_size
    dataset = (config.get('test_dataloader') or {}).get('dataset') or {}
    steps = [s for s in dataset.get('pipeline') or () if str(s.get('type')).rpartition('.')[2] in _RESIZES and s.get('keep_ratio')]
    scale = steps[-1].get('scale') if steps else None
    slides = (config.model.get('test_cfg') or {}).get('mode') == 'slide'
    if slides or not isinstance(scale, (tuple, list)):
        return [tuple(sample_size(config))]
    short, long = _round_up(min(scale)), _round_up(max(scale))
    widths = sorted({min(_round_up(short * ratio), long) for ratio in _RATIOS} | {long})
    return list(dict.fromkeys(size for width in widths for size in ((short, width), (width, short))))


def build_student(config, checkpoint_path: str):
    """The quantized model of a config with a student's weights, and its checkpoint.

    Raises:
        CheckpointError: The checkpoint is full-precision, of another spec, or does not fit.
    """
    from mmengine.registry import MODELS, init_default_scope

    from psaq_mm.commands.test import _check_spec
    from psaq_mm.engine.checkpoint import is_quantized, load_weights, read_checkpoint
    from psaq_mm.engine.config import drop_pretrained, quantized_model_config
    from psaq_mm.engine.inputs import check_preprocessor, set_input_
    checkpoint = read_checkpoint(checkpoint_path)
    if not is_quantized(checkpoint):
        raise CheckpointError(f'{checkpoint_path} is a full-precision checkpoint, which has no integer codes to export: quantize it with '
                              'tools/dfq_train.py and export the student.pth that it writes')
    model_config = quantized_model_config(config)
    drop_pretrained(model_config)
    check_preprocessor(config)
    init_default_scope(config.get('default_scope', 'mmengine'))
    model = MODELS.build(model_config)
    _check_spec(model, checkpoint, checkpoint_path)
    load_weights(model, checkpoint, checkpoint_path)
    said = [s for s in (config.get('dfq'), (checkpoint['meta'].get('psaq_mm') or {}).get('dfq')) if isinstance(s, Mapping)]
    value_range = next((s['value_range'] for s in said if s.get('value_range') is not None), None)
    set_input_(model, config, value_range, strict=False)  # the range is that of a picture to verify with
    model.eval()
    return model, checkpoint


def export(config, checkpoint_path: str, out: str, sizes: Optional[Sequence[Sequence[int]]] = None, opset: Optional[int] = None,
           dynamic: bool = False):
    """Export a student; returns the quantized model and :class:`psaq_mm.deploy.export.ExportedModel`.

    Args:
        config: A loaded config of a quantized model.
        checkpoint_path: Of the student.
        out: Directory to be written.
        sizes: Image sizes (height, width). Defaults to None, :func:`default_sizes`.
        opset: Of ONNX. Defaults to None, the oldest that serves.
        dynamic: One graph for every size.
    """
    from psaq_mm.deploy.export import OPSET, check_opset, export_model
    check_opset(opset or OPSET)
    model, checkpoint = build_student(config, checkpoint_path)
    classes = (checkpoint['meta'].get('dataset_meta') or {}).get('classes')
    return model, export_model(model, out, sizes or default_sizes(config), opset or OPSET, classes, dynamic)


def _verify(model, exported, runtimes: Sequence[str], threads: Optional[int]) -> None:
    from psaq_mm.deploy.verify import verify
    from psaq_mm.models import TaskModel
    from psaq_mm.synthesis import pink_noise
    size = exported.manifest['graphs'][0]['size']
    # 1/f noise: no data set is opened, and its spectrum is that of photographs.
    images = pink_noise(1, tuple(size), TaskModel(model).image_spec)
    bad = []
    for runtime in runtimes:
        found = verify(model, exported, images, runtime, threads)
        print(found.to_table(), flush=True)
        bad += [] if found.good else [runtime]
    if bad:
        raise PsaqError(f'the integer codes in {" and ".join(bad)} are further from the fake-quantized model\'s than 99.9 % equal and one '
                        f'step: see the lines marked above; {exported.directory} was written all the same')


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog='psaq-export', description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='student.pth, as tools/dfq_train.py writes it')
    parser.add_argument('--out', required=True, help='directory to be written; an exported model in it is replaced')
    parser.add_argument('--size', nargs=2, type=int, action='append', metavar=('H', 'W'),
                        help='an image size to export for, in pixels; give it again for more sizes; defaults to what the test '
                        'pipeline makes')
    parser.add_argument('--dynamic', action='store_true',
                        help='one graph for images of any size, padded to multiples of 32; slower than a graph of the size')
    parser.add_argument('--runtime', nargs='+', default=[], metavar='NAME',
                        help='openvino, onnxruntime: start the exported model there, and tell what it runs as integers')
    parser.add_argument('--verify', action='store_true',
                        help='compare the integer codes with the fake-quantized model, layer by layer, in each --runtime (without '
                        'one: in all that are installed)')
    parser.add_argument('--opset', type=int, help='of ONNX, 17 or newer')
    parser.add_argument('--threads', type=int, help='of the runtimes; defaults to their own choice')
    add_quant_arguments(parser)

    def command(args) -> None:
        from psaq_mm.deploy.report import summary
        from psaq_mm.deploy.runtime import RUNTIMES, require_runtime
        runtimes = list(args.runtime)
        for runtime in runtimes:
            require_runtime(runtime)
        if args.verify and not runtimes:
            runtimes = [name for name in RUNTIMES if _installed(name)]
            if not runtimes:
                raise ConfigError('--verify needs a runtime and none is installed: pip install psaq_mm[deploy], which brings '
                                  f'{" and ".join(RUNTIMES)}')
        if args.dynamic and args.size:
            raise ConfigError('--size and --dynamic contradict each other: give sizes, or have one graph for all')
        config = load_config(args.config, args.cfg_options, args.quant, args.method)
        model, exported = export(config, args.checkpoint, args.out, args.size, args.opset, args.dynamic)
        print(summary(exported.manifest['tensors']))
        print(size_line(model, exported), flush=True)
        for runtime in runtimes:
            print(_execution(exported, runtime, args.threads), flush=True)
        if args.verify:
            _verify(model, exported, runtimes, args.threads)
        print(f'saved to {exported.directory}')

    return run_command(command, parser, argv)


def _installed(runtime: str) -> bool:
    import importlib.util
    return importlib.util.find_spec(runtime) is not None


def size_line(model, exported) -> str:
    """How large the export is beside the float32 weights of what it holds."""
    from psaq_mm.deploy.report import sizes_of
    on_disk, float32 = sizes_of(model, exported)
    return f'{on_disk / 2**20:.2f} MiB on disk, {on_disk / float32:.3f} of the {float32 / 2**20:.2f} MiB of its weights in float32'


def _execution(exported, runtime: str, threads: Optional[int]) -> str:
    from psaq_mm.deploy.report import execution
    from psaq_mm.deploy.runtime import load
    deployed = load(exported.directory, runtime, threads)
    return execution(deployed, deployed.sizes[0])


if __name__ == '__main__':
    raise SystemExit(main())
