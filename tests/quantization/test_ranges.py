"""Learned ranges: the gradient of the scale's logarithm, and the step that moves the scale."""

import copy

import pytest
import torch
from torch import nn

from psaq_mm.errors import DataError
from psaq_mm.quantization import (
    AffineQuantizer,
    LogQuantizer,
    QuantSpec,
    calibrate,
    fake_quantize,
    learn_ranges_,
    learned_ranges,
    quantize_,
    quantizers,
    update_ranges_,
)


def quantizer_on(values, bits=4, learned=True):
    found = AffineQuantizer(bits)
    found.calibrate_from(values)
    if learned:
        learn_ranges_(found)
    return found


def test_values_and_gradient_are_those_of_fixed_ranges():
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    grads = []
    for learned in (False, True):
        found, y = quantizer_on(x / 2, learned=learned), x.clone().requires_grad_()
        out = found(y)
        (out * x.cos()).sum().backward()
        grads.append((out.detach(), y.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])
    assert bool((grads[0][1] == 0).any())  # some were clipped


def test_gradient_of_the_logarithm_is_that_of_the_straight_through_formula():
    x = torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = quantizer_on(x.float() / 2)
    weight = x.sin()
    (found(x.float()) * weight.float()).sum().backward()
    ratio = torch.zeros((), dtype=torch.float64, requires_grad=True)
    scale = found.scale.double() * ratio.exp()
    steps = x.float().double() / scale
    codes = (steps + (steps.round() - steps).detach() + found.zero_point).clamp(found.qmin, found.qmax)
    (((codes - found.zero_point) * scale) * weight).sum().backward()
    torch.testing.assert_close(found.log_ratio.grad.double(), ratio.grad, rtol=1e-4, atol=1e-4)


def test_a_range_that_clips_most_values_widens():
    x = torch.randn(500, generator=torch.Generator().manual_seed(2))
    found = quantizer_on(x / 10)
    before, optimizer = float(found.scale), torch.optim.Adam([found.log_ratio], lr=0.05)
    errors = []
    for _ in range(60):
        error = (found(x) - x).square().mean()
        errors.append(float(error.detach()))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        update_ranges_(found)
    assert float(found.log_ratio) == 0
    assert float(found.scale) > 5 * before and errors[-1] < errors[0] / 20
    # What a run leaves is the scale in the state dict; the quantizer that loads it knows nothing of learning.
    other = AffineQuantizer(4)
    other.load_state_dict(found.state_dict())
    assert torch.equal(other(x), found(x).detach())


def test_scales_of_activations_alone_are_learned():
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    quantize_(model, QuantSpec.parse('w4a8'))
    x = torch.randn(9, 6)
    calibrate(model, lambda: model(x))
    ratios = learn_ranges_(model)
    assert len(ratios) == 2 == len(learned_ranges(model))
    keys = set(model.state_dict())
    assert not any('log_ratio' in key for key in keys)
    assert all(q.log_ratio is None for name, q in quantizers(model) if name.endswith('weight_quantizer'))
    log = LogQuantizer(4)
    assert learn_ranges_(log) == []
    model(x).square().sum().backward()
    assert all(ratio.grad is not None for ratio in ratios)
    twin = copy.deepcopy(model)
    assert learned_ranges(twin)[0] is not ratios[0]


def test_without_gradients_it_is_the_plain_quantizer():
    x = torch.randn(40)
    found = quantizer_on(x)
    with torch.no_grad():
        assert torch.equal(found(x), fake_quantize(x, found.scale, found.zero_point, 0, 15))
    assert not found(x.clone()).detach().requires_grad


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_a_float32_gradient(dtype):
    x = torch.randn(64).to(dtype).requires_grad_()
    found = quantizer_on(x.detach().float())
    out = found(x)
    out.float().square().sum().backward()
    assert out.dtype == x.grad.dtype == dtype and found.log_ratio.grad.dtype == torch.float32


# ---------------------------------------------------------------------- numbers that are large, or many
def slope_of(x, grad, bits=8):
    """Of the scale's logarithm: by the layer, and in float64."""
    found = quantizer_on(torch.tensor([-1.0, 3.0]), bits)
    y = x.clone().requires_grad_()
    found(y).backward(grad)
    values, steps = found(x).detach().double(), x.double() / found.scale.double()
    inside = (steps.round() + found.zero_point >= found.qmin) & (steps.round() + found.zero_point <= found.qmax)
    wanted = ((values - torch.where(inside, x.double(), 0.0)) * grad.double()).sum()
    return float(found.log_ratio.grad), float(wanted)


def test_the_slope_is_one_sum_of_small_differences():
    """A million values that hardly differ from their codes: two sums of millions would leave two digits of what they
    differ by."""
    x = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)) * 2.9
    found, wanted = slope_of(x, torch.ones_like(x))
    assert abs(wanted) < 20 and found == pytest.approx(wanted, rel=2e-3)


def test_float16_gradients_under_a_loss_scale_give_a_finite_slope():
    x = (torch.rand(4000, generator=torch.Generator().manual_seed(0)) * 4).half()
    grad = torch.full_like(x, 60000.0)  # 65536 times a gradient of 0.9; times a value of 2 it is beyond float16
    found, wanted = slope_of(x, grad)
    assert found == pytest.approx(wanted, rel=1e-3)


def test_infinite_inputs_are_clipped_values_like_others():
    found, wanted = slope_of(torch.tensor([0.5, torch.inf, -torch.inf]), torch.tensor([1.0, 0.1, 0.2]))
    assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize('step', [0.5, -2.0, 30.0, -30.0, 200.0, -200.0, torch.inf, -torch.inf])
def test_a_step_of_any_size_leaves_a_scale_that_is_a_normal_number(step):
    found = quantizer_on(torch.tensor([-1.0, 3.0]))
    before = found.scale.double()
    with torch.no_grad():
        found.log_ratio.fill_(step)
    update_ranges_(found)
    limits = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max / 512
    wanted = (before * torch.tensor(step, dtype=torch.float64).exp()).clamp(*limits)
    torch.testing.assert_close(found.scale.double(), wanted, rtol=1e-5, atol=0)
    assert float(found.log_ratio) == 0 and found(torch.tensor([-1e38, 0.0, 1e38])).isfinite().all()
    found.set_qparams(found.scale, found.zero_point)  # which refuses what is no scale


def test_a_step_that_is_nan_is_named_and_moves_nothing():
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    quantize_(model, 'w4a8')
    calibrate(model, lambda: model(torch.randn(9, 6)))
    first, second = learn_ranges_(model)
    with torch.no_grad():
        first.fill_(1.0)
        second.fill_(float('nan'))
    before = [q.scale.clone() for _, q in quantizers(model)]
    with pytest.raises(DataError, match="'2.input_quantizer' became NaN"):
        update_ranges_(model)
    assert all(torch.equal(q.scale, scale) for (_, q), scale in zip(quantizers(model), before))
