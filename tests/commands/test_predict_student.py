"""psaq-predict with a student: the same pictures, drawings and JSON as with an exported model."""

import json

import cv2
import numpy as np
import pytest
from quick_builds import configs_as_they_are
from tiny import calibrated_student
from tiny_classifier import ClassifierProject

import psaq_mm
from psaq_mm.commands.predict import main

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    pytest.importorskip('mmpretrain')
    with configs_as_they_are():
        project = ClassifierProject(tmp_path_factory.mktemp('classifier'), per_class=1)
        calibrated_student(project, 'w8a8', (32, 32))
    project.student, project.pictures = project.folder / 'student.pth', project.folder / 'data' / 'test'
    return project


def rows(*arguments, status=0):
    """The predictions in the JSON of a command line."""
    arguments = list(map(str, arguments))
    assert main(arguments) == status
    return json.loads(open(arguments[arguments.index('--json') + 1]).read())['pictures']


@pytest.mark.parametrize('with_config', [False, True], ids=['student alone', 'config and student'])
def test_a_folder_through_a_student(project, tmp_path, capsys, with_config):
    named = [project.folder / 'quantized.py', project.student] if with_config else [project.student]
    found = rows(*named, project.pictures, '--out', tmp_path / 'shown', '--json', tmp_path / 'all.json')
    files = sorted(project.pictures.rglob('*.png'))
    expected = psaq_mm.predict(psaq_mm.load(project.student), files)
    assert [row['picture'] for row in found] == list(map(str, files))
    for row, prediction in zip(found, expected):
        assert [one['label'] for one in row['predictions']] == prediction.labels[:5].tolist()
        assert np.allclose([one['score'] for one in row['predictions']], prediction.scores[:5], atol=1e-6)
    drawn = cv2.imread(str(tmp_path / 'shown' / 'a' / '0.png'))
    assert np.array_equal(drawn, expected[0].draw(files[0])) and (drawn != cv2.imread(str(files[0]))).any()
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0].startswith('3 pictures; PyTorch, cpu: predictions ')
    assert last[1] == f'drawn predictions are in {tmp_path / "shown"}'


def test_a_broken_picture_does_not_stop_a_student(project, tmp_path, capsys):
    (tmp_path / 'broken.png').write_bytes(b'no picture')
    found = rows(
        project.student, tmp_path, project.pictures / 'a', '--json', tmp_path / 'all.json', '--device', 'cpu', status=1
    )
    assert 'is no picture' in found[0]['error'] and found[1]['predictions']
    assert 'broken.png is no picture' in capsys.readouterr().err


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['{student}', '{picture}', '--runtime', 'openvino'], '--runtime is for an exported model'),
        (['{student}', '{picture}', '--settings', 'A=1'], '--settings is for an exported model'),
        (['{student}', '{picture}', '--device', 'cuda:9'], '--device cuda:9 is not there'),
        (['{config}', '{picture}'], 'come the student and pictures: psaq-predict {config} STUDENT.pth PICTURE'),
        (['{config}', '{student}'], 'come the student and pictures'),
        (['{full_precision}', '{picture}'], 'full_precision.pth is a full-precision checkpoint and no student'),
        (['nowhere.pth', '{picture}'], 'there is no checkpoint nowhere.pth'),
        (['nowhere', '{picture}'], 'nowhere'),
    ],
)
def test_mistakes_are_one_sentence(project, capsys, arguments, words):
    names = dict(
        student=project.student,
        config=project.folder / 'quantized.py',
        full_precision=project.checkpoint,
        picture=project.pictures / 'a' / '0.png',
    )
    assert main([argument.format(**names) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith('psaq-predict: ') and words.format(**names) in error and len(error.splitlines()) == 1


def test_where_pytorch_is_not_installed_a_student_says_so(project, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(SystemExit, match='psaq-predict: PyTorch and MMEngine are not installed: pip install'):
        main([str(project.student), str(project.pictures)])
