"""benchmarks/deploy_detector.py measures a detector with as many boxes as its config allows, or not at all."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict

pytest.importorskip('onnx')

from benchmarks import deploy_detector, measuring


def test_settings_tell_how_many_boxes_there_may_be():
    test_cfg = dict(rpn=dict(max_per_img=1000), rcnn=dict(score_thr=0.05, max_per_img=100))
    allowed = [
        deploy_detector.allowed_boxes(SimpleNamespace(test_cfg=ConfigDict(settings)))
        for settings in (test_cfg, dict(score_thr=0.05, max_per_img=100), dict(mode='whole'))
    ]
    assert allowed == [(1000, 100), (None, 100), (None, None)]


def test_other_numbers_end_it():
    wanted = deploy_detector.Boxes(1000, 100)
    deploy_detector.check_boxes('OpenVINO W8A8', deploy_detector.Boxes(1000, 100), wanted)
    with pytest.raises(
        SystemExit, match='OpenVINO W8A8 has 1000 proposals and 11 detections on the picture, not 1000 and 100'
    ):
        deploy_detector.check_boxes('OpenVINO W8A8', deploy_detector.Boxes(1000, 11), wanted)


def test_a_part_does_not_count_what_it_calls():
    now = [0.0]

    def spend(seconds):
        now[0] += seconds

    parts = deploy_detector.Parts(lambda: now[0])
    inner = parts._timed(lambda: spend(3), 'suppress')

    def proposals():
        spend(1)
        inner()
        inner()

    parts._timed(proposals, 'proposals')()
    assert parts.seconds == dict(proposals=1, suppress=6)


def test_graphs_are_told_by_their_inputs():
    parts, features = deploy_detector.Parts(time.perf_counter), np.zeros((7, 2, 2, 1), np.float32)
    run = parts._timed(lambda *args: None, None)
    run(None, dict(images=np.zeros((1, 3, 4, 4))))
    run(None, ['scores'], dict(features=features))
    run(None, dict(features=features[:5], labels=np.zeros(5, np.int64)))
    assert parts.rows == dict(dense=1, box=7, mask=5)


def test_glue_is_what_is_left_of_a_call():
    turn = dict(dense=0.5, box=0.1, mask=0.1, roi_align=0.15, proposals=0.05)
    seconds = {deploy_detector.PYTORCH: [3.0], 'OpenVINO W8A8': [1.0]}
    (row,) = deploy_detector.split_rows(seconds, {deploy_detector.PYTORCH: [{}], 'OpenVINO W8A8': [turn]})
    shown = dict(zip(('name', *deploy_detector.GRAPHS, 'glue', *deploy_detector.GLUE, 'other'), row))
    assert shown.pop('name') == 'OpenVINO W8A8'
    assert {name: float(value) for name, value in shown.items()} == dict(
        dense=500, box=100, mask=100, glue=300, proposals=50, one_stage=0, roi_align=150, suppress=0, paste=0, other=100
    )


def test_speed_up_is_the_median_of_what_was_measured_in_one_turn():
    seconds = dict(float32=[2.0, 40.0, 6.0], W8A8=[1.0, 10.0, 2.0])
    assert deploy_detector.ratio(seconds, 'float32', 'W8A8') == 3.0


def test_machine_is_told_by_family_and_flags():
    line = measuring.processor()
    assert line.startswith('processor: ') and '\n' not in line


def test_pictures_are_drawn_as_opencv_reads_them():
    picture = deploy_detector.drawn_picture((40, 56))
    assert picture.shape == (40, 56, 3) and picture.dtype == np.uint8
    assert picture.min() == 0 and picture.max() == 255 and torch.from_numpy(picture).float().std() > 10
