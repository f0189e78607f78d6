"""What every command says when it cannot go on: one sentence, with advice that this command has an option for."""

import errno
import importlib
import importlib.util

import pytest
import torch
from quick_builds import WeightsWithoutMemory, metafiles_read_once

from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.commands.inspect import main as inspect_command
from psaq_mm.engine.missing import missing_from

COMMANDS = {  # module, what it calls first, arguments, options that it may advise
    'psaq-dfq-train': ('psaq_mm.commands.dfq_train', 'runnable_config', ['C.py'], {'--work-dir', '--resume'}),
    'psaq-test': ('psaq_mm.commands.test', 'runnable_config', ['C.py', 'student.pth'], {'--work-dir'}),
    'psaq-export': ('psaq_mm.commands.export', 'load_config', ['C.py', 'student.pth', '--out', 'D'], {'--out'}),
    'psaq-inspect': ('psaq_mm.commands.inspect', 'load_config', ['C.py'], set()),
    'psaq-convert-checkpoint': (
        'psaq_mm.commands.convert_checkpoint',
        'load_config',
        ['C.py', 'S.pth', '--out', 'O.pth'],
        {'--out'},
    ),
    'psaq-sensitivity': ('psaq_mm.commands.sensitivity', 'load_config', ['C.py', 'F.pth'], {'--work-dir'}),
    'psaq-compare': ('psaq_mm.commands.compare', 'load_config', ['C.py'], {'--work-dir'}),
}


def run(monkeypatch, capsys, command, error):
    """Exit status and the one line on standard error when a command meets an error."""
    module, called, arguments, _ = COMMANDS[command]
    module = importlib.import_module(module)

    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(module, called, fails)
    status = module.main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f'{command}: ')
    return status, lines[0]


def advised(line):
    return {word.strip('.,;') for word in line.split() if word.startswith('--')}


@pytest.mark.parametrize('command', list(COMMANDS))
@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EFBIG, errno.EROFS])
def test_where_nothing_can_be_written(monkeypatch, capsys, command, number):
    status, line = run(monkeypatch, capsys, command, OSError(number, 'No space left on device', 'there/student.pth'))
    assert status == 1 and 'there/student.pth cannot be written (No space left on device): free some space' in line
    assert advised(line) == COMMANDS[command][3] - {'--resume'}


@pytest.mark.parametrize('command', list(COMMANDS))
def test_an_interruption(monkeypatch, capsys, command):
    status, line = run(monkeypatch, capsys, command, KeyboardInterrupt())
    assert status == 130 and 'interrupted; ' in line
    assert advised(line) == COMMANDS[command][3] & {'--resume'}


@pytest.mark.parametrize('command', list(COMMANDS))
def test_a_package_that_is_not_installed(monkeypatch, capsys, command):
    error = RuntimeError('transformers is not installed, please install it by: pip install transformers.')
    status, line = run(monkeypatch, capsys, command, error)
    assert status == 1 and line.endswith('the package transformers is not installed: pip install transformers')


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    'error, words',
    [  # as mmdet, mmseg, mmpretrain, mmengine and Python say it
        (ModuleNotFoundError("No module named 'transformers'"), ['module transformers', 'pip install transformers']),
        (
            ModuleNotFoundError("Failed to import skimage.io in c.py, line 2 for No module named 'skimage'"),
            ['pip install scikit-image'],
        ),
        (
            ImportError('Please run "pip install cityscapesscripts" to install cityscapesscripts first.'),
            ['pip install cityscapesscripts'],
        ),
        (ImportError('Please run "pip install -U sahi" to install sahi first.'), ['pip install -U sahi']),
        (
            RuntimeError(
                'panopticapi is not installed, please install it by: pip install git+https://github.com/cocodataset/panopticapi.git.'
            ),
            ['package panopticapi', 'pip install git+https://github.com/cocodataset/panopticapi.git'],
        ),
        (
            RuntimeError(
                'Package lvis is not installed. Please run "pip install git+https://github.com/lvis-dataset/lvis-api.git".'
            ),
            ['package lvis', 'pip install git+https://github.com/lvis-dataset/lvis-api.git'],
        ),
        (RuntimeError('timm is not installed'), ['package timm', 'pip install timm']),
        (
            AssertionError(
                'To use VPD model, please install required packages via `pip install -r requirements/optional.txt`.'
            ),
            ['pip install -r requirements/optional.txt'],
        ),
        (
            RuntimeError('nltk is not installed,                 please install it by: pip install nltk'),
            ['pip install nltk'],
        ),
        (
            caused(
                ImportError('Failed to import custom modules from a list, the current sys.path is: a b c'),
                caused(ImportError('Failed to import welds'), ModuleNotFoundError("No module named 'welds'")),
            ),
            ['module welds', 'PYTHONPATH'],
        ),
        (
            KeyError(
                "'WeldDataset is not in the mmdet::dataset registry. Please check whether the value of `WeldDataset` "
                "is correct.'"
            ),
            ["type='WeldDataset'", 'mmdet::dataset', 'custom_imports'],
        ),
    ],
)
def test_each_way_of_saying_it(error, words):
    sentence = missing_from(error)
    assert all(word in sentence for word in words), sentence


def test_a_library_that_is_not_installed():
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope('mmabsent'):
        sentence = missing_from(KeyError("'TopdownPoseEstimator is not in the mmengine::model registry. Please check'"))
    assert 'the module mmabsent is not there: pip install mmabsent' in sentence


@pytest.mark.parametrize(
    'error',
    [
        RuntimeError('CUDA out of memory'),
        KeyError('data_root'),
        AssertionError(),
        ImportError("cannot import name 'x' from 'torch'"),
        ModuleNotFoundError("No module named 'psaq_mm.commands.absent'"),
        ValueError('numpy is not installed'),
    ],
)
def test_other_errors_keep_their_traceback(error):
    assert missing_from(error) is None


@pytest.mark.parametrize(
    'lines, words',
    [
        (
            ["_base_ = ['mmdet::glip/glip_atss_swin-t_a_fpn_dyhead_pretrain_obj365.py']"],
            ['language model', 'pip install transformers'],
        ),
        (
            [
                "_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py']",
                "custom_imports = dict(imports=['nowhere.module'])",
            ],
            ['C.py', 'module nowhere', 'pip install nowhere', 'PYTHONPATH'],
        ),
        (
            [
                "_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py']",
                "model = dict(neck=dict(type='MyNeck'))",
            ],
            ["type='MyNeck'", 'custom_imports'],
        ),
    ],
)
def test_a_config_that_needs_more_than_is_there(tmp_path, monkeypatch, capsys, lines, words):
    pytest.importorskip('mmdet')
    if 'pip install transformers' in words and importlib.util.find_spec('transformers'):
        pytest.skip('transformers is installed here')
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'C.py').write_text('\n'.join(lines))
    torch.save(dict(state_dict=dict(weight=torch.ones(1))), 'full_precision.pth')
    with metafiles_read_once(), WeightsWithoutMemory():
        for command, rest in (
            (inspect_command, []),
            (dfq_train, ['--checkpoint', 'full_precision.pth', '--work-dir', 'work']),
        ):
            assert command(['C.py', '--quant', 'w8a8', *rest]) == 1
            error = capsys.readouterr().err.splitlines()[-1]
            assert error.startswith('psaq-') and all(word in error for word in words), error
    assert not list(tmp_path.glob('work/*.pth'))
