"""Controls through the same quantizer: rows that are kept, a table of them, and what is refused at once."""

import json
import logging
import os
import statistics

import pytest
import torch

pytest.importorskip('mmpretrain')
from mmengine.config import Config  # noqa: E402
from tiny_classifier import ClassifierProject  # noqa: E402

from psaq_mm.commands import compare as module  # noqa: E402
from psaq_mm.commands import comparison  # noqa: E402
from psaq_mm.commands.compare import main  # noqa: E402
from psaq_mm.commands.comparison import Wanted, plan  # noqa: E402
from psaq_mm.engine.data_overlap import check_no_overlap, dataset_leaves  # noqa: E402
from psaq_mm.errors import ConfigError  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    project = ClassifierProject(tmp_path_factory.mktemp('classifier'))
    project.path = project.config(size=(32, 32), pool_size=4, evolve_every=0)
    return project


@pytest.fixture(scope='module')
def compared(project):
    """Two presets on noise, two seeds."""
    work_dir = project.folder / 'work'
    arguments = [str(project.path), '--samples', 'gaussian', '--quant', 'w8a8', 'w2a2', '--work-dir', str(work_dir)]
    assert main([*arguments, '--seeds', '0', '1']) == 0
    return arguments, work_dir, content(work_dir)


def content(work_dir):
    return json.loads((work_dir / 'compare.json').read_text())


def refused(capsys, arguments, *words):
    assert main([str(a) for a in arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith('psaq-compare: ')
    for word in words:
        assert word in error[0], error[0]


# ---------------------------------------------------------------------- rows and table
def test_a_row_for_each_preset_source_and_seed(compared, project):
    rows = compared[2]['rows']
    assert [(r['method'], r['quant'], r['source'], r['seed']) for r in rows] == [
        ('calibration', q, 'gaussian', seed) for q in ('w8a8', 'w2a2') for seed in (0, 1)
    ]
    for row in rows:
        assert row['config'] == str(project.path) and row['iters'] == 0 and row['samples'] == 2 and row['seconds'] > 0
        full, quantized = row['full_precision']['accuracy/top1'], row['metrics']['accuracy/top1']
        # in points of top-1, as the evaluator has it
        assert row['difference'] == pytest.approx(quantized - full, abs=1e-3)
    assert len({r['key'] for r in rows}) == 4
    assert len({json.dumps(r['full_precision']) for r in rows}) == 1


def test_agreement_falls_with_the_bits(compared):
    by_quant = {q: [r['agreement'] for r in compared[2]['rows'] if r['quant'] == q] for q in ('w8a8', 'w2a2')}
    assert min(by_quant['w8a8']) > 0.8 > max(by_quant['w2a2'])


def test_the_table_sums_up_the_rows(compared):
    _, work_dir, found = compared
    assert [(e['quant'], e['source'], e['seeds']) for e in found['table']] == [
        ('w8a8', 'gaussian', [0, 1]),
        ('w2a2', 'gaussian', [0, 1]),
    ]
    for entry in found['table']:
        own = [r for r in found['rows'] if (r['quant'], r['source']) == (entry['quant'], entry['source'])]
        for key, values in dict(agreement=[r['agreement'] for r in own], seconds=[r['seconds'] for r in own]).items():
            assert entry[key] == dict(mean=pytest.approx(statistics.mean(values)), min=min(values), max=max(values))
        tops = [r['metrics']['accuracy/top1'] for r in own]
        assert entry['metrics']['accuracy/top1'] == dict(
            mean=pytest.approx(statistics.mean(tops)), min=min(tops), max=max(tops)
        )
    lines = (work_dir / 'compare.md').read_text().splitlines()
    cells = [[c.strip() for c in line.strip('|').split('|')] for line in lines if line.startswith('|')]
    assert cells[0] == [
        'method',
        'quant',
        'source',
        'seeds',
        'accuracy/top1',
        'agreement',
        'difference',
        'divergence',
        'samples',
        'steps',
        'seconds',
    ]
    assert (
        cells[2][0] == 'full precision' and cells[2][4] == f'{found["rows"][0]["full_precision"]["accuracy/top1"]:.2f}'
    )
    assert [c[:4] for c in cells[3:]] == [['calibration', e['quant'], e['source'], '2'] for e in found['table']]
    assert all(cells[3 + i][5].startswith(f'{e["agreement"]["mean"]:.3f}') for i, e in enumerate(found['table']))


def test_nothing_but_rows_table_and_full_precision_stays(compared):
    work_dir = compared[1]
    assert sorted(p.suffix for p in work_dir.rglob('*') if p.is_file()) == ['', '.json', '.md', '.npz']


# ---------------------------------------------------------------------- going on
def test_a_second_call_runs_nothing_and_another_seed_runs_its_rows_alone(compared, capsys):
    arguments, work_dir, before = compared
    assert main([*arguments, '--seeds', '0', '1']) == 0
    out = capsys.readouterr().out
    assert '4 rows, 4 of them are there already' in out and '[1/' not in out
    assert '| w2a2 | gaussian | 2 |' in ' '.join(out.split())
    assert content(work_dir) == before

    assert main([*[a for a in arguments if a != 'w2a2'], '--seeds', '0', '1', '2']) == 0
    out = capsys.readouterr().out
    assert '3 rows, 2 of them are there already' in out and '[1/1]' in out and 'full precision:' not in out
    after = content(work_dir)
    assert after['rows'][:4] == before['rows'] and after['rows'][4]['seed'] == 2 and len(after['rows']) == 5
    assert [e['seeds'] for e in after['table']] == [[0, 1, 2]]


def test_a_stopped_comparison_goes_on_where_it_was(project, tmp_path, monkeypatch, capsys):
    arguments = [str(project.path), '--samples', 'gaussian', 'real', '--seeds', '0', '--work-dir', str(tmp_path)]
    run, names = comparison._run, []

    def stop_at_the_second(one, *rest):
        names.append(one.source)
        if len(names) == 2:
            raise KeyboardInterrupt
        return run(one, *rest)

    monkeypatch.setattr(comparison, '_run', stop_at_the_second)
    assert main(arguments) == 130
    assert 'goes on where it was' in capsys.readouterr().err
    kept = content(tmp_path)['rows']
    assert [r['source'] for r in kept] == ['gaussian']
    assert main(arguments) == 0
    assert names == ['gaussian', 'real', 'real']
    after = content(tmp_path)['rows']
    assert after[0] == kept[0] and after[1]['agreement'] > 0.8


def test_what_a_row_rests_on_is_in_its_key(project, tmp_path):

    def key(path=project.path, source='gaussian', quant=None, seed=0, train=False, **changes):
        config = Config.fromfile(path)
        config.merge_from_dict(changes)
        return plan({'c': config}, Wanted((source,), (seed,), (quant,), train=train))[0].key

    base = key()
    assert key() == base and key(work_dir='/elsewhere', **{'dfq.log_interval': 7}) == base
    others = [
        key(source='pink'),
        key(seed=1),
        key(quant='w4a8'),
        key(train=True),
        key(**{'dfq.calibration_samples': 3}),
        key(**{'test_dataloader.dataset.data_prefix': 'train'}),
        key(**{'model.head.topk': (1, 2)}),
    ]
    copy = project.folder / 'moved.pth'
    copy.write_bytes(project.checkpoint.read_bytes())
    assert key(load_from=str(copy)) == base  # the same weights under another name
    weights = torch.load(copy)
    weights['state_dict']['head.fc.bias'][0] += 1
    torch.save(weights, copy)
    others.append(key(load_from=str(copy)))
    assert len({base, *others}) == 1 + len(others)


def test_saved_samples_are_used_in_place_of_generated_ones(project, tmp_path):
    from psaq_mm.commands.dfq_train import main as dfq_train

    assert (
        dfq_train(
            [
                str(project.path),
                '--work-dir',
                str(tmp_path / 'made'),
                '--cfg-options',
                'dfq.save_samples=True',
                'dfq.iters=0',
            ]
        )
        == 0
    )
    samples = tmp_path / 'made' / 'samples.pt'
    arguments = [
        str(project.path),
        '--calibration',
        'generated',
        'gaussian',
        '--seeds',
        '0',
        '--work-dir',
        str(tmp_path / 'w'),
    ]
    assert main([*arguments, '--keep-students', '--samples', str(samples)]) == 0
    generated, gaussian = content(tmp_path / 'w')['rows']
    assert generated['samples'] == gaussian['samples'] == 2
    used = {
        p.parent.name.split('_')[3]: torch.load(p, weights_only=False)
        for p in (tmp_path / 'w').glob('runs/*/student.pth')
    }
    assert used['generated']['meta']['psaq_mm']['dfq']['samples'] == str(samples)
    assert used['gaussian']['meta']['psaq_mm']['dfq']['samples'] == 'gaussian'
    made = torch.load(tmp_path / 'made' / 'student.pth', weights_only=False)['state_dict']
    assert all(torch.equal(made[k], v) for k, v in used['generated']['state_dict'].items())

    def key(path):
        return plan({'c': Config.fromfile(project.path)}, Wanted(('generated',), (0,), saved=str(path)))[0].key

    samples.rename(tmp_path / 'moved.pt')
    assert key(tmp_path / 'moved.pt') == generated['key']
    saved = torch.load(tmp_path / 'moved.pt')
    saved['samples'][0] += 1
    torch.save(saved, tmp_path / 'other.pt')
    assert key(tmp_path / 'other.pt') != generated['key']


# ---------------------------------------------------------------------- training, errors
def test_training_runs_the_configs_own_steps(project, tmp_path):
    assert (
        main(
            [
                str(project.path),
                '--samples',
                'pink',
                '--seeds',
                '0',
                '--train',
                '--keep-students',
                '--work-dir',
                str(tmp_path),
                '--cfg-options',
                'dfq.iters=2',
            ]
        )
        == 0
    )
    (row,) = content(tmp_path)['rows']
    assert row['iters'] == 2
    student = torch.load(next(tmp_path.glob('runs/*/student.pth')), weights_only=False)
    assert (
        student['meta']['psaq_mm']['dfq']['samples'] == 'pink' and student['meta']['psaq_mm']['dfq']['max_iters'] == 2
    )
    plain = torch.load(project.checkpoint)['state_dict']
    assert any(not torch.equal(plain[k], student['state_dict'][k]) for k in plain)


def test_a_row_that_fails_is_kept_with_its_reason_and_the_rest_goes_on(project, tmp_path, capsys):
    arguments = [str(project.path), '--samples', 'real', 'gaussian', '--seeds', '0', '--work-dir', str(tmp_path)]
    assert main([*arguments, '--cfg-options', f'train_dataloader.dataset.data_root={tmp_path}/nowhere']) == 1
    captured = capsys.readouterr()
    assert '1 of 2 rows failed' in captured.err and 'real seed 0 first' in captured.err
    real, gaussian = content(tmp_path)['rows']
    assert 'nowhere' in real['error'] and 'metrics' not in real
    assert gaussian['metrics'] and 'error' not in gaussian
    assert '| w8a8 | real | 0 (1 failed) | - |' in ' '.join(captured.out.split())

    # A failed row is tried again; the others stay as they are.
    assert main([*arguments, '--cfg-options', f'train_dataloader.dataset.data_root={tmp_path}/nowhere']) == 1
    assert '2 rows, 1 of them are there already' in capsys.readouterr().out


def test_diverged_training_is_named(project, tmp_path):
    assert (
        main(
            [
                str(project.path),
                '--samples',
                'gaussian',
                '--seeds',
                '0',
                '--train',
                '--work-dir',
                str(tmp_path),
                '--cfg-options',
                'dfq.lr=1e30',
                'dfq.iters=4',
                'dfq.clip_grad=None',
            ]
        )
        == 1
    )
    (row,) = content(tmp_path)['rows']
    assert row['error']


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--samples', 'gausian'], ['gausian', 'did you mean gaussian?']),
        (['--samples', 'imagenet'], ['imagenet', 'generated', 'real']),
        (['--quant', 'w9a8'], ['w_bits=9']),
        (['--calibration', 'gaussian', '--samples', 'saved.pt'], ['saved.pt', 'generated']),
        (['--samples', 'saved.pt'], ['saved.pt', 'no such folder']),
        (['--calibration', 'generated', '--samples', 'saved.pt'], ['saved.pt', 'does not exist']),
        (['--calibration', 'generated', '--samples', 'pink', 'real'], ['earlier name']),
        (['--cfg-options', 'load_from=none.pth'], ['none.pth', 'does not exist']),
        (['--cfg-options', 'test_dataloader.dataset.data_prefix=gone'], ['gone', 'does not exist']),
        (['--samples', 'real', '--cfg-options', 'train_dataloader=None'], ['real', 'train_dataloader']),
        (
            ['--samples', 'real', '--cfg-options', 'train_dataloader.dataset.data_prefix=test'],
            ['test_dataloader', 'data/test'],
        ),
    ],
)
def test_mistakes_are_named_before_anything_runs(project, tmp_path, capsys, arguments, words):
    refused(capsys, [project.path, *arguments, '--work-dir', tmp_path / 'w'], *words)
    assert not (tmp_path / 'w').exists()


def test_a_file_of_other_rows_is_not_overwritten(project, tmp_path, capsys):
    (tmp_path / 'compare.json').write_text('[1, 2]')
    refused(capsys, [project.path, '--samples', 'gaussian', '--work-dir', tmp_path], 'compare.json', 'move it away')
    assert (tmp_path / 'compare.json').read_text() == '[1, 2]'


def test_two_processes_do_not_share_a_work_dir(compared, capsys):
    from psaq_mm.commands.compare_rows import alone_in

    arguments, work_dir, before = compared
    with alone_in(work_dir):
        refused(capsys, [*arguments, '--seeds', '7'], 'another comparison is at work', str(work_dir))
    assert content(work_dir)['rows'][:4] == before['rows'], 'nothing was lost'
    assert main([*arguments, '--seeds', '0']) == 0, 'the lock goes with its holder'


# ---------------------------------------------------------------------- methods
def test_methods_bring_their_quantizer_and_train_or_not(project):
    runs = plan(
        {str(project.path): module.load_config(str(project.path))},
        Wanted(('gaussian',), (0,), ('w4a4',), ('repq', 'repq_v2')),
    )
    assert [(run.method, run.quant, run.iters > 0) for run in runs] == [
        ('repq', 'repq_w4a4', False),
        ('repq_v2', 'repq_w4a4', True),
    ]
    assert len({run.key for run in runs}) == 2 and len({run.full_precision_key for run in runs}) == 1


# ---------------------------------------------------------------------- training set and test set
def loaders(train, test, **kwargs):
    return dict(train_dataloader=dict(dataset=train), test_dataloader=dict(dataset=test), **kwargs)


COCO = dict(type='CocoDataset', data_root='data/coco', ann_file='train.json', data_prefix=dict(img='train/'))


@pytest.mark.parametrize(
    'train, test',
    [
        (COCO, dict(COCO, ann_file='val.json', data_prefix=dict(img='val/'))),
        (COCO, dict(COCO, ann_file='minival.json')),  # two lists over one folder
        (dict(data_root='d', data_prefix='train'), dict(data_root='d', data_prefix=dict(img_path='test'))),
        (dict(data_root='d', data_prefix='train'), dict(data_root='d', data_prefix='train_2')),
        (dict(data_root='d', split='train'), dict(data_root='d', split='val')),
        (dict(type='A'), dict(type='B')),
    ],
)
def test_sets_that_differ_are_let_through(train, test):
    check_no_overlap(loaders(train, test))


@pytest.mark.parametrize(
    'train, test',
    [
        (COCO, dict(COCO, test_mode=True)),
        (
            dict(
                type='RepeatDataset', dataset=dict(type='ConcatDataset', datasets=[dict(COCO, ann_file='a.json'), COCO])
            ),
            COCO,
        ),
        (
            COCO,
            dict(COCO, data_root='', ann_file='data/coco/train.json', data_prefix=dict(img='./data/coco/x/../train')),
        ),
        (dict(data_root='d', data_prefix='all'), dict(data_root='d', data_prefix=dict(img_path='all/test'))),
        (dict(data_root='d', data_prefix='all', ann_file='train.txt'), dict(data_root='d', data_prefix='all')),
        (dict(data_root='d', split='val'), dict(data_root='d', split='val')),
    ],
)
def test_sets_that_are_the_same_files_are_refused(train, test):
    for key in ('test_dataloader', 'val_dataloader'):
        with pytest.raises(ConfigError, match=f'train_dataloader and {key} both read'):
            check_no_overlap(dict(train_dataloader=dict(dataset=train), **{key: dict(dataset=test)}))


def test_a_link_to_the_test_pictures_is_seen_through(tmp_path):
    (tmp_path / 'test').mkdir()
    os.symlink(tmp_path / 'test', tmp_path / 'train')
    train, test = (dict(data_root=str(tmp_path), data_prefix=name) for name in ('train', 'test'))
    with pytest.raises(ConfigError, match='both read'):
        check_no_overlap(loaders(train, test))


def test_leaves_of_nested_wrappers():
    concatenated = dict(type='Concat', datasets=[dict(type='A'), dict(type='Balanced', dataset=dict(type='B'))])
    nested = dict(type='Repeat', dataset=concatenated)
    assert [leaf['type'] for leaf in dataset_leaves(nested)] == ['A', 'B']
    assert list(dataset_leaves(None)) == []


# ---------------------------------------------------------------------- silence
def test_a_silent_run_says_how_far_it_is_and_leaves_no_open_log(project, tmp_path, capsys):
    from psaq_mm.commands.quiet import ProgressHook, isolated, silence
    from psaq_mm.engine.config import to_data_free
    from psaq_mm.engine.running import data_free_runner

    said = []
    config = Config.fromfile(project.path)
    config.dfq.update(iters=1)
    with silence():
        runner = data_free_runner(to_data_free(isolated(config, str(tmp_path))))
        runner.register_hook(ProgressHook(said.append, interval=0))
        runner.train()
    assert capsys.readouterr().out == ''
    assert any('Samples [' in line and 'eta' in line for line in said) and any('Iter(train)' in line for line in said)
    (log,) = tmp_path.glob('*/*.log')
    assert 'Samples [' in log.read_text()
    assert not [h for h in runner.logger.handlers if isinstance(h, logging.FileHandler)]
