"""A student knows how it was quantized: a config and a command line need not say it again, and may not say
otherwise."""

import json

import pytest
from tiny_classifier import ClassifierProject

from psaq_mm.commands.common import load_config
from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.commands.export import main as export_command
from psaq_mm.commands.test import main as evaluate_command
from psaq_mm.engine.checkpoint import read_checkpoint
from psaq_mm.engine.config import quant_holder
from psaq_mm.engine.exporting import build_student
from psaq_mm.engine.students import config_of_student
from psaq_mm.errors import CheckpointError, ConfigError
from psaq_mm.models import report_of, spec_of
from psaq_mm.quantization import QuantSpec

pytestmark = pytest.mark.filterwarnings('ignore')
SHORT = ['--cfg-options', 'dfq.size=(32,32)', 'dfq.calibration_samples=2', 'dfq.batch_size=2']


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    pytest.importorskip('mmpretrain')
    return ClassifierProject(tmp_path_factory.mktemp('project'), per_class=2)


@pytest.fixture(scope='module')
def fast(project):
    """A student of the full-precision config, by another method and precision than any config has."""
    work = project.folder / 'fast'
    assert (
        dfq_train(
            [
                str(project.base),
                '--checkpoint',
                str(project.checkpoint),
                '--method',
                'fast',
                '--quant',
                'w4a8',
                '--work-dir',
                str(work),
                *SHORT,
            ]
        )
        == 0
    )
    return work / 'student.pth'


def test_the_commands_take_a_student_as_it_was_made(project, fast, capsys):
    results = []
    for given in ([], ['--quant', 'w4a8', '--method', 'fast'], ['--full-precision']):
        assert evaluate_command([str(project.base), str(fast), '--work-dir', str(project.folder / 'out'), *given]) == 0
        results.append(json.loads((project.folder / 'out' / 'test_results.json').read_text())['quantized'])
    assert results[0] == results[1] == results[2]
    pytest.importorskip('onnxruntime')
    assert (
        export_command([str(project.base), str(fast), '--out', str(project.folder / 'exported'), '--size', '32', '32'])
        == 0
    )
    deployed = [
        '--deployed',
        str(project.folder / 'exported'),
        '--runtime',
        'onnxruntime',
        '--work-dir',
        str(project.folder / 'out'),
    ]
    assert evaluate_command([str(project.base), str(fast), *deployed]) == 0
    assert json.loads((project.folder / 'out' / 'test_results.json').read_text())['quantized'] == results[0]
    capsys.readouterr()
    # Another precision in the config is that of the student it would make.
    assert evaluate_command([str(project.config('w8a8')), str(fast), '--work-dir', str(project.folder / 'out')]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if 'was quantized as' in line]
    assert len(said) == 1 and 'W4A8 with w_bits=4 (the config has 8)' in said[0] and 'taken as it was made' in said[0]
    assert json.loads((project.folder / 'out' / 'test_results.json').read_text())['quantized'] == results[0]


def test_a_contradiction_ends_with_one_sentence(project, fast, capsys, tmp_path):
    commands = [
        (evaluate_command, ['--work-dir', str(tmp_path / 'out')]),
        (export_command, ['--out', str(tmp_path / 'exported')]),
    ]
    for command, rest in commands:
        assert command([str(project.base), str(fast), *rest, '--quant', 'w8a8']) == 1
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and 'w_bits=4 (the command says 8)' in error and 'leave --quant' in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'stated, word',
    [
        (dict(quant='w4a8'), None),
        (dict(quant='W4A8'), None),
        (dict(method='fast'), None),
        (dict(quant='psaq_v2_w4a8'), None),
        (dict(options={'model.quant.w_bits': 4}), None),
        (dict(options={'model.quant': 'w4a8'}), None),
        (dict(options={'model.backbone.depths': [1]}), None),
        (dict(options={'model.quant.preset': 'w4a8', 'dfq.seed': 1}), None),
        (dict(quant='w8a8'), 'w_bits=4'),
        (dict(quant='w4a4', method='fast'), 'a_bits=8'),
        (dict(method='repq'), 'reparameterize=False'),
        (dict(quant='repq_w4a8'), 'reparameterize=False'),
        (dict(options={'model.quant.w_bits': 8}), 'w_bits=4'),
        (dict(options={'model.quant': 'w8a8'}), 'w_bits=4'),
        (dict(options={'model.quant.scope': 'full'}), "scope='backbone'"),
        (dict(options={'model.quant.preset': 'repq_w4a8'}), 'reparameterize=False'),
        (dict(options={'model.backbone.quant.a_bits': 4}), 'a_bits=8'),
    ],
)
def test_what_is_said_is_compared_and_nothing_else(project, stated, word):
    made = QuantSpec.parse('psaq_v2_w4a8')
    checkpoint = dict(meta=dict(psaq_mm=dict(quant=made.to_dict())))
    config = load_config(str(project.base))
    if word is None:
        assert QuantSpec.parse(config_of_student(config, checkpoint, 'student.pth', **stated).model.quant) == made
        return
    with pytest.raises(CheckpointError, match='student.pth was quantized as W4A8') as caught:
        config_of_student(config, checkpoint, 'student.pth', **stated)
    assert word in str(caught.value)


def test_options_that_have_no_place_in_the_students_spec(project):
    checkpoint = dict(meta=dict(psaq_mm=dict(quant=QuantSpec.parse('w4a8').to_dict())))
    with pytest.raises(
        ConfigError, match='model.quant.overrides.0.w_bits=8 does not fit how the student was quantized'
    ):
        config_of_student(
            load_config(str(project.base)), checkpoint, 'student.pth', options={'model.quant.overrides.0.w_bits': 8}
        )


def test_scope_and_overrides_are_the_students(project, tmp_path):
    quant = dict(
        preset='w4a8',
        scope='full',
        overrides=[dict(pattern='head.*', float=True), dict(pattern='*.qkv', w_bits=6, a_bits=6)],
    )
    made = project.config(quant, 'made.py', iters=0, size=(32, 32))
    assert dfq_train([str(made), '--work-dir', str(tmp_path)]) == 0
    student = tmp_path / 'student.pth'
    expected = report_of(build_student(load_config(str(made)), str(student))[0]).to_table()
    for config in (project.base, project.config('repq_w8a8', 'other.py')):
        model, _ = build_student(load_config(str(config)), str(student))
        assert spec_of(model) == QuantSpec.parse(quant) and report_of(model).to_table() == expected


def test_a_quantized_backbone_has_it_there():
    from mmengine.config import Config

    config = Config(dict(model=dict(type='Any', backbone=dict(type='psaq_mm.QuantSwinTransformer', quant='w8a8'))))
    made = QuantSpec.parse('repq_w4a4')
    found = config_of_student(config, dict(meta=dict(psaq_mm=dict(quant=made.to_dict()))), 'student.pth')
    assert QuantSpec.parse(quant_holder(found.model).quant) == made and 'quant' not in found.model
    assert config.model.backbone.quant == 'w8a8'


def test_a_checkpoint_that_tells_nothing_leaves_the_config(project, fast):
    config = load_config(str(project.config('w4a8')))
    checkpoint = read_checkpoint(fast)
    del checkpoint['meta']['psaq_mm']
    assert config_of_student(config, checkpoint, 'student.pth', quant='w8a8') is config
