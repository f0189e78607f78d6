# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The pool of pictures that a student learns from."""

import math

import pytest
import torch

from psaq_mm.calibration import SamplePool
from psaq_mm.errors import DataError


def numbered(*values):
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


def numbers(samples):
    return sorted(samples[:, 0, 0, 0].tolist())


def held(pool):
    return numbers(pool.samples)


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def filled(*values, capacity=8):
    pool = SamplePool(capacity)
    pool.add(numbered(*values))
    return pool


def test_a_full_pool_replaces_random_samples():
    left = set()
    for seed in range(20):
        pool = SamplePool(3, seed)
        pool.add(numbered(1, 2, 3))
        pool.add(numbered(4))
        assert len(pool) == 3 and 4 in held(pool)
        left |= {1, 2, 3} - set(held(pool))
    assert left == {1, 2, 3}


def test_a_pool_partly_filled_takes_the_free_places_first():
    pool = filled(1, 2, 3, capacity=4)
    pool.add(numbered(4, 5))
    assert {4, 5} <= set(held(pool)) and len(held(pool)) == 4 and len({1, 2, 3} & set(held(pool))) == 2


def test_drawn_samples_are_different_copies():
    pool = filled(*range(8))
    images = pool.draw(5, random())
    assert len(set(numbers(images))) == 5
    images += 100
    assert max(held(pool)) == 7


def test_a_part_of_a_batch_is_that_of_the_whole():
    pool = filled(*range(8))
    whole, part = pool.draw(6, random(3)), pool.draw(6, random(3), only=[1, 4])
    assert torch.equal(part, whole[[1, 4]])


def test_a_resumed_pool_goes_on_the_same(tmp_path):
    pool = SamplePool(4, seed=3)
    pool.add(numbered(1, 2, 3, 4))
    torch.save(pool.state_dict(), tmp_path / 'pool.pth')
    other = SamplePool(4)
    other.load_state_dict(torch.load(tmp_path / 'pool.pth', weights_only=True))
    for each in (pool, other):
        each.add(numbered(7, 8))
    assert torch.equal(pool.draw(3, random()), other.draw(3, random()))


def test_a_state_of_the_release_before_is_read():
    """It also held scores, ages and a count, of policies that are gone."""
    pool = filled(1, 2)
    state = dict(pool.state_dict(), scores=torch.zeros(2), ages=torch.arange(2), added=2)
    other = SamplePool(8)
    other.load_state_dict(state)
    assert held(other) == [1, 2]


def test_an_empty_pool_resumes_too():
    other = SamplePool(2)
    other.load_state_dict(SamplePool(2).state_dict())
    assert len(other) == 0


def test_misuse_is_named():
    pool = SamplePool(2)
    for call, match in [
        (lambda: SamplePool(0), 'capacity=0'),
        (lambda: pool.draw(1, random()), 'empty'),
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
        (lambda: pool.draw(2, random()), 'batch=2'),
        (lambda: pool.add(torch.zeros(1, 1, 3, 3)), r'\(1, 3, 3\)'),
        (lambda: SamplePool(1).load_state_dict(filled(1, 2).state_dict()), '2 samples, more than capacity=1'),
    ]:
        with pytest.raises(DataError, match=match):
            call()
