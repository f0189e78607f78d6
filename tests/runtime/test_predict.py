"""Pictures of any size to predictions at their own size; psaq-predict; all of it without PyTorch and OpenMMLab."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from classifier_models import CLASSIFIER
from tiny import DETECTOR, SEGMENTOR, WITHOUT_TORCH, Project, calibrated_student

from psaq_mm.commands.predict import main
from psaq_mm.deploy import load
from psaq_mm.deploy.serving import deploy_model_
from psaq_mm.engine.exporting import export
from psaq_mm.errors import ConfigError, DataError, UnsupportedModelError
from psaq_mm.files import file_sha256
from psaq_mm.runtime import RUNTIMES, Prediction
from psaq_mm.runtime.bundle import read_graph, read_manifest, read_weights
from psaq_mm.runtime.detection import ImageInfo
from psaq_mm.runtime.glue import label_map, slide, upsample
from psaq_mm.runtime.heads import quantize_features
from psaq_mm.runtime.pictures import pictures_in
from psaq_mm.runtime.predictions import run_lengths

ROOT = Path(__file__).resolve().parents[2]
SIZE = (64, 96)
KEEP = [dict(type='Resize', scale=(96, 64), keep_ratio=True)]
DETECTIONS = """
model['test_cfg'] = dict(
    rpn=dict(nms_pre=100, max_per_img=40, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0),
    rcnn=dict(score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=12, mask_thr_binary=0.5))
"""

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """A folder of three pictures of several sizes, one of them in a folder of its own."""
    cv2 = pytest.importorskip('cv2')
    folder = tmp_path_factory.mktemp('pictures')
    (folder / 'more').mkdir()
    for name, shape in (('a.png', (50, 75)), ('b.png', (100, 60)), ('more/a.jpg', (64, 96))):
        blocks = np.random.default_rng(len(name)).integers(0, 256, (*(s // 4 + 1 for s in shape), 3))
        cv2.imwrite(str(folder / name), blocks.astype(np.uint8).repeat(4, 0).repeat(4, 1)[: shape[0], : shape[1]])
    return folder


def made(folder, text, steps, quant='w8a8', size=SIZE, sizes=((96, 96),)):
    project = Project(folder, text)
    config, checkpoint, _ = calibrated_student(project, quant, size, steps)
    return config, export(config, str(checkpoint), str(folder / 'out'), sizes)[1].directory


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    pytest.importorskip('mmdet')
    pytest.importorskip('onnxruntime')
    quant = dict(preset='w8a8', scope='full')
    return made(tmp_path_factory.mktemp('detector'), DETECTOR + DETECTIONS, KEEP, quant)


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory):
    pytest.importorskip('mmseg')
    pytest.importorskip('onnxruntime')
    return made(tmp_path_factory.mktemp('segmentor'), SEGMENTOR, KEEP)


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    pytest.importorskip('mmpretrain')
    pytest.importorskip('onnxruntime')
    return made(tmp_path_factory.mktemp('classifier'), CLASSIFIER, None, size=(32, 32), sizes=[(32, 32)])


def packed(config, path, meta=()):
    """A picture out of the library's own test pipeline, for ``model.test_step``."""
    from mmengine.dataset import Compose
    from mmengine.registry import init_default_scope

    init_default_scope(config.default_scope)
    steps = [dict(step) for step in config.test_pipeline]
    steps[-1]['meta_keys'] = ('ori_shape', 'img_shape', *meta)
    found = Compose(steps)(dict(img_path=str(path)))
    return dict(inputs=[found['inputs']], data_samples=[found['data_samples']])


# ---------------------------------------------------------------------- segmentors
@pytest.mark.parametrize('mode', ['whole', 'slide'])
def test_a_label_map_is_mmsegs(segmentor, pictures, mode):
    """The library's own model around the same graph: resizing, windows, padding, interpolation to the own size."""
    from psaq_mm.engine.building import build_model

    config, directory = segmentor
    reference = deploy_model_(build_model(config).eval(), directory, 'onnxruntime', 1)
    reference.data_preprocessor.test_cfg = dict(size_divisor=32)
    model = load(directory, 'onnxruntime', 1)
    model._preparation.divisor = 32
    if mode == 'slide':
        reference.test_cfg.update(mode='slide', crop_size=(48, 64), stride=(20, 30))
        model.manifest['slide'] = dict(crop_size=[48, 64], stride=[20, 30])
    for path in sorted(pictures.rglob('*.*g')):
        with torch.no_grad():
            sample = reference.test_step(packed(config, path))[0]
        found = model.predict(path)
        wanted = sample.pred_sem_seg.data[0].numpy()
        assert found.label_map.shape == wanted.shape == found.size
        assert len(np.unique(wanted)) > 1 and (found.label_map == wanted).mean() > 0.999


def as_version_2(directory, out):
    """A directory as version 2 of the format had it: nothing of the test pipeline, weights one after the other."""
    manifest, rows, data = read_manifest(directory), [], b''
    for name, array in read_weights(directory, manifest).items():
        rows.append(dict(name=name, dtype=array.dtype.name, shape=array.shape, offset=len(data), bytes=array.nbytes))
        data += array.tobytes()
    out.mkdir()
    (out / 'weights.bin').write_bytes(data)
    for graph in manifest['graphs']:
        (out / graph['file']).write_bytes(read_graph(directory, manifest, graph))
    later = (
        'pipeline',
        'pad_divisor',
        'slide',
        'palette',
        'complete',
        'heads',
        'detector',
        'weights',
        'files',
        'version',
    )
    older = {key: value for key, value in manifest.items() if key not in later}
    files = {p.name: dict(bytes=p.stat().st_size, sha256=file_sha256(p)) for p in out.iterdir()}
    (out / 'manifest.json').write_text(json.dumps(dict(older, version=2, weights=rows, files=files)))
    return load(out, 'onnxruntime', 1)


def test_an_export_of_an_earlier_version_takes_pictures_as_they_come(segmentor, tmp_path):
    older, model = as_version_2(segmentor[1], tmp_path / 'older'), load(segmentor[1], 'onnxruntime', 1)
    batch = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3)).astype(np.uint8)
    found, logits = older(batch), model.run(model.normalize(batch))['logits']
    assert set(found) == {'logits', 'labels'} and np.array_equal(found['logits'], logits)
    assert np.array_equal(found['labels'], upsample(logits, (40, 50), False).argmax(1))
    assert (older.predict(batch[0]).label_map == found['labels'][0]).mean() > 0.999
    with pytest.raises(DataError, match='call the model once for each size'):
        older([batch[0], batch[0, :20]])


def test_label_maps_of_several_interpolations_and_of_one_class():
    from torch.nn.functional import interpolate

    logits = torch.randn(1, 4, 9, 13, generator=torch.Generator().manual_seed(0))
    for corners in (False, True):
        wanted = interpolate(logits, (36, 52), mode='bilinear', align_corners=corners)[:, :, :33, :50]
        wanted = interpolate(wanted, (70, 41), mode='bilinear', align_corners=corners)
        sizes = [(36, 52), (33, 50), (70, 41)]
        found = label_map(logits[0].numpy(), sizes, corners, dict(rule='argmax'))
        assert (found == wanted[0].argmax(0).numpy()).mean() > 0.999
        one = label_map(logits[0, :1].numpy(), sizes, corners, dict(rule='threshold', threshold=0.3))
        assert (one == (wanted[0, 0].sigmoid() > 0.3).numpy()).mean() > 0.999


def test_windows_that_are_larger_than_the_picture_are_as_large_as_it():
    image = np.random.default_rng(0).normal(size=(1, 3, 20, 30)).astype(np.float32)
    seen = []

    def run(part):
        seen.append(part.shape[2:])
        return part[:, :2]

    found = slide(run, image, dict(crop_size=(32, 16), stride=(32, 10)), False)
    assert set(seen) == {(20, 16)} and len(seen) == 3
    assert np.allclose(found, image[:, :2], atol=1e-6)


# ---------------------------------------------------------------------- classifiers
def test_a_classifier_gives_mmpretrains_scores(classifier, pictures):
    from mmengine.registry import MODELS

    from psaq_mm.engine.building import build_model

    config, directory = classifier
    reference = deploy_model_(build_model(config).eval(), directory, 'onnxruntime', 1)
    # A runner builds it with the model.
    reference.data_preprocessor = MODELS.build(dict(config.data_preprocessor, type='mmpretrain.ClsDataPreprocessor'))
    model = load(directory, 'onnxruntime', 1)
    found = model.predict(pictures / 'b.png')
    with torch.no_grad():
        sample = reference.test_step(packed(config, pictures / 'b.png'))[0]
    assert np.allclose(found.probabilities, sample.pred_score.numpy(), atol=1e-6)
    assert found.labels[0] == int(sample.pred_label) and len(found.names) == 5
    assert (np.diff(found.scores) <= 0).all() and np.allclose(found.scores, found.probabilities[found.labels])
    called = model([pictures / 'b.png', pictures / 'a.png'])
    assert called['logits'].shape == (2, 5) and called['labels'][0] == found.labels[0]
    assert called['names'][0] == found.names[0] and 'classification' in repr(found)


# ---------------------------------------------------------------------- detectors
def test_a_detector_gives_what_it_detects_on_mmdets_input(detector, pictures):
    config, directory = detector
    from mmengine.registry import MODELS

    model = load(directory, 'onnxruntime', 1)
    assert model.complete and [step['type'] for step in model.manifest['pipeline']] == ['resize']
    path = pictures / 'b.png'
    data = packed(config, path, ('scale_factor',))
    images = MODELS.build(config.model.data_preprocessor)(data)['inputs'].numpy()
    meta = data['data_samples'][0]
    info = ImageInfo(tuple(meta.img_shape), tuple(meta.ori_shape), tuple(meta.scale_factor))
    wanted, found = model.detect(images, [info])[0], model.predict(path)
    assert len(wanted.boxes) == 12
    for name in ('boxes', 'scores', 'labels', 'masks'):
        assert np.array_equal(getattr(wanted, name), getattr(found, name)), name
    assert found.masks.shape == (12, 100, 60) and found.boxes[:, 2].max() > 40, 'at the own size'
    assert set(found.names) <= {'bolt', 'nut', *(f'class {i}' for i in range(80))}
    both = model.detect(np.concatenate([images, images[..., ::-1]]), [info, info])
    assert np.array_equal(both[0].boxes, wanted.boxes) and not np.array_equal(both[1].boxes, wanted.boxes)
    called = model([path, pictures / 'a.png'])
    assert [len(boxes) for boxes in called['boxes']] == [12, 12] and called['masks'][1].shape == (12, 50, 75)
    assert np.array_equal(called['boxes'][0], found.boxes)


def test_threads_share_a_detector(detector, pictures):
    pytest.importorskip('openvino')
    model, paths = load(detector[1], 'openvino', 1), sorted(pictures.rglob('*.*g'))
    with ThreadPoolExecutor(3) as pool:  # the first ones start the graphs
        found = list(pool.map(model.predict, paths * 3))
    for number, prediction in enumerate(found):
        wanted = model.predict(paths[number % 3])
        assert np.array_equal(prediction.boxes, wanted.boxes) and np.array_equal(prediction.masks, wanted.masks)


def test_features_are_quantized_as_the_graph_would():
    features = np.random.default_rng(0).normal(scale=3, size=(5, 7, 7, 130)).astype(np.float32)
    features[0, 0, 0, :3] = 0.05, -0.15, np.float32(1e9)
    for dtype, low, high, zero in (('uint8', 0, 255, 120), ('int8', -128, 127, 0), ('uint8', 0, 15, 3)):
        quantizer = dict(scale=0.1, zero_point=zero, low=low, high=high, dtype=dtype)
        codes = quantize_features(features, quantizer)
        wanted = np.clip(np.rint(features / np.float32(0.1)) + np.float32(zero), low, high)
        assert codes.dtype == dtype and np.array_equal(codes, wanted.astype(dtype))
    assert quantize_features(features[:0], quantizer).shape == (0, 7, 7, 130)
    assert np.array_equal(quantize_features(features, None), features)


# ---------------------------------------------------------------------- without PyTorch
SCRIPT = """
import json
import psaq_mm.deploy
from psaq_mm.commands.predict import main
options = ['--runtime', 'onnxruntime', '--threads', '1']
for number, directory in enumerate({directories!r}):
    model = psaq_mm.deploy.load(directory, 'onnxruntime', threads=1)
    print(model.predict({picture!r}))
    out = {out!r} + str(number)
    assert main([directory, {folder!r}, *options, '--out', out, '--json', out + '.json']) == 0
"""


def test_pictures_to_predictions_without_pytorch(detector, segmentor, classifier, pictures, tmp_path):
    import cv2

    script = WITHOUT_TORCH + SCRIPT.format(
        directories=[str(made[1]) for made in (detector, segmentor, classifier)],
        picture=str(pictures / 'a.png'),
        folder=str(pictures),
        out=str(tmp_path / 'out'),
    )
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for task in ('detection, 50 x 75, 12 boxes', 'segmentation, 50 x 75', 'classification, 50 x 75'):
        assert f'Prediction({task}' in done.stdout, done.stdout
    assert done.stdout.count('3 pictures; onnxruntime') == 3 and ' a second' in done.stdout
    for number in range(3):
        assert cv2.imread(str(tmp_path / f'out{number}' / 'b.png')).shape == (100, 60, 3)
        assert (tmp_path / f'out{number}' / 'more' / 'a.jpg').is_file()
    rows = [json.loads((tmp_path / f'out{number}.json').read_text())['pictures'] for number in range(3)]
    assert [Path(row['picture']).name for row in rows[0]] == ['a.png', 'b.png', 'a.jpg']
    segments = rows[1][0]['segments']
    assert sum(sum(segment['mask']['counts'][1::2]) for segment in segments) == 50 * 75
    assert len(rows[2][0]['predictions']) == 5 and rows[2][0]['predictions'][0]['score'] > 0


def test_commands_that_need_pytorch_say_so():
    script = """
import sys
sys.modules['torch'] = sys.modules['mmengine'] = None
from psaq_mm.commands.export import main
main(['C.py', 'student.pth', '--out', 'D'])
"""
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith('psaq-export: PyTorch and MMEngine are not installed: pip install')


# ---------------------------------------------------------------------- the command
def test_a_broken_picture_does_not_stop_the_others(classifier, pictures, tmp_path, capsys):
    (tmp_path / 'broken.jpg').write_bytes(b'no picture')
    arguments = [str(classifier[1]), str(pictures / 'a.png'), str(tmp_path), '--runtime', 'onnxruntime', '--quiet']
    assert main([*arguments, '--json', str(tmp_path / 'all.json'), '--settings', 'inter_op_num_threads=1']) == 1
    told = capsys.readouterr()
    assert told.err.splitlines() == [
        f'psaq-predict: {tmp_path / "broken.jpg"} is no picture that OpenCV reads, or is cut short: leave it out, or '
        'save it again'
    ]
    assert told.out.startswith('2 pictures, 1 of them failed; onnxruntime') and len(told.out.splitlines()) == 1
    rows = json.loads((tmp_path / 'all.json').read_text())['pictures']
    assert 'predictions' in rows[0] and 'is no picture' in rows[1]['error']


@pytest.mark.parametrize(
    'arguments, told',
    [
        (['nowhere.jpg'], 'there is no picture and no folder nowhere.jpg'),
        (['{folder}', '--device', 'GPU'], "device='GPU' is not there: this ONNX Runtime has"),
        (['{folder}', '--settings', 'threads'], '--settings threads has no value: write NAME=VALUE'),
        (['{folder}', '--settings', 'inter_op=1'], 'did you mean inter_op_num_threads?'),
        (['{folder}', '--runtime', 'tensorrt'], "runtime='tensorrt' is not known"),
        (['{empty}'], 'there is no picture in'),
    ],
)
def test_wrong_arguments(classifier, pictures, tmp_path, capsys, arguments, told):
    arguments = [a.format(folder=pictures / 'more', empty=tmp_path) for a in arguments]
    runtime = [] if '--runtime' in arguments else ['--runtime', 'onnxruntime']
    assert main([str(classifier[1]), *arguments, *runtime]) == 1
    error = capsys.readouterr().err
    assert error.startswith('psaq-predict: ') and told in error and len(error.splitlines()) == 1, error


def test_files_of_one_name_go_to_places_of_their_own(pictures, tmp_path):
    (tmp_path / 'A.png').write_bytes(b'')
    found = pictures_in([str(pictures), str(tmp_path), str(pictures / 'a.png')])
    places = [shown.place.as_posix() for shown in found]
    assert places == ['a.png', 'b.png', 'more/a.jpg', '1/A.png', '2/a.png']


# ---------------------------------------------------------------------- predictions
def test_what_gives_no_predictions_says_so(segmentor):
    model = load(segmentor[1], 'onnxruntime', 1)
    model.task, model.complete = 'backbone', False
    with pytest.raises(UnsupportedModelError, match='feature maps alone, .* psaq test CONFIG --deployed'):
        model.predict(np.zeros((*SIZE, 3), np.uint8))
    with pytest.raises(UnsupportedModelError, match='holds no whole detector'):
        model.detect(np.zeros((1, 3, *SIZE), np.float32), [ImageInfo(SIZE, SIZE)])


def test_a_picture_that_the_pipeline_makes_too_large_is_told(segmentor):
    model = load(segmentor[1], 'onnxruntime', 1)
    model._preparation.steps = [dict(type='resize', scale=[300, 200], keep_ratio=True)]
    with pytest.raises(DataError, match='50 x 75 becomes one of 200 x 300 in the test pipeline, which does not fit'):
        model.predict(np.zeros((50, 75, 3), np.uint8))
    with pytest.raises(DataError, match='there is no picture in what the model was called with'):
        model([])


def test_drawings_show_boxes_above_the_threshold():
    pytest.importorskip('cv2')
    masks = np.zeros((2, 60, 80), bool)
    masks[0, 20:40, 20:40] = masks[1, 50:58, 60:78] = True
    prediction = Prediction(
        'detection',
        (60, 80),
        ['bolt', 'nut'],
        boxes=np.array([[20, 20, 40, 40], [60, 50, 78, 58]], np.float32),
        scores=np.array([0.9, 0.2], np.float32),
        labels=np.array([1, 0]),
        names=['nut', 'bolt'],
        masks=masks,
        palette=[(1, 2, 3), (250, 0, 10)],
    )
    picture = np.full((60, 80, 3), 100, np.uint8)
    drawn = prediction.draw(picture, 0.3)
    assert (picture == 100).all(), 'it is a copy'
    assert drawn[38, 30].tolist() == [55, 50, 175], 'half of the class, in OpenCV`s order'
    assert (drawn[52:57, 62:76] == 100).all() and not (prediction.draw(picture, 0.1)[52:57, 62:76] == 100).all()
    assert prediction.above(0.3).names == ['nut'] and repr(prediction).endswith('2 boxes: nut 0.90, bolt 0.20)')
    assert prediction.draw(picture[..., :1]).shape == (60, 80, 3)
    with pytest.raises(DataError, match='of 61 x 80 is not the predicted one, which has 60 x 80'):
        prediction.draw(np.zeros((61, 80, 3), np.uint8))


def test_run_lengths_are_cocos():
    coco = pytest.importorskip('pycocotools.mask')
    for seed in range(3):
        mask = np.random.default_rng(seed).random((7, 9)) < 0.2 + 0.4 * seed
        found = run_lengths(mask)
        assert np.array_equal(coco.decode(coco.frPyObjects(found, 7, 9)), mask) and sum(found['counts']) == 63
    assert run_lengths(np.ones((2, 2), bool))['counts'] == [0, 4] and run_lengths(np.zeros((2, 2)))['counts'] == [4]


# ---------------------------------------------------------------------- runtimes
def test_devices_and_settings_reach_the_runtime(classifier):
    pytest.importorskip('openvino')
    picture = np.zeros((40, 40, 3), np.uint8)
    wanted = load(classifier[1], 'openvino', 1).predict(picture).logits
    for place in (dict(device='AUTO'), dict(device='cpu', settings={'NUM_STREAMS': 1, 'PERF_COUNT': True})):
        model = load(classifier[1], 'openvino', 1, **place)
        assert np.allclose(model.predict(picture).logits, wanted, atol=1e-4)
    assert model.session((32, 32)).compiled.get_property('PERF_COUNT') in (True, 'YES')
    for place, told in (
        (dict(device='GPU.7'), r"device='GPU.7' is not there: OpenVINO finds .*CPU"),
        (
            dict(settings={'NUM_STREEMS': 1}),
            "settings='NUM_STREEMS' is not known to OpenVINO on CPU: did you mean NUM_STREAMS",
        ),
        (dict(settings={'PERFORMANCE_HINT': 'FAST'}), 'does not start with device=.*Expected only'),
        (dict(settings={'INFERENCE_PRECISION_HINT': 'bf16'}), 'multiplies 8-bit codes wrongly'),
    ):
        if 'bf16' in str(place) and 'avx512_bf16' not in Path('/proc/cpuinfo').read_text():
            continue  # elsewhere the hint changes nothing
        with pytest.raises(ConfigError, match=told):
            load(classifier[1], 'openvino', 1, **place).predict(picture)


def test_settings_of_onnx_runtime(classifier):
    settings = {'inter_op_num_threads': 1, 'session.intra_op.allow_spinning': '0'}
    session = load(classifier[1], 'onnxruntime', 1, device='CPUExecutionProvider', settings=settings).session((32, 32))
    options = session.session.get_session_options()
    assert options.inter_op_num_threads == 1
    assert options.get_session_config_entry('session.intra_op.allow_spinning') == '0'
    with pytest.raises(
        ConfigError, match=r"settings='inter_op_num_threads' .* does not take 'x': give a value such as"
    ):
        load(classifier[1], 'onnxruntime', settings=dict(inter_op_num_threads='x')).session((32, 32))


@pytest.mark.parametrize('name, old', [('onnxruntime', '1.17.3'), ('openvino', '2023.3.0-1')])
def test_a_runtime_that_is_too_old_is_refused(classifier, monkeypatch, name, old):
    package = pytest.importorskip(name)
    monkeypatch.setattr(package, '__version__', old)
    minimum = RUNTIMES[name].minimum
    with pytest.raises(ConfigError, match=f'{name} is version {old} and psaq_mm needs {minimum} or a later one'):
        load(classifier[1], name)
    assert f"'{name}>={minimum}'" in (ROOT / 'setup.py').read_text()
