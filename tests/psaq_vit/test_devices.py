"""Synthesis on another device, emulated or a GPU: what it gives on the CPU, up to the order of sums."""

import pytest
import torch
from toys import ToyTransformer

from psaq_mm.pictures import GaussianNoise, ImageSpec, PinkNoise
from psaq_mm.psaq_vit import SampleGenerator, patch_similarity_entropy, variation_prior

SPEC = ImageSpec((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


def test_entropy_and_its_gradient(device):
    tokens = torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 6:] = False
    found = []
    for place in (device, 'cpu'):
        leaf = tokens.to(place).requires_grad_()
        value = patch_similarity_entropy(leaf, valid, groups_per_image=2)
        value.sum().backward()
        assert value.device == leaf.grad.device == leaf.device
        found.append((value.detach().cpu(), leaf.grad.cpu()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_the_prior(device):
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = variation_prior(images.to(device), 10.0)
    assert found.device.type == device.type
    torch.testing.assert_close(found.cpu(), variation_prior(images, 10.0))


@pytest.mark.parametrize('make', [GaussianNoise(), PinkNoise()])
def test_sources_draw_the_same_everywhere(device, make):
    drawn = [
        make(2, (16, 24), SPEC, generator=torch.Generator().manual_seed(3), device=place) for place in (device, 'cpu')
    ]
    assert drawn[0].device.type == device.type and torch.equal(drawn[0].cpu(), drawn[1])


@pytest.mark.parametrize('window', [None, 3])
def test_the_generator(device, window):
    generator = SampleGenerator(size=(24, 32), batch_size=2, steps=3, jitter=4, drop_tokens=1)
    torch.manual_seed(0)
    model = ToyTransformer(window, 3)
    expected = generator.generate(model, SPEC, generator=torch.Generator().manual_seed(0))
    found = generator.generate(model.to(device), SPEC, generator=torch.Generator().manual_seed(0))
    assert found.samples.device.type == device.type
    for one, other in zip(found.history, expected.history):
        assert one == pytest.approx(other, rel=1e-2)
