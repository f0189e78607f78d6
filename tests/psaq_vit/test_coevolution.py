# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The pool, the ranges and the student's steps on small transformers: each part of a run by itself, with PyTorch
alone."""

import copy
from typing import List, NamedTuple, Optional

import pytest
import torch
from torch import Tensor
from toys import ToyTransformer

from psaq_mm.calibration import normalized_l1
from psaq_mm.errors import ConfigError, DataError
from psaq_mm.pictures import Generated, ImageSpec, PinkNoise, SampleStream, source_names, source_of
from psaq_mm.pictures.base import mixed as seed_of
from psaq_mm.psaq_vit import CoEvolution, CoEvolutionSettings, FreshPool, SampleGenerator, SourcedEvolution
from psaq_mm.quantization import calibrate, quantize_, quantizers, set_mode
from psaq_mm.quantization.primitives import fake_quantize

SIZE, SPEC = (8, 12), ImageSpec((120.0,) * 3, (60.0,) * 3)


class Outputs(NamedTuple):
    parts: List[Tensor]
    logits: Optional[Tensor]


class Task:
    """What :class:`psaq_mm.psaq_vit.coevolution.Network` asks of a network."""

    image_spec, min_size, fixed_size, prefix_tokens, num_classes = SPEC, 4, None, 1, 5

    def __init__(self, model):
        self.model, self.calls = model, 0

    def run(self, images, with_logits=False):
        logits = self.model(images)
        return Outputs([logits, 2 * logits], logits if with_logits else None)

    def outputs(self, images):
        return self.run(images).parts

    @torch.no_grad()
    def calibration_forward(self, images, scope='backbone'):
        self.calls += 1
        self.model(images)


def evolution_of(kind=CoEvolution, arguments=(), quant='w4a8', generator=None, **settings):
    """A co-evolution that nothing has been done to yet."""
    student = ToyTransformer()
    quantize_(student, quant)
    teacher = copy.deepcopy(student).requires_grad_(False)
    set_mode(teacher, 'off')
    settings = dict(
        size=SIZE,
        batch_size=3,
        calibration_samples=4,
        pool_size=6,
        evolve_every=2,
        evolve_samples=2,
        **{'source': 'pink', **settings},
    )
    if kind is SourcedEvolution:
        settings['source'] = 'generated'
    maker = SampleGenerator(size=SIZE, batch_size=2, steps=2, **(generator or {}))
    return kind(*arguments, Task(teacher), Task(student), maker, CoEvolutionSettings(**settings), seed=5)


def prepared(*arguments, **settings):
    found = evolution_of(*arguments, **settings)
    found.prepare()
    return found


def ranges_of(evolution):
    return {
        name: (quantizer.scale.clone(), quantizer.zero_point.clone())
        for name, quantizer in quantizers(evolution.student.model)
    }


def equal_ranges(one, other):
    return all(torch.equal(a, b) for name in one for a, b in zip(one[name], other[name]))


# ---------------------------------------------------------------------- first samples, ranges, first codes
def test_prepare_fills_the_pool_and_sets_the_ranges_on_what_is_in_it():
    evolution = prepared()
    assert len(evolution.pool) == 4 and torch.equal(evolution.pool.samples, evolution.latest) and evolution.rounds == 1
    assert evolution.student.calls == 2, 'batches of 3 and 1'
    wanted = evolution_of()
    calibrate(wanted.student.model, lambda: wanted.student.model(evolution.latest))
    assert equal_ranges(ranges_of(evolution), ranges_of(wanted)) and not evolution.rounded
    for one, other in zip(evolution.student.model.parameters(), wanted.student.model.parameters()):
        assert torch.equal(one, other), 'nearest codes leave the weights'


def test_given_samples_take_the_place_of_made_ones():
    evolution, given, labels = evolution_of(), torch.randn(5, 3, *SIZE), torch.arange(5)
    evolution.prepare(given, labels)
    assert (
        torch.equal(evolution.pool.samples, given) and torch.equal(evolution.labels, labels) and evolution.rounds == 1
    )
    wanted = evolution_of()
    calibrate(wanted.student.model, lambda: wanted.student.model(given))
    assert equal_ranges(ranges_of(evolution), ranges_of(wanted))


def test_ranges_are_observed_anew_on_other_samples():
    evolution = prepared()
    before = ranges_of(evolution)
    evolution.observe(2 * evolution.latest)
    assert not equal_ranges(before, ranges_of(evolution))


@pytest.mark.parametrize('rounding', ['compensated', 'guided'])
def test_weights_are_rounded_on_the_first_samples(rounding):
    evolution, nearest = prepared(rounding=rounding), prepared()
    assert equal_ranges(ranges_of(evolution), ranges_of(nearest)), 'scales stay'
    rounded = {layer.name for layer in evolution.rounded if not layer.reason}
    assert {'embed', 'head', 'blocks.0.attn.qkv'} <= rounded
    for name in rounded:
        layer, plain = (e.student.model.get_submodule(name) for e in (evolution, nearest))
        quantizer = layer.weight_quantizer
        codes = fake_quantize(layer.weight, quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax, 0)
        torch.testing.assert_close(layer.weight, codes, rtol=0, atol=1e-6)
        assert not torch.equal(layer.quantized_weight(), plain.quantized_weight())
    assert all(p.requires_grad and p.grad is None for p in evolution.student.model.parameters())


@pytest.mark.parametrize('quant, same', [('w8a8', 'compensated'), ('w4a8', 'guided')])
def test_auto_rounds_by_the_bits_of_the_weights(quant, same):
    found = {
        rounding: prepared(quant=quant, rounding=rounding).student.model.head.weight
        for rounding in ('auto', 'compensated', 'guided')
    }
    assert torch.equal(found['auto'], found[same]) and not torch.equal(found['guided'], found['compensated'])


def test_samples_that_do_not_fit_the_network_are_refused():
    with pytest.raises(ConfigError, match=r'dfq.size=\(2, 12\) is smaller than one attention window'):
        CoEvolution(
            Task(ToyTransformer()), Task(ToyTransformer()), SampleGenerator(), CoEvolutionSettings(size=(2, 12))
        )
    with pytest.raises(ConfigError, match='real.*needs a training dataset'):
        CoEvolution(
            Task(ToyTransformer()),
            Task(ToyTransformer()),
            SampleGenerator(),
            CoEvolutionSettings(size=SIZE, source='real'),
        )


# ---------------------------------------------------------------------- rounds
@pytest.mark.parametrize(
    'settings, steps',
    [
        (dict(), [2, 4, 6]),
        (dict(reobserve=False), [2, 4, 6]),
        (dict(joint_lr=0.1), [2, 4, 6]),
        (dict(joint_lr=0.1, reobserve=False), []),
    ],
)
def test_when_a_round_is_due(settings, steps):
    assert [step for step in range(8) if evolution_of(**settings).due(step)] == steps


def test_a_fixed_pool_is_never_renewed():
    evolution = evolution_of()
    evolution = CoEvolution(
        evolution.teacher,
        evolution.student,
        evolution.generator,
        CoEvolutionSettings(
            size=SIZE, batch_size=3, calibration_samples=4, pool_size=4, evolve_every=0, source='pink', augment=False
        ),
    )
    evolution.prepare()
    first = evolution.pool.samples.clone()
    assert not any(evolution.due(step) for step in range(100))
    for _ in range(3):
        drawn = evolution.draw()
        assert len(drawn) == 3 and all(any(torch.equal(one, kept) for kept in first) for one in drawn)
        evolution.learn(drawn, Tensor.backward)
    assert torch.equal(evolution.pool.samples, first) and evolution.rounds == 1


@pytest.mark.parametrize('reobserve', [True, False])
def test_a_round_adds_samples_that_compete_and_ranges_follow(reobserve):
    evolution = prepared(SourcedEvolution, (SampleStream(Generated(), SIZE, SPEC, 5),), reobserve=reobserve)
    assert all('discrepancy' not in step for step in evolution.history), 'there is no student yet'
    first, before = evolution.latest.clone(), ranges_of(evolution)
    evolution.weight.observe(0.1)
    evolution.evolve()
    assert len(evolution.pool) == 6 and evolution.rounds == 2 and len(evolution.latest) == 2
    assert torch.equal(evolution.pool.samples[:4], first) and torch.equal(evolution.pool.samples[4:], evolution.latest)
    assert [step['round'] for step in evolution.history] == [0] * 4 + [1] * 2
    assert all(step['discrepancy'] > 0 for step in evolution.history[4:])
    assert equal_ranges(before, ranges_of(evolution)) != reobserve
    evolution.evolve()
    assert len(evolution.pool) == 6, 'a full pool gives room'


def test_a_round_of_joint_steps_adds_no_samples():
    evolution = prepared(joint_lr=0.1)
    before = evolution.pool.samples.clone()
    evolution.evolve()
    assert torch.equal(evolution.pool.samples, before) and evolution.rounds == 1


# ---------------------------------------------------------------------- batches
def test_a_batch_is_made_of_the_pool_flipped_and_rolled():
    plain, moved = prepared(augment=False), prepared()
    assert plain.draw(2).shape == (4, 3, *SIZE), 'no more than the pool holds'
    batch = moved.draw()
    assert len(batch) == 3 and torch.equal(moved.drawn.moved_back(batch), moved.pool.samples[moved.drawn.indices])
    batches = [moved.draw() for _ in range(8)]
    assert any(moved.drawn.shift) and not any(torch.equal(batches[0], other) for other in batches[1:])


@pytest.mark.parametrize('share', [0.0, 0.5])
def test_moved_samples_go_back_to_their_places(share):
    """As they lie in the pool, and those that were made for the batch nowhere."""
    evolution = prepared()
    if share:
        kept = evolution.pool.samples.clone()
        evolution.pool = FreshPool(6, SampleStream(PinkNoise(), SIZE, SPEC, 0), share, replace='random')
        evolution.pool.add(kept)
    for _ in range(4):
        before, batch = evolution.pool.samples.clone(), evolution.draw()
        drawn = evolution.drawn.indices
        assert bool((drawn == -1).any()) == bool(share) and bool((drawn >= 0).any())
        evolution._put_back(batch + torch.arange(1.0, 4).view(-1, 1, 1, 1))
        wanted = before.clone()
        for number, place in enumerate(drawn.tolist()):
            if place >= 0:
                wanted[place] += number + 1
        torch.testing.assert_close(evolution.pool.samples, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize('batches, sizes', [(1, [7]), (2, [4, 3]), (3, [3, 3, 1]), (7, [1] * 7)])
def test_parts_of_a_batch(batches, sizes):
    images = torch.arange(7.0).view(7, 1, 1, 1)
    parts = evolution_of()._parts(images, batches)
    assert [len(part) for part in parts] == sizes and torch.equal(torch.cat(list(parts)), images)


# ---------------------------------------------------------------------- the student's step
@pytest.mark.parametrize('logits_weight', [0.0, 0.5])
@pytest.mark.parametrize('batches', [1, 2, 5])
def test_a_step_has_the_gradients_of_the_whole_batch(batches, logits_weight):
    evolution, images = (
        prepared(logits_weight=logits_weight),
        torch.randn(5, 3, *SIZE, generator=torch.Generator().manual_seed(1)),
    )
    with torch.no_grad():  # a student that has something to learn
        evolution.student.model.head.weight.mul_(1.5)
    with torch.no_grad():
        taught = evolution.teacher.run(images, with_logits=True)
    found = evolution.student.run(images, with_logits=True)
    discrepancy = normalized_l1(found.parts, taught.parts)
    divergence = (taught.logits.softmax(1) * (taught.logits.log_softmax(1) - found.logits.log_softmax(1))).sum(1).mean()
    (discrepancy + logits_weight * divergence).backward()
    wanted = [p.grad.clone() for p in evolution.student.model.parameters()]
    evolution.student.model.zero_grad()
    value = evolution.learn(images, Tensor.backward, batches)
    assert float(value) == pytest.approx(float(discrepancy + logits_weight * divergence), rel=1e-4)
    assert evolution.weight.reference == pytest.approx(float(discrepancy), rel=1e-4)
    for parameter, gradient in zip(evolution.student.model.parameters(), wanted):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-8)
    assert all(p.grad is None for p in evolution.teacher.model.parameters())


def test_steps_bring_the_student_nearer():
    evolution = prepared(augment=False)
    with torch.no_grad():
        evolution.student.model.head.weight.add_(0.1)
    optimizer, values = torch.optim.Adam(evolution.student.model.parameters(), lr=1e-2), []
    for _ in range(10):
        optimizer.zero_grad()
        values.append(float(evolution.learn(evolution.draw(), Tensor.backward)))
        optimizer.step()
    assert sum(values[-3:]) < 0.7 * sum(values[:3])


def test_a_joint_step_moves_the_samples_of_the_pool_against_the_student():
    evolution = prepared(joint_lr=0.2, generator=dict(entropy_weight=0.0, prior_weight=0.0))
    with torch.no_grad():
        evolution.student.model.head.weight.mul_(1.2)
    before, images = evolution.pool.samples.clone(), evolution.draw()
    drawn = evolution.drawn.indices
    with torch.no_grad():
        hardness = [float(normalized_l1(evolution.student.outputs(images), evolution.teacher.outputs(images)))]
    evolution.learn(images, Tensor.backward)
    moved = {number for number in range(len(before)) if not torch.equal(before[number], evolution.pool.samples[number])}
    assert moved == set(drawn.tolist())
    images = evolution.drawn.moved(evolution.pool.samples[drawn])
    with torch.no_grad():
        hardness.append(float(normalized_l1(evolution.student.outputs(images), evolution.teacher.outputs(images))))
    assert hardness[1] > hardness[0]


def test_a_loss_that_is_not_finite_is_named():
    evolution = prepared()
    with torch.no_grad():
        evolution.student.model.head.bias.fill_(float('nan'))
    with pytest.raises(DataError, match='loss of the student became nan: lower dfq.lr'):
        evolution.learn(evolution.draw(), Tensor.backward)


# ---------------------------------------------------------------------- sources
@pytest.mark.parametrize('name', [name for name in source_names() if source_of(name).procedural])
def test_a_name_and_its_class_give_the_same_pictures_of_one_seed(name):
    """The first samples, those of later rounds, and with them the ranges."""
    stream = SampleStream(source_of(name), SIZE, SPEC, 5)
    named, spelled = evolution_of(source=name), evolution_of(SourcedEvolution, (stream,))
    for evolution in (named, spelled):
        evolution.prepare()
        evolution.evolve()
    assert torch.equal(named.pool.samples, spelled.pool.samples) and len(named.pool) == 6
    assert equal_ranges(ranges_of(named), ranges_of(spelled))
    assert torch.equal(
        named.latest, SampleStream(source_of(name), SIZE, SPEC, 5).source.draw([4, 5], SIZE, SPEC, stream.seed)
    )


def test_classes_are_those_of_samples_that_are_all_synthesized():
    mixed, whole, drawn = (
        evolution_of(SourcedEvolution, (SampleStream(source_of(given), SIZE, SPEC, 5),), classes='random')
        for given in (['pink', 'generated'], 'generated', 'pink')
    )
    for evolution, labels in ((mixed, False), (whole, True), (drawn, False)):
        evolution.prepare()
        assert (evolution.labels is not None) == labels
        assert bool(evolution.history) == (evolution is not drawn)
    assert len(whole.labels) == 4 and all('class' in step for step in whole.history)
    chosen = mixed.stream.source.members(range(4), mixed.stream.seed)
    numbers = (chosen == 0).nonzero().flatten().tolist()
    assert torch.equal(mixed.latest[chosen == 0], PinkNoise().draw(numbers, SIZE, SPEC, seed_of(mixed.stream.seed, 0)))


@pytest.mark.parametrize('kind', ['named', 'given', 'sourced', 'mixed'])
def test_a_resumed_evolution_goes_on_as_it_would_have(kind):

    def fresh():
        if kind in ('named', 'given'):
            return evolution_of()
        source = source_of('pink' if kind == 'sourced' else ['pink', 'generated'])
        return evolution_of(SourcedEvolution, (SampleStream(source, SIZE, SPEC, 5),))

    def going_on(evolution):
        evolution.evolve()
        images = evolution.draw()
        value = float(evolution.learn(images, Tensor.backward))
        return images, value, evolution.pool.samples.clone(), evolution.rounds, len(evolution.history)

    one = fresh()
    one.prepare(torch.randn(4, 3, *SIZE) if kind == 'given' else None)
    one.learn(one.draw(), Tensor.backward)
    state, weights = copy.deepcopy(one.state_dict()), copy.deepcopy(one.student.model.state_dict())
    other = fresh()
    other.student.model.load_state_dict(weights)
    other.load_state_dict(state)
    for ours, theirs in zip(going_on(other), going_on(one)):
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs


def test_a_state_of_before_names_had_numbers_goes_on_with_new_pictures():
    evolution = prepared()
    evolution.evolve()
    state = evolution.state_dict()
    wanted, again = evolution.make_samples(2, compete=False), evolution_of()
    del state['named']
    again.load_state_dict(state)
    assert torch.equal(again.make_samples(2, compete=False), wanted)


def test_synthesis_leaves_the_students_weights_as_they_were():
    evolution = prepared(SourcedEvolution, (SampleStream(Generated(), SIZE, SPEC, 5),))
    frozen = next(evolution.student.model.parameters()).requires_grad_(False)
    evolution.evolve()
    others = [p for p in evolution.student.model.parameters() if p is not frozen]
    assert not frozen.requires_grad and all(p.requires_grad and p.grad is None for p in others)
