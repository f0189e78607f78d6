"""--resume with a path: that checkpoint, or the newest one in that work dir."""

import pytest
import torch
from quick_builds import configs_as_they_are
from tiny_classifier import ClassifierProject

from psaq_mm.commands.dfq_train import build_parser
from psaq_mm.commands.dfq_train import main as quantize
from psaq_mm.engine.checkpoint import read_checkpoint
from psaq_mm.engine.hooks.data_free_quant_hook import checkpoints_in

pytestmark = pytest.mark.filterwarnings('ignore')

QUICK = dict(size=(32, 32), generator=dict(batch_size=2, steps=1), sheet_interval=0, iters=4, checkpoint_interval=2)


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    pytest.importorskip('mmpretrain')
    with configs_as_they_are():
        project = ClassifierProject(tmp_path_factory.mktemp('resume'), per_class=1)
        project.path = project.config(keep_checkpoints=3, **QUICK)
        project.run = project.folder / 'run'
        assert quantize([str(project.path), '--work-dir', str(project.run)]) == 0
        yield project


def weights(path):
    return read_checkpoint(path)['state_dict']


def same(first, second):
    return all(torch.equal(first[key], second[key]) for key in first) and first.keys() == second.keys()


def test_from_a_checkpoint_into_another_work_dir(project, tmp_path):
    checkpoint = project.run / 'iter_2.pth'
    assert checkpoint.is_file()
    assert quantize([str(project.path), '--resume', str(checkpoint), '--work-dir', str(tmp_path / 'again')]) == 0
    assert [path.name for path in checkpoints_in(tmp_path / 'again')] == ['iter_4.pth'], 'it begins at step 2'
    assert same(weights(tmp_path / 'again' / 'student.pth'), weights(project.run / 'student.pth'))


def test_from_a_work_dir_results_go_there_too(project):
    student = project.run / 'student.pth'
    expected = weights(student)
    student.unlink()
    (project.run / 'iter_4.pth').unlink()
    assert quantize([str(project.path), '--resume', str(project.run)]) == 0
    assert same(weights(student), expected)


@pytest.mark.parametrize(
    'name, words',
    [
        ('nowhere.pth', ['there is no checkpoint and no work dir of this name', 'leave it out']),
        ('student.pth', ['is no checkpoint of a run', 'give iter_N.pth of its work dir']),
        ('empty', ['there is no checkpoint to resume from in']),
        ('text.pth', ['text.pth', 'damaged or no checkpoint']),
    ],
)
def test_what_cannot_be_resumed_is_told(project, tmp_path, capsys, name, words):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'text.pth').write_text('weights')
    path = project.run / name if name == 'student.pth' else tmp_path / name
    assert quantize([str(project.path), '--resume', str(path), '--work-dir', str(tmp_path / 'work')]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('psaq-dfq-train: ') and str(path) in error and all(word in error for word in words), error


def test_the_option_has_three_forms():
    parser = build_parser()
    assert parser.parse_args(['C.py']).resume is False and parser.parse_args(['C.py', '--resume']).resume is True
    assert parser.parse_args(['C.py', '--resume', 'iter_2.pth']).resume == 'iter_2.pth'
