# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The directory of an exported model: its files, how it is written in one step, and how it is checked when it is read.

``manifest.json``
    What the model is, the inputs and outputs of its graphs, which tensors are integer, and the size and SHA-256 of
    every other file.
``graph_<height>x<width>.onnx``
    One graph for each image size, without its larger weights.
``weights.bin``
    The weights of all graphs, each once, one after the other. Weights of 4 bits and fewer are packed, two in a byte,
    the first one in the low half.
``rest.npz``
    Weights that the graph does not hold (the RoI heads of a detector), for an evaluation with the model's own library.
    The file is missing where there are none.

It needs NumPy and the standard library only.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from psaq_mm.errors import CheckpointError, ConfigError
from psaq_mm.files import file_sha256

__all__ = ['MANIFEST', 'WEIGHTS', 'REST', 'Weight', 'pack', 'read_manifest', 'read_weights', 'unpack', 'write_bundle']

FORMAT, VERSION = 'psaq_mm.deploy', 2
READABLE = 1, 2
"""In version 1 all channels of a packed weight have one least code."""
MANIFEST, WEIGHTS, REST = 'manifest.json', 'weights.bin', 'rest.npz'
PACKED_BITS = 4

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


def pack(codes: np.ndarray, low: Union[int, np.ndarray]) -> bytes:
    """Pack integer codes ``low .. low + 15``, two in a byte, the first one in the low half. The last one of an odd
    number has a byte for itself.
    """
    nibbles = (codes.astype(np.int16) - np.asarray(low, np.int16)).reshape(-1).astype(np.uint8)
    if nibbles.size and nibbles.max() >> PACKED_BITS:
        raise ValueError(
            f'codes from {codes.min()} to {codes.max()} do not fit into {PACKED_BITS} bits from {np.min(low)} on'
        )
    if nibbles.size % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    return (nibbles[0::2] | nibbles[1::2] << PACKED_BITS).tobytes()


def unpack(data: bytes, shape: Sequence[int], low: Union[int, np.ndarray], dtype: str) -> np.ndarray:
    """Unpack what :func:`pack` packed."""
    pairs = np.frombuffer(data, np.uint8)
    nibbles = np.stack([pairs & 0xF, pairs >> PACKED_BITS], axis=1).reshape(-1)[: int(np.prod(shape, dtype=np.int64))]
    return (nibbles.reshape(shape).astype(np.int16) + np.asarray(low, np.int16)).astype(dtype)


def _write_weights(path: Path, weights: Mapping[str, Weight]) -> List[Dict[str, Any]]:
    """Write weights to a file; their rows of the manifest."""
    rows: List[Dict[str, Any]] = []
    row_by_content: Dict[Tuple, Dict[str, Any]] = {}
    with open(path, 'wb') as file:
        for name, (array, low) in weights.items():
            content = array.dtype.name, array.shape, hashlib.sha256(array.tobytes()).digest()
            if low is None and content in row_by_content:  # the same content is in the file once
                rows.append(dict(row_by_content[content], name=name))
                continue
            packed_from: Dict[str, Union[int, str]] = {}
            if isinstance(low, np.ndarray):  # a tensor of its own: in the manifest it would be larger than all the rest
                rows.append(_write_weight(file, f'{name}.least', low))
                packed_from = dict(packed_from=f'{name}.least')
            elif low is not None:
                packed_from = dict(packed_from=int(low))
            rows.append(dict(_write_weight(file, name, array, low), **packed_from))
            if low is None:
                row_by_content[content] = rows[-1]
    return rows


def _write_weight(
    file: BinaryIO, name: str, array: np.ndarray, low: Union[int, np.ndarray, None] = None
) -> Dict[str, Any]:
    data, offset = np.ascontiguousarray(array).tobytes() if low is None else pack(array, low), file.tell()
    file.write(data)
    return dict(name=name, dtype=array.dtype.name, shape=list(array.shape), offset=offset, bytes=len(data))


def write_bundle(
    out: PathLike,
    manifest: Mapping,
    graphs: Mapping[str, bytes],
    weights: Mapping[str, Weight],
    rest: Mapping[str, np.ndarray],
) -> Path:
    """Write a directory beside ``out`` and move it there. An exported model that is there already is replaced.

    Args:
        out: The directory.
        manifest: What the model is; this function adds format, version, weights and files.
        graphs: Content of the graphs by file name.
        weights: By the name that the graphs have for them.
        rest: Arrays of :data:`REST`.

    Raises:
        ConfigError: ``out`` exists and is no exported model.
    """
    out = Path(out).absolute()
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f'{out} exists and is no exported model: give --out another directory')
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f'.{out.name}.', dir=out.parent))
    try:
        for name, content in graphs.items():
            (partial / name).write_bytes(content)
        rows = _write_weights(partial / WEIGHTS, weights)
        if rest:
            np.savez(partial / REST, **rest)
        files = {p.name: dict(bytes=p.stat().st_size, sha256=file_sha256(p)) for p in sorted(partial.iterdir())}
        manifest = dict(format=FORMAT, version=VERSION, **manifest, weights=rows, files=files)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding='utf-8')
        os.chmod(partial, 0o755)  # mkdtemp keeps others out
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f'.{out.name}.old.', dir=out.parent))
            os.replace(out, old / 'model')
            os.replace(partial, out)
            shutil.rmtree(old)
        else:
            os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


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
            f'{directory} holds no exported model ({MANIFEST} is not there): write one with tools/export.py'
        )
    try:
        manifest = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise CheckpointError(f'{path} is cut short or changed ({error}): export the model again') from error
    if not isinstance(manifest, dict) or manifest.get('format') != FORMAT:
        raise CheckpointError(f'{path} is no manifest of an exported model: write one with tools/export.py')
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
            f'{path.parent} is not whole: {path.name} has {size} bytes and should have {expected["bytes"]}; copy the '
            'directory again, or export it again'
        )
    if file_sha256(path) != expected['sha256']:
        raise CheckpointError(f'{path} has changed since it was written: copy the directory again, or export it again')


def read_weights(
    directory: PathLike, manifest: Mapping, names: Optional[Iterable[str]] = None
) -> Dict[str, np.ndarray]:
    """Read the weights of a graph. Packed ones are widened to one byte each.

    Args:
        directory: As :func:`write_bundle` wrote it.
        manifest: Its manifest.
        names: Which ones; all if None.
    """
    rows = {row['name']: row for row in manifest['weights']}
    least = {row['packed_from'] for row in rows.values() if isinstance(row.get('packed_from'), str)}
    wanted = rows.keys() - least if names is None else set(names)
    with open(Path(directory) / WEIGHTS, 'rb') as file:

        def read(row: Mapping) -> np.ndarray:
            low = row.get('packed_from')
            low = read(rows[low]) if isinstance(low, str) else low
            file.seek(row['offset'])
            data = file.read(row['bytes'])
            if low is None:
                return np.frombuffer(data, np.dtype(row['dtype'])).reshape(row['shape'])
            return unpack(data, row['shape'], low, row['dtype'])

        return {name: read(row) for name, row in rows.items() if name in wanted}
