"""The arithmetic against its definition, ONNX Runtime and torch.ao; exact where it must be."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psaq_mm.errors import DataError, SpecError
from psaq_mm.quantization import choose_qparams, dequantize, fake_quantize, primitives, qrange, quantize

BITS = st.integers(2, 8)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
RANGE = st.tuples(FINITE, FINITE).map(sorted)


def same_bits(a, b):
    """Equality that tells -0.0 from 0.0."""
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def qparams_of(ends, bits, symmetric):
    return choose_qparams(torch.tensor(ends[0]), torch.tensor(ends[1]), bits, symmetric)


@pytest.mark.parametrize('bits', range(2, 9))
def test_qrange_has_two_to_the_bits_codes(bits):
    assert qrange(bits, False) == (0, 2**bits - 1)
    assert qrange(bits, True) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@pytest.mark.parametrize('bits', [1, 9, 0, -4, 4.0, '8', None, True])
def test_qrange_refuses_other_bits(bits):
    with pytest.raises(SpecError, match='2 to 8'):
        qrange(bits, True)


@given(RANGE, BITS, st.booleans())
def test_qparams_are_usable_for_every_finite_range(ends, bits, symmetric):
    scale, zero_point = qparams_of(ends, bits, symmetric)
    qmin, qmax = qrange(bits, symmetric)
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
    assert torch.isfinite(scale) and scale >= torch.finfo(torch.float32).tiny
    assert qmin <= zero_point <= qmax
    assert not symmetric or zero_point == 0


@given(RANGE, BITS, st.booleans())
def test_zero_is_exact(ends, bits, symmetric):
    qparams = qparams_of(ends, bits, symmetric)
    for zero in (0.0, -0.0):
        assert same_bits(fake_quantize(torch.tensor(zero), *qparams, *qrange(bits, symmetric)), torch.zeros(()))


@given(st.tuples(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32)).map(sorted), BITS, st.floats(0, 1))
def test_values_inside_the_range_are_at_most_one_step_off(ends, bits, share):
    scale, zero_point = qparams_of(ends, bits, False)
    x = torch.tensor(ends[0] + share * (ends[1] - ends[0]))
    # Half a step from rounding, half a step more at an end, where the zero point was rounded.
    assert abs(fake_quantize(x, scale, zero_point, *qrange(bits, False)) - x) <= scale * 1.001 + 1e-30


def test_known_qparams():
    scale, zero_point = choose_qparams(torch.tensor(-1.0), torch.tensor(2.0), 2, symmetric=False)
    assert (scale.item(), zero_point.item()) == (1.0, 1)
    scale, zero_point = choose_qparams(torch.tensor([-1.0, -14.0]), torch.tensor([7.0, 3.5]), 4, symmetric=True)
    assert scale.tolist() == [1.0, 2.0] and zero_point.tolist() == [0, 0]


def test_range_is_widened_to_zero():
    scale, zero_point = choose_qparams(torch.tensor([3.0, -5.0]), torch.tensor([255.0, -1.0]), 8, symmetric=False)
    assert zero_point.tolist() == [0, 255]
    torch.testing.assert_close(scale, torch.tensor([1.0, 5 / 255]), rtol=0, atol=0)


@pytest.mark.parametrize('symmetric', [True, False])
def test_constant_zero_gets_scale_one(symmetric):
    scale, zero_point = choose_qparams(torch.zeros(()), torch.zeros(()), 8, symmetric)
    assert scale == 1 and zero_point == 0


def test_full_float_range_does_not_overflow():
    big = torch.finfo(torch.float32).max
    scale, _ = choose_qparams(torch.tensor(-big), torch.tensor(big), 2, symmetric=False)
    assert math.isclose(scale.item(), big * 2 / 3, rel_tol=1e-6)


@pytest.mark.parametrize(
    'low, high, message',
    [
        (math.nan, 1.0, 'NaN'),
        (0.0, math.inf, 'infinity'),
        (-math.inf, 0.0, 'infinity'),
        (1.0, 0.0, 'upside down'),
    ],
)
def test_bad_ranges_are_refused(low, high, message):
    with pytest.raises(DataError, match=message):
        choose_qparams(torch.tensor(low), torch.tensor(high), 8, False)


def test_empty_and_mismatched_ranges_are_refused():
    with pytest.raises(DataError, match='empty'):
        choose_qparams(torch.zeros(0), torch.zeros(0), 8, False)
    with pytest.raises(DataError, match='shape'):
        choose_qparams(torch.zeros(2), torch.zeros(3), 8, False)


@given(st.lists(FINITE, min_size=1, max_size=40), RANGE, BITS, st.booleans())
@settings(max_examples=300)
def test_fake_quantize_is_dequantize_of_quantize(values, ends, bits, symmetric):
    x = torch.tensor(values)
    qparams, codes = qparams_of(ends, bits, symmetric), qrange(bits, symmetric)
    expected = dequantize(quantize(x, *qparams, *codes), *qparams)
    assert same_bits(fake_quantize(x, *qparams, *codes), expected)
    assert same_bits(fake_quantize(x.requires_grad_(), *qparams, *codes).detach(), expected)


@pytest.mark.parametrize('axis', [0, 1, -1])
@pytest.mark.parametrize('symmetric', [True, False])
def test_fake_quantize_is_dequantize_of_quantize_per_channel(axis, symmetric):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 6, 7, generator=generator) * 3
    channels = x.transpose(0, axis).flatten(1)
    for bits in range(2, 9):
        qparams = choose_qparams(channels.amin(1) * 0.7, channels.amax(1) * 0.7, bits, symmetric)
        codes = qrange(bits, symmetric)
        got = fake_quantize(x, *qparams, *codes, axis=axis)
        assert same_bits(got, dequantize(quantize(x, *qparams, *codes, axis=axis), *qparams, axis=axis))
        for c in range(channels.shape[0]):
            one = fake_quantize(x.select(axis, c), qparams[0][c], qparams[1][c], *codes)
            assert same_bits(got.select(axis, c).contiguous(), one.contiguous())


def onnx_codes(x, scale, zero_point, axis=None):
    onnx = pytest.importorskip('onnx')
    ort = pytest.importorskip('onnxruntime')
    helper, proto = onnx.helper, onnx.TensorProto
    attributes = {} if axis is None else dict(axis=axis)
    out = {np.dtype('uint8'): proto.UINT8, np.dtype('int8'): proto.INT8}[zero_point.dtype]
    graph = helper.make_graph(
        [helper.make_node('QuantizeLinear', ['x', 's', 'z'], ['y'], **attributes)],
        'g',
        [helper.make_tensor_value_info('x', proto.FLOAT, x.shape)],
        [helper.make_tensor_value_info('y', out, x.shape)],
        [onnx.numpy_helper.from_array(scale, 's'), onnx.numpy_helper.from_array(zero_point, 'z')],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 13)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, ['CPUExecutionProvider']).run(None, {'x': x})[0]


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('seed', range(4))
def test_codes_are_those_of_onnxruntime(symmetric, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50_000, generator=generator) * 2
    scale, zero_point = choose_qparams(x.quantile(0.01), x.quantile(0.99), 8, symmetric)
    # Many exact ties and their neighbours, where a multiplication by 1 / scale would go wrong.
    ties = (torch.arange(-400, 400) + 0.5) * scale
    x = torch.cat([x, ties, torch.nextafter(ties, torch.tensor(9e9)), torch.nextafter(ties, torch.tensor(-9e9))])
    expected = onnx_codes(x.numpy(), scale.numpy(), zero_point.numpy().astype(np.int8 if symmetric else np.uint8))
    got = quantize(x, scale, zero_point, *qrange(8, symmetric))
    np.testing.assert_array_equal(got.numpy(), expected.astype(np.int32))


def test_per_channel_codes_are_those_of_onnxruntime():
    w = torch.randn(16, 8, 3, generator=torch.Generator().manual_seed(0))
    for axis in (0, 1):
        rows = w.transpose(0, axis).flatten(1)
        scale, zero_point = choose_qparams(rows.amin(1), rows.amax(1), 8, True)
        expected = onnx_codes(w.numpy(), scale.numpy(), zero_point.numpy().astype(np.int8), axis)
        np.testing.assert_array_equal(quantize(w, scale, zero_point, -128, 127, axis).numpy(), expected)


def test_division_differs_from_multiplication_by_the_inverse():
    """The reason for the division: if this held for no value, the test above would show nothing."""
    scale, zero_point = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.01, torch.zeros(1000).int()
    x = (torch.arange(0, 200) + 0.5) * scale[:, None]
    multiplied = torch.round(x * (1 / scale[:, None])).int()
    assert not torch.equal(quantize(x, scale, zero_point, 0, 255, axis=0), multiplied)


def test_qparams_agree_with_torch_ao():
    from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver

    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) + 0.3
    theirs = MinMaxObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
    theirs(x)
    scale, zero_point = theirs.calculate_qparams()
    ours = choose_qparams(x.min(), x.max(), 8, False)
    torch.testing.assert_close(ours[0], scale.reshape(()), rtol=1e-6, atol=0)
    assert ours[1] == zero_point
    theirs = PerChannelMinMaxObserver(dtype=torch.quint8, qscheme=torch.per_channel_affine, ch_axis=0)
    theirs(x)
    scale, zero_point = theirs.calculate_qparams()
    ours = choose_qparams(x.amin(1), x.amax(1), 8, False)
    torch.testing.assert_close(ours[0], scale, rtol=1e-6, atol=0)
    assert torch.equal(ours[1], zero_point.int())


def test_values_and_gradient_agree_with_torch_fused():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(1)) * 2
    # A power of two has an exact inverse, so the fused operator's multiplication gives the same codes.
    scale, zero_point = torch.tensor(2.0**-6), torch.tensor(100, dtype=torch.int32)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a = fake_quantize(ours, scale, zero_point, 0, 255)
    b = torch.fake_quantize_per_tensor_affine(theirs, scale, zero_point, 0, 255)
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    weight = torch.randn(10_000, generator=torch.Generator().manual_seed(2))
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)
    assert 0 < (ours.grad == 0).sum() < 10_000


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30), BITS, st.booleans())
def test_gradient_is_one_inside_and_zero_where_clipped(values, bits, symmetric):
    scale, zero_point = qparams_of((-20.0, 30.0), bits, symmetric)
    qmin, qmax = qrange(bits, symmetric)
    x = torch.tensor(values, requires_grad=True)
    fake_quantize(x, scale, zero_point, qmin, qmax).sum().backward()
    codes = torch.round(x.detach() / scale) + zero_point
    assert torch.equal(x.grad, ((codes >= qmin) & (codes <= qmax)).float())


def test_gradient_per_channel_and_second_order():
    x = torch.tensor([[-3.0, 0.2, 9.0], [-3.0, 0.2, 9.0]], requires_grad=True)
    scale, zero_point = torch.tensor([1.0, 2.0]), torch.tensor([0, 2], dtype=torch.int32)
    y = fake_quantize(x, scale, zero_point, 0, 7, axis=0)
    (grad,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    assert torch.equal(grad, 2 * y * torch.tensor([[0, 1, 0], [1, 1, 1.0]]))
    grad.sum().backward()
    assert torch.equal(x.grad, torch.tensor([[0, 2, 0], [2, 2, 2.0]]))


def kept_bytes(y):
    """Of what the graph of ``y`` holds for its backward pass."""
    places = y.grad_fn.places
    found = list(y.grad_fn.saved_tensors) + ([] if places is None else places.rows + places.inside)
    return sum(t.numel() * t.element_size() for t in found)


@pytest.mark.parametrize('axis', [None, 0])
def test_backward_keeps_nothing_where_nothing_is_clipped_and_else_no_more_than_a_byte_an_element(axis):
    x = torch.randn(64, 1024)
    scale, zero_point = choose_qparams(x.min(), x.max(), 8, False)
    if axis is not None:
        scale, zero_point = scale.expand(64), zero_point.expand(64)
    y = fake_quantize(x.requires_grad_(), scale, zero_point, 0, 255, axis)
    assert kept_bytes(y) == 0
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    with torch.no_grad():
        x[5, 7] = 100.0
    assert 0 < kept_bytes(fake_quantize(x, scale, zero_point, 0, 255, axis)) < 2 * 1024
    assert kept_bytes(fake_quantize(x, scale / 50, zero_point, 0, 255, axis)) <= x.numel() + 8 * 64


VIEWS = {
    'as it is': lambda t: t,
    'transposed': lambda t: t.transpose(-2, -1),
    'queries': lambda t: t.permute(0, 2, 1, 3),
    'keys': lambda t: t.permute(0, 2, 3, 1),
    'part': lambda t: t[:, :, 1:4],
    'expanded': lambda t: t[:1].expand(4, -1, -1, -1),
    'channels last': lambda t: t.contiguous(memory_format=torch.channels_last),
    'empty': lambda t: t[:0],
}


@pytest.mark.parametrize('view', VIEWS)
@pytest.mark.parametrize('scale', [0.02, 0.003])
def test_memory_layout_and_chunks_change_neither_codes_nor_gradients(view, scale, monkeypatch):
    monkeypatch.setattr(primitives, '_CHUNK', 4096)
    values = torch.randn(3, 8, 6, 256, generator=torch.Generator().manual_seed(0))
    values[0, 0, 0, :2] = torch.tensor([math.inf, -math.inf])
    leaf, qparams = values.clone().requires_grad_(), (torch.tensor(scale), torch.tensor(100, dtype=torch.int32))
    y = fake_quantize(VIEWS[view](leaf), *qparams, 0, 255)
    seen = VIEWS[view](values)
    assert same_bits(y.detach().contiguous(), dequantize(quantize(seen, *qparams, 0, 255), *qparams).contiguous())
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(weights)
    other = values.clone().requires_grad_()
    codes = (seen / qparams[0]).round() + 100
    VIEWS[view](other).backward(weights * ((codes >= 0) & (codes <= 255)))
    assert torch.equal(leaf.grad, other.grad)


def test_nan_has_no_gradient_and_its_neighbours_have():
    x = torch.tensor([0.1, math.nan, 0.2]).requires_grad_()
    fake_quantize(x, torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), 0, 15).backward(
        torch.tensor([1.0, 2.0, 3.0])
    )
    assert x.grad.tolist() == [1.0, 0.0, 3.0]


def test_incoming_gradients_are_left_as_they_are():
    x, grad = torch.tensor([0.1, 9.0], requires_grad=True), torch.tensor([1.0, 2.0])
    fake_quantize(x, torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), 0, 15).backward(grad)
    assert grad.tolist() == [1.0, 2.0] and x.grad.tolist() == [1.0, 0.0]


def test_input_is_not_changed_and_layout_is_kept():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    before = x.clone()
    y = fake_quantize(x, torch.tensor(0.1), torch.tensor(3, dtype=torch.int32), 0, 255)
    assert torch.equal(x, before) and y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype):
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale, zero_point = torch.tensor(0.013), torch.tensor(128, dtype=torch.int32)
    y = fake_quantize(x, scale, zero_point, 0, 255)
    assert y.dtype == dtype
    assert torch.equal(y, dequantize(quantize(x, scale, zero_point, 0, 255), scale, zero_point).to(dtype))


def test_autocast_changes_nothing():
    x = torch.randn(500, requires_grad=True)
    scale, zero_point = torch.tensor(0.013), torch.tensor(128, dtype=torch.int32)
    plain = fake_quantize(x, scale, zero_point, 0, 255)
    with torch.autocast('cpu', torch.bfloat16):
        assert same_bits(fake_quantize(x, scale, zero_point, 0, 255).detach(), plain.detach())


def test_nan_and_infinity():
    scale, zero_point = torch.tensor(0.5), torch.tensor(3, dtype=torch.int32)
    x = torch.tensor([math.inf, -math.inf])
    assert quantize(x, scale, zero_point, 0, 15).tolist() == [15, 0]
    assert fake_quantize(x, scale, zero_point, 0, 15).tolist() == [6.0, -1.5]
    assert torch.isnan(fake_quantize(torch.tensor(math.nan), scale, zero_point, 0, 15))
    with pytest.raises(DataError, match='NaN'):
        quantize(torch.tensor([1.0, math.nan]), scale, zero_point, 0, 15)


def test_empty_tensors_pass():
    x = torch.zeros(0, 4, requires_grad=True)
    y = fake_quantize(x, torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), 0, 15)
    y.sum().backward()
    assert y.shape == (0, 4) and x.grad.shape == (0, 4)


def test_scale_must_fit_the_axis():
    x, zero_point = torch.zeros(2, 3), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(DataError, match='name its axis'):
        fake_quantize(x, torch.ones(3), zero_point, 0, 15)
    for axis in (0, 2, -3):
        with pytest.raises(DataError, match='does not fit axis'):
            fake_quantize(x, torch.ones(3), zero_point, 0, 15, axis=axis)
