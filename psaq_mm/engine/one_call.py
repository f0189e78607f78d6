# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantizing, exporting, predicting, saving and loading in one call each: what stands behind :mod:`psaq_mm.api`."""

import copy
import os
import sys
import time
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from mmengine.config import Config
from torch import nn

from psaq_mm.calibration import check_size
from psaq_mm.engine.building import set_scope
from psaq_mm.engine.checkpoint import is_quantized, load_weights, read_checkpoint, save_atomic, student_checkpoint
from psaq_mm.engine.config import (
    apply_method,
    preset_of,
    quant_holder,
    quantized_model_config,
    to_data_free,
    type_name,
)
from psaq_mm.engine.exporting import Wanted, build_student, said_of, write_export
from psaq_mm.engine.hooks.data_free_quant_hook import student_config
from psaq_mm.engine.in_memory import Known, config_of, dataset_meta_of_model
from psaq_mm.engine.inputs import check_preprocessor, set_input_
from psaq_mm.engine.literal_config import config_from_text
from psaq_mm.engine.methods import method_of
from psaq_mm.engine.predicting import Predictor
from psaq_mm.engine.presets import DFQ_DEFAULTS, preset_name, resolve_dfq
from psaq_mm.engine.reading import read_config
from psaq_mm.engine.running import run_unseen, undisturbed
from psaq_mm.engine.settings import GROUPS, named_dfq
from psaq_mm.engine.students import spec_in
from psaq_mm.errors import CheckpointError, ConfigError, UnsupportedModelError, nearest
from psaq_mm.models import TaskModel, quantize_model_, report_of
from psaq_mm.models.network import find_backbone
from psaq_mm.quantization import QuantSpec, quantizers, use_full_float32
from psaq_mm.runtime import Prediction
from psaq_mm.settings import read_groups

__all__ = ['Known', 'StudentRecord', 'export', 'load', 'predict', 'quantize', 'record_of', 'save']

PathLike = Union[str, os.PathLike]

_QUANT_SETTINGS = tuple(name for name in QuantSpec().to_dict() if name not in ('w_bits', 'a_bits'))


class StudentRecord(NamedTuple):
    """What a student in memory remembers, as its attribute ``psaq_mm_student``.

    Attributes:
        config: Of the quantized model: whole, or what is known of a model that was built without one.
        dataset_meta: Classes and palette.
        teacher: Path and SHA-256 of the full-precision weights; empty where they were in the model.
        settings: How it was made, JSON types only.
    """

    config: Config
    dataset_meta: Dict[str, Any]
    teacher: Tuple[str, str] = ('', '')
    settings: Mapping[str, Any] = {}


def record_of(student: nn.Module) -> StudentRecord:
    """The record of a student.

    Raises:
        UnsupportedModelError: It is no student, or is one that has no record.
    """
    record = getattr(student, 'psaq_mm_student', None)
    if record is None:
        what = 'was quantized, but not by psaq_mm.quantize' if _is_student(student) else 'is no student'
        raise UnsupportedModelError(
            f'{type(student).__name__} {what}: give what psaq_mm.quantize or psaq_mm.load returned'
        )
    return record


def _is_student(model: nn.Module) -> bool:
    return next(quantizers(model), None) is not None


# ---------------------------------------------------------------------- quantize
def quantize(
    config_or_model: Union[PathLike, Config, nn.Module],
    checkpoint: Optional[PathLike],
    method: Optional[str],
    quant: Union[str, Mapping, QuantSpec, None],
    *,
    config: Union[PathLike, Config, None],
    known: Known,
    work_dir: Optional[PathLike],
    in_place: bool,
    verbose: bool,
    settings: Mapping[str, Any],
) -> nn.Module:
    """See :func:`psaq_mm.api.quantize`."""
    for_run, for_quantizer = _sorted_settings(settings)
    if known.pair is not None:
        for_run['size'] = known.pair
    with undisturbed(verbose), _Progress(verbose) as progress:
        model = config_or_model if isinstance(config_or_model, nn.Module) else None
        whole = _whole_config(config_or_model, config, known)
        whole = _with_method(whole, quant, method, for_run, for_quantizer)
        if checkpoint is not None:
            checkpoint = os.fspath(checkpoint)
        out = None if work_dir is None else os.fspath(work_dir)
        if model is None:
            progress.begin(whole)
            loop = run_unseen(to_data_free(whole, checkpoint=checkpoint), None, out, verbose)
        else:
            meta = dataset_meta_of_model(model, whole, known)
            form = to_data_free(whole, checkpoint=checkpoint, in_model=None if checkpoint else meta)
            progress.begin(whole)
            loop = run_unseen(form, _converted(model, form, in_place), out, verbose)
        student = loop.model
        meta = dict(loop.dataloader.dataset.metainfo)
        if known.classes is not None:
            meta['classes'] = list(known.classes)
        teacher = (loop.teacher_config.get('checkpoint') or '', loop.teacher_config.get('sha256') or '')
        whole.model = loop.model_config
        student.psaq_mm_student = StudentRecord(whole, meta, teacher, loop.summary())
        student.eval()
        progress.end(student)
    return student


def _sorted_settings(settings: Mapping[str, Any]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Settings of the run, and those of the quantizer.

    Raises:
        ConfigError: One is neither.
    """
    for_run = {name: value for name, value in settings.items() if name in DFQ_DEFAULTS and name != 'method'}
    for_quantizer = {name: value for name, value in settings.items() if name in _QUANT_SETTINGS}
    for name in settings:
        if name not in for_run and name not in for_quantizer:
            raise ConfigError(f'{name} is no setting: {nearest(name, (*DFQ_DEFAULTS, *_QUANT_SETTINGS))}')
    return for_run, for_quantizer


def _whole_config(config_or_model: Any, config: Union[PathLike, Config, None], known: Known) -> Config:
    """The config of what is to be quantized, as a copy."""
    if isinstance(config_or_model, nn.Module):
        if _is_student(config_or_model):
            raise UnsupportedModelError(
                f'{type(config_or_model).__name__} is a student already: give the full-precision model'
            )
        return config_of(config_or_model, known, config)
    if config is not None:
        raise ConfigError('config is given beside a config: it is for a model in memory, leave it out')
    given = [name for name in ('mean', 'std') if getattr(known, name) is not None]
    if given:
        raise ConfigError(f'{given[0]} is given beside a config: set data_preprocessor.{given[0]} in the config')
    if isinstance(config_or_model, Config):
        return copy.deepcopy(config_or_model)
    if not isinstance(config_or_model, (str, os.PathLike)):
        raise ConfigError(
            f'{type(config_or_model).__name__} is neither a config nor a model: give the path of a config file, an '
            'MMEngine Config or a torch.nn.Module'
        )
    return read_config(config_or_model)


def _with_method(
    config: Config, quant: Any, method: Optional[str], for_run: Mapping[str, Any], for_quantizer: Mapping[str, Any]
) -> Config:
    """The config with its precision, its method and all settings in it; nothing in it is checked later than here."""
    if isinstance(quant, QuantSpec):
        quant = quant.to_dict()
    preset = quant if isinstance(quant, str) or quant is None else None
    if method is not None:
        method_of(method)
    config = apply_method(config, preset or ('w8a8' if quant is not None else None), method)
    holder = quant_holder(config.model)
    if preset is None and quant is not None:
        holder['quant'] = dict(quant)
        if 'preset' in quant:
            holder['quant']['preset'] = preset_of(quant['preset'], method)
    if for_quantizer:
        own = holder.get('quant', 'w8a8')
        holder['quant'] = {**(dict(preset=own) if isinstance(own, str) else own), **for_quantizer}
    QuantSpec.parse(holder.get('quant', 'w8a8'))
    if for_run:
        own = config.get('dfq')
        config.dfq = {**(dict(preset=preset_name(own)) if not isinstance(own, Mapping) else dict(own)), **for_run}
    resolved = resolve_dfq(config.get('dfq'))
    with named_dfq():
        read_groups({name: resolved[name] for group in GROUPS for name in group.names()}, *GROUPS)
    return config


def _converted(model: nn.Module, config: Config, in_place: bool) -> nn.Module:
    """The student of a model in memory, not calibrated."""
    with named_dfq():
        check_size(TaskModel(model, parts=()), config.train_cfg.size)
    student = model if in_place else copy.deepcopy(model)
    student.eval()
    student.float()
    quantize_model_(student, quant_holder(config.model)['quant'])
    if find_backbone(student) is not student:
        set_scope(config)
    return student


class _Progress:
    """Two lines on a terminal: what is begun, and what came of it."""

    def __init__(self, verbose: bool):
        self.shown = sys.stderr.isatty() and not verbose
        self.begun = time.monotonic()

    def __enter__(self) -> '_Progress':
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def _say(self, line: str) -> None:
        if self.shown:
            print(line, file=sys.stderr, flush=True)

    def begin(self, config: Config) -> None:
        """Before the run."""
        settings = resolve_dfq(config.get('dfq'))
        spec = QuantSpec.parse(quant_holder(config.model).get('quant', 'w8a8'))
        name = type_name(config.model.get('base_type') or config.model)
        steps = f', {settings["iters"]} steps of training' if settings['iters'] else ''
        self._say(
            f'psaq_mm: {name.rpartition(".")[2]} to {spec.label} by {preset_name(config.get("dfq"))}, on '
            f'{settings["calibration_samples"]} pictures{steps}'
        )

    def end(self, student: nn.Module) -> None:
        """After it."""
        layers = len(report_of(student).layers)
        self._say(f'psaq_mm: {layers} layers quantized in {time.monotonic() - self.begun:.1f} s')


# ---------------------------------------------------------------------- export
def export(
    student: Union[nn.Module, PathLike],
    directory: PathLike,
    *,
    config: Union[PathLike, Config, None],
    size: Any,
    dynamic: bool,
    formats: Sequence[str],
    verify: bool,
    runtimes: Sequence[str],
    external_data: bool,
    opset: Optional[int],
    threads: Optional[int],
    verbose: bool,
) -> Any:
    """See :func:`psaq_mm.api.export`."""
    wanted = Wanted(
        os.fspath(directory), _sizes(size), dynamic, formats, verify, runtimes, external_data, opset, threads
    )
    wanted.check()
    if not isinstance(student, nn.Module):
        student = load(student, model=None, config=config)
    record = record_of(student)
    wanted = wanted.with_runtimes()
    said = said_of(record.config, record.dataset_meta, wanted.sizes)
    return write_export(student, said, wanted, print if verbose else lambda line: None)


def _sizes(size: Any) -> Optional[List[Tuple[int, int]]]:
    """Image sizes (height, width) out of one number, one pair, or a list of such."""
    if size is None:
        return None
    one = isinstance(size, int) or (len(size) == 2 and all(isinstance(side, int) for side in size))
    pairs = [Known(size=entry).pair for entry in ([size] if one else size)]
    return [pair for pair in pairs if pair is not None]


# ---------------------------------------------------------------------- predict
def predict(
    model: Union[nn.Module, PathLike],
    pictures: Sequence[Any],
    *,
    config: Union[PathLike, Config, None],
    device: Optional[str],
) -> List[Prediction]:
    """See :func:`psaq_mm.api.predict`; ``model`` is no exported one."""
    if not isinstance(model, nn.Module):
        model = load(model, model=None, config=config)
    record = getattr(model, 'psaq_mm_student', None)
    if record is None:
        whole = config_of(model, config=config)
        record = StudentRecord(whole, dataset_meta_of_model(model, whole, Known()))
    with undisturbed():
        predictor = Predictor(model, record.config, record.dataset_meta, device)
        return [predictor(picture) for picture in pictures]


# ---------------------------------------------------------------------- save and load
def save(student: nn.Module, path: PathLike) -> None:
    """See :func:`psaq_mm.api.save`."""
    record = record_of(student)
    config = student_config(record.config, record.config.model)
    save_atomic(
        student_checkpoint(student, config.pretty_text, record.dataset_meta, record.teacher, dict(record.settings)),
        path,
    )


def load(
    path: PathLike, *, model: Optional[nn.Module] = None, config: Union[PathLike, Config, None] = None
) -> nn.Module:
    """See :func:`psaq_mm.api.load`; ``path`` is of a file."""
    path = os.fspath(path)
    with undisturbed():
        use_full_float32()
        checkpoint = read_checkpoint(path)
        if not is_quantized(checkpoint):
            raise CheckpointError(
                f'{path} is a full-precision checkpoint and no student: psaq_mm.quantize makes one of it'
            )
        text = checkpoint['meta'].get('cfg')
        if config is None:
            if not isinstance(text, str):
                raise ConfigError(f'{path} holds no config: give config=, the one that it was made with')
            config = config_from_text(text, path)
        elif not isinstance(config, Config):
            config = read_config(config)
        settings = checkpoint['meta'].get('psaq_mm') or {}
        if model is not None:
            student = _loaded_into(model, config, checkpoint, path)
        elif config.get('in_memory'):
            raise ConfigError(
                f'{path} is a student of a {config.in_memory} that was built without a config: give model=, the '
                'full-precision model that it was made from'
            )
        else:
            student, _ = build_student(config, path)
            config = copy.deepcopy(config)
            config.model = quantized_model_config(config, 'w8a8' if spec_in(checkpoint) else None)
            spec = spec_in(checkpoint)
            if spec is not None:
                quant_holder(config.model)['quant'] = spec.to_dict()
        teacher = settings.get('teacher') or {}
        student.psaq_mm_student = StudentRecord(
            config,
            dict(checkpoint['meta'].get('dataset_meta') or {}),
            (teacher.get('checkpoint') or '', teacher.get('sha256') or ''),
            dict(settings.get('dfq') or {}),
        )
        student.eval()
    return student


def _loaded_into(model: nn.Module, config: Config, checkpoint: Mapping, path: str) -> nn.Module:
    """A copy of a full-precision model, as the student in a checkpoint."""
    if _is_student(model):
        raise UnsupportedModelError(f'{type(model).__name__} is a student already: give the full-precision model')
    spec = spec_in(checkpoint)
    if spec is None:
        raise CheckpointError(f'{path} does not say how it was quantized: it was not made by psaq_mm')
    check_preprocessor(config)
    student = copy.deepcopy(model)
    student.eval()
    student.float()
    quantize_model_(student, spec)
    load_weights(student, dict(checkpoint), path)
    value_range = ((checkpoint['meta'].get('psaq_mm') or {}).get('dfq') or {}).get('value_range')
    set_input_(student, config, value_range, strict=False)
    return student
