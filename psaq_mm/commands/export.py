# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A quantized model to ONNX with integer weights and activations: ``psaq export CONFIG STUDENT.pth --out DIR``."""

import argparse
import contextlib
import math
import os
import tempfile
from pathlib import Path
from typing import List, Mapping, Optional, Sequence, Tuple

from psaq_mm.commands.common import add_config_arguments, add_quant_arguments, load_config, run_command
from psaq_mm.commands.listing import RUNTIME_NAMES
from psaq_mm.commands.parsing import make_parser
from psaq_mm.errors import CheckpointError, ConfigError, PsaqError
from psaq_mm.runtime import RUNTIMES, load
from psaq_mm.runtime.bundle import replaceable
from psaq_mm.runtime.registry import find_runtime

__all__ = ['build_parser', 'main', 'build_student', 'default_sizes', 'export']

FORMATS = ('bundle', 'onnx')

_RATIOS = (4 / 3, 3 / 2)  # of most photographs


def _round_up(value: float, multiple: int) -> int:
    return -int(-value // multiple) * multiple


def default_sizes(config) -> List[Tuple[int, int]]:
    """Sizes (height, width) into which the images of a config's test pipelines fit, after the preprocessor's padding.

    Where the ratio of an image is kept, these are the pipeline's bound, and the sizes of 4:3 and 3:2 photographs in
    both orientations, in multiples of 32. A fixed size is taken as it is, and so is the crop of a segmentor with a
    sliding window. Without any, it is the size that the model is calibrated on.

    Raises:
        ConfigError: The config has no size.
    """
    from psaq_mm.engine.config import sample_size
    from psaq_mm.engine.pipelines import image_sizes, padding_multiple

    test_cfg = config.model.get('test_cfg') or {}
    slides, padded, sizes = test_cfg.get('mode') == 'slide', padding_multiple(config), []
    if slides and test_cfg.get('crop_size'):
        return [tuple(test_cfg['crop_size'])]
    for height, width, bound in () if slides else image_sizes(config):
        if bound:
            sizes += _sizes_within(height, width, math.lcm(32, padded))
        else:
            sizes.append((_round_up(height, padded), _round_up(width, padded)))
    if sizes:
        return list(dict.fromkeys(sizes))
    try:
        return [tuple(sample_size(config))]
    except ConfigError as error:
        raise ConfigError('the config tells no image size to export for: give --size H W') from error


def _sizes_within(short: int, long: int, multiple: int) -> List[Tuple[int, int]]:
    """Sizes of photographs and the bound itself, upright and across, in multiples."""
    short, long = _round_up(short, multiple), _round_up(long, multiple)
    widths = sorted({min(_round_up(short * ratio, multiple), long) for ratio in _RATIOS} | {long})
    return [size for width in widths for size in ((short, width), (width, short))]


def build_student(
    config,
    checkpoint_path: str,
    quant: Optional[str] = None,
    method: Optional[str] = None,
    options: Optional[Mapping] = None,
):
    """Build the quantized model of a config with a student's weights.

    Args:
        config: A loaded config of a full-precision or a quantized model; the student says how it is quantized.
        checkpoint_path: Of the student.
        quant: ``--quant`` of the command line, see :func:`psaq_mm.engine.students.config_of_student`.
        method: ``--method`` of the command line.
        options: ``--cfg-options`` of the command line.

    Returns:
        The model and its checkpoint.

    Raises:
        CheckpointError: The checkpoint is full-precision, of another spec than the command line says, or does not fit.
    """
    from psaq_mm.engine.building import build_model
    from psaq_mm.engine.checkpoint import is_quantized, load_weights, read_checkpoint
    from psaq_mm.engine.config import quantized_model_config
    from psaq_mm.engine.inputs import check_preprocessor, set_input_
    from psaq_mm.engine.students import config_of_student

    checkpoint = read_checkpoint(checkpoint_path)
    if not is_quantized(checkpoint):
        raise CheckpointError(
            f'{checkpoint_path} is a full-precision checkpoint, which has no integer codes to export: quantize it with '
            'tools/dfq_train.py and export the student.pth that it writes'
        )
    config = config_of_student(config, checkpoint, checkpoint_path, quant, method, options)
    check_preprocessor(config)
    model = build_model(config, quantized_model_config(config))
    load_weights(model, checkpoint, checkpoint_path)
    settings = config.get('dfq'), (checkpoint['meta'].get('psaq_mm') or {}).get('dfq')
    ranges = [s.get('value_range') for s in settings if isinstance(s, Mapping)]
    value_range = next((limits for limits in ranges if limits is not None), None)
    set_input_(model, config, value_range, strict=False)  # the pictures of --verify have this range
    model.eval()
    return model, checkpoint


def export(
    config,
    checkpoint_path: str,
    out: str,
    sizes: Optional[Sequence[Sequence[int]]] = None,
    opset: Optional[int] = None,
    dynamic: bool = False,
    stated: Sequence = (),
    one_file: bool = True,
):
    """Export a student.

    Args:
        config: A loaded config of a full-precision or a quantized model.
        checkpoint_path: Of the student.
        out: Directory to be written.
        sizes: Image sizes (height, width). Defaults to None, :func:`default_sizes`.
        opset: Of ONNX. Defaults to None, the oldest one that has all operations.
        dynamic: One graph for every size.
        stated: ``quant``, ``method`` and ``options`` of :func:`build_student`.
        one_file: See :func:`psaq_mm.deploy.export.export_model`.

    Returns:
        The quantized model and :class:`psaq_mm.deploy.export.ExportedModel`.
    """
    from psaq_mm.deploy.export import OPSET, check_opset, export_model
    from psaq_mm.engine.pipelines import pipeline_steps

    check_opset(opset or OPSET)
    model, checkpoint = build_student(config, checkpoint_path, *stated)
    meta = checkpoint['meta'].get('dataset_meta') or {}
    test = pipeline_steps(config)
    if test.unknown:
        print(f'pictures are taken as they come, in the size of the network: the test pipeline has {test.unknown}')
    said = dict(pipeline=test.pipeline, pad_divisor=test.pad_divisor, slide=test.slide, palette=meta.get('palette'))
    sizes = sizes or default_sizes(config)
    return model, export_model(model, out, sizes, opset or OPSET, meta.get('classes'), dynamic, said, one_file)


_FEW_PIXELS = 512 * 512
"""A size of up to so many pixels is verified with a picture of each kind, a larger one with one of the two in turn."""


def verified_sizes(exported) -> List[Tuple[int, int]]:
    """Sizes (height, width) to verify: all exported ones; of a dynamic graph, the traced size and another one."""
    sizes = [tuple(graph['size']) for graph in exported.manifest['graphs']]
    if exported.manifest['graphs'][0]['multiple']:
        from psaq_mm.deploy.export import MULTIPLE

        sizes.append((sizes[0][0] + MULTIPLE, sizes[0][1] + 2 * MULTIPLE))
    return sizes


def _pictures(size: Tuple[int, int], number: int, image_spec):
    """Pictures to verify a size with, normalized (N, C, H, W). No data set is read: 1/f noise has the spectrum of
    photographs, dead leaves have their edges and plain areas.
    """
    import torch

    from psaq_mm.pictures import DeadLeaves, PinkNoise

    kinds = PinkNoise(), DeadLeaves()
    kinds = kinds if size[0] * size[1] <= _FEW_PIXELS else kinds[number % 2 : number % 2 + 1]
    return torch.cat([kind(1, size, image_spec, torch.Generator().manual_seed(number)) for kind in kinds])


def _verify(model, exported, runtimes: Sequence[str], threads: Optional[int]) -> None:
    from psaq_mm.deploy.verify import verify, verify_glue
    from psaq_mm.models import TaskModel

    failed = []
    glue_failed = False
    for number, size in enumerate(verified_sizes(exported)):
        images = _pictures(size, number, TaskModel(model).image_spec)
        for runtime in runtimes:
            verification = verify(model, exported, images, runtime, threads)
            print(verification.to_table(brief=number > 0), flush=True)
            failed += [] if verification.good else [f'{runtime} at {size[0]} x {size[1]}']
        if exported.manifest['detector'] is not None:
            agreement = verify_glue(model, images)
            print(f'{size[0]} x {size[1]}: {agreement}', flush=True)
            glue_failed = glue_failed or not agreement.good
    if failed:
        raise PsaqError(
            f"the integer codes in {' and '.join(failed)} are further from the fake-quantized model's than 99.9 % "
            'equal and one step: see the lines marked above; the files were written all the same'
        )
    if glue_failed:
        raise PsaqError(
            "boxes and masks that are decoded without PyTorch differ from mmdet's: see the lines marked above; "
            'the files were written all the same'
        )


def build_parser(prog: str = 'psaq-export') -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = make_parser(
        prog,
        'CONFIG STUDENT.pth --out DIR [options]',
        'Write a student as ONNX graphs with integer weights and activations. What is written runs without PyTorch and '
        'OpenMMLab, with psaq predict and psaq_mm.predict.',
        [
            'CONFIG work_dirs/CONFIG/student.pth --out deployed --verify',
            'CONFIG work_dirs/CONFIG/student.pth --out deployed \\\n      --size 800 1216 --size 1216 800',
            'CONFIG work_dirs/CONFIG/student.pth --out graphs --format onnx',
        ],
    )
    model = add_config_arguments(parser)
    model.add_argument('checkpoint', metavar='STUDENT.pth', help='as psaq quantize writes it')
    add_quant_arguments(parser)
    result = parser.add_argument_group('result')
    result.add_argument(
        '--out', required=True, metavar='DIR', help='folder to be written; an exported model in it is replaced'
    )
    result.add_argument(
        '--size',
        nargs=2,
        type=int,
        action='append',
        metavar=('H', 'W'),
        help='a picture size to export for, in pixels; give it again for more sizes (default: what the test pipeline '
        'makes of photographs)',
    )
    result.add_argument(
        '--dynamic',
        action='store_true',
        help='one graph for pictures of any size, padded to multiples of 32; slower than a graph of the size (default: '
        'a graph for each size)',
    )
    result.add_argument(
        '--format',
        nargs='+',
        choices=FORMATS,
        default=FORMATS[:1],
        help='bundle: for psaq predict, psaq test --deployed and psaq_mm.load; onnx: plain ONNX files for other '
        'programs; both: the ONNX files are in the folder onnx of the bundle (default: bundle)',
    )
    result.add_argument(
        '--external-data',
        action='store_true',
        help='with --format onnx, write the weights beside the ONNX files, which then share them (default: inside)',
    )
    result.add_argument('--opset', type=int, metavar='N', help='of ONNX, 17 or newer (default: the oldest that fits)')
    runtime = parser.add_argument_group('runtime')
    runtime.add_argument(
        '--runtime',
        nargs='+',
        default=[],
        metavar='NAME',
        help=f'some of {", ".join(RUNTIME_NAMES)}: start the exported model there, and tell what it runs as integers '
        '(default: none)',
    )
    runtime.add_argument(
        '--verify',
        action='store_true',
        help='compare the integer codes with those of the student, layer by layer and for each size, in each --runtime, '
        'or in all that are installed (default: not compared)',
    )
    runtime.add_argument('--threads', type=int, metavar='N', help="of the runtime (default: the runtime's own choice)")
    return parser


def main(argv: Optional[Sequence[str]] = None, prog: str = 'psaq-export') -> int:
    """Command line; returns the exit status."""

    def command(args) -> None:
        from psaq_mm.deploy.report import summary

        if args.dynamic and args.size:
            raise ConfigError('--size and --dynamic contradict each other: give sizes, or have one graph for all')
        if args.external_data and 'onnx' not in args.format:
            raise ConfigError('--external-data is for ONNX files: give --format onnx too')
        replaceable(args.out)
        config = load_config(args.config, args.cfg_options, args.quant, args.method)
        runtimes = _chosen_runtimes(args.runtime, args.verify)  # after the config, which may register one of its own
        stated = args.quant, args.method, args.cfg_options
        with contextlib.ExitStack() as stack:
            bundle = args.out
            if 'bundle' not in args.format:  # it is needed on the way all the same
                bundle = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), 'bundle')
            one_file = 'bundle' in args.format or bool(runtimes)
            model, exported = export(
                config, args.checkpoint, bundle, args.size, args.opset, args.dynamic, stated, one_file
            )
            folders = _folders(args, exported)
            print(summary(exported.manifest['tensors']))
            for folder in folders:
                print(size_line(model, exported, folder), flush=True)
            for runtime in runtimes:
                print(_execution(exported, runtime, args.threads), flush=True)
            if args.verify:
                _verify(model, exported, runtimes, args.threads)
        print(f'saved to {" and ".join(map(str, folders))}')

    return run_command(command, build_parser(prog), argv)


def _folders(args, exported) -> List[Path]:
    """The directories that a command line asks for, all written."""
    folders = [Path(exported.directory)] if 'bundle' in args.format else []
    if 'onnx' in args.format:
        from psaq_mm.deploy.plain_onnx import write_plain_onnx

        out = folders[0] / 'onnx' if folders else args.out
        folders.append(write_plain_onnx(exported.directory, out, args.external_data))
    return folders


def _chosen_runtimes(names: Sequence[str], verify: bool) -> List[str]:
    """The runtimes that a command line names; to verify, all that are installed where it names none.

    Raises:
        ConfigError: One is not known or not installed, or there is none to verify with.
    """
    for name in names:
        find_runtime(name)
    if names or not verify:
        return list(names)
    installed = [name for name, runtime in RUNTIMES.items() if runtime.installed()]
    if not installed:
        raise ConfigError(
            '--verify needs a runtime and none is installed: pip install psaq_mm[deploy], which brings '
            f'{" and ".join(RUNTIMES)}'
        )
    return installed


def size_line(model, exported, folder: Optional[Path] = None) -> str:
    """The size of the export, or of a folder of it in another format, and its share of the size of the same weights in
    float32.
    """
    from psaq_mm.deploy.report import sizes_of

    on_disk, float32 = sizes_of(model, exported, folder)
    return (
        f'{on_disk / 2**20:.2f} MiB on disk, {on_disk / float32:.3f} of the {float32 / 2**20:.2f} MiB of its weights '
        'in float32'
    )


def _execution(exported, runtime: str, threads: Optional[int]) -> str:
    from psaq_mm.deploy.report import execution

    deployed = load(exported.directory, runtime, threads)
    return execution(deployed, deployed.sizes[0])


if __name__ == '__main__':
    raise SystemExit(main())
