"""benchmarks/deploy_detector.py measures a detector with as many boxes as its config allows, or not at all."""

import importlib.util
from pathlib import Path

import pytest
from mmengine.config import ConfigDict

pytest.importorskip('onnx')


@pytest.fixture(scope='module')
def benchmark():
    path = Path(__file__).resolve().parents[2] / 'benchmarks' / 'deploy_detector.py'
    spec = importlib.util.spec_from_file_location('deploy_detector', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_score_and_no_overlap_keeps_boxes_from_the_heads(benchmark):
    test_cfg = dict(
        rpn=dict(nms=dict(type='nms', iou_threshold=0.7), max_per_img=1000), rcnn=dict(score_thr=0.05, max_per_img=100)
    )
    settings = ConfigDict(test_cfg=test_cfg)
    assert benchmark.without_thresholds(settings) == (1000, 100)
    assert settings.test_cfg.rcnn.score_thr == 0 and settings.test_cfg.rpn.nms.iou_threshold == 1
    one_stage = ConfigDict(test_cfg=dict(score_thr=0.05, max_per_img=100))
    assert benchmark.without_thresholds(one_stage) == (None, 100) and one_stage.test_cfg.score_thr == 0
    assert benchmark.without_thresholds(ConfigDict(test_cfg=dict(mode='whole'))) == (None, None)


def test_other_numbers_end_it(benchmark):
    benchmark.check_boxes('W8A8 openvino', benchmark.Boxes(1000, 100), benchmark.Boxes(1000, 100))
    with pytest.raises(
        SystemExit, match='W8A8 openvino has 1000 proposals and 11 detections on the image, not 1000 and 100'
    ):
        benchmark.check_boxes('W8A8 openvino', benchmark.Boxes(1000, 11), benchmark.Boxes(1000, 100))
