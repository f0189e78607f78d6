"""A data-free run of a classifier of mmpretrain and of timm, from its config to student.pth."""

import numpy as np
import pytest
import torch
from classifier_models import CLASSIFIER, build_classifier
from PIL import Image
from tiny import Project

from psaq_mm.calibration import check_size
from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.engine.checkpoint import read_checkpoint
from psaq_mm.errors import ConfigError
from psaq_mm.models import TaskModel
from psaq_mm.psaq_vit import SampleGenerator, Synthesis, SynthesisSettings

pytestmark = pytest.mark.filterwarnings('ignore')

TIMM = CLASSIFIER.replace(
    'model = dict(',
    """model = dict(
    _delete_=True, type='TimmClassifier', model_name='vit_tiny_patch16_224', img_size=32, patch_size=8,
    embed_dim=32, depth=4, num_heads=2, num_classes=5, pretrained=True)
unused = dict(""",
)

PHOTOGRAPHS = """
train_dataloader = dict(dataset=dict(_delete_=True, type='CustomDataset', data_root={train!r}, pipeline=[
    dict(type='LoadImageFromFile'), dict(type='RandomResizedCrop', scale=32), dict(type='PackInputs')]))
test_dataloader = dict(dataset=dict(
    _delete_=True, type='CustomDataset', data_root={test!r}, pipeline=_base_.test_pipeline))
"""


def project_of(tmp_path_factory, base):
    pytest.importorskip('mmpretrain')
    return Project(tmp_path_factory.mktemp('classifier'), base)


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    return project_of(tmp_path_factory, CLASSIFIER)


@pytest.fixture(scope='module')
def timm_project(tmp_path_factory):
    pytest.importorskip('timm')
    return project_of(tmp_path_factory, TIMM)


def run(project, name, **dfq):
    work_dir = project.folder / name
    path = project.config(name=f'{name}.py', **{**dict(size=None), **dfq})
    assert dfq_train([str(path), '--work-dir', str(work_dir)]) == 0
    student = read_checkpoint(work_dir / 'student.pth')
    return student, student['meta']['psaq_mm']['dfq'], next(work_dir.glob('*/*.log')).read_text()


def test_v2_distils_the_blocks_and_leaves_the_head_as_it_was(project):
    student, dfq, _ = run(project, 'v2', quant=dict(preset='w4a8', scope='full'))
    assert dfq['distil'] == ['blocks'] and dfq['size'] == [32, 32]
    assert dfq['generator']['drop_tokens'] == 1 and dfq['generator']['lr'] == 0.25
    plain = read_checkpoint(project.checkpoint)['state_dict']
    moved = {k for k in plain if not torch.equal(plain[k], student['state_dict'][k])}
    assert 'backbone.layers.0.attn.qkv.weight' in moved and 'head.layers.head.weight' not in moved


def test_v1_makes_samples_for_random_classes_of_a_timm_network(timm_project):
    from mmengine.config import Config

    student, dfq, log = run(
        timm_project,
        'v1',
        preset='psaq_v1',
        iters=0,
        evolve_every=0,
        calibration_samples=4,
        generator=dict(batch_size=4, steps=3),
    )
    lines = [line for line in log.splitlines() if 'Samples [' in line]
    assert len(lines) == 6 and 'class:' in lines[-1] and 'discrepancy' not in lines[-1]
    assert dfq['generator']['lr'] == 0.2 and dfq['generator']['jitter'] == [15, 30]
    config = Config.fromstring(student['meta']['cfg'], '.py')
    assert config.model.data_preprocessor.mean == [123.675, 116.28, 103.53]  # mmpretrain has it beside the model
    assert 'blocks.0.attn.qkv.weight' in student['state_dict']  # timm's names


@pytest.fixture
def photographs(tmp_path):
    for folder in ('train', 'test'):
        for name in ('a', 'b'):
            (tmp_path / folder / name).mkdir(parents=True)
            picture = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / folder / name / 'picture.png')
    return tmp_path


def with_photographs(project, name, **folders):
    path = project.config(name=f'{name}.py', preset='repq', iters=0, evolve_every=0, size=None)
    path.write_text(path.read_text() + PHOTOGRAPHS.format(**{k: str(v) for k, v in folders.items()}))
    return dfq_train([str(path), '--work-dir', str(project.folder / name)])


def test_repq_calibrates_on_training_photographs_through_the_configs_pipeline(project, photographs):
    assert with_photographs(project, 'real', train=photographs / 'train', test=photographs / 'test') == 0
    student = read_checkpoint(project.folder / 'real' / 'student.pth')
    assert student['meta']['psaq_mm']['dfq']['samples'] == 'real'


def test_photographs_that_are_the_test_set_are_refused(project, photographs, capsys):
    assert with_photographs(project, 'overlap', train=photographs / 'test', test=photographs / 'test') == 1
    assert str(photographs / 'test') in capsys.readouterr().err


def test_a_size_that_does_not_fit_a_classifier():
    with pytest.raises(
        ConfigError, match=r'\(40, 40\) does not fit the position embedding of the model: set size=\(32, 32'
    ):
        check_size(TaskModel(build_classifier('timm-vit')), (40, 40))


def test_samples_of_a_class_are_seen_as_it():
    task = TaskModel(build_classifier('timm-vit'))
    maker = SampleGenerator(steps=60, entropy_weight=0.0, prior_weight=0.0, jitter=0, flip=0.0, lr=0.1)
    synthesis = Synthesis(task, maker, (32, 32), SynthesisSettings(classes='random'))
    made = synthesis.make(12)  # two batches: labels and samples stay together
    with torch.no_grad():
        seen = task.run(made, with_logits=True).logits.argmax(1)
    assert len(synthesis.labels.unique()) > 2 and float((seen == synthesis.labels).float().mean()) > 0.8
    plain = Synthesis(task, SampleGenerator(steps=1), (32, 32))
    plain.make(2)
    assert plain.labels is None and 'class' not in plain.history[-1] and 'class' in synthesis.history[-1]
