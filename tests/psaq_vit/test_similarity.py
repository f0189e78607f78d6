# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import contextlib
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from psaq_vit import reference

from psaq_mm.errors import DataError
from psaq_mm.psaq_vit import patch_similarity_entropy, similarity


def value_and_grad(function, tokens, **kwargs):
    tokens = tokens.clone().requires_grad_()
    value = function(tokens, **kwargs)
    value.backward()
    return value.detach(), tokens.grad


def random_tokens(*shape, spread=1.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape[-1], generator=generator, dtype=dtype)
    return common + spread * torch.randn(shape, generator=generator, dtype=dtype)


@contextlib.contextmanager
def memory(chunk=None, keep_bytes=16 << 20):
    """Other sizes of what is computed at a time and of what is kept, so that small tensors take every path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity, '_KEEP_BYTES', keep_bytes)
        if chunk:
            patch.setattr(similarity, '_chunk_on', lambda device: chunk)
        yield


def assert_same(tokens, rtol=1e-11, chunk=None, keep_bytes=16 << 20, **kwargs):
    with memory(chunk, keep_bytes):
        value, grad = value_and_grad(patch_similarity_entropy, tokens, **kwargs)
    expected, expected_grad = value_and_grad(reference.patch_similarity_entropy, tokens, **kwargs)
    torch.testing.assert_close(value, expected, rtol=rtol, atol=rtol)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=rtol * max(1e-3, float(expected_grad.abs().max())))


@settings(max_examples=25, deadline=None)
@given(
    images=st.integers(1, 3),
    per_image=st.integers(1, 3),
    length=st.integers(1, 40),
    spread=st.sampled_from([0.03, 0.3, 3.0]),
    chunk=st.sampled_from([1, 50, 3000, None]),
    keep=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_plain_formula(images, per_image, length, spread, chunk, keep, seed):
    tokens = random_tokens(images * per_image, length, 4, spread=spread, seed=seed)
    assert_same(tokens, groups_per_image=per_image, chunk=chunk, keep_bytes=1 << 30 if keep else 0)


@settings(max_examples=30, deadline=None)
@given(images=st.integers(1, 3), length=st.integers(2, 12), keep=st.booleans(), seed=st.integers(0, 99))
def test_padded_queries_take_no_part(images, length, keep, seed):
    tokens = random_tokens(images * 4, length, 4, seed=seed)
    valid = torch.rand(4, length, generator=torch.Generator().manual_seed(seed)) > 0.4
    valid[1] = False  # a window of padding alone
    valid[0, 0] = True
    options = dict(valid=valid, groups_per_image=4)
    assert_same(tokens, keep_bytes=1 << 30 if keep else 0, chunk=100, **options)
    _, grad = value_and_grad(patch_similarity_entropy, tokens, **options)
    assert not grad[~valid.repeat(images, 1)].any()
    changed = torch.where(valid.repeat(images, 1).unsqueeze(2), tokens, torch.full_like(tokens, 7))
    assert patch_similarity_entropy(changed, **options) == patch_similarity_entropy(tokens, **options)


def test_a_mask_that_holds_nothing_back_changes_nothing():
    tokens = random_tokens(4, 9, 4)
    full = torch.ones(2, 9, dtype=torch.bool)
    assert patch_similarity_entropy(tokens, full) == patch_similarity_entropy(tokens)


def test_gradient_is_the_slope_of_the_value_on_a_fixed_grid():
    tokens = random_tokens(2, 7, 3).requires_grad_()
    torch.autograd.gradcheck(lambda t: patch_similarity_entropy(t, value_range=(-0.2, 1.0), bandwidth=0.1), tokens)


@pytest.mark.parametrize('shape,per_image', [((2, 196, 64), 1), ((2, 197, 64), 1), ((24, 49, 32), 12)])
def test_float32_is_close_to_float64(shape, per_image):
    tokens = random_tokens(*shape, spread=0.5)
    value, grad = value_and_grad(patch_similarity_entropy, tokens.float(), groups_per_image=per_image)
    expected, expected_grad = value_and_grad(reference.patch_similarity_entropy, tokens, groups_per_image=per_image)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=2e-4 * float(expected_grad.abs().max()))


def test_broadcast_similarities_of_the_released_code_give_the_same():
    tokens = random_tokens(2, 20, 8)
    expected = reference.patch_similarity_entropy(tokens, broadcast=True)
    torch.testing.assert_close(patch_similarity_entropy(tokens), expected, rtol=1e-12, atol=1e-12)


def test_equal_tokens_have_no_entropy_and_no_gradient():
    value, grad = value_and_grad(patch_similarity_entropy, torch.ones(2, 9, 4))
    assert abs(value) < 1e-4 and grad.isfinite().all()


@pytest.mark.parametrize('tokens', [torch.zeros(2, 9, 4), torch.full((2, 9, 4), 1e-30)])
def test_tokens_without_direction_give_zero_gradient_and_no_nan(tokens):
    tokens[0, :4] = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    value, grad = value_and_grad(patch_similarity_entropy, tokens)
    assert value.isfinite() and grad.isfinite().all()
    assert not grad[0, 4:].any() and not grad[1].any()
    assert_same(tokens.double())


def test_scale_of_tokens_does_not_matter():
    tokens = random_tokens(2, 16, 4)
    torch.testing.assert_close(patch_similarity_entropy(1000 * tokens), patch_similarity_entropy(tokens))


def test_diverse_patches_have_more_entropy_than_equal_ones():
    levels = [
        float(patch_similarity_entropy(random_tokens(4, 64, 16, spread=s), value_range=(-1.0, 1.0)))
        for s in (0.03, 0.1, 0.3)
    ]
    assert levels[0] < levels[1] - 1 < levels[2] - 2


def test_range_can_be_shared_between_ranks():
    both = random_tokens(2, 12, 4)
    reduced = []

    def reduce(low, high):
        reduced.append((float(low), float(high)))
        return both_low, both_high

    ranges = []
    patch_similarity_entropy(both, reduce_range=lambda low, high: ranges.append((low, high)) or (low, high))
    ((both_low, both_high),) = ranges
    halves = [value_and_grad(patch_similarity_entropy, half, reduce_range=reduce) for half in both.split(1)]
    value, grad = value_and_grad(patch_similarity_entropy, both)
    torch.testing.assert_close((halves[0][0] + halves[1][0]) / 2, value)
    torch.testing.assert_close(torch.cat([halves[0][1], halves[1][1]]) / 2, grad)
    assert min(low for low, _ in reduced) == float(both_low)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_tokens_are_computed_in_float32(dtype):
    tokens = random_tokens(2, 40, 8).to(dtype)
    value, grad = value_and_grad(patch_similarity_entropy, tokens)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert value == patch_similarity_entropy(tokens.float())


def test_autocast_changes_nothing():
    tokens = random_tokens(2, 40, 8, dtype=torch.float32)
    expected = value_and_grad(patch_similarity_entropy, tokens)
    with torch.autocast('cpu', torch.bfloat16):
        found = value_and_grad(patch_similarity_entropy, tokens)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_nothing_of_the_size_of_the_kernel_is_saved():
    tokens = torch.randn(2, 100, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        with memory(keep_bytes=0):
            patch_similarity_entropy(tokens)
    assert saved and max(saved) == tokens.numel()


def test_nan_is_loud():
    tokens = torch.randn(1, 5, 3)
    tokens[0, 2] = math.nan
    assert patch_similarity_entropy(tokens).isnan()


@pytest.mark.parametrize(
    'tokens,options,match',
    [
        (torch.zeros(3, 4), {}, r'\(3, 4\)'),
        (torch.zeros(0, 4, 2), {}, 'non-empty'),
        (torch.zeros(2, 4, 2, dtype=torch.int64), {}, 'int64'),
        (torch.zeros(4, 4, 2), dict(groups_per_image=3), 'groups_per_image=3'),
        (torch.zeros(4, 4, 2), dict(points=1), 'points=1'),
        (torch.zeros(4, 4, 2), dict(bandwidth=0.0), 'bandwidth=0'),
        (torch.zeros(4, 4, 2), dict(valid=torch.ones(3, 4, dtype=torch.bool)), r'valid of shape \(3, 4\)'),
        (torch.zeros(4, 4, 2), dict(valid=torch.zeros(4, 4, dtype=torch.bool)), 'image 0 has no valid token'),
    ],
)
def test_bad_input_is_named(tokens, options, match):
    with pytest.raises(DataError, match=match):
        patch_similarity_entropy(tokens, **options)
