"""The page of sources: procedural ones by name, and what a student got out of each."""

import json
import re

import numpy as np
import pytest
import torch
from classifier_models import IMAGENET
from PIL import Image
from tiny_classifier import ClassifierProject

from benchmarks import sample_page
from psaq_mm.commands.sample_rows import FIELDS
from psaq_mm.engine.samples import save_samples
from psaq_mm.pictures import DeadLeaves, ImageSpec, source_names

pytestmark = pytest.mark.filterwarnings('ignore')
SPEC = ImageSpec(**IMAGENET)


def row(source, seed=0, steps=300, bits='W4A8', agreement=0.8, value=70.0, model='page'):
    return dict(zip(FIELDS, (model, bits, source, seed, steps, 9.5, 'accuracy/top1', value, agreement)))


ROWS = [
    row('pink'),
    row('pink', 1, agreement=0.82, value=72.0),
    row('pink', steps=0, agreement=0.5),
    row('best', agreement=0.9, value=75.0),
    row('best', bits='W4A4', agreement=None, value=11.0),
    row('real', agreement=0.95, value=76.0),
    row('pink', model='other', value=0.0),
]


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    pytest.importorskip('mmpretrain')
    project = ClassifierProject(tmp_path_factory.mktemp('page'), per_class=2)
    project.rows = project.folder / 'samples.json'
    project.rows.write_text(json.dumps(ROWS))
    project.samples = save_samples(
        project.folder / 'made', DeadLeaves(seed=1).draw(range(4), (32, 32), SPEC), None, SPEC
    )
    return project


def test_what_students_got_in_words(project):
    assert sample_page.students(None, 'page') == {}
    found = sample_page.students(project.rows, 'page')
    assert found['pink'] == 'W4A8, 300 steps: agreement 0.810 (0.800 to 0.820), top1 71, 2 seeds'
    assert found['best'] == 'W4A8, 300 steps: agreement 0.900, top1 75; W4A4, 300 steps: top1 11'
    assert sample_page.students(project.rows, 'page', ['W4A4']) == dict(best='W4A4, 300 steps: top1 11')


def test_sources_with_their_pictures_curves_and_students(project):
    config, out = project.config(name='page.py', size=(32, 32)), project.folder / 'out'
    assert (
        sample_page.main(
            [
                str(config),
                '--sources',
                'pink',
                'dead_leaves',
                'mixture',
                '--samples',
                f'best={project.samples}',
                '--real',
                '2',
                '--results',
                str(project.rows),
                '--bits',
                'W4A8',
                '--out',
                str(out),
            ]
        )
        == 0
    )
    page = (out / 'index.html').read_text(encoding='utf-8')
    assert page.count('<img') == 12
    for title in ('1/f noise', 'Dead leaves', 'Half 1/f noise, half dead leaves', 'best'):
        assert f'<h3>{title}</h3>' in page
    assert 'Gaussian noise' not in page and len(set(re.findall(r'stroke: var\(--c(\d)\)', page))) == 5
    assert page.count('agreement 0.810 (0.800 to 0.820)') == 2 and page.count('agreement 0.950, top1 76') == 1, (
        'real ones in the table'
    )
    assert np.asarray(Image.open(out / 'samples.png')).shape[1] == sample_page.WIDTH


def test_every_procedural_source_has_a_title_and_a_line_of_its_own():
    assert set(sample_page.TITLES) <= set(source_names())
    styles = [sample_page.FIXED_STYLES[title] for title in (*sample_page.TITLES.values(), sample_page.REAL)]
    assert len(set(styles)) == len(styles) and max(styles) < len(sample_page.STYLES)


def test_what_a_source_shows_is_what_it_draws(project):
    config = sample_page.load_config(str(project.config(name='page.py', size=(32, 32))))
    (leaves,) = sample_page.measure_all(config, {}, say=lambda line: None, sources=['dead_leaves'])
    wanted = DeadLeaves()(32, (32, 32), SPEC, torch.Generator().manual_seed(0))[:3]
    shown = np.stack([picture for picture, _ in leaves.pictures])
    assert np.abs(shown - SPEC.to_raw(wanted).permute(0, 2, 3, 1).numpy()).max() <= 0.51 and leaves.student == ''


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--sources'], 'nothing to show'),
        (['--results', '{rows}', '--model', 'none'], 'no rows of none'),
        (['--results', '{rows}', '--bits', 'W2A2'], 'at W2A2'),
        (
            ['--sources', 'dead_leaves', 'mixture', '--samples', *(f'{n}={{samples}}' for n in 'abcd')],
            '3 can be told apart',
        ),
        (['--samples', 'Dead leaves={samples}'], 'give another name'),
    ],
)
def test_mistakes_are_named(project, tmp_path, capsys, arguments, words):
    given = [a.format(rows=project.rows, samples=project.samples) for a in arguments]
    assert sample_page.main([str(project.config(name='page.py', size=(32, 32))), '--out', str(tmp_path), *given]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count('\n') == 1
