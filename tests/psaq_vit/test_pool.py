# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Batches that are made anew, beside those that are replayed."""

import pytest
import torch

from psaq_mm.errors import DataError
from psaq_mm.pictures import ImageSpec, PinkNoise, SampleStream
from psaq_mm.psaq_vit import FreshPool, SamplePool

SPEC = ImageSpec()


def stream(seed=0):
    return SampleStream(PinkNoise(), (6, 6), SPEC, seed)


def filled(share, seed=0):
    pool = FreshPool(8, stream(seed), share, seed=seed)
    pool.add(torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 6, 6).clone())
    return pool


def test_every_batch_is_fresh():
    pool, expected = filled(1.0), stream()
    for batch in (4, 12, 1):  # also more than the pool holds
        images, indices = pool.draw(batch)
        assert torch.equal(images, expected.take(batch)) and indices.tolist() == [-1] * batch
    assert pool.made == 17 and len(pool) == 8


@pytest.mark.parametrize(
    'share, batch, fresh', [(0.5, 4, 2), (0.25, 8, 2), (0.01, 4, 1), (0.99, 4, 3), (0.5, 1, 1), (0.3, 2, 1)]
)
def test_a_share_of_each_batch_is_fresh_and_the_rest_is_replayed(share, batch, fresh):
    pool = filled(share)
    images, indices = pool.draw(batch)
    assert (indices == -1).sum() == fresh and len(set(indices[fresh:].tolist())) == batch - fresh
    assert torch.equal(images[:fresh], stream().take(fresh))
    assert images[fresh:, 0, 0, 0].tolist() == indices[fresh:].tolist()


def test_replayed_samples_are_chosen_as_ever():
    plain = SamplePool(8)
    plain.add(filled(0.5).samples)
    replayed, places = plain.draw(2, torch.Generator().manual_seed(3))
    images, indices = filled(0.5).draw(4, torch.Generator().manual_seed(3))
    assert torch.equal(images[2:], replayed) and torch.equal(indices[2:], places)


def test_a_resumed_pool_goes_on_exactly():
    pool = filled(0.5)
    pool.draw(6)
    state, following = pool.state_dict(), pool.draw(6)
    again = FreshPool(8, stream(), 0.5)
    again.load_state_dict(state)
    for one, other in zip(again.draw(6), following):
        assert torch.equal(one, other)
    assert again.made == pool.made == 6


@pytest.mark.parametrize('share', [0, -0.1, 1.1])
def test_a_share_out_of_range(share):
    with pytest.raises(DataError, match=f'share={share}'):
        FreshPool(4, stream(), share)


def test_more_than_there_is_to_replay():
    with pytest.raises(DataError, match='cannot be drawn from a pool of 8'):
        filled(0.1).draw(20)
