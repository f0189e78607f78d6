"""Every source for calibration and for training, at equal steps and equal seconds; curves, and the list of rows."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip('mmpretrain')
from tiny_classifier import ClassifierProject  # noqa: E402

from psaq_mm.commands.common import load_config  # noqa: E402
from psaq_mm.commands.compare import main  # noqa: E402
from psaq_mm.commands.comparison import Wanted, _settings_that_count, plan  # noqa: E402
from psaq_mm.commands.curves import draw_curves, fixed_subset  # noqa: E402
from psaq_mm.commands.sample_rows import FIELDS, bits_of, merge_rows, read_rows, rows_of  # noqa: E402
from psaq_mm.engine.checkpoint import read_checkpoint  # noqa: E402
from psaq_mm.errors import ConfigError  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    project = ClassifierProject(tmp_path_factory.mktemp('sources'))
    project.path = project.config(size=(32, 32), pool_size=4, evolve_every=2, iters=4)
    return project


@pytest.fixture(scope='module')
def trained(project):
    """Every source, trained, with curves and rows."""
    work_dir, rows = project.folder / 'work', project.folder / 'results' / 'samples.json'
    arguments = [
        str(project.path),
        '--samples',
        'gaussian',
        'pink',
        'dead_leaves',
        'mixture',
        'generated',
        'real',
        str(project.folder / 'data' / 'train' / 'a'),
        '--quant',
        'w3a8',
        '--train',
        '--seeds',
        '0',
        '--curve',
        '2',
        '--curve-images',
        '9',
        '--rows',
        str(rows),
        '--work-dir',
        str(work_dir),
        '--keep-students',
    ]
    assert main(arguments) == 0
    return arguments, work_dir, rows


def content(work_dir):
    return json.loads((work_dir / 'compare.json').read_text())


def plans(project, *sources, **options):
    return plan({str(project.path): load_config(str(project.path))}, Wanted(sources, (0,), **options))


def test_every_source_trains(trained, project):
    rows = content(trained[1])['rows']
    assert [row['source'] for row in rows][:6] == ['gaussian', 'pink', 'dead_leaves', 'mixture', 'generated', 'real']
    assert all(row['iters'] == 4 and 0 <= row['agreement'] <= 1 for row in rows)
    students = [read_checkpoint(path)['state_dict'] for path in sorted(trained[1].glob('runs/*/student.pth'))]
    weights = {
        torch.cat([v.flatten() for k, v in state.items() if k.endswith('.weight')]).numpy().tobytes()
        for state in students
    }
    assert len(rows) == len(students) == len(weights) == 7, 'each has learned from samples of its own'


def test_the_list_of_rows_has_its_keys_and_nothing_else(trained):
    found = json.loads(trained[2].read_text())
    assert all(tuple(row) == FIELDS for row in found)
    divergences = [row['value'] for row in found if row['metric'] == 'divergence']
    assert (
        divergences == [round(long['divergence'], 5) for long in content(trained[1])['rows']] and min(divergences) > 0
    )
    rows = [row for row in found if row['metric'] != 'divergence']
    assert [row['source'] for row in rows] == ['gaussian', 'pink', 'dead_leaves', 'mixture', 'generated', 'real', 'a']
    for row, long in zip(rows, content(trained[1])['rows']):
        assert (row['model'], row['bits'], row['seed'], row['steps'], row['metric']) == (
            'quantized',
            'W3A8',
            0,
            4,
            'accuracy/top1',
        )
        assert row['value'] == long['metrics']['accuracy/top1'] and row['agreement'] == long['agreement']
        assert row['seconds'] == long['seconds'] > 0


def test_curves_begin_with_calibration_and_end_with_the_student(trained):
    for row in content(trained[1])['rows']:
        assert [point['step'] for point in row['curve']] == [0, 2, 4]
        seconds = [point['seconds'] for point in row['curve']]
        assert seconds == sorted(seconds) and 0 < seconds[0] and seconds[-1] <= row['seconds'] + 0.01
        assert all(round(point['agreement'] * 9, 9) % 1 == 0 for point in row['curve']), (
            'nine pictures, each right or wrong'
        )
    picture = np.asarray(Image.open(next(trained[1].glob('curves_*.png'))))
    assert picture.ndim == 3 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 8


def test_rows_that_are_there_join_another_list_without_a_run(trained, project, capsys):
    arguments, work_dir, rows = trained
    other = project.folder / 'other.json'
    assert main([str(other) if a == str(rows) else a for a in arguments]) == 0
    assert '7 rows, 7 of them are there already' in capsys.readouterr().out
    assert json.loads(other.read_text()) == json.loads(rows.read_text())


def test_a_row_without_a_curve_is_run_again_for_one(project, tmp_path, capsys):
    arguments = [str(project.path), '--samples', 'pink', '--train', '--seeds', '0', '--work-dir', str(tmp_path)]
    assert main(arguments) == 0
    (plain,) = content(tmp_path)['rows']
    assert main([*arguments, '--curve', '1']) == 0
    (row,) = content(tmp_path)['rows']
    assert '[1/1]' in capsys.readouterr().out and len(row['curve']) == 2 and 'curve' not in plain
    assert row['metrics'] == plain['metrics'] and row['agreement'] == plain['agreement'], 'looking on changes nothing'
    assert row['curve'][-1]['agreement'] == row['agreement'], 'all 24 pictures'


def test_equal_seconds(project, tmp_path):
    arguments = [
        str(project.path),
        '--samples',
        'mixture',
        '--train',
        '--seeds',
        '0',
        '--work-dir',
        str(tmp_path),
        '--seconds',
        '2',
        '--rows',
        str(tmp_path / 'rows.json'),
        '--cfg-options',
        'dfq.fresh=1.0',
        'dfq.evolve_every=0',
    ]
    assert main(arguments) == 0
    row, divergence = json.loads((tmp_path / 'rows.json').read_text())
    assert divergence['metric'] == 'divergence' and divergence['steps'] == row['steps']
    assert (
        row['source'] == 'mixture, 100% fresh, 2 s'
        and 0 < row['steps'] < 10**6
        and row['steps'] == content(tmp_path)['rows'][0]['iters']
    )
    student = content(tmp_path)['rows'][0]
    assert student['samples'] == 2 + 2 * row['steps']


# ---------------------------------------------------------------------- plan
def test_what_a_run_with_a_folder_rests_on(project, tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / 'a.png')
    (first,) = plans(project, str(tmp_path))
    assert (
        first.config.dfq['samples'] == dict(type='psaq_mm.Folder', path=str(tmp_path)) and first.label == tmp_path.name
    )
    Image.fromarray(np.ones((8, 8, 3), np.uint8)).save(tmp_path / 'a.png')
    assert plans(project, str(tmp_path))[0].key != first.key


def test_what_counts_in_the_key_of_a_row(project):
    (base,) = plans(project, 'pink', train=True)
    assert plans(project, 'pink', train=True, options={'dfq.fresh': True})[0].key != base.key
    assert plans(project, 'pink', train=True, seconds=3.0)[0].key != base.key
    assert plans(project, 'pink', train=True, label='other')[0].key == base.key
    assert plans(project, 'pink', train=True, options={'dfq.fresh': False, 'dfq.range_lr': 0.0})[0].key == base.key


def test_keys_are_spelled_as_in_earlier_releases():
    """Rows that are there are found again: a named source had a key of its own, and fresh was a share."""
    usual = dict(type='T', iters=1, log_interval=3, fresh=False, rotate=False, evolve_every=50)
    counts = dict(type='T', iters=1, evolve_every=50)
    assert _settings_that_count(dict(usual, samples='pink')) == dict(counts, iters=1, source='pink', samples=None)
    for samples in ('generated', 'saved.pt', [dict(type='psaq_mm.PinkNoise')]):
        assert _settings_that_count(dict(usual, samples=samples, fresh=True)) == dict(
            counts, source='generated', samples=None, fresh=1.0
        )


def test_labels_say_what_steps_and_seconds_do_not(project):
    def label(*args, **kwargs):
        return plans(project, *args, **kwargs)[0].label

    assert label('generated') == 'generated' and label('generated', methods=('best',)) == 'best'
    assert label('generated', train=True, label='best less entropy') == 'best less entropy'
    assert label('pink', train=True, options={'dfq.fresh': True}) == 'pink, 100% fresh'
    assert label('pink', train=True, seconds=30.0) == 'pink, 30 s'
    assert label('generated', methods=('fast',)) == 'fast'
    assert (
        label('pink', methods=('psaq_v2',)) == 'pink'
        and label('pink', methods=('psaq_v2',), options={'dfq.fresh': 1.0}) == 'pink, 100% fresh'
    )


def test_a_control_has_nothing_of_other_sources(project):
    pictures = [dict(type='psaq_mm.DeadLeaves')]
    control, best = (
        plans(project, source, methods=('best',), options={'dfq.samples': pictures})[0].config.dfq
        for source in ('pink', 'generated')
    )
    assert control['samples'] == 'pink' and best['samples'] == pictures


def test_a_time_bounds_what_trains_and_leaves_the_rest(project):
    runs = plans(project, 'real', methods=('repq', 'psaq_v2'), quants=('w4a8',), seconds=9.0)
    assert [(run.by_time, run.iters) for run in runs] == [(False, 0), (True, 10**6)]
    assert runs[1].config.dfq['max_seconds'] == 9


def test_fast_runs_on_its_own_pictures_and_on_controls(project):
    own, pink = plans(project, 'generated', 'pink', methods=('fast',), quants=('w8a8',))
    from psaq_mm.engine.config import to_data_free

    assert to_data_free(own.config).train_cfg.samples['type'] == 'psaq_mm.DeadLeaves'
    free = to_data_free(pink.config).train_cfg
    assert free.samples == 'pink' and free.max_iters == to_data_free(own.config).train_cfg.max_iters


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--samples', 'dead_leafs'], ['dead_leafs', 'did you mean dead_leaves?', 'folder']),
        (['--samples', 'pink', '--seconds', '5'], ['--seconds 5', '--train']),
        (['--samples', 'pink', '--train', '--seconds', '0'], ['--seconds 0']),
        (['--samples', 'pink', '--curve', '-1'], ['--curve -1']),
        (['--samples', '{data}/test'], ['data/test', 'test_dataloader']),
        (['--samples', 'pink', '--rows', '{data}/bad.json'], ['bad.json', 'move it away']),
    ],
)
def test_mistakes_are_named(project, tmp_path, capsys, arguments, words):
    data = project.folder / 'data'
    (data / 'bad.json').write_text('[{"model": 1}]')
    given = [a.format(data=data) for a in arguments]
    assert main([str(project.path), *given, '--work-dir', str(tmp_path)]) == 1
    error = capsys.readouterr().err.strip()
    assert error.count('\n') == 0
    for word in words:
        assert word in error, error


# ---------------------------------------------------------------------- rows and curves by hand
ROW = dict(
    seed=1,
    iters=300,
    seconds=9.0,
    agreement=0.5,
    metrics={'coco/bbox_mAP': 0.4, 'coco/bbox_mAP_50': 0.6, 'coco/segm_mAP': 0.3},
)


def test_a_row_a_metric_and_none_of_a_failure():
    rows = rows_of('m', 'W4A8', 'pink', ROW)
    assert [(row['metric'], row['value']) for row in rows] == [('coco/bbox_mAP', 0.4), ('coco/segm_mAP', 0.3)]
    rows = rows_of('m', 'W4A8', 'pink', dict(ROW, divergence=0.0712345))
    assert [(row['metric'], row['value']) for row in rows][2:] == [('divergence', 0.07123)]
    assert rows_of('m', 'W4A8', 'pink', dict(ROW, error='gone')) == []


def test_a_row_takes_the_place_of_the_same_one(tmp_path):
    path = tmp_path / 'deep' / 'rows.json'
    merge_rows(path, rows_of('m', 'W4A8', 'pink', ROW) + rows_of('m', 'W4A8', 'real', ROW))
    merge_rows(
        path,
        rows_of('m', 'W4A8', 'pink', dict(ROW, agreement=0.7)) + rows_of('m', 'W4A8', 'pink', dict(ROW, iters=100)),
    )
    found = [
        (row['source'], row['steps'], row['agreement']) for row in read_rows(path) if row['metric'] == 'coco/bbox_mAP'
    ]
    assert found == [('real', 300, 0.5), ('pink', 300, 0.7), ('pink', 100, 0.5)]
    merge_rows(path, rows_of('m', 'W4A8', 'pink, 9 s', dict(ROW, iters=41)), by_time=True)
    merge_rows(path, rows_of('m', 'W4A8', 'pink, 9 s', dict(ROW, iters=44)), by_time=True)
    assert [row['steps'] for row in read_rows(path) if row['source'] == 'pink, 9 s'] == [44, 44]


def test_bits_name_the_recipe_where_it_is_another():
    assert bits_of('w4a8', 'W4A8') == bits_of('psaq_v2_w4a8 (full)', 'W4A8') == 'W4A8'
    assert bits_of('repq_w4a4 (full)', 'W4A4') == 'W4A4 repq'


def test_places_of_the_pictures_are_spread_and_fixed():
    assert fixed_subset(5, 9) == [0, 1, 2, 3, 4] and fixed_subset(101, 3) == [0, 50, 100] and fixed_subset(7, 1) == [0]


def test_rows_without_agreement_draw_nothing(tmp_path):
    none = dict(curve=[dict(step=0, seconds=1.0, agreement=None)])
    assert draw_curves([('m W4A8', 'pink', none), ('m W4A8', 'real', {})], tmp_path) == []
    some = dict(
        curve=[
            dict(step=0, seconds=1.0, agreement=0.5),
            dict(step=9, seconds=2.0, agreement=None),
            dict(step=9, seconds=2.0, agreement=0.6),
        ]
    )
    assert [path.name for path in draw_curves([('m W4A8', 'pink', some), ('n (x)', 'real', some)], tmp_path)] == [
        'curves_m_W4A8.png',
        'curves_n_x.png',
    ]


def test_a_source_that_is_no_folder_of_ours(project):
    with pytest.raises(ConfigError, match='no source of samples'):
        plans(project, '/nowhere/at/all')


def test_the_logits_finding_changes_the_logits_alone(project):
    from benchmarks.logits_finding import KINDS, table, with_logits
    from psaq_mm.quantization import QuantSpec

    quantized, plain = (
        QuantSpec.parse(with_logits(load_config(str(project.path)), 'w8a8', kind).model.quant) for kind in KINDS
    )
    assert quantized.points == plain.points == 'all' and quantized.scope == 'full'
    assert plain.resolve('head.fc') == quantized.resolve('head.fc') and plain.resolve('model.head') is not None
    assert quantized.resolve('model.head.output') is not None and plain.resolve('model.head.output') is None
    entry = dict(
        config='m, logits float',
        source='real',
        seeds=[0],
        full_precision={'accuracy/top1': 80.0},
        agreement=dict(mean=0.97),
        metrics={'accuracy/top1': dict(mean=79.0)},
        difference=dict(mean=-1.0),
        difference_se=dict(mean=0.5),
    )
    shown = table([entry, dict(config='m, logits float', source='pink')])
    lines = [' '.join(line.split()) for line in shown.splitlines()]
    assert lines[2] == '| full precision | - | - | 80.00 | - | 1 |' and lines[4].startswith('| float | pink | failed')
    assert lines[3] == '| float | real | 1 | 79.00 | -1.00 ± 0.50 | 0.970 |'
