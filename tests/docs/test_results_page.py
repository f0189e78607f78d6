"""docs/results.md and README's table are what their script makes of the rows, and the script takes new rows right."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def script():
    spec = importlib.util.spec_from_file_location('results_page', ROOT / '.dev' / 'results_page.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(seed, top1, source='generated', **changed):
    return dict(
        config='somewhere/deit_tiny.py',
        method='best',
        quant='psaq_v2_w3a8 (full)',
        source=source,
        seed=seed,
        samples=96,
        seconds=90.0 + seed,
        metrics={'accuracy/top1': top1, 'accuracy/top5': 99.0},
        full_precision={'accuracy/top1': 80.0, 'accuracy/top5': 95.0},
        agreement=0.9,
        difference_se=0.5,
        divergence=0.01,
        **changed,
    )


WHERE = dict(commit='0123abc', date='2026-01-02', processor='a machine', threads=1)


def _rows(script, *runs):
    return script.rows_of_comparison(dict(rows=runs), WHERE)


def test_page_and_readme_are_what_the_script_makes(script):
    say = 'python .dev/results_page.py --write'
    page, readme = script.PAGE.read_text(encoding='utf-8'), script.README.read_text(encoding='utf-8')
    assert page == script.page(), say
    assert readme == script.readme_with(readme, script.readme_table()), say
    assert len(page.splitlines()) <= 150
    assert 3 <= len(script.readme_table().splitlines()) <= 12  # a head, a rule, ten rows


def test_rows_say_where_they_come_from_and_name_no_folder(script):
    rows = script.read_rows()
    for row in rows:
        assert re.fullmatch('[0-9a-f]{7}', row['commit']) and re.fullmatch(r'20\d\d-\d\d-\d\d', row['date']), row
        assert row['processor'] and row['model'] in script.MODELS and row['bits'] in script.BITS
    text = script.ROWS.read_text() + script.PAGE.read_text()
    assert not re.search(r'"/|\s/(work|tmp|home|root)\b', text)
    keys = [tuple(row[key] for key in script.KEY) for row in rows]
    assert len(keys) == len(set(keys))


def test_a_row_keeps_what_the_run_said(script):
    (row,) = _rows(script, _run(1, 78.5))
    assert row['model'] == 'deit_tiny' and row['bits'] == 'W3A8' and row['scope'] == 'full'
    assert row['metrics'] == {'top-1': 78.5} and row['full_precision'] == {'top-1': 80.0}
    assert {key: row[key] for key in WHERE} == WHERE and row['pictures'] == 96
    assert not _rows(script, _run(1, 78.5, error='diverged'))


def test_shares_become_per_cent_and_the_bits_leave_the_name(script):
    run = _run(0, 0.0)
    run.update(
        config='configs/demo/mask_rcnn_swin_demo_w8a8.py',
        quant='repq_w4a4',
        metrics={'coco/bbox_mAP': 0.7712, 'coco/segm_mAP': 0.76},
        full_precision={'coco/bbox_mAP': 0.773, 'coco/segm_mAP': 0.763},
    )
    (row,) = _rows(script, run)
    assert (row['model'], row['scope'], row['bits']) == ('mask_rcnn_swin_demo', 'backbone', 'W4A4')
    assert row['metrics'] == {'box AP': 77.12, 'mask AP': 76.0}


def test_lost_is_full_precision_less_the_model(script):
    rows = _rows(script, _run(0, 79.0), _run(1, 80.5), _run(2, 78.5))
    assert script.lost(rows, 'top-1') == pytest.approx((80 - 238 / 3, -0.5, 1.5))
    assert script.lost(rows, 'top-1').text() == '0.67 (-0.50 to 1.50)'
    assert script.minutes(rows) == '1.5'  # of the seed that was disturbed least
    busy = [dict(row, busy=True) for row in rows]
    assert script.minutes(busy) == '-' and script.minutes([dict(busy[0], seconds=6), rows[1]]) == '1.5'
    assert script.Spread(-0.001, -0.001, -0.001).text() == '0.00'


def test_a_row_takes_the_place_of_its_kind_and_seed_alone(script):
    old = _rows(script, _run(0, 70.0), _run(1, 71.0), _run(0, 60.0, source='gaussian'))
    new = _rows(script, _run(0, 75.0))
    values = {(row['samples'], row['seed']): row['metrics']['top-1'] for row in script.merged(old, new)}
    assert values == {('generated', 0): 75.0, ('generated', 1): 71.0, ('gaussian', 0): 60.0}


def test_a_sum_of_seeds_stays_until_as_many_are_there(script):
    (total,) = _rows(script, _run(0, 0.0))
    total.update(seed=None, seeds=2, metrics={'top-1': [79.0, 78.0, 80.0]})
    kind = dict(model='deit_tiny', method='best', samples='generated')
    one = script.merged([total], _rows(script, _run(0, 70.0)))
    assert len(one) == 2 and script.seeds(script.group(one, **kind)) == 2
    assert script.value(script.group(one, **kind), 'top-1') == (79.0, 78.0, 80.0)
    both = script.merged(one, _rows(script, _run(1, 72.0)))
    assert len(both) == 2 and script.value(script.group(both, **kind), 'top-1').mean == 71.0


def test_the_page_follows_the_rows(script):
    changed = json.loads(json.dumps(script.read_rows()))
    row = next(row for row in changed if row['model'] == 'deit_tiny' and row['seed'] is not None)
    row['metrics']['top-1'] -= 50
    assert script.page(changed) != script.page()


def test_rows_without_a_key_and_a_readme_without_markers_are_refused(script, tmp_path):
    path = tmp_path / 'rows.json'
    path.write_text('[{"model": "deit_tiny"}]')
    with pytest.raises(SystemExit, match='a row of deit_tiny has no scope'):
        script.read_rows(path)
    with pytest.raises(SystemExit, match='results: begin'):
        script.readme_with('no table here', 'a table')


def test_threads_have_to_be_told(script, monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    with pytest.raises(SystemExit, match='OMP_NUM_THREADS'):
        script.provenance()
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    assert script.provenance()['threads'] == 1 and script.processor()
