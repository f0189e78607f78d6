"""Sheets show the values that the model's normalization hides, and files are whole or not there."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from psaq_mm.errors import DataError
from psaq_mm.pictures import ImageSpec
from psaq_mm.visualization import sample_sheet, to_pixels, write_png
from psaq_mm.visualization.sheets import GAP

IMAGENET = ImageSpec(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
UNIT = ImageSpec(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), max_value=1.0)
CENTERED = ImageSpec(mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0))
RAW = ImageSpec()


def _normalized(raw, spec):
    """Raw values 0 .. 255 (N, C, H, W) as the model gets them, by the definition."""
    raw = raw.double() * spec.max_value / 255
    if not spec.mean:
        return raw.float()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (spec.mean, spec.std))
    return ((raw - mean) / std).float()


@pytest.mark.parametrize('spec', [IMAGENET, UNIT, CENTERED, RAW], ids=['imagenet', 'unit', 'centered', 'raw'])
def test_every_level_comes_back(spec):
    raw = torch.arange(256).repeat(3).view(1, 3, 16, 16).float()
    seen = to_pixels(_normalized(raw, spec), spec)
    assert np.array_equal(seen, raw.permute(0, 2, 3, 1).numpy().astype(np.uint8))


def test_values_out_of_range_saturate_instead_of_wrapping():
    far = torch.tensor([-1e4, 1e4]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    dark, bright = to_pixels(far, IMAGENET)
    assert (dark == 0).all() and (bright == 255).all()


def test_one_channel_is_grey_and_of_five_the_first_three_are_shown():
    raw = torch.randint(0, 256, (2, 5, 6, 7), generator=torch.Generator().manual_seed(0)).float()
    five = to_pixels(raw, ImageSpec(channels=5))
    assert np.array_equal(five, raw[:, :3].permute(0, 2, 3, 1).numpy())
    grey = to_pixels(raw[:, :1], ImageSpec(channels=1))
    assert grey.shape == (2, 6, 7, 3)
    assert all(np.array_equal(grey[..., c], raw[:, 0].numpy()) for c in range(3))
    two = to_pixels(raw[:, :2], ImageSpec(channels=2))
    assert np.array_equal(two[..., :2], raw[:, :2].permute(0, 2, 3, 1).numpy()) and (two[..., 2] == 0).all()


@given(count=st.integers(1, 11), columns=st.integers(1, 9), height=st.integers(1, 20), width=st.integers(1, 20))
def test_every_sample_stands_on_the_sheet_in_order(count, columns, height, width):
    raw = torch.arange(count).view(-1, 1, 1, 1).expand(-1, 3, height, width).float() * 20 + 10
    sheet = sample_sheet(raw, RAW, columns=columns)
    across = min(count, columns)
    assert sheet.shape == (-(-count // across) * (height + GAP) - GAP, across * (width + GAP) - GAP, 3)
    for number in range(count):
        top, left = number // across * (height + GAP), number % across * (width + GAP)
        assert (sheet[top : top + height, left : left + width] == 10 + 20 * number).all()


@pytest.mark.parametrize('height,width', [(800, 1216), (1216, 800), (161, 161), (1000, 3)])
def test_large_samples_become_as_small_as_a_cell(height, width):
    sheet = sample_sheet(torch.full((1, 3, height, width), 99.0), RAW, cell=160)
    assert max(sheet.shape[:2]) == 160 and min(sheet.shape[:2]) == max(
        1, round(min(height, width) * 160 / max(height, width))
    )
    assert (sheet == 99).all()


@pytest.mark.parametrize(
    'bad,says',
    [
        (torch.full((1, 3, 4, 4), float('nan')), 'NaN'),
        (torch.zeros(3, 4, 4), r'\(3, 4, 4\)'),
        (torch.zeros(0, 3, 4, 4), r'\(0, 3, 4, 4\)'),
        (torch.full((1, 3, 4, 4), float('inf')), 'infinite'),
    ],
)
def test_what_is_no_picture_is_refused(bad, says):
    with pytest.raises(DataError, match=says):
        sample_sheet(bad, IMAGENET)


def test_an_empty_row_is_refused():
    with pytest.raises(DataError, match='columns=0'):
        sample_sheet(torch.zeros(1, 3, 4, 4), RAW, columns=0)


@pytest.mark.parametrize('shape', [(5, 7, 3), (5, 7)])
def test_a_png_holds_the_picture_and_its_folder_is_made(tmp_path, shape):
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / 'deep' / 'folder' / 'x.png'
    write_png(picture, path)
    assert np.array_equal(np.asarray(Image.open(path)), picture)
    assert os.listdir(path.parent) == ['x.png']


@pytest.mark.parametrize('bad', [np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_a_png_of_something_else_is_refused_and_leaves_what_was_there(tmp_path, bad):
    path = tmp_path / 'x.png'
    write_png(np.full((2, 2, 3), 7, np.uint8), path)
    before = path.read_bytes()
    with pytest.raises(DataError, match='no picture'):
        write_png(bad, path)
    assert path.read_bytes() == before
