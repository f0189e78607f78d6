# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import math

import pytest
import torch

from psaq_mm.calibration import normalized_l1
from psaq_mm.errors import DataError
from psaq_mm.psaq_vit import AdaptiveWeight, SamplePool


def maps(seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(2, 3, s, s, generator=generator) for s in (8, 4)]


def test_discrepancy_of_hand_made_maps():
    teacher = torch.tensor([[0.0, 2.0], [10.0, 30.0]])  # mean absolute deviations 1 and 10
    student = torch.tensor([[1.0, 2.0], [10.0, 25.0]])  # mean absolute differences 0.5 and 2.5
    assert normalized_l1(student, teacher, 'none').tolist() == [0.5, 0.25]
    assert float(normalized_l1([student], [teacher])) == 0.375


def test_scales_weigh_alike_whatever_their_size():
    teacher, student = maps(0), maps(1)
    scaled = [m * s for m, s in zip(teacher, (1000.0, 0.001))], [m * s for m, s in zip(student, (1000.0, 0.001))]
    torch.testing.assert_close(normalized_l1(scaled[1], scaled[0]), normalized_l1(student, teacher))
    assert float(normalized_l1(teacher, teacher)) == 0


def test_samples_do_not_couple():
    teacher, student = maps(0), maps(1)
    alone = [float(normalized_l1([s[i : i + 1] for s in student], [t[i : i + 1] for t in teacher])) for i in range(2)]
    torch.testing.assert_close(normalized_l1(student, teacher, 'none'), torch.tensor(alone))


def test_divisor_takes_no_gradient_but_the_difference_does():
    teacher, student = torch.randn(1, 6, requires_grad=True), torch.randn(1, 6, requires_grad=True)
    normalized_l1(student, teacher).backward()
    torch.testing.assert_close(teacher.grad, -student.grad)


def test_constant_teacher_and_half_precision_are_finite():
    assert normalized_l1(torch.zeros(1, 4), torch.ones(1, 4)).isfinite()
    assert normalized_l1(maps(1)[0].half(), maps(0)[0].half()).dtype == torch.float32


@pytest.mark.parametrize(
    'student,teacher,options,match',
    [
        ([], [], {}, '0 and 0 feature maps'),
        (maps(), maps()[:1], {}, '2 and 1 feature maps'),
        (maps(), maps()[::-1], {}, r'feature map 0 is \(2, 3, 8, 8\)'),
        (maps(), maps(), dict(reduction='sum'), "reduction='sum'"),
        (
            [torch.zeros(2, 1), torch.zeros(3, 1)],
            [torch.zeros(2, 1), torch.zeros(3, 1)],
            dict(reduction='none'),
            r'\[2, 3\]',
        ),
    ],
)
def test_maps_that_do_not_fit_are_named(student, teacher, options, match):
    with pytest.raises(DataError, match=match):
        normalized_l1(student, teacher, **options)


def numbered(*values):
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


def held(pool):
    return sorted(pool.samples[:, 0, 0, 0].tolist())


def test_full_pool_replaces_by_policy():
    oldest, easiest, random = (SamplePool(3, policy) for policy in ('oldest', 'easiest', 'random'))
    for pool in (oldest, easiest, random):
        pool.add(numbered(1, 2, 3), torch.tensor([5.0, 1.0, 3.0]))
        pool.add(numbered(4), torch.tensor([9.0]))
        assert len(pool) == 3 and 4 in held(pool)
    assert held(oldest) == [2, 3, 4] and held(easiest) == [1, 3, 4]
    oldest.add(numbered(5, 6))
    assert held(oldest) == [4, 5, 6]


def test_drawn_samples_are_different_copies_and_go_back():
    pool = SamplePool(8)
    pool.add(numbered(*range(8)))
    images, indices = pool.draw(5)
    assert len(set(indices.tolist())) == 5
    images += 100
    assert max(held(pool)) == 7
    pool.update(indices, images, torch.arange(5.0))
    assert sum(v >= 100 for v in held(pool)) == 5
    torch.testing.assert_close(pool.scores[indices], torch.arange(5.0))
    assert torch.equal(pool[int(indices[0])], images[0])


def test_pool_partly_filled_takes_the_free_places_first():
    pool = SamplePool(4)
    pool.add(numbered(1, 2, 3))
    indices = pool.add(numbered(4, 5))
    assert indices.tolist() == [3, 0] and held(pool) == [2, 3, 4, 5]


@pytest.mark.parametrize('policy', ['oldest', 'random', 'easiest'])
def test_resumed_pool_goes_on_the_same(policy, tmp_path):
    pool = SamplePool(4, policy, seed=3)
    pool.add(
        numbered(
            1,
            2,
            3,
            4,
        ),
        torch.rand(4),
    )
    pool.draw(2)
    torch.save(pool.state_dict(), tmp_path / 'pool.pth')
    other = SamplePool(4, policy)
    other.load_state_dict(torch.load(tmp_path / 'pool.pth', weights_only=True))
    for each in (pool, other):
        each.add(numbered(7, 8), torch.tensor([0.5, 0.6]))
    first, second = pool.draw(3), other.draw(3)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_empty_pool_resumes_too():
    other = SamplePool(2)
    other.load_state_dict(SamplePool(2).state_dict())
    assert len(other) == 0


def test_half_precision_storage_gives_float32():
    pool = SamplePool(2, dtype=torch.float16)
    pool.add(numbered(1, 2))
    assert pool.draw(2)[0].dtype == pool.samples.dtype == torch.float32
    with pytest.raises(DataError, match='float16'):
        pool.add(numbered(1e6))


def test_misuse_of_the_pool_is_named():
    pool = SamplePool(2)
    for call, match in [
        (lambda: SamplePool(0), 'capacity=0'),
        (lambda: SamplePool(1, 'newest'), "replace='newest'"),
        (lambda: pool.draw(1), 'empty'),
        (lambda: pool.samples, 'empty'),
        (lambda: pool.add(numbered(1, 2, 3)), '3 samples do not fit'),
        (lambda: pool.add(numbered(math.nan)), 'not finite'),
        (lambda: pool.add(torch.zeros(1, 2, 2)), r'\(1, 2, 2\)'),
        (lambda: pool.load_state_dict({}), 'lacks'),
    ]:
        with pytest.raises(DataError, match=match):
            call()
    pool.add(numbered(1))
    for call, match in [
        (lambda: pool.draw(2), 'batch=2'),
        (lambda: pool.add(torch.zeros(1, 1, 3, 3)), r'\(1, 3, 3\)'),
        (lambda: pool.update(torch.tensor([1]), numbered(1)), r'indices \[1\]'),
        (lambda: pool.update(torch.tensor([0]), scores=torch.zeros(2)), '2 scores for 1'),
    ]:
        with pytest.raises(DataError, match=match):
            call()
    with pytest.raises(IndexError):
        pool[1]


def test_weight_rises_on_easy_samples_and_falls_on_hard_ones_within_bounds():
    weight = AdaptiveWeight(target=1.5, bounds=(0.5, 2.0))
    assert weight(100.0) == 1.0  # nothing to compare with yet
    weight.observe(0.2)
    assert weight(0.3) == pytest.approx(1.0)
    assert weight(0.1) > 1.0
    assert [weight(0.0) for _ in range(50)][-1] == 2.0
    assert [weight(50.0) for _ in range(50)][-1] == 0.5


def test_weight_holds_a_responding_discrepancy_at_its_target():
    weight = AdaptiveWeight(weight=1.0, target=1.5)
    weight.observe(0.2)
    hardness = 0.0
    for _ in range(200):
        hardness = 0.5 * weight.weight + 0.25
        weight(0.2 * hardness)
    assert hardness == pytest.approx(1.5, rel=0.02)


def test_weight_resumes():
    weight, other = AdaptiveWeight(), AdaptiveWeight()
    weight.observe(0.2)
    weight(0.7)
    other.load_state_dict(weight.state_dict())
    weight.observe(0.1), other.observe(0.1)
    assert weight(0.4) == other(0.4) and other.reference == weight.reference == pytest.approx(0.19)


@pytest.mark.parametrize(
    'call,match',
    [
        (lambda: AdaptiveWeight(weight=20.0), 'weight=20'),
        (lambda: AdaptiveWeight(target=0.0), 'target=0'),
        (lambda: AdaptiveWeight(rate=2.0), 'rate=2'),
        (lambda: AdaptiveWeight(bounds=(0.1, math.inf)), 'bounds'),
        (lambda: AdaptiveWeight()(math.nan), 'discrepancy=nan'),
        (lambda: AdaptiveWeight().observe(-1.0), 'discrepancy=-1'),
        (lambda: AdaptiveWeight().load_state_dict({}), 'lacks'),
    ],
)
def test_misuse_of_the_weight_is_named(call, match):
    with pytest.raises(DataError, match=match):
        call()
