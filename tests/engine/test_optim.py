"""A learning rate for each kind of what the student learns, through the run of the command line."""

import pytest
import torch
from tiny_classifier import ClassifierProject

from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.engine.checkpoint import read_checkpoint
from psaq_mm.engine.optim import StudentOptimWrapperConstructor, parameter_groups
from psaq_mm.errors import ConfigError
from psaq_mm.quantization import QuantSpec, learned_ranges, quantize_

pytestmark = pytest.mark.filterwarnings('ignore')


def model():
    from torch import nn

    found = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    quantize_(found, QuantSpec.parse('w4a8'))
    return found


def test_each_kind_has_its_rate():
    found = model()
    groups = parameter_groups(found, 1e-4, 1e-3, 1e-2)
    assert [(g['lr'], len(g['params'])) for g in groups] == [(1e-4, 2), (1e-3, 4), (1e-2, 2)]
    assert all(p.dim() == 2 for p in groups[0]['params']) and all(p.dim() == 1 for p in groups[1]['params'])
    assert [id(p) for p in groups[2]['params']] == [id(p) for p in learned_ranges(found)]


def test_one_rate_serves_weights_and_vectors_by_default():
    groups = parameter_groups(model(), 1e-4)
    assert [(g['lr'], len(g['params'])) for g in groups] == [(1e-4, 2), (1e-4, 4)]


def test_a_rate_of_zero_freezes():
    found = model()
    groups = parameter_groups(found, 0.0, 1e-3)
    assert len(groups) == 1 and [p.requires_grad for p in found.parameters()] == [
        p.dim() == 1 for p in found.parameters()
    ]
    assert learned_ranges(found) == []


@pytest.mark.parametrize(
    'rates, message',
    [
        (dict(lr=-1.0), 'dfq.lr=-1.0'),
        (dict(lr=0.0, vector_lr=float('nan')), 'dfq.vector_lr=nan'),
        (dict(lr=0.0, range_lr=float('inf')), 'dfq.range_lr=inf'),
    ],
)
def test_a_rate_out_of_range_is_named(rates, message):
    with pytest.raises(ConfigError, match=message):
        parameter_groups(model(), **rates)


def test_nothing_left_to_learn_is_named():
    with pytest.raises(ConfigError, match='nothing is left to learn'):
        StudentOptimWrapperConstructor(dict(optimizer=dict(type='Adam', lr=0.0)))(model())
    with pytest.raises(ConfigError, match='paramwise_cfg.norm_lr'):
        StudentOptimWrapperConstructor(dict(optimizer=dict(type='Adam', lr=0.0)), dict(norm_lr=1.0))


def run(project, folder, name, *extra, **settings):
    settings = dict(
        dict(
            size=(32, 32),
            batch_size=4,
            calibration_samples=6,
            pool_size=6,
            evolve_every=0,
            iters=4,
            samples=dict(type='psaq_mm.DeadLeaves'),
            rounding='compensated',
            reobserve=False,
            checkpoint_interval=2,
        ),
        **settings,
    )
    assert (
        dfq_train([str(project.config('w4a8', f'{name}.py', **settings)), '--work-dir', str(folder / name), *extra])
        == 0
    )
    return folder / name


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    pytest.importorskip('mmpretrain')
    folder = tmp_path_factory.mktemp('optim')
    project = ClassifierProject(folder)
    return dict(
        project=project,
        folder=folder,
        first=run(project, folder, 'first', iters=0),
        vectors=run(project, folder, 'vectors', lr=0.0, vector_lr=1e-2),
        ranges=run(project, folder, 'ranges', lr=0.0, vector_lr=0.0, range_lr=1e-2),
    )


def test_rates_take_no_part_where_nothing_is_trained(runs, tmp_path):
    calibrated = run(runs['project'], tmp_path, 'calibrated', iters=0, lr=0.0)
    assert not changed(state(runs['first']), state(calibrated))
    assert (
        dfq_train(
            [
                str(runs['project'].config('w4a8', 'idle.py', size=(32, 32), iters=2, lr=0.0)),
                '--work-dir',
                str(tmp_path / 'idle'),
            ]
        )
        != 0
    )
    assert (
        dfq_train(
            [
                str(runs['project'].config('w4a8', 'below.py', size=(32, 32), iters=0, lr=-1.0)),
                '--work-dir',
                str(tmp_path / 'below'),
            ]
        )
        != 0
    )


def state(folder, name='student.pth'):
    return read_checkpoint(folder / name)['state_dict']


def changed(before, after):
    assert set(before) == set(after)
    return {key for key, value in before.items() if not torch.equal(value, after[key])}


def test_weights_stay_at_their_codes_while_vectors_learn(runs):
    found = changed(state(runs['first']), state(runs['vectors']))
    assert len(found) > 20 and all(key.rsplit('.', 1)[-1] in ('weight', 'bias') for key in found)
    assert all(state(runs['first'])[key].dim() == 1 for key in found)


def test_ranges_alone_learn(runs):
    before, after = state(runs['first']), state(runs['ranges'])
    found = changed(before, after)
    assert len(found) > 5 and all(key.endswith('.scale') and before[key].dim() == 0 for key in found)
    # Two or three steps of at most 1 % each way.
    assert all(0.95 < float(after[key] / before[key]) < 1.05 for key in found)


def test_a_run_that_learns_all_three_is_resumed_to_the_same_student(runs, tmp_path):
    settings = dict(lr=1e-4, vector_lr=1e-3, range_lr=1e-2)
    whole = run(runs['project'], runs['folder'], 'all', **settings)
    part = tmp_path / 'all'
    part.mkdir()
    (part / 'iter_2.pth').write_bytes((whole / 'iter_2.pth').read_bytes())
    run(runs['project'], tmp_path, 'all', '--resume', **settings)
    assert not changed(state(whole), state(part))
    assert changed(state(whole, 'iter_2.pth'), state(whole))
