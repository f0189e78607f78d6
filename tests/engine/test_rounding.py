"""Compensated rounding and the divergence of the logits, as parts of a data-free run."""

import copy
import re

import pytest
import torch
from classifier_models import CLASSIFIER, SIZES, build_classifier
from tiny import DETECTOR, SEGMENTOR, Project

from psaq_mm.calibration import Calibration, CalibrationSettings, StudentTraining, TrainingSettings, normalized_l1
from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.engine.checkpoint import read_checkpoint
from psaq_mm.models import TaskModel
from psaq_mm.pictures import PinkNoise, SampleStream
from psaq_mm.quantization import set_mode

pytestmark = pytest.mark.filterwarnings('ignore')

NAMES = ('timm-vit', 'mmpretrain-swin', 'mmpretrain-vit')


def training_of(name, quant='w4a8', logits_weight=0.0, **settings):
    student = build_classifier(name, quant=dict(preset=quant, scope='full'))
    teacher = copy.deepcopy(student)
    set_mode(teacher, 'off')
    teacher.requires_grad_(False)
    teacher, student = (TaskModel(m, ('blocks',), block_stride=1) for m in (teacher, student))
    settings = CalibrationSettings(**{**dict(calibration_samples=16), **settings})
    calibration = Calibration(student, settings, scope='full', random=torch.Generator().manual_seed(0))
    stream = SampleStream(PinkNoise(), (SIZES[name],) * 2, teacher.image_spec, 0)
    return StudentTraining(teacher, calibration, stream, TrainingSettings(logits_weight=logits_weight))


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('quant', ['psaq_v2_w4a8', 'repq_w4a8'])
def test_students_start_nearer_to_their_teacher(name, quant):
    errors = {}
    for rounding in ('nearest', 'compensated', 'guided'):
        training = training_of(name, quant, rounding=rounding)
        training.prepare()
        unseen = training.pictures(16)
        with torch.no_grad():
            errors[rounding] = float(normalized_l1(training.student.outputs(unseen), training.teacher.outputs(unseen)))
        assert bool(training.calibration.rounded) == (rounding != 'nearest')
    assert errors['compensated'] < 0.95 * errors['nearest'] and errors['guided'] < 0.95 * errors['nearest'], errors


@pytest.mark.parametrize('quant, same', [('psaq_v2_w8a8', 'compensated'), ('psaq_v2_w4a8', 'guided')])
def test_how_to_round_is_chosen_by_the_bits_of_the_weights(quant, same):
    codes = {}
    for rounding in ('auto', 'compensated', 'guided'):
        training = training_of('timm-vit', quant, rounding=rounding, calibration_samples=4)
        training.prepare()
        codes[rounding] = torch.cat([p.detach().flatten() for p in training.student.model.parameters()])
    assert not torch.equal(codes['guided'], codes['compensated'])
    assert torch.equal(codes['auto'], codes[same])


def test_guided_rounding_leaves_parameters_as_they_were_but_for_their_codes():
    training = training_of('timm-vit', 'psaq_v2_w4a8', rounding='guided')
    frozen = next(training.student.model.parameters()).requires_grad_(False)
    training.prepare()
    others = [p for p in training.student.model.parameters() if p is not frozen]
    assert not frozen.requires_grad and all(p.requires_grad and p.grad is None for p in others)


def test_logits_are_learned_beside_the_blocks():
    plain, with_logits = training_of('timm-vit'), training_of('timm-vit', logits_weight=2.0)
    for training in (plain, with_logits):
        training.prepare()
    images = plain.draw()
    with torch.no_grad():
        taught = plain.teacher.run(images, with_logits=True).logits.softmax(1)
        found = plain.student.run(images, with_logits=True).logits.softmax(1)
    divergence = float((taught * (taught / found).log()).sum(1).mean())
    assert divergence > 1e-4
    losses, others = (training.learn(images, torch.Tensor.backward) for training in (plain, with_logits))
    assert float(others.loss) == pytest.approx(float(losses.loss) + 2 * divergence, rel=1e-3)
    assert float(others.discrepancy) == float(losses.discrepancy)
    heads = [p for n, p in with_logits.student.model.named_parameters() if 'head' in n]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in heads)


@pytest.mark.parametrize(
    'settings, match',
    [
        (dict(rounding='up'), "dfq.rounding='up' is not known"),
        (dict(prior_rows=0.0), 'dfq.prior_rows=0.0 must be positive'),
        (dict(logits_weight=-1.0), 'dfq.logits_weight=-1.0'),
        (dict(size=(3, 3)), r'dfq.size=\(3, 3\) is smaller than one attention window'),
        (dict(classes='cats'), "dfq.classes='cats'"),
        (dict(pool_size=1, iters=1), 'dfq.pool_size=1 is smaller than'),
        (dict(joint_lr=0.05), 'dfq.joint_lr=0.05 is no longer supported'),
    ],
)
def test_settings_out_of_range_are_named_as_the_user_gives_them(tmp_path, capsys, settings, match):
    pytest.importorskip('mmpretrain')
    project = Project(tmp_path, CLASSIFIER)
    path = project.config(**{**dict(size=None, iters=0, evolve_every=0, source='pink'), **settings})
    assert dfq_train([str(path), '--work-dir', str(tmp_path / 'run')]) == 1
    assert re.search(match, capsys.readouterr().err)


def test_a_run_moves_weights_and_leaves_ranges(tmp_path_factory):
    pytest.importorskip('mmpretrain')
    project = Project(tmp_path_factory.mktemp('rounding'), CLASSIFIER)
    states = {}
    for name, rounding in (('nearest', 'nearest'), ('compensated', 'compensated')):
        path = project.config(
            name=f'{name}.py',
            size=None,
            quant=dict(preset='w4a8', scope='full'),
            iters=0,
            evolve_every=0,
            source='pink',
            rounding=rounding,
        )
        assert dfq_train([str(path), '--work-dir', str(project.folder / name)]) == 0
        states[name] = read_checkpoint(project.folder / name / 'student.pth')
    assert states['compensated']['meta']['psaq_mm']['dfq']['rounding'] == 'compensated'
    plain, rounded = (states[name]['state_dict'] for name in ('nearest', 'compensated'))
    moved = {k for k in plain if not torch.equal(plain[k], rounded[k])}
    assert any(k.endswith('qkv.weight') for k in moved) and not any('quantizer' in k for k in moved)


@pytest.mark.parametrize('base', [DETECTOR, SEGMENTOR], ids=['detector', 'segmentor'])
def test_detectors_and_segmentors_are_rounded_where_their_maps_feel_it(base, tmp_path):
    """``scope='full'``: layers that no gradient reaches, such as RoI heads, are rounded as well."""
    pytest.importorskip('mmdet' if base is DETECTOR else 'mmseg')
    project = Project(tmp_path, base)
    path = project.config(
        quant=dict(preset='psaq_v2_w4a8', scope='full'), iters=0, evolve_every=0, source='pink', rounding='guided'
    )
    assert dfq_train([str(path), '--work-dir', str(tmp_path / 'run')]) == 0
    before, after = (
        read_checkpoint(file)['state_dict'] for file in (project.checkpoint, tmp_path / 'run' / 'student.pth')
    )
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert any(k.endswith('qkv.weight') for k in moved) and all(k.endswith('.weight') for k in moved)
    assert any(k.startswith('roi_head' if base is DETECTOR else 'decode_head') for k in moved)
