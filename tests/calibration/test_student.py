# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Training of a small student without synthesis: pool, rounds and steps."""

import copy

import pytest
import torch
from torch import Tensor
from toys import ToyTask, ToyTransformer

from psaq_mm.calibration import Calibration, CalibrationSettings, StudentTraining, TrainingSettings, normalized_l1
from psaq_mm.errors import ConfigError, DataError
from psaq_mm.pictures import DeadLeaves, ImageSpec, PinkNoise, SampleStream
from psaq_mm.quantization import quantize_, quantizers, set_mode

SIZE, SPEC = (8, 12), ImageSpec((120.0,) * 3, (60.0,) * 3)


def stream(source=None, name=''):
    return SampleStream(source or PinkNoise(), SIZE, SPEC, 5, name)


def training_of(fresh=None, **settings):
    """A training that nothing has been done to yet."""
    student = ToyTransformer()
    quantize_(student, 'w4a8')
    teacher = copy.deepcopy(student).requires_grad_(False)
    set_mode(teacher, 'off')
    calibration = Calibration(
        ToyTask(student, SPEC),
        CalibrationSettings(batch_size=3, calibration_samples=4),
        random=torch.Generator().manual_seed(5),
    )
    settings = TrainingSettings(**{**dict(pool_size=6, evolve_every=2, evolve_samples=2), **settings})
    return StudentTraining(ToyTask(teacher, SPEC), calibration, stream(), settings, fresh=fresh, seed=5)


def prepared(**settings):
    training = training_of(**settings)
    training.prepare()
    return training


def ranges_of(training):
    return torch.cat(
        [part.flatten() for _, q in quantizers(training.student.model) for part in (q.scale, q.zero_point)]
    )


# ---------------------------------------------------------------------- first pictures and rounds
def test_the_pool_keeps_the_pictures_that_set_the_ranges():
    training = prepared()
    assert torch.equal(training.pool.samples, stream().take(4)) and training.rounds == 1
    assert torch.equal(training.latest, training.pool.samples)
    again = training_of()
    again.calibration.run(stream().take(4))
    assert torch.equal(ranges_of(training), ranges_of(again))


def test_given_pictures_take_the_place_of_those_of_the_stream():
    training, first = training_of(), torch.randn(5, 3, *SIZE)
    training.prepare(first)
    assert torch.equal(training.pool.samples, first) and training.rounds == 1 and training.stream.position == 0


@pytest.mark.parametrize('settings, steps', [(dict(), [2, 4, 6]), (dict(evolve_every=0), [])])
def test_when_a_round_is_due(settings, steps):
    assert [step for step in range(8) if training_of(**settings).due(step)] == steps


@pytest.mark.parametrize('reobserve', [True, False])
def test_a_round_adds_the_next_pictures_and_ranges_follow(reobserve):
    training = prepared(reobserve=reobserve)
    before = ranges_of(training)
    training.evolve()
    assert torch.equal(training.pool.samples, stream().take(6)) and training.rounds == 2
    assert torch.equal(training.latest, training.pool.samples[4:])
    assert torch.equal(before, ranges_of(training)) != reobserve
    training.evolve()
    assert len(training.pool) == 6, 'in a full pool new pictures replace others'


# ---------------------------------------------------------------------- batches
def test_a_batch_is_made_of_the_pool():
    training = prepared(augment=False)
    assert training.draw(2).shape == (4, 3, *SIZE), 'no more than the pool holds'
    for _ in range(3):
        batch = training.draw()
        assert len(batch) == 3 and all(any(torch.equal(one, kept) for kept in training.pool.samples) for one in batch)


def test_augmented_pictures_are_flipped_and_rolled():
    training = prepared()
    batches = [training.draw() for _ in range(6)]
    moved = [
        picture.roll((down, across), (1, 2))
        for one in training.pool.samples
        for picture in (one, one.flip(-1))
        for down in range(SIZE[0])
        for across in range(SIZE[1])
    ]
    for picture in batches[0]:
        assert any(torch.equal(picture, one) for one in moved)
    assert not any(torch.equal(batches[0], other) for other in batches[1:])


def test_fresh_batches_are_pictures_that_nobody_has_seen():
    training = prepared(fresh=stream(DeadLeaves(), 'fresh'), augment=False)
    wanted = stream(DeadLeaves(), 'fresh')
    assert torch.equal(training.draw(), wanted.take(3)) and torch.equal(training.draw(), wanted.take(3))
    assert training.fresh_samples == 6 and len(training.pool) == 4


# ---------------------------------------------------------------------- steps
@pytest.mark.parametrize('logits_weight', [0.0, 0.5])
@pytest.mark.parametrize('batches', [1, 2, 5])
def test_a_step_has_the_gradients_of_the_whole_batch(batches, logits_weight):
    training = prepared(logits_weight=logits_weight)
    images = torch.randn(5, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # a student that has something to learn
        training.student.model.head.weight.mul_(1.5)
        target = training.teacher.run(images, with_logits=True)
    output = training.student.run(images, with_logits=True)
    discrepancy = normalized_l1(output.parts, target.parts)
    difference = target.logits.log_softmax(1) - output.logits.log_softmax(1)
    divergence = (target.logits.softmax(1) * difference).sum(1).mean()
    (discrepancy + logits_weight * divergence).backward()
    wanted = [p.grad.clone() for p in training.student.model.parameters()]
    training.student.model.zero_grad()
    losses = training.learn(images, Tensor.backward, batches)
    assert float(losses.loss) == pytest.approx(float(discrepancy + logits_weight * divergence), rel=1e-4)
    assert float(losses.discrepancy) == pytest.approx(float(discrepancy), rel=1e-4)
    for parameter, gradient in zip(training.student.model.parameters(), wanted):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-8)
    assert all(p.grad is None for p in training.teacher.model.parameters())


def test_steps_bring_the_student_nearer():
    training = prepared(augment=False)
    with torch.no_grad():
        training.student.model.head.weight.add_(0.1)
    optimizer, values = torch.optim.Adam(training.student.model.parameters(), lr=1e-2), []
    for _ in range(10):
        optimizer.zero_grad()
        values.append(float(training.learn(training.draw(), Tensor.backward).loss))
        optimizer.step()
    assert sum(values[-3:]) < 0.7 * sum(values[:3])


def test_a_loss_that_is_not_finite_is_named():
    training = prepared()
    with torch.no_grad():
        training.student.model.head.bias.fill_(float('nan'))
    with pytest.raises(DataError, match='loss of the student became nan: lower its learning rate'):
        training.learn(training.draw(), Tensor.backward)


# ---------------------------------------------------------------------- state
def going_on(training):
    training.evolve()
    images = training.draw()
    loss = float(training.learn(images, Tensor.backward).loss)
    return images, loss, training.pool.samples.clone(), training.rounds, training.fresh_samples


@pytest.mark.parametrize('given', [False, True])
@pytest.mark.parametrize('fresh', [False, True])
def test_a_resumed_training_goes_on_as_it_would_have(given, fresh):
    def begun():
        return training_of(fresh=stream(DeadLeaves(), 'fresh') if fresh else None)

    one, other = begun(), begun()
    one.prepare(torch.randn(4, 3, *SIZE) if given else None)
    one.learn(one.draw(), Tensor.backward)
    state = copy.deepcopy(one.state_dict())
    other.student.model.load_state_dict(copy.deepcopy(one.student.model.state_dict()))
    other.load_state_dict(state)
    assert other.latest is None
    for ours, theirs in zip(going_on(other), going_on(one)):
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs


def test_states_of_earlier_releases_are_read():
    """A key for each kind of source, fresh pictures in the pool, and once no position at all."""
    one = prepared(fresh=stream(DeadLeaves(), 'fresh'))
    one.evolve()
    state = one.state_dict()
    fresh = state.pop('fresh')
    state['pool'].update(stream=dict(position=fresh['position']), made=fresh['made'])
    position = state.pop('stream')
    for old in (dict(state, named=position, real=None), dict(state, real=position), state):
        other = training_of(fresh=stream(DeadLeaves(), 'fresh'))
        other.load_state_dict(copy.deepcopy(old))
        assert (other.stream.position, other.fresh.position, other.fresh_samples) == (6, 4, 4)
        assert torch.equal(other.pool.samples, one.pool.samples)


@pytest.mark.parametrize(
    'settings, match',
    [
        (dict(logits_weight=-1.0), '^logits_weight=-1.0'),
        (dict(pool_size=0), 'pool_size=0 must be at least 1'),
        (dict(pool_size=3), 'pool_size=3 is smaller than calibration_samples=4'),
        (dict(evolve_samples=7), 'pool_size=6 is smaller than evolve_samples=7'),
        (dict(evolve_every=-1), 'evolve_every=-1'),
    ],
)
def test_settings_that_do_not_go_are_named(settings, match):
    with pytest.raises(ConfigError, match=match):
        training_of(**settings)
