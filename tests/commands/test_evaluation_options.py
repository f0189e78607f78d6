"""What users of mmdet's, mmseg's and mmpretrain's tools/test.py expect: --show-dir, --out, --tta; of a student, of full
precision, and of an exported model."""

import json
import pickle
import re

import numpy as np
import pytest
from PIL import Image
from quick_builds import configs_as_they_are, metafiles_read_once
from tiny import DETECTOR, SEGMENTOR, Project, calibrated_student
from tiny_classifier import ClassifierProject

from psaq_mm.commands.evaluation_options import EvaluationOptions
from psaq_mm.commands.test import main
from psaq_mm.errors import ConfigError

pytestmark = pytest.mark.filterwarnings('ignore')

BOXES = """
pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(96, 64), keep_ratio=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
model.update(test_cfg=dict(
    rpn=dict(nms_pre=50, max_per_img=20, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0),
    rcnn=dict(score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=5, mask_thr_binary=0.5)))
model['roi_head'].update(mask_head=None, mask_roi_extractor=None)
test_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False, dataset=dict(
    data_root={data!r}, ann_file='test.json', data_prefix=dict(img='img'), pipeline=pipeline))
test_evaluator = dict(ann_file={data!r} + '/test.json', metric='bbox')
visualizer = dict(vis_backends=[])
"""
MAPS = """
pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
test_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False, dataset=dict(
    _delete_=True, type='BaseSegDataset', metainfo=dict(classes=tuple('abcde'), palette=[[9, i, i] for i in range(5)]),
    data_root={data!r}, data_prefix=dict(img_path='img', seg_map_path='maps'), seg_map_suffix='.png', img_suffix='.png',
    pipeline=pipeline))
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='RandomFlip', prob=0.), dict(type='RandomFlip', prob=1.)],
        [dict(type='LoadAnnotations')], [dict(type='PackSegInputs')]])]
"""
SIZE = (64, 96)


def write_pictures(folder):
    """Two pictures of blocks with boxes and maps, as mmdet's and mmseg's data sets read them."""
    from mmdet.datasets import CocoDataset

    random, images, boxes = np.random.default_rng(0), [], []
    for name in ('img', 'maps'):
        (folder / name).mkdir()
    for number in range(2):
        blocks = random.integers(0, 256, (8, 12, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(blocks).save(folder / 'img' / f'{number}.png')
        Image.fromarray(random.integers(0, 5, (8, 12), dtype=np.uint8).repeat(8, 0).repeat(8, 1)).save(
            folder / 'maps' / f'{number}.png'
        )
        images.append(dict(id=number, file_name=f'{number}.png', height=SIZE[0], width=SIZE[1]))
        boxes.append(dict(id=number + 1, image_id=number, category_id=1, bbox=[8, 8, 40, 40], area=1600, iscrowd=0))
    categories = [dict(id=i, name=name) for i, name in enumerate(CocoDataset.METAINFO['classes'], 1)]
    (folder / 'test.json').write_text(json.dumps(dict(images=images, annotations=boxes, categories=categories)))


def student_of(project):
    """A project with the config and the student of one calibration."""
    project.path, project.student = project.folder / 'quantized.py', project.folder / 'student.pth'
    size = SIZE if project.base.read_text().startswith('\n_base_') else (32, 32)
    calibrated_student(project, 'w8a8', size)
    return project


@pytest.fixture(scope='module')
def quick():
    with metafiles_read_once(), configs_as_they_are():
        yield


@pytest.fixture(scope='module')
def classifier(tmp_path_factory, quick):
    pytest.importorskip('mmpretrain')
    return student_of(ClassifierProject(tmp_path_factory.mktemp('classifier'), per_class=1))


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    pytest.importorskip('mmdet')
    folder = tmp_path_factory.mktemp('data')
    write_pictures(folder)
    return folder


@pytest.fixture(scope='module')
def detector(tmp_path_factory, quick, pictures):
    return student_of(
        Project(tmp_path_factory.mktemp('detector'), DETECTOR + BOXES.replace('{data!r}', repr(str(pictures))))
    )


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory, quick, pictures):
    pytest.importorskip('mmseg')
    return student_of(
        Project(tmp_path_factory.mktemp('segmentor'), SEGMENTOR + MAPS.replace('{data!r}', repr(str(pictures))))
    )


def evaluated(project, folder, *arguments):
    """Metrics of psaq-test, which draws into ``shown`` and writes into ``out`` of a folder."""
    assert main([str(project.path), *map(str, arguments), '--work-dir', str(folder / 'work')]) == 0
    return json.loads((folder / 'work' / 'test_results.json').read_text())


def refused(capsys, project, *arguments):
    """The one sentence of psaq-test where it cannot go on."""
    assert main([str(project.path), *map(str, arguments)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('psaq-test: ')
    return error


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def changed(drawn, original):
    """Share of pixels that a drawing changed. mmdet draws annotations at the left and predictions at the right."""
    first, second = (np.asarray(Image.open(path).convert('RGB'), int) for path in (drawn, original))
    return float((np.abs(first[:, -second.shape[1] :] - second).max(-1) > 40).mean())


def loaded(path):
    return pickle.loads(path.read_bytes())


# ---------------------------------------------------------------------- classifiers
def test_of_two_models_each_has_files_of_its_own(classifier, tmp_path, capsys):
    out = tmp_path / 'predictions.pkl'
    results = evaluated(
        classifier, tmp_path, classifier.student, '--full-precision', '--show-dir', tmp_path / 'shown', '--out', out
    )
    assert {'full_precision', 'quantized'} <= set(names(tmp_path / 'shown')) and not out.exists()
    for name in ('full_precision', 'quantized'):
        assert len(names(tmp_path / 'shown' / name)) >= 1
        rows = loaded(tmp_path / f'predictions_{name}.pkl')
        right = np.mean([int(row['pred_label']) == int(row['gt_label']) for row in rows])
        assert len(rows) == 3 and 100 * right == pytest.approx(results[name]['accuracy/top1'])
    told = capsys.readouterr().out
    assert f'predictions are in {tmp_path / "predictions_quantized.pkl"}' in told and '| saved' not in told


def test_a_flipped_classifier_is_the_mean_of_two(classifier, tmp_path):
    evaluated(classifier, tmp_path, classifier.student, '--out', tmp_path / 'plain.pkl')
    evaluated(classifier, tmp_path, classifier.student, '--tta', '--out', tmp_path / 'tta.pkl')
    plain, both = loaded(tmp_path / 'plain.pkl'), loaded(tmp_path / 'tta.pkl')
    assert [row['img_path'] for row in plain] == [row['img_path'] for row in both]
    differences = [float((a['pred_score'] - b['pred_score']).abs().max()) for a, b in zip(plain, both)]
    assert max(differences) > 1e-4 and all(abs(float(row['pred_score'].sum()) - 1) < 1e-4 for row in both)


def test_an_exported_classifier_draws_and_writes_too(classifier, tmp_path):
    pytest.importorskip('onnxruntime')
    from psaq_mm.commands.export import main as export

    deployed, out = tmp_path / 'deployed', tmp_path / 'predictions.pkl'
    assert export([str(classifier.path), str(classifier.student), '--out', str(deployed), '--size', '32', '32']) == 0
    exported = '--deployed', deployed, '--runtime', 'onnxruntime', '--threads', 1
    results = evaluated(classifier, tmp_path, *exported, '--show-dir', tmp_path / 'shown', '--out', out)
    rows = loaded(out)
    right = np.mean([int(row['pred_label']) == int(row['gt_label']) for row in rows])
    assert 100 * right == pytest.approx(results['integer']['accuracy/top1']) and names(tmp_path / 'shown')
    evaluated(classifier, tmp_path, *exported, '--out', out, '--tta')
    differences = [float((a['pred_score'] - b['pred_score']).abs().max()) for a, b in zip(rows, loaded(out))]
    assert max(differences) > 1e-4


# ---------------------------------------------------------------------- detectors
def test_a_detector_draws_boxes_and_writes_a_pickle(detector, pictures, tmp_path):
    out, shown = tmp_path / 'predictions.pkl', tmp_path / 'shown'
    hook = '--cfg-options', 'default_hooks.visualization.score_thr=0.0'
    results = evaluated(detector, tmp_path, detector.student, '--show-dir', shown, '--out', out, *hook)
    assert names(shown) == ['0.png', '1.png'] and all(
        changed(shown / n, pictures / 'img' / n) > 0 for n in names(shown)
    )
    rows = loaded(out)
    assert [row['img_id'] for row in rows] == [0, 1] and all(len(row['pred_instances']['bboxes']) for row in rows)
    assert 'coco/bbox_mAP' in results['quantized'] and names(tmp_path) == ['predictions.pkl', 'shown', 'work']


def test_a_flipped_detector_sees_both(detector, tmp_path):
    results = evaluated(detector, tmp_path, detector.student, '--tta', '--out', tmp_path / 'tta.pkl')
    boxes = [len(row['pred_instances']['bboxes']) for row in loaded(tmp_path / 'tta.pkl')]
    assert max(boxes) > 5, 'each of the two gives 5 boxes'
    assert 'coco/bbox_mAP' in results['quantized']


def test_what_mmdet_cannot_augment_is_told():
    with pytest.raises(ConfigError, match='merges boxes and no masks.*leave --tta out'):
        with EvaluationOptions(tta=True).written_by(None):
            raise AssertionError('TTA of instance segmentation does not support now.')
    with pytest.raises(AssertionError, match='another'), EvaluationOptions(tta=True).written_by(None):
        raise AssertionError('another')


# ---------------------------------------------------------------------- segmentors
def test_a_segmentor_draws_and_writes_its_maps(segmentor, tmp_path):
    out, shown = tmp_path / 'maps', tmp_path / 'shown'
    evaluated(segmentor, tmp_path, segmentor.student, '--show-dir', shown, '--out', out)
    assert names(out) == ['0.png', '1.png'] and len(names(shown)) == 2
    for number, name in enumerate(names(shown)):
        assert re.match(rf'.*{number}\.png', name) and np.asarray(Image.open(shown / name)).shape[2] == 3
        assert np.asarray(Image.open(out / f'{number}.png')).shape == SIZE


def test_a_segmentor_takes_the_augmentation_of_its_config(segmentor, tmp_path, capsys):
    plain = evaluated(segmentor, tmp_path, segmentor.student)['quantized']
    assert evaluated(segmentor, tmp_path, segmentor.student, '--tta')['quantized'] != plain
    capsys.readouterr()
    error = refused(
        capsys, segmentor, segmentor.student, '--tta', '--work-dir', tmp_path, '--cfg-options', 'tta_pipeline=None'
    )
    assert error.endswith('has none: set it as the configs of mmseg do, or leave --tta out') and 'tta_pipeline' in error


# ---------------------------------------------------------------------- mistakes
def test_what_fits_no_library_is_told(classifier, segmentor, capsys, tmp_path):
    for project, out, words in (
        (classifier, tmp_path / 'folder', 'a pickle file for models of mmpretrain: let it end with .pkl'),
        (segmentor, tmp_path / 'maps.pkl', 'is a folder of label maps for a segmentor, as in mmseg: name a folder'),
    ):
        assert words in refused(capsys, project, project.student, '--out', out, '--work-dir', tmp_path)
    both = '--tta', '--show-dir', tmp_path / 'shown', '--work-dir', tmp_path
    assert 'mmpretrain draws no pictures' in refused(capsys, classifier, classifier.student, *both)


@pytest.mark.parametrize('option', ['--show-dir', '--out'])
def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(tmp_path, capsys, option):
    (tmp_path / 'file').write_text('')
    assert main(['no_such_config.py', 'S.pth', option, str(tmp_path / 'file' / 'shown')]) == 1
    error = capsys.readouterr().err
    assert f'{option} {tmp_path / "file" / "shown"} cannot be written' in error and 'give another folder' in error


def test_a_window_needs_a_screen(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr('sys.platform', 'linux')
    monkeypatch.delenv('DISPLAY', raising=False)
    monkeypatch.delenv('WAYLAND_DISPLAY', raising=False)
    assert main(['C.py', 'S.pth', '--show']) == 1 and 'give --show-dir FOLDER' in capsys.readouterr().err
    assert main(['C.py', 'S.pth', '--show', '--show-dir', str(tmp_path)]) == 1
    assert 'do not go together' in capsys.readouterr().err
