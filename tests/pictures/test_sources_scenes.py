# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Scenes: shapes of the area and at the place asked for, patterns in standard units, and objects before a
background."""

import math
from collections import Counter

import pytest
import torch

from psaq_mm.pictures import ImageSpec, Scenes, scenes
from psaq_mm.pictures.scenes import outline, pattern_maps

SPEC = ImageSpec((127.5,) * 3, (26.0,) * 3)  # keeps values up to 4.9 standard units


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def grid(height, width):
    return (torch.arange(height) + 0.5).unsqueeze(1) / min(height, width), (torch.arange(width) + 0.5) / min(
        height, width
    )


def test_without_waves_a_shape_is_an_ellipse():
    y, x = grid(200, 300)
    for squeeze in (1.0, 0.5):
        shape = outline(0.4, 0.8, 0.3, squeeze, 0.0, seeded())
        covered = shape.covers(y, x)
        dy, dx = y - 0.4, x - 0.8
        along = dx * math.cos(shape.turn) + dy * math.sin(shape.turn)
        aside = dy * math.cos(shape.turn) - dx * math.sin(shape.turn)
        assert torch.equal(covered, along.square() + (aside / squeeze).square() < 0.3**2)
        assert float(covered.sum()) / 200**2 == pytest.approx(math.pi * 0.3**2 * squeeze, rel=0.01)


def test_waves_change_the_outline_and_reach_is_its_farthest_point():
    y, x = grid(160, 160)
    for seed in range(5):
        shape = outline(0.5, 0.5, 0.2, 1.0, 0.5, seeded(seed))
        assert float(shape.radii.min()) < 0.19 and 0.21 < shape.reach == float(shape.radii.max())
        distance = ((y - 0.5).square() + (x - 0.5).square()).sqrt()
        covered = shape.covers(y, x)
        assert bool((distance[covered] < shape.reach).all()) and float(distance[covered].max()) > 0.9 * shape.reach
        assert bool(covered[distance < float(shape.radii.min())].all())


def colours(picture):
    """How many pixels have which colour."""
    return Counter(tuple(pixel) for pixel in (20 * picture).round().flatten(1).t().tolist())


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_patterns_are_in_standard_units(channels):
    for seed in range(4):
        maps = pattern_maps((30, 44), 2, channels, (0.5, 0.5), seeded(seed))
        assert maps.shape == (2, channels, 30, 44) and bool(torch.isfinite(maps).all())
        torch.testing.assert_close(maps.mean((2, 3)), torch.zeros(2, channels), rtol=0, atol=1e-5)
        torch.testing.assert_close(maps.square().mean((1, 2, 3)), torch.ones(2), rtol=1e-4, atol=0)


def test_correlated_channels_look_alike():
    grey, colourful = (
        torch.stack([_correlation(pattern_maps((32, 32), 1, 3, (c, c), seeded(s))[0]) for s in range(20)]).mean()
        for c in (1.0, 0.0)
    )
    assert float(grey) == pytest.approx(1.0, abs=1e-4) and abs(float(colourful)) < 0.35


def _correlation(maps):
    return torch.corrcoef(maps.flatten(1))[0, 1]


@pytest.fixture
def still(monkeypatch):
    """Surfaces of one colour each, without light, and pictures of equal spread."""
    for name, value in dict(TEXTURE=(0.0, 0.0), SHADING=0.0, CONTRAST=(0.5, 0.5)).items():
        monkeypatch.setattr(scenes, name, value)


def drawn(monkeypatch, objects, count, **settings):
    monkeypatch.setattr(scenes, 'OBJECTS', (objects, objects))
    return Scenes(**settings).draw(range(count), (40, 40), SPEC)


def test_objects_stand_before_the_background(still, monkeypatch):
    empty = drawn(monkeypatch, 0, 3)
    assert float((empty - empty.mean((2, 3), keepdim=True)).abs().max()) < 1e-2, 'one colour'
    for picture in drawn(monkeypatch, 1, 6, radius=(0.2, 0.3)):
        counts = sorted(colours(picture).values(), reverse=True)
        # Two colours, and where the picture is blurred, those between them along an edge.
        assert len(counts) > 1 and counts[0] + counts[1] > 0.75 * 1600
    assert min(len(colours(picture)) for picture in drawn(monkeypatch, 16, 6)) > 4


def test_contrast_is_the_spread(still, monkeypatch):
    pictures = drawn(monkeypatch, 9, 8)
    centred = pictures - pictures.mean((2, 3), keepdim=True)
    torch.testing.assert_close(centred.square().mean((1, 2, 3)).sqrt(), torch.full((8,), 0.5), rtol=0.01, atol=0)


def test_surfaces_are_shared_by_number_and_nothing_else_is():
    source = Scenes()
    near, far = source.draw([0, 1], (24, 24), SPEC), source.draw([1, scenes._SHARED, 0], (24, 24), SPEC)
    assert torch.equal(near[0], far[2]) and torch.equal(near[1], far[0]) and not torch.equal(far[1], near[0])
    assert not torch.equal(Scenes(seed=1).draw([0], (24, 24), SPEC)[0], near[0])


@pytest.mark.parametrize('size', [(1, 1), (3, 70), (33, 32)])
@pytest.mark.parametrize('channels', [1, 3, 5])
def test_any_size_and_number_of_channels(size, channels):
    spec = ImageSpec((127.5,) * channels, (50.0,) * channels)
    made = Scenes().draw(range(4), size, spec)
    assert (
        made.shape == (4, channels, *size)
        and bool(torch.isfinite(made).all())
        and float(made.abs().max()) <= 127.5 / 50
    )
