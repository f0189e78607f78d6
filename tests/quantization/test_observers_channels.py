"""Ranges per channel of activations against plain references on the raw data."""

from random import Random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from psaq_mm.errors import DataError, NotCalibratedError, SpecError
from psaq_mm.quantization import ChannelGrid, FeatureObserver, Percentile, Shrink, build_rule
from psaq_mm.quantization.histograms import ChannelHistogram, Distribution

NAMES = ['minmax', 'percentile', 'mse']
CANDIDATES = (1.0, 0.99999, 0.9999, 0.999)
Q = [0.0, 1e-5, 1e-4, 0.001, 0.25, 0.5, 0.75, 0.999, 0.9999, 0.99999, 1.0]


def make_tokens(n=20_000, seed=0):
    """A kind of channel each: around 0, far from 0, heavy tails, an outlier, mostly 0, tiny, huge, one-sided,
    uniform."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 9, generator=generator)
    u = torch.rand(n, 9, generator=generator)
    x[:, 1] = x[:, 1] * 0.25 - 1000.0
    x[:, 2] /= u[:, 2].clamp(min=0.01)
    x[7, 3] = 300.0
    x[:, 4] = x[:, 4].relu() * (u[:, 4] < 0.02)
    x[:, 5] *= 1e-20
    x[:, 6] = x[:, 6] * 1e30 + 1e31
    x[:, 7] = u[:, 7] ** 8
    x[:, 8] = u[:, 8] * 3 + 2
    return x


def feature_observer(name):
    return FeatureObserver(build_rule(name))


def width_of(histogram):
    return torch.exp2(histogram.exponent.double())


def histogram_of(batches):
    histogram = ChannelHistogram()
    for batch in batches:
        histogram.update(batch)
    return histogram


def quantiles_of(histogram, q):
    return torch.cat([values.quantiles(q) for values in histogram.parts()], dim=1)


def fake(x, scale, zero_point, bits):
    """The plain quantizer, ``(n, C)`` in float64."""
    codes = ((x.double() / scale.double()).round() + zero_point).clamp(0, 2**bits - 1)
    return (codes - zero_point) * scale.double()


def errors_of(x, scale, zero_point, bits):
    return (fake(x, scale, zero_point, bits) - x.double()).square().sum(0)


def exact_ranges(x):
    wide = x.double()
    return [(wide.quantile(1 - p, dim=0), wide.quantile(p, dim=0)) for p in CANDIDATES]


def test_bins_are_fine_compared_to_each_channels_own_range():
    x = make_tokens()
    histogram = histogram_of([x])
    widths = (x.double().amax(0) - x.double().amin(0)) / width_of(histogram)
    assert (widths >= 1023).all() and (widths <= 2048).all()
    assert (histogram.counts.sum(1) == len(x)).all()


def test_quantiles_are_within_a_bin_of_the_exact_ones():
    x = make_tokens()
    histogram = histogram_of(x.split(3_000))
    got = quantiles_of(histogram, Q)
    expected = torch.stack([x.double().quantile(q, dim=0) for q in Q])
    assert ((got - expected).abs() <= width_of(histogram) * 1.0001).all()
    assert torch.equal(got[0], x.double().amin(0)) and torch.equal(got[-1], x.double().amax(0))


@pytest.mark.parametrize('n', [1, 2, 3, 10])
def test_quantiles_of_few_values(n):
    x = make_tokens(50)[:n]
    histogram = histogram_of([x])
    got = quantiles_of(histogram, Q)
    expected = torch.stack([x.double().quantile(q, dim=0) for q in Q])
    # float64 rounds the interpolation itself
    assert ((got - expected).abs() <= width_of(histogram) * 1.0001 + 1e-12 * expected.abs()).all()


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_squared_error_is_the_one_on_the_data(bits):
    x = make_tokens()
    histogram = histogram_of([x])
    values = next(histogram.parts())
    for low, high in exact_ranges(x):
        scale, zero_point = ChannelGrid(bits).qparams(low, torch.maximum(high, low))
        exact = errors_of(x, scale, zero_point, bits)
        step = scale.double()[:, None]
        levels = (torch.arange(2**bits) - zero_point[:, None]) * step
        got = values.squared_error(levels[:, :-1] + step / 2, levels)
        usable = high > low
        near = 0.03 * exact + len(x) * width_of(histogram) ** 2
        assert ((got - exact).abs() <= near)[usable].all()


@given(
    st.lists(st.integers(0, 9), min_size=8, max_size=8).filter(any),
    st.lists(st.floats(-3, 11), min_size=1, max_size=6),
    st.integers(-5, 5),
)
def test_squared_error_of_evenly_spread_values(counts, edges, start):
    """Against the integral over every piece of a bin that has one level, for levels anywhere."""
    edges = [edge + start for edge in sorted(edges)]
    levels = [edges[0] - 0.3] + [edge + 0.2 for edge in edges]
    expected = 0.0
    for left, count in enumerate(counts, start):
        for lower, upper, level in zip([-9e9] + edges, edges + [9e9], levels):
            a, b = max(lower, left), min(upper, left + 1)
            if a < b:
                expected += count * ((b - level) ** 3 - (a - level) ** 3) / 3
    start, width = torch.tensor([start, 1], dtype=torch.float64)[:, None]
    values = Distribution(torch.tensor([counts]), start, width, start, start + 8)
    got = values.squared_error(*(torch.tensor([x], dtype=torch.float64) for x in (edges, levels)))
    assert got.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False), st.floats(-4, 4, width=32)
)


def test_a_tiny_negative_value_beside_a_huge_one_keeps_its_side():
    rows = torch.tensor([[-4.6e-37], [1.1e12]])
    whole, parts = histogram_of([rows]), histogram_of(rows.split(1))
    for histogram in (whole, parts):  # bin -1 ends at 0
        assert int(histogram.counts[0, -1 - int(histogram.start[0])]) == 1


@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=30), st.randoms(use_true_random=False))
@settings(max_examples=150)
@example([(0.0, 0.0), (0.0, -(2.0**-14))], Random(0))
def test_outcome_does_not_depend_on_order_or_batches(rows, random):
    x = torch.tensor(rows)
    whole = histogram_of([x])
    shuffled = list(rows)
    random.shuffle(shuffled)
    parts = histogram_of(torch.tensor(shuffled).split(random.randint(1, 4)))
    assert (whole.counts.sum(1) == len(x)).all() and (parts.counts.sum(1) == len(x)).all()
    assert torch.equal(whole.exponent, parts.exponent)
    for channel in range(2):  # bins are where they are; only which empty ones are kept beside them may differ
        bins = [histogram.counts[channel].nonzero() for histogram in (whole, parts)]
        assert torch.equal(bins[0] + whole.start[channel], bins[1] + parts.start[channel])
        assert torch.equal(whole.counts[channel][bins[0]], parts.counts[channel][bins[1]])
    q = [0.0, 0.01, 0.5, 0.99, 1.0]
    assert torch.equal(quantiles_of(whole, q), quantiles_of(parts, q))


def test_growing_ranges_keep_every_count():
    x = make_tokens(4_000) * torch.logspace(-6, 3, 4_000)[:, None] + torch.linspace(-5, 90, 4_000)[:, None]
    whole, parts = histogram_of([x]), histogram_of(x.split(37))
    assert torch.equal(whole.exponent, parts.exponent) and (parts.counts.sum(1) == len(x)).all()
    assert torch.equal(quantiles_of(whole, Q), quantiles_of(parts, Q))


@pytest.mark.parametrize('chunk, channels', [(64, 2), (1, 3), (1000, 5)])
def test_chunks_do_not_matter(monkeypatch, chunk, channels):
    x = make_tokens(500)
    expected = FeatureObserver(Percentile())
    expected.observe(x)
    monkeypatch.setattr(ChannelHistogram, '_VALUES', chunk)
    monkeypatch.setattr(ChannelHistogram, '_CHANNELS', channels)
    observer = FeatureObserver(Percentile())
    observer.observe(x)
    assert torch.equal(observer.store.counts, expected.store.counts)
    for got, wanted in zip(observer.qparams(ChannelGrid(4)), expected.qparams(ChannelGrid(4))):
        assert torch.equal(got, wanted)


def test_counts_beyond_int32():
    histogram = histogram_of([torch.tensor([[1.0], [2.0]])])
    histogram.counts *= 2**29
    histogram.rows *= 2**29
    histogram.update(torch.ones(2**20, 1))
    assert histogram.counts.dtype == torch.int32
    histogram.counts *= 2
    histogram.rows *= 2
    histogram.update(torch.ones(3, 1))
    assert histogram.counts.sum() == 2**31 + 2**21 + 3 and histogram.counts.max() == 2**30 + 2**21 + 3


@pytest.mark.parametrize('bits', [2, 4, 6, 8])
def test_percentile_has_the_least_squared_error(bits):
    x = make_tokens()
    observer = FeatureObserver(Percentile(CANDIDATES))
    for batch in x.view(10, 40, 50, 9):
        observer.observe(batch)
    scale, zero_point = observer.qparams(ChannelGrid(bits))
    best = torch.full((9,), torch.inf, dtype=torch.float64)
    for low, high in exact_ranges(x):
        error = errors_of(x, *ChannelGrid(bits).qparams(low, torch.maximum(high, low)), bits)
        best = torch.where(high > low, torch.minimum(best, error), best)
    assert (errors_of(x, scale, zero_point, bits) <= 1.03 * best).all()


def test_percentile_gives_the_scale_of_the_exact_search():
    x = make_tokens()[:, [0, 1, 7, 8]]
    observer = FeatureObserver(Percentile((0.999,)))
    observer.observe(x)
    wide = x.double()
    low, high = wide.quantile(1 - 0.999, dim=0), wide.quantile(0.999, dim=0)
    scale, zero_point = observer.qparams(ChannelGrid(4))
    within = 2 * width_of(observer.store) / 15
    assert ((scale - (high - low) / 15).abs() <= within * 1.001).all()
    assert ((zero_point * scale.double() + low).abs() <= scale / 2 + width_of(observer.store) * 1.001).all()


def test_candidate_is_chosen_channel_by_channel_and_by_bits():
    x = make_tokens()[:, [0, 0]]
    x[:4, 1] = 30.0
    observer = FeatureObserver(Percentile())
    observer.observe(x)
    (a4, b4), (a8, b8) = observer.qparams(ChannelGrid(4))[0], observer.qparams(ChannelGrid(8))[0]
    assert b4 * 15 < 10 < b8 * 255 and a4 < b8 * 16 and a8 * 255 < 10


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_mse_takes_the_best_factor_around_the_middle(bits):
    x = make_tokens(3_000)
    factors = (1.0, 0.9, 0.7, 0.5)
    observer = FeatureObserver(Shrink(factors))
    observer.observe(x)
    errors = []
    low, high = x.double().amin(0), x.double().amax(0)
    for factor in factors:
        cut = (1 - factor) * (high - low) / 2
        errors.append(errors_of(x, *ChannelGrid(bits).qparams(low + cut, high - cut), bits))
    assert (errors_of(x, *observer.qparams(ChannelGrid(bits)), bits) <= 1.03 * torch.stack(errors).amin(0)).all()


def test_minmax_puts_the_ends_on_the_first_and_the_last_code():
    observer = feature_observer('minmax')
    for batch in (torch.tensor([[5.0, -1.0], [5.5, 0.0]]), torch.tensor([[[6.5, 2.0]]]), torch.zeros(0, 2)):
        observer.observe(batch)
    assert observer.ends()[0].tolist() == [5.0, -1.0] and observer.ends()[1].tolist() == [6.5, 2.0]
    scale, zero_point = observer.qparams(ChannelGrid(2))
    assert scale.tolist() == [0.5, 1.0] and zero_point.tolist() == [-10, 1]
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int64


@given(st.tuples(FLOATS, FLOATS).map(sorted), st.integers(2, 8))
@settings(max_examples=300)
def test_qparams_are_usable_for_every_range(ends, bits):
    low, high = torch.tensor(ends)[:, None]
    scale, zero_point = ChannelGrid(bits).qparams(low, high)
    assert torch.isfinite(scale).all() and scale >= torch.finfo(torch.float32).tiny
    got = fake(torch.stack([low, high]), scale, zero_point, bits)
    # The zero point is rounded: half a step, beside the half a step of any code.
    slack = scale.double() * 1.001 + 1e-6 * max(map(abs, ends))
    assert ((got - torch.stack([low, high])).abs() <= slack).all()


@pytest.mark.parametrize('name', NAMES)
def test_constant_channels_are_reported_and_exact(name):
    x = make_tokens(1000)[:, :4].clone()
    x[:, 1:4] = torch.tensor([0.0, 3.7, -1e-8])
    observer = feature_observer(name)
    for batch in x.split(300):
        observer.observe(batch)
    assert torch.eq(*observer.ends()).tolist() == [False, True, True, True]
    assert observer.ends()[0][1:].tolist() == x[0, 1:].tolist()
    scale, zero_point = observer.qparams(ChannelGrid(4))
    assert (scale > 0).all() and torch.equal(fake(x, scale, zero_point, 4)[:, 1:], x[:, 1:].double())


def test_a_quantile_range_of_one_value_is_never_chosen():
    x = torch.full((10_000, 1), 2.0)
    x[5] = 1.0
    for candidates in (CANDIDATES, (0.999,)):  # the quantiles of .999 are both 2
        observer = FeatureObserver(Percentile(candidates))
        observer.observe(x)
        scale, zero_point = observer.qparams(ChannelGrid(4))
        assert not torch.eq(*observer.ends()).any() and scale == torch.tensor(1 / 15)
        assert errors_of(x, scale, zero_point, 4) < 1e-9


@pytest.mark.parametrize('name', NAMES)
def test_rows_that_are_not_valid_take_no_part(name):
    x = torch.randn(6, 4, 3)  # (windows of 2 images, tokens, channels)
    x[:, 3] = 100.0
    x[1::3, 0] = float('nan')
    valid = torch.ones(3, 4, dtype=torch.bool)
    valid[:, 3] = False
    valid[1, 0] = False
    expected = feature_observer(name)
    expected.observe(x[valid.repeat(2, 1)])
    for mask in (valid, valid.repeat(2, 1)):
        observer = feature_observer(name)
        observer.observe(x, mask)
        for got, wanted in zip(observer.qparams(ChannelGrid(4)), expected.qparams(ChannelGrid(4))):
            assert torch.equal(got, wanted)
    assert expected.ends()[1].max() < 10
    observer = feature_observer(name)
    observer.observe(x, torch.zeros(4, dtype=torch.bool))
    assert not observer.saw_data
    with pytest.raises(DataError, match='does not fit'):
        observer.observe(x, torch.ones(5, dtype=torch.bool))


@pytest.mark.parametrize('name', NAMES)
def test_half_precision_and_one_row(name):
    x = make_tokens(300)[:, [0, 2, 7]].half()
    halves, floats = feature_observer(name), feature_observer(name)
    halves.observe(x)
    halves.observe(x[0])
    floats.observe(x.float())
    floats.observe(x[:1].float())
    for got, wanted in zip(halves.qparams(ChannelGrid(4)), floats.qparams(ChannelGrid(4))):
        assert torch.equal(got, wanted) and got.shape == (3,)


@pytest.mark.parametrize('name', NAMES)
def test_errors_name_the_way_out(name):
    observer = feature_observer(name)
    observer.observe(torch.zeros(0, 3))
    assert not observer.saw_data
    with pytest.raises(NotCalibratedError, match='saw no data'):
        observer.qparams(ChannelGrid(8))
    with pytest.raises(NotCalibratedError, match='saw no data'):
        observer.ends()
    for bad in (float('nan'), float('inf'), -float('inf')):
        x = torch.zeros(5, 3)
        x[4, 1] = bad
        with pytest.raises(DataError, match='NaN or infinity'):
            observer.observe(x)
    assert not observer.saw_data
    observer.observe(torch.ones(5, 3))
    with pytest.raises(DataError, match='4 channels .* 3'):
        observer.observe(torch.ones(5, 4))
    with pytest.raises(DataError, match='last dimension'):
        observer.observe(torch.tensor(1.0))
    with pytest.raises(SpecError, match='bits=9'):
        observer.qparams(ChannelGrid(9))


def test_unknown_observer_and_settings():
    with pytest.raises(SpecError, match="'histogram' is not known"):
        build_rule('histogram')
    with pytest.raises(SpecError, match='percentile 0.2'):
        Percentile((0.2,))
    with pytest.raises(SpecError, match='factor 1.5'):
        Shrink((1.5,))


def tensor_bytes(thing):
    if isinstance(thing, torch.Tensor):
        return thing.untyped_storage().nbytes()
    return sum(tensor_bytes(v) for v in vars(thing).values()) if hasattr(thing, '__dict__') else 0


@pytest.mark.parametrize('name', NAMES)
def test_memory_does_not_grow_with_the_images(name):
    observer, sizes = feature_observer(name), []
    for i in range(10):
        observer.observe(torch.randn(2_000, 7) * (i + 1))
        sizes.append(tensor_bytes(observer))
    assert len(set(sizes)) == 1 and sizes[0] < 7 * 9_000
