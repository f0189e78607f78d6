"""Every mistake named in the documentation ends with one sentence, a non-zero exit, and nothing half-written."""

import pytest
import torch
from tiny import DETECTOR, Project

from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.commands.inspect import main as inspect_command
from psaq_mm.commands.test import main as evaluate_command

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    pytest.importorskip('mmdet')
    return Project(tmp_path_factory.mktemp('project'), DETECTOR)


def fails(capsys, command, arguments, *words):
    """Run, and check status and the one sentence on standard error."""
    assert command([str(a) for a in arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ': ' in error and 'Traceback' not in error
    for word in words:
        assert word in error, error
    return error


@pytest.mark.parametrize(
    'quant, words',
    [
        ('w9a8', ['w_bits=9', '2 to 8']),
        ('w1a8', ['w_bits=1', '2 to 8']),
        ('8bit', ['8bit', 'preset']),
        (dict(preset='w8a8', overrides=[dict(pattern='backbone.stagez.*', w_bits=4)]), ['backbone.stagez.*', 'stages']),
        (dict(preset='w8a8', scop='full'), ['scop', 'scope']),
    ],
)
def test_quant_that_makes_no_sense(project, capsys, quant, words):
    fails(capsys, inspect_command, [project.config(quant=quant, name='wrong.py')], *words)


def test_a_backbone_that_is_not_supported(project, capsys):
    (project.folder / 'resnet.py').write_text(
        "_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py']\ndefault_scope = 'mmdet'\n"
    )
    fails(capsys, inspect_command, [project.folder / 'resnet.py', '--quant', 'w8a8'], 'ResNet', 'not supported')


def test_no_load_from(project, capsys):
    work_dir = project.folder / 'no_load_from'
    fails(
        capsys,
        dfq_train,
        [project.config(load_from=None, name='none.py'), '--work-dir', work_dir],
        'load_from',
        '--checkpoint',
    )
    assert not work_dir.exists()


def test_a_checkpoint_that_is_not_there(project, capsys):
    fails(
        capsys, dfq_train, [project.config(load_from='nowhere.pth', name='nowhere.py')], 'nowhere.pth', 'does not exist'
    )


def test_a_checkpoint_whose_shapes_do_not_fit(project, capsys, tmp_path):
    content = torch.load(project.checkpoint)
    content['state_dict']['backbone.stages.0.blocks.0.attn.w_msa.qkv.weight'] = torch.zeros(3, 3)
    torch.save(content, tmp_path / 'wrong.pth')
    fails(
        capsys,
        dfq_train,
        [project.config(), '--checkpoint', tmp_path / 'wrong.pth', '--work-dir', tmp_path / 'w'],
        '(3, 3)',
        '(48, 16)',
        'qkv.weight',
    )
    assert not (tmp_path / 'w' / 'student.pth').exists()


def test_a_checkpoint_that_lacks_weights(project, capsys, tmp_path):
    content = torch.load(project.checkpoint)
    content['state_dict'] = {k: v for k, v in content['state_dict'].items() if k.startswith('backbone')}
    torch.save(content, tmp_path / 'part.pth')
    fails(
        capsys,
        dfq_train,
        [project.config(), '--checkpoint', tmp_path / 'part.pth', '--work-dir', tmp_path / 'w'],
        'lacks',
        'neck',
    )


def test_nan_in_weights(project, capsys, tmp_path):
    content = torch.load(project.checkpoint)
    content['state_dict']['backbone.norm0.weight'][0] = float('nan')
    torch.save(content, tmp_path / 'nan.pth')
    fails(
        capsys,
        dfq_train,
        [project.config(), '--checkpoint', tmp_path / 'nan.pth', '--work-dir', tmp_path / 'w'],
        'backbone.norm0.weight',
        'NaN',
    )


def test_a_file_that_is_no_checkpoint(project, capsys, tmp_path):
    (tmp_path / 'text.pth').write_text('weights')
    fails(
        capsys,
        dfq_train,
        [project.config(), '--checkpoint', tmp_path / 'text.pth', '--work-dir', tmp_path / 'w'],
        'text.pth',
        'damaged or no checkpoint',
    )


def test_a_checkpoint_that_would_run_code(project, capsys, tmp_path):
    import os

    class Evil:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/ran',)

    torch.save(dict(state_dict=dict(w=torch.ones(1)), meta=Evil()), tmp_path / 'evil.pth')
    fails(
        capsys,
        dfq_train,
        [project.config(), '--checkpoint', tmp_path / 'evil.pth', '--work-dir', tmp_path / 'w'],
        'system',
        'could run code',
    )
    assert not (tmp_path / 'ran').exists()


def test_an_image_smaller_than_one_window(project, capsys, tmp_path):
    fails(
        capsys,
        dfq_train,
        [project.config(name='small.py', size=(16, 64)), '--work-dir', tmp_path / 'w'],
        '(16, 64)',
        'window',
        '28',
    )


def test_an_unknown_setting(project, capsys, tmp_path):
    fails(capsys, dfq_train, [project.config(name='key.py', iterss=3), '--work-dir', tmp_path / 'w'], 'iterss', 'iters')


def test_an_unknown_source(project, capsys, tmp_path):
    fails(
        capsys,
        dfq_train,
        [project.config(name='src.py', source='noise'), '--work-dir', tmp_path / 'w'],
        'noise',
        'gaussian',
    )


def test_full_precision_checkpoint_where_a_quantized_one_is_needed(project, capsys, tmp_path):
    fails(
        capsys,
        evaluate_command,
        [project.config(), project.checkpoint, '--work-dir', tmp_path / 'w'],
        'full-precision',
        'psaq quantize',
    )


def test_no_annotations(project, capsys, tmp_path):
    fails(
        capsys,
        evaluate_command,
        [project.config(), project.checkpoint, '--full-precision', '--work-dir', tmp_path / 'w'],
        'instances_val2017.json',
        'does not exist',
    )


def test_no_config(capsys):
    fails(capsys, dfq_train, ['no_such_config.py'], 'no_such_config.py')


def test_nothing_to_resume(project, capsys, tmp_path):
    fails(
        capsys,
        dfq_train,
        [project.config(), '--work-dir', tmp_path / 'empty', '--resume'],
        'resume',
        str(tmp_path / 'empty'),
    )
