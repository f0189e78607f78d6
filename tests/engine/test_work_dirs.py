"""Work dirs that are used twice, and runs that are resumed with another length or other settings."""

import itertools
import json
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.runner import Runner
from quick_builds import configs_as_they_are
from tiny_classifier import ClassifierProject

from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.commands.test import main as psaq_test
from psaq_mm.engine.checkpoint import read_checkpoint
from psaq_mm.engine.config import to_data_free
from psaq_mm.engine.hooks.data_free_quant_hook import checkpoints_in

pytestmark = pytest.mark.filterwarnings('ignore')

NUMBER = itertools.count()
QUICK = dict(size=(32, 32), generator=dict(batch_size=2, steps=1), sheet_interval=0)


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    pytest.importorskip('mmpretrain')
    with configs_as_they_are():
        yield ClassifierProject(tmp_path_factory.mktemp('work_dirs'), per_class=2)


@pytest.fixture
def run(project, tmp_path):
    """A run in a work dir whose name has blanks and umlauts; its exit status."""

    def run(iters, *arguments, quant='w8a8', folder='ein Ordner für Läufe', **dfq):
        # MMEngine tells runs of one second apart by the names of their configs alone.
        config = project.config(quant, name=f'run_{next(NUMBER)}.py', iters=iters, **{**QUICK, **dfq})
        run.work_dir = tmp_path / folder
        return dfq_train([str(config), '--work-dir', str(run.work_dir), *arguments])

    return run


def names(work_dir):
    return [path.name for path in checkpoints_in(work_dir)]


def rates(work_dir):
    return [
        float(v)
        for v in read_checkpoint(checkpoints_in(work_dir)[-1])['message_hub']['log_scalars']['train/lr'].data[0]
    ]


def last(work_dir):
    return (work_dir / 'last_checkpoint').read_text()


# ---------------------------------------------------------------------- the same work dir
@pytest.mark.parametrize('first, second', [(4, 2), (2, 4)])
def test_a_second_run_keeps_its_own_checkpoints_and_no_others(run, first, second, capsys):
    run(first)
    capsys.readouterr()
    assert run(second, seed=1, quant='w4a8') == 0
    own = [f'iter_{step}.pth' for step in range(0, second + 1, 2)][-2:]
    assert names(run.work_dir) == own and last(run.work_dir) == str(run.work_dir / own[-1])
    assert all(read_checkpoint(path)['psaq_mm']['identity']['seed'] == 1 for path in checkpoints_in(run.work_dir))
    earlier = [path.name for path in sorted((run.work_dir / 'earlier').glob('*/iter_*.pth'))]
    assert earlier == [f'iter_{step}.pth' for step in range(0, first + 1, 2)][-2:], 'nothing of the first run is lost'
    assert sum('checkpoints that are not of this run' in line for line in capsys.readouterr().out.splitlines()) == 1
    student = read_checkpoint(run.work_dir / 'student.pth')['meta']['psaq_mm']
    assert student['label'] == 'W4A8' and student['dfq']['seed'] == 1 and student['dfq']['steps'] == second
    assert run(second, '--resume', seed=1, quant='w4a8') == 0 and names(run.work_dir) == own
    # A run that writes no checkpoint leaves none to resume: the other's is not taken for its own.
    assert run(0, seed=2) == 0 and names(run.work_dir) == [] and not (run.work_dir / 'last_checkpoint').exists()
    assert run(second, '--resume', seed=2) == 0 and 'the run begins anew' in capsys.readouterr().out


def test_a_run_that_fails_at_once_leaves_the_earlier_ones_checkpoints_where_they_are(run, project):
    run(2)
    before = names(run.work_dir), last(run.work_dir)
    assert run(2, samples=str(project.folder / 'no samples.pt')) == 1
    assert (names(run.work_dir), last(run.work_dir)) == before and not (run.work_dir / 'earlier').exists()


@pytest.mark.parametrize(
    'other, match',
    [
        (dict(seed=1), 'seed=0, the config says 1'),
        (dict(quant='w4a8'), 'w_bits=8, the config says 4'),
        (dict(lr=1e-3), 'lr=0.0001, the config says 0.001'),
        (dict(vector_lr=1e-3), 'vector_lr=None, the config says 0.001'),
        (dict(size=(32, 64)), r'size=\[32, 32\], the config says \[32, 64\]'),
    ],
)
def test_another_runs_checkpoint_is_not_resumed(run, other, match, capsys):
    run(2)
    left = {path.name: path.read_bytes() for path in run.work_dir.glob('*.pth')}
    assert run(4, '--resume', **other) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('psaq-dfq-train: the checkpoint to resume from is of another run')
    assert re.search(match, error)
    assert {path.name: path.read_bytes() for path in run.work_dir.glob('*.pth')} == left


def test_a_full_precision_checkpoint_that_moved_is_the_same_and_another_is_not(run, project, tmp_path, capsys):
    run(2)
    moved, other = tmp_path / 'moved.pth', tmp_path / 'other.pth'
    moved.symlink_to(project.checkpoint)
    content = torch.load(project.checkpoint)
    content['state_dict']['head.fc.bias'] += 1
    torch.save(content, other)
    assert (
        run(4, '--resume', '--checkpoint', str(other)) == 1
        and 'has changed since the run began' in capsys.readouterr().err
    )
    assert run(4, '--resume', '--checkpoint', str(moved)) == 0


def test_a_work_dir_that_cannot_be_made(project, tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    config = str(project.config(name='file.py', iters=0, **QUICK))
    for work_dir in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        assert dfq_train([config, '--work-dir', str(work_dir)]) == 1
        assert f'{work_dir} cannot be made, as {tmp_path / "file"} is a file' in capsys.readouterr().err


# ---------------------------------------------------------------------- from end to end
WRAPPED = """
_base_ = ['{base}']
custom_hooks = [dict(type='EMAHook')]
train_dataloader = dict(dataset=dict(
    _delete_=True, type='RepeatDataset', times=2, dataset={{{{_base_.train_dataloader.dataset}}}}))
test_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', datasets=[
    {{{{_base_.test_dataloader.dataset}}}},
    dict(type='RepeatDataset', times=2, dataset={{{{_base_.test_dataloader.dataset}}}})]))
test_evaluator = [dict(type='Accuracy', topk=(1, )), dict(type='SingleLabelMetric', items=('precision', ))]
"""


def test_data_sets_inside_others_several_evaluators_and_an_old_checkpoint_under_a_prefix(project, tmp_path):
    content = torch.load(project.checkpoint)
    old = dict(
        state_dict={f'model.{k}': v for k, v in content['state_dict'].items()},
        meta=dict(CLASSES=('a', 'b', 'c'), PALETTE=None),
    )
    torch.save(old, tmp_path / 'old.pth')
    project.config(name='inner.py', iters=1, evolve_every=0, load_from=str(tmp_path / 'old.pth'), **QUICK)
    config = project.folder / 'wrapped.py'
    config.write_text(WRAPPED.format(base='inner.py'))
    work_dir = str(tmp_path / 'ein Ordner für Läufe')
    assert dfq_train([str(config), '--work-dir', work_dir]) == 0
    assert psaq_test([str(config), f'{work_dir}/student.pth', '--full-precision', '--work-dir', work_dir]) == 0
    results = json.loads((tmp_path / 'ein Ordner für Läufe' / 'test_results.json').read_text())
    for metrics in (results['full_precision'], results['quantized']):
        assert {'accuracy/top1', 'single-label/precision'} <= metrics.keys()
    student = torch.load(f'{work_dir}/student.pth', weights_only=True)['meta']
    assert student['dataset_meta'] == dict(classes=('a', 'b', 'c'))


# ---------------------------------------------------------------------- another length
def test_more_steps_follow_the_schedule_of_their_own_length(run, capsys):
    run(4, folder='straight')
    straight = rates(run.work_dir)
    run(2)
    assert run(4, '--resume') == 0
    assert rates(run.work_dir)[2:] == straight[2:] and rates(run.work_dir)[:2] != straight[:2]
    assert 'Detected call of' not in capsys.readouterr().err
    assert run(2, '--resume') == 1
    assert 'has 4 student steps, dfq.iters=2 asks for fewer' in capsys.readouterr().err


def test_fewer_steps_than_were_meant_follow_theirs(run, project):
    run(3, folder='straight')
    straight = rates(run.work_dir)
    run(6)
    for path in checkpoints_in(run.work_dir):
        if path.name != 'iter_4.pth':
            path.unlink()
    (run.work_dir / 'iter_4.pth').rename(run.work_dir / 'iter_2.pth')
    content = torch.load(run.work_dir / 'iter_2.pth', weights_only=False)
    content['meta']['iter'] = 2
    torch.save(content, run.work_dir / 'iter_2.pth')
    assert run(3, '--resume') == 0 and rates(run.work_dir)[-1] == straight[-1]


WARM_UP = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=3),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=3),
    dict(type='MultiStepLR', by_epoch=False, milestones=[1, 5]),
]


def test_a_schedule_of_the_users_own_under_the_librarys_runner(run, project, tmp_path):
    """As ``tools/train.py`` does: the config that a run leaves, ``train_cfg.max_iters`` set, ``resume``."""

    def train(iters, folder, resume=False):
        config = to_data_free(Config.fromfile(project.config(name=f'own_{next(NUMBER)}.py', iters=4, **QUICK)))
        config.param_scheduler, config.work_dir, config.resume = WARM_UP, str(tmp_path / folder), resume
        config.train_cfg.max_iters = iters
        config.launcher, config.default_scope = 'none', 'mmpretrain'
        Runner.from_cfg(config).train()
        return rates(tmp_path / folder)

    straight, first = train(8, 'straight'), train(4, 'resumed')
    resumed = train(8, 'resumed', resume=True)
    assert resumed[:4] == first[:4] and resumed[4:] == straight[4:] and straight[4] != straight[3]


def test_the_cosine_ends_with_the_loop_of_the_config_that_a_run_leaves(project, run):
    config = to_data_free(Config.fromfile(project.config(name='left.py', iters=4, **QUICK)))
    assert 'T_max' not in config.param_scheduler[0]


# ---------------------------------------------------------------------- inherited settings
@pytest.mark.parametrize(
    'hook', [dict(type='EMAHook'), dict(type='mmengine.EMAHook', momentum=0.1), dict(type=EMAHook)]
)
@pytest.mark.parametrize('place', ['default_hooks', 'custom_hooks'])
def test_an_ema_hook_is_dropped_wherever_it_stands(project, hook, place):
    config = Config.fromfile(project.config(name='ema.py', **QUICK))
    config[place] = [hook] if place == 'custom_hooks' else dict(ema=hook, checkpoint=dict(type='CheckpointHook'))
    found = to_data_free(config)
    assert found.train_cfg.dropped_hooks == ['EMAHook']
    assert not found.default_hooks.get('ema') and [h.type for h in found.custom_hooks] == ['psaq_mm.DataFreeQuantHook']


def test_a_log_processor_with_windows_of_an_epoch(project, tmp_path):
    config = Config.fromfile(project.config(name='windows.py', iters=2, **QUICK))
    config.log_processor = dict(
        type='LogProcessor',
        by_epoch=True,
        window_size='epoch',
        custom_cfg=[dict(data_src='loss', log_name='whole', method_name='mean', window_size='epoch')],
    )
    config.default_hooks, config.work_dir = dict(ema=dict(type='EMAHook')), str(tmp_path)
    runner = Runner.from_cfg(to_data_free(config))
    runner.train()
    assert runner.log_processor.custom_cfg[0]['window_size'] == 'global'
    assert 'whole' in next(tmp_path.glob('*/*.log')).read_text()
