"""Products of quantized values in full float32: TF32, emulated on the CPU, is off where it would change them."""

import pytest
import torch
from tf32 import shortened, tf32  # noqa: F401
from torch import nn

from psaq_mm.quantization import QuantConv2d, calibrate, full_float32, quantize, quantize_, use_full_float32


def allowed():
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


def test_the_emulation_rounds_as_a_card_does():
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11 + 2**-20, 1 + 2**-12, -3.1415927, 0.0])
    assert torch.equal(shortened(x), torch.tensor([1.0, 1 + 2**-10, 1 + 2**-10, 1.0, -3.140625, 0.0]))


@pytest.mark.parametrize('before', [(True, 'high'), (True, 'highest'), (False, 'medium'), (False, 'highest')])
def test_the_switches_come_back_after_an_error_too(tf32, before):  # noqa: F811
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])
    with pytest.raises(KeyError), full_float32():
        assert allowed() == (False, 'highest')
        raise KeyError
    assert allowed() == before
    assert use_full_float32() == (before != (False, 'highest')) and not use_full_float32()
    assert allowed() == (False, 'highest')


def test_a_quantized_model_multiplies_its_codes_and_nothing_else(tf32):  # noqa: F811
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(2), nn.Linear(36, 4))
    quantize_(model, 'w8a8')
    images = torch.randn(2, 8, 8, 8)
    calibrate(model, lambda: model(images))
    layer = model[0]
    assert isinstance(layer, QuantConv2d)

    def centred(x, quantizer, shape):
        codes = quantize(
            x, quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax, quantizer.channel_axis
        )
        return (codes - quantizer.zero_point.view(shape)).double()

    codes, weights = (
        centred(images, layer.input_quantizer, ()),
        centred(layer.weight, layer.weight_quantizer, (-1, 1, 1, 1)),
    )
    sums = torch.conv2d(codes, weights)  # of integers: exact
    scale = layer.input_quantizer.scale.double() * layer.weight_quantizer.scale.double().view(-1, 1, 1)
    expected = sums * scale + layer.bias.double().view(-1, 1, 1)
    found = layer(images).double()
    # A float32 sum of 72 products; with TF32 it is off by 1e-4.
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6
    model(images)
    assert not tf32
