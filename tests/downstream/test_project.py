"""A project outside of the package, with a dataset class and backbone options of its own, quantizes its detector by
inheritance."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import build_full_precision

from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.commands.inspect import main as inspect_command
from psaq_mm.commands.test import main as evaluate_command
from psaq_mm.engine.checkpoint import read_checkpoint
from psaq_mm.quantization import is_quantizer_key, quantizers, set_mode

pytest.importorskip('mmdet')
pytestmark = pytest.mark.filterwarnings('ignore')
CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def student(welds):
    """Quantized, with nothing opened."""
    from welds import WeldDataset

    before = WeldDataset.opened
    assert dfq_train(['configs/weld_detector_w4a8.py', '--work-dir', 'work']) == 0
    assert WeldDataset.opened == before, 'the data-free path opened the training set'
    return welds / 'work' / 'student.pth'


def test_what_will_be_quantized(welds, capsys):
    assert inspect_command(['configs/weld_detector_w4a8.py']) == 0
    table = capsys.readouterr().out
    assert 'backbone.stages.3.blocks.1.attn.w_msa.matmul_qk' in table and 'outside the scope' in table


def test_the_student_has_the_projects_classes_and_its_frozen_stages(welds, student):
    found, plain = read_checkpoint(student), read_checkpoint('weld_detector.pth')['state_dict']
    assert found['meta']['dataset_meta']['classes'] == ('pore', 'crack', 'slag')
    assert {key for key in found['state_dict'] if not is_quantizer_key(key)} == set(plain)
    moved = {key for key in plain if not torch.equal(plain[key], found['state_dict'][key])}
    # What the config freezes is quantized and keeps its weights; the rest of the backbone learns.
    assert not [
        key for key in moved if key.startswith(('backbone.patch_embed', 'backbone.stages.0.', 'rpn_head', 'roi_head'))
    ]
    assert any(key.startswith('backbone.stages.1.') for key in moved)
    assert bool(found['state_dict']['backbone.stages.0.blocks.0.attn.w_msa.qkv.weight_quantizer.calibrated'])


def test_the_student_knows_where_the_projects_classes_are(student):
    """Built from the checkpoint alone, as an inferencer does that is given no config."""
    from mmengine.config import Config

    assert Config.fromstring(read_checkpoint(student)['meta']['cfg'], '.py').custom_imports == dict(imports=['welds'])


def test_ap_before_and_after(welds, student, capsys):
    from welds import WeldDataset

    before = WeldDataset.opened
    assert (
        evaluate_command(
            ['configs/weld_detector_w4a8.py', str(student), '--full-precision', '--work-dir', 'evaluation']
        )
        == 0
    )
    assert WeldDataset.opened > before and 'pascal_voc/mAP' in capsys.readouterr().out


def test_the_library_serves_the_student(welds, student):
    from mmdet.apis import inference_detector, init_detector

    model = init_detector('configs/weld_detector_w4a8.py', str(student), device='cpu')
    assert model.dataset_meta['classes'] == ('pore', 'crack', 'slag')
    assert {q.mode for _, q in quantizers(model)} == {'on'}
    picture = np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    found = inference_detector(model, picture).pred_instances
    assert 0 < len(found) <= 5 and torch.isfinite(found.scores).all()


def test_with_quantizers_off_it_is_the_librarys_model(welds):
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    config = Config.fromfile('configs/weld_detector_w4a8.py')
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model).eval()
    plain = build_full_precision(Config.fromfile('configs/weld_detector.py'))
    model.load_state_dict(plain.state_dict(), strict=False)
    set_mode(model, 'off')
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(model.backbone(images), plain.backbone(images)):
            assert torch.equal(ours, theirs)


def test_an_absolute_position_embedding_takes_one_size(welds, capsys):
    options = ['--cfg-options', 'dfq.size=(96,96)', '--work-dir', 'other_size']
    assert dfq_train(['configs/weld_detector_w4a8.py', *options]) == 1
    assert 'dfq.size=(64, 64)' in capsys.readouterr().err


@pytest.mark.parametrize(
    'option, value, word',
    [
        ('model.backbone.window_size', 8, 'relative_position_bias_table'),
        ('model.backbone.out_indices', [0, 1, 2, 3], 'norm0'),
        ('model.backbone.use_abs_pos_embed', False, 'absolute_pos_embed'),
    ],
)
def test_another_option_than_the_checkpoints_is_refused(welds, capsys, option, value, word):
    """mmdet alone would load such a checkpoint with a warning."""
    arguments = ['--cfg-options', f'{option}={value}', 'dfq.size=(64,64)', '--work-dir', 'refused']
    assert dfq_train(['configs/weld_detector_w4a8.py', *arguments]) == 1
    assert word in capsys.readouterr().err
    assert not (welds / 'refused' / 'student.pth').exists()


def test_from_the_projects_own_shell(welds):
    """The tools as scripts, started in the project's folder."""
    environment = dict(os.environ, PYTHONPATH=str(welds), OMP_NUM_THREADS='1')
    done = subprocess.run(
        [
            sys.executable,
            str(CHECKOUT / 'tools' / 'dfq_train.py'),
            'configs/weld_detector_w4a8.py',
            '--work-dir',
            'shell',
            '--cfg-options',
            'dfq.iters=1',
        ],
        cwd=welds,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    meta = read_checkpoint(welds / 'shell' / 'student.pth')['meta']['psaq_mm']
    assert meta['label'] == 'W4A8' and json.dumps(meta['dfq']['max_iters']) == '1'
