"""The directory of an exported model: written whole, checked when read, weights packed and widened, and nothing but
NumPy."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import TensorProto, helper

from psaq_mm.errors import CheckpointError, ConfigError, UnsupportedModelError
from psaq_mm.files import file_sha256
from psaq_mm.runtime import wire
from psaq_mm.runtime.bundle import (
    MANIFEST,
    REST,
    WEIGHTS,
    Weight,
    graph_entries,
    pack,
    read_manifest,
    read_rest,
    read_weights,
    unpack,
    write_bundle,
)
from psaq_mm.runtime.wire import append_initializers

ROOT = Path(__file__).resolve().parents[2]
GRAPHS = {'graph_8x8.onnx': b'not parsed here'}
LEAST = np.array([[-15, 0, -3]], np.int8)


def weights():
    rng = np.random.default_rng(0)
    return {
        'float': Weight(rng.standard_normal((3, 5)).astype(np.float32)),
        'int8': Weight(rng.integers(-128, 128, (4, 2, 3)).astype(np.int8)),
        'int4': Weight(rng.integers(-8, 8, (3, 5)).astype(np.int8), low=-8),
        'uint4': Weight(rng.integers(0, 16, (7,)).astype(np.uint8), low=0),
        'channels': Weight((rng.integers(0, 16, (5, 3)) + LEAST).astype(np.int8), low=LEAST),
    }


def rest():
    return {'head.weight': np.arange(6, dtype=np.float32).reshape(2, 3).T, 'head.count': np.array(7)}


@pytest.fixture
def written(tmp_path):
    return write_bundle(tmp_path / 'model', dict(task='backbone'), GRAPHS, weights(), rest())


def same_arrays(found, wanted):
    return found.keys() == wanted.keys() and all(
        found[name].dtype == array.dtype and found[name].shape == array.shape and np.array_equal(found[name], array)
        for name, array in wanted.items()
    )


# ---------------------------------------------------------------------- packing
@pytest.mark.parametrize('low, dtype', [(-8, 'int8'), (0, 'uint8'), (-2, 'int8')])
@pytest.mark.parametrize('count', [1, 2, 15, 16])
def test_packing_is_undone(low, dtype, count):
    codes = (np.arange(count) % 16 + low).astype(dtype)
    data = pack(codes, low)
    assert data.dtype == np.uint8 and data.shape == ((count + 1) // 2,)
    assert np.array_equal(unpack(data, [count], low, dtype), codes)


def test_channels_may_have_least_codes_of_their_own():
    codes = weights()['channels'].array
    assert np.array_equal(unpack(pack(codes, LEAST), (5, 3), LEAST, 'int8'), codes)
    with pytest.raises(ValueError, match='do not fit into 4 bits'):
        pack(codes + np.array([[0, 16, 0]], np.int8), LEAST)


def test_the_first_code_of_a_byte_is_in_its_low_half():
    assert pack(np.array([-8, 7], np.int8), -8).tolist() == [0xF0]


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match='do not fit into 4 bits'):
        pack(np.array([-8, 8], np.int8), -8)


# ---------------------------------------------------------------------- the directory
def test_weights_come_back_as_they_were(written):
    manifest = read_manifest(written)
    assert same_arrays(read_weights(written, manifest), {name: weight.array for name, weight in weights().items()})
    assert same_arrays(read_rest(written, manifest), rest())
    assert set(read_weights(written, manifest, ['int4', 'channels'])) == {'int4', 'channels'}


def test_other_programs_read_the_weights(written):
    """Four bits take half a byte, in a tensor of bytes."""
    tensors = safetensors.numpy.load_file(written / WEIGHTS)
    assert np.array_equal(tensors['float'], weights()['float'].array) and tensors['int8'].dtype == np.int8
    assert tensors['int4'].dtype == np.uint8 and tensors['int4'].shape == (8,)
    assert read_manifest(written)['weights']['packed']['int4'] == dict(shape=[3, 5], dtype='int8', low=-8)
    assert set(safetensors.numpy.load_file(written / REST)) == rest().keys()


def test_the_same_content_is_on_disk_once(tmp_path):
    again = {**weights(), **{f'{name}.2': weight for name, weight in weights().items()}}
    # The same codes, packed from another least code, are other bytes.
    again.update({f'few_from{low}': Weight(np.arange(4, dtype=np.int8), low) for low in (-8, 0)})
    written = write_bundle(tmp_path / 'model', dict(task='backbone'), GRAPHS, again, {})
    stored = set(safetensors.numpy.load_file(written / WEIGHTS))
    assert stored == {*weights(), 'channels.least', 'few_from-8', 'few_from0'}
    manifest = read_manifest(written)
    assert same_arrays(read_weights(written, manifest), {name: weight.array for name, weight in again.items()})
    assert np.array_equal(read_weights(written, manifest, ['channels.2'])['channels.2'], weights()['channels'].array)


def test_only_the_weights_that_are_asked_for_are_read(written, monkeypatch):
    asked, opened = [], safetensors.safe_open

    class Watched:
        def __init__(self, *args, **settings):
            self.file = opened(*args, **settings)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def get_tensor(self, name):
            asked.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(safetensors, 'safe_open', Watched)
    read_weights(written, read_manifest(written), ['float', 'channels'])
    assert sorted(asked) == ['channels', 'channels.least', 'float']


def test_a_weight_that_is_not_there_is_told(written):
    with pytest.raises(CheckpointError, match='weights.safetensors is not as it was written .*absent'):
        read_weights(written, read_manifest(written), ['absent'])


def test_a_bundle_needs_safetensors_and_nothing_else(written):
    code = (
        'import sys; sys.modules.update(dict.fromkeys(["torch", "onnx", {}])); '
        'from psaq_mm.runtime.bundle import *; print(len(read_weights({!r}, read_manifest({!r}))))'
    )
    for absent, wanted in (('"mmengine"', '5'), ('"safetensors"', 'pip install safetensors')):
        command = [sys.executable, '-c', code.format(absent, str(written), str(written))]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert wanted in (done.stdout or done.stderr.strip().splitlines()[-1]), done.stderr


@pytest.mark.parametrize('name', [WEIGHTS, 'graph_8x8.onnx.gz', REST])
def test_a_directory_cut_short_is_told(written, name):
    path = written / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f'{name} has .* bytes and should have'):
        read_manifest(written)
    path.unlink()
    with pytest.raises(CheckpointError, match=f'{name} is not there'):
        read_manifest(written)


def test_a_changed_file_is_told(written):
    path = written / WEIGHTS
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match='has changed since it was written'):
        read_manifest(written)


def test_a_graph_of_another_version_is_told(written, tmp_path):
    name = 'graph_8x8.onnx'
    for content in (b'of the version before', GRAPHS[name][::-1]):  # of another size, and of the same
        other = write_bundle(tmp_path / 'other', dict(task='backbone'), {name: content}, weights(), {})
        (written / f'{name}.gz').write_bytes((other / f'{name}.gz').read_bytes())
        with pytest.raises(CheckpointError, match=f'{name}.gz has .*of another export or version'):
            read_manifest(written)


def test_a_manifest_cut_short_is_told(written):
    path = written / MANIFEST
    path.write_text(path.read_text()[:-20])
    with pytest.raises(CheckpointError, match='cut short or changed'):
        read_manifest(written)


def write_before_3(folder, version):
    """A directory as versions 1 and 2 of the format had it, written by hand."""
    folder.mkdir()
    rows, content = [], b''

    def add(name, array, data, **more):
        nonlocal content
        rows.append(
            dict(name=name, dtype=array.dtype.name, shape=list(array.shape), offset=len(content), bytes=len(data))
        )
        rows[-1].update(more)
        content += data

    for name, (array, low) in weights().items():
        if low is None:
            add(name, array, array.tobytes())
        elif isinstance(low, int):
            add(name, array, halves(array, low), packed_from=low)
        elif version == 2:
            add(f'{name}.least', low, low.tobytes())
            add(name, array, halves(array, low), packed_from=f'{name}.least')
    rows.append(dict(rows[0], name='float.2'))  # the same content, once on disk
    (folder / 'weights.bin').write_bytes(content)
    np.savez(folder / 'rest.npz', **rest())
    files = {p.name: dict(bytes=p.stat().st_size, sha256=file_sha256(p)) for p in folder.iterdir()}
    manifest = dict(format='psaq_mm.deploy', version=version, task='detection', weights=rows, files=files)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def halves(array, low):
    codes = [int(code) for code in (array.astype(int) - low).reshape(-1)] + [0]
    return bytes(codes[i] + 16 * codes[i + 1] for i in range(0, array.size, 2))


@pytest.mark.parametrize('version', [1, 2])
def test_earlier_versions_are_read(version, tmp_path):
    older = write_before_3(tmp_path / 'older', version)
    wanted = {name: weight.array for name, weight in weights().items() if version == 2 or name != 'channels'}
    wanted['float.2'] = wanted['float']
    manifest = read_manifest(older)
    assert same_arrays(read_weights(older, manifest), wanted)
    assert set(read_weights(older, manifest, ['int4'])) == {'int4'}
    assert same_arrays(read_rest(older, manifest), rest())
    (older / 'rest.npz').unlink()
    assert read_rest(older, manifest) == {}
    with pytest.raises(CheckpointError, match='rest.npz is not there'):
        read_manifest(older)


def test_another_version_of_the_format_is_told(written):
    path = written / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), 'version': 99}))
    with pytest.raises(CheckpointError, match='version 99 of the format'):
        read_manifest(written)


def test_a_folder_without_a_model_is_told(tmp_path):
    with pytest.raises(CheckpointError, match='holds no exported model'):
        read_manifest(tmp_path)


def test_another_export_takes_the_place_of_the_first_and_leaves_nothing(written):
    again = write_bundle(written, dict(task='detection'), GRAPHS, {}, {})
    assert again == written and read_manifest(written)['task'] == 'detection'
    assert not (written / REST).exists()
    assert [p.name for p in written.parent.iterdir()] == ['model']


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / 'thesis.tex').write_text('ten years of work')
    with pytest.raises(ConfigError, match='is no exported model'):
        write_bundle(tmp_path, {}, GRAPHS, {}, {})
    assert (tmp_path / 'thesis.tex').exists()


def test_what_fails_on_the_way_leaves_the_old_model(written):
    before = read_manifest(written)
    with pytest.raises(ValueError):
        write_bundle(written, {}, GRAPHS, {'w': Weight(np.array([100], np.int8), low=-8)}, {})
    assert read_manifest(written) == before
    assert [p.name for p in written.parent.iterdir()] == ['model']


def test_graphs_that_are_too_large_for_one_message_are_refused(tmp_path, monkeypatch):
    """Dense graphs and those of heads; the size is that of the codes as graphs have them, widened."""
    graphs = {name: b'0123456789' for name in ('graph_8x8.onnx', 'box_0.onnx', 'mask_0.onnx')}
    few = dict(float=Weight(np.zeros(100, np.float32)), codes=Weight(np.zeros(300, np.int8), low=0))
    entries = {name: dict(file=name, weights=['float'] if name.startswith('graph') else [*few]) for name in graphs}
    heads = dict(box=[entries['box_0.onnx']], mask=[entries['mask_0.onnx']])
    manifest = dict(task='detection', graphs=[entries['graph_8x8.onnx']], heads=heads)
    assert [entry['file'] for entry in graph_entries(manifest)] == list(graphs)
    monkeypatch.setattr(wire, 'MESSAGE_LIMIT', 1000)
    write_bundle(tmp_path / 'model', manifest, graphs, few, {})
    for limit, named in ((300, 'graph_8x8.onnx'), (700, 'box_0.onnx')):
        monkeypatch.setattr(wire, 'MESSAGE_LIMIT', limit)
        with pytest.raises(UnsupportedModelError, match=f'{named} with its weights has .* GiB .*--format onnx'):
            write_bundle(tmp_path / 'large', manifest, graphs, few, {})
    assert [p.name for p in tmp_path.iterdir()] == ['model']


# ---------------------------------------------------------------------- the encoding
@pytest.mark.parametrize('dtype', ['float32', 'uint8', 'int8', 'int32', 'int64', 'bool'])
@pytest.mark.parametrize('shape', [(), (3,), (200, 3), (0,)])
def test_appended_initializers_are_read_by_onnx(dtype, shape):
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    output = helper.make_tensor_value_info('y', TensorProto.FLOAT, None)
    first = onnx.numpy_helper.from_array(np.float32([1, 2]), 'first')
    model = helper.make_model(
        helper.make_graph([helper.make_node('Identity', ['first'], ['y'])], 'g', [], [output], [first])
    )
    merged = onnx.load_model_from_string(append_initializers(model.SerializeToString(), {'second': array}))
    found = {i.name: onnx.numpy_helper.to_array(i) for i in merged.graph.initializer}
    assert list(found) == ['first', 'second']
    assert found['second'].dtype == array.dtype and found['second'].shape == array.shape
    assert np.array_equal(found['second'], array)
    assert len(merged.graph.node) == 1 and merged.opset_import == model.opset_import


def test_nothing_to_append_changes_nothing():
    assert append_initializers(b'abc', {}) == b'abc'
