"""The parts of a joint step: gradients that change their sign, steps of one length, batches that find their way
back."""

import torch

from psaq_mm.pictures import ImageSpec
from psaq_mm.psaq_vit.joint import Drawn, scale_gradient, step_of


def test_a_gradient_comes_back_scaled_and_the_value_goes_through_as_it_is():
    x = torch.randn(3, requires_grad=True)
    (scale_gradient(x, -2.0) * torch.tensor([1.0, 2.0, 3.0]) + x).sum().backward()
    assert torch.equal(scale_gradient(x, -2.0), x) and x.grad.tolist() == [-1.0, -3.0, -5.0]


def test_a_batch_goes_back_to_where_it_came_from():
    images = torch.arange(2 * 3 * 5 * 4.0).reshape(2, 3, 5, 4)
    drawn = Drawn(torch.tensor([7, 2]), range(2), 2, torch.tensor([True, False]).view(-1, 1, 1, 1), (3, 2))
    moved = drawn.moved(images)
    assert not torch.equal(moved, images) and torch.equal(drawn.moved_back(moved), images)
    assert moved[1, 0, 3, 2] == images[1, 0, 0, 0] and moved[0, 0, 3, 2] == images[0, 0, 0, 3], 'flipped, then rolled'


def test_every_sample_moves_by_the_rate_whatever_the_length_of_its_gradient():
    spec = ImageSpec()
    values = torch.zeros(4, 3, 8, 8, requires_grad=True)
    gradient = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    values.grad = torch.stack(
        [gradient, 1e6 * gradient, torch.zeros_like(gradient), torch.full_like(gradient, float('inf'))]
    )
    made = spec.to_standard(step_of(values, 0.05, spec))
    torch.testing.assert_close(made[0], -0.05 * gradient / gradient.square().mean().sqrt(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(made[1], made[0], rtol=1e-4, atol=1e-6)
    still = spec.to_standard(spec.from_standard(torch.zeros(2, 3, 8, 8)))
    assert torch.equal(made[2:], still), 'no gradient, or one that is not finite'


def test_samples_stay_in_their_range():
    spec = ImageSpec()
    values = torch.zeros(1, 3, 4, 4, requires_grad=True)
    values.grad = torch.full_like(values, -1.0)
    made = step_of(values, 100.0, spec)
    assert torch.equal(made, spec.clamp(made)) and torch.isfinite(made).all()
    assert torch.equal(made, spec.clamp(torch.full_like(made, 1e9)))
