"""Agreement with full precision: on cases worked out by hand, and on detectors and segmentors that are run."""

import json

import numpy as np
import pytest
import torch
from tiny import DETECTOR, SEGMENTOR, Project

pytest.importorskip('mmengine')
from mmengine.structures import BaseDataElement, InstanceData, PixelData  # noqa: E402

from psaq_mm.commands.agreement import AgreementHook, Predictions, RecordHook  # noqa: E402
from psaq_mm.commands.compare import main as compare  # noqa: E402
from psaq_mm.commands.evaluation import evaluate  # noqa: E402
from psaq_mm.engine.checkpoint import read_checkpoint  # noqa: E402
from psaq_mm.errors import DataError, UnsupportedModelError  # noqa: E402
from psaq_mm.models.tasks.detection import matched_boxes  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')


def sample(name, **fields):
    return BaseDataElement(metainfo=dict(img_path=name), **fields)


def classified(predictions, truth):
    return [
        sample(f'{i}.png', pred_label=torch.tensor([p]), gt_label=torch.tensor([t]))
        for i, (p, t) in enumerate(zip(predictions, truth))
    ]


def segmented(maps):
    return [sample(f'{i}.png', pred_sem_seg=PixelData(data=torch.tensor(m)[None])) for i, m in enumerate(maps)]


def detected(pictures):
    found = []
    for number, boxes in enumerate(pictures):
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 6)
        instances = InstanceData(bboxes=boxes[:, :4], scores=boxes[:, 4], labels=boxes[:, 5].long())
        found.append(sample(f'{number}.png', pred_instances=instances))
    return found


def agreement(truth, found):
    record = RecordHook()
    record.after_test_iter(None, 0, outputs=truth)
    hook = AgreementHook(record.predictions)
    for number, one in enumerate(found):  # batches of another size
        hook.after_test_iter(None, number, outputs=[one])
    return hook.result()


BOXES = [[[0, 0, 10, 10, 0.9, 1], [20, 0, 30, 10, 0.8, 1], [50, 50, 60, 60, 0.2, 0]], [], [[0, 0, 8, 8, 0.5, 2]]]
MAPS = [np.arange(12).reshape(3, 4) % 5, np.full((2, 6), 300)]


@pytest.mark.parametrize('samples', [classified([0, 2, 1], [0, 1, 1]), segmented(MAPS), detected(BOXES)])
def test_a_model_agrees_with_itself_also_through_a_file(samples, tmp_path):
    assert agreement(samples, samples)['agreement'] == 1.0
    record = RecordHook()
    record.after_test_iter(None, 0, outputs=samples)
    record.predictions.metrics = dict(mIoU=1.5)
    record.predictions.save(tmp_path / 'full.npz')
    loaded = Predictions.load(tmp_path / 'full.npz')
    assert len(loaded) == len(samples) and loaded.metrics == dict(mIoU=1.5)
    for index in range(len(samples)):
        np.testing.assert_array_equal(loaded[index], record.predictions[index])
    hook = AgreementHook(loaded)
    hook.after_test_iter(None, 0, outputs=samples)
    assert hook.result()['agreement'] == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ['full.npz']


def test_classes_and_paired_difference():
    truth = [0, 1, 2, 0, 1]
    full, quantized = [0, 1, 2, 1, 1], [0, 1, 0, 0, 2]
    result = agreement(classified(full, truth), classified(quantized, truth))
    pairs = np.array([0, 0, -1, 1, -1])  # correct of the quantized one less correct of full precision
    assert result['agreement'] == 2 / 5
    assert result['difference'] == pytest.approx(100 * pairs.mean())
    assert result['difference_se'] == pytest.approx(100 * pairs.std(ddof=1) / 5**0.5)


def test_without_labels_there_is_no_difference():
    unlabelled = [sample('0.png', pred_label=torch.tensor([1]))]
    assert agreement(unlabelled, unlabelled) == dict(
        agreement=1.0, difference=None, difference_se=None, divergence=None
    )


def with_chances(logits):
    return [
        sample(f'{i}.png', pred_label=torch.tensor([int(row.argmax())]), pred_score=row.softmax(0))
        for i, row in enumerate(logits)
    ]


def test_class_probabilities_diverge_where_the_classes_agree(tmp_path):
    truth = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    found = truth * 1.3
    wanted = float(
        torch.nn.functional.kl_div(found.log_softmax(1), truth.log_softmax(1), reduction='batchmean', log_target=True)
    )
    result = agreement(with_chances(truth), with_chances(found))
    assert result['agreement'] == 1.0 and wanted > 1e-3
    assert result['divergence'] == pytest.approx(wanted, rel=1e-4)
    assert agreement(with_chances(truth), with_chances(truth))['divergence'] == pytest.approx(0.0, abs=1e-9)
    certain = torch.tensor([[0.0, 500.0], [500.0, 0.0]])  # the other class has no probability left in float32
    assert np.isfinite(agreement(with_chances(certain), with_chances(-certain))['divergence'])
    record = RecordHook()
    record.after_test_iter(None, 0, outputs=with_chances(truth))
    record.predictions.save(tmp_path / 'full.npz')
    hook = AgreementHook(Predictions.load(tmp_path / 'full.npz'))
    hook.after_test_iter(None, 0, outputs=with_chances(found))
    assert hook.result()['divergence'] == pytest.approx(result['divergence'], rel=1e-12)


def test_pixels_weigh_alike_whatever_picture_they_are_in():
    other = [MAPS[0].copy(), MAPS[1].copy()]
    other[0][0, :3] = 9
    other[1][1, 5] = 44  # 300 - 256: codes must not wrap
    assert agreement(segmented(MAPS), segmented(other))['agreement'] == 20 / 24


def test_label_maps_of_another_size_are_refused():
    with pytest.raises(DataError, match=r'\(3, 4\).*\(4, 3\)|\(4, 3\).*\(3, 4\)'):
        agreement(segmented(MAPS[:1]), segmented([MAPS[0].T.copy()]))


@pytest.mark.parametrize(
    'found, matches',
    [
        ([[0, 0, 10, 10, 0.9, 1]], 1),
        ([[0, 0, 10, 10, 0.9, 0]], 0),  # another class
        ([[0, 0, 10, 5, 0.9, 1]], 1),  # an overlap of exactly a half
        ([[0, 0, 10, 4.9, 0.9, 1]], 0),
        ([[0, 0, 10, 10, 0.9, 1], [0, 0, 10, 9, 0.8, 1]], 1),  # a box is found once
        ([[0, 0, 10, 9, 0.8, 1], [0, 0, 10, 10, 0.4, 1], [21, 0, 31, 10, 0.35, 1]], 2),
        ([], 0),
    ],
)
def test_matching(found, matches):
    truth = np.array(BOXES[0][:2], np.float32)
    assert matched_boxes(np.array(found, np.float32).reshape(-1, 6), truth) == matches


def test_f1_counts_only_sure_boxes_of_both_sides():
    # One of full precision's three boxes is missed, one is found that it has not; boxes under the score do not count.
    found = [[[0, 0, 10, 10, 0.31, 1], [80, 80, 90, 90, 0.29, 1]], [[0, 0, 5, 5, 0.6, 0]], [[0, 0, 8, 8, 0.3, 2]]]
    assert agreement(detected(BOXES), detected(found))['agreement'] == pytest.approx(2 * 2 / (3 + 3))


def test_no_boxes_on_either_side_is_nothing_to_compare():
    assert agreement(detected([[]]), detected([[[0, 0, 9, 9, 0.1, 0]]]))['agreement'] is None


def test_another_order_is_refused():
    samples = classified([0, 1], [0, 1])
    with pytest.raises(DataError, match='1.png.*0.png.*shuffle=False'):
        agreement(samples, samples[::-1])


def test_predictions_of_a_kind_that_cannot_be_compared():
    with pytest.raises(UnsupportedModelError, match='pred_panoptic_seg'):
        agreement([sample('0.png', pred_panoptic_seg=PixelData(data=torch.zeros(1, 2, 2)))], [])


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / 'full.npz').write_bytes(b'PK\x03\x04 cut short')
    with pytest.raises(DataError, match='full.npz is damaged'):
        Predictions.load(tmp_path / 'full.npz')


# ---------------------------------------------------------------------- models that run
def _pictures(folder, count):
    from PIL import Image

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        blocks = random.integers(0, 256, (4, 6, 3)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
        Image.fromarray(blocks).save(folder / f'{number}.png')


def detector(folder):
    """Detects: the bias of one class is high enough for boxes above the score."""
    from mmdet.datasets import CocoDataset

    project = Project(folder, DETECTOR)
    content = torch.load(project.checkpoint)
    content['state_dict']['roi_head.bbox_head.fc_cls.bias'][:2] += 6.0
    torch.save(content, project.checkpoint)
    _pictures(folder / 'images', 3)
    box = dict(
        iscrowd=0,
        area=400.0,
        bbox=[10.0, 10.0, 20.0, 20.0],
        segmentation=[[10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]],
    )
    (folder / 'boxes.json').write_text(
        json.dumps(
            dict(
                images=[dict(id=i, file_name=f'{i}.png', height=64, width=96) for i in range(3)],
                annotations=[dict(box, id=i, image_id=i, category_id=1) for i in range(3)],
                categories=[dict(id=i, name=name) for i, name in enumerate(CocoDataset.METAINFO['classes'], 1)],
            )
        )
    )
    return (
        project,
        f"""
test_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(
    data_root={str(folder)!r}, ann_file='boxes.json', data_prefix=dict(img='images'), pipeline=[
        dict(type='LoadImageFromFile'), dict(type='Resize', scale=(96, 64)),
        dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]))
test_evaluator = dict(ann_file={str(folder / 'boxes.json')!r})
""",
    )


def segmentor(folder):
    from PIL import Image

    project = Project(folder, SEGMENTOR)
    _pictures(folder / 'images', 3)
    (folder / 'maps').mkdir()
    for number in range(3):
        labels = np.random.default_rng(number).integers(1, 6, (64, 96)).astype(np.uint8)
        Image.fromarray(labels).save(folder / 'maps' / f'{number}.png')
    return (
        project,
        f"""
test_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(
    type='BaseSegDataset', img_suffix='.png', reduce_zero_label=True,
    metainfo=dict(classes=tuple('abcde'), palette=[[i, i, i] for i in range(5)]),
    data_root={str(folder)!r}, data_prefix=dict(img_path='images', seg_map_path='maps'), pipeline=[
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True),
        dict(type='PackSegInputs')]))
""",
    )


@pytest.mark.parametrize('build, library, metric', [(detector, 'mmdet', 'coco/bbox_mAP'), (segmentor, 'mmseg', 'mIoU')])
def test_agreement_of_models_that_run(build, library, metric, tmp_path):
    pytest.importorskip(library)
    from mmengine.config import Config

    project, test_set = build(tmp_path)
    path = project.config()
    path.write_text(path.read_text() + test_set)
    work_dir = tmp_path / 'work'
    arguments = ['--calibration', 'gaussian', '--seeds', '0', '--quant', 'w2a2']
    assert compare([str(path), *arguments, '--work-dir', str(work_dir)]) == 0
    (row,) = json.loads((work_dir / 'compare.json').read_text())['rows']
    assert metric in row['metrics'] and row['full_precision'].keys() == row['metrics'].keys()
    assert 0 < row['agreement'] < 1 and row['difference'] is None

    truth = Predictions.load(next(work_dir.glob('full_precision_*.npz')))
    assert len(truth) == 3
    hook, config = AgreementHook(truth), Config.fromfile(path)
    config.work_dir = str(tmp_path / 'again')
    metrics = evaluate(
        config, read_checkpoint(project.checkpoint), str(project.checkpoint), full_precision=True, hooks=[hook]
    )
    assert hook.result() == dict(agreement=1.0, difference=None, difference_se=None, divergence=None)
    assert metrics[metric] == truth.metrics[metric]
