"""The loss whose squared gradients tell what outputs make of each part of a model."""

import pytest
import torch

from psaq_mm.calibration.guidance import sensitivity_loss
from psaq_mm.errors import DataError


def squared_gradients(make, draws=4000):
    total = 0
    for seed in range(draws):
        x, loss = make(seed)
        total = total + torch.autograd.grad(loss, x)[0].pow(2)
    return total / draws


def test_of_probabilities_it_is_the_fisher_information():
    logits = torch.tensor([[2.0, 0.0, -1.0]])

    def make(seed):
        x = logits.clone().requires_grad_()
        return x, sensitivity_loss([], x, torch.tensor([seed]))

    p = logits.softmax(-1)
    torch.testing.assert_close(squared_gradients(make), p * (1 - p), rtol=0.1, atol=0.005)


def test_of_maps_it_is_the_squared_difference_in_units_of_their_spread():
    matrix, scale = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), 100.0

    def make(seed):
        x = torch.ones(1, 4, requires_grad=True)
        return x, sensitivity_loss([x @ matrix.t() * scale], None, torch.tensor([seed]))

    out = torch.ones(1, 4) @ matrix.t()
    spread = (out - out.mean()).abs().mean()
    torch.testing.assert_close(
        squared_gradients(make, 2000), (matrix / spread).pow(2).mean(0, keepdim=True), rtol=0.1, atol=0
    )


def test_a_sample_has_its_draw_in_any_batch():
    logits, parts = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), [torch.randn(5, 2, 3)]
    seeds = torch.arange(5) + 11
    for given in ((parts, logits), (parts, None)):
        whole = sensitivity_loss(*given, seeds)
        split = sum(
            sensitivity_loss(
                [p[i : i + 1] for p in given[0]], None if given[1] is None else given[1][i : i + 1], seeds[i : i + 1]
            )
            for i in range(5)
        )
        torch.testing.assert_close(whole, split)


@pytest.mark.parametrize('parts, logits', [([], None), ([torch.ones(2, 3)], None), ([], torch.ones(4, 3))])
def test_nothing_to_draw_from_is_refused(parts, logits):
    with pytest.raises(DataError, match='3 seeds do not fit outputs'):
        sensitivity_loss(parts, logits, torch.arange(3))
