# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The weight of the discrepancy in the loss of the samples."""

import math

import pytest

from psaq_mm.errors import DataError
from psaq_mm.psaq_vit import AdaptiveWeight


def test_weight_rises_on_easy_samples_and_falls_on_hard_ones_within_bounds():
    weight = AdaptiveWeight(target=1.5, bounds=(0.5, 2.0))
    assert weight.follow(100.0) == 1.0  # nothing to compare with yet
    weight.observe(0.2)
    assert weight.follow(0.3) == pytest.approx(1.0)
    assert weight.follow(0.1) > 1.0
    assert [weight.follow(0.0) for _ in range(50)][-1] == 2.0
    assert [weight.follow(50.0) for _ in range(50)][-1] == 0.5


def test_weight_holds_a_responding_discrepancy_at_its_target():
    weight = AdaptiveWeight(weight=1.0, target=1.5)
    weight.observe(0.2)
    hardness = 0.0
    for _ in range(200):
        hardness = 0.5 * weight.weight + 0.25
        weight.follow(0.2 * hardness)
    assert hardness == pytest.approx(1.5, rel=0.02)


def test_weight_resumes():
    weight, other = AdaptiveWeight(), AdaptiveWeight()
    weight.observe(0.2)
    weight.follow(0.7)
    other.load_state_dict(weight.state_dict())
    weight.observe(0.1), other.observe(0.1)
    assert weight.follow(0.4) == other.follow(0.4) and other.reference == weight.reference == pytest.approx(0.19)


@pytest.mark.parametrize(
    'call,match',
    [
        (lambda: AdaptiveWeight(weight=20.0), 'weight=20'),
        (lambda: AdaptiveWeight(target=0.0), 'target=0'),
        (lambda: AdaptiveWeight(rate=2.0), 'rate=2'),
        (lambda: AdaptiveWeight(bounds=(0.1, math.inf)), 'bounds'),
        (lambda: AdaptiveWeight().follow(math.nan), 'discrepancy=nan'),
        (lambda: AdaptiveWeight().observe(-1.0), 'discrepancy=-1'),
        (lambda: AdaptiveWeight().load_state_dict({}), 'lacks'),
    ],
)
def test_misuse_of_the_weight_is_named(call, match):
    with pytest.raises(DataError, match=match):
        call()
