# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What the loop makes for a run: calibration always, training for student steps, synthesis for samples that need it."""

import pytest
from tiny_classifier import ClassifierProject

from psaq_mm.commands.common import load_config
from psaq_mm.engine.config import to_data_free
from psaq_mm.engine.running import data_free_runner
from psaq_mm.engine.settings import GROUPS

pytestmark = pytest.mark.filterwarnings('ignore')
SHORT = dict(size=(32, 32), batch_size=2, calibration_samples=2, pool_size=4, checkpoint_interval=0, evolve_samples=2)


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    pytest.importorskip('mmpretrain')
    return ClassifierProject(tmp_path_factory.mktemp('loop'))


def loop_of(project, **dfq):
    """The loop of a run that has ended."""
    dfq = dict(SHORT, generator=dict(batch_size=2, steps=1), **dfq)
    config = to_data_free(load_config(str(project.config('w4a8', **dfq))))
    config.work_dir, config.launcher = str(project.folder / dfq['preset']), 'none'
    runner = data_free_runner(config)
    runner.train()
    return runner.train_loop


@pytest.mark.parametrize(
    'preset, iters, parts',
    [
        ('fast', 0, []),
        ('best', 0, []),
        ('repq', 0, []),
        ('gaussian', 0, []),
        ('best', 1, ['training']),
        ('calibrate', 0, ['synthesis']),
        ('psaq_v1', 0, ['synthesis']),
        ('psaq_v2', 3, ['training', 'synthesis']),
    ],
)
def test_a_run_makes_what_it_needs_and_no_more(project, preset, iters, parts):
    rounds = dict(evolve_every=2 if iters else 0)
    loop = loop_of(project, preset=preset, iters=iters, **rounds)
    assert [name for name in ('training', 'synthesis') if getattr(loop, name) is not None] == parts
    assert loop.rounds == (2 if iters == 3 else 1) and len(loop.first_pictures) == 2
    assert bool(loop.history()) == bool(loop.summary()['generator']) == ('synthesis' in parts)


def test_a_key_stands_in_one_group_and_says_what_it_is():
    names = [name for group in GROUPS for name in group.names()]
    assert len(names) == len(set(names))
    for group in GROUPS:
        assert group.from_dict(group.defaults()) == group() and all(group.docs().values()), group
