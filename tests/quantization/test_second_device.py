"""The emulated second device refuses what a GPU does, and nothing else."""

import copy

import numpy as np
import pytest
import torch
from second_device import SecondDevice
from torch import nn


@pytest.fixture
def second():
    with SecondDevice() as found:
        yield found


def test_two_devices_in_one_operation(second):
    there, here = torch.ones(3, device='cuda'), torch.ones(3)
    for wrong in (
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: here.sum().add_(there.sum()),
        lambda: here[there.long() - 1],
        lambda: torch.mv(here.view(1, 3), there),
        lambda: torch.randn(3, device='cuda', generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match='same device|generator'):
            wrong()
    for wrong in (there.numpy, lambda: np.asarray(there)):
        with pytest.raises(TypeError, match=r'Use Tensor.cpu\(\)'):
            wrong()
    assert (there + torch.tensor(1.0)).is_cuda and there[torch.tensor([0])].is_cuda and not here.copy_(there).is_cuda
    assert there[1:].device == there.new_tensor([1.0]).device == torch.zeros_like(there).device == second.device
    assert (
        there.cpu().device.type == there.to('cpu', torch.float64).device.type == 'cpu'
        and there.cpu().numpy().sum() == 3
    )


def test_models_gradients_and_copies(second):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)).to('cuda')
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match='same device'):
        net(images)
    net(images.cuda()).max(1)[0].sum().cpu().backward()
    assert images.grad.device.type == 'cpu' and all(p.grad.is_cuda for p in net.parameters())
    torch.optim.Adam(net.parameters()).step()
    assert all(value.is_cuda for value in copy.deepcopy(net).state_dict().values())
    assert not any(value.is_cuda for value in net.cpu().state_dict().values())


def test_waits_are_counted(second):
    x = torch.ones(3, device='cuda')
    x.mul_(2).sum()
    assert not second.waits
    float(x[0]), bool(x.any()), x.tolist(), x.nonzero(), x.cpu()
    assert second.waits == ['__float__', '__bool__', 'tolist', 'nonzero', 'cpu']


def test_no_float64_on_mps():
    with SecondDevice('mps'), pytest.raises(TypeError, match='float64'):
        torch.ones(3, device='mps').double()
