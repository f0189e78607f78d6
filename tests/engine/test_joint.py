"""Samples that move in the student's own steps: the gradients, the pool, and the run of the command line."""

import copy

import pytest
import torch
from classifier_models import SIZES, build_classifier
from tiny_classifier import ClassifierProject

from psaq_mm.calibration import normalized_l1
from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.engine.checkpoint import read_checkpoint
from psaq_mm.errors import ConfigError
from psaq_mm.models import TaskModel
from psaq_mm.pictures import ImageSpec, PinkNoise, SampleStream
from psaq_mm.psaq_vit import CoEvolution, CoEvolutionSettings, FreshPool, SampleGenerator
from psaq_mm.quantization import set_mode

pytestmark = pytest.mark.filterwarnings('ignore')

NAME = 'timm-vit'
SIZE = (SIZES[NAME],) * 2


def evolution(joint_lr=0.05, generator=None, **settings):
    """A prepared one, whose samples are 1/f noise."""
    student = build_classifier(NAME, quant=dict(preset='w4a8', scope='full'))
    teacher = copy.deepcopy(student)
    set_mode(teacher, 'off')
    teacher.requires_grad_(False)
    pair = (TaskModel(m, ('blocks',), block_stride=1) for m in (teacher, student))
    found = CoEvolution(
        *pair,
        SampleGenerator(size=SIZE, batch_size=4, **(generator or {})),
        CoEvolutionSettings(
            size=SIZE,
            scope='full',
            batch_size=4,
            calibration_samples=6,
            pool_size=6,
            evolve_samples=2,
            source='pink',
            joint_lr=joint_lr,
            **settings,
        ),
    )
    found.prepare()
    return found


def gradients(one):
    return {name: p.grad for name, p in one.student.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('batches, settings', [(1, {}), (2, dict(logits_weight=0.5))])
def test_the_student_learns_as_it_does_without(batches, settings):
    plain, joint = evolution(0.0, **settings), evolution(**settings)
    images = plain.draw()
    assert torch.equal(joint.draw(), images)
    losses = [one.learn(images, torch.Tensor.backward, batches) for one in (plain, joint)]
    torch.testing.assert_close(losses[1], losses[0])
    expected, found = gradients(plain), gradients(joint)
    assert len(expected) > 20 and set(expected) == set(found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


def test_samples_go_up_the_discrepancy_and_back_to_their_places():
    one = evolution(generator=dict(entropy_weight=0.0, prior_weight=0.0))
    before, spec = one.pool.samples.clone(), one.teacher.image_spec
    one.learn(one.draw(), torch.Tensor.backward)
    taken = one.drawn.indices
    untouched = [i for i in range(6) if i not in taken.tolist()]
    after = one.pool.samples
    assert len(untouched) == 2 and torch.equal(after[untouched], before[untouched])
    values = spec.to_standard(one.drawn.moved(before[taken])).requires_grad_()
    images = spec.from_standard(values)
    (gradient,) = torch.autograd.grad(normalized_l1(one.student.outputs(images), one.teacher.outputs(images)), values)
    expected = values.detach() + 0.05 * gradient / gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
    expected = one.drawn.moved_back(spec.clamp(spec.from_standard(expected)))
    torch.testing.assert_close(after[taken], expected, rtol=1e-3, atol=1e-3)


def test_without_a_weight_samples_follow_patch_similarity_alone():
    one, still = (
        evolution(generator=dict(discrepancy_weight=0.0)),
        evolution(generator=dict(discrepancy_weight=0.0, entropy_weight=0.0, prior_weight=0.0)),
    )
    for found in (one, still):
        found.learn(found.draw(), torch.Tensor.backward)
        found.moved = (found.pool.samples - evolution(0.0).pool.samples).abs().amax((1, 2, 3))
    assert (one.moved > 0).sum() == 4 and not still.moved.any()


def test_rounds_bring_new_ranges_and_no_samples():
    one = evolution(evolve_every=2)
    scales = {n: b.clone() for n, b in one.student.model.named_buffers() if n.endswith('.scale')}
    with torch.no_grad():
        next(module for name, module in one.student.model.named_modules() if name.endswith('qkv')).weight.mul_(2)
    before = one.pool.samples.clone()
    assert not one.due(1) and one.due(2)
    one.evolve()
    assert torch.equal(one.pool.samples, before) and one.rounds == 1
    assert any(not torch.equal(b, scales[n]) for n, b in one.student.model.named_buffers() if n.endswith('.scale'))
    assert not evolution(evolve_every=2, reobserve=False).due(2), 'nothing is left to be done'


def test_fresh_samples_have_no_place_to_go_back_to():
    one = evolution()
    samples = one.pool.samples
    one.pool = FreshPool(6, SampleStream(PinkNoise(), SIZE, ImageSpec(), 0, 'fresh'), 0.5, replace='random')
    one.pool.add(samples)
    one.learn(one.draw(), torch.Tensor.backward)
    assert one.drawn.indices.tolist()[:2] == [-1, -1]
    moved = (one.pool.samples != samples).flatten(1).any(1)
    assert sorted(one.drawn.indices[2:].tolist()) == moved.nonzero().flatten().tolist()


def test_a_rate_below_zero_is_named():
    with pytest.raises(ConfigError, match='dfq.joint_lr=-0.1'):
        CoEvolutionSettings(joint_lr=-0.1)


def test_a_run_is_resumed_to_the_same_weights_and_samples(tmp_path):
    pytest.importorskip('mmpretrain')
    project = ClassifierProject(tmp_path)
    settings = dict(
        size=(32, 32),
        batch_size=4,
        calibration_samples=6,
        pool_size=6,
        evolve_every=2,
        evolve_samples=2,
        iters=4,
        joint_lr=0.05,
        checkpoint_interval=2,
        amp='bfloat16',
        generator=dict(batch_size=4, steps=2),
    )
    config = str(project.config('w4a8', 'joint.py', **settings))
    whole, part = tmp_path / 'whole', tmp_path / 'part'
    assert dfq_train([config, '--work-dir', str(whole)]) == 0
    part.mkdir()
    (part / 'iter_2.pth').write_bytes((whole / 'iter_2.pth').read_bytes())
    assert dfq_train([config, '--work-dir', str(part), '--resume']) == 0
    expected, found = (read_checkpoint(folder / 'iter_4.pth') for folder in (whole, part))
    first = read_checkpoint(whole / 'iter_2.pth')
    pools = [c['psaq_mm']['evolution']['pool']['samples'] for c in (first, expected, found)]
    assert torch.equal(pools[1], pools[2]) and not torch.equal(pools[0], pools[1])
    for key, value in expected['state_dict'].items():
        assert torch.equal(found['state_dict'][key], value), key
