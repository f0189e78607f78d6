"""A data-free run from config to student.pth, under the runner, for a detector and a segmentor."""

import copy
import shutil

import pytest
import torch
from tiny import DETECTOR, SEGMENTOR, Project

from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.engine.checkpoint import file_sha256, is_quantized, read_checkpoint
from psaq_mm.engine.hooks.data_free_quant_hook import checkpoints_in
from psaq_mm.quantization import is_quantizer_key

pytestmark = pytest.mark.filterwarnings('ignore')


def losses(work_dir):
    """Losses of the student's steps so far, oldest first, as the newest checkpoint has them."""
    history = read_checkpoint(checkpoints_in(work_dir)[-1])['message_hub']['log_scalars']['train/loss']
    return [float(value) for value in history.data[0]]


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    """A quantized detector. Every data_root of its zoo config points at a folder that does not exist."""
    pytest.importorskip('mmdet')
    project = Project(tmp_path_factory.mktemp('detector'), DETECTOR)
    project.work_dir = project.folder / 'work'
    status = dfq_train([str(project.config()), '--work-dir', str(project.work_dir)])
    assert status == 0
    return project


def test_no_dataset_is_opened(detector):
    from mmengine.config import Config

    config = Config.fromfile(detector.base)
    assert not (detector.folder / config.train_dataloader.dataset.data_root).exists()
    assert not (detector.folder / config.val_dataloader.dataset.data_root).exists()
    assert (detector.work_dir / 'student.pth').is_file()


def test_asking_for_validation_does_open_it(detector, capsys):
    with pytest.raises(FileNotFoundError):
        dfq_train([str(detector.config(name='val.py')), '--work-dir', str(detector.folder / 'val'), '--val'])


def test_student_has_what_the_next_user_needs(detector):
    student = read_checkpoint(detector.work_dir / 'student.pth')
    meta = student['meta']
    assert is_quantized(student)
    assert meta['dataset_meta']['classes'] == ('bolt', 'nut')
    assert meta['psaq_mm']['quant']['w_bits'] == 8 and meta['psaq_mm']['label'] == 'W8A8'
    assert meta['psaq_mm']['teacher'] == dict(
        checkpoint=str(detector.checkpoint), sha256=file_sha256(detector.checkpoint)
    )
    assert meta['psaq_mm']['version']
    plain = read_checkpoint(detector.checkpoint)['state_dict']
    assert {k for k in student['state_dict'] if not is_quantizer_key(k)} == set(plain)
    assert not any(k.startswith('teacher') for k in student['state_dict'])


def test_student_moved_in_the_backbone_and_nowhere_else(detector):
    student = read_checkpoint(detector.work_dir / 'student.pth')['state_dict']
    plain = read_checkpoint(detector.checkpoint)['state_dict']
    moved = {k.split('.')[0] for k in plain if not torch.equal(plain[k], student[k])}
    assert 'backbone' in moved and not moved & {'rpn_head', 'roi_head'}


def test_sheets_log_and_checkpoints(detector):
    assert len(list((detector.work_dir / 'samples').glob('*.png'))) >= 2
    assert len(losses(detector.work_dir)) == 4
    assert [p.name for p in checkpoints_in(detector.work_dir)] == ['iter_2.pth', 'iter_4.pth']
    assert not list(detector.work_dir.glob('.*.partial'))


def test_resumed_run_has_the_losses_and_weights_of_an_uninterrupted_one(detector):
    work_dir = detector.folder / 'resumed'
    work_dir.mkdir()
    shutil.copy(detector.work_dir / 'iter_2.pth', work_dir)
    assert dfq_train([str(detector.config()), '--work-dir', str(work_dir), '--resume']) == 0
    assert losses(work_dir) == losses(detector.work_dir) and len(losses(work_dir)) == 4
    expected = read_checkpoint(detector.work_dir / 'student.pth')['state_dict']
    found = read_checkpoint(work_dir / 'student.pth')['state_dict']
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0, msg=key)


def test_resuming_passes_over_a_checkpoint_cut_short(detector):
    work_dir = detector.folder / 'cut'
    work_dir.mkdir()
    shutil.copy(detector.work_dir / 'iter_2.pth', work_dir)
    whole = (detector.work_dir / 'iter_4.pth').read_bytes()
    (work_dir / 'iter_4.pth').write_bytes(whole[: len(whole) // 2])
    assert dfq_train([str(detector.config()), '--work-dir', str(work_dir), '--resume']) == 0
    assert losses(work_dir) == losses(detector.work_dir)


def test_tensorboard_backend(detector):
    pytest.importorskip('tensorboard')
    path = detector.config(name='tensorboard.py', iters=1, evolve_every=0)
    path.write_text(
        path.read_text() + "vis_backends = [dict(type='TensorboardVisBackend')]\n"
        "visualizer = dict(vis_backends=vis_backends, name='tensorboard')\n"
    )
    work_dir = detector.folder / 'tensorboard'
    assert dfq_train([str(path), '--work-dir', str(work_dir)]) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    event = next(work_dir.glob('*/vis_data/events*'))
    accumulated = EventAccumulator(str(event))
    accumulated.Reload()
    assert 'loss' in accumulated.Tags()['scalars'] and 'samples/entropy' in accumulated.Tags()['scalars']
    assert 'samples' in accumulated.Tags()['images']


@pytest.mark.parametrize('preset', ['gaussian', 'calibrate'])
def test_controls_calibrate_and_train_nothing(detector, preset):
    work_dir = detector.folder / preset
    path = detector.config(name=f'{preset}.py', preset=preset, iters=0, evolve_every=0)
    assert dfq_train([str(path), '--work-dir', str(work_dir)]) == 0
    student = read_checkpoint(work_dir / 'student.pth')['state_dict']
    plain = read_checkpoint(detector.checkpoint)['state_dict']
    assert all(torch.equal(plain[k], student[k]) for k in plain)
    assert all(bool(v) for k, v in student.items() if k.endswith('_quantizer.calibrated'))


@pytest.mark.parametrize('term', ['discrepancy_weight', 'entropy_weight', 'prior_weight'])
def test_a_term_of_weight_zero_takes_no_part(detector, term):
    work_dir = detector.folder / term
    generator = dict(batch_size=2, steps=1, **{term: 0.0})
    path = detector.config(name=f'{term}.py', iters=2, evolve_every=1, generator=generator)
    assert dfq_train([str(path), '--work-dir', str(work_dir)]) == 0
    log = next(work_dir.glob('*/*.log')).read_text()
    lines = [line for line in log.splitlines() if 'Samples [' in line]
    name = term.replace('_weight', ':')
    assert len(lines) == 2 and name not in lines[-1] and 'total:' in lines[-1]


def test_full_scope_calibrates_the_roi_heads_though_nothing_is_detected(detector):
    work_dir = detector.folder / 'full'
    path = detector.config(quant=dict(preset='w4a8', scope='full'), name='full.py', iters=1, evolve_every=0)
    assert dfq_train([str(path), '--work-dir', str(work_dir)]) == 0
    student = read_checkpoint(work_dir / 'student.pth')['state_dict']
    for key in (
        'roi_head.mask_head.upsample',
        'roi_head.mask_head.conv_logits',
        'roi_head.bbox_head.fc_cls',
        'rpn_head.rpn_cls',
        'neck.lateral_convs.0.conv',
    ):
        assert bool(student[f'{key}.input_quantizer.calibrated']), key
        assert bool(student[f'{key}.weight_quantizer.calibrated']), key


def test_segmentor_in_full_scope_leaves_the_auxiliary_head_float(tmp_path):
    pytest.importorskip('mmseg')
    project = Project(tmp_path, SEGMENTOR)
    path = project.config(quant=dict(preset='w4a8', scope='full'), distil=('backbone', 'head'), iters=2, evolve_every=1)
    assert dfq_train([str(path), '--work-dir', str(tmp_path / 'work')]) == 0
    student = read_checkpoint(tmp_path / 'work' / 'student.pth')['state_dict']
    quantized = {k.split('.')[0] for k in student if is_quantizer_key(k)}
    assert quantized == {'backbone', 'decode_head'}


def test_a_config_that_overrides_only_the_backbones_type(detector, capsys):
    from psaq_mm.commands.inspect import main as inspect_command

    path = detector.folder / 'backbone_type.py'
    path.write_text(
        "_base_ = ['full_precision.py']\n"
        "model = dict(backbone=dict(type='psaq_mm.QuantSwinTransformer', quant='w4a8'))\n"
        f'load_from = {str(detector.checkpoint)!r}\n'
        f"dfq = dict(preset='gaussian', size=(64, 96), calibration_samples=2)\n"
    )
    work_dir = detector.folder / 'backbone_type'
    assert inspect_command([str(path)]) == 0
    assert 'stages.0.blocks.0.attn.w_msa.qkv' in capsys.readouterr().out
    assert dfq_train([str(path), '--work-dir', str(work_dir)]) == 0
    student = read_checkpoint(work_dir / 'student.pth')
    assert student['meta']['psaq_mm']['label'] == 'W4A8'
    assert set(k.split('.')[0] for k in student['state_dict'] if is_quantizer_key(k)) == {'backbone'}


def test_inherited_hooks_that_need_data_are_dropped_and_named(detector, capsys):
    path = detector.config(name='hooks.py', iters=1, evolve_every=0)
    path.write_text(path.read_text() + "custom_hooks = [dict(type='EMAHook'), dict(type='NumClassCheckHook')]\n")
    work_dir = detector.folder / 'hooks'
    assert dfq_train([str(path), '--work-dir', str(work_dir)]) == 0
    log = next(work_dir.glob('*/*.log')).read_text()
    assert 'Dropped inherited hooks' in log and 'EMAHook, NumClassCheckHook' in log


def test_pretrained_initialization_is_not_fetched(detector):
    """The zoo config's init_cfg is a URL; the run above would have failed on it."""
    from mmengine.config import Config

    from psaq_mm.engine.config import to_data_free

    config = to_data_free(Config.fromfile(detector.config()))
    assert 'https' in Config.fromfile(detector.base).model.backbone.init_cfg.checkpoint
    assert config.model.backbone.init_cfg is None


def test_the_users_config_is_not_changed(detector):
    from mmengine.config import Config

    from psaq_mm.engine.config import to_data_free

    config = Config.fromfile(detector.config())
    before = copy.deepcopy(config.to_dict())
    to_data_free(config)
    assert config.to_dict() == before
