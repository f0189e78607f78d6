"""Rows of a layer's output, weighed by what the loss makes of them."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from psaq_mm.errors import DataError
from psaq_mm.quantization import calibrate, full_precision_weights, quantize_, round_weights_, rounding, row_importance
from psaq_mm.quantization.rounding import compensated_rounding


class Reader(nn.Module):
    """Tokens go through two layers; of what comes out the first token alone is read."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.first, self.second, self.unread = nn.Linear(8, 24), nn.Linear(24, 5), nn.Linear(8, 3)
        self.checkpointed = checkpointed

    def tokens(self, x):
        return self.second(self.first(x).relu())

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        self.unread(x)
        out = (
            checkpoint(self.tokens, x, use_reentrant=self.checkpointed == 'reentrant')
            if self.checkpointed
            else self.tokens(x)
        )
        return out[:, 0]


@pytest.fixture
def images():
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)).cumsum(-1)


def made(images, checkpointed=False, preset='w4a8'):
    torch.manual_seed(0)
    net = Reader(checkpointed).eval()
    quantize_(net, preset)
    calibrate(net, lambda: net(images))
    return net.requires_grad_(False)


def passing(net, images, scale=1.0):

    def run():
        for batch in images.split(4):
            (net(batch.clone().requires_grad_()) * scale).sum().backward()

    return run


def test_rows_weigh_what_the_loss_makes_of_them(images):
    net = made(images)
    found = row_importance(net, passing(net, images))
    assert set(found) == {'conv', 'first', 'second'}  # a gradient reached no other
    for name, weights in found.items():
        rows = weights.view(6, 4)
        assert bool((rows[:, 0] > 0).all()) and not rows[:, 1:].any(), name
        assert float(weights.mean()) == pytest.approx(1.0)


def test_they_are_the_squared_gradients_of_the_outputs(images):
    net, kept = made(images), []
    handle = net.first.register_forward_hook(lambda layer, args, out: (out.retain_grad(), kept.append(out))[0])
    with full_precision_weights(net):
        net(images.clone().requires_grad_()).sum().backward()
    handle.remove()
    wanted = kept[0].grad.pow(2).sum(-1).reshape(-1)
    torch.testing.assert_close(row_importance(net, passing(net, images))['first'], wanted / wanted.mean())


@pytest.mark.parametrize('way', ['reentrant', 'other'])
def test_activation_checkpointing_changes_nothing(images, way):
    plain, again = made(images), made(images, way)
    wanted, found = (row_importance(net, passing(net, images)) for net in (plain, again))
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-7)


def test_gradients_too_small_for_their_square_are_seen(images):
    net = made(images)
    wanted, found = (row_importance(net, passing(net, images, scale)) for scale in (1.0, 1e-25))
    torch.testing.assert_close(found['second'], wanted['second'], rtol=1e-4, atol=0)


def test_padding_is_left_out():
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(3, 10, 8)
    quantize_(layer, 'w4a8')
    calibrate(layer, lambda: layer(x))
    valid = torch.ones(3, 10, dtype=torch.bool)
    valid[:, 7:] = False
    found = row_importance(layer, lambda: layer[0](x.clone().requires_grad_(), valid).pow(2).sum().backward())
    assert found['0'].shape == (21,)
    round_weights_(layer, lambda: layer[0](x, valid), importance=found)  # of the same rows


def test_rounding_spares_the_rows_that_count(images, monkeypatch):
    """The read token gets nearer to full precision than under rounding that takes all tokens for alike."""
    monkeypatch.setattr(rounding, 'GRAM_BYTES', 1)  # a pass a layer
    errors = {}
    for guided in (False, True):
        net = made(images, preset='w3a8')
        weight = net.second.weight.clone()
        importance = row_importance(net, passing(net, images)) if guided else None
        seen = []
        report = {
            layer.name: layer
            for layer in round_weights_(net, lambda: net(images), prior_rows=0.24, importance=importance)
        }
        handle = net.second.register_forward_hook(lambda layer, args, out: seen.append(layer.input_quantizer(args[0])))
        net(images)
        handle.remove()
        errors[guided] = (seen[0][:, 0] @ (net.second.quantized_weight() - weight).t()).pow(2).sum()
        assert report['second'].compensated < report['second'].nearest and not report['unread'].reason
    assert errors[True] < 0.7 * errors[False]


def test_few_rows_that_count_are_trusted_less(images, monkeypatch):
    """Pseudo-rows weigh against the effective number of rows, which is that of all of them where they weigh alike."""
    dampings = []

    def recorded(weight, gram, round_columns, damping):
        dampings.append(damping)
        return compensated_rounding(weight, gram, round_columns, damping)

    monkeypatch.setattr(rounding, 'compensated_rounding', recorded)
    net = made(images, preset='w3a8')
    one = torch.full((24,), 1e-9)
    one[0] = 24.0
    for weights, wanted in ((None, 6 / 24), (torch.ones(24), 6 / 24), (torch.ones(24) * 5, 6 / 24), (one, 6.0)):
        importance = None if weights is None else dict(first=weights)
        dampings.clear()
        report = [layer.name for layer in round_weights_(net, lambda: net(images), 6, importance=importance)]
        assert dampings[report.index('first')] == pytest.approx(wanted)
    with pytest.raises(DataError, match='prior_rows=0 must be positive'):
        round_weights_(net, lambda: net(images), importance=dict(first=one), prior_rows=0)


@pytest.mark.parametrize('count', [4, 8])
def test_weights_of_other_rows_are_refused(images, count):
    net = made(images)
    found = row_importance(net, passing(net, images))
    with pytest.raises(DataError, match="'conv': weights of 24 rows do not fit"):
        round_weights_(net, lambda: net(torch.cat([images, images])[:count]), importance=found)


# ---------------------------------------------------------------------- layers that are called several times in a pass
class Levels(nn.Module):
    """A head goes over two maps of one size; of the second, the loss reads what ``read`` says."""

    def __init__(self, read=('first', 'second'), checkpointed=None):
        super().__init__()
        self.near, self.far, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.read, self.checkpointed = read, checkpointed

    def once(self, layer, x):
        return (
            layer(x)
            if self.checkpointed is None
            else checkpoint(layer, x, use_reentrant=self.checkpointed == 'reentrant')
        )

    def forward(self, x):
        maps = dict(first=self.once(self.head, self.near(x).relu()), second=self.once(self.head, self.far(x).tanh()))
        return sum(maps[name].square().sum() for name in self.read)


def levels(x, **settings):
    torch.manual_seed(0)
    net = Levels(**settings)
    quantize_(net, 'w3a8')
    calibrate(net, lambda: net(x))
    return net.requires_grad_(False)


def tokens():
    return torch.randn(6, 5, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [1.0, 1, 1, 0.1, 0.1, 0.1]
    ).view(-1, 1, 1)


def through(net, x, batch, backward=True):

    def run():
        for part in x.split(batch):
            loss = net(part.clone().requires_grad_(backward))
            loss.backward() if backward else None

    return run


def test_rows_of_a_layer_that_is_called_twice_are_paired_call_by_call():
    x = tokens()
    net = levels(x)
    found = row_importance(net, through(net, x, 4))
    assert found.calls['head'] == (20, 20, 10, 10) and found['head'].shape == (60,)
    by_call, kept = found['head'].split(found.calls['head']), []
    handle = net.head.register_forward_hook(lambda layer, args, out: (out.retain_grad(), kept.append(out))[0])
    with full_precision_weights(net):
        through(net, x, 4)()
    handle.remove()
    wanted = [out.grad.square().sum(-1).flatten() for out in kept]
    mean = torch.cat(wanted).mean()
    for ours, theirs in zip(by_call, wanted):
        torch.testing.assert_close(ours, theirs / mean)
    round_weights_(net, through(net, x, 4, backward=False), importance=found)


@pytest.mark.parametrize('one, other', [(4, 6), (4, 3), (6, 4), (2, 3)])
def test_other_batches_of_a_layer_that_is_called_twice_are_refused(one, other):
    """The number of rows fits, their order does not."""
    x = tokens()
    net = levels(x)
    found = row_importance(net, through(net, x, one))
    start = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(DataError, match="'head'.*weights of 60 rows do not fit.*in the same batches"):
        round_weights_(net, through(net, x, other, backward=False), importance=found)
    assert all(torch.equal(value, start[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize('one, other', [(4, 6), (6, 4), (4, 3)])
def test_other_batches_fit_layers_that_are_called_once(one, other, images):
    errors = []
    for batch in (one, other):
        net = made(images, preset='w3a8')
        found = row_importance(
            net, lambda: [net(part.clone().requires_grad_()).sum().backward() for part in images.split(one)]
        )
        assert not found.calls
        report = round_weights_(net, lambda: [net(part) for part in images.split(batch)], importance=found)
        errors.append([layer.nearest for layer in report])
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


def test_a_call_that_the_loss_does_not_read_weighs_nothing(monkeypatch):
    monkeypatch.setattr(rounding, 'GRAM_BYTES', 1)  # a pass a layer
    x = tokens()
    net = levels(x, read=('first',))
    found = row_importance(net, through(net, x, 4))
    first, second, *others = found['head'].split(found.calls['head'])
    assert bool((first > 0).all()) and not second.any() and bool((others[0] > 0).all()) and not others[1].any()
    assert float(found['head'].mean()) == pytest.approx(1.0) and 'far' not in found
    weight, seen = net.head.weight.detach().clone(), []
    handle = net.head.register_forward_hook(lambda layer, args, out: seen.append(args[0].flatten(0, 1)))
    report = {layer.name: layer for layer in round_weights_(net, through(net, x, 4, backward=False), importance=found)}
    handle.remove()
    # of the pass in which the head was rounded
    rows = net.head.input_quantizer(torch.cat(seen[-4:])) * found['head'].sqrt()[:, None]
    wanted = ((net.head.weight - weight) @ rows.t()).square().sum() / (weight @ rows.t()).square().sum()
    assert report['head'].compensated == pytest.approx(float(wanted), rel=1e-3)


@pytest.mark.parametrize('read', [('first',), ('second',), ('first', 'second')])
def test_checkpointed_calls_are_told_apart_or_refused(read):
    x = tokens()
    plain, again, reentrant = (levels(x, read=read, checkpointed=way) for way in (None, 'other', 'reentrant'))
    wanted, found = (row_importance(net, through(net, x, 4)) for net in (plain, again))
    assert found.calls == wanted.calls
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-7)
    with pytest.raises(DataError, match="'head' is called 2 times in a pass under reentrant"):
        row_importance(reentrant, through(reentrant, x, 4))


def test_weights_without_calls_are_paired_by_position(images):
    """What is no result of row_importance has no more than its order."""
    net = made(images)
    found = row_importance(net, passing(net, images))
    round_weights_(net, lambda: net(images), importance=dict(found))


def test_gradients_of_several_losses_on_one_pass_add_up(images):
    net = made(images)

    def separately():
        out = net(images.clone().requires_grad_())
        for loss in (out[:, 0].sum(), out[:, 1].sum()):
            loss.backward(retain_graph=True)

    found = row_importance(net, separately)['first']
    parts = [
        row_importance(net, lambda: net(images.clone().requires_grad_())[:, k].sum().backward())['first']
        for k in (0, 1)
    ]
    shares = torch.linalg.lstsq(torch.stack(parts, 1), found[:, None]).solution.flatten()  # each has mean 1
    assert bool((shares > 0.01).all()) and float(shares.sum()) == pytest.approx(1, rel=1e-3)
