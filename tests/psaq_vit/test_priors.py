# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import math
from types import SimpleNamespace

import pytest
import torch

from psaq_mm.errors import DataError
from psaq_mm.pictures import GaussianNoise, ImageSpec, PinkNoise
from psaq_mm.psaq_vit import total_variation, variation_prior, variation_target
from psaq_mm.psaq_vit.priors import REFERENCE_SHAPE

IMAGENET = ImageSpec((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
CAFFE = ImageSpec((103.53, 116.28, 123.675), (1.0, 1.0, 1.0))
SPECS = [IMAGENET, CAFFE, ImageSpec(channels=1), ImageSpec((0.5,) * 4, (0.25,) * 4, max_value=1.0)]


def test_total_variation_of_a_hand_made_picture():
    picture = torch.tensor([[[[0.0, 1.0], [3.0, 7.0]]]])
    # right 1, 4; below 3, 6; falling 7; rising 3 - 1
    assert float(total_variation(picture)) == pytest.approx(math.sqrt(17) + math.sqrt(45) + 7 + 2)


def test_total_variation_takes_its_norms_over_the_batch():
    picture = torch.randn(1, 3, 8, 9)
    torch.testing.assert_close(total_variation(picture.repeat(4, 1, 1, 1)), 2 * total_variation(picture))
    with pytest.raises(DataError, match=r'\(3, 8, 9\)'):
        total_variation(picture[0])


@pytest.mark.parametrize('shape', [(2, 3, 7, 5), (1, 2, 1, 6), (3, 1, 4, 1), (2, 3, 300, 301)])
def test_total_variation_and_its_gradient_are_those_of_the_plain_formula(shape):
    picture = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    plain = (
        (picture[..., :-1] - picture[..., 1:]).norm()
        + (picture[..., :-1, :] - picture[..., 1:, :]).norm()
        + (picture[..., :-1, :-1] - picture[..., 1:, 1:]).norm()
        + (picture[..., 1:, :-1] - picture[..., :-1, 1:]).norm()
    )
    found = total_variation(picture)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(*(torch.autograd.grad(value, picture)[0] for value in (found, plain)))
    # its rows do not lie together
    wide = picture.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(total_variation(wide), wide)[0], torch.autograd.grad(total_variation(picture), picture)[0]
    )


def test_target_and_prior_mean_the_same_at_every_size():
    assert variation_target(2750.0, REFERENCE_SHAPE) == 2750
    small = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    large = torch.randn(8, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    assert float(variation_prior(small, 100.0)) == pytest.approx(float(variation_prior(large, 100.0)), rel=0.03)


def test_flat_picture_has_a_finite_gradient():
    flat = torch.zeros(1, 3, 8, 8, requires_grad=True)
    variation_prior(flat, 2750.0).backward()
    assert flat.grad.isfinite().all()


def test_range_is_that_of_pictures_from_0_to_255():
    raw = torch.tensor([0.0, 255.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    normalized = (raw - torch.tensor(IMAGENET.mean).view(3, 1, 1)) / torch.tensor(IMAGENET.std).view(3, 1, 1)
    torch.testing.assert_close(torch.tensor([IMAGENET.low, IMAGENET.high]), normalized.flatten(1))
    torch.testing.assert_close(IMAGENET.to_raw(normalized), raw)
    torch.testing.assert_close(IMAGENET.clamp(normalized * 3), normalized)


@pytest.mark.parametrize('spec', SPECS)
def test_standard_units_go_there_and_back(spec):
    values = torch.randn(2, spec.channels, 4, 4)
    torch.testing.assert_close(spec.to_standard(spec.from_standard(values)), values)
    if spec in (IMAGENET, SPECS[-1]):
        assert torch.equal(spec.from_standard(values), values)
    assert spec.to_standard(spec.clamp(spec.from_standard(values * 99))).abs().max() < 4


def test_spec_is_read_off_a_preprocessor():
    buffers = SimpleNamespace(
        mean=torch.tensor(IMAGENET.mean).view(3, 1, 1), std=torch.tensor(IMAGENET.std).view(3, 1, 1)
    )
    assert ImageSpec.from_preprocessor(buffers).mean == pytest.approx(IMAGENET.mean)
    assert ImageSpec.from_preprocessor(SimpleNamespace(), channels=4) == ImageSpec(channels=4)
    assert ImageSpec.from_preprocessor(None).high == (255.0,) * 3
    assert ImageSpec.from_preprocessor(SimpleNamespace(mean=[10.0], std=[2.0]), channels=2).mean == (10.0, 10.0)


@pytest.mark.parametrize(
    'arguments,match',
    [
        (dict(mean=(1.0, 2.0), std=(1.0,)), '2 values and std 1'),
        (dict(mean=(1.0, 2.0), std=(1.0, 1.0), channels=3), '2 values for 3 channels'),
        (dict(mean=(1.0,), std=(0.0,)), 'positive'),
        (dict(mean=(math.nan,), std=(1.0,)), 'finite'),
        (dict(channels=0), 'channels=0'),
        (dict(max_value=-1.0), 'max_value=-1'),
    ],
)
def test_bad_spec_is_named(arguments, match):
    with pytest.raises(DataError, match=match):
        ImageSpec(**arguments)


def test_wrong_channels_are_named():
    with pytest.raises(DataError, match='3 channels'):
        IMAGENET.clamp(torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize('source', [GaussianNoise(), PinkNoise()])
@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.parametrize('size', [(1, 1), (17, 5), (32, 48)])
def test_sources_are_seeded_and_within_range(source, spec, size):
    state = torch.get_rng_state()
    first, again, other = (source(2, size, spec, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert first.shape == (2, spec.channels, *size) and first.dtype == torch.float32
    assert torch.equal(first, again) and (size == (1, 1) or not torch.equal(first, other))
    assert first.isfinite().all() and torch.equal(spec.clamp(first), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_pink_noise_falls_with_frequency_and_correlates_colors():
    noise = PinkNoise(color_correlation=0.8)(16, (64, 64), ImageSpec((127.5,) * 3, (28.0,) * 3))
    power = torch.fft.rfft2(noise).abs().square().mean((0, 1))
    ratio = float(power[0, 2] / power[0, 16])
    assert 30 < ratio < 130  # amplitude 1 / f: (16 / 2)^2 = 64 in power
    flat = noise.transpose(0, 1).flatten(1)
    assert 0.6 < float(torch.corrcoef(flat)[0, 1]) < 0.95


def test_bad_source_arguments_are_named():
    with pytest.raises(DataError, match='batch=0'):
        GaussianNoise()(0, (4, 4), IMAGENET)
    with pytest.raises(DataError, match='color_correlation=2'):
        PinkNoise(color_correlation=2)
