"""Two ranks with half of the data each, against one with all of it."""

import copy

import pytest
import torch
from torch import nn
from two_ranks import on_two_ranks

from psaq_mm.errors import DataError
from psaq_mm.psaq_vit import patch_similarity_entropy, variation_prior
from psaq_mm.quantization import (
    ChannelGrid,
    FeatureObserver,
    LogGrid,
    LogObserver,
    UniformGrid,
    build_observer,
    build_rule,
    calibrate,
    compensated_rounding,
    quantize_,
    reduce_observers,
    round_weights_,
)
from psaq_mm.ranks import WholeBatch, barrier, broadcast_, gathered, own_part, ranks, sum_, sum_gradients_

NAMES = ('minmax', 'percentile', 'mse')
CHANNELS = 40


def batches():
    """Four batches (rows, channels) whose spreads differ by powers of two: the two ranks' histograms get other
    widths."""
    generator = torch.Generator().manual_seed(0)
    spreads = torch.logspace(-3, 3, CHANNELS, base=2)
    return [
        torch.randn(rows, CHANNELS, generator=generator) * spreads * scale + shift
        for rows, scale, shift in ((50, 1.0, 0.0), (7, 0.01, 100.0), (31, 40.0, -3.0), (300, 0.2, 0.0))
    ]


def observers():
    """One of each kind."""
    found = {f'tensor {name}': build_observer(name) for name in NAMES}
    found.update({f'channel {name}': FeatureObserver(build_rule(name)) for name in NAMES})
    return {**found, 'log': LogObserver()}


def outcome(observer):
    grids = {LogObserver: LogGrid(4, 'log_sqrt2'), FeatureObserver: ChannelGrid(4)}
    return torch.stack([t.double() for t in observer.qparams(grids.get(type(observer), UniformGrid(4)))])


def observed(data, split):
    """What observers find; ``split``: on this rank's part of the batches, reduced."""
    found = {}
    for case, mine in (('halves', own_part(len(data))), ('first alone', slice(0, len(data) if ranks()[0] == 0 else 0))):
        made = observers()
        for observer in made.values():
            for batch in data[mine] if split else data:
                observer.observe(batch.abs() if isinstance(observer, LogObserver) else batch)
        if split:
            reduce_observers(list(made.values()))
        found[case] = {name: outcome(observer) for name, observer in made.items()}
    unseen = observers()
    reduce_observers(list(unseen.values()))
    assert not any(observer.saw_data for observer in unseen.values())
    return found


class Net(nn.Module):
    """A norm, a Linear, a product that only some inputs reach, a convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.first, self.rare = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, images):
        tokens = self.first(self.conv(images).flatten(2).transpose(1, 2)).relu()
        return self.rare(tokens[images.amax((1, 2, 3)) > 5])


def net(spec='w4a8'):
    model = Net()
    quantize_(model, spec)
    return model


def pictures():
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    images[-1] *= 3  # the only one that reaches the last layer
    return images


def calibrated(images, observer):
    model = net(dict(preset='w4a8', a_observer=observer))
    calibrate(model, lambda: [model(image[None]) for image in images])
    return model


def grams(model, images):
    """Gram matrices as rounding sees them."""
    found = []
    import psaq_mm.quantization.rounding as rounding

    original = rounding.compensated_rounding
    try:
        rounding.compensated_rounding = lambda weight, gram, *args: (
            found.append(gram.clone()),
            original(weight, gram, *args),
        )[1]
        round_weights_(model, lambda: [model(image[None]) for image in images])
    finally:
        rounding.compensated_rounding = original
    return found


def statistics(images, tokens, whole):
    """Values and gradients of what couples a batch."""
    images, tokens = images.clone().requires_grad_(), tokens.clone().requires_grad_()
    prior = variation_prior(images, 10.0, whole)
    entropy = patch_similarity_entropy(tokens, bandwidth=0.1, reduce_range=None if whole is None else whole.range)
    entropy = entropy if whole is None else whole.mean(entropy)
    (2 * prior - 3 * entropy).backward()
    return dict(prior=prior.detach(), entropy=entropy.detach(), images=images.grad, tokens=tokens.grad)


def tokens_of(images):
    return torch.randn(len(images), 12, 16, generator=torch.Generator().manual_seed(2))


def gradients(images):
    """Of a net on its images, one parameter reached by some ranks alone, and one by none."""
    model = Net()
    model.unused = nn.Parameter(torch.zeros(2))
    whole = WholeBatch(len(images))
    (model(images).square().sum() / whole.total).backward()
    sum_gradients_(model.parameters())
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def split_over_ranks():
    """Everything on one rank's part."""
    images = pictures()
    mine = images[own_part(len(images))]
    rank, world = ranks()
    odd = torch.arange(15.0).view(5, 3)
    found = dict(observers=observed(batches(), split=True), world=world)
    for observer in NAMES:
        found[observer] = calibrated(mine, observer).state_dict()
    model = calibrated(mine, 'minmax')
    found['grams'], found['rounded'] = grams(model, mine), model.state_dict()
    found['statistics'] = statistics(mine, tokens_of(images)[own_part(len(images))], WholeBatch(len(mine)))
    found['gradients'] = gradients(mine)
    found['gathered'], found['broadcast'] = gathered(odd[own_part(5)], 5), broadcast_(torch.tensor([rank]))
    found['transposed'] = sum_(odd.t())
    return found


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    return on_two_ranks(split_over_ranks, tmp_path_factory.mktemp('ranks') / 'split')


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_both_ranks_hold_the_same_bits(found):
    for key in ('observers', *NAMES, 'grams', 'rounded', 'gathered', 'broadcast', 'transposed'):
        assert equal(found[0][key], found[1][key]), key
    assert found[0]['world'] == 2 and ranks() == (0, 1)


def test_ranges_are_exactly_those_of_one_rank(found):
    expected = observed(batches(), split=False)['halves']
    for case in ('halves', 'first alone'):
        for name, value in expected.items():
            torch.testing.assert_close(found[0]['observers'][case][name], value, rtol=0, atol=0, msg=f'{case}: {name}')


@pytest.mark.parametrize('observer', NAMES)
def test_a_calibrated_model_is_that_of_one_rank_though_one_saw_nothing_of_a_layer(found, observer):
    expected = calibrated(pictures(), observer).state_dict()
    assert bool(expected['rare.input_quantizer.calibrated'])
    for key, value in expected.items():
        torch.testing.assert_close(found[0][observer][key], value, rtol=1e-6, atol=0, msg=key)


def test_gram_matrices_and_the_codes_they_lead_to(found):
    model = calibrated(pictures(), 'minmax')
    for ours, theirs in zip(found[0]['grams'], grams(model, pictures())):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    for key, value in model.state_dict().items():
        if key.endswith('weight'):
            differ = (found[0]['rounded'][key] - value).abs() > 1e-4 * value.abs().max()
            assert float(differ.float().mean()) <= 0.01, key
    plain = calibrated(pictures(), 'minmax').state_dict()
    assert not torch.equal(plain['first.weight'], found[0]['rounded']['first.weight'])


def test_statistics_of_the_whole_batch_and_their_gradients(found):
    images = pictures()
    expected = statistics(images, tokens_of(images), None)
    alone = statistics(images[:3], tokens_of(images)[:3], None)
    for key in ('prior', 'entropy'):
        assert torch.equal(found[0]['statistics'][key], found[1]['statistics'][key])
        torch.testing.assert_close(found[0]['statistics'][key], expected[key], rtol=1e-5, atol=0)
        assert abs(float(alone[key] / expected[key]) - 1) > 1e-3, 'the batch would not have to be reduced'
    for key in ('images', 'tokens'):
        ours = torch.cat([rank['statistics'][key] for rank in found])
        torch.testing.assert_close(ours, expected[key], rtol=1e-4, atol=1e-5 * float(expected[key].abs().max()))


def test_gradients_are_those_of_the_whole_batch(found):
    expected = gradients(pictures())
    assert expected['unused'] is None
    for rank in found:
        assert rank['gradients']['unused'] is None
        for key in expected.keys() - {'unused'}:
            assert torch.equal(rank['gradients'][key], found[0]['gradients'][key])
            torch.testing.assert_close(rank['gradients'][key], expected[key], rtol=1e-4, atol=1e-6)


def test_parts_of_any_size_are_put_together(found):
    odd = torch.arange(15.0).view(5, 3)
    assert torch.equal(found[0]['gathered'], odd) and found[1]['broadcast'].tolist() == [0]
    assert torch.equal(found[1]['transposed'], 2 * odd.t())


def test_one_rank_sends_nothing():
    value = torch.tensor([3.0])
    assert sum_(value) is value and gathered(value, 1) is value and own_part(5) == slice(0, 5)
    barrier()
    assert compensated_rounding(torch.eye(2), torch.eye(2), torch.round).equal(torch.eye(2))
    assert copy.copy(value).equal(WholeBatch(2).mean(value))


def fails_on_one_rank():
    """Rank 1 fails and ends, as an error ends it; rank 0 waits for it: what each says."""
    try:
        if ranks()[0] == 1:
            raise DataError('rank 1 has no samples')
        barrier()
    except (DataError, RuntimeError) as error:
        return type(error).__name__, str(error)


def test_a_rank_that_failed_ends_the_others_with_one_sentence(tmp_path):
    waiting, failed = on_two_ranks(fails_on_one_rank, tmp_path / 'fails')
    assert failed == ('DataError', 'rank 1 has no samples')
    assert waiting[0] == 'RankError' and waiting[1].startswith('another rank failed or did not answer in time')
    assert len(waiting[1].splitlines()) == 1


def test_memory_that_runs_out_in_a_collective_is_this_ranks_own_error(monkeypatch):
    import torch.distributed as dist

    from psaq_mm.ranks import RankError, _answered

    with pytest.raises(torch.cuda.OutOfMemoryError, match='Tried to allocate'), _answered():
        raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
    with pytest.raises(RankError, match='another rank failed.*closed by peer'), _answered():
        raise RuntimeError('Connection closed by peer')

    def all_reduce(tensor, operation):
        raise torch.cuda.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr('psaq_mm.ranks.ranks', lambda: (0, 2))
    monkeypatch.setattr(dist, 'get_backend', lambda: 'gloo')
    monkeypatch.setattr(dist, 'all_reduce', all_reduce)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        sum_(torch.ones(2))
