"""Logarithmic quantization against its formula, and delta against an exact search on the raw values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psaq_mm.errors import DataError, NotCalibratedError, SpecError
from psaq_mm.quantization import LogGrid, LogObserver, Percentile
from psaq_mm.quantization.logarithmic import fake_log_quantize, log_dequantize, log_quantize

BITS = st.integers(2, 8)
BASE = st.sampled_from(['log2', 'log_sqrt2'])
NOT_NAN = st.floats(width=32, allow_nan=False)
SHARES = st.floats(0, 2, width=32)
DELTA = st.one_of(st.floats(2**-20, 1, width=32), st.floats(2**-126, 2.0**127, width=32))
CANDIDATES = (1.0, 0.99999, 0.9999, 0.999)
PER_OCTAVE = {'log2': 1, 'log_sqrt2': 2}


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def every_code(bits):
    return torch.arange(2**bits + 1, dtype=torch.int32)


@pytest.mark.parametrize('base', ['log2', 'log_sqrt2'])
@pytest.mark.parametrize('bits', [2, 3, 4])
def test_codes_by_the_formula(bits, base):
    delta, m = 0.3, PER_OCTAVE[base]
    # off the ties, where digits decide
    values = [delta * 2 ** (-i / 16) for i in range(-20, 16 * 20) if (i * m) % 16 != 8]
    for value, code in zip(values, log_quantize(torch.tensor(values), torch.tensor(delta), bits, base).tolist()):
        expected = max(round(-m * math.log2(value / delta)), 0)
        assert code == (expected if expected < 2**bits else 2**bits)


@pytest.mark.parametrize('base', ['log2', 'log_sqrt2'])
@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('delta', [1.0, 0.37, 2e-5, 40.0])
def test_every_code_survives_the_way_to_its_value_and_back(bits, base, delta):
    delta = torch.tensor(delta)
    codes = every_code(bits)
    values = log_dequantize(codes, delta, bits, base)
    assert values[0] == delta and values[-1] == 0 and (values[:-1].diff() <= 0).all()
    least = torch.finfo(torch.float32).tiny
    normal = (values.minimum(values / delta) > least) | (codes == 2**bits)  # 2**-255 is no float32
    assert torch.equal(log_quantize(values, delta, bits, base)[normal], codes[normal])
    expected = delta.double() * torch.exp2(-codes.double() / PER_OCTAVE[base])
    expected[-1] = 0
    torch.testing.assert_close(values[normal].double(), expected[normal], rtol=3e-7, atol=0)


def test_what_lies_past_the_last_level_is_zero():
    delta = torch.tensor(1.0)
    x = torch.tensor([2.0**-3.4, 2.0**-3.6, 2.0**-50, 1e-45, 0.0, -0.0, -1.0, -float('inf')])
    assert log_quantize(x, delta, 2, 'log2').tolist() == [3] + [4] * 7
    assert fake_log_quantize(x, delta, 2, 'log2').tolist() == [0.125] + [0.0] * 7


def test_what_a_machine_may_flush_is_zero():
    least = torch.finfo(torch.float32).tiny
    values = torch.tensor([2.0**-125, 2 * least, least / 2, 1e-44, 0.0, -1.0])
    codes = log_quantize(values, torch.tensor(1.0), 8, 'log_sqrt2')
    assert codes.tolist() == [250, 250, 256, 256, 256, 256]
    assert fake_log_quantize(values, torch.tensor(1.0), 8, 'log_sqrt2').tolist()[2:] == [0] * 4


def test_what_exceeds_delta_saturates():
    x = torch.tensor([0.3, 0.5, 100.0, 3e38, float('inf')])
    assert log_quantize(x, torch.tensor(0.25), 4, 'log_sqrt2').tolist() == [-0, 0, 0, 0, 0]
    assert fake_log_quantize(x, torch.tensor(0.25), 4, 'log_sqrt2').tolist() == [0.25] * 5


@given(st.lists(st.one_of(SHARES, NOT_NAN), min_size=1, max_size=40), DELTA, BITS, BASE)
@settings(max_examples=300)
def test_fake_quantize_is_dequantize_of_quantize(values, delta, bits, base):
    x, delta = torch.tensor(values), torch.tensor(delta)
    expected = log_dequantize(log_quantize(x, delta, bits, base), delta, bits, base)
    assert same_bits(fake_log_quantize(x, delta, bits, base), expected)
    assert same_bits(fake_log_quantize(x.requires_grad_(), delta, bits, base).detach(), expected)
    assert torch.isfinite(expected).all() and (expected >= 0).all()


@given(st.lists(SHARES, min_size=1, max_size=30), BITS, BASE)
def test_gradient_is_one_inside_and_zero_where_clipped_or_flushed(values, bits, base):
    x, delta = torch.tensor(values, requires_grad=True), torch.tensor(0.9)
    weight = torch.arange(1.0, len(values) + 1)
    (fake_log_quantize(x, delta, bits, base) * weight).sum().backward()
    raw = torch.round(-PER_OCTAVE[base] * torch.log2(x.detach() / delta))
    inside = (raw >= 0) & (raw <= 2**bits - 1)
    assert torch.equal(x.grad, weight * inside)


def test_gradient_stops_at_the_code_of_zero():
    # Raw codes 0, 3 (the last level) and 4: the last is flushed although it equals the code that stands for zero.
    x = torch.tensor([1.0, 2.0**-3, 2.0**-4], requires_grad=True)
    y = fake_log_quantize(x, torch.tensor(1.0), 2, 'log2')
    y.sum().backward()
    assert y.tolist() == [1.0, 0.125, 0.0] and x.grad.tolist() == [1.0, 1.0, 0.0]


def test_backward_keeps_one_byte_an_element():
    x = torch.rand(1000, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fake_log_quantize(x, torch.tensor(1.0), 4, 'log_sqrt2')
    assert [(t.dtype, t.shape) for t in kept] == [(torch.bool, x.shape)]


def test_nan_stays_nan_and_has_no_code():
    x = torch.tensor([0.5, float('nan'), 0.0])
    for grad in (False, True):
        y = fake_log_quantize(x.clone().requires_grad_(grad), torch.tensor(1.0), 4, 'log_sqrt2')
        assert torch.isnan(y).tolist() == [False, True, False]
    with pytest.raises(DataError, match='NaN'):
        log_quantize(x, torch.tensor(1.0), 4, 'log_sqrt2')


@pytest.mark.parametrize('base', ['log2', 'log_sqrt2'])
def test_computed_in_float32_also_under_autocast(base):
    x = torch.rand(1000).pow(3)
    delta = torch.tensor(0.91)
    expected = fake_log_quantize(x, delta, 8, base)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert same_bits(fake_log_quantize(x, delta, 8, base), expected)
        codes = log_quantize(x, delta, 8, base)
        assert same_bits(log_dequantize(codes, delta, 8, base), expected)
    for dtype in (torch.float16, torch.bfloat16):
        y = fake_log_quantize(x.to(dtype), delta, 8, base)
        assert y.dtype == dtype and torch.equal(y, fake_log_quantize(x.to(dtype).float(), delta, 8, base).to(dtype))


def test_inputs_stay_as_they_are():
    x, codes = torch.rand(50), every_code(4).float()
    copies = x.clone(), codes.clone()
    fake_log_quantize(x, torch.tensor(1.0), 4, 'log2')
    log_quantize(x, torch.tensor(1.0), 4, 'log2')
    log_dequantize(codes, torch.tensor(0.5), 4, 'log2')
    assert torch.equal(x, copies[0]) and torch.equal(codes, copies[1])


def test_unknown_settings():
    x, delta = torch.rand(3), torch.tensor(1.0)
    for call in (
        lambda *setting: fake_log_quantize(x, delta, *setting),
        lambda *setting: log_quantize(x, delta, *setting),
        lambda *setting: log_dequantize(every_code(2), delta, *setting),
        LogGrid,
    ):
        with pytest.raises(SpecError, match="base 'ln'.*'log2', 'log_sqrt2'"):
            call(4, 'ln')
        with pytest.raises(SpecError, match='bits=1'):
            call(1, 'log2')
    with pytest.raises(SpecError, match='percentile 0.3'):
        LogObserver(Percentile((0.3,)))


def attention(kind, seed=0):
    """Softmax outputs, (rows, keys)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2000, 49, generator=generator)
    if kind == 'peaked':
        logits *= 6
    elif kind == 'masked':  # windows of a shifted Swin block: exact zeros
        logits[:, 20:] = -float('inf')
    elif kind == 'rare':  # mostly flat, a few rows on one key
        logits *= 0.2
        logits[::400, 3] = 20.0
    elif kind == 'long':  # a ViT's many keys: most values are far below a bin
        logits = torch.randn(60, 2500, generator=generator) * 4
    return logits.softmax(1)


def delta_of(observer, bits, base):
    return observer.qparams(LogGrid(bits, base))[0]


def exact_error(x, delta, bits, base):
    return (fake_log_quantize(x, delta, bits, base) - x).double().square().sum().item()


@pytest.mark.parametrize('kind', ['flat', 'peaked', 'masked', 'rare', 'long'])
@pytest.mark.parametrize('bits, base', [(2, 'log2'), (3, 'log_sqrt2'), (4, 'log2'), (4, 'log_sqrt2'), (8, 'log_sqrt2')])
def test_delta_has_the_least_squared_error(kind, bits, base):
    x = attention(kind)
    observer = LogObserver()
    for batch in x.split(300):
        observer.observe(batch)
    delta = delta_of(observer, bits, base)
    assert delta.dtype == torch.float32 and delta.shape == ()
    exact = [x.double().flatten().quantile(p).float() for p in CANDIDATES]
    best = min(exact_error(x, d, bits, base) for d in exact)
    assert exact_error(x, delta, bits, base) <= 1.01 * best
    assert min((delta - d).abs() for d in exact) <= observer.store.width * 1.001


def test_delta_depends_on_the_bits():
    # With few levels from the greatest value down, the many would be zero; with many levels the rare large ones count.
    x = torch.cat([torch.rand(100_000) * 0.01, torch.full((30,), 0.3)])
    observer = LogObserver()
    observer.observe(x)
    assert delta_of(observer, 2, 'log_sqrt2') < 0.02 and delta_of(observer, 8, 'log_sqrt2') > 0.29


def test_delta_does_not_depend_on_batches_and_rows_left_out_take_no_part():
    x = attention('peaked')
    whole, parts, masked = LogObserver(), LogObserver(), LogObserver()
    whole.observe(x)
    for batch in x.flip(0).split(77):
        parts.observe(batch)
    padded = torch.cat([x, torch.full((3, 49), 5.0)]).view(1, -1, 49)
    masked.observe(padded, torch.arange(2003) < 2000)
    assert delta_of(whole, 4, 'log_sqrt2') == delta_of(parts, 4, 'log_sqrt2') == delta_of(masked, 4, 'log_sqrt2')


@pytest.mark.parametrize(
    'value, delta', [(0.0, 1.0), (-2.0, 1.0), (0.125, 0.125), (1e-39, torch.finfo(torch.float32).tiny)]
)
def test_constant_data_gives_a_usable_delta(value, delta):
    observer = LogObserver()
    observer.observe(torch.full((100,), value))
    assert delta_of(observer, 4, 'log_sqrt2') == delta


def test_mostly_zeros():
    x = torch.zeros(100_000)
    x[:5] = torch.tensor([0.5, 0.4, 0.3, 0.2, 0.9])
    observer = LogObserver(Percentile((0.999, 1.0)))
    observer.observe(x)
    assert delta_of(observer, 4, 'log_sqrt2') == x.max()
    observer = LogObserver(Percentile((0.999,)))
    observer.observe(x)
    assert delta_of(observer, 4, 'log_sqrt2') > 0


def test_no_data_and_bad_data():
    observer = LogObserver()
    observer.observe(torch.zeros(0, 3))
    assert not observer.saw_data
    with pytest.raises(NotCalibratedError, match='saw no data'):
        delta_of(observer, 4, 'log2')
    with pytest.raises(DataError, match='NaN or infinity'):
        observer.observe(torch.tensor([0.1, float('nan')]))
