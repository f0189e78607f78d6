# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import ToyTransformer

from psaq_mm.errors import ConfigError, DataError, UnsupportedModelError
from psaq_mm.pictures import ImageSpec
from psaq_mm.psaq_vit import AdaptiveWeight, Objective, SampleGenerator

SPEC = ImageSpec((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


def small(**options):
    return SampleGenerator(**{**dict(size=(24, 32), batch_size=2, steps=6, jitter=4, drop_tokens=1), **options})


@pytest.mark.parametrize('window,spec', [(None, SPEC), (3, SPEC), (3, ImageSpec(channels=1)), (None, ImageSpec())])
def test_entropy_rises_and_samples_stay_pictures(window, spec):
    model = ToyTransformer(window, spec.channels)
    made = small(steps=20, lr=0.1, prior_weight=0.0, jitter=0, flip=0.0, value_range=(-1, 1), bandwidth=0.1).generate(
        model, spec
    )
    assert made.samples.shape == (2, spec.channels, 24, 32) and made.samples.dtype == torch.float32
    assert not made.samples.requires_grad and torch.equal(spec.clamp(made.samples), made.samples)
    assert made.history[-1]['entropy'] > made.history[0]['entropy'] + 0.1
    assert len(made.history) == 20 and 'prior' not in made.history[0]


def test_prior_pulls_the_total_variation_to_its_target():
    made = small(steps=60, entropy_weight=0.0, init='pink').generate(nn.Identity(), SPEC)
    assert made.history[-1]['prior'] < 0.5 * made.history[0]['prior']


def test_same_seed_same_samples_and_global_state_untouched():
    model, state = ToyTransformer(), torch.get_rng_state()
    first, again = (small().generate(model, SPEC).samples for _ in range(2))
    other = small(seed=1).generate(model, SPEC).samples
    generator = torch.Generator().manual_seed(0)
    drawn = [small().generate(model, SPEC, generator=generator).samples for _ in range(2)]
    assert torch.equal(first, again) and torch.equal(first, drawn[0])
    assert not torch.equal(first, other) and not torch.equal(first, drawn[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_no_parameter_gets_a_gradient_and_settings_are_restored():
    teacher, student = ToyTransformer(), ToyTransformer(seed=1)
    teacher.embed.weight.requires_grad_(False)
    before = [p.requires_grad for p in teacher.parameters()]
    small().generate(teacher, SPEC, Objective(discrepancy=lambda x: (student(x) - teacher(x)).abs().mean()))
    assert [p.requires_grad for p in teacher.parameters()] == before
    assert all(p.grad is None for model in (teacher, student) for p in model.parameters())
    with pytest.raises(DataError):
        small().generate(teacher, SPEC, Objective(class_loss=lambda out: out.sum() * math.nan))
    assert [p.requires_grad for p in teacher.parameters()] == before


def test_samples_seek_what_the_student_gets_wrong():
    teacher, student = ToyTransformer(), ToyTransformer(seed=1)

    def discrepancy(images):
        return (student(images) - teacher(images)).abs().mean()

    made = small(steps=30, prior_weight=0, jitter=0, flip=0.0, discrepancy_weight=10.0).generate(
        teacher, SPEC, Objective(discrepancy=discrepancy)
    )
    assert made.history[-1]['discrepancy'] > made.history[0]['discrepancy']
    assert {entry['weight'] for entry in made.history} == {10.0}


def test_a_weight_that_adapts_is_asked_in_each_step():
    weight, wanted = (AdaptiveWeight(2.0) for _ in range(2))
    for each in (weight, wanted):
        each.observe(0.1)
    made = small().generate(ToyTransformer(), SPEC, Objective(discrepancy=lambda x: x.square().mean(), weight=weight))
    assert [entry['weight'] for entry in made.history] == [wanted.follow(e['discrepancy']) for e in made.history]
    assert made.history[0]['weight'] != 2.0


def test_total_is_the_weighted_sum_of_the_terms():
    model, labels = ToyTransformer(), torch.tensor([1, 3])
    made = small(entropy_weight=2.0, prior_weight=0.5, discrepancy_weight=3.0, class_weight=4.0, steps=1).generate(
        model, SPEC, Objective(discrepancy=lambda x: x.mean(), class_loss=lambda out: F.cross_entropy(out, labels))
    )
    entry = made.history[0]
    expected = -2 * entry['entropy'] + 0.5 * entry['prior'] - 3 * entry['discrepancy'] + 4 * entry['class']
    assert entry['total'] == pytest.approx(expected)


def test_class_loss_raises_the_class():
    model, labels = ToyTransformer(), torch.tensor([1, 3])
    made = small(steps=30, jitter=0, flip=0.0, prior_weight=0.0).generate(
        model, SPEC, Objective(class_loss=lambda out: F.cross_entropy(out, labels))
    )
    assert made.history[-1]['class'] < made.history[0]['class']


def test_forward_runs_before_the_discrepancy_of_each_step():
    model, calls = ToyTransformer(), []

    def forward(images):
        calls.append('forward')
        return model(images)

    def discrepancy(images):
        calls.append('discrepancy')
        return images.mean()

    for weight in (1.0, 0.0):
        calls.clear()
        small(steps=2, entropy_weight=weight).generate(model, SPEC, Objective(forward, discrepancy))
        assert calls == ['forward', 'discrepancy'] * 2


def test_rate_warms_up_and_falls_in_each_round():
    rates = [e['lr'] for e in small(steps=10, rounds=2, lr=0.2, jitter=(1, 2)).generate(ToyTransformer(), SPEC).history]
    assert rates[:10] == rates[10:] and rates[:3] == pytest.approx([0.1, 0.2, 0.2])
    assert rates[2:10] == sorted(rates[2:10], reverse=True) and rates[9] < 0.01


def test_moves_change_the_batch_as_one():
    batch = torch.arange(2 * 3 * 5 * 6.0).view(2, 3, 5, 6)
    maker, generator = small(flip=1.0), torch.Generator().manual_seed(0)
    move = maker._draw_move(3, generator)
    moved = move.apply(batch)
    assert any(torch.equal(moved.flip(3), batch.roll((o, o), (2, 3))) for o in range(-3, 4))
    assert torch.equal(move.undo(moved), batch)


def test_given_images_are_evolved_and_left_alone():
    init = torch.zeros(3, 3, 16, 20)
    init[:, :, 4:8] = 1.0
    copy = init.clone()
    made = small(lr=0.01, steps=2).generate(ToyTransformer(), SPEC, init=init)
    assert made.samples.shape == init.shape and torch.equal(init, copy)
    assert 0 < float((made.samples - init).abs().max()) < 0.1


def test_works_inside_no_grad_and_tells_progress():
    seen = []
    with torch.no_grad():
        made = small(steps=3).generate(ToyTransformer(), SPEC, progress=seen.append)
    assert seen == made.history and [entry['step'] for entry in seen] == [0, 1, 2]


@pytest.mark.parametrize(
    'options,match',
    [
        (dict(discrepancy=lambda x: x.sum() * math.nan), 'the discrepancy term is nan in step 0'),
        (dict(class_loss=lambda out: out.sum() * math.inf), 'the class term is (-?inf|nan)'),
        (dict(discrepancy=lambda x: (x - x).sum().sqrt()), 'the gradient of the samples is (nan|inf)'),
        (dict(discrepancy=lambda x: x.mean((1, 2, 3))), r'discrepancy term has shape \(2,\)'),
    ],
)
def test_what_is_not_finite_or_does_not_fit_is_named(options, match):
    with pytest.raises(DataError, match=match):
        small().generate(ToyTransformer(), SPEC, Objective(**options))


def test_first_images_that_do_not_fit_are_named():
    with pytest.raises(DataError, match=r'init of shape \(2, 1, 24, 24\)'):
        small().generate(ToyTransformer(), SPEC, init=torch.zeros(2, 1, 24, 24))


def test_broken_weights_are_found_in_the_entropy():
    model = ToyTransformer()
    model.embed.weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(DataError, match='the entropy term is nan'):
        small().generate(model, SPEC)


def test_model_without_attention_needs_a_weight_of_zero():
    model = nn.Conv2d(3, 4, 3)
    with pytest.raises(UnsupportedModelError, match='weight of the entropy to 0'):
        small().generate(model, SPEC)
    assert 'entropy' not in small(entropy_weight=0.0).generate(model, SPEC).history[0]
    with pytest.raises(DataError, match='no term'):
        small(entropy_weight=0.0, prior_weight=0.0).generate(model, SPEC)


def test_a_setting_that_is_not_known_is_named():
    with pytest.raises(ConfigError, match='step is no setting: did you mean steps'):
        small(step=3)


@pytest.mark.parametrize(
    'options,match',
    [
        (dict(size=(24, 0)), r'size=\(24, 0\)'),
        (dict(batch_size=0), 'batch_size=0'),
        (dict(steps=0), 'steps=0'),
        (dict(lr=0.0), 'lr=0'),
        (dict(flip=1.5), 'flip=1.5'),
        (dict(rounds=2, jitter=(1, 2, 3)), r'jitter=\(1, 2, 3\)'),
        (dict(variation=(3000.0, 2500.0)), 'variation'),
        (dict(value_range=(1.0, 1.0)), 'value_range'),
        (dict(init='white'), "init='white'"),
    ],
)
def test_bad_settings_are_named(options, match):
    with pytest.raises(DataError, match=match):
        small(**options)


def test_the_target_of_the_total_variation_is_drawn_from_its_range():
    """First of all that is drawn for given images, and once a call."""
    init = torch.zeros(2, 3, 24, 32)  # no variation at all: the prior's distance is the target
    found = []
    for seed in range(12):
        made = small(steps=2, lr=1e-12, jitter=0, flip=0.0, entropy_weight=0.0, variation=(1000.0, 3000.0))
        history = made.generate(nn.Identity(), SPEC, init=init, generator=torch.Generator().manual_seed(seed)).history
        wanted = 1000 + 2000 * float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
        assert history[0]['prior'] == pytest.approx(wanted, rel=1e-4) and history[1]['prior'] == pytest.approx(
            wanted, rel=1e-4
        )
        found.append(history[0]['prior'])
    assert max(found) - min(found) > 1000


@pytest.mark.parametrize('given', [False, True])
def test_works_inside_inference_mode(given):
    teacher, student = ToyTransformer(), ToyTransformer(seed=1)
    objective = Objective(
        discrepancy=lambda x: (student(x) - teacher(x)).abs().mean(), class_loss=lambda out: out.square().mean()
    )
    settings = {}
    if given:
        settings['init'] = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    wanted = small().generate(teacher, SPEC, objective, **settings)
    with torch.inference_mode():
        if given:
            settings['init'] = settings['init'].clone()
            assert settings['init'].is_inference()
        found = small().generate(teacher, SPEC, objective, **settings)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(found.samples, wanted.samples) and found.history == wanted.history
    assert not found.samples.requires_grad and not found.samples.is_inference()
