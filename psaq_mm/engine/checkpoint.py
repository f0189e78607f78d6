# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Checkpoints: reading them without running code, and writing them in one step."""

import _compat_pickle
import hashlib
import http.client
import os
import pickle
import re
import types
import urllib.parse
import urllib.request
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple, Union

import numpy as np
import torch
from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

import psaq_mm
from psaq_mm.errors import CheckpointError
from psaq_mm.files import file_sha256, locked, whole_file
from psaq_mm.models import spec_of
from psaq_mm.models.loading import convert_timm_keys, match_names, unwrapped, whole_loading
from psaq_mm.plain import to_plain
from psaq_mm.progress import stage
from psaq_mm.quantization import is_quantizer_key

__all__ = [
    'check_finite',
    'file_sha256',
    'load_restricted',
    'read_checkpoint',
    'is_quantized',
    'load_weights',
    'RESTRICTED',
    'save_atomic',
    'student_checkpoint',
    'dataset_meta_of',
]

PathLike = Union[str, os.PathLike]

RESTRICTED = 'psaq_mm://'
"""Prefix of a path in ``load_from``: MMEngine's runner then reads the file with :func:`read_checkpoint`, not with an
unrestricted ``torch.load``."""

_ALLOWED = {
    'builtins': 'set frozenset slice range complex bytearray dict list tuple int float str bool object',
    'collections': 'OrderedDict defaultdict deque Counter',  # Counter: milestones of a schedule
    '_codecs': 'encode',
    'copyreg': '_reconstructor',
    'torch': 'Size device',
    'torch._utils': '_rebuild_tensor _rebuild_tensor_v2 _rebuild_parameter',
    'torch.nn.parameter': 'Parameter',
    'torch.serialization': '_get_layout',
    'numpy': 'ndarray dtype int64 int32 float64 float32 bool_ uint8',
    'numpy.core.multiarray': '_reconstruct scalar',
    'numpy._core.multiarray': '_reconstruct scalar',
    'mmengine.logging.history_buffer': 'HistoryBuffer',
    'mmengine.config.config': 'ConfigDict',
    'argparse': 'Namespace',
    'pathlib': 'PosixPath PurePosixPath WindowsPath',
}
"""Types that checkpoints of OpenMMLab hold beside tensors: logged histories, NumPy scalars, metainfo."""


_CONTENT_HASH = re.compile(r'-([0-9a-f]{8,})\.\w+$')
"""The end of a file name of OpenMMLab or PyTorch: the first digits of the SHA-256 of its content."""

_DATE = re.compile(r'(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])')
"""A name may end with a date instead."""


def _history_method(owner: type, name: str):
    """``getattr`` for the statistics of a logged history, which are pickled by reference; an error for all else."""
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current', 'statistics'):
        raise CheckpointError(
            f'it asks for {getattr(owner, "__name__", owner)}.{name}, which is no weight and could run '
            'code: only load it after saving its state_dict alone in an environment that you trust'
        )
    return getattr(owner, name)


class _Unpickler(pickle.Unpickler):
    """Finds the types of a checkpoint, and nothing that would run code."""

    def find_class(self, module: str, name: str):
        """The type of this name if it is allowed; see :class:`pickle.Unpickler`."""
        # torch pickles as Python 2 does: its set is __builtin__.set, its subprocess is commands.
        module, name = _compat_pickle.NAME_MAPPING.get(
            (module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
        )
        plain_torch = module in ('torch', 'torch.storage') and (
            name.endswith('Storage') or isinstance(getattr(torch, name, None), torch.dtype)
        )
        if (module, name) == ('builtins', 'getattr'):
            return _history_method
        numpy_type = module.split('.')[0] == 'numpy' and name.endswith('DType')
        if name in _ALLOWED.get(module, '').split() or plain_torch or numpy_type:
            return super().find_class(module, name)
        raise CheckpointError(
            f'it holds {module}.{name}, which is no weight and could run code: only load it after '
            'saving its state_dict alone in an environment that you trust'
        )


def _pickle_module() -> types.ModuleType:
    # torch.load takes a module in pickle's shape.
    module = types.ModuleType('psaq_mm_restricted_pickle')
    module.Unpickler = _Unpickler
    module.load = lambda file, **kwargs: _Unpickler(file, **kwargs).load()
    module.loads = lambda data, **kwargs: (_ for _ in ()).throw(CheckpointError('nested pickles are not read'))
    module.UnpicklingError = pickle.UnpicklingError
    return module


def _load(path: str) -> Any:
    """``torch.load`` of weights only; where that refuses, ``torch.load`` with the list of allowed types above."""
    # Before 2.6, torch's weights_only does not hold for files of its oldest format, which are no zip archives.
    if zipfile.is_zipfile(path) or tuple(int(n) for n in re.findall(r'\d+', torch.__version__)[:2]) >= (2, 6):
        try:
            return torch.load(path, map_location='cpu', weights_only=True)
        except Exception:  # of many types; the second reading says what is wrong
            # It refuses the histories of the logger, which every OpenMMLab checkpoint has. torch's own list of further
            # types is new in 2.4, holds for the whole process, and takes no stand-in for getattr, which those histories
            # need, before 2.6.
            pass
    return torch.load(path, map_location='cpu', pickle_module=_pickle_module(), weights_only=False)


def _check_sums(path: str) -> None:
    """Compare the checksums of a zip archive. torch does not: it only notices that the end of a file is missing."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f'{path} is damaged (its part {damaged} does not fit its checksum): save it again')


def _is_own(content: Any) -> bool:
    """Whether psaq_mm wrote a file. Files of other programs may lack checksums."""
    return isinstance(content, dict) and ('psaq_mm' in content or 'psaq_mm' in (content.get('meta') or {}))


def _downloaded(url: str) -> str:
    """Path of a URL's file in PyTorch's cache; it is downloaded if it is not there yet.

    One process downloads. Others that want the file too, such as the other ranks of a machine, wait for it.
    """
    name = os.path.basename(urllib.parse.urlparse(url).path)
    content_hash = _CONTENT_HASH.search(name)
    if not content_hash:  # a name such as model.safetensors, which many models have
        name = f'{hashlib.sha256(url.encode()).hexdigest()[:12]}_{name}'
    cached = Path(torch.hub.get_dir(), 'checkpoints', name)
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        lock = cached.with_name(f'.{name}.lock')
        with locked(lock):
            try:
                if not cached.is_file():
                    known = content_hash and not _DATE.fullmatch(content_hash[1])
                    _download(url, cached, content_hash[1] if known else '')
            finally:
                lock.unlink(missing_ok=True)
    return str(cached)


def _download(url: str, path: Path, sha256: str) -> None:
    """Fetch a file, whole or not at all. ``sha256`` is how its hash begins, or empty."""
    print(f'downloading {url} to {path}', flush=True)
    for partial in path.parent.glob(f'.{path.name}.*.partial'):  # of a download that was killed
        partial.unlink(missing_ok=True)
    request = urllib.request.Request(url, headers={'User-Agent': 'torch.hub'})  # some hosts refuse Python's own
    try:
        with whole_file(path) as partial:
            with urllib.request.urlopen(request) as answer, open(partial, 'wb') as file:
                length = int(answer.headers.get('Content-Length') or 0)
                with stage(f'Downloading {path.name}', length or None, unit='bytes') as coming:
                    for block in iter(lambda: answer.read(1 << 20), b''):
                        file.write(block)
                        coming.advance(len(block))
            size = partial.stat().st_size
            if length and size != length:  # urllib does not notice that a connection ended early
                raise OSError(f'{size} of {length} bytes came')
            digest = file_sha256(partial)
            if not digest.startswith(sha256):
                raise CheckpointError(
                    f'{url} is not what its name says, whose SHA-256 begins with {sha256} and not with '
                    f'{digest[: len(sha256)]}: try again, or give the local path of a file that you trust'
                )
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(
            f'{url} could not be downloaded ({error}): fetch it yourself and give its local path'
        ) from error


def load_restricted(path: PathLike) -> Any:
    """The content of a ``.pth``, ``.pt`` or ``.safetensors`` file, read onto the CPU without running code.

    Args:
        path: A local file.

    Raises:
        CheckpointError: The file is absent, cut short, of another kind, or would run code.
    """
    path = str(path)
    if os.path.isdir(path):
        raise CheckpointError(f'{path} is a folder and no checkpoint: give the file in it')
    if not os.path.isfile(path):
        raise CheckpointError(f'there is no checkpoint {path}: check the path')
    try:
        if path.endswith('.safetensors'):
            from safetensors.torch import load_file

            return load_file(path)
        content = _load(path)
    except CheckpointError as error:
        raise CheckpointError(f'{path} is not read: {error}') from error
    except Exception as error:  # torch, zip and safetensors raise a dozen types for a damaged file
        first = (str(error).splitlines() or [''])[0]
        raise CheckpointError(
            f'{path} is damaged or no checkpoint ({type(error).__name__}: {first}): fetch or save it again'
        ) from error
    if _is_own(content) and zipfile.is_zipfile(path):
        _check_sums(path)
    return content


def read_checkpoint(path: PathLike) -> Dict:
    """Read a checkpoint onto the CPU.

    Args:
        path: A ``.pth`` or ``.safetensors`` file, or the URL of one.

    Returns:
        ``{'state_dict': ..., 'meta': ..., ...}``, also where the file holds a bare state dict, or one under another
        name such as ``model``. The prefixes of ``torch.compile`` and of data-parallel training are removed from the
        names. ``meta['dataset_meta']`` holds classes and palette in plain types, also for checkpoints of OpenMMLab 1.

    Raises:
        CheckpointError: The file is absent, cut short, no checkpoint, or would run code.
    """
    path = str(path)
    if path.startswith(('http://', 'https://')):
        path = _downloaded(path)
    content = load_restricted(path)
    if not isinstance(content, dict):
        raise CheckpointError(f'{path} holds a {type(content).__name__}, not a checkpoint: save model.state_dict()')
    where, weights = _weights_in(content)
    if not weights:
        raise CheckpointError(
            f'{path} holds no weights (its keys are {", ".join(map(str, list(content)[:5])) or "none"}): '
            'save model.state_dict()'
        )
    averaged = [key for key in ('state_dict_ema', 'model_ema') if key != where and isinstance(content.get(key), dict)]
    if averaged:
        print_log(
            f'{path}: {where} is used, and not the averages under {averaged[0]}: save those alone to use them',
            'current',
        )
    meta = content['meta'] if isinstance(content.get('meta'), Mapping) else {}
    dataset_meta = dataset_meta_of(meta)
    meta = {**meta, 'dataset_meta': dataset_meta} if dataset_meta else dict(meta)
    return {
        **(content if 'state_dict' in content else {}),
        'meta': meta,
        'state_dict': unwrapped(_tensors(weights, path)),
    }


_CONTAINERS = (
    'state_dict model model_state model_state_dict module net network weights params '
    'state_dict_ema model_ema ema_state_dict'
).split()
"""Keys under which training programs keep a state dict. The first that a file has is used."""


def _weights_in(content: Any, depth: int = 3) -> Tuple[str, Mapping]:
    """The key of the state dict in a checkpoint, and the state dict; both empty where there is none."""
    if not isinstance(content, dict):
        return '', {}
    for key in _CONTAINERS if depth else ():
        weights = _weights_in(content.get(key), depth - 1)[1]
        if weights:
            return key, weights
    return '', content if any(isinstance(v, Tensor) for v in content.values()) else {}


def _tensors(weights: Mapping[str, Any], path: str) -> Mapping[str, Tensor]:
    values = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in weights.items()}
    others = [name for name, value in values.items() if not isinstance(value, Tensor)]
    if others:
        print_log(f'{path}: {len(others)} entries are left out, such as {others[0]}: they are no tensors', 'current')
    tensors = OrderedDict((str(name), value) for name, value in values.items() if isinstance(value, Tensor))
    for name, value in tensors.items():
        sparse = value.layout is not torch.strided
        if sparse or value.is_meta or value.is_quantized:
            kind = 'is sparse' if sparse else 'has no values' if value.is_meta else 'is quantized by PyTorch'
            raise CheckpointError(
                f'{path}: {name} {kind}: save the state_dict of a model whose weights are ordinary tensors'
            )
    return tensors


def dataset_meta_of(meta: Mapping) -> Dict[str, Any]:
    """Classes and palette in OpenMMLab 2's form, from the ``meta`` of a checkpoint of OpenMMLab 1 or 2.

    In plain types: ``torch.load(..., weights_only=True)`` refuses a file with an array of NumPy in it.

    Args:
        meta: Of a checkpoint.

    Returns:
        Empty where the checkpoint tells neither.
    """
    dataset_meta = meta.get('dataset_meta') or {k: meta[k] for k in ('CLASSES', 'PALETTE') if meta.get(k) is not None}
    return {k.lower() if k in ('CLASSES', 'PALETTE') else k: to_plain(v, tuples=True) for k, v in dataset_meta.items()}


@CheckpointLoader.register_scheme(prefixes=RESTRICTED, force=True)
def _for_runner(path: str, map_location: Any = None) -> Dict:
    return read_checkpoint(path[len(RESTRICTED) :])


def is_quantized(checkpoint: Dict) -> bool:
    """Whether a checkpoint carries quantizer state."""
    return any(is_quantizer_key(k) for k in checkpoint['state_dict'])


def load_weights(model: nn.Module, checkpoint: Dict, source: PathLike) -> None:
    """Load a checkpoint's weights, all of them or none.

    Args:
        model: Full-precision or quantized.
        checkpoint: See :func:`read_checkpoint`.
        source: Its path, for messages.

    Raises:
        CheckpointError: A key or shape does not fit, or a weight is NaN or infinite; the message names it and
            ``source``.
    """
    try:
        matched = match_names(model, checkpoint['state_dict'], checkpoint.get('meta') or {})
    except CheckpointError as error:
        raise CheckpointError(f'{source}: {error}') from error
    weights = convert_timm_keys(model, matched.weights)
    check_finite(weights, source)
    try:
        with whole_loading(model):
            model.load_state_dict(weights, strict=False)
    except CheckpointError as error:
        raise CheckpointError(f'{source}: {error}') from error
    for note in matched.notes:
        print_log(f'{source}: {note}', 'current')


def check_finite(weights: Mapping[str, Tensor], source: PathLike) -> None:
    """Raises CheckpointError where a weight is NaN or infinite; ``source`` is for the message."""
    for key, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(
                f'{source}: {key} holds NaN or infinite values; a model with them cannot be quantized, '
                'use an earlier checkpoint'
            )


def save_atomic(content: Any, path: PathLike) -> None:
    """``torch.save`` to a file that is whole at every moment, see :func:`psaq_mm.files.whole_file`."""
    with whole_file(path) as partial, open(partial, 'wb') as file:
        torch.save(content, file)


def student_checkpoint(
    model: nn.Module,
    config_text: str,
    dataset_meta: Optional[Dict],
    teacher: Tuple[str, str],
    settings: Dict,
    summary: Optional[Dict] = None,
) -> Dict:
    """The content of ``student.pth``: what inference needs, and how the student was made.

    Args:
        model: The calibrated student.
        config_text: The quantized model's config, for inferencers that build from a checkpoint alone.
        dataset_meta: Classes and palette of the full-precision checkpoint; without it inferencers would show COCO's
            names.
        teacher: Path and SHA-256 of the full-precision checkpoint.
        settings: The data-free settings of the run, JSON types only.
        summary: What the run did (:func:`psaq_mm.engine.run_summary.run_summary`). Defaults to None, unknown.
    """
    state = OrderedDict((k, v.detach().cpu().clone()) for k, v in model.state_dict().items())
    spec = spec_of(model)
    meta = dict(
        cfg=config_text,
        dataset_meta=to_plain(dataset_meta or {}, tuples=True),
        psaq_mm=dict(
            version=psaq_mm.__version__,
            label=spec.label,
            quant=spec.to_dict(),
            teacher=dict(checkpoint=str(teacher[0]), sha256=teacher[1]),
            dfq=settings,
            **({} if summary is None else dict(summary=summary)),
        ),
    )
    return dict(meta=meta, state_dict=state)
