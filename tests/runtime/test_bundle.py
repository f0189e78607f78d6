"""The directory of an exported model: written whole, checked when read, weights packed and widened, and nothing but
NumPy."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from psaq_mm.errors import CheckpointError, ConfigError
from psaq_mm.runtime.bundle import MANIFEST, WEIGHTS, Weight, pack, read_manifest, read_weights, unpack, write_bundle
from psaq_mm.runtime.wire import append_initializers

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


@pytest.fixture
def written(tmp_path):
    return write_bundle(
        tmp_path / 'model', dict(task='backbone'), GRAPHS, weights(), {'head.weight': np.ones(3, np.float32)}
    )


# ---------------------------------------------------------------------- packing
@pytest.mark.parametrize('low, dtype', [(-8, 'int8'), (0, 'uint8'), (-2, 'int8')])
@pytest.mark.parametrize('count', [1, 2, 15, 16])
def test_packing_is_undone(low, dtype, count):
    codes = (np.arange(count) % 16 + low).astype(dtype)
    data = pack(codes, low)
    assert len(data) == (count + 1) // 2
    assert np.array_equal(unpack(data, [count], low, dtype), codes)


def test_channels_may_have_least_codes_of_their_own():
    codes = weights()['channels'].array
    assert np.array_equal(unpack(pack(codes, LEAST), (5, 3), LEAST, 'int8'), codes)
    with pytest.raises(ValueError, match='do not fit into 4 bits'):
        pack(codes + np.array([[0, 16, 0]], np.int8), LEAST)


def test_the_first_code_of_a_byte_is_in_its_low_half():
    assert pack(np.array([-8, 7], np.int8), -8) == bytes([0xF0])


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match='do not fit into 4 bits'):
        pack(np.array([-8, 8], np.int8), -8)


# ---------------------------------------------------------------------- the directory
def test_weights_come_back_as_they_were(written):
    found = read_weights(written, read_manifest(written))
    for name, (array, _) in weights().items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
    assert found.keys() == weights().keys()
    assert set(read_weights(written, read_manifest(written), ['int4', 'channels'])) == {'int4', 'channels'}


def test_four_bits_take_half_a_byte(written):
    rows = {row['name']: row for row in read_manifest(written)['weights']}
    assert rows['int4']['bytes'] == 8 and rows['int8']['bytes'] == 24


@pytest.mark.parametrize('name', [WEIGHTS, 'graph_8x8.onnx', 'rest.npz'])
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


def test_a_manifest_cut_short_is_told(written):
    path = written / MANIFEST
    path.write_text(path.read_text()[:-20])
    with pytest.raises(CheckpointError, match='cut short or changed'):
        read_manifest(written)


def test_the_version_before_is_read(tmp_path):
    older = {name: weight for name, weight in weights().items() if not isinstance(weight.low, np.ndarray)}
    path = write_bundle(tmp_path / 'older', dict(task='backbone'), GRAPHS, older, {}) / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), 'version': 1}))
    found = read_weights(path.parent, read_manifest(path.parent))
    assert all(np.array_equal(found[name], array) for name, (array, _) in older.items())


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
    assert not (written / 'rest.npz').exists()
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
