"""Losses and the pool where model and samples lie on another device than the CPU, emulated or a GPU."""

import torch

from psaq_mm.calibration import SamplePool, normalized_l1, sensitivity_loss


def test_the_discrepancy(device):
    maps = [torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    found = normalized_l1(*(m.to(device) for m in maps))
    assert found.device.type == device.type
    torch.testing.assert_close(found.cpu(), normalized_l1(*maps))


def test_guidance_draws_the_same_everywhere(device):
    logits, seeds = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]]), torch.tensor([3, 4])
    maps = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    for outputs in (([], logits), ([maps], None)):
        expected = sensitivity_loss(*outputs, seeds)
        found = sensitivity_loss(
            [m.to(device) for m in outputs[0]], None if outputs[1] is None else outputs[1].to(device), seeds
        )
        assert found.device.type == device.type
        torch.testing.assert_close(found.cpu(), expected)


def test_the_pool_keeps_samples_of_any_device_on_the_cpu(device):
    pool = SamplePool(4)
    pool.add(torch.randn(3, 3, 4, 4).to(device))
    samples = pool.draw(2, torch.Generator())
    assert pool.samples.device.type == samples.device.type == 'cpu'
