"""Real COCO photographs and annotations through the commands, where PSAQ_MM_DATA names them."""

import json

import pytest
from tiny import DETECTOR, Project

from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.commands.test import main as evaluate_command

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.mark.slow
def test_quantized_detector_on_coco_photographs(data_root, tmp_path, capsys):
    from benchmarks.real import subset

    pytest.importorskip('mmdet')
    coco = data_root / 'coco_mini'
    annotations = subset(next((coco / 'annotations').glob('instances_val*.json')), 2, tmp_path / 'two.json')
    project = Project(tmp_path, DETECTOR)
    config = project.config(quant=dict(preset='w8a8', scope='full'), iters=1, evolve_every=0)
    options = [
        f'test_dataloader.dataset.data_root={coco}',
        f'test_dataloader.dataset.ann_file={annotations}',
        'test_dataloader.num_workers=0',
        'test_dataloader.persistent_workers=False',
        f'test_evaluator.ann_file={annotations}',
        'model.test_cfg.rcnn.score_thr=0.0',
    ]
    assert dfq_train([str(config), '--work-dir', str(tmp_path / 'work')]) == 0
    status = evaluate_command(
        [
            str(config),
            str(tmp_path / 'work' / 'student.pth'),
            '--full-precision',
            '--work-dir',
            str(tmp_path / 'work'),
            '--cfg-options',
            *options,
        ]
    )
    assert status == 0
    results = json.loads((tmp_path / 'work' / 'test_results.json').read_text())
    for kind in ('full_precision', 'quantized'):
        assert set(results[kind]) >= {'coco/bbox_mAP', 'coco/segm_mAP'}
        assert all(-1 <= value <= 1 for value in results[kind].values())
    table = capsys.readouterr().out
    assert 'full precision' in table and 'coco/segm_mAP' in table and 'difference' in table
