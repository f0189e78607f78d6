"""Rotations: orthogonal, the mean kept, the same function afterwards, weights that fewer bits hold better."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from psaq_mm.errors import DataError
from psaq_mm.quantization import (
    AttentionParts,
    StreamReader,
    attention_parts,
    choose_qparams,
    fake_quantize,
    qrange,
    random_rotation,
    rotate_heads_,
    rotate_stream_,
)

CHANNELS, HEADS = 24, 3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize('size', [1, 2, 7, 96])
@pytest.mark.parametrize('keep_mean', [False, True])
def test_orthogonal_and_the_seeds_own(size, keep_mean):
    found = random_rotation(size, generator(), keep_mean)
    assert torch.allclose(found @ found.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(found, random_rotation(size, generator(), keep_mean))
    if size > 2:
        assert (found - random_rotation(size, generator(1), keep_mean)).abs().max() > 0.1
    if keep_mean:
        ones = torch.ones(size, dtype=torch.float64)
        torch.testing.assert_close(ones @ found, ones, rtol=0, atol=1e-12)
        torch.testing.assert_close(found @ ones, ones, rtol=0, atol=1e-12)


def test_every_direction_is_as_likely():
    images = torch.stack([random_rotation(4, generator(seed))[0] for seed in range(4000)])
    assert images.mean(0).abs().max() < 0.03
    torch.testing.assert_close(images.T @ images / 4000, torch.eye(4, dtype=torch.float64) / 4, rtol=0, atol=0.02)


@pytest.mark.parametrize('size', [0, -1])
def test_no_size(size):
    with pytest.raises(DataError, match=f'size={size}'):
        random_rotation(size)


# ---------------------------------------------------------------------- heads
class Attention(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(CHANNELS, 3 * CHANNELS, bias=bias), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('which', [dict(), dict(scores=False), dict(values=False)])
def test_heads_compute_what_they_did(bias, which):
    torch.manual_seed(0)
    plain = Attention(bias)
    turned, x = copy.deepcopy(plain), torch.randn(2, 5, CHANNELS)
    rotate_heads_(attention_parts(turned), generator(), **which)
    torch.testing.assert_close(turned(x), plain(x), rtol=0, atol=1e-6)
    moved = (turned.qkv.weight - plain.qkv.weight).abs().reshape(3, -1).amax(1) > 0.05
    assert moved.tolist() == [which.get('scores', True), which.get('scores', True), which.get('values', True)]
    assert torch.equal(turned.proj.weight, plain.proj.weight) != which.get('values', True)


def test_heads_that_do_not_fit():
    attention = Attention()
    with pytest.raises(DataError, match='5 heads'):
        rotate_heads_(AttentionParts.packed(attention.qkv, attention.proj, 5))
    with pytest.raises(DataError, match='8 rows of queries'):
        rotate_heads_(AttentionParts.packed(attention.proj, attention.proj, HEADS))


# ---------------------------------------------------------------------- streams
class Network(nn.Module):
    """A token, two blocks, a merging of four tokens in either order, and a convolution that pads what its norm
    gives."""

    def __init__(self, interleaved=False, bias=True):
        super().__init__()
        self.start, self.token = nn.Conv2d(3, CHANNELS, 2, 2), nn.Parameter(torch.randn(1, 1, CHANNELS))
        self.norms = nn.ModuleList(nn.LayerNorm(CHANNELS) for _ in range(3))
        self.firsts = nn.ModuleList(nn.Linear(CHANNELS, 40, bias=bias) for _ in range(2))
        self.lasts = nn.ModuleList(nn.Linear(40, CHANNELS) for _ in range(2))
        self.merged, self.reduction = nn.LayerNorm(4 * CHANNELS), nn.Linear(4 * CHANNELS, 10, bias=False)
        self.end = nn.Conv2d(CHANNELS + 2, 6, 3, padding=1)
        self.interleaved = interleaved
        for norm in (*self.norms, self.merged):
            nn.init.uniform_(norm.weight, -2, 2)
            nn.init.normal_(norm.bias)

    def forward(self, images):
        x = self.start(images)
        size, x = x.shape[-2:], x.flatten(2).transpose(1, 2) + self.token
        for norm, first, last in zip(self.norms, self.firsts, self.lasts):
            x = x + last(first(norm(x)).relu())
        four = torch.stack([x, x.roll(1, 1), x.roll(2, 1), x.flip(1)], -1 if self.interleaved else -2).flatten(2)
        shown = self.norms[2](x).transpose(1, 2).unflatten(2, size)
        return self.reduction(self.merged(four)), self.end(torch.cat([shown, images[:, :2, ::2, ::2]], 1))

    def parts(self, padded=True):
        readers = [StreamReader(norm, (first,)) for norm, first in zip(self.norms, self.firsts)]
        readers += [
            StreamReader(self.merged, (self.reduction,), tokens=4, interleaved=self.interleaved),
            StreamReader(self.norms[2], (self.end,), padded=padded),
        ]
        return [self.start, *self.lasts], [self.token], readers


def network(**options):
    torch.manual_seed(0)
    return Network(**options)


def run(model):
    with torch.no_grad():
        return model(torch.randn(2, 3, 8, 8, generator=generator(3)))


@pytest.mark.parametrize('interleaved', [False, True])
@pytest.mark.parametrize('bias', [False, True])
def test_a_stream_computes_what_it_did(interleaved, bias):
    model = network(interleaved=interleaved, bias=bias)
    before, weights = run(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    rotate_stream_(random_rotation(CHANNELS, generator(), keep_mean=True), *model.parts())
    for old, new in zip(before, run(model)):
        torch.testing.assert_close(new, old, rtol=0, atol=2e-5)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, weights[name]) or name in ('firsts.0.bias', 'firsts.1.bias', 'end.bias'), name
    assert all(bool((norm.weight == 1).all()) for norm in model.norms)
    assert bool((model.norms[0].bias == 0).all()) == bias, 'an offset goes where there is a bias to take it'
    assert bool((model.norms[2].bias != 0).any()), 'and stays where zeros join what the norm gives'


def test_an_offset_before_padding_is_wrong_in_a_bias():
    model = network()
    before = run(model)
    rotate_stream_(random_rotation(CHANNELS, generator(), keep_mean=True), *model.parts(padded=False))
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    after = run(model)[1]
    torch.testing.assert_close(after[inside], before[1][inside], rtol=0, atol=2e-5)
    assert (after - before[1]).abs().max() > 0.1


def test_a_gain_of_zero_takes_its_offset_along():
    model = network()
    with torch.no_grad():
        model.norms[0].weight[3] = 0
    before = run(model)
    rotate_stream_(random_rotation(CHANNELS, generator(), keep_mean=True), *model.parts())
    for old, new in zip(before, run(model)):
        torch.testing.assert_close(new, old, rtol=0, atol=2e-5)


def broken(name):
    model = network()
    rotation = random_rotation(CHANNELS, generator(), keep_mean=name != 'mean')
    writers, tokens, readers = model.parts()
    if name == 'gain':
        with torch.no_grad():
            model.norms[2].weight[3] = 0
    elif name == 'writer':
        writers.append(nn.Linear(4, 5))
    elif name == 'norm':
        readers.append(StreamReader(nn.LayerNorm(7), ()))
    elif name == 'plain norm':
        readers.append(StreamReader(nn.LayerNorm(CHANNELS, elementwise_affine=False), ()))
    elif name == 'layer':
        readers.append(StreamReader(nn.LayerNorm(CHANNELS), (nn.Linear(7, 3),)))
    elif name == 'shear':
        rotation = rotation.clone()
        rotation[:2] += torch.tensor([[0.1], [-0.1]])  # (1, ..., 1) stays where it is
    elif name == 'writer twice':
        writers.append(writers[0])
    elif name == 'weight twice':
        writers.append(nn.Linear(40, CHANNELS))
        writers[-1].weight = writers[1].weight
    elif name == 'token twice':
        tokens.append(tokens[0])
    elif name == 'norm twice':
        readers.append(StreamReader(readers[0].norm, ()))
    elif name == 'reader twice':
        readers.append(StreamReader(nn.LayerNorm(CHANNELS), readers[0].layers))
    return model, rotation, writers, tokens, readers


@pytest.mark.parametrize(
    'name, message',
    [
        ('mean', r'keep \(1, \.\.\., 1\)'),
        ('gain', 'gain of 0'),
        ('writer', '5 outputs'),
        ('norm', 'LayerNorm of 24'),
        ('plain norm', 'gain and offset'),
        ('layer', 'reads fewer'),
        ('shear', 'not orthogonal'),
        ('writer twice', 'writer.*named twice'),
        ('weight twice', 'writer.*named twice'),
        ('token twice', 'token.*named twice'),
        ('norm twice', 'LayerNorm.*named twice'),
        ('reader twice', 'behind a LayerNorm.*named twice'),
    ],
)
def test_what_does_not_fit_changes_nothing(name, message):
    model, *arguments = broken(name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match=message):
        rotate_stream_(*arguments)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_channel_that_sticks_out_costs_less():
    model = network()
    with torch.no_grad():
        model.norms[0].weight[5] = 20

    def error(weight):
        low, high = weight.amin(1), weight.amax(1)
        scale, zero = choose_qparams(low, high, bits=4, symmetric=False)
        rounded = fake_quantize(weight, scale, zero, *qrange(4, False), axis=0)
        return float((rounded - weight).square().sum())

    before = error(model.firsts[0].weight.detach() * model.norms[0].weight.detach())
    rotate_stream_(random_rotation(CHANNELS, generator(), keep_mean=True), *model.parts())
    assert error(model.firsts[0].weight.detach()) < 0.7 * before
