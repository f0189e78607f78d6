"""What is computed on another device, emulated or a GPU, is what is computed on the CPU, and stays there.

Bit for bit where the device has no choice: element by element, counts, minimum and maximum. Sums and products of
matrices may be added up in another order.
"""

import copy

import pytest
import torch
from torch import nn

from psaq_mm.quantization import (
    AffineQuantizer,
    AttentionParts,
    ChannelGrid,
    FeatureObserver,
    LogQuantizer,
    UniformGrid,
    build_observer,
    build_rule,
    calibrate,
    dequantize,
    fake_quantize,
    quantize,
    quantize_,
    quantizers,
    random_rotation,
    rotate_heads_,
    round_weights_,
    row_importance,
)

OBSERVERS = ['minmax', 'percentile', 'mse']


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def close(found, expected, device):
    """Equal up to the order of sums."""
    assert found.device.type == device.type
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6)


def equal(found, expected, device):
    assert found.device.type == device.type and torch.equal(found.cpu(), expected)


@pytest.mark.parametrize('axis', [None, 0])
def test_codes_values_and_gradients(device, axis):
    x, scale = data(6, 40), torch.tensor(0.02) if axis is None else torch.linspace(0.005, 0.03, 6)
    zero_point = torch.full(scale.shape, 100, dtype=torch.int32)
    there = x.to(device), scale.to(device), zero_point.to(device)
    codes = quantize(*there, 0, 255, axis)
    equal(codes, quantize(x, scale, zero_point, 0, 255, axis), device)
    equal(dequantize(codes, *there[1:], axis), fake_quantize(x, scale, zero_point, 0, 255, axis), device)
    leaves = x.clone().requires_grad_(), there[0].clone().requires_grad_()
    for leaf, qparams in zip(leaves, ((scale, zero_point), there[1:])):
        (fake_quantize(leaf, *qparams, 0, 255, axis) * leaf.detach()).sum().backward()
    assert (leaves[0].grad == 0).any()
    equal(leaves[1].grad, leaves[0].grad, device)


@pytest.mark.parametrize('name', OBSERVERS)
@pytest.mark.parametrize('axis', [None, 1])
def test_ranges(device, name, axis):
    found, expected = build_observer(name, axis), build_observer(name, axis)
    for batch in data(5, 200, 8).unbind():
        found.observe(batch.to(device))
        expected.observe(batch)
    (scale, zero_point), (other_scale, other_zero) = found.qparams(UniformGrid(4)), expected.qparams(UniformGrid(4))
    close(scale, other_scale, device)
    equal(zero_point, other_zero, device)


@pytest.mark.parametrize('name', OBSERVERS)
def test_ranges_of_channels(device, name):
    found, expected = FeatureObserver(build_rule(name)), FeatureObserver(build_rule(name))
    for batch in (data(5, 200, 40) * torch.logspace(-3, 3, 40)).unbind():
        found.observe(batch.to(device))
        expected.observe(batch)
    (scale, zero_point), (other_scale, other_zero) = found.qparams(ChannelGrid(4)), expected.qparams(ChannelGrid(4))
    close(scale, other_scale, device)
    equal(zero_point, other_zero, device)
    for end, other in zip(found.ends(), expected.ends()):
        equal(end, other, device)


@pytest.mark.parametrize('make', [lambda: AffineQuantizer(4), lambda: LogQuantizer(4), lambda: LogQuantizer(4, 'log2')])
def test_quantizers_move_with_their_state(device, make):
    x, here = data(300).abs(), make()
    here.calibrate_from(x)
    there = copy.deepcopy(here).to(device)
    found, expected = there(x.to(device)), here(x)
    assert found.device.type == device.type
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=float(expected.max()) * 1e-6)
    other = make().to(device)
    other.load_state_dict(here.state_dict())
    equal(other(x.to(device)), found.cpu(), device)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.LayerNorm(8)
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 4)

    def forward(self, x):
        return self.second(self.first(self.norm(self.conv(x).flatten(2).transpose(1, 2))).relu())


def calibrated(preset, x, device):
    torch.manual_seed(0)
    net = Net().eval()
    quantize_(net, preset)
    net.to(device)
    calibrate(net, lambda: net(x.to(device)))
    return net


@pytest.mark.parametrize('preset', ['w8a8', 'repq_w4a4'])
def test_calibration(device, preset):
    x = data(4, 3, 16, 16)
    found, expected = calibrated(preset, x, device), calibrated(preset, x, 'cpu')
    for (_, one), (_, other) in zip(quantizers(found), quantizers(expected)):
        close(one.scale, other.scale, device)
    with torch.no_grad():
        step = float(expected(x).std()) / 10  # a value beside an edge may take the next code
        assert float((found(x.to(device)).cpu() - expected(x)).abs().mean()) < step


def test_rounding_with_importance(device):
    x = data(4, 3, 16, 16)
    net = calibrated('w4a8', x, device)

    def run():
        net(x.to(device).requires_grad_()).square().sum().backward()

    weights = row_importance(net, run)
    assert {w.device.type for w in weights.values()} == {device.type}
    with torch.no_grad():
        report = round_weights_(net, lambda: net(x.to(device)), importance=weights, prior_rows=32.0)
    assert any(layer.compensated < layer.nearest for layer in report)
    assert {p.device.type for p in net.parameters()} == {device.type}


def test_rotation(device):
    torch.manual_seed(0)
    qkv, proj = nn.Linear(8, 24), nn.Linear(8, 8)
    there = copy.deepcopy(qkv).to(device), copy.deepcopy(proj).to(device)
    for layers in ((qkv, proj), there):
        rotate_heads_(AttentionParts.packed(*layers, 2), torch.Generator().manual_seed(0))
    for one, other in zip(there, (qkv, proj)):
        equal(one.weight.detach(), other.weight.detach(), device)
    assert random_rotation(4, torch.Generator().manual_seed(0)).device.type == 'cpu'
