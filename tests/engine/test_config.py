"""Configs in each form that MMEngine reads, and what becomes of them."""

import itertools

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from tiny_classifier import ClassifierProject

from psaq_mm.commands.common import load_config
from psaq_mm.commands.comparison import Wanted, plan
from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.engine.checkpoint import read_checkpoint
from psaq_mm.engine.config import apply_method, drop_pretrained, is_quantized_config, to_data_free, type_name
from psaq_mm.engine.methods import METHODS
from psaq_mm.engine.samples import build_source
from psaq_mm.models.quantized import Quantized
from psaq_mm.pictures import DeadLeaves, source_of

pytestmark = pytest.mark.filterwarnings('ignore')


class Resize:
    """Stands for any class that a pure-Python config imports."""


@pytest.mark.parametrize(
    'given, name',
    [
        (None, ''),
        ('', ''),
        ({}, ''),
        ([dict(type='Resize')], ''),
        ('Resize', 'Resize'),
        ('mmdet.Resize', 'Resize'),
        (Resize, 'Resize'),
        (dict(type=Resize), 'Resize'),
        (ConfigDict(type='mmcv.transforms.Resize'), 'Resize'),
        (Quantized, 'Quantized'),
        (LazyObject('mmcv.transforms', 'Resize'), 'Resize'),
        (LazyAttr('Resize', LazyObject('mmcv.transforms')), 'Resize'),
    ],
)
def test_the_name_of_a_type_in_each_form(given, name):
    assert type_name(given) == name


def test_types_that_are_classes_are_known_for_what_they_are():
    from mmengine.model import PretrainedInit

    assert is_quantized_config(dict(type=Quantized)) and not is_quantized_config(dict(type=Resize))
    model = dict(type=Resize, backbone=dict(init_cfg=dict(type=PretrainedInit, checkpoint='weights.pth')))
    drop_pretrained(model)
    assert model['backbone']['init_cfg'] is None
    assert type(source_of(dict(type=DeadLeaves))) is DeadLeaves
    assert type(build_source([dict(type=DeadLeaves, color_blur=5), dict(type='PinkNoise')]).sources[0]) is DeadLeaves


# ---------------------------------------------------------------------- a config in a work dir is the run that left it
@pytest.fixture(scope='module')
def project(tmp_path_factory):
    pytest.importorskip('mmpretrain')
    return ClassifierProject(tmp_path_factory.mktemp('project'), per_class=2)


def config_of(project, dfq):
    text = (
        f"_base_ = ['{project.base}']\nmodel = dict(type='psaq_mm.Quantized', base_type={{{{_base_.model.type}}}}, "
        f"quant='w4a8')\n"
        f'load_from = {str(project.checkpoint)!r}\ndfq = {dfq!r}\ncustom_hooks = [dict(type="EMAHook")]\n'
    )
    (project.folder / 'with_dfq.py').write_text(text)
    return load_config(str(project.folder / 'with_dfq.py'))


def dumped(config, folder):
    """A config as a runner leaves it in the work dir, read again."""
    config.dump(str(folder / 'dumped.py'))
    return load_config(str(folder / 'dumped.py'))


@pytest.mark.parametrize('preset', list(METHODS))
def test_a_dumped_config_is_the_run_it_came_from(project, tmp_path, preset):
    own = dict(preset=preset, size=(32, 32), checkpoint_interval=0, sheet_interval=7, generator=dict(batch_size=4))
    given = config_of(project, own)
    changes = [
        {},
        {
            'dfq.iters': 9,
            'dfq.lr': 3e-4,
            'dfq.vector_lr': 1e-3,
            'dfq.range_lr': 1e-2,
            'dfq.clip_grad': None,
            'dfq.keep_checkpoints': 5,
        },
        {'dfq.source': 'gaussian', 'dfq.iters': 3},
    ]
    pairs = []
    for options in changes:
        config = given.__deepcopy__({})
        config.merge_from_dict(options)
        first = to_data_free(config)
        again = dumped(first, tmp_path)
        assert to_data_free(again).to_dict() == first.to_dict()
        pairs.append((again, config))
    # And what a user makes of it: another method, precision or setting is what it is over the config that was written
    # by hand.
    for pair, method in itertools.product((pairs[0], pairs[-1]), METHODS):
        one, other = (apply_method(source, 'w6a6', method) for source in pair)
        for changed in (one, other):
            changed.merge_from_dict({'dfq.batch_size': 3})
        one, other = to_data_free(one), to_data_free(other)
        for free in (one, other):
            free.train_cfg.dropped_hooks = free.dfq = None  # how the rest came about
        assert one.to_dict() == other.to_dict(), method


@pytest.mark.parametrize('method', list(METHODS))
def test_a_method_and_a_precision_stay_in_a_dumped_config(project, tmp_path, method):
    config = apply_method(config_of(project, dict(preset='psaq_v2', size=(32, 32))), 'w6a6', method)
    first = to_data_free(config)
    assert first.train_cfg.model_config.quant == first.model.quant
    assert to_data_free(dumped(first, tmp_path)).to_dict() == first.to_dict()


@pytest.mark.parametrize('preset, iters', [('fast', 0), ('psaq_v2', 3)])
def test_the_config_in_the_work_dir_runs_the_same_steps(project, tmp_path, preset, iters):
    dfq = dict(
        preset=preset,
        size=(32, 32),
        batch_size=2,
        calibration_samples=2,
        pool_size=4,
        evolve_every=2,
        evolve_samples=2,
        log_interval=1,
        lr=1e-3,
        generator=dict(batch_size=2, steps=2),
        **(dict(iters=iters) if iters else {}),
    )
    given = config_of(project, dfq)
    path = project.folder / 'with_dfq.py'
    assert dfq_train([str(path), '--work-dir', str(tmp_path / 'first')]) == 0
    left = tmp_path / 'first' / path.name
    assert dfq_train([str(left), '--work-dir', str(tmp_path / 'again')]) == 0
    config = Config.fromfile(str(left))
    config.work_dir = str(tmp_path / 'library')
    init_default_scope('mmpretrain')
    Runner.from_cfg(config).train()  # as the library's own tools/train.py
    first, *others = (read_checkpoint(tmp_path / name / 'student.pth') for name in ('first', 'again', 'library'))
    assert first['meta']['psaq_mm']['dfq']['steps'] == iters
    for other in others:
        assert other['meta']['psaq_mm']['quant'] == first['meta']['psaq_mm']['quant']
        assert all(torch.equal(value, other['state_dict'][key]) for key, value in first['state_dict'].items())
    # A comparison sees one run in both.
    keys = [
        plan({str(path): source}, Wanted(('generated',), (0,), train=True))[0].key
        for source in (given, load_config(str(left)))
    ]
    assert keys[0] == keys[1]
