"""Drawings show what was found, where it was found, in its class's colour."""

import numpy as np
import pytest
from drawing import draw_detections, draw_label_map

from psaq_mm.errors import DataError

PALETTE = [(200, 0, 0), (0, 0, 200)]
GREY = np.full((40, 50, 3), 120, np.uint8)


def test_a_mask_is_tinted_and_a_box_drawn_in_the_colour_of_the_class():
    mask = np.zeros((1, 40, 50), bool)
    mask[0, 22:30, 12:30] = True
    seen = draw_detections(GREY, [[10, 20, 32, 32]], [1], ['a', 'b'], PALETTE, [0.9], mask)
    assert seen.shape == (80, 100, 3) and seen.dtype == np.uint8
    inside, outside = seen[52, 40], seen[70, 90]
    assert inside[2] > 140 and inside[0] < 100
    assert outside.tolist() == [120] * 3
    for edge in (seen[50, 20], seen[63:65, 40].mean(0)):  # left and lower, the latter between two pixels
        assert np.abs(edge - PALETTE[1]).max() < 60


def test_names_of_objects_at_the_border_stay_on_the_picture():
    seen = draw_detections(GREY, [[0, 0, 50, 40], [44, 34, 50, 40]], [0, 1], ['left', 'right'], PALETTE, [0.5, 0.6])
    assert (seen == np.array(PALETTE[1])).all(-1).sum() > 300  # the strip of the name does not fit right of the box


def test_the_surest_object_is_on_top():
    mask = np.ones((2, 40, 50), bool)
    for scores, top in (([0.9, 0.6], 0), ([0.6, 0.9], 1)):
        seen = draw_detections(GREY, [[5, 15, 45, 38]] * 2, [0, 1], ['a', 'b'], PALETTE, scores, mask)
        assert np.abs(seen[75:77, 40].mean(0) - PALETTE[top]).max() < 60


def test_nothing_found_leaves_the_picture_as_it_is():
    seen = draw_detections(GREY, np.zeros((0, 4)), [], ['a'], PALETTE, [], np.zeros((0, 40, 50), bool))
    assert seen.shape == (80, 100, 3) and (seen == 120).all()


def test_a_label_map_paints_every_class_and_what_has_none_white():
    labels = np.zeros((40, 50), np.uint8)
    labels[:, 25:], labels[0] = 1, 255
    seen = draw_label_map(GREY, labels, PALETTE, opacity=1.0)
    assert (seen[2:, :50] == PALETTE[0]).all() and (seen[2:, 50:] == PALETTE[1]).all() and (seen[:2] == 255).all()
    clear = draw_label_map(GREY, labels, PALETTE, clear=[0], opacity=1.0)
    assert (clear[2:, :50] == 120).all() and (clear[2:, 50:] == PALETTE[1]).all()
    half = draw_label_map(GREY, labels, PALETTE, opacity=0.5)
    assert half[40, 10].tolist() == [160, 60, 60]


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(DataError, match='1 boxes and 2 labels'):
        draw_detections(GREY, [[0, 0, 9, 9]], [0, 1], ['a', 'b'], PALETTE)
    with pytest.raises(DataError, match='does not cover'):
        draw_label_map(GREY, np.zeros((40, 49)), PALETTE)
    with pytest.raises(DataError, match='no picture'):
        draw_detections(GREY.astype(float), np.zeros((0, 4)), [], [], PALETTE)
