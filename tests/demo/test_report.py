"""The page holds every number and every picture by itself, and is well formed."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from report import ModelReport, Run, ShownMetric, write_report

from psaq_mm.errors import DataError
from psaq_mm.visualization import BlockDensity, Picture

VOID = {'meta', 'img', 'br', 'line'}


class Reader(HTMLParser):
    """Collects elements and text, and fails on a tag closed that was not open."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def _density(name, seed):
    values = torch.rand(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return BlockDensity(name, torch.linspace(-0.975, 0.975, 40, dtype=torch.float64), values / values.sum() * 20, -0.5)


def _model(**changed):
    picture = Picture(np.full((8, 8, 3), 9, np.uint8), 'Ground <truth>', 'a "star"')
    content = dict(
        name='tiny',
        heading='Tiny & small',
        description='A model.',
        runs=[
            Run('Full precision', {'coco/bbox_mAP': 0.613, 'coco/segm_mAP': 0.587}, {'evaluation': 12.34}),
            Run(
                'W8A8', {'coco/bbox_mAP': 0.611, 'coco/segm_mAP': None}, {'synthesis': 40.26, 'evaluation': 13.9}, True
            ),
            Run('W4A8', {'coco/bbox_mAP': 0.5524, 'coco/segm_mAP': float('nan')}, {'synthesis': 41.0}, True),
        ],
        shown=[ShownMetric('coco/bbox_mAP', 'box AP', 100.0), ShownMetric('coco/segm_mAP', 'mask AP', 100.0)],
        scenes=[[picture] * 4],
        scenes_note='Four.',
        legend=[('star', (1, 2, 3))],
        samples=[Picture(np.zeros((6, 9, 3), np.uint8), 'Samples', 'noise', lossless=True)],
        densities={
            'generated': [_density('stages.2.blocks.1.attn', 0), _density('other', 1)],
            'noise': [_density('stages.2.blocks.1.attn', 2), _density('other', 3)],
        },
    )
    return ModelReport(**{**content, **changed})


def _page(tmp_path, **changed):
    path = tmp_path / 'page.html'
    write_report(path, 'A <title>', ['Lead.'], [_model(**changed)], {'Seed': 3}, {'torch': '2.1.2'})
    return path.read_text(encoding='utf-8')


def test_nothing_is_fetched_from_anywhere(tmp_path):
    page = _page(tmp_path)
    assert 'http' not in page and '//' not in re.sub(r'base64,[A-Za-z0-9+/=]+', '', page)
    reader = Reader(page)
    for tag, attrs in reader.elements:
        assert tag not in ('script', 'link', 'iframe', 'object')
        for name in ('src', 'href', 'srcset', 'data'):
            assert attrs.get(name, '#').startswith(('#', 'data:image/'))
    assert '@import' not in page and 'url(' not in page


def test_pictures_are_inside_and_have_words(tmp_path):
    images = Reader(_page(tmp_path)).all('img')
    assert len(images) == 5 and all(image['alt'] for image in images)
    assert images[0]['alt'] == 'a "star"'
    for image in images:
        decoded = Image.open(io.BytesIO(base64.b64decode(image['src'].split(',')[1])))
        assert [str(n) for n in decoded.size] == [image['width'], image['height']]
    assert images[-1]['src'].startswith('data:image/png') and np.asarray(decoded).sum() == 0


def test_every_number_stands_on_the_page(tmp_path):
    words = ' '.join(Reader(_page(tmp_path)).words)
    for number in (
        '61.3',
        '61.1',
        '55.2',
        '58.7',
        '(\u22120.2)',
        '(\u22126.1)',
        '0.613',
        '0.611',
        '0.5524',
        '12.3',
        '40.3',
        '54.2',
        '41.0',
    ):
        assert number in words, number
    assert 'nan' not in words.lower() and 'None' not in words
    assert 'A <title>' in words and 'Tiny & small' in words and '2.1.2' in words and 'Ground <truth>' in words


def test_a_difference_of_nothing_has_no_minus(tmp_path):
    same = [Run('Full precision', {'mIoU': 50.02}), Run('W8A8', {'mIoU': 50.0})]
    assert '(+0.0)' in _page(tmp_path, runs=same, shown=[ShownMetric('mIoU', 'mIoU')])


def test_tables_scroll_in_boxes_of_their_own(tmp_path):
    reader = Reader(_page(tmp_path))
    boxes = [a for tag, a in reader.elements if a.get('class') == 'scroll']
    assert len(boxes) == len(reader.all('table')) and all(box['aria-label'] and box['tabindex'] == '0' for box in boxes)
    assert {'name': 'viewport', 'content': 'width=device-width, initial-scale=1'} in reader.all('meta')
    assert len([a for a in reader.all('tr') if a.get('class') == 'mark']) == 2


def test_each_block_has_a_chart_with_a_curve_of_each_set(tmp_path):
    reader = Reader(_page(tmp_path))
    charts = [a for a in reader.all('svg') if a.get('role') == 'img']
    assert [c['aria-label'] for c in charts] == ['stage 3, block 2: generated, noise', 'block 2: generated, noise']
    assert len([a for a in reader.all('g') if a.get('class') == 'line']) == 4


def test_the_axis_begins_where_the_pairs_begin(tmp_path):
    centers = torch.linspace(-0.975, 0.975, 40, dtype=torch.float64)
    narrow = BlockDensity('a', centers, (centers > 0.7).double() * 3, -1.0)
    wider = BlockDensity('a', centers, (centers > 0.25).double(), -1.0)
    page = _page(tmp_path, densities={'generated': [wider], 'noise': [narrow]})
    assert re.findall(r'<text[^>]*>([^<]+)<', page) == ['0.2', '0.6', '1', 'block 1']


def test_a_page_that_would_say_nothing_is_refused_and_leaves_the_old_one(tmp_path):
    page = _page(tmp_path)
    for models in ([], [_model(runs=[])]):
        with pytest.raises(DataError, match='nothing to report'):
            write_report(tmp_path / 'page.html', 'x', [], models, {}, {})
    with pytest.raises(DataError, match="'noise' lack other"):
        _page(tmp_path, densities={'generated': [_density('other', 1)], 'noise': [_density('first', 1)]})
    assert (tmp_path / 'page.html').read_text(encoding='utf-8') == page
