"""model-index.yml and a metafile for each method: what they name is there, and what they claim has been measured."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from psaq_mm.engine.methods import METHODS

ROOT = Path(__file__).parents[2]
FILES = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
CONTENT = {path: yaml.safe_load((ROOT / path).read_text()) for path in FILES}
# The demo's models in full precision: what a run begins with, of no method.
DEMO = 'configs/demo/metafile.yml'


def test_every_published_method_and_both_presets_have_one():
    published = {name: method.published for name, method in METHODS.items() if method.published}
    assert {Path(path).parent.name for path in FILES} == {*published, 'fast', 'best', 'demo'}
    assert {path.relative_to(ROOT).as_posix() for path in ROOT.glob('configs/*/metafile.yml')} == set(FILES)
    collections = [content['Collections'][0] for content in CONTENT.values()]
    papers = {collection['Paper']['URL'].rsplit('/', 1)[1] for collection in collections if 'Paper' in collection}
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
    assert listed.pop(DEMO) == set()
    for path, configs in listed.items():
        assert configs == {config for config in shipped if 'camvid' not in config}, path


def test_weights_of_the_demo_are_there_and_nobody_invented_an_address():
    weights = {model['Config']: model.get('Weights') for content in CONTENT.values() for model in content['Models']}
    ours = {config: path for config, path in weights.items() if path is not None}
    assert set(ours) == {f'configs/demo/{name}_swin_demo.py' for name in ('mask_rcnn', 'upernet')}
    assert all((ROOT / path).is_file() for path in ours.values())


def _claims():
    for path, content in CONTENT.items():
        for model in content['Models']:
            arguments = model['Metadata'].get('Arguments', f'--method {Path(path).parent.name}')
            claimed = {}
            for result in model.get('Results', []):
                claimed.update(result['Metrics'])
            yield model['Name'], model['Config'], arguments, claimed


def test_results_are_those_of_the_rows():
    """What a metafile says is the mean of the rows of docs/results; what nobody has run has no number."""
    spec = importlib.util.spec_from_file_location('results_page', ROOT / '.dev' / 'results_page.py')
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows, with_numbers = script.read_rows(), set()
    for name, config, arguments, claimed in _claims():
        measured = script.claims(config, arguments, rows)
        named = {'Top 1 Accuracy' if metric == 'top-1' else metric: value for metric, value in measured.items()}
        assert claimed == named, f'{name}: the rows of docs/results have {named}'
        with_numbers |= {re.search(r'--method (\S+)', arguments)[1]} if claimed else set()
    assert with_numbers >= {'best', 'fast', 'psaq_v2'}


def test_every_measured_kind_of_the_presets_is_in_their_metafiles():
    rows = json.loads((ROOT / 'docs' / 'results' / 'measured.json').read_text())
    for method in ('fast', 'best'):
        kinds = {
            (row['model'], row['scope'], row['bits'])
            for row in rows
            if (row['method'], row['samples'], row['runtime']) == (method, 'generated', 'pytorch')
            and 'demo' in row['model']
        }
        models = CONTENT[f'configs/{method}/metafile.yml']['Models']
        assert len([model for model in models if '/demo/' in model['Config']]) == len(kinds) > 0
