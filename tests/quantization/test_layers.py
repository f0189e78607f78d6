"""Quantized layers against the float operation on fake-quantized operands."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from psaq_mm.errors import NotCalibratedError
from psaq_mm.quantization import (
    LayerSpec,
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLinear,
    QuantMatMul,
    adopt,
    calibrate,
    choose_qparams,
    fake_quantize,
    full_precision_weights,
    hold_weights,
    qrange,
)

LAYERS = {
    'linear': (lambda: nn.Linear(6, 5), QuantLinear, (2, 3, 6)),
    'linear without bias': (lambda: nn.Linear(6, 5, bias=False), QuantLinear, (4, 6)),
    'conv': (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), QuantConv2d, (2, 4, 7, 7)),
    'grouped conv': (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), QuantConv2d, (2, 4, 7, 7)),
    'reflecting conv': (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode='reflect'), QuantConv2d, (2, 4, 7, 7)),
    'transposed conv': (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), QuantConvTranspose2d, (2, 4, 5, 5)),
    'grouped transposed conv': (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1),
        QuantConvTranspose2d,
        (2, 4, 5, 5),
    ),
}
ALL = pytest.mark.parametrize('kind', LAYERS)


def quantized_copy(layer, quant_class, spec=LayerSpec()):
    quantized = adopt(copy.deepcopy(layer), quant_class)
    quantized.add_quantizers(spec)
    return quantized


def build(kind, spec=LayerSpec(4, 8)):
    make, quant_class, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    quantized = quantized_copy(layer, quant_class, spec)
    quantized.weight_quantizer.calibrate_from(quantized.weight.detach())
    quantized.input_quantizer.calibrate_from(x)
    return layer, quantized, x


@ALL
@pytest.mark.parametrize('spec', [LayerSpec(4, 8), LayerSpec(2, 3, w_symmetric=False), LayerSpec(8, 6, True, 'mse')])
def test_is_the_float_layer_on_fake_quantized_operands(kind, spec):
    layer, quantized, x = build(kind, spec)
    reference = copy.deepcopy(layer)
    axis = 1 if 'transposed' in kind else 0
    q = quantized.weight_quantizer
    codes = qrange(spec.w_bits, spec.w_symmetric)
    with torch.no_grad():
        reference.weight.copy_(fake_quantize(layer.weight, q.scale, q.zero_point, *codes, axis))
    qparams = choose_qparams(x.min(), x.max(), spec.a_bits, False)
    expected = reference(fake_quantize(x, *qparams, *qrange(spec.a_bits, False)))
    for _ in range(2):  # with gradients, then from the cache
        assert torch.equal(quantized(x), expected)
        with torch.no_grad():
            assert torch.equal(quantized(x), expected)


@ALL
def test_switched_off_it_is_the_float_layer(kind):
    layer, quantized, x = build(kind)
    quantized.input_quantizer.mode = quantized.weight_quantizer.mode = 'off'
    assert torch.equal(quantized(x), layer(x))


@pytest.mark.parametrize('groups', [1, 2])
def test_transposed_conv_has_a_scale_for_each_index_of_axis_one(groups):
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups)
    quantized = quantized_copy(layer, QuantConvTranspose2d)
    quantized.weight_quantizer.calibrate_from(layer.weight.detach())
    expected = layer.weight.detach().abs().amax((0, 2, 3)) / 127
    torch.testing.assert_close(quantized.weight_quantizer.scale, expected)
    assert expected.shape == (6 // groups,)


def test_transposed_conv_takes_an_output_size():
    layer, quantized, x = build('transposed conv')
    size = [12, 12]
    assert quantized(x, output_size=size).shape == layer(x, output_size=size).shape == (2, 6, 12, 12)


def test_gradients_are_straight_through():
    layer, quantized, x = build('linear', LayerSpec(8, 8))
    x.requires_grad_()
    quantized(x).sum().backward()
    weight = quantized.quantized_weight().detach()
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x))
    q = quantized.input_quantizer
    inputs = fake_quantize(x.detach(), q.scale, q.zero_point, 0, 255)
    torch.testing.assert_close(quantized.weight.grad, inputs.sum((0, 1)).expand_as(weight))


@ALL
def test_autocast_quantizes_in_float32(kind):
    _, quantized, x = build(kind)
    plain = quantized.input_quantizer(x), quantized.quantized_weight()
    with torch.autocast('cpu', torch.bfloat16):
        out = quantized(x)
        assert torch.equal(quantized.input_quantizer(x), plain[0]) and quantized.input_quantizer(x).dtype == x.dtype
        assert torch.equal(quantized.quantized_weight(), plain[1])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), quantized(x), rtol=0.03, atol=0.05)


def count_quantizations(layer):
    calls = []
    layer.weight_quantizer.register_forward_hook(lambda *args: calls.append(1))
    return calls


def test_weight_is_quantized_once_without_gradients():
    _, quantized, x = build('linear')
    calls = count_quantizations(quantized)
    with torch.no_grad():
        first = quantized(x)
        assert torch.equal(quantized(x), first)
    assert len(calls) == 1
    quantized.weight.requires_grad_(False)  # a frozen layer in a forward with gradients
    quantized(x.clone().requires_grad_()).sum().backward()
    assert len(calls) == 1
    quantized.weight.requires_grad_(True)
    quantized(x)
    quantized(x)
    assert len(calls) == 3


def rescale(quantized):
    quantized.weight_quantizer.set_qparams(quantized.weight_quantizer.scale * 2, quantized.weight_quantizer.zero_point)


def optimizer_step(quantized):
    quantized.weight.grad = torch.ones_like(quantized.weight)
    torch.optim.SGD([quantized.weight], lr=0.1).step()


def new_parameter(quantized):
    quantized.weight = nn.Parameter(quantized.weight.detach() * 0.5)


def new_data(quantized):
    quantized.weight.data = quantized.weight.detach() * 0.5


def data_changed_and_eval(quantized):
    quantized.weight.data.mul_(0.5)
    quantized.eval()


def reload(quantized):
    quantized.load_state_dict({k: v * 0.5 if k == 'weight' else v for k, v in quantized.state_dict().items()})


def there_and_back(quantized):
    quantized.half().float()


CHANGES = [rescale, optimizer_step, new_parameter, new_data, data_changed_and_eval, reload, there_and_back]


@pytest.mark.parametrize('change', CHANGES, ids=lambda f: f.__name__)
def test_cached_weight_follows_every_change(change):
    _, quantized, x = build('linear')
    with torch.no_grad():
        before = quantized(x)
    change(quantized)
    with torch.no_grad():
        after = quantized(x)
    assert torch.equal(
        after, F.linear(quantized.input_quantizer(x), quantized.weight_quantizer(quantized.weight), quantized.bias)
    )
    assert change is there_and_back or not torch.equal(before, after)


def count_roundings(quantized, monkeypatch):
    calls = []
    round_once = quantized.weight_quantizer.round_once
    monkeypatch.setattr(quantized.weight_quantizer, 'round_once', lambda x: calls.append(1) or round_once(x))
    return calls


@pytest.mark.parametrize('kind', ['linear', 'conv', 'grouped transposed conv'])
def test_held_weights_are_quantized_once_and_have_the_same_gradients(kind, monkeypatch):
    _, quantized, x = build(kind)
    quantized.weight.data[0, 0] *= 3  # clipped
    for part in x.split(1):
        quantized(part).square().sum().backward()
    expected, quantized.weight.grad = quantized.weight.grad, None
    calls = count_roundings(quantized, monkeypatch)
    with hold_weights(quantized):
        for part in x.split(1):
            quantized(part).square().sum().backward()
        with torch.no_grad():
            quantized(x)
    assert len(calls) == 1
    assert torch.equal(quantized.weight.grad, expected)


def data_changed_after_the_block(quantized):
    quantized.weight.data.mul_(0.5)


@pytest.mark.parametrize('change', [*CHANGES, data_changed_after_the_block], ids=lambda f: f.__name__)
@pytest.mark.parametrize('inside', [True, False])
def test_held_weight_follows_every_change(change, inside):
    if inside and change is data_changed_after_the_block:
        pytest.skip('leaves no trace')
    _, quantized, x = build('linear')
    with hold_weights(nn.Sequential(quantized)):
        before = quantized(x).detach()
        if inside:
            change(quantized)
            after = quantized(x)
    if not inside:
        change(quantized)
        after = quantized(x)
    weight = quantized.weight_quantizer(quantized.weight)
    assert torch.equal(after, F.linear(quantized.input_quantizer(x), weight, quantized.bias))
    assert change is there_and_back or not torch.equal(before, after)


def test_weights_are_held_no_longer_than_the_block_even_after_an_error():
    _, quantized, x = build('linear')
    with pytest.raises(ZeroDivisionError), hold_weights(quantized):
        with hold_weights(quantized):  # ends with the outer one
            quantized(x)
        assert quantized._weight_cache is not None
        copy.deepcopy(quantized)
        1 / 0  # noqa: B018
    assert quantized._weight_cache is None
    calls = count_quantizations(quantized)
    quantized(x)
    quantized(x)
    assert len(calls) == 2


def test_what_was_kept_without_gradients_does_not_cost_a_held_weight_its_own():
    _, quantized, x = build('linear')
    with hold_weights(quantized):
        with torch.no_grad():
            quantized(x)
        quantized(x).sum().backward()
    assert quantized.weight.grad.abs().sum() > 0


def test_switching_the_weight_off_is_seen_despite_the_cache():
    layer, quantized, x = build('linear')
    with torch.no_grad():
        quantized(x)
        quantized.weight_quantizer.mode = 'off'
        assert torch.equal(quantized.quantized_weight(), layer.weight)


def test_cache_made_in_inference_mode_serves_a_later_backward():
    _, quantized, x = build('linear')
    quantized.requires_grad_(False)
    with torch.inference_mode():
        quantized(x)
    x = x.clone().requires_grad_()
    quantized(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_layer_built_in_inference_mode_works():
    with torch.inference_mode():
        _, quantized, x = build('linear')
        assert torch.equal(quantized(x), quantized(x))


def test_cache_is_not_in_state_copies_or_pickles():
    _, quantized, x = build('linear')
    with torch.no_grad():
        out = quantized(x)
        assert quantized._weight_cache is not None
        assert not any('cache' in k for k in quantized.state_dict())
        twin = copy.deepcopy(quantized)
        assert twin._weight_cache is None and torch.equal(twin(x), out)
        twin.weight.mul_(2)
        assert torch.equal(quantized(x), out)


class NamedLinear(nn.Linear):
    """A user's subclass with an attribute of its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.init_cfg = dict(type='Normal')


class Doubling:
    """A quantized class that is no layer of ours."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize('copier', ['deepcopy', 'save'])
def test_adopted_subclasses_keep_class_attributes_and_hooks(copier):
    layer, x = NamedLinear(3, 2), torch.randn(4, 3)
    weight = layer.weight
    quantized = adopt(layer, QuantLinear)
    quantized.add_quantizers(LayerSpec())
    quantized.input_quantizer.calibrate_from(x)
    quantized.weight_quantizer.calibrate_from(quantized.weight.detach())
    assert quantized is layer and quantized.weight is weight and quantized.init_cfg == dict(type='Normal')
    assert isinstance(quantized, NamedLinear) and isinstance(quantized, QuantLinear)
    assert type(adopt(NamedLinear(3, 2), QuantLinear)) is type(quantized)
    if copier == 'deepcopy':
        twin = copy.deepcopy(quantized)
    else:
        file = io.BytesIO()
        torch.save(quantized, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert type(twin) is type(quantized) and torch.equal(twin(x), quantized(x))


def test_adopt_is_open_to_other_classes_and_keeps_hooks():
    layer, calls = nn.Linear(3, 2), []
    layer.register_forward_hook(lambda *args: calls.append(1))
    x = torch.randn(4, 3)
    expected = 2 * layer(x)
    assert torch.equal(adopt(layer, Doubling)(x), expected)
    assert len(calls) == 2 and isinstance(layer, nn.Linear)


def test_matmul():
    a, b = torch.rand(2, 3, 5, 4), torch.randn(2, 3, 4, 6)
    matmul, outputs = QuantMatMul(8, 4), []
    with pytest.raises(NotCalibratedError):
        matmul(a, b)
    calibrate(matmul, lambda: outputs.append(matmul(a, b)))
    assert torch.equal(outputs[0], a @ b)
    left = fake_quantize(a, *choose_qparams(a.min(), a.max(), 8, False), 0, 255)
    right = fake_quantize(b, *choose_qparams(b.min(), b.max(), 4, False), 0, 15)
    assert torch.equal(matmul(a, b), left @ right)


def test_matmul_masks_rows_of_the_left_operand_only():
    a, b = torch.ones(4, 3, 2, 2), torch.full((4, 3, 2, 2), 7.0)
    a[:, :, 1] = 100.0
    matmul = QuantMatMul()
    mask = torch.tensor([[[True, False]], [[True, False]]])  # two windows, two images
    calibrate(matmul, lambda: matmul(a, b, mask))
    torch.testing.assert_close(matmul.lhs_quantizer.scale, torch.tensor(1 / 255))
    torch.testing.assert_close(matmul.rhs_quantizer.scale, torch.tensor(7 / 255))


def test_matmul_with_operands_in_float():
    a, b = torch.rand(3, 4), torch.randn(4, 2)
    assert torch.equal(QuantMatMul.from_spec(None)(a, b), a @ b)
    matmul = QuantMatMul.from_spec(LayerSpec(4, 6), quantize_lhs=False)
    assert matmul.lhs_quantizer is None and matmul.rhs_quantizer.bits == 6


def test_layer_masks_rows():
    quantized = quantized_copy(nn.Linear(2, 2), QuantLinear)
    x, mask = torch.tensor([[[255.0, 0.0], [999.0, 999.0]]]), torch.tensor([True, False])
    calibrate(quantized, lambda: quantized(x, mask))
    assert quantized.input_quantizer.scale == 1


def test_empty_batches_pass():
    for kind in LAYERS:
        layer, quantized, x = build(kind)
        assert quantized(x[:0]).shape == layer(x[:0]).shape


@ALL
def test_full_precision_weights_leave_activations_quantized_and_modes_as_they_were(kind):
    _, layer, x = build(kind)
    other = copy.deepcopy(layer)
    other.weight_quantizer.mode = 'off'
    quantized = layer(x)
    with pytest.raises(RuntimeError, match='stop'), full_precision_weights(layer):
        torch.testing.assert_close(layer(x), other(x), rtol=0, atol=0)
        raise RuntimeError('stop')
    assert not torch.equal(quantized, other(x))
    torch.testing.assert_close(layer(x), quantized, rtol=0, atol=0)
    with full_precision_weights(other):
        pass
    assert other.weight_quantizer.mode == 'off'
