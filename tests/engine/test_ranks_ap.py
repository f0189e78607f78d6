"""Box and mask AP of a quantized detector on two ranks, which get a picture each in turn."""

import json
from pathlib import Path

import pytest
from quick_builds import metafiles_read_once
from two_ranks import ranks_of_tool

from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.commands.test import main as evaluate_command

pytest.importorskip('mmdet')
pytestmark = pytest.mark.filterwarnings('ignore')

ROOT = Path(__file__).parents[2]
CONFIG = """
_base_ = ['{root}/configs/demo/mask_rcnn_swin_demo.py']
model = dict(type='psaq_mm.Quantized', base_type={{{{_base_.model.type}}}}, quant='w4a8')
load_from = '{root}/demo/checkpoints/mask_rcnn_swin_demo.pth'
dfq = dict(preset='calibrate', size=(64, 64), batch_size=2, calibration_samples=2,
           generator=dict(batch_size=2, steps=1))
test_dataloader = dict(batch_size=2, dataset=dict(data_root='{scenes}/'))
test_evaluator = dict(ann_file='{scenes}/annotations/instances_val.json')
"""


def test_two_ranks_evaluate_the_quantized_detector_and_get_the_ap_of_one(tmp_path):
    from scenes import make_scenes

    scenes, _ = make_scenes(tmp_path / 'scenes', dict(val=5))  # the ranks get three each: one of them is there twice
    config = tmp_path / 'detector.py'
    config.write_text(CONFIG.format(root=ROOT, scenes=scenes / 'detection'))
    with metafiles_read_once():
        assert dfq_train([str(config), '--work-dir', str(tmp_path / 'run')]) == 0
    student = tmp_path / 'run' / 'student.pth'
    with metafiles_read_once():
        assert (
            evaluate_command([str(config), str(student), '--work-dir', str(tmp_path / 'one'), '--full-precision']) == 0
        )
    found = ranks_of_tool('test', [config, student, '--work-dir', tmp_path / 'two'], tmp_path)
    outputs = [tmp_path / f'output{rank}.txt' for rank in (0, 1)]
    assert [process.wait(300) for process in found] == [0, 0], outputs[0].read_text()[-3000:]
    one, two = (json.loads((tmp_path / name / 'test_results.json').read_text()) for name in ('one', 'two'))
    assert one['quantized'] == two['quantized']
    assert one['quantized']['coco/bbox_mAP'] > 0.2 and one['quantized']['coco/segm_mAP'] > 0.2
    assert one['quantized'] != one['full_precision'], (
        'four bits leave a trace: it is the quantized model that was evaluated'
    )
