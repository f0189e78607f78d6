"""Ranges against plain references on the raw data."""

import pytest
import torch
from second_device import SecondDevice

from psaq_mm.errors import DataError, NotCalibratedError, SpecError
from psaq_mm.quantization import (
    AffineQuantizer,
    ChannelObserver,
    MinMax,
    Percentile,
    Shrink,
    TensorObserver,
    UniformGrid,
    build_observer,
    choose_qparams,
    fake_quantize,
    observing,
    qrange,
)

NAMES = ['minmax', 'percentile', 'mse']
CANDIDATES = (0.999, 0.9999, 0.99999, 1.0)


def make_data(kind, n=60_000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator)
    if kind == 'heavy':
        x = x / torch.rand(n, generator=generator).clamp(min=0.02)
    elif kind == 'outlier':
        x[::20_000] = 300.0
    elif kind == 'one-sided':
        x = torch.rand(n, generator=generator) ** 8
    elif kind == 'zeros':
        x = x.relu() * (torch.rand(n, generator=generator) < 0.02)
    elif kind == 'tiny':
        x = x * 1e-20
    return x


KINDS = ['normal', 'heavy', 'outlier', 'one-sided', 'zeros', 'tiny']


def error_of(x, low, high, bits, symmetric):
    return error_with(x, choose_qparams(low, high, bits, symmetric), bits, symmetric)


def error_with(x, qparams, bits, symmetric):
    return (fake_quantize(x, *qparams, *qrange(bits, symmetric)) - x).double().square().sum().item()


def qparams_of(observer, bits=8, symmetric=False):
    return observer.qparams(UniformGrid(bits, symmetric))


def greatest(observer, bits):
    """Upper end of the chosen range of data that is symmetric around 0, up to a step."""
    return float(qparams_of(observer, bits, True)[0]) * (2 ** (bits - 1) - 1)


def test_minmax_over_batches():
    observer = build_observer('minmax')
    for batch in (torch.tensor([1.0, 2.0]), torch.tensor([[-3.0], [0.0]]), torch.zeros(0)):
        observer.observe(batch)
    assert [t.item() for t in observer.ends()] == [-3.0, 2.0] and observer.channels == 0
    wanted = choose_qparams(torch.tensor(-3.0), torch.tensor(2.0), 8, False)
    assert all(map(torch.equal, qparams_of(observer), wanted))


@pytest.mark.parametrize('axis, low, high', [(0, [0.0, 3.0], [2.0, 5.0]), (1, [0.0, 1.0, 2.0], [3.0, 4.0, 5.0])])
def test_minmax_per_channel(axis, low, high):
    observer = build_observer('minmax', axis)
    observer.observe(torch.arange(6.0).reshape(2, 3))
    assert [t.tolist() for t in observer.ends()] == [low, high] and observer.channels == len(low)
    wanted = choose_qparams(torch.tensor(low), torch.tensor(high), 8, False)
    assert all(map(torch.equal, qparams_of(observer), wanted))


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_non_finite_data_is_refused(name, bad):
    for observer, x in ((build_observer(name), torch.zeros(5)), (build_observer(name, 0), torch.zeros(5, 2))):
        x.view(-1)[3] = bad
        with pytest.raises(DataError, match='NaN or infinity'):
            observer.observe(x)


@pytest.mark.parametrize('name', NAMES)
def test_no_data_is_an_error_and_empty_data_is_none(name):
    observer = build_observer(name)
    observer.observe(torch.zeros(0, 3))
    assert not observer.saw_data
    with pytest.raises(NotCalibratedError, match='saw no data'):
        qparams_of(observer)
    assert observer.channels is None


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('value', [0.0, 3.0, -2.0])
@pytest.mark.parametrize('axis', [None, 0])
def test_constant_data_gives_a_usable_range(name, value, axis):
    observer = build_observer(name, axis)
    x = torch.full((4, 100), value)
    observer.observe(x)
    qparams = qparams_of(observer)
    torch.testing.assert_close(fake_quantize(x, *qparams, 0, 255, axis=axis), x, rtol=1e-6, atol=0)


def test_unknown_observer_and_settings():
    with pytest.raises(SpecError, match="'histogram' is not known"):
        build_observer('histogram')
    with pytest.raises(SpecError, match='percentile 0.2'):
        Percentile((0.2,))
    with pytest.raises(SpecError, match='factor 1.5'):
        Shrink((1.5,))


@pytest.mark.parametrize('name', NAMES)
def test_rows_that_are_not_valid_take_no_part(name):
    x = torch.randn(6, 2, 4, 3)  # (windows of 2 images, heads, tokens, channels)
    x[:, :, 3] = 100.0
    x[1::3, :, 0] = -100.0
    valid = torch.ones(3, 1, 4, dtype=torch.bool)
    valid[:, :, 3] = False
    valid[1, :, 0] = False
    kept = x[valid.repeat(2, 1, 1).expand(6, 2, 4)]
    expected = build_observer(name)
    expected.observe(kept)
    for mask in (valid, valid.repeat(2, 1, 1), valid.repeat(2, 2, 1)):
        observer = build_observer(name)
        observer.observe(x, mask)
        assert all(map(torch.equal, qparams_of(observer, 4), qparams_of(expected, 4)))
    assert expected.ends()[1] < 10


def test_valid_broadcasts_from_the_right_and_from_one():
    x = torch.tensor([[[1.0], [50.0]], [[2.0], [60.0]]])
    for mask in (torch.tensor([True, False]), torch.tensor([[True, False]])):
        observer = build_observer('minmax')
        observer.observe(x, mask)
        assert [t.item() for t in observer.ends()] == [1.0, 2.0]
    observer = build_observer('minmax')
    observer.observe(x, torch.tensor([[False], [True]]))
    assert [t.item() for t in observer.ends()] == [2.0, 60.0]


def test_no_valid_row_is_no_data_but_hides_no_error_in_the_mask():
    observer = build_observer('minmax')
    observer.observe(torch.ones(2, 3), torch.tensor([False, False]))
    assert not observer.saw_data
    with pytest.raises(DataError, match='does not fit'):
        observer.observe(torch.ones(2, 3), torch.tensor([True, True, False]))
    with pytest.raises(DataError, match='bool'):
        observer.observe(torch.ones(2, 3), torch.tensor([1.0, 0.0]))


def test_nan_in_a_row_that_takes_no_part_is_no_error():
    observer = build_observer('minmax')
    observer.observe(torch.tensor([[1.0], [float('nan')]]), torch.tensor([True, False]))
    assert observer.saw_data


@pytest.mark.parametrize('kind', KINDS)
def test_histogram_quantiles_are_within_a_bin_of_the_exact_ones(kind):
    x = make_data(kind)
    observer = build_observer('percentile')
    observer.observe(x)
    histogram = observer.store
    assert histogram.counts.sum() == x.numel()
    q = [0.0, 0.00001, 0.001, 0.25, 0.5, 0.999, 0.9999, 1.0]
    # Between two data points torch interpolates and the histogram cannot: compare with the neighbours.
    ordered = x.sort().values.double()
    got = next(histogram.parts()).quantiles(q)[:, 0]
    for value, p in zip(got, q):
        rank = p * (x.numel() - 1)
        assert ordered[max(int(rank) - 1, 0)] - histogram.width <= value
        assert value <= ordered[min(int(rank) + 2, x.numel() - 1)] + histogram.width
    assert got[0].float() == x.min() and got[-1].float() == x.max()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('bits, symmetric', [(2, True), (4, False), (8, False)])
def test_histogram_error_is_the_error_on_the_data(kind, bits, symmetric):
    x = make_data(kind)
    observer = build_observer('percentile')
    observer.observe(x)
    for p in (0.999, 1.0):
        low, high = x.quantile(1 - p), x.quantile(p)
        exact = error_of(x, low, high, bits, symmetric)
        qparams = (t.reshape(1, 1) for t in choose_qparams(low, high, bits, symmetric))
        got = next(observer.store.parts()).errors(UniformGrid(bits, symmetric), *qparams).item()
        within_bins = x.numel() * observer.store.width**2
        assert abs(got - exact) <= 0.02 * exact + within_bins


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('bits', [4, 8])
def test_percentile_has_the_least_squared_error(kind, bits):
    x = make_data(kind)
    observer = TensorObserver(Percentile(CANDIDATES))
    for batch in x.split(9_000):
        observer.observe(batch)
    best = min(error_of(x, x.quantile(1 - p), x.quantile(p), bits, False) for p in CANDIDATES)
    assert error_with(x, qparams_of(observer, bits), bits, False) <= 1.03 * best


def test_percentile_depends_on_the_bits():
    x = make_data('normal')
    x[:4] = 30.0
    observer = build_observer('percentile')
    observer.observe(x)
    assert greatest(observer, 4) < 10 < greatest(observer, 8)


def test_histogram_does_not_depend_on_order_or_batches():
    x = torch.cat([make_data('normal') * 1e-3, make_data('heavy'), torch.zeros(10), make_data('one-sided') * 1e5])
    histograms = []
    for batches in ([x], x.split(7001), reversed(x.split(20_000))):
        observer = build_observer('percentile')
        for batch in batches:
            observer.observe(batch)
        histograms.append(observer.store)
    assert histograms[0].counts.sum() == x.numel()
    for other in histograms[1:]:
        assert other.exponent == histograms[0].exponent
        assert torch.equal(other.counts, histograms[0].counts)


def test_histogram_counts_beyond_float32():
    observer = build_observer('percentile')
    observer.observe(torch.ones(1000))
    observer.store.counts *= 2**24
    observer.observe(torch.ones(1))
    assert observer.store.counts.sum() == 1000 * 2**24 + 1


def tensor_bytes(thing):
    if isinstance(thing, torch.Tensor):
        return thing.untyped_storage().nbytes()
    return sum(tensor_bytes(v) for v in vars(thing).values()) if hasattr(thing, '__dict__') else 0


@pytest.mark.parametrize('name', NAMES)
def test_memory_does_not_grow_with_the_images(name):
    observer, sizes = build_observer(name), []
    for i in range(20):
        observer.observe(torch.randn(50_000) * (i + 1))
        sizes.append(tensor_bytes(observer))
    assert len(set(sizes)) == 1 and sizes[0] < 1_000_000


@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.parametrize('bits, symmetric', [(2, True), (4, False), (8, True)])
def test_percentile_per_channel_is_exact(axis, bits, symmetric):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 5, 3000, generator=generator) / torch.rand(6, 5, 1, generator=generator)
    w[2, 1, :3] = 1000.0
    observer = build_observer('percentile', axis)
    observer.observe(w)
    scale, zero_point = qparams_of(observer, bits, symmetric)
    rows = w.transpose(0, axis).flatten(1)
    for c, row in enumerate(rows):
        wide = row.double()  # quantile in float32 loses digits of the rank
        ranges = [(wide.quantile(1 - p).float(), wide.quantile(p).float()) for p in sorted(CANDIDATES, reverse=True)]
        best = min(ranges, key=lambda ends: error_of(row, *ends, bits, symmetric))
        wanted = choose_qparams(*best, bits, symmetric)
        torch.testing.assert_close(scale[c], wanted[0], rtol=1e-5, atol=1e-6)
        assert zero_point[c] == wanted[1]


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('symmetric', [True, False])
def test_mse_takes_the_best_factor_of_each_channel(bits, symmetric):
    w = torch.randn(5, 400, generator=torch.Generator().manual_seed(0))
    factors = (1.0, 0.9, 0.7, 0.5)
    observer = ChannelObserver(Shrink(factors), 0)
    observer.observe(w)
    scale, zero_point = qparams_of(observer, bits, symmetric)
    for c, row in enumerate(w):
        best = min(factors, key=lambda f: error_of(row, row.min() * f, row.max() * f, bits, symmetric))
        wanted = choose_qparams(row.min() * best, row.max() * best, bits, symmetric)
        torch.testing.assert_close(scale[c], wanted[0])
        assert zero_point[c] == wanted[1]


@pytest.mark.parametrize('kind', KINDS)
def test_mse_per_tensor_is_no_worse_than_minmax(kind):
    x = make_data(kind)
    observer = build_observer('mse')
    observer.observe(x)
    for bits in (2, 4, 8):
        best = error_with(x, qparams_of(observer, bits), bits, False)
        assert best <= 1.001 * error_of(x, x.min(), x.max(), bits, False)


@pytest.mark.parametrize('axis', [None, 0])
def test_mse_knows_that_the_greatest_values_are_clipped_over_the_full_range(axis):
    x = torch.randn(1, 400, generator=torch.Generator().manual_seed(0))
    grid, observer = UniformGrid(3, symmetric=True, full_range=True), build_observer('mse', axis)
    observer.observe(x)

    def error(qparams):
        return (fake_quantize(x, *qparams, *qrange(3, True), axis=axis) - x).square().sum()

    low, high = observer.ends()
    for factor in (1.0, 0.9, 0.8, 0.7, 0.6):
        assert error(observer.qparams(grid)) <= 1.001 * error(grid.qparams(factor * low, factor * high))


def test_row_mask_per_channel_is_refused():
    with pytest.raises(DataError, match='per channel'):
        ChannelObserver(MinMax(), 0).observe(torch.ones(2, 3), torch.tensor([True, False]))


def test_an_observer_that_is_asked_between_two_batches_sees_both():
    first, second = make_data('normal', 5000), make_data('normal', 5000, seed=1) * 30
    asked, once = build_observer('mse'), build_observer('mse')
    for batch in (first, second, first):
        asked.observe(batch)
        between = qparams_of(asked, 4)
        once.observe(batch)
    assert all(map(torch.equal, between, qparams_of(once, 4)))


def error_in_python(histogram, scale, zero_point, qmin, qmax):
    """The squared error of values that lie evenly over each bin, bin by bin."""
    step, bins = float(scale), histogram.counts.nonzero().squeeze(1)
    left, counts = (bins - histogram.BINS // 2).double(), histogram.counts[bins].double()

    def integral(edges):
        ratio = edges * (histogram.width / step)
        code = ratio.round().clamp_(qmin - int(zero_point), qmax - int(zero_point))
        rest = ratio.sub_(code)
        return (rest * rest).mul_(rest).div_(3).add_(code, alpha=1 / 12)

    mean = integral(left + 1).sub_(integral(left)).mul_(step / histogram.width)
    return (mean * counts).sum() * step**2


EXTREME = {
    'constant': torch.full((9,), 3.0),
    'zero': torch.zeros(4),
    'negative and tiny': torch.full((3,), -1e-30),
    'as large as float32': torch.tensor([1e38, -3e38]),
    'denormal': torch.tensor([1e-38, 1e-45]),
    'far': torch.tensor([-1.0, 1e30]),
}


@pytest.mark.parametrize('kind', [*KINDS, *EXTREME])
@pytest.mark.parametrize('name', ['percentile', 'mse'])
def test_the_range_is_the_one_of_a_search_candidate_by_candidate(name, kind):
    x = EXTREME[kind] if kind in EXTREME else make_data(kind, 5000)
    whole, channels = build_observer(name), build_observer(name, 0)
    whole.observe(x)
    channels.observe(torch.stack([x, -x, x.flip(0) / 8]))
    for bits, symmetric in ((2, True), (4, False), (8, False)):
        grid, ends = UniformGrid(bits, symmetric), qrange(bits, symmetric)
        best = []
        for low, high in zip(*whole.rule.ranges(next(whole.store.parts()), grid)):
            qparams = choose_qparams(low.float()[0], high.float()[0], bits, symmetric)
            best.append((error_in_python(whole.store, *qparams, *ends), *qparams))
        least = min(best, key=lambda candidate: float(candidate[0]))  # the first of equals
        chosen = whole.qparams(grid)
        if kind in KINDS:
            assert all(map(torch.equal, chosen, least[1:]))
        else:  # one value or two: other candidates are as good, but for the rounding of these sums
            rounding = 1e-9 * least[0] + 1e-3 * len(x) * whole.store.width**2
            assert error_in_python(whole.store, *chosen, *ends) <= least[0] + rounding
        ranges = channels.rule.ranges(next(channels.store.parts()), grid)
        for row, chosen in enumerate(zip(*channels.qparams(grid))):
            values, best = channels.store.values[row], []
            for low, high in zip(*(ends[:, row] for ends in ranges)):
                qparams = choose_qparams(low, high, bits, symmetric)
                error = fake_quantize(values, *qparams, *ends).sub_(values)
                best.append((error.square_().sum(dtype=torch.float64), *qparams))
            assert all(map(torch.equal, chosen, min(best, key=lambda candidate: float(candidate[0]))[1:]))


@pytest.mark.parametrize('axis', [None, 0])
@pytest.mark.parametrize('name', ['percentile', 'mse'])
def test_a_search_hardly_waits_for_the_device(name, axis):
    with SecondDevice() as second:
        x = make_data('normal', 3000).view(3, 1000).cuda()
        quantizer = AffineQuantizer(
            4, channel_axis=axis, num_channels=None if axis is None else 3, observer=name
        ).cuda()
        with observing([quantizer]):
            for _ in range(2):
                quantizer(x)
            assert len(second.waits) <= 4, second.waits
            second.waits.clear()
            for calibrated in quantizer.finish(quantizer):
                calibrated.set()
        assert quantizer.scale.is_cuda and len(second.waits) <= 6, second.waits
