"""The summary at the end of a run: its content, its text, its file, and that it can be switched off."""

import json

import pytest
from tiny import DETECTOR, DFQ, SEGMENTOR, Project

from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.engine.checkpoint import read_checkpoint
from psaq_mm.engine.expected import Expected
from psaq_mm.engine.run_summary import as_text, command_lines, rows_of

pytestmark = pytest.mark.filterwarnings('ignore')

_QUICK = dict(preset='fast', iters=0, calibration_samples=2, summary_pictures=2)


def run(project, name, **dfq):
    """A run of a project; its work folder and its log."""
    work_dir = project.folder / name
    path = project.config('w4a4', name=f'{name}.py', **{**_QUICK, **dfq})
    assert dfq_train([str(path), '--work-dir', str(work_dir)]) == 0
    return work_dir, max(work_dir.glob('*/*.log')).read_text()


def summary_of(work_dir):
    return json.loads((work_dir / 'summary.json').read_text())


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory):
    pytest.importorskip('mmseg')
    project = Project(tmp_path_factory.mktemp('segmentor'), SEGMENTOR)
    project.work_dir, project.log = run(project, 'work')
    return project


def test_the_file_says_what_is_quantized_and_what_is_not(segmentor):
    summary = summary_of(segmentor.work_dir)
    assert summary['label'] == 'W4A4'
    layers = {(one['w_bits'], one['a_bits']): one['count'] for one in summary['layers']}
    rounding = summary['rounding']
    assert layers[4, 4] > 10 and sum(layers.values()) == rounding['layers'] + len(rounding['kept'])
    assert [one['a_bits'] for one in summary['products']] == [4]
    [left] = summary['floats']
    assert left['reason'] == 'outside the scope' and left['parts'] == ['decode_head', 'auxiliary_head']
    assert summary['rotated']['heads'] > 0 and summary['quantizers'] == dict(logarithmic=0, reparameterized=0)
    assert summary['healed'] == [] and summary['steps'] == 0 and summary['pictures'] == 2


def test_the_loss_to_be_expected_is_of_pixels(segmentor):
    expected = summary_of(segmentor.work_dir)['expected']
    assert expected['pictures'] == 2 and expected['of'] == 'pixels' and expected['estimate'] is True
    assert 0 < expected['features'] < 10 and 0 < expected['agreement'] <= 1 and expected['divergence'] is None


def test_the_checkpoint_and_the_file_tell_the_same(segmentor):
    whole = summary_of(segmentor.work_dir)
    meta = read_checkpoint(segmentor.work_dir / 'student.pth')['meta']['psaq_mm']['summary']
    assert meta == {name: value for name, value in whole.items() if name not in ('files', 'next')}
    assert str(segmentor.work_dir / 'student.pth') in whole['files']


def test_the_log_ends_with_it_on_eighty_columns(segmentor):
    _, _, text = segmentor.log.partition('Summary of W4A4\n')
    lines = text.splitlines()
    titles = [line[2:13].strip() for line in lines if line[2:13].strip()]
    assert titles == ['quantized', 'stays float', 'also', 'expected', 'made from', 'files', 'next']
    long = [line for line in lines if len(line) > 80]
    assert all('/' in line for line in long), 'only a path may be longer'
    assert 'estimate and no accuracy' in ' '.join(text.split())
    assert 'psaq test' in text and 'psaq export' in text
    assert 'About ' in segmentor.log and ' left (' in segmentor.log


def test_the_next_commands_are_ones_that_run(segmentor):
    from psaq_mm.commands.export import build_parser as export_parser
    from psaq_mm.commands.test import build_parser as test_parser

    test, export = summary_of(segmentor.work_dir)['next']
    assert test[:2] == ['psaq', 'test'] and export[:2] == ['psaq', 'export']
    assert test_parser().parse_args(test[2:]).config == export_parser().parse_args(export[2:]).config
    assert (segmentor.folder / 'work.py').samefile(test[2]) and (segmentor.work_dir / 'student.pth').samefile(test[3])


def test_switched_off_nothing_is_compared(segmentor):
    work_dir, log = run(segmentor, 'off', summary_pictures=0)
    assert summary_of(work_dir)['expected'] is None
    assert 'Summary of W4A4' in log and 'expected' not in log.partition('Summary of W4A4')[2]


def test_a_resumed_run_has_a_summary_too(segmentor):
    work_dir, _ = run(segmentor, 'resumed', iters=1, checkpoint_interval=1, rotate=False)
    first = summary_of(work_dir)
    (work_dir / 'summary.json').unlink()
    path = segmentor.folder / 'resumed.py'
    assert dfq_train([str(path), '--work-dir', str(work_dir), '--resume']) == 0
    again = summary_of(work_dir)
    assert again['steps'] == 1 and again['layers'] == first['layers'] and again['pictures'] is None
    assert again['expected']['agreement'] == first['expected']['agreement']
    assert again['rounding'] is None, 'what the first run did to the weights is not known to the second'


def test_a_detector_is_compared_by_boxes(tmp_path):
    pytest.importorskip('mmdet')
    work_dir, _ = run(Project(tmp_path, DETECTOR), 'work')
    expected = summary_of(work_dir)['expected']
    assert expected['of'] == 'boxes' and not expected['failed'] and 0 <= expected['agreement'] <= 1


def test_a_negative_number_is_refused(segmentor, capsys):
    path = segmentor.config(name='negative.py', **{**DFQ, 'summary_pictures': -1})
    assert dfq_train([str(path), '--work-dir', str(segmentor.folder / 'negative')]) == 1
    assert 'dfq.summary_pictures=-1' in capsys.readouterr().err


# ---------------------------------------------------------------------- text alone
def _summary(**changed):
    return dict(
        dict(
            label='W4A8',
            layers=[dict(w_bits=4, a_bits=8, count=50)],
            products=[],
            edges=[],
            floats=[],
            quantizers=dict(logarithmic=2, reparameterized=0),
            rotated=None,
            rounding=None,
            healed=[],
            expected=None,
            pictures=32,
            steps=0,
            seconds=dict(synthesis=360.0, student=0.0),
        ),
        **changed,
    )


def test_what_was_healed_has_a_row_where_there_is_something():
    assert 'healed' not in dict(rows_of(_summary()))
    healed = [dict(name='blocks.3.mlp.fc2', reason='8 bits in place of 4')]
    assert dict(rows_of(_summary(healed=healed)))['healed'] == 'blocks.3.mlp.fc2: 8 bits in place of 4'


@pytest.mark.parametrize(
    ('expected', 'said'),
    [
        (Expected(32, 0.1, 0.972, 'top-1 classes', 0.0123), '97.2 % equal top-1 classes, divergence 0.0123 nats, '),
        (Expected(32, 0.1, None, 'boxes'), 'no boxes to compare, error of feature maps 0.100, '),
        (Expected(32, 0.1, failed='KeyError: text'), 'predictions not compared (KeyError: text)'),
        (Expected(32, None), 'error of feature maps nan'),
    ],
)
def test_sentences_of_what_is_expected(expected, said):
    assert said in dict(rows_of(_summary(expected=expected._asdict())))['expected']


def test_a_command_can_be_copied_though_it_is_broken():
    import shlex

    command = ['psaq', 'export', 'a folder/config.py', 'work_dirs/' + 'x' * 50, '--out', 'deployed', '--verify']
    lines = command_lines(command)
    assert len(lines) > 1 and all(line.endswith(' \\') for line in lines[:-1])
    assert shlex.split(' '.join(line.rstrip('\\') for line in lines)) == command
    text = as_text('Summary', [('next', lines)])
    assert [line[15:] for line in text.splitlines()[1:]] == lines
