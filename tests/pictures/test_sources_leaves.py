# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Dead leaves: geometry against one leaf at a time, sizes, coverage, and what makes them unlike noise."""

import math

import pytest
import torch

from psaq_mm.pictures import DeadLeaves, ImageSpec
from psaq_mm.pictures import leaves as module
from psaq_mm.pictures.leaves import SHAPES, _painted, leaf_maps, mean_square, power_law

SPEC = ImageSpec((127.5,) * 3, (20.0,) * 3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def one_leaf(shape, x=30.0, y=20.0, long=12.0, short=6.0, angle=0.5, sides=5):
    numbers = dict(x=x, y=y, long=long, short=short, angle=angle)
    return dict(
        {k: torch.tensor([v]) for k, v in numbers.items()},
        shape=torch.tensor([SHAPES.index(shape)]),
        sides=torch.tensor([sides]),
    )


def joined(*leaves):
    return {key: torch.cat([leaf[key] for leaf in leaves]) for key in leaves[0]}


def plain_cover(leaf, size):
    """Pixels inside one leaf, by the textbook: turned back, unstretched, and tested in its own axes."""
    height, width = size
    dx = (torch.arange(width, dtype=torch.float64) - leaf['x'].double() + width / 2) % width - width / 2
    dy = (
        torch.arange(height, dtype=torch.float64).unsqueeze(1) - leaf['y'].double() + height / 2
    ) % height - height / 2
    cos, sin, long, short = (
        v.double() for v in (leaf['angle'].cos(), leaf['angle'].sin(), leaf['long'], leaf['short'])
    )
    u, v = (cos * dx + sin * dy) / long, (-sin * dx + cos * dy) / short
    name = SHAPES[int(leaf['shape'])]
    if name == 'disc':
        return u**2 + v**2 <= 1
    if name == 'rectangle':
        corner = long / (long**2 + short**2).sqrt()
        return (u.abs() <= corner) & (v.abs() <= corner)
    sides = int(leaf['sides'])
    turns = [2 * math.pi * k / sides for k in range(sides)]
    return torch.stack([u * math.cos(t) + v * math.sin(t) <= math.cos(math.pi / sides) for t in turns]).all(0)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('sides', [3, 5, 6])
@pytest.mark.parametrize('x, y', [(30.0, 20.0), (0.3, 47.9), (63.7, 0.0)])
def test_a_leaf_is_where_the_textbook_has_it(shape, sides, x, y):
    leaf = one_leaf(shape, x, y, sides=sides)
    found = leaf_maps([leaf], (48, 64))[0]
    assert torch.equal(found > 0, plain_cover(leaf, (48, 64))) and int(found.max()) == 1


def test_the_foremost_leaf_hides_the_others():
    leaves = DeadLeaves(radius=(2.0, 0.4)).leaves((40, 56), seeded())
    count = len(leaves['x'])
    wanted = torch.zeros(40, 56, dtype=torch.int64)
    for number in range(count):  # the hindmost first, each over those before
        wanted[plain_cover({k: v[number : number + 1] for k, v in leaves.items()}, (40, 56))] = number + 1
    found = leaf_maps([leaves], (40, 56))[0]
    assert float((found != wanted).float().mean()) < 2e-3, 'all but pixels on an edge, where float32 and float64 differ'
    assert len(found.unique()) > 20


def test_order_decides_and_nothing_else():
    small, large = one_leaf('disc', long=4.0, short=4.0), one_leaf('disc', long=15.0, short=15.0)
    behind, before = leaf_maps([joined(small, large), joined(large, small)], (48, 64))
    assert behind.unique().tolist() == [0, 2] and before.unique().tolist() == [0, 1, 2] and int(before[20, 30]) == 2


def test_pictures_laid_out_together_are_those_laid_out_alone():
    pictures = [DeadLeaves().leaves((33, 50), seeded(s)) for s in range(4)]
    together = leaf_maps(pictures, (33, 50))
    for number, leaves in enumerate(pictures):
        assert torch.equal(together[number], leaf_maps([leaves], (33, 50))[0])


@pytest.mark.parametrize('exponent', [1.0, 2.0, 3.0])
def test_sizes_follow_the_power_law(exponent):
    found = power_law(200_000, 3.0, 60.0, exponent, seeded()).double()
    assert 3 <= float(found.min()) and float(found.max()) <= 60.001
    for edge in (4.0, 8.0, 20.0):
        if exponent == 1:
            share = math.log(edge / 3) / math.log(20)
        else:
            p = 1 - exponent
            share = (edge**p - 3**p) / (60**p - 3**p)
        assert float((found < edge).double().mean()) == pytest.approx(share, abs=0.005)
    assert float(found.square().mean()) == pytest.approx(mean_square(3.0, 60.0, exponent), rel=0.03)


@pytest.mark.parametrize('weights', [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 1.0)])
def test_the_area_of_the_leaves_is_the_coverage(weights, monkeypatch):
    monkeypatch.setattr(module, 'COVERAGE', 2.0)
    monkeypatch.setattr(module, 'SHAPE_WEIGHTS', weights)
    source = DeadLeaves(radius=(3.0, 0.15))
    uncovered = [
        float((leaf_maps([source.leaves((128, 128), seeded(s))], (128, 128)) == 0).float().mean()) for s in range(6)
    ]
    assert sum(uncovered) / 6 == pytest.approx(math.exp(-2), abs=0.03)


def test_shapes_are_equally_often():
    chosen = DeadLeaves().leaves((200, 200), seeded())['shape']
    assert [(chosen == k).float().mean().item() for k in range(3)] == pytest.approx([1 / 3] * 3, abs=0.05)


def test_edges_are_sharper_and_rarer_than_those_of_noise(monkeypatch):
    """Differences of neighbours: mostly small, some large; their kurtosis is 3 for any Gaussian noise, white or
    pink."""
    monkeypatch.setattr(module, 'TEXTURE', 0.2)
    made = DeadLeaves().draw(range(4), (96, 96), SPEC)
    step = made[..., 1:] - made[..., :-1]
    step = step - step.mean()
    assert float(step.pow(4).mean() / step.square().mean() ** 2) > 6


def test_plain_leaves_are_of_one_colour_and_textured_ones_are_not(monkeypatch):
    source = DeadLeaves()
    leaves = source.leaves((64, 64), seeded())
    ids = leaf_maps([leaves], (64, 64))[0]
    leaf = int(ids[ids > 0].mode().values)

    def painted(amount):
        monkeypatch.setattr(module, 'TEXTURE', amount)
        monkeypatch.setattr(module, 'SHADING', amount)
        return _painted(ids, leaves, source._paints((64, 64), 3, seeded(5)))[:, ids == leaf]

    plain, textured = painted(0.0), painted(1.0)
    assert float(plain.std(1).max()) < 1e-6 < 0.05 < float(textured.std(1).min())


def test_the_picture_is_periodic():
    """No seam: across the border, neighbours differ no more than inside."""
    made = DeadLeaves(radius=(6.0, 0.4)).draw(range(12), (64, 64), SPEC)
    inside = (made[..., 1:] - made[..., :-1]).abs().mean()
    across = (made[..., 0] - made[..., -1]).abs().mean()
    assert float(across / inside) < 1.4


def test_channels_of_a_leaf_correlate():
    source = DeadLeaves()
    colours = torch.cat([source._paints((128, 128), 3, seeded(s)).colour for s in range(4)], 1)
    found = torch.corrcoef(colours)
    assert float(found[0, 1]) == pytest.approx(module.COLOR_CORRELATION, abs=0.05) and float(
        found[1, 2]
    ) == pytest.approx(module.COLOR_CORRELATION, abs=0.05)


@pytest.mark.parametrize('size', [(1, 1), (3, 200), (2, 2)])
def test_sizes_smaller_than_a_leaf(size):
    assert DeadLeaves().draw([0, 1], size, SPEC).isfinite().all()


def test_a_texture_is_stronger_in_one_channel_than_in_another(monkeypatch):
    """With channels that correlate wholly, colours are grey: what is left of colour is the tint of the textures."""
    monkeypatch.setattr(module, 'COLOR_CORRELATION', 1.0)
    monkeypatch.setattr(module, 'SHADING', 0.0)

    def drawn(amount):
        monkeypatch.setattr(module, 'TEXTURE', amount)
        return DeadLeaves().pictures(range(4), (48, 48), ImageSpec(), 0)

    grey, tinted = drawn(0.0), drawn(0.8)
    assert (grey[:, 1] - grey[:, 0])[..., 1:].abs().median() < 1e-5
    colour = tinted - tinted.mean(1, keepdim=True)
    assert 0.03 < float(colour.std()) < 0.3 * float(tinted.mean(1).std())
