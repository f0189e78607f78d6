# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The picture of what each source gives: spreads of untrained rows, and a sentence where there is nothing to draw."""

import io
import json

import numpy as np
from PIL import Image

from benchmarks import sources_chart


def row(source, seed, agreement, bits='W4A8', steps=0, metric='coco/bbox_mAP', model='det'):
    return dict(
        model=model,
        bits=bits,
        source=source,
        seed=seed,
        steps=steps,
        seconds=1.0,
        metric=metric,
        value=0.5,
        agreement=agreement,
    )


ROWS = [
    row('best', 0, 0.9),
    row('best', 0, 0.9, metric='coco/segm_mAP'),
    row('best', 1, 0.8),
    row('real', 0, 0.95),
    row('best', 2, 0.1, steps=60),
    row('other', 0, 0.2),
    row('best', 0, 0.7, bits='W3A8'),
    row('best', 0, None, bits='W8A8'),
    row('real', 0, 0.9, bits='W8A8'),
]


def test_a_panel_has_each_seed_once_and_nothing_trained():
    found = sources_chart.panels(ROWS, ['best', 'real'])
    assert set(found) == {('det', 'W4A8')}, 'one source alone is no comparison'
    best, real = found['det', 'W4A8']['best'], found['det', 'W4A8']['real']
    assert (
        (best.least, best.greatest, best.seeds) == (0.8, 0.9, 2)
        and abs(best.mean - 0.85) < 1e-12
        and real == (0.95, 0.95, 0.95, 1)
    )


def test_the_picture_has_room_for_every_panel(tmp_path):
    few, many = (
        sources_chart.draw(
            sources_chart.panels(
                [row(s, 0, 0.9, model=f'm{i}') for i in range(n) for s in ('best', 'real')], ['best', 'real']
            ),
            dict(best='best', real='real images'),
        )
        for n in (1, 4)
    )
    small, large = (np.asarray(Image.open(io.BytesIO(content)).convert('RGB')) for content in (few, many))
    assert small.shape[1] == large.shape[1] == sources_chart.WIDTH and small.shape[0] < large.shape[0]
    wanted = tuple(int(sources_chart.OURS[i : i + 2], 16) for i in (1, 3, 5))
    assert bool((small == wanted).all(-1).any())


def test_the_command_writes_it_or_says_why_not(tmp_path, capsys):
    rows, png = tmp_path / 'rows.json', tmp_path / 'out' / 'chart.png'
    rows.write_text(json.dumps(ROWS))
    assert (
        sources_chart.main([str(rows), '--sources', 'best', 'real=real images', '--png', str(png)]) == 0
        and png.is_file()
    )
    png.unlink()
    assert sources_chart.main([str(rows), '--sources', 'none', 'best', '--png', str(png)]) == 1 and not png.exists()
    assert 'no two of the sources none, best' in capsys.readouterr().err
    assert sources_chart.main([str(rows), '--sources', 'best', 'best', '--png', str(png)]) == 1
    assert 'best stands there twice' in capsys.readouterr().err
