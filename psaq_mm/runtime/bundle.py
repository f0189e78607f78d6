# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The directory of an exported model: its files, how it is written in one step, and how it is checked when it is read.

``manifest.json``
    What the model is, the inputs and outputs of its graphs, which tensors are integer, and the size and SHA-256 of
    every other file.
``*.onnx.gz``
    The graphs, without their larger weights, compressed: they are mostly names, and there is one for each image size.
    The manifest names them without ``.gz``.
``weights.safetensors``
    The weights of all graphs, each once, by the names that the graphs have for them. Codes of 4 bits and fewer are
    packed, see :func:`pack`.
``rest.safetensors``
    Weights of the parts that run in PyTorch, by their names in the model's state dict. The file is missing where there
    are none.

``weights`` of the manifest says what the file of weights alone does not:

``packed``
    By the name of a packed weight: ``shape`` and ``dtype`` of its codes, and ``low``, its least code, or the name of
    the tensor with the least code of each channel.
``same``
    By the name of a weight that is not in the file, the name of the one with its content.

It needs NumPy, the package safetensors (its numpy part) and the standard library only.
"""

import gzip
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from psaq_mm.errors import CheckpointError, ConfigError
from psaq_mm.files import file_sha256, whole_folder
from psaq_mm.runtime.wire import check_message_size

__all__ = [
    'MANIFEST',
    'PLAIN',
    'REST',
    'WEIGHTS',
    'Weight',
    'graph_entries',
    'pack',
    'read_graph',
    'read_manifest',
    'read_rest',
    'read_weights',
    'replaceable',
    'unpack',
    'write_bundle',
]

FORMAT, VERSION = 'psaq_mm.deploy', 3
READABLE = 1, 2, 3
MANIFEST, WEIGHTS, REST = 'manifest.json', 'weights.safetensors', 'rest.safetensors'
PLAIN = 'model.json'
"""What an export of plain ONNX files is told by (:mod:`psaq_mm.deploy.plain_onnx`)."""
PACKED_BITS = 4
_COMPRESSED = '.gz'

PathLike = Union[str, os.PathLike]


class Weight(NamedTuple):
    """A weight to be written.

    Attributes:
        array: As graphs read it.
        low: Its least code, or the least code of each channel (of a shape that broadcasts over the array), if its codes
            fit into 4 bits and are to be packed; None if not.
    """

    array: np.ndarray
    low: Union[int, np.ndarray, None] = None


def pack(codes: np.ndarray, low: Union[int, np.ndarray]) -> np.ndarray:
    """Pack integer codes ``low .. low + 15``, two in a byte, the first one in the low half. The last one of an odd
    number has a byte for itself.

    Returns:
        uint8 (bytes,).
    """
    nibbles = (codes.astype(np.int16) - np.asarray(low, np.int16)).reshape(-1).astype(np.uint8)
    if nibbles.size and nibbles.max() >> PACKED_BITS:
        raise ValueError(
            f'codes from {codes.min()} to {codes.max()} do not fit into {PACKED_BITS} bits from {np.min(low)} on'
        )
    if nibbles.size % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    return nibbles[0::2] | nibbles[1::2] << PACKED_BITS


def unpack(pairs: np.ndarray, shape: Sequence[int], low: Union[int, np.ndarray], dtype: str) -> np.ndarray:
    """Unpack what :func:`pack` packed."""
    nibbles = np.stack([pairs & 0xF, pairs >> PACKED_BITS], axis=1).reshape(-1)[: int(np.prod(shape, dtype=np.int64))]
    return (nibbles.reshape(shape).astype(np.int16) + np.asarray(low, np.int16)).astype(dtype)


def graph_entries(manifest: Mapping) -> List[Mapping]:
    """What a manifest says of each graph, with its ``file`` and the names of its ``weights``: dense graphs, then those
    of box heads, then those of mask heads.
    """
    heads = manifest.get('heads') or {}
    return [
        *manifest.get('graphs', ()),
        *(graph for kind in ('box', 'mask') for graph in heads.get(kind) or () if graph),
    ]


# ---------------------------------------------------------------------- safetensors
def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ConfigError(
            f'the weights of an exported model need the package safetensors ({error}): pip install safetensors'
        ) from error
    return safetensors


def _write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    dense = {name: np.asarray(tensor, order='C') for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    _safetensors().numpy.save_file(dense, path, metadata=dict(format='np'))
    path.chmod(mode)  # the package keeps other users out


def _read_tensors(path: Path, names: Optional[Iterable[str]] = None) -> Dict[str, np.ndarray]:
    """Tensors of a file, all if ``names`` is None. No other ones are read.

    Raises:
        CheckpointError: It is cut short or changed, or has no tensor of a name.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework='np') as file:
            return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f'{path} is not as it was written ({error}): copy the directory again, or export it again'
        ) from error


# ---------------------------------------------------------------------- writing
def replaceable(out: PathLike) -> Path:
    """The absolute path of a directory that an export may be written to: there is none yet, or it is empty, or holds
    an earlier export.

    Raises:
        ConfigError: It holds something else.
    """
    out = Path(out).absolute()
    is_export = any((out / name).is_file() for name in (MANIFEST, PLAIN))
    if out.exists() and not is_export and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f'{out} exists and is no exported model: give --out another directory')
    return out


def _write_weights(path: Path, weights: Mapping[str, Weight]) -> Dict[str, Dict[str, Any]]:
    """Write weights to a file; what the manifest says of them."""
    tensors: Dict[str, np.ndarray] = {}
    packed: Dict[str, Dict[str, Any]] = {}
    same: Dict[str, str] = {}
    name_by_content: Dict[Tuple, str] = {}
    for name, (array, low) in weights.items():
        content = array.dtype.name, array.shape, hashlib.sha256(array.tobytes()).digest()
        first = name_by_content.setdefault((*content, None if low is None else np.asarray(low).tobytes()), name)
        if first != name:
            same[name] = first
            continue
        if low is None:
            tensors[name] = array
            continue
        tensors[name], least = pack(array, low), int(low) if np.ndim(low) == 0 else f'{name}.least'
        packed[name] = dict(shape=list(array.shape), dtype=array.dtype.name, low=least)
        if isinstance(least, str):  # a tensor of its own: in the manifest it would be larger than all the rest
            tensors[least] = np.asarray(low)
    _write_tensors(path, tensors)
    return dict(packed=packed, same=same)


def _check_messages(manifest: Mapping, graphs: Mapping[str, bytes], weights: Mapping[str, Weight]) -> None:
    for entry in graph_entries(manifest):
        arrays = {name: weights[name].array for name in entry['weights']}
        check_message_size(entry['file'], len(graphs[entry['file']]), arrays)


def write_bundle(
    out: PathLike,
    manifest: Mapping,
    graphs: Mapping[str, bytes],
    weights: Mapping[str, Weight],
    rest: Mapping[str, np.ndarray],
    one_file: bool = True,
) -> Path:
    """Write a directory beside ``out`` and move it there. An exported model that is there already is replaced.

    Args:
        out: The directory.
        manifest: What the model is; this function adds format, version, weights, rest and files.
        graphs: Content of the graphs by file name.
        weights: By the name that the graphs have for them.
        rest: Arrays of :data:`REST`.
        one_file: Whether a graph with its weights must fit into one ONNX file: runtimes are started from one here.

    Raises:
        ConfigError: ``out`` exists and is no exported model, or safetensors is not installed.
        UnsupportedModelError: With ``one_file``, a graph is larger than :data:`.wire.MESSAGE_LIMIT`.
    """
    out = replaceable(out)
    if one_file:
        _check_messages(manifest, graphs, weights)
    with whole_folder(out) as folder:
        for name, content in graphs.items():
            (folder / f'{name}{_COMPRESSED}').write_bytes(gzip.compress(content, mtime=0))  # the same bytes every time
        known = dict(format=FORMAT, version=VERSION, **manifest, weights=_write_weights(folder / WEIGHTS, weights))
        if rest:
            _write_tensors(folder / REST, rest)
            known['rest'] = REST
        files = {p.name: dict(bytes=p.stat().st_size, sha256=file_sha256(p)) for p in sorted(folder.iterdir())}
        (folder / MANIFEST).write_text(json.dumps(dict(known, files=files), indent=1), encoding='utf-8')
    return out


# ---------------------------------------------------------------------- reading
def read_manifest(directory: PathLike, check: bool = True) -> Dict[str, Any]:
    """Read the manifest of an exported model.

    Args:
        directory: As :func:`write_bundle` wrote it.
        check: Whether to compare size and SHA-256 of every file.

    Raises:
        CheckpointError: It is no exported model, or of a later version; or a file is missing, cut short or changed.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f'{directory} holds no exported model ({MANIFEST} is not there): write one with psaq export'
        )
    try:
        manifest = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise CheckpointError(f'{path} is cut short or changed ({error}): export the model again') from error
    if not isinstance(manifest, dict) or manifest.get('format') != FORMAT:
        raise CheckpointError(f'{path} is no manifest of an exported model: write one with psaq export')
    if manifest.get('version') not in READABLE:
        raise CheckpointError(
            f'{directory} has version {manifest.get("version")!r} of the format and this psaq_mm reads up to '
            f'{VERSION}: export the model again, or install the psaq_mm that wrote it'
        )
    for name, expected in manifest['files'].items() if check else ():
        _check_file(directory / name, expected)
    return manifest


def _check_file(path: Path, expected: Mapping) -> None:
    if not path.is_file():
        raise CheckpointError(
            f'{path.parent} is not whole: {path.name} is not there; copy the directory again, or export it again'
        )
    size = path.stat().st_size
    if size != expected['bytes']:
        raise CheckpointError(
            f'{path.parent} is not whole: {path.name} has {size} bytes and should have {expected["bytes"]} (it is cut '
            'short, or of another export or version); copy the directory again, or export it again'
        )
    if file_sha256(path) != expected['sha256']:
        raise CheckpointError(
            f'{path} has changed since it was written (or is of another export or version): copy the directory again, '
            'or export it again'
        )


def read_graph(directory: PathLike, manifest: Mapping, entry: Mapping) -> bytes:
    """The ONNX message of a graph, without its larger weights.

    Args:
        directory: As :func:`write_bundle` wrote it.
        manifest: Its manifest.
        entry: One of :func:`graph_entries`.

    Raises:
        CheckpointError: The file is changed.
    """
    path, compressed = Path(directory) / entry['file'], f'{entry["file"]}{_COMPRESSED}'
    if compressed not in manifest['files']:  # before version 3
        return path.read_bytes()
    try:
        return gzip.decompress(path.with_name(compressed).read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise CheckpointError(
            f'{path.with_name(compressed)} is not as it was written ({error}): copy the directory again, or export it '
            'again'
        ) from error


def read_weights(
    directory: PathLike, manifest: Mapping, names: Optional[Iterable[str]] = None
) -> Dict[str, np.ndarray]:
    """Read the weights of a graph, and no others. Packed ones are widened to one byte each.

    Args:
        directory: As :func:`write_bundle` wrote it.
        manifest: Its manifest.
        names: Which ones; all if None.

    Raises:
        CheckpointError: The file is changed, or has no weight of a name.
        ConfigError: The package safetensors is not installed.
    """
    if manifest['version'] < VERSION:
        return _read_weights_before_3(directory, manifest, names)
    packed, same = manifest['weights']['packed'], manifest['weights']['same']
    least = {row['low'] for row in packed.values() if isinstance(row['low'], str)}
    needed = None
    if names is not None:
        names = list(names)
        needed = {same.get(name, name) for name in names}
        needed |= least & {packed[name]['low'] for name in needed & packed.keys()}
    tensors = _read_tensors(Path(directory) / WEIGHTS, needed)

    def widened(name: str) -> np.ndarray:
        if name not in packed:
            return tensors[name]
        low = packed[name]['low']
        return unpack(tensors[name], packed[name]['shape'], tensors.get(low, low), packed[name]['dtype'])

    names = [*(tensors.keys() - least), *same] if names is None else names
    return {name: widened(same.get(name, name)) for name in names}


def read_rest(directory: PathLike, manifest: Mapping) -> Dict[str, np.ndarray]:
    """Weights of the parts that run in PyTorch, by their names in the state dict; none where the graphs are the whole
    model.

    Raises:
        CheckpointError: The file is changed.
        ConfigError: The package safetensors is not installed.
    """
    if manifest['version'] < VERSION:
        path = Path(directory) / _REST_BEFORE_3
        return dict(np.load(path)) if path.is_file() else {}
    return _read_tensors(Path(directory) / manifest['rest']) if manifest.get('rest') else {}


# ---------------------------------------------------------------------- versions 1 and 2
_WEIGHTS_BEFORE_3, _REST_BEFORE_3 = 'weights.bin', 'rest.npz'


def _read_weights_before_3(directory: PathLike, manifest: Mapping, names: Optional[Iterable[str]]) -> Dict:
    """Weights stand one after the other in one file, and the manifest has a row for each, with dtype, shape, offset and
    number of bytes. ``packed_from`` is the least code, from version 2 on also the name of the tensor of least codes.
    """
    rows = {row['name']: row for row in manifest['weights']}
    least = {row['packed_from'] for row in rows.values() if isinstance(row.get('packed_from'), str)}
    with open(Path(directory) / _WEIGHTS_BEFORE_3, 'rb') as file:

        def read(row: Mapping) -> np.ndarray:
            low = row.get('packed_from')
            low = read(rows[low]) if isinstance(low, str) else low
            file.seek(row['offset'])
            data = np.frombuffer(file.read(row['bytes']), np.uint8)
            if low is None:
                return data.view(row['dtype']).reshape(row['shape'])
            return unpack(data, row['shape'], low, row['dtype'])

        return {name: read(rows[name]) for name in (rows.keys() - least if names is None else names)}
