# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Samples and student in turn, on small transformers with PyTorch alone."""

import copy

import pytest
import torch
from torch import Tensor
from toys import ToyTask, ToyTransformer

from psaq_mm.calibration import Calibration, CalibrationSettings, TrainingSettings
from psaq_mm.errors import ConfigError
from psaq_mm.pictures import Generated, ImageSpec, Mixture, PinkNoise, SampleStream
from psaq_mm.pictures.base import mixed as seed_of
from psaq_mm.psaq_vit import CoEvolution, SampleGenerator, Synthesis, SynthesisSettings
from psaq_mm.quantization import quantize_, set_mode

SIZE, SPEC = (8, 12), ImageSpec((120.0,) * 3, (60.0,) * 3)
HALF = Mixture([PinkNoise(), Generated()])


def evolution_of(source=None, generator=None, **settings):
    """A co-evolution that nothing has been done to yet."""
    student = ToyTransformer()
    quantize_(student, 'w4a8')
    teacher = copy.deepcopy(student).requires_grad_(False)
    set_mode(teacher, 'off')
    teacher, random = ToyTask(teacher, SPEC), torch.Generator().manual_seed(5)
    calibration = Calibration(
        ToyTask(student, SPEC), CalibrationSettings(batch_size=3, calibration_samples=4), random=random
    )
    maker = SampleGenerator(size=SIZE, batch_size=2, steps=2, **(generator or {}))
    classes = SynthesisSettings(classes=settings.pop('classes', None))
    synthesis = Synthesis(teacher, maker, SIZE, classes, random=random)
    settings = TrainingSettings(**{**dict(pool_size=6, evolve_every=2, evolve_samples=2), **settings})
    stream = SampleStream(source or Generated(), SIZE, SPEC, 5)
    return CoEvolution(teacher, calibration, stream, synthesis, settings, seed=5)


def prepared(*arguments, **settings):
    evolution = evolution_of(*arguments, **settings)
    evolution.prepare()
    return evolution


def test_a_round_adds_samples_that_compete():
    evolution = prepared()
    history = evolution.synthesis.history
    assert all('discrepancy' not in step for step in history), 'there is no student yet'
    first = evolution.latest.clone()
    evolution.synthesis.weight.observe(0.1)
    evolution.evolve()
    assert len(evolution.pool) == 6 and evolution.rounds == 2 and len(evolution.latest) == 2
    assert torch.equal(evolution.pool.samples[:4], first) and torch.equal(evolution.pool.samples[4:], evolution.latest)
    assert [step['round'] for step in history] == [0] * 4 + [1] * 2
    assert all(step['discrepancy'] > 0 for step in history[4:])
    weights = [step['weight'] for step in history[4:]]
    assert weights[0] != 1.0 and evolution.synthesis.weight.weight == weights[-1], 'it adapts in each step'


def test_a_weight_of_zero_leaves_the_student_out():
    evolution = prepared(generator=dict(discrepancy_weight=0.0))
    evolution.evolve()
    assert all('discrepancy' not in step for step in evolution.synthesis.history)


def test_samples_compete_for_the_discrepancy_alone():
    evolution = prepared(logits_weight=0.5)
    with torch.no_grad():
        evolution.student.model.head.weight.mul_(1.5)
    losses = evolution.learn(evolution.draw(), Tensor.backward)
    assert evolution.synthesis.weight.reference == float(losses.discrepancy) < float(losses.loss)


def test_classes_are_drawn_once_a_sample():
    evolution, free = prepared(classes='random'), prepared()
    assert len(evolution.synthesis.labels) == 4 and free.synthesis.labels is None
    assert all('class' in step for step in evolution.synthesis.history)
    assert not any('class' in step for step in free.synthesis.history)


def test_a_mixture_synthesizes_its_part_and_draws_the_other():
    evolution = prepared(HALF)
    chosen = HALF.members(range(4), evolution.stream.seed)
    numbers = (chosen == 0).nonzero().flatten().tolist()
    wanted = PinkNoise().draw(numbers, SIZE, SPEC, seed_of(evolution.stream.seed, 0))
    assert 0 < len(numbers) < 4 and torch.equal(evolution.latest[chosen == 0], wanted)
    assert len(evolution.synthesis.history) == 2 * -(-(4 - len(numbers)) // 2)


def going_on(evolution):
    evolution.evolve()
    images = evolution.draw()
    loss = float(evolution.learn(images, Tensor.backward).loss)
    weight = evolution.synthesis.weight.state_dict()
    return images, loss, evolution.pool.samples.clone(), evolution.rounds, len(evolution.synthesis.history), weight


@pytest.mark.parametrize('source', [None, HALF])
@pytest.mark.parametrize('given', [False, True])
def test_a_resumed_evolution_goes_on_as_it_would_have(source, given):
    one, other = evolution_of(source), evolution_of(source)
    one.prepare(torch.randn(4, 3, *SIZE) if given else None)
    one.learn(one.draw(), Tensor.backward)
    state = copy.deepcopy(one.state_dict())
    other.student.model.load_state_dict(copy.deepcopy(one.student.model.state_dict()))
    if source is None:  # the release before kept no position of synthesized samples
        del state['stream']
    other.load_state_dict(state)
    for ours, theirs in zip(going_on(other), going_on(one)):
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs


def test_synthesis_leaves_the_students_weights_as_they_were():
    evolution = prepared()
    parameter = next(evolution.student.model.parameters()).requires_grad_(False)
    evolution.evolve()
    others = [p for p in evolution.student.model.parameters() if p is not parameter]
    assert not parameter.requires_grad and all(p.requires_grad and p.grad is None for p in others)


def test_progress_tells_the_steps_and_the_time_that_is_left():
    evolution, seen = evolution_of(), []
    evolution.synthesis.progress = seen.append
    evolution.synthesis.make(3)
    assert [entry['step'] for entry in seen] == [0, 1, 0, 1] and {entry['steps'] for entry in seen} == {2}
    assert seen[1]['eta'] == 0 < seen[0]['eta']


def test_classes_that_are_not_known_are_named():
    with pytest.raises(ConfigError, match="^classes='cats' is not known"):
        SynthesisSettings(classes='cats')
