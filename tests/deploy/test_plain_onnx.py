"""Plain ONNX files of an exported model: the runtimes open them without psaq_mm, and give the outputs of the bundle."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from head_models import SIZE, student
from swin_models import build_backbone

from psaq_mm.deploy import export_model, plain_onnx
from psaq_mm.deploy.plain_onnx import DATA, write_plain_onnx
from psaq_mm.errors import CheckpointError, ConfigError
from psaq_mm.models import quantize_model_
from psaq_mm.quantization import calibrate
from psaq_mm.runtime import RUNTIMES
from psaq_mm.runtime.bundle import Weight, graph_entries, read_graph, read_manifest, read_weights, write_bundle
from psaq_mm.runtime.wire import append_initializers

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings('ignore')
SWIN = dict(depths=[2, 1], num_heads=[1, 2], strides=(4, 2), out_indices=(0, 1))
DETECTOR = dict(
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        mask_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16, num_classes=3),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_convs=1, num_classes=3),
    ),
)


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    """The bundle of a Mask R-CNN with codes of 4 bits, of two sizes, and plain files of it."""
    pytest.importorskip('mmdet')
    from head_models import MODELS, build, config_of

    MODELS.setdefault('plain_mask_rcnn', ('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', dict()))
    backbone = dict(MODELS['panoptic_fpn'][1]['backbone'])
    model = build(config_of('plain_mask_rcnn', dict(DETECTOR, backbone=backbone)).model, 'mmdet')
    student(model, dict(preset='w4a8', scope='full'))
    folder = tmp_path_factory.mktemp('detector')
    export_model(model, folder / 'bundle', [SIZE, SIZE[::-1]], classes=['bolt', 'nut', 'gear'])
    return folder / 'bundle', write_plain_onnx(folder / 'bundle', folder / 'plain')


@pytest.fixture(scope='module')
def backbones(tmp_path_factory):
    """Bundles of a Swin: of a size that pads, and of every size."""
    model = build_backbone('mmdet', **SWIN)
    images = torch.randn(2, 3, 57, 75, generator=torch.Generator().manual_seed(2))
    quantize_model_(model, 'w8a8')
    calibrate(model, lambda: model(images))
    folder = tmp_path_factory.mktemp('swin')
    export_model(model, folder / 'fixed', [(57, 75)])
    export_model(model, folder / 'dynamic', [(64, 96)], dynamic=True)
    return folder


def models_in(folder):
    return {path.name: onnx.load(path) for path in sorted(folder.glob('*.onnx'))}


def inputs_of(model):
    """An input for each port of a graph; free sizes are 5, or 96 of images."""
    random, made = np.random.default_rng(0), {}
    for port in model.graph.input:
        free = 96 if port.name == 'images' else 5
        shape = [dim.dim_value or free for dim in port.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(port.type.tensor_type.elem_type)
        integer = np.issubdtype(dtype, np.integer)
        most = 3 if port.name == 'labels' else 127
        made[port.name] = (random.integers(0, most, shape) if integer else random.standard_normal(shape)).astype(dtype)
    return made


# ---------------------------------------------------------------------- the files
def check_files(folder):
    for name, model in models_in(folder).items():
        onnx.checker.check_model(folder / name, full_check=True)
        assert {node.domain for node in model.graph.node} <= {''} and [o.domain for o in model.opset_import] == ['']
        assert model.producer_name == 'psaq_mm' and model.producer_version and model.doc_string
        assert model.graph.name == name[:-5] and all(port.doc_string for port in (*model.graph.input,))
        typed = {value.name for value in (*model.graph.value_info, *model.graph.output)}
        assert {name for node in model.graph.node for name in node.output} <= typed
        for port in (*model.graph.input, *model.graph.output):
            assert port.type.tensor_type.shape.dim and all(
                dim.dim_value or dim.dim_param in ('rois', f'{port.name}_height', f'{port.name}_width')
                for dim in port.type.tensor_type.shape.dim
            ), port


def test_files_are_valid_and_describe_themselves(detector):
    bundle, plain = detector
    check_files(plain)
    names = [entry['file'] for entry in graph_entries(read_manifest(bundle))]
    assert names == ['graph_64x96.onnx', 'graph_96x64.onnx', 'box_0.onnx', 'mask_0.onnx']
    assert sorted(path.name for path in plain.iterdir()) == sorted([*names, 'model.json', 'README.txt'])
    codes = {i.data_type for model in models_in(plain).values() for i in model.graph.initializer}
    assert onnx.TensorProto.INT8 in codes and onnx.TensorProto.INT4 not in codes


@pytest.mark.parametrize('name', ['fixed', 'dynamic'])
def test_sizes_are_readable(name, backbones, tmp_path):
    """Also where PyTorch's exporter and ONNX's inference do not know them."""
    plain = write_plain_onnx(backbones / name, tmp_path / 'plain')
    check_files(plain)
    row = json.loads((plain / 'model.json').read_text())['graphs'][0]
    free = name == 'dynamic'
    assert row['inputs'][0]['shape'] == [1, 3, *(('images_height', 'images_width') if free else (57, 75))]
    assert row['outputs'][1]['shape'] == [1, 32, *(('level_1_height', 'level_1_width') if free else (8, 10))]
    assert [port['stride'] for port in row['outputs']] == [4, 8] and row.get('multiple') == (32 if free else None)


def test_what_stands_around_the_graphs_is_told(detector):
    bundle, plain = detector
    described, manifest = json.loads((plain / 'model.json').read_text()), read_manifest(bundle)
    assert described['classes'] == ['bolt', 'nut', 'gear'] and described['detector'] == manifest['detector']
    made = described['preprocessing']
    assert made['channel_order'] == 'RGB' and made['mean'] == manifest['mean'] and made['std'] == manifest['std']
    assert described['levels'] == manifest['outputs']['features']
    assert [row['file'] for row in described['box_heads'] + described['mask_heads']] == ['box_0.onnx', 'mask_0.onnx']
    quantizer = manifest['heads']['box'][0]['input']['quantizer']
    assert described['box_heads'][0]['quantizer'] == quantizer and quantizer['dtype'] == 'uint8'
    text = (plain / 'README.txt').read_text()
    for row in described['graphs'] + described['box_heads'] + described['mask_heads']:
        assert row['file'] in text and all(port['name'] in text for port in row['inputs'] + row['outputs'])
    assert repr(quantizer['scale']) in text and str(made['mean']) in text
    model = models_in(plain)['graph_64x96.onnx']
    assert json.loads({p.key: p.value for p in model.metadata_props}['classes']) == described['classes']


def test_a_bundle_becomes_plain_files_without_pytorch(detector, tmp_path):
    bundle, plain = detector
    code = (
        'import sys; sys.modules.update(dict.fromkeys(["torch", "mmengine"])); import psaq_mm.deploy; '
        'psaq_mm.deploy.write_plain_onnx(*sys.argv[1:])'
    )
    command = [sys.executable, '-c', code, str(bundle), str(tmp_path / 'plain')]
    subprocess.run(command, check=True, cwd=ROOT)
    assert {path.name: path.read_bytes() for path in (tmp_path / 'plain').iterdir()} == {
        path.name: path.read_bytes() for path in plain.iterdir()
    }


# ---------------------------------------------------------------------- runtimes alone
ALONE = """
import json, sys

class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split('.')[0] in ('psaq_mm', 'torch', 'onnx', 'safetensors', 'mmengine'):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent)
import numpy as np

def run_onnxruntime(path, inputs):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    off = ['MatMulAddFusion', 'WeightBiasQuantization']
    session = onnxruntime.InferenceSession(path, options, ['CPUExecutionProvider'], disabled_optimizers=off)
    return dict(zip([port.name for port in session.get_outputs()], session.run(None, inputs)))

def run_openvino(path, inputs, read):
    import openvino
    settings = dict(INFERENCE_PRECISION_HINT='f32', DYNAMIC_QUANTIZATION_GROUP_SIZE='0', INFERENCE_NUM_THREADS=1)
    compiled = openvino.Core().compile_model(read(openvino)(path), 'CPU', settings)
    results = compiled(inputs)
    return {port.get_any_name(): results[port] for port in compiled.outputs}

ways = dict(
    onnxruntime=run_onnxruntime,
    read_model=lambda path, inputs: run_openvino(path, inputs, lambda openvino: openvino.Core().read_model),
    convert_model=lambda path, inputs: run_openvino(path, inputs, lambda openvino: openvino.convert_model),
)
folder, out, chosen = map(json.loads, sys.argv[1:])
for name, named in chosen.items():
    for way in named:
        found = ways[way](f'{folder}/{name}', dict(np.load(f'{out}/{name}.inputs.npz')))
        np.savez(f'{out}/{name}.{way}.npz', **found)
"""


def check_alone(bundle, plain, folder, ways):
    """The outputs of plain files, read in a process without psaq_mm, against those of the bundle; ``ways`` by name."""
    runtime = 'onnxruntime' if 'onnxruntime' in sum(ways.values(), []) else 'openvino'
    pytest.importorskip(runtime)
    manifest, models = read_manifest(bundle), models_in(plain)
    for name, model in models.items():
        np.savez(folder / f'{name}.inputs.npz', **inputs_of(model))
    arguments = [json.dumps(value) for value in (str(plain), str(folder), ways)]
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    command = [sys.executable, '-c', ALONE, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for entry in graph_entries(manifest):
        if entry['file'] not in ways:
            continue
        graph = append_initializers(
            read_graph(bundle, manifest, entry), read_weights(bundle, manifest, entry['weights'])
        )
        wanted = RUNTIMES[runtime](graph, 1, 'integer').run(inputs_of(models[entry['file']]))
        for way in ways[entry['file']]:
            found = np.load(folder / f'{entry["file"]}.{way}.npz')
            assert set(found) == wanted.keys() and all(wanted[name].std() > 0 for name in wanted)
            for name, array in wanted.items():
                if way == 'convert_model':  # it folds some constants in another order
                    assert np.linalg.norm(found[name] - array) < 1e-3 * np.linalg.norm(array), (entry['file'], name)
                else:
                    assert np.array_equal(found[name], array), (entry['file'], way, name)


def test_onnx_runtime_alone_gives_the_outputs_of_the_bundle_bit_for_bit(detector, tmp_path):
    check_alone(*detector, tmp_path, {path.name: ['onnxruntime'] for path in detector[1].glob('*.onnx')})


def test_openvino_alone_gives_the_outputs_of_the_bundle_bit_for_bit(detector, tmp_path):
    ways = {name: ['read_model'] for name in ('graph_64x96.onnx', 'box_0.onnx', 'mask_0.onnx')}
    ways['graph_64x96.onnx'] = ['read_model', 'convert_model']
    check_alone(*detector, tmp_path, ways)


@pytest.mark.parametrize('way', ['onnxruntime', 'read_model'])
def test_weights_beside_the_graphs_are_shared(way, detector, tmp_path):
    bundle, plain = detector
    external = write_plain_onnx(bundle, tmp_path / 'external', external_data=True)
    check_files(external)
    places = {}
    for model in (onnx.load(path, load_external_data=False) for path in external.glob('*.onnx')):
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = {row.key: row.value for row in tensor.external_data}
                assert place['location'] == DATA and int(place['offset']) % plain_onnx.ALIGNMENT == 0
                places.setdefault(tensor.name, set()).add(place['offset'])
    manifest = read_manifest(bundle)
    assert places.keys() == {name for entry in graph_entries(manifest) for name in entry['weights']}
    assert all(len(offsets) == 1 for offsets in places.values()), 'graphs of two sizes have one'
    assert all((external / name).stat().st_size < (plain / name).stat().st_size for name in models_in(plain))
    (tmp_path / 'run').mkdir()
    check_alone(bundle, external, tmp_path / 'run', {'mask_0.onnx': [way]})


def test_a_graph_that_is_too_large_for_one_file_has_its_weights_beside_it(detector, tmp_path, monkeypatch):
    bundle = detector[0]
    monkeypatch.setattr(plain_onnx, '_ROOM', 0)
    sizes = {
        entry['file']: sum(
            array.nbytes for array in read_weights(bundle, read_manifest(bundle), entry['weights']).values()
        )
        + len(read_graph(bundle, read_manifest(bundle), entry))
        for entry in graph_entries(read_manifest(bundle))
    }
    monkeypatch.setattr(plain_onnx, 'MESSAGE_LIMIT', sizes['box_0.onnx'])
    plain = write_plain_onnx(bundle, tmp_path / 'plain')
    check_files(plain)
    outside = {
        path.name
        for path in plain.glob('*.onnx')
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    assert outside == {name for name, size in sizes.items() if size > sizes['box_0.onnx']} and len(outside) == 2
    assert (plain / DATA).is_file() and DATA in (plain / 'README.txt').read_text()


@pytest.mark.parametrize('target', ['default', 'tensorrt'])
def test_signed_codes_behind_a_concatenation(target, tmp_path):
    """OpenVINO moves their quantizer before the concatenation and multiplies wrong codes, if it is let."""
    pytest.importorskip('openvino')
    import openvino

    random, made = np.random.default_rng(0), onnx.helper.make_node
    tensors = dict(ws=random.uniform(1e-3, 2e-3, 6).astype(np.float32), wz=np.zeros(6, np.int8), z=np.int8(0))
    tensors['s'] = np.float32(0.03)
    weight = random.integers(-63, 64, (6, 16, 1, 1)).astype(np.int8)  # sums of more saturate without VNNI
    nodes = [
        made('Concat', ['a', 'b'], ['x'], axis=1),
        made('QuantizeLinear', ['x', 's', 'z'], ['q']),
        made('DequantizeLinear', ['q', 's', 'z'], ['d']),
        made('DequantizeLinear', ['w', 'ws', 'wz'], ['v'], axis=0),
        made('Conv', ['d', 'v'], ['y']),
    ]
    ends = [onnx.helper.make_tensor_value_info(name, 1, [1, 8, 4, 4]) for name in 'ab']
    arrays = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()]
    graph = onnx.helper.make_graph(nodes, 'g', ends, [onnx.helper.make_tensor_value_info('y', 1, None)], arrays)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 17)], ir_version=8)
    manifest = dict(psaq_mm='1', model='M', task='other', label='W8A8', quant=dict(target=target), opset=17, classes=[])
    manifest.update(channels=3, reverse_channels=False, mean=[], std=[], exact_size=False, strides={})
    manifest.update(graphs=[dict(file='g.onnx', weights=['w'], size=[4, 4])], outputs=dict(levels=[], dense='y'))
    files = {'g.onnx': model.SerializeToString()}
    bundle = write_bundle(tmp_path / 'bundle', manifest, files, dict(w=Weight(weight)), {})
    plain = write_plain_onnx(bundle, tmp_path / 'plain')
    onnx.checker.check_model(plain / 'g.onnx', full_check=True)
    kinds = [node.op_type for node in onnx.load(plain / 'g.onnx').graph.node]
    if target == 'tensorrt':  # it has rules of its own for what stands between
        assert kinds == [node.op_type for node in nodes]
        return
    inputs = {name: random.normal(0, 1, (1, 8, 4, 4)).astype(np.float32) for name in 'ab'}
    codes = np.clip(np.rint(np.concatenate([inputs['a'], inputs['b']], 1) / tensors['s']), -128, 127)
    wanted = np.einsum('oc,nchw->nohw', weight[:, :, 0, 0] * tensors['ws'][:, None], codes * tensors['s'])
    core = openvino.Core()
    found = core.compile_model(core.read_model(plain / 'g.onnx'), 'CPU', dict(INFERENCE_PRECISION_HINT='f32'))(inputs)
    assert np.abs(found[0] - wanted).max() < 1e-4 * np.abs(wanted).max() and 'Max' in kinds


# ---------------------------------------------------------------------- the directory
def test_it_is_written_whole_or_not_at_all(detector, tmp_path, monkeypatch):
    bundle, plain = detector
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(ConfigError, match='is no exported model'):
        write_plain_onnx(bundle, tmp_path)
    with pytest.raises(CheckpointError, match='holds no exported model'):
        write_plain_onnx(plain, tmp_path / 'out')
    out = write_plain_onnx(bundle, tmp_path / 'out')
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(plain_onnx, '_readme', lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_plain_onnx(bundle, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ['notes.txt', 'out']
