# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Exporting a student: sizes and preparation out of its config, the files, and their verification."""

import contextlib
import math
import os
import tempfile
from pathlib import Path
from typing import Any, Callable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch

from psaq_mm.deploy.export import MULTIPLE, OPSET, ExportedModel, check_opset, export_model
from psaq_mm.engine.building import build_model
from psaq_mm.engine.checkpoint import is_quantized, load_weights, read_checkpoint
from psaq_mm.engine.config import quantized_model_config, sample_size
from psaq_mm.engine.export_summary import export_rows
from psaq_mm.engine.inputs import check_preprocessor, set_input_
from psaq_mm.engine.pipelines import image_sizes, padding_multiple, pipeline_steps
from psaq_mm.engine.run_summary import as_text
from psaq_mm.engine.students import config_of_student
from psaq_mm.errors import CheckpointError, ConfigError, PsaqError, nearest
from psaq_mm.models import TaskModel
from psaq_mm.pictures import DeadLeaves, PinkNoise
from psaq_mm.progress import track
from psaq_mm.runtime import RUNTIMES, load
from psaq_mm.runtime.bundle import replaceable
from psaq_mm.runtime.registry import find_runtime

__all__ = [
    'FORMATS',
    'Said',
    'Wanted',
    'build_student',
    'chosen_runtimes',
    'default_sizes',
    'export',
    'said_of',
    'size_line',
    'verified_sizes',
    'verify_export',
    'write_export',
]

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
    checkpoint = read_checkpoint(checkpoint_path)
    if not is_quantized(checkpoint):
        raise CheckpointError(
            f'{checkpoint_path} is a full-precision checkpoint, which has no integer codes to export: quantize it with '
            'psaq quantize and export the student.pth that it writes'
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


class Wanted(NamedTuple):
    """What an export is to be.

    Attributes:
        out: Directory to be written.
        sizes: Image sizes (height, width). None: :func:`default_sizes`.
        dynamic: One graph for every size.
        formats: Some of :data:`FORMATS`.
        verify: Whether to compare it with its student.
        runtimes: Names of runtimes to start it in; to verify, all that are installed where none is named.
        external_data: With the format ``'onnx'``, weights go beside the ONNX files.
        opset: Of ONNX. None: the oldest one that has all operations.
        threads: Of the runtimes. None: their own choice.
    """

    out: Union[str, os.PathLike]
    sizes: Optional[Sequence[Sequence[int]]] = None
    dynamic: bool = False
    formats: Sequence[str] = FORMATS[:1]
    verify: bool = False
    runtimes: Sequence[str] = ()
    external_data: bool = False
    opset: Optional[int] = None
    threads: Optional[int] = None

    def check(self) -> None:
        """Raises ConfigError where two of them contradict each other, or one is not possible."""
        if self.dynamic and self.sizes:
            raise ConfigError('--size and --dynamic contradict each other: give sizes, or have one graph for all')
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown or not self.formats:
            raise ConfigError(f'format={(unknown or [""])[0]!r} is not known: {nearest((unknown or [""])[0], FORMATS)}')
        if self.external_data and 'onnx' not in self.formats:
            raise ConfigError('--external-data is for ONNX files: give --format onnx too')
        replaceable(self.out)
        check_opset(self.opset or OPSET)

    def with_runtimes(self) -> 'Wanted':
        """The same with its runtimes named. A config may register one of its own: read it before.

        Raises:
            ConfigError: One is not known or not installed, or there is none to verify with.
        """
        return self._replace(runtimes=chosen_runtimes(self.runtimes, self.verify))


class Said(NamedTuple):
    """What an export says beside what stands in the model.

    Attributes:
        sizes: To export for, where none are asked for.
        preparation: See :func:`psaq_mm.deploy.export.export_model`.
        classes: Names of the classes.
        unknown: Why the test pipeline is not part of it; '' where it is.
    """

    sizes: Sequence[Sequence[int]]
    preparation: Mapping[str, Any]
    classes: Optional[Sequence[str]] = None
    unknown: str = ''


def said_of(config: Mapping, dataset_meta: Mapping, sizes: Optional[Sequence[Sequence[int]]] = None) -> Said:
    """What a config and the classes of a student say of its export.

    Args:
        config: A whole config.
        dataset_meta: Of the student.
        sizes: That are asked for. Defaults to None, :func:`default_sizes`.

    Raises:
        ConfigError: No sizes are asked for, and the config has none.
    """
    test = pipeline_steps(config)
    preparation = dict(
        pipeline=test.pipeline, pad_divisor=test.pad_divisor, slide=test.slide, palette=dataset_meta.get('palette')
    )
    return Said(sizes or default_sizes(config), preparation, dataset_meta.get('classes'), test.unknown)


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
    """Export the student of a config.

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
    check_opset(opset or OPSET)
    model, checkpoint = build_student(config, checkpoint_path, *stated)
    said = said_of(config, checkpoint['meta'].get('dataset_meta') or {}, sizes)
    return model, export_model(
        model, out, said.sizes, opset or OPSET, said.classes, dynamic, said.preparation, one_file
    )


def write_export(model, said: Said, wanted: Wanted, say: Callable = print) -> ExportedModel:
    """Export a student, start it and verify it where that is asked for, and tell what came of it.

    Args:
        model: The student.
        said: Of :func:`said_of`.
        wanted: See :class:`Wanted`; its runtimes are named.
        say: Takes the lines that ``psaq-export`` prints.

    Returns:
        What was written. Without the format ``'bundle'`` its directory is that of the ONNX files.

    Raises:
        PsaqError: The verification failed; the files were written all the same.
    """
    from psaq_mm.deploy.report import execution, summary

    if said.unknown:
        say(f'pictures are taken as they come, in the size of the network: the test pipeline has {said.unknown}')
    with contextlib.ExitStack() as stack:
        bundle = wanted.out
        if 'bundle' not in wanted.formats:  # it is needed on the way all the same
            bundle = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), 'bundle')
        one_file = 'bundle' in wanted.formats or bool(wanted.runtimes)
        opset, sizes = wanted.opset or OPSET, wanted.sizes or said.sizes
        exported = export_model(model, bundle, sizes, opset, said.classes, wanted.dynamic, said.preparation, one_file)
        folders = _folders(wanted, exported)
        say(summary(exported.manifest['tensors']))
        sizes_on_disk = [size_line(model, exported, folder) for folder in folders]
        for line in sizes_on_disk:
            say(line)
        for runtime in wanted.runtimes:
            deployed = load(exported.directory, runtime, wanted.threads)
            say(execution(deployed, deployed.sizes[0]))
        if wanted.verify:
            verify_export(model, exported, wanted.runtimes, wanted.threads, say)
    say(f'saved to {" and ".join(map(str, folders))}')
    verified = wanted.runtimes if wanted.verify else ()
    rows = export_rows(exported.manifest, folders, sizes_on_disk, verified, 'bundle' in wanted.formats)
    say(as_text(f'Summary of the export, {exported.manifest["label"]}', rows))
    return exported._replace(directory=folders[0])


_FEW_PIXELS = 512 * 512
"""A size of up to so many pixels is verified with a picture of each kind, a larger one with one of the two in turn."""


def verified_sizes(exported) -> List[Tuple[int, int]]:
    """Sizes (height, width) to verify: all exported ones; of a dynamic graph, the traced size and another one."""
    sizes = [tuple(graph['size']) for graph in exported.manifest['graphs']]
    if exported.manifest['graphs'][0]['multiple']:
        sizes.append((sizes[0][0] + MULTIPLE, sizes[0][1] + 2 * MULTIPLE))
    return sizes


def _pictures(size: Tuple[int, int], number: int, image_spec):
    """Pictures to verify a size with, normalized (N, C, H, W). No data set is read: 1/f noise has the spectrum of
    photographs, dead leaves have their edges and plain areas.
    """
    kinds = PinkNoise(), DeadLeaves()
    kinds = kinds if size[0] * size[1] <= _FEW_PIXELS else kinds[number % 2 : number % 2 + 1]
    return torch.cat([kind(1, size, image_spec, torch.Generator().manual_seed(number)) for kind in kinds])


def verify_export(model, exported, runtimes: Sequence[str], threads: Optional[int], say: Callable = print) -> None:
    """Compare an export with its student: the integer codes in each runtime, and the boxes decoded without PyTorch.

    Args:
        model: The student.
        exported: Of :func:`psaq_mm.deploy.export.export_model`.
        runtimes: Their names.
        threads: Of the runtimes; None: their own choice.
        say: Takes the tables.

    Raises:
        PsaqError: They differ by more than is allowed.
    """
    from psaq_mm.deploy.verify import verify, verify_glue

    failed = []
    glue_failed = False
    for number, size in enumerate(track(verified_sizes(exported), 'Verifying')):
        images = _pictures(size, number, TaskModel(model).image_spec)
        for runtime in track(runtimes, f'{size[0]} x {size[1]}'):
            verification = verify(model, exported, images, runtime, threads)
            say(verification.to_table(brief=number > 0))
            failed += [] if verification.good else [f'{runtime} at {size[0]} x {size[1]}']
        if exported.manifest['detector'] is not None:
            agreement = verify_glue(model, images)
            say(f'{size[0]} x {size[1]}: {agreement}')
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


def _folders(wanted: Wanted, exported) -> List[Path]:
    """The directories that are asked for, all written."""
    folders = [Path(exported.directory)] if 'bundle' in wanted.formats else []
    if 'onnx' in wanted.formats:
        from psaq_mm.deploy.plain_onnx import write_plain_onnx

        out = folders[0] / 'onnx' if folders else wanted.out
        folders.append(write_plain_onnx(exported.directory, out, wanted.external_data))
    return folders


def chosen_runtimes(names: Sequence[str], verify: bool) -> List[str]:
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
