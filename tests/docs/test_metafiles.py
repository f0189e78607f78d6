"""model-index.yml and a metafile for each method: what they name is there, and what they claim has been measured."""

import re
from pathlib import Path

import pytest
import yaml

from psaq_mm.engine.methods import METHODS

ROOT = Path(__file__).parents[2]
FILES = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
CONTENT = {path: yaml.safe_load((ROOT / path).read_text()) for path in FILES}


def test_every_published_method_has_one():
    published = {name: method.published for name, method in METHODS.items() if method.published}
    assert {Path(path).parent.name for path in FILES} == set(published)
    assert {path.relative_to(ROOT).as_posix() for path in ROOT.glob('configs/*/metafile.yml')} == set(FILES)
    papers = {content['Collections'][0]['Paper']['URL'].rsplit('/', 1)[1] for content in CONTENT.values()}
    assert papers == {paper.rpartition(' ')[2] for paper in published.values()}


@pytest.mark.parametrize('path', FILES)
def test_configs_and_collections_are_there(path):
    (collection,) = CONTENT[path]['Collections']
    method = Path(path).parent.name
    assert (ROOT / collection['README']).is_file() and (ROOT / collection['Code']['URL']).is_file()
    for model in CONTENT[path]['Models']:
        assert model['In Collection'] == collection['Name']
        assert (ROOT / model['Config']).is_file(), model['Config']
        arguments = model['Metadata'].get('Arguments')
        assert arguments is None or f'--method {method}' in arguments


def test_names_are_unique_and_every_model_is_listed_for_every_method():
    names = [model['Name'] for content in CONTENT.values() for model in content['Models']]
    assert len(names) == len(set(names))
    listed = {
        path: {model['Config'] for model in content['Models'] if '/demo/' not in model['Config']}
        for path, content in CONTENT.items()
    }
    shipped = {
        path.relative_to(ROOT).as_posix()
        for path in [*ROOT.glob('configs/*_w8a8.py'), *ROOT.glob('configs/classification/*.py')]
    }
    for path, configs in listed.items():
        assert configs == {config for config in shipped if 'camvid' not in config}, path


def test_results_are_those_of_the_results_page():
    """The row of the method in docs/results.md; what nobody has run has no number here."""
    row = next(
        line
        for line in (ROOT / 'docs' / 'results.md').read_text().splitlines()
        if line.startswith('| **data-free (PSAQ-ViT V2)**')
    )
    measured = set(re.findall(r'\| (\d+\.\d+) \(', row))
    claimed = [
        (model['Name'], value)
        for content in CONTENT.values()
        for model in content['Models']
        for result in model.get('Results', [])
        for value in result['Metrics'].values()
    ]
    assert len(claimed) == 6 and all('demo' in name for name, _ in claimed)
    assert {f'{value:.2f}' for _, value in claimed} == measured
