"""The library's own inferencers, test-time augmentation and command lines serve the quantized model."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import DETECTOR, SEGMENTOR, Project

from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.errors import CheckpointError, NotCalibratedError
from psaq_mm.quantization import quantizers, set_mode

pytestmark = pytest.mark.filterwarnings('ignore')
IMAGE = np.random.default_rng(0).integers(0, 255, (70, 100, 3), dtype=np.uint8)


def quantized(tmp_path_factory, library, base):
    """A project of that library with its ``student.pth``, from the shortest run there is."""
    pytest.importorskip(library)
    project = Project(tmp_path_factory.mktemp(library), base)
    project.path = project.config(iters=1, evolve_every=0)
    assert dfq_train([str(project.path), '--work-dir', str(project.folder / 'work')]) == 0
    project.student = project.folder / 'work' / 'student.pth'
    return project


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    return quantized(tmp_path_factory, 'mmdet', DETECTOR)


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory):
    return quantized(tmp_path_factory, 'mmseg', SEGMENTOR)


def is_served_quantized(model, images):
    """Switching the quantizers off changes what the model computes."""
    assert all(q.mode == 'on' for _, q in quantizers(model))
    with torch.no_grad():
        on = model.backbone(images)[0]
        set_mode(model, 'off')
        off = model.backbone(images)[0]
        set_mode(model, 'on')
    return bool((on - off).abs().max() > 0)


def test_init_detector(detector):
    from mmdet.apis import inference_detector, init_detector

    model = init_detector(str(detector.path), str(detector.student), device='cpu')
    assert model.dataset_meta['classes'] == ('bolt', 'nut')
    inference_detector(model, IMAGE)
    assert is_served_quantized(model, torch.randn(1, 3, 64, 64))


def test_det_inferencer(detector):
    from mmdet.apis import DetInferencer

    inferencer = DetInferencer(str(detector.path), str(detector.student), device='cpu', show_progress=False)
    found = inferencer(IMAGE, no_save_pred=True)
    assert len(found['predictions']) == 1
    assert is_served_quantized(inferencer.model, torch.randn(1, 3, 64, 64))


def test_init_model_and_mmseg_inferencer(segmentor):
    from mmseg.apis import MMSegInferencer, inference_model, init_model

    model = init_model(str(segmentor.path), str(segmentor.student), device='cpu')
    assert inference_model(model, IMAGE).pred_sem_seg.data.shape[-2:] == IMAGE.shape[:2]
    assert is_served_quantized(model, torch.randn(1, 3, 64, 96))
    inferencer = MMSegInferencer(
        str(segmentor.path),
        str(segmentor.student),
        classes=('a', 'b', 'c', 'd', 'e'),
        palette=[[i, i, i] for i in range(5)],
        device='cpu',
    )
    assert inferencer(IMAGE)['predictions'].shape == IMAGE.shape[:2]
    assert is_served_quantized(inferencer.model, torch.randn(1, 3, 64, 96))


def test_an_inferencer_does_not_serve_a_full_precision_checkpoint_as_quantized(detector):
    from mmdet.apis import inference_detector, init_detector

    model = init_detector(str(detector.path), str(detector.checkpoint), device='cpu')
    with pytest.raises(NotCalibratedError, match='backbone.patch_embed.projection'):
        inference_detector(model, IMAGE)


def test_an_inferencer_refuses_weights_that_do_not_fit(detector, tmp_path):
    from mmdet.apis import init_detector

    content = torch.load(detector.student, map_location='cpu')
    content['state_dict']['backbone.norm0.weight'] = torch.zeros(3)
    torch.save(content, tmp_path / 'wrong.pth')
    with pytest.raises(CheckpointError, match='backbone.norm0.weight'):
        init_detector(str(detector.path), str(tmp_path / 'wrong.pth'), device='cpu')


def test_an_inferencer_refuses_other_bits(detector):
    from mmdet.apis import inference_detector, init_detector

    other = detector.config(quant='w4a8', name='other_bits.py')
    with pytest.raises((CheckpointError, NotCalibratedError)):
        inference_detector(init_detector(str(other), str(detector.student), device='cpu'), IMAGE)


def test_test_time_augmentation(detector):
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope
    from mmengine.runner import load_checkpoint

    config = Config.fromfile(detector.path)
    init_default_scope('mmdet')
    wrapped = MODELS.build(
        dict(
            type='DetTTAModel',
            tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
            module=config.model,
        )
    )
    load_checkpoint(wrapped.module, str(detector.student), map_location='cpu')
    wrapped.eval()
    assert is_served_quantized(wrapped.module, torch.randn(1, 3, 64, 64))


ROOT = Path(__file__).resolve().parents[2]


def run_tool(library, name, *arguments, cwd):
    """An unmodified script of a library's own ``tools``; its standard output and error."""
    script = Path(library.__file__).parent / '.mim' / 'tools' / name
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_unmodified_train_tools_run_a_dumped_data_free_config(detector, segmentor, tmp_path):
    """What dfq_train leaves in the work dir is a config that any tools/train.py of the libraries runs, data-free."""
    import mmdet
    import mmseg

    for library, project in ((mmdet, detector), (mmseg, segmentor)):
        dumped = project.folder / 'work' / project.path.name
        run_tool(library, 'train.py', dumped, '--work-dir', tmp_path / library.__name__, cwd=tmp_path)
        assert (tmp_path / library.__name__ / 'student.pth').is_file()


def distribution_is_known(library):
    from mmengine.config.utils import MODULE2PACKAGE

    return library == 'mmdet' or MODULE2PACKAGE[library] != library


@pytest.mark.slow
@pytest.mark.parametrize(
    'library, name, metric', [('mmdet', 'mask_rcnn_swin_demo', 'coco/segm_mAP'), ('mmseg', 'upernet_swin_demo', 'mIoU')]
)
def test_a_project_elsewhere_with_three_statements(library, name, metric, tmp_path):
    """A full-precision config of somebody else, inherited: our commands, then the library's own tools/test.py,
    agree."""
    import importlib
    import json

    from scenes import make_scenes

    from psaq_mm.commands.test import main as evaluate_command

    module = importlib.import_module(library)
    make_scenes(tmp_path / 'work_dirs' / 'demo' / 'scenes', dict(val=6))
    (tmp_path / 'mine.py').write_text(
        f"_base_ = ['{ROOT}/configs/demo/{name}.py']\n"
        "model = dict(type='psaq_mm.Quantized', base_type={{_base_.model.type}}, quant='w8a8')\n"
        f"load_from = '{ROOT}/demo/checkpoints/{name}.pth'\n"
    )
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        options = [
            'dfq.preset=calibrate',
            'dfq.iters=0',
            'dfq.calibration_samples=4',
            'dfq.pool_size=4',
            'dfq.source=pink',
        ]
        assert dfq_train(['mine.py', '--cfg-options', *options]) == 0
        assert evaluate_command(['mine.py', 'work_dirs/mine/student.pth', '--full-precision']) == 0
        results = json.loads(Path('work_dirs/mine/test_results.json').read_text())
    finally:
        os.chdir(before)
    assert results['full_precision'][metric] > 0.5 and results['quantized'] != results['full_precision']
    # The library's own tool cannot read a base of mmseg's under onedl-mmengine (psaq_mm/engine/forks.py); what we left
    # behind has none.
    config = 'mine.py' if distribution_is_known(library) else 'work_dirs/mine/mine.py'
    printed = run_tool(module, 'test.py', config, 'work_dirs/mine/student.pth', cwd=tmp_path)
    expected = results['quantized'][metric]
    assert f'{metric}: {expected:.4f}' in printed, printed[-1500:]
