"""Scale reparameterization on a LayerNorm and a Linear: exact in float, one scale, dead channels."""

import copy

import pytest
import torch
from torch import nn

from psaq_mm.errors import DataError, SpecError
from psaq_mm.quantization import (
    ReparameterizedQuantizer,
    calibrate,
    choose_qparams,
    fake_quantize,
    norm_feeds,
    quantize_,
    quantizers,
    set_mode,
)


def block(channels=12, out=5, bias=True, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, out, bias=bias))
    with torch.no_grad():
        model[0].weight.copy_(torch.rand(channels) * 3 + 0.05)
        model[0].bias.copy_(torch.randn(channels))
    return model.eval()


def folded(model, quant='repq_w8a4', data=None):
    norm_feeds(model[0], model[1])
    quantize_(model, quant)
    data = torch.randn(64, 12, generator=torch.Generator().manual_seed(3)) if data is None else data
    calibrate(model, lambda: model(data))
    return model, data


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('observer', ['minmax', 'percentile', 'mse'])
def test_exact_in_float(bias, observer):
    model = block(bias=bias)
    reference = copy.deepcopy(model)
    model, data = folded(model, dict(preset='repq_w8a4', a_observer=observer))
    set_mode(model, 'off')
    assert torch.allclose(model(data), reference(data), rtol=0, atol=1e-5)
    assert model[1].bias is None or torch.equal(model[1].bias, reference[1].bias), 'the bias of the model stays'


def test_one_scale_gives_the_codes_of_the_scales_per_channel():
    """The claim of the method: quantizing y' with one scale is quantizing y channel by channel."""
    model = block()
    reference = copy.deepcopy(model)
    model, data = folded(model, dict(preset='repq_w8a4', a_observer='minmax'))
    y, moved = reference[0](data), model[0](data)
    low, high = y.amin(0).double(), y.amax(0).double()
    scale = (high - low) / 15
    by_channel = ((y / scale.float()).round() + (-low / scale).round().float()).clamp(0, 15)
    quantizer = model[1].input_quantizer
    one = ((moved / quantizer.scale).round() + quantizer.zero_point).clamp(0, 15)
    # A tie may fall to the other side after the division by the ratio.
    assert (one != by_channel).float().mean() < 0.01
    assert (one - by_channel).abs().max() <= 1


def test_symmetric_codes_are_the_unsigned_ones_moved():
    """LayerNorm's offset moves each channel to zero point 0: nothing is lost."""
    asymmetric, _ = folded(block(), dict(w_symmetric=True, reparameterize=True))
    model, data = folded(block(), dict(w_symmetric=True, reparameterize=True, target='tensorrt'))
    quantizer, other = model[1].input_quantizer, asymmetric[1].input_quantizer
    assert (quantizer.qmin, quantizer.qmax, int(quantizer.zero_point)) == (-128, 127, 0)
    assert torch.equal(quantizer.scale, other.scale)
    codes = (model[0](data) / quantizer.scale).round().clamp(-128, 127)
    unsigned = ((asymmetric[0](data) / other.scale).round() + other.zero_point).clamp(0, 255)
    assert (codes + 128 - unsigned).abs().max() <= 1 and (codes + 128 == unsigned).float().mean() > 0.99
    reference = block()
    set_mode(model, 'off')
    assert torch.allclose(model(data), reference(data), rtol=0, atol=1e-5)


@pytest.mark.parametrize('value', [0.0, 2.5, -0.003])
def test_dead_channels_are_folded_whole_into_the_bias(value):
    model = block()
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = 0, value
    reference = copy.deepcopy(model)
    model, data = folded(model)
    assert torch.isfinite(model[1].weight).all() and torch.isfinite(model[0].bias).all()
    assert model[0](data)[:, 4].abs().max() == 0
    set_mode(model, 'off')
    assert torch.allclose(model(data), reference(data), rtol=0, atol=1e-5)


def test_all_channels_dead():
    model = block()
    nn.init.zeros_(model[0].weight)
    reference = copy.deepcopy(model)
    model, data = folded(model)
    # The bias carries everything, so that even four bits lose nothing.
    assert torch.allclose(model(data), reference(data), rtol=0, atol=1e-5)


def test_better_than_one_range_where_channels_differ():
    model = block()
    with torch.no_grad():
        model[0].weight.copy_(torch.logspace(-2, 1, 12))
    reference = copy.deepcopy(model)
    model, data = folded(model)
    y, moved = reference[0](data), model[0](data)
    quantizer = model[1].input_quantizer
    by_channel = ((quantizer(moved) - moved).square().mean(0) / moved.var(0)).mean()
    one_range = fake_quantize(y, *choose_qparams(y.min(), y.max(), 4, False), 0, 15)
    assert by_channel < 0.1 * ((one_range - y).square().mean(0) / y.var(0)).mean()


def test_loading_full_precision_weights_undoes_the_folding():
    model = block()
    reference = copy.deepcopy(model)
    model, data = folded(model)
    model.load_state_dict(reference.state_dict(), strict=False)
    quantizer = model[1].input_quantizer
    assert not quantizer.fill.any() and not quantizer.folded_bias.any() and not quantizer.calibrated
    set_mode(model, 'off')
    assert torch.equal(model(data), reference(data))


def test_state_goes_round():
    model, data = folded(block(bias=False))
    again = block(bias=False)
    norm_feeds(again[0], again[1])
    quantize_(again, 'repq_w8a4')
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(data), model(data))


def test_half_precision_keeps_what_was_folded_in_float32():
    model, _ = folded(block())
    fill = model[1].input_quantizer.fill.clone()
    model.half()
    assert model[1].input_quantizer.fill.dtype == torch.float32
    assert torch.equal(model[1].input_quantizer.fill, fill)


def test_nothing_is_folded_when_a_quantizer_saw_no_data():
    model = nn.ModuleDict(dict(seen=block(), unseen=block()))
    for part in model.values():
        norm_feeds(part[0], part[1])
    quantize_(model, 'repq_w8a4')
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Exception, match='saw no data'):
        calibrate(model, lambda: model['seen'](torch.randn(8, 12)))
    for key, value in model.state_dict().items():
        if 'weight_quantizer' not in key:
            assert torch.equal(value, before[key]), key


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize('kernel, bias', [(1, True), (1, False), (2, True)])
def test_a_convolution_takes_the_scales_of_its_channels(kernel, bias):
    linear = block()
    model = nn.Sequential(ChannelsFirst(12), nn.Conv2d(12, 5, kernel, stride=kernel, bias=bias)).eval()
    model[0].load_state_dict(linear[0].state_dict())
    reference = copy.deepcopy(model)
    data = torch.randn(2, 12, 4, 6, generator=torch.Generator().manual_seed(3))
    folded(model, data=data)
    quantizer = model[1].input_quantizer
    assert isinstance(quantizer, ReparameterizedQuantizer) and quantizer.folded_bias.shape == (5,)
    assert not torch.equal(model[1].weight, reference[1].weight)
    set_mode(model, 'off')
    torch.testing.assert_close(model(data), reference(data), rtol=0, atol=1e-5)
    set_mode(model, 'on')
    set_mode(model, 'off', '*weight_quantizer')
    plain = copy.deepcopy(reference)
    quantize_(plain, 'repq_w8a4')  # nothing is told: one range for all channels
    set_mode(plain, 'off', '*weight_quantizer')
    calibrate(plain, lambda: plain(data))
    errors = [(part(data) - reference(data)).square().mean() for part in (model, plain)]
    assert errors[0] < 0.5 * errors[1]
    if kernel == 1:  # as the Linear that it is
        linear[1].load_state_dict(
            {k: v.flatten(1) if v.dim() > 1 else v for k, v in reference[1].state_dict().items()}, False
        )
        folded(linear, data=data.movedim(1, -1))
        torch.testing.assert_close(linear[1].weight, model[1].weight.flatten(1), rtol=0, atol=0)


@pytest.mark.parametrize('options', [dict(padding=1), dict(groups=3)])
def test_padding_and_groups_take_nothing(options):
    with pytest.raises(SpecError, match='without padding and groups'):
        norm_feeds(nn.LayerNorm(12), nn.Conv2d(12, 6, 3, **options))


def test_one_linear_has_one_layernorm():
    model = block()
    norm_feeds(model[0], model[1])
    norm_feeds(model[0], model[1])
    with pytest.raises(SpecError, match='one LayerNorm'):
        norm_feeds(nn.LayerNorm(12), model[1])


def test_a_norm_without_gain_keeps_one_range():
    model = nn.Sequential(nn.LayerNorm(12, elementwise_affine=False), nn.Linear(12, 5))
    norm_feeds(model[0], model[1])
    quantize_(model, 'repq_w8a4')
    assert not any(isinstance(q, ReparameterizedQuantizer) for _, q in quantizers(model))


# ---------------------------------------------------------------------- the weight after folding, and channels that
# hardly vary
@pytest.mark.parametrize('quant', ['repq_w8a4', dict(preset='repq_w4a4', w_observer='minmax')])
def test_weights_have_the_range_that_folding_leaves_them(quant):
    """Channels whose ranges differ a hundredfold: folding makes columns, and with them rows, of the weight grow."""
    model = block()
    with torch.no_grad():
        model[0].weight.copy_(torch.logspace(-1, 1, 12))
    start = model[1].weight.detach().clone()
    model, _ = folded(model, quant)
    quantizer, weight = model[1].weight_quantizer, model[1].weight.detach()
    assert float((weight.abs().amax(1) / start.abs().amax(1)).max()) > 2, 'the old range would do'
    low, high = weight.amin(1), weight.amax(1)
    if quant != 'repq_w8a4':
        wanted = choose_qparams(low, high, 4, symmetric=False)
        assert torch.equal(quantizer.scale, wanted[0]) and torch.equal(quantizer.zero_point, wanted[1])
    step = quantizer.scale[:, None]
    assert bool(((model[1].quantized_weight() - weight).abs() <= 0.51 * step).all()), 'nothing is clipped'


@pytest.mark.parametrize('observer', ['minmax', 'percentile', 'mse'])
def test_a_second_calibration_gives_the_weight_the_range_that_it_has_then(observer):
    """Folding again changes the weight again: its scale is always the range of the weight as it is."""
    model = block()
    with torch.no_grad():
        model[0].weight.copy_(torch.logspace(-1, 1, 12))
    model, data = folded(model, dict(preset='repq_w4a4', w_observer=observer))
    quantizer = model[1].weight_quantizer
    for spread in (torch.ones(12), torch.logspace(1, -1, 12)):
        before = quantizer.scale.clone()
        calibrate(model, lambda spread=spread: model[1](model[0](data) * spread))
        wanted = quantizer.range_of(model[1].weight)
        assert torch.equal(quantizer.scale, wanted.scale) and torch.equal(quantizer.zero_point, wanted.zero_point)
    assert not torch.equal(quantizer.scale, before), 'the old range would do'


def test_a_weight_that_is_switched_off_keeps_its_range():
    model = block()
    norm_feeds(model[0], model[1])
    quantize_(model, 'repq_w8a4')
    set_mode(model, 'off', '1.weight_quantizer')
    calibrate(model, lambda: model(torch.randn(64, 12)))
    assert model[1].input_quantizer.calibrated and not model[1].weight_quantizer.calibrated


def test_a_channel_that_hardly_varies_keeps_a_gain_that_a_float_holds():
    model, data = block(), torch.randn(64, 12, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = 1e-9, 0.0
    reference, gains = copy.deepcopy(model), model[0].weight.detach().clone()
    model, _ = folded(model, data=data)
    grown = model[0].weight / gains
    assert 1e3 < float(grown[4]) <= 1.001e4 and float(grown[torch.arange(12) != 4].max()) < 100
    set_mode(model, 'off')
    assert torch.allclose(model(data), reference(data), rtol=0, atol=1e-4)


# ---------------------------------------------------------------------- what fails changes nothing
def kept_state(model):
    modes = {name: (quantizer.mode, quantizer.observer) for name, quantizer in quantizers(model)}
    return {key: value.clone() for key, value in model.state_dict().items()}, modes


@pytest.mark.parametrize(
    'fault, message',
    [
        ('weight', "'2.weight_quantizer'.*NaN"),
        ('sample', 'the sample is broken'),
        ('unseen', '1 quantizers saw no data'),
        ('input', "'2.input_quantizer'.*NaN"),
        ('norm', 'has 1 channels'),
        ('overflow', "'1.weight_quantizer'.*infinity"),
    ],
)
@pytest.mark.parametrize('before', [True, False])
def test_a_calibration_that_fails_leaves_the_model_as_it_was(fault, message, before):
    model = nn.Sequential(*block(), nn.Linear(5, 4), nn.Linear(4, 3))
    norm_feeds(model[0], model[1])
    quantize_(model, 'repq_w8a4')
    data = torch.randn(64, 12, generator=torch.Generator().manual_seed(3))
    if before:
        calibrate(model, lambda: model(data))
    set_mode(model, 'off', '3')

    def run():
        out = (
            model[1](model[0](3 * data)) if fault != 'overflow' else model[1](model[0](data)).nan_to_num(0.0, 0.0, 0.0)
        )
        if fault == 'sample':
            raise DataError('the sample is broken')
        if fault != 'unseen':
            model[2](out * (float('nan') if fault == 'input' else 1))
        model[2](out[:0])

    with torch.no_grad():
        if fault == 'weight':
            model[2].weight[1, 1] = float('nan')
        elif fault == 'norm':
            model[1].norm_before = (nn.LayerNorm(1),)
        elif fault == 'overflow':  # finite, but no longer after folding
            model[0].weight.fill_(1e-3)
            model[0].weight[0] = 1.0
            model[1].weight[0, 0] = 3e38
            model[1].weight[1:] = 0
            model[1].weight[0, 1:] = 0
    state, modes = kept_state(model)
    with pytest.raises(DataError, match=message):
        calibrate(model, run)
    found, after = kept_state(model)
    assert after == modes
    for key, value in state.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0, equal_nan=True, msg=key)
