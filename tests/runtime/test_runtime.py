"""An exported model without PyTorch, and inside the library's own detector and segmentor."""

import copy
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CASCADE, DETECTOR, SEGMENTOR, WITHOUT_TORCH, Project, calibrated_student

from psaq_mm.commands.common import load_config
from psaq_mm.commands.export import main as export_command
from psaq_mm.commands.test import main as evaluate_command
from psaq_mm.deploy import load
from psaq_mm.deploy.serving import deploy_model_
from psaq_mm.engine.exporting import default_sizes, export
from psaq_mm.errors import CheckpointError, ConfigError, DataError
from psaq_mm.runtime.bundle import read_manifest

ROOT = Path(__file__).resolve().parents[2]
SIZE = (64, 96)

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    pytest.importorskip('mmdet')
    project = Project(tmp_path_factory.mktemp('detector'), DETECTOR)
    config, checkpoint, _ = calibrated_student(project, 'w8a8')
    model, exported = export(config, str(checkpoint), str(project.folder / 'out'), [SIZE])
    return project, config, model, exported


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory):
    pytest.importorskip('mmseg')
    project = Project(tmp_path_factory.mktemp('segmentor'), SEGMENTOR)
    config, checkpoint, _ = calibrated_student(project, dict(preset='w4a8', scope='full'), steps=[])
    model, exported = export(config, str(checkpoint), str(project.folder / 'out'), [SIZE])
    return project, config, model, exported


def built(config):
    """The config's model with random weights."""
    from psaq_mm.engine.building import build_model

    return build_model(config).eval()


# ---------------------------------------------------------------------- in the library's model
def test_a_detector_takes_features_and_proposals_from_the_graph(detector):
    pytest.importorskip('onnxruntime')
    _, config, model, exported = detector
    images = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(5))
    deployed = deploy_model_(built(config), exported.directory, 'onnxruntime', 1)
    with torch.no_grad():
        levels, wanted = deployed.extract_feat(images), model.extract_feat(images)
        assert [tuple(a.shape) for a in levels] == [tuple(b.shape) for b in wanted]
        assert all((a - b).norm() < 0.05 * b.norm() for a, b in zip(levels, wanted))
        for found, expected in zip(deployed.rpn_head(levels), model.rpn_head(wanted)):
            assert all((a - b).norm() < 0.05 * b.norm() for a, b in zip(found, expected))
    assert deployed.roi_head is None, 'box and mask heads are graphs too'
    assert exported.manifest['complete'] and not (exported.directory / 'rest.safetensors').exists()


RETINANET = """
_base_ = ['mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py']
model = dict(
    backbone=dict(embed_dims=16, depths=[2, 2, 1, 1], num_heads=[1, 2, 4, 8]),
    neck=dict(in_channels=[32, 64, 128], out_channels=16),
    bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1, num_classes=2))
"""


@pytest.mark.parametrize('text, head', [(CASCADE, 'rpn_head'), (RETINANET, 'bbox_head')], ids=['cascade', 'one-stage'])
def test_other_detectors_predict_from_the_graph(text, head, tmp_path):
    pytest.importorskip('mmdet')
    pytest.importorskip('openvino')
    from mmdet.structures import DetDataSample

    project = Project(tmp_path, text)
    config, checkpoint, _ = calibrated_student(project, 'w8a8')
    model, exported = export(config, str(checkpoint), str(tmp_path / 'out'), [SIZE])
    assert exported.manifest['dense_head'] == head
    deployed = deploy_model_(built(config), exported.directory, 'openvino', 1)
    image = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(5))
    meta = dict(img_shape=SIZE, ori_shape=SIZE, pad_shape=SIZE, batch_input_shape=SIZE, scale_factor=(1.0, 1.0))
    with torch.no_grad():
        levels = deployed.extract_feat(image), model.extract_feat(image)
        maps = [getattr(m, head)(found) for m, found in zip((deployed, model), levels)]
        for found, wanted in zip(*maps):
            assert all((a - b).norm() < 0.05 * b.norm() + 1e-3 for a, b in zip(found, wanted))
        assert len(deployed.predict(image, [DetDataSample(metainfo=meta)])) == 1


def test_a_segmentor_with_a_dynamic_size_takes_images_of_any_size(segmentor, tmp_path):
    pytest.importorskip('onnxruntime')
    project, config, model, _ = segmentor
    _, exported = export(config, str(project.folder / 'student.pth'), str(tmp_path / 'out'), [SIZE], dynamic=True)
    deployed = load(exported.directory, 'onnxruntime', 1)
    for size in ((64, 96), (96, 160)):
        image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            wanted = model.decode_head(model.extract_feat(image)).numpy()
        found = deployed.run(image.numpy())['logits']
        assert found.shape == wanted.shape and (found.argmax(1) == wanted.argmax(1)).mean() > 0.95


def test_a_segmentor_predicts_from_the_graph(segmentor):
    pytest.importorskip('openvino')
    _, config, model, exported = segmentor
    images = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(5))
    deployed = deploy_model_(built(config), exported.directory, 'openvino', 1)
    metas = [dict(img_shape=SIZE, ori_shape=SIZE, pad_shape=SIZE)] * 2
    with torch.no_grad():
        found, wanted = deployed.inference(images, metas), model.inference(images, metas)
    assert found.shape == wanted.shape
    assert (found.argmax(1) == wanted.argmax(1)).float().mean() > 0.95


def test_heads_of_the_full_scope_are_integer_too(segmentor):
    pytest.importorskip('onnxruntime')
    from psaq_mm.deploy.verify import verify

    _, _, model, exported = segmentor
    images = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(6))
    weights = [row['name'] for row in exported.manifest['tensors'] if row['kind'] == 'weight']
    assert 'decode_head.fpn_bottleneck.conv.weight' in weights and 'decode_head.conv_seg.weight' in weights
    kinds = [node.op_type for node in exported.graphs[SIZE].model.graph.node]
    assert 'BatchNormalization' not in kinds or exported.exportable.notes
    found = verify(model, exported, images, 'onnxruntime', 1)
    assert not found.weights
    assert max(layer.step for layer in found.layers) <= 1
    assert (
        sum(layer.elements * layer.equal for layer in found.layers) / sum(layer.elements for layer in found.layers)
        >= 0.999
    )


def test_a_weight_that_several_levels_read_has_a_name_for_each(tmp_path):
    """The RPN's. ONNX Runtime replaces wide weights by their names where it multiplies with unsigned ones."""
    pytest.importorskip('mmdet')
    pytest.importorskip('onnxruntime')
    from psaq_mm.runtime import RUNTIMES

    project = Project(tmp_path, DETECTOR)
    config, checkpoint, _ = calibrated_student(project, dict(preset='w8a8', scope='full'))
    model, exported = export(config, str(checkpoint), str(tmp_path / 'out'), [SIZE])
    lowered = exported.graphs[SIZE].model.graph
    readers = [
        node.input[0] for node in lowered.node if node.op_type == 'DequantizeLinear' and '.weight' in node.input[0]
    ]
    assert readers and len(readers) == len(set(readers))
    values = [name for node in lowered.node for name in node.input if name.endswith('.value') and '.weight' in name]
    assert len(values) == len(set(values)), 'each is dequantized for one product'
    shared = [node for node in lowered.node if node.op_type == 'Conv' and 'rpn_conv.weight' in node.input[1]]
    manifest = read_manifest(exported.directory)
    stored = {manifest['weights']['same'].get(name, name) for name in manifest['graphs'][0]['weights']}
    assert len(shared) == 5 and sum('rpn_conv.weight' in name and name.endswith('.codes') for name in stored) == 1, (
        'on disk it is once'
    )
    # Where integer kernels saturate, products are of weights plus 128; both are integer, so the answers are the same.
    images = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(5)).numpy()
    graph = load(exported.directory, 'onnxruntime', 1).graph(SIZE)
    found, wanted = (RUNTIMES['onnxruntime'](graph, 1, way).run({'images': images}) for way in ('unsigned', 'float'))
    errors = {k: np.linalg.norm(found[k] - wanted[k]) / np.linalg.norm(wanted[k]) for k in wanted}
    assert max(errors.values()) < 0.1, errors  # ties add up to that in so small a model


def test_another_models_config_is_refused(detector, segmentor):
    pytest.importorskip('onnxruntime')
    with pytest.raises(CheckpointError, match='was exported from a EncoderDecoder and the config builds a MaskRCNN'):
        deploy_model_(built(detector[1]), segmentor[3].directory, 'onnxruntime')


# ---------------------------------------------------------------------- without PyTorch
SCRIPT = """
import numpy as np
import psaq_mm.deploy
model = psaq_mm.deploy.load({directory!r}, runtime={runtime!r}, threads=1)
images = np.load({images!r})
found = model(images)
np.savez({result!r}, **found)
"""


@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
def test_pictures_to_classes_with_numpy_and_the_runtime_alone(segmentor, runtime, tmp_path):
    pytest.importorskip(runtime)
    _, _, model, exported = segmentor
    images = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3)).astype(np.uint8)
    np.save(tmp_path / 'images.npy', images)
    script = WITHOUT_TORCH + SCRIPT.format(
        directory=str(exported.directory),
        runtime=runtime,
        images=str(tmp_path / 'images.npy'),
        result=str(tmp_path / 'found.npz'),
    )
    subprocess.run([sys.executable, '-c', script], check=True, cwd=ROOT)
    found = np.load(tmp_path / 'found.npz')
    data = model.data_preprocessor(dict(inputs=[torch.from_numpy(i.transpose(2, 0, 1).copy()) for i in images]))
    metas = [dict(img_shape=SIZE, ori_shape=SIZE, pad_shape=SIZE)] * 2
    with torch.no_grad():
        wanted = model.inference(torch.stack(list(data['inputs'])), metas).argmax(1).numpy()
    assert found['labels'].shape == wanted.shape
    assert (found['labels'] == wanted).mean() > 0.9


@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
def test_threads_get_their_own_answers(segmentor, runtime):
    """Also where they are the first to call, so that the graph is compiled while they wait."""
    pytest.importorskip(runtime)
    directory = segmentor[3].directory
    images = [torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(seed)).numpy() for seed in range(4)]
    serial = load(directory, runtime, 1)
    wanted = [serial.run(image)['logits'] for image in images]
    model, ready, right, errors = load(directory, runtime, 1), threading.Barrier(len(images)), [], []

    def call(image, expected):
        ready.wait()
        try:
            right.extend(np.array_equal(model.run(image)['logits'], expected) for _ in range(15))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=pair) for pair in zip(images, wanted)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(right) == 60 and all(right), (errors, right.count(False))


def test_normalization_is_the_preprocessors(segmentor):
    pytest.importorskip('onnxruntime')
    model, exported = segmentor[2:]
    image = np.random.default_rng(1).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    wanted = model.data_preprocessor(dict(inputs=[torch.from_numpy(image.transpose(2, 0, 1).copy())]))['inputs']
    found = load(exported.directory, 'onnxruntime').normalize(image)
    assert np.allclose(found, torch.stack(list(wanted)).numpy(), atol=1e-5)


def test_pictures_that_do_not_fit_are_refused(segmentor):
    pytest.importorskip('onnxruntime')
    model = load(segmentor[3].directory, 'onnxruntime')
    with pytest.raises(DataError, match='no pictures of 3 channels'):
        model(np.zeros((*SIZE, 4), np.uint8))
    with pytest.raises(DataError, match='call the model once for each size'):
        model.normalize([np.zeros((8, 8, 3)), np.zeros((9, 8, 3))])
    with pytest.raises(DataError, match='larger than what the model was exported for .64 x 96.'):
        model(np.zeros((65, 96, 3), np.uint8))


def test_an_unknown_and_an_absent_runtime_are_refused(segmentor, monkeypatch):
    with pytest.raises(ConfigError, match="runtime='tensorrt' is not known: use one of onnxruntime, openvino"):
        load(segmentor[3].directory, 'tensorrt')
    monkeypatch.setitem(sys.modules, 'openvino', None)
    with pytest.raises(ConfigError, match=r'openvino is not installed .*pip install psaq_mm\[deploy\]'):
        load(segmentor[3].directory, 'openvino')


# ---------------------------------------------------------------------- the commands
def fails(capsys, command, arguments, *words):
    assert command([str(a) for a in arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in error for word in words), error


def test_exporting_a_full_precision_checkpoint_is_refused(detector, capsys, tmp_path):
    project = detector[0]
    fails(
        capsys,
        export_command,
        [project.folder / 'quantized.py', project.checkpoint, '--out', tmp_path / 'out'],
        'is a full-precision checkpoint',
        'psaq quantize',
    )
    assert not (tmp_path / 'out').exists()


def test_wrong_arguments_are_refused_before_anything_is_built(detector, capsys, tmp_path):
    project = detector[0]
    arguments = [project.folder / 'quantized.py', project.folder / 'student.pth', '--out', tmp_path / 'out']
    fails(capsys, export_command, [*arguments, '--runtime', 'tensorrt'], "runtime='tensorrt' is not known")
    fails(capsys, export_command, [*arguments, '--opset', '9'], 'opset=9 is too old')
    fails(
        capsys,
        export_command,
        [*arguments, '--dynamic', '--size', 64, 96],
        '--size and --dynamic contradict each other',
    )
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'notes.txt').write_text('mine')
    fails(capsys, evaluate_command, [arguments[0], '--deployed', tmp_path / 'full'], 'holds no exported model')
    fails(capsys, evaluate_command, [arguments[0]], 'there is no checkpoint to evaluate')


def test_the_command_exports_and_verifies(segmentor, capsys, tmp_path):
    pytest.importorskip('onnxruntime')
    project = segmentor[0]
    status = export_command(
        [
            str(project.folder / 'quantized.py'),
            str(project.folder / 'student.pth'),
            '--out',
            str(tmp_path / 'out'),
            '--size',
            '64',
            '96',
            '--runtime',
            'onnxruntime',
            '--verify',
            '--threads',
            '1',
            '--format',
            'bundle',
            'onnx',
        ]
    )
    told = capsys.readouterr()
    assert (
        'products are integer' in told.out
        and 'codes in onnxruntime' in told.out
        and 'of its weights in float32' in told.out
    )
    # So small a model may have a layer with one tie in a few hundred elements: then the command says so.
    assert status == 0 or 'further from the fake-quantized' in told.err
    assert load(tmp_path / 'out', 'onnxruntime').sizes == [(64, 96)]
    assert {'graph_64x96.onnx', 'model.json'} <= {path.name for path in (tmp_path / 'out' / 'onnx').iterdir()}
    assert told.out.count('MiB on disk') == 4  # of both formats, when written and in the summary


def test_the_command_writes_plain_onnx_files_alone(segmentor, capsys, tmp_path):
    student = [segmentor[0].folder / name for name in ('quantized.py', 'student.pth')]
    arguments = [*student, '--out', tmp_path / 'out', '--size', 64, 96]
    fails(capsys, export_command, [*arguments, '--external-data'], 'give --format onnx too')
    assert export_command([str(a) for a in [*arguments, '--format', 'onnx', '--external-data']]) == 0
    names = {path.name for path in (tmp_path / 'out').iterdir()}
    assert names == {'graph_64x96.onnx', 'weights.data', 'model.json', 'README.txt'}
    told = capsys.readouterr().out
    size = sum(path.stat().st_size for path in (tmp_path / 'out').iterdir())
    assert f'{size / 2**20:.2f} MiB on disk' in told and f'saved to {tmp_path / "out"}' in told
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes' / 'notes.txt').write_text('mine')
    fails(capsys, export_command, [*student, '--out', tmp_path / 'notes'], 'is no exported model')


def test_default_sizes_hold_what_the_test_pipeline_makes(detector, segmentor):
    sizes = default_sizes(detector[1])
    assert (800, 1088) in sizes and (800, 1344) in sizes and (1344, 800) in sizes
    of_zoo = load_config(str(segmentor[0].folder / 'quantized.py'))
    assert default_sizes(of_zoo)[0] == (512, 704) and (2048, 512) in default_sizes(of_zoo)
    slides = copy.deepcopy(of_zoo)
    slides.model.test_cfg = dict(mode='slide', crop_size=SIZE, stride=SIZE)
    assert default_sizes(slides) == [SIZE]
