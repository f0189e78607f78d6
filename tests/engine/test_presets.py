"""The presets say what the papers' code does, number by number."""

import pytest
from mmengine.config import Config
from swin_models import build_backbone
from toys import ToyTransformer

from psaq_mm.engine.config import sample_size
from psaq_mm.engine.methods import METHODS
from psaq_mm.engine.presets import DFQ_DEFAULTS, resolve_dfq, with_method
from psaq_mm.errors import ConfigError
from psaq_mm.pictures import source_of
from psaq_mm.psaq_vit import SampleGenerator
from psaq_mm.psaq_vit.priors import REFERENCE_SHAPE, variation_target

V1_GENERATOR = dict(
    batch_size=32,
    steps=500,
    rounds=2,
    betas=(0.5, 0.9),
    warmup=0.2,
    entropy_weight=1.0,
    prior_weight=0.05,
    class_weight=1.0,
    variation=(2500.0, 3000.0),
    jitter=(15, 30),
    flip=0.5,
    init='gaussian',
    drop_tokens=1,
    points=10,
    bandwidth=0.01,
    value_range=None,
)


def generator_of(preset):
    settings = dict(resolve_dfq(preset)['generator'])
    assert settings.pop('type') == 'psaq_mm.SampleGenerator'
    return SampleGenerator(**settings)


def test_psaq_v1_is_the_released_method():
    dfq = resolve_dfq('psaq_v1')
    assert (dfq['iters'], dfq['evolve_every'], dfq['calibration_samples']) == (0, 0, 32)
    assert dfq['samples'] == 'generated' and dfq['classes'] == 'random' and dfq['size'] is None
    generator = generator_of('psaq_v1')
    assert {k: generator.settings()[k] for k in V1_GENERATOR} == V1_GENERATOR
    assert generator.rate_for(ToyTransformer()) == 0.20
    assert generator.rate_for(build_backbone('mmdet')) == 0.25


def test_psaq_v1_warms_up_for_100_of_500_steps_and_falls_as_a_cosine():
    schedule = generator_of('psaq_v1').schedule.share
    assert schedule(0) == pytest.approx(1 / 100) and schedule(99) == 1.0 and schedule(100) == 1.0
    assert schedule(300) == pytest.approx(0.5) and 0 < schedule(499) < 1e-4


def test_psaq_v1_target_of_the_variation_is_the_papers_at_its_batch_and_size():
    assert REFERENCE_SHAPE == (32, 3, 224, 224)
    assert variation_target(2750.0, REFERENCE_SHAPE) == 2750.0


def test_repq_presets():
    repq, trained = resolve_dfq('repq'), resolve_dfq('repq_v2')
    assert (repq['iters'], repq['evolve_every'], repq['samples'], repq['calibration_samples']) == (0, 0, 'real', 32)
    assert not repq['reobserve'] and not trained['reobserve']
    assert {k for k in trained if trained[k] != DFQ_DEFAULTS[k]} == {'method', 'reobserve'}
    assert resolve_dfq(dict(preset='repq', samples='generated'))['samples'] == 'generated'


def test_fast_makes_nothing_out_of_the_model():
    fast = resolve_dfq('fast')
    assert type(source_of(fast['samples'])).__name__ == 'DeadLeaves'
    assert fast['rounding'] == 'auto' and not fast['iters'] and not fast['evolve_every']


def test_best_draws_scenes_and_twice_as_many_leaves():
    best = resolve_dfq('best')
    assert best['rounding'] == 'auto' and not best['iters'] and not best['evolve_every']
    assert (best['lr'], best['vector_lr']) == (0.0, 1e-3), 'codes stay where steps are asked for'
    source = source_of(best['samples'])
    assert source.procedural and [type(member).__name__ for member in source.sources] == ['Scenes', 'DeadLeaves']
    assert source.weights == pytest.approx([1 / 3, 2 / 3]) and repr(source.sources[1]) == repr(
        source_of(resolve_dfq('fast')['samples'])
    )
    assert best['calibration_samples'] > resolve_dfq('fast')['calibration_samples']


def test_presets_do_not_share_what_they_give():
    resolve_dfq('fast')['samples']['exponent'] = 9.0
    assert resolve_dfq('fast')['samples']['exponent'] != 9.0 and resolve_dfq('best')['samples'][1]['exponent'] != 9.0


@pytest.mark.parametrize(
    'dfq, samples',
    [
        (dict(preset='fast', source='pink'), 'pink'),
        (dict(preset='fast', source='generated'), resolve_dfq('fast')['samples']),
        (dict(preset='fast', samples=None), 'generated'),
        (dict(preset='fast', samples='generated', source='pink'), 'pink'),
        (dict(preset='repq', samples=None), 'real'),
        (dict(preset='repq', source='generated'), 'generated'),
        (
            dict(preset='repq', source='generated', samples=dict(type='psaq_mm.DeadLeaves')),
            dict(type='psaq_mm.DeadLeaves'),
        ),
        (dict(source='generated', samples='saved.pt'), 'saved.pt'),
        (dict(source='real', samples=None), 'real'),
        (dict(fresh=dict(share=1.0, samples='pink')), 'pink'),
        (dict(preset='fast', samples=dict(type='psaq_mm.PinkNoise')), dict(type='psaq_mm.PinkNoise')),
    ],
)
def test_earlier_names_of_where_samples_come_from(dfq, samples):
    settings = resolve_dfq(dfq)
    assert settings['samples'] == samples and 'source' not in settings


def test_fresh_is_a_switch_and_its_earlier_values_are_read():
    assert [
        resolve_dfq(dict(fresh=value))['fresh']
        for value in (0, 0.0, 1, 1.0, True, dict(share=1.0), dict(samples='pink'))
    ] == [
        False,
        False,
    ] + [True] * 5
    assert resolve_dfq(dict(joint_lr=0.0)).keys() == DFQ_DEFAULTS.keys()


def test_what_recorded_configs_hold_of_the_earlier_damping_is_left_out():
    for damping, prior_rows in ((0.1, None), (0.3, 32)):
        settings = resolve_dfq(dict(preset='fast', damping=damping, prior_rows=prior_rows))
        assert settings == resolve_dfq('fast') and settings['prior_rows'] == 32


@pytest.mark.parametrize(
    'dfq, message',
    [
        (dict(fresh=0.5), 'dfq.fresh=0.5 must be True'),
        (dict(fresh=dict(share=0.5, samples='pink')), 'dfq.fresh=0.5 must be True'),
        (dict(fresh=dict(part=1)), "'part'"),
        (dict(fresh=dict(share=1, samples='pink'), samples='real'), 'contradict each other'),
        (dict(source='real', samples='here.pt'), "dfq.samples=here.pt and dfq.source='real' contradict"),
        (dict(joint_lr=0.05), 'dfq.joint_lr=0.05 is no longer supported'),
        (dict(damping=0.2), 'dfq.damping=0.2 is no longer supported.*set dfq.prior_rows'),
        (dict(sample='pink'), 'dfq.sample is no setting: did you mean samples'),
        ('psaq_v3', "'psaq_v3' is not known: did you mean psaq_v2"),
    ],
)
def test_settings_that_are_gone_or_unknown_are_named(dfq, message):
    with pytest.raises(ConfigError, match=message):
        resolve_dfq(dfq)


def test_fast_and_best_as_methods_keep_their_steps_and_samples():
    own = dict(
        size=(64, 96), iters=300, evolve_every=60, lr=5e-5, samples='saved.pt', generator=dict(steps=9, batch_size=4)
    )
    fast, best = (resolve_dfq(with_method(own, method)) for method in ('fast', 'best'))
    assert fast['iters'] == best['iters'] == 0 and fast['samples'] == resolve_dfq('fast')['samples']
    assert fast['size'] == best['size'] == (64, 96) and best['generator']['batch_size'] == 4
    assert best['samples'] == 'saved.pt', 'a path holds what it would make'
    for method in ('psaq_v1', 'repq'):
        kept = [
            resolve_dfq(with_method(dict(own, samples=given), method))['samples']
            for given in ('saved.pt', [dict(type='psaq_mm.PinkNoise')], 'pink')
        ]
        own_source = resolve_dfq(method)['samples']
        assert kept == ['saved.pt', own_source, own_source], (
            'a source of the config is none of a method that makes its own'
        )
    other = resolve_dfq(with_method(dict(own, samples=dict(type='psaq_mm.PinkNoise')), 'best'))
    assert other['samples'] == resolve_dfq('best')['samples']
    assert resolve_dfq(dict(preset='best', iters=60, lr=5e-5))['lr'] == 5e-5


def test_every_preset_builds_a_generator():
    for preset in METHODS:
        generator_of(preset)


def test_settings_beside_a_preset_win_and_the_rest_of_its_generator_stays():
    dfq = resolve_dfq(dict(preset='psaq_v1', generator=dict(steps=3)))
    assert dfq['generator']['steps'] == 3 and dfq['generator']['jitter'] == (15, 30)


@pytest.mark.parametrize(
    'pipeline, size',
    [
        ([dict(type='ResizeEdge', scale=256, edge='short'), dict(type='CenterCrop', crop_size=224)], (224, 224)),
        ([dict(type='ResizeEdge', scale=560, edge='short'), dict(type='CenterCrop', crop_size=518)], (518, 518)),
        ([dict(type='Resize', scale=384)], (384, 384)),
        ([dict(type='mmpretrain.CenterCrop', crop_size=(96, 64))], (64, 96)),  # width first
        ([dict(type='Resize', scale=(2048, 1024))], (1024, 2048)),
        ([dict(type='Resize', scale=(1333, 800), keep_ratio=True)], (800, 1216)),
    ],
)
def test_size_of_the_samples_from_the_test_pipeline(pipeline, size):
    assert sample_size(Config(dict(model=dict(), test_pipeline=pipeline))) == size
    assert sample_size(Config(dict(model=dict(), test_dataloader=dict(dataset=dict(pipeline=pipeline))))) == size


def test_a_config_that_tells_no_size():
    with pytest.raises(ConfigError, match='dfq.size'):
        sample_size(Config(dict(model=dict(), test_pipeline=[dict(type='PackInputs')])))
