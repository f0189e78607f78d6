"""Runs that are killed, disks that are full, files that are damaged or would run code."""

import collections
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from tiny_classifier import ClassifierProject
from two_ranks import spied, tool

from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.engine.checkpoint import load_restricted, read_checkpoint, save_atomic
from psaq_mm.engine.hooks.data_free_quant_hook import checkpoints_in
from psaq_mm.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings('ignore')

VALIDATED = """
val_dataloader = {{_base_.test_dataloader}}
val_evaluator = {{_base_.test_evaluator}}
val_cfg = dict()
"""


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    """A run of four steps that nothing interrupts."""
    pytest.importorskip('mmpretrain')
    project = ClassifierProject(tmp_path_factory.mktemp('faults'), per_class=2)
    project.quantized = project.config('w8a8', size=(32, 32), rounding='compensated')
    spied(project.quantized)
    project.quantized.write_text(project.quantized.read_text() + VALIDATED)
    project.whole = project.folder / 'whole'
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(project.folder))
        assert dfq_train([str(project.quantized), '--work-dir', str(project.whole), '--val']) == 0
        yield project


def weights(work_dir):
    return read_checkpoint(work_dir / 'student.pth')['state_dict']


def assert_goes_on_to_the_same_end(project, work_dir):
    assert dfq_train([str(project.quantized), '--work-dir', str(work_dir), '--val', '--resume']) == 0
    expected, found = weights(project.whole), weights(work_dir)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert not list(work_dir.glob('.*.partial'))


# ---------------------------------------------------------------------- killed
@pytest.mark.parametrize(
    'moment, left',
    [
        ('samples 1', []),  # the first synthesis: there is nothing yet
        ('samples 3', ['iter_0.pth', 'iter_2.pth']),  # the second round
        ('writing iter_0.pth', []),
        ('writing iter_4.pth', ['iter_0.pth', 'iter_2.pth']),
        ('validation', ['iter_2.pth', 'iter_4.pth']),
        ('writing student.pth', ['iter_2.pth', 'iter_4.pth']),
    ],
)
def test_a_killed_run_goes_on_to_the_same_weights(project, moment, left):
    work_dir = project.folder / moment.replace(' ', '_')
    killed = tool('dfq_train', [project.quantized, '--work-dir', work_dir, '--val'], project.folder, SPY_KILL=moment)
    assert killed.wait(300) == -9, (project.folder / 'output.txt').read_text()[-2000:]
    assert [path.name for path in checkpoints_in(work_dir)] == left and not (work_dir / 'student.pth').exists()
    assert bool(list(work_dir.glob('.*.partial'))) == moment.startswith('writing')
    for path in checkpoints_in(work_dir):
        read_checkpoint(path)
    assert_goes_on_to_the_same_end(project, work_dir)


def test_resuming_where_no_run_was_is_a_mistake(project, tmp_path, capsys):
    assert dfq_train([str(project.quantized), '--work-dir', str(tmp_path / 'nothing'), '--resume']) == 1
    assert 'there is no checkpoint to resume from' in capsys.readouterr().err


# ---------------------------------------------------------------------- damaged
def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def zeros(path):
    """The end is there, a block in the middle is not: what a machine that lost its power may leave."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda part: part.file_size)
    begin = largest.header_offset + 500
    content[begin : begin + 512] = bytes(512)
    path.write_bytes(bytes(content))


def empty(path):
    path.write_bytes(b'')


@pytest.mark.parametrize('damage', [cut, zeros, empty])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_is_used(project, tmp_path, damage, capsys):
    for name in ('iter_2.pth', 'iter_4.pth'):
        shutil.copy(project.whole / name, tmp_path)
    damage(tmp_path / 'iter_4.pth')
    assert_goes_on_to_the_same_end(project, tmp_path)
    line = next(line for line in capsys.readouterr().out.splitlines() if 'the one before it is used' in line)
    assert 'iter_4.pth is damaged' in line


def test_only_damaged_checkpoints(project, tmp_path, capsys):
    shutil.copy(project.whole / 'iter_4.pth', tmp_path)
    cut(tmp_path / 'iter_4.pth')
    assert dfq_train([str(project.quantized), '--work-dir', str(tmp_path), '--resume']) == 1
    assert 'there is no checkpoint to resume from' in capsys.readouterr().err


# ---------------------------------------------------------------------- full disks
def assert_one_sentence(output, name):
    lines = output.strip().splitlines()
    assert (
        'psaq-dfq-train: ' in lines[-1] and f'{name} cannot be written' in lines[-1] and 'free some space' in lines[-1]
    )
    assert 'Traceback' not in output


def test_a_limit_on_the_size_of_files(project):
    """Every step of a write is the system's own; ``ulimit`` stands for the disk."""
    work_dir, sizes = project.folder / 'limited', {p.name: p.stat().st_size for p in project.whole.glob('iter_*.pth')}
    limit = sizes['iter_4.pth'] * 9 // 10 // 1024
    shell = f'ulimit -f {limit} && exec "$0" "$@"'
    script = [
        '-c',
        'import os, sys; os.execvp("bash", ["bash", "-c", sys.argv[1], sys.executable, *sys.argv[2:]])',
        shell,
        str(Path(__file__).parent.parent.parent / 'tools' / 'dfq_train.py'),
    ]
    failed = tool(script, [project.quantized, '--work-dir', work_dir, '--val'], project.folder)
    assert failed.wait(300) == 1
    left = [path.name for path in checkpoints_in(work_dir)]
    assert left and left != ['iter_2.pth', 'iter_4.pth'] and not list(work_dir.glob('.*.partial'))
    assert_one_sentence((project.folder / 'output.txt').read_text(), f'iter_{2 if left == ["iter_0.pth"] else 4}.pth')
    assert_goes_on_to_the_same_end(project, work_dir)


def can_mount():
    try:
        return (
            sys.platform == 'linux'
            and subprocess.run(
                ['unshare', '-m', 'sh', '-c', 'mount -t tmpfs -o size=64k none /mnt'], capture_output=True, timeout=20
            ).returncode
            == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


@pytest.mark.skipif(
    not can_mount(), reason='a small file system of its own can be mounted by an administrator of Linux alone'
)
def test_a_full_disk(project):
    disk, saved = project.folder / 'disk', project.folder / 'saved'
    disk.mkdir()
    sizes = {p.name: p.stat().st_size for p in project.whole.glob('iter_*.pth')}
    # iter_0.pth has no state of the optimizer, and iter_4.pth is the third
    size = sizes['iter_2.pth'] * 28 // 10 + 200_000
    shell = (
        f'mount -t tmpfs -o size={size} none {disk} || exit 99; "$0" "$@"; found=$?; cp -r {disk}/. {saved}; exit '
        f'$found'
    )
    script = [
        '-c',
        'import os, sys; os.execvp("unshare", ["unshare", "-m", "sh", "-c", sys.argv[1], sys.executable, '
        '*sys.argv[2:]])',
        shell,
        str(Path(__file__).parent.parent.parent / 'tools' / 'dfq_train.py'),
    ]
    # More checkpoints are kept than the disk can hold.
    failed = tool(
        script,
        [
            project.quantized,
            '--work-dir',
            disk,
            '--val',
            '--cfg-options',
            'dfq.keep_checkpoints=9',
            'dfq.checkpoint_interval=1',
        ],
        project.folder,
    )
    output = project.folder / 'output.txt'
    assert failed.wait(300) == 1, output.read_text()[-2000:]
    left = checkpoints_in(saved)
    assert left and not list(saved.glob('.*.partial')) and left[-1].name != 'iter_4.pth'
    assert_one_sentence(output.read_text(), f'iter_{len(left)}.pth')
    assert_goes_on_to_the_same_end(project, saved)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / 'file.pth'
    save_atomic(dict(value=torch.ones(1)), path)

    class Unwritable:
        def __reduce__(self):
            raise OSError(28, 'No space left on device')

    with pytest.raises(OSError, match='file.pth'):
        save_atomic(dict(value=torch.zeros(1), more=Unwritable()), path)
    assert float(load_restricted(path)['value']) == 1 and [p.name for p in tmp_path.iterdir()] == ['file.pth']


# ---------------------------------------------------------------------- files that would run code
class Calls:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize(
    'make, named',
    [
        (lambda mark: Calls(os.system, f'touch {mark}'), r'(posix|nt)\.system'),
        (lambda mark: Calls(eval, f'open({str(mark)!r}, "w")'), r'builtins\.eval'),
        (lambda mark: Calls(getattr, HistoryBuffer, 'register_statistics'), r'HistoryBuffer\.register_statistics'),
        (lambda mark: Calls(subprocess.check_call, ['touch', str(mark)]), r'subprocess\.check_call'),
    ],
)
def test_a_file_that_would_run_code_is_refused_by_name(tmp_path, make, named, legacy):
    mark, path = tmp_path / 'ran', tmp_path / 'evil.pth'
    torch.save(
        dict(state_dict=dict(weight=torch.ones(2)), meta=make(mark)), path, _use_new_zipfile_serialization=not legacy
    )
    with pytest.raises(CheckpointError, match=f'evil.pth is not read: it (holds|asks for) {named}'):
        read_checkpoint(path)
    assert not mark.exists()


def test_a_bare_pickle_that_would_run_code(tmp_path):
    mark, path = tmp_path / 'ran', tmp_path / 'evil.pth'
    path.write_bytes(pickle.dumps(Calls(os.system, f'touch {mark}')))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not mark.exists()


def test_what_checkpoints_of_openmmlab_hold_is_read(tmp_path):
    history = HistoryBuffer()
    history.update(3.0, 2)
    content = dict(
        state_dict=collections.OrderedDict(weight=torch.ones(2)),
        meta=dict(
            score=np.float64(2.5),
            array=np.arange(3),
            config=ConfigDict(a=1),
            path=Path('x'),
            classes=('a', 'b'),
            tags={1, 2},
        ),
        message_hub=dict(log_scalars=dict(loss=history)),
    )
    torch.save(content, tmp_path / 'mm.pth')
    found = read_checkpoint(tmp_path / 'mm.pth')
    assert found['meta']['score'] == 2.5 and found['meta']['array'].tolist() == [0, 1, 2]
    assert found['meta']['tags'] == {1, 2} and found['meta']['config'].a == 1
    assert found['message_hub']['log_scalars']['loss'].mean() == history.mean()
