"""Whatever an evaluator gives, or does not give, is shown, saved as valid JSON, and never lost."""

import json
import pickle
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import DETECTOR, SEGMENTOR, Project
from tiny_classifier import ClassifierProject

from psaq_mm.commands.compare import main as compare
from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.commands.metrics import before_after_table, other_metrics, plain_metrics, scalars
from psaq_mm.commands.sensitivity import main as sensitivity
from psaq_mm.commands.test import main as evaluate_command
from psaq_mm.plain import to_plain

pytestmark = pytest.mark.filterwarnings('ignore')
NAN = float('nan')
CALIBRATE = dict(iters=0, evolve_every=0, samples=dict(type='psaq_mm.GaussianNoise'))

ODD = dict(
    top1=50.0,
    absent=NAN,
    per_class=[1.0, NAN, 3.0],
    matrix=torch.arange(4).reshape(2, 2),
    nested=dict(a=np.float32(0.5), b='text'),
    tensor=torch.tensor([2.5]),
    words='IoU 0.50:0.95',
    nothing=None,
    long=np.array([1, 2]),
    many=[[1.0], [2.0, 3.0]],
)


# ---------------------------------------------------------------------- values
def test_metrics_of_every_kind_as_plain_types_and_numbers():
    metrics = plain_metrics(ODD)
    assert (
        metrics['tensor'] == 2.5
        and metrics['nested/a'] == 0.5
        and metrics['nested/b'] == 'text'
        and metrics['matrix'] == [[0.0, 1.0], [2.0, 3.0]]
    )
    assert scalars(metrics) == {
        'top1': 50.0,
        'absent': None,
        'per_class (mean)': 2.0,
        'nested/a': 0.5,
        'tensor': 2.5,
        'nothing': None,
        'long (mean)': 1.5,
    }
    assert set(other_metrics(metrics)) == {'per_class', 'matrix', 'nested/b', 'words', 'long', 'many'}
    text = json.dumps(to_plain(metrics, nan=False), allow_nan=False)
    assert json.loads(text)['per_class'] == [1.0, None, 3.0] and json.loads(text)['absent'] is None
    assert plain_metrics(None) == plain_metrics({}) == {}


@pytest.mark.parametrize(
    'before, after',
    [(ODD, ODD), (ODD, {}), ({}, ODD), ({}, {}), (None, {}), ({}, None), (None, ODD), (dict(a=1.0), dict(b=2.0))],
)
def test_the_table_has_every_column_and_row(before, after):
    table = before_after_table(before, after, 'W4A8')
    head = table.splitlines()[0]
    assert ('full precision' in head) == (before is not None) and ('W4A8' in head) == (after is not None)
    for name, column in (('full precision', before), ('W4A8', after)):
        assert (f'{name}: the evaluator gave no metrics' in table) == (column == {})
        for key in scalars(plain_metrics(column)):
            assert f'\n{key} ' in table
    assert ('see file: test_results.json' in table) == (ODD in (before, after))


def test_a_table_of_numbers_is_what_it_was():
    assert before_after_table(
        {'coco/bbox_mAP': 0.5, 'mIoU': 40.0}, {'coco/bbox_mAP': 0.25, 'mIoU': 41.0}, 'W4A8'
    ).splitlines() == [
        'metric         full precision        W4A8  difference',
        '-----------------------------------------------------',
        'coco/bbox_mAP           0.500       0.250      -0.250',
        'mIoU                   40.000      41.000      +1.000',
    ]


# ---------------------------------------------------------------------- classifiers
@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    pytest.importorskip('mmpretrain')
    from mmengine.evaluator import BaseMetric
    from mmengine.registry import METRICS

    class Given(BaseMetric):
        """Gives what the config says, or fails where it says so."""

        def __init__(self, gives=(), fails='', prefix=None):
            super().__init__(prefix=prefix)
            self.gives, self.fails = dict(gives), fails

        def process(self, data_batch, data_samples):
            if self.fails == 'process':
                raise KeyError('gt_sem_seg')
            self.results.extend(data_samples)

        def compute_metrics(self, results):
            if self.fails:
                raise ZeroDivisionError('division by zero')
            return dict(self.gives)

    METRICS.register_module(name='GivenMetric', module=Given, force=True)
    project = ClassifierProject(tmp_path_factory.mktemp('classifier'), per_class=2)
    project.path = project.config(size=(32, 32), **CALIBRATE)
    assert dfq_train([str(project.path), '--work-dir', str(project.folder / 'student')]) == 0
    project.student = project.folder / 'student' / 'student.pth'
    return project


@pytest.fixture
def tried(classifier, tmp_path, capfd):
    """Evaluate with other statements in the config: exit status, standard output, standard error, and
    test_results.json."""

    def run(more, *arguments, command=evaluate_command, checkpoint=None):
        path = classifier.folder / 'tried.py'
        path.write_text(classifier.path.read_text() + more + '\n')
        capfd.readouterr()
        status = command(
            [str(path), str(checkpoint or classifier.student), '--work-dir', str(tmp_path / 'work'), *arguments]
        )
        out, err = capfd.readouterr()
        file = tmp_path / 'work' / 'test_results.json'
        strict = dict(parse_constant=lambda word: pytest.fail(f'{word} is no JSON'))
        return (
            status,
            out,
            err.strip().splitlines()[-1:],
            json.loads(file.read_text(), **strict) if file.exists() else None,
        )

    return run


ODD_EVALUATORS = """test_evaluator = [dict(type='Accuracy', topk=(1, )), dict(type='ConfusionMatrix'),
    dict(type='SingleLabelMetric', average=None), dict(type='SingleLabelMetric', prefix='again'),
    dict(type='GivenMetric', gives=dict(absent=float('nan'), words='0.50:0.95', inner=dict(a=1)))]"""


def test_matrices_lists_nan_and_several_evaluators(tried):
    status, out, _, results = tried(ODD_EVALUATORS, '--full-precision')
    assert status == 0 and 'confusion_matrix/result ' in out and 'see file' in out
    for kind in ('full_precision', 'quantized'):
        assert (
            np.shape(results[kind]['confusion_matrix/result']) == (3, 3)
            and len(results[kind]['single-label/precision_classwise']) == 3
        )
        assert (
            results[kind]['absent'] is None and results[kind]['words'] == '0.50:0.95' and results[kind]['inner/a'] == 1
        )
        assert results[kind]['again/precision'] == pytest.approx(
            np.mean(results[kind]['single-label/precision_classwise']), abs=0.01
        )
    assert 'single-label/precision_classwise (mean)' in out and 'again/recall' in out


def test_an_evaluator_that_fails_at_the_end_takes_nothing_with_it(tried):
    status, out, err, results = tried(
        "test_evaluator = [dict(type='Accuracy', topk=(1, )), dict(type='GivenMetric', fails='end')]",
        '--full-precision',
    )
    assert status == 1 and 'evaluator Given failed' in err[0] and 'division by zero' in err[0]
    assert 'accuracy/top1' in out and set(results['full_precision']) == set(results['quantized']) == {'accuracy/top1'}


def test_two_evaluators_that_give_one_name(tried):
    status, _, _, results = tried(
        "test_evaluator = [dict(type='Accuracy', topk=(1, )), dict(type='Accuracy', topk=(1, ))]"
    )
    assert status == 0 and set(results['quantized']) == {'accuracy/top1', 'accuracy/top1 (Accuracy 2)'}


def test_full_precision_is_kept_where_the_student_cannot_be_evaluated(tried, tmp_path, monkeypatch):
    from psaq_mm.commands import evaluation

    whole = evaluation.evaluate

    def fails(config, checkpoint, source, full_precision=False, **kwargs):
        if not full_precision:
            raise MemoryError
        return whole(config, checkpoint, source, full_precision, **kwargs)

    monkeypatch.setattr(evaluation, 'evaluate', fails)
    with pytest.raises(MemoryError):
        tried('', '--full-precision')
    assert 'accuracy/top1' in json.loads((tmp_path / 'work' / 'test_results.json').read_text())['full_precision']


@pytest.mark.parametrize(
    'more, words',
    [
        ("test_evaluator = dict(_delete_=True, type='GivenMetric', fails='process')", 'evaluator Given cannot score'),
        ('test_dataloader = dict(dataset=dict(indices=[]))', 'the test set is empty'),
        (
            "test_dataloader = dict(dataset=dict(pipeline=[dict(type='PackInputs', input_key='absent'), "
            "dict(type='CenterCrop', crop_size=8)]))",
            'a picture of the test set cannot be loaded (AssertionError: `img` is not found',
        ),
        (
            "test_dataloader = dict(num_workers=1, dataset=dict(pipeline=[dict(type='CenterCrop', crop_size=8)]))",
            'a picture of the test set cannot be loaded (AssertionError: `img` is not found',
        ),
        ("test_evaluator = dict(_delete_=True, type='mmdet.LVISMetric')", 'cannot be built'),
        ("test_evaluator = dict(_delete_=True, type='NoSuchMetric')", 'NoSuchMetric'),
        ("test_dataloader = [dict(dataset=dict(type='CustomDataset'))]", 'ConcatDataset'),
        ('test_evaluator = None', 'no test set'),
    ],
)
def test_a_test_set_that_cannot_be_evaluated_ends_in_one_sentence(tried, more, words):
    status, _, err, results = tried(more)
    assert status == 1 and words in err[0] and results is None


def test_a_part_of_a_test_set(tried):
    status, _, _, results = tried('test_dataloader = dict(dataset=dict(indices=3))')
    right = 3 * results['quantized']['accuracy/top1'] / 100
    assert status == 0 and right == pytest.approx(round(right))


def test_sensitivity_takes_odd_metrics(tried, classifier, tmp_path):
    status, out, _, _ = tried(
        ODD_EVALUATORS, '--metric', '1', '--number', '1', command=sensitivity, checkpoint=classifier.checkpoint
    )
    assert status == 0 and 'single-label/precision_classwise (mean)' in out and 'absent -' in out
    report = json.loads((tmp_path / 'work' / 'sensitivity.json').read_text(), parse_constant=pytest.fail)
    assert report['metrics']['quantized']['absent'] is None


def test_compare_takes_odd_metrics(classifier, tmp_path, capfd):
    path = classifier.folder / 'odd.py'
    path.write_text(classifier.path.read_text() + ODD_EVALUATORS + '\n')
    assert (
        compare([str(path), '--calibration', 'gaussian', '--seeds', '0', '--work-dir', str(tmp_path / 'compare')]) == 0
    )
    rows = json.loads((tmp_path / 'compare' / 'compare.json').read_text(), parse_constant=pytest.fail)['rows']
    assert rows[0]['metrics']['absent'] is None and np.shape(rows[0]['other_metrics']['confusion_matrix/result']) == (
        3,
        3,
    )
    assert 'precision_classwise (mean)' in (tmp_path / 'compare' / 'compare.md').read_text()


def test_compare_where_the_evaluator_gives_nothing(classifier, tmp_path):
    path = classifier.folder / 'silent.py'
    path.write_text(classifier.path.read_text() + "test_evaluator = dict(_delete_=True, type='GivenMetric')\n")
    assert (
        compare([str(path), '--calibration', 'gaussian', '--seeds', '0', '--work-dir', str(tmp_path / 'compare')]) == 0
    )
    assert 'agreement' in (tmp_path / 'compare' / 'compare.md').read_text()


@pytest.mark.parametrize(
    'evaluator, status',
    [
        ("[dict(type='ConfusionMatrix'), dict(type='GivenMetric', gives=dict(absent=float('nan')))]", 0),
        ("dict(type='GivenMetric')", 0),
        ("dict(type='GivenMetric', fails='end')", 1),
    ],
)
def test_validation_of_a_run_loses_no_student(classifier, tmp_path, capfd, evaluator, status):
    path = classifier.folder / 'validated.py'
    loader = (
        "val_dataloader = dict(batch_size=8, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), "
        'dataset=dict('
        f"type='CustomDataset', data_root={str(classifier.folder / 'data')!r}, data_prefix='test', "
        "pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]))\n"
    )
    path.write_text(classifier.path.read_text() + loader + f'val_cfg = dict()\nval_evaluator = {evaluator}\n')
    assert dfq_train([str(path), '--val', '--work-dir', str(tmp_path / 'run')]) == status
    assert (tmp_path / 'run' / 'student.pth').exists()
    assert (status == 0) or 'the validation failed (ZeroDivisionError' in capfd.readouterr().err


def test_validation_without_a_validation_set(classifier, tmp_path, capfd):
    assert dfq_train([str(classifier.path), '--val', '--work-dir', str(tmp_path / 'run')]) == 1
    assert 'no validation set' in capfd.readouterr().err and not (tmp_path / 'run').exists()


# ---------------------------------------------------------------------- test-time augmentation, under the library's own
# tool
TTA = """
train_dataloader = None
tta_model = dict(type='AverageClsScoreTTA')
tta_pipeline = [dict(type='LoadImageFromFile'), dict(type='TestTimeAug', transforms=[
    [dict(type='RandomFlip', prob=0.), dict(type='RandomFlip', prob=1.)], [dict(type='PackInputs')]])]
"""


def test_a_config_with_test_time_augmentation_here_and_under_the_librarys_tool(
    tried, classifier, monkeypatch, tmp_path
):
    import mmpretrain

    status, _, _, results = tried(TTA)
    assert status == 0 and results['quantized']
    tool = Path(mmpretrain.__file__).parent / '.mim' / 'tools' / 'test.py'
    if not tool.is_file():
        pytest.skip('the library was installed without its tools')
    monkeypatch.setattr(
        sys,
        'argv',
        [
            'test.py',
            str(classifier.folder / 'tried.py'),
            str(classifier.student),
            '--tta',
            '--work-dir',
            str(tmp_path / 'tool'),
            '--out',
            str(tmp_path / 'tta.pkl'),
            '--out-item',
            'metrics',
        ],
    )
    runpy.run_path(str(tool), run_name='__main__')
    assert 'accuracy/top1' in pickle.loads((tmp_path / 'tta.pkl').read_bytes())


# ---------------------------------------------------------------------- detectors
COCO = """
_set = dict(data_root={data!r}, ann_file='test.json', data_prefix=dict(img=''))
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(96, 64), keep_ratio=True),
                 dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs')]
test_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(pipeline=test_pipeline, **_set))
test_evaluator = dict(ann_file={data!r} + '/test.json', metric='bbox')
"""


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    pytest.importorskip('mmdet')
    from mmdet.datasets import CocoDataset

    folder = tmp_path_factory.mktemp('detector')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8)).save(folder / '0.png')
    content = dict(
        images=[dict(id=0, file_name='0.png', height=64, width=96)],
        annotations=[dict(id=1, image_id=0, category_id=1, bbox=[4, 6, 40, 36], area=1440, iscrowd=0, segmentation=[])],
        categories=[dict(id=i, name=name) for i, name in enumerate(CocoDataset.METAINFO['classes'], 1)],
    )
    (folder / 'test.json').write_text(json.dumps(content))
    (folder / 'none.json').write_text(json.dumps(dict(content, images=[], annotations=[])))
    (folder / 'empty.json').write_text('')
    (folder / 'bare.json').write_text('{}')
    project = Project(folder, DETECTOR + COCO.replace('{data!r}', repr(str(folder))))
    project.path = project.config(**CALIBRATE)
    assert dfq_train([str(project.path), '--work-dir', str(folder / 'student')]) == 0
    return project


def test_nothing_detected_and_formatting_alone_are_said(detector, tmp_path, capfd):
    student = str(detector.folder / 'student' / 'student.pth')
    nothing, formatting = (
        ['model.test_cfg.rcnn.score_thr=1.1'],
        ['format_only=True', f'outfile_prefix={tmp_path}/found'],
    )
    for number, (options, arguments) in enumerate(
        [(nothing, []), (nothing, ['--full-precision']), ([f'test_evaluator.{option}' for option in formatting], [])]
    ):
        capfd.readouterr()
        work = tmp_path / str(number)
        assert (
            evaluate_command(
                [str(detector.path), student, *arguments, '--work-dir', str(work), '--cfg-options', *options]
            )
            == 0
        )
        out = capfd.readouterr().out
        assert (
            'W8A8: the evaluator gave no metrics' in out
            and json.loads((work / 'test_results.json').read_text())['quantized'] == {}
        )
    assert (tmp_path / 'found.bbox.json').is_file()


def test_a_class_that_is_not_in_the_annotations_is_null(detector, tmp_path, capfd):
    options = [
        'test_evaluator.classwise=True',
        'model.test_cfg.rcnn.score_thr=0.0',
        'model.test_cfg.rcnn.max_per_img=5',
    ]
    assert (
        evaluate_command(
            [
                str(detector.path),
                str(detector.folder / 'student' / 'student.pth'),
                '--work-dir',
                str(tmp_path),
                '--cfg-options',
                *options,
            ]
        )
        == 0
    )
    results = json.loads((tmp_path / 'test_results.json').read_text(), parse_constant=pytest.fail)['quantized']
    assert results['coco/zebra_precision'] is None and results['coco/bbox_mAP'] is not None


@pytest.mark.parametrize(
    'name, words', [('none', 'the test set is empty'), ('empty', 'cannot be built'), ('bare', 'cannot be built')]
)
def test_annotation_files_without_anything(detector, tmp_path, capfd, name, words):
    options = [
        f'test_dataloader.dataset.ann_file={name}.json',
        f'test_evaluator.ann_file={detector.folder}/{name}.json',
    ]
    assert (
        evaluate_command(
            [
                str(detector.path),
                str(detector.folder / 'student' / 'student.pth'),
                '--work-dir',
                str(tmp_path),
                '--cfg-options',
                *options,
            ]
        )
        == 1
    )
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert words in error and error.startswith('psaq-test: ')


# ---------------------------------------------------------------------- segmentors
def test_classes_that_no_picture_has_and_a_set_without_maps(tmp_path, capfd):
    pytest.importorskip('mmseg')
    for name in ('pictures', 'maps'):
        (tmp_path / name).mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8)).save(
        tmp_path / 'pictures' / '0.png'
    )
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(tmp_path / 'maps' / '0.png')
    steps = "[dict(type='LoadImageFromFile'){}, dict(type='PackSegInputs')]"
    data = (
        "_set = dict(_delete_=True, type='BaseSegDataset', metainfo=dict(classes=list('abcde')), img_suffix='.png', "
        'data_root={!r}, '
        "data_prefix=dict(img_path='pictures', seg_map_path='maps'), pipeline={})\n".format(
            str(tmp_path), steps.format(", dict(type='LoadAnnotations')")
        )
    )
    more = (
        'test_dataloader = dict(num_workers=0, persistent_workers=False, dataset=_set)\n'
        "test_evaluator = dict(_delete_=True, type='IoUMetric', iou_metrics=['mIoU', 'mDice', 'mFscore'])\n"
    )
    project = Project(tmp_path, SEGMENTOR + data + more)
    path = project.config(**CALIBRATE)
    arguments = [str(path), str(project.checkpoint), '--full-precision', '--work-dir', str(tmp_path / 'work')]
    assert evaluate_command(arguments) == 0
    results = json.loads((tmp_path / 'work' / 'test_results.json').read_text(), parse_constant=pytest.fail)[
        'full_precision'
    ]
    assert {'mIoU', 'mDice', 'mFscore'} <= set(results)
    capfd.readouterr()
    assert (
        evaluate_command([*arguments, '--cfg-options', 'test_dataloader.dataset.pipeline.1.type=LoadImageFromFile'])
        == 1
    )
    assert 'the evaluator IoUMetric cannot score' in capfd.readouterr().err
