# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""One page that shows what quantization without data did to models: numbers, pictures, samples, seconds."""

import math
import os
from dataclasses import dataclass, field
from typing import List, Mapping, Optional, Sequence, Tuple, Union

from psaq_mm.errors import DataError
from psaq_mm.visualization.charts import Curve, area_chart
from psaq_mm.visualization.densities import BlockDensity
from psaq_mm.visualization.page import Picture, legend, page, picture_grid, table, text
from psaq_mm.visualization.sheets import write_whole

__all__ = ['ShownMetric', 'Run', 'Scene', 'ModelReport', 'write_report']

Number = Optional[float]
FLOOR = 0.01  # least density drawn: one pair in ten thousand for a hundred bins
MINUS = '\u2212'  # as wide as the plus


@dataclass(frozen=True)
class ShownMetric:
    """A metric of the main table.

    Args:
        key: Its name in the evaluator's results, such as ``'coco/bbox_mAP'``.
        label: Its name on the page.
        factor: What its value is multiplied by: 100 where the evaluator gives a share of one.
    """

    key: str
    label: str
    factor: float = 1.0


@dataclass(frozen=True)
class Run:
    """One quantization of a model, or the model as it was.

    Args:
        label: Its name in all tables.
        metrics: The evaluator's results under its own keys; missing, None or NaN: no value.
        seconds: Seconds of each step, by the step's name.
        data_free: Whether the row stands out as a result of the method, and not as a control.
    """

    label: str
    metrics: Mapping[str, Number]
    seconds: Mapping[str, float] = field(default_factory=dict)
    data_free: bool = False


@dataclass(frozen=True)
class Scene:
    """One picture under several models: ``pictures`` stand side by side."""

    pictures: Sequence[Picture]


@dataclass(frozen=True)
class ModelReport:
    """Everything about one model.

    Args:
        name: Identifier, used as the section's anchor.
        heading: The section's heading.
        description: What the model is and how it was quantized, in one or two sentences.
        runs: The first is full precision; the differences of the others are taken to it.
        shown: The metrics of the main table.
        scenes: Held-out pictures before and after.
        scenes_note: How to read them.
        legend: Names and colours (RGB) of the classes in them.
        samples: Sheets of samples.
        densities: Name of an image set to the densities of every block; the first is drawn on top.
    """

    name: str
    heading: str
    description: str
    runs: Sequence[Run]
    shown: Sequence[ShownMetric]
    scenes: Sequence[Scene] = ()
    scenes_note: str = ''
    legend: Sequence[Tuple[str, Tuple[int, int, int]]] = ()
    samples: Sequence[Picture] = ()
    densities: Mapping[str, Sequence[BlockDensity]] = field(default_factory=dict)


def _known(value: Number) -> bool:
    return value is not None and math.isfinite(value)


def _signed(value: float) -> str:
    """One decimal with its sign."""
    rounded = round(value, 1) + 0.0
    return f'{rounded:+.1f}'.replace('-', MINUS)


def _value(metric: ShownMetric, run: Run, reference: Run) -> str:
    value, before = run.metrics.get(metric.key), reference.metrics.get(metric.key)
    if not _known(value):
        return '\u2013'
    shown = f'{value * metric.factor:.1f}'
    if run is reference or not _known(before):
        return f'{shown} <span class="diff"></span>'
    return f'{shown} <span class="diff">({_signed((value - before) * metric.factor)})</span>'


def _results(model: ModelReport) -> str:
    rows = [[text(run.label)] + [_value(metric, run, model.runs[0]) for metric in model.shown] for run in model.runs]
    marked = [number for number, run in enumerate(model.runs) if run.data_free]
    return table(['Model'] + [text(m.label) for m in model.shown], rows, f'Results of {model.heading}', marked)


def _all_metrics(model: ModelReport) -> str:
    keys: List[str] = []
    for run in model.runs:
        keys.extend(k for k in run.metrics if k not in keys)
    rows = []
    for key in keys:
        values = [run.metrics.get(key) for run in model.runs]
        rows.append([f'<code>{text(key)}</code>'] + [f'{v:g}' if _known(v) else '\u2013' for v in values])
    inner = table(['Metric'] + [text(run.label) for run in model.runs], rows, f'All metrics of {model.heading}')
    return f'<details><summary>All metrics, as the evaluator gives them</summary>{inner}</details>'


def _seconds(model: ModelReport) -> str:
    steps: List[str] = []
    for run in sorted(
        model.runs, key=lambda run: -len(run.seconds)
    ):  # the longest has them in the order they are taken
        steps.extend(s for s in run.seconds if s not in steps)
    if not steps:
        return ''
    rows = []
    for run in model.runs:
        spent = [run.seconds.get(step) for step in steps]
        rows.append(
            [text(run.label)]
            + [f'{s:.1f}' if _known(s) else '\u2013' for s in spent]
            + [f'{sum(s for s in spent if _known(s)):.1f}']
        )
    return '<h3>Seconds</h3>' + table(
        ['Model'] + [text(s) for s in steps] + ['together'], rows, f'Seconds of {model.heading}'
    )


def _densities(model: ModelReport) -> str:
    if not model.densities:
        return ''
    sets = list(model.densities.items())
    low = min(_least(density) for _, densities in sets for density in densities)
    charts = []
    for number, name in enumerate(block.name for block in sets[0][1]):
        curves = []
        for style, (label, densities) in enumerate(sets):
            block = next((d for d in densities if d.name == name), None)
            if block is None:
                raise DataError(f'the densities of {label!r} lack {name}: take all of them from one model')
            curves.append(Curve(label, block.centers.tolist(), block.density.tolist(), style))
        charts.append(area_chart(_short(name, number), curves, (low, 1), (low, (low + 1) / 2, 1), floor=FLOOR))
    means = []
    for label, densities in sets:
        mean = f'{sum(d.entropy for d in densities) / len(densities):+.2f}'.replace('-', MINUS)
        means.append(f'{label} {mean}')
    return (
        '<h3>Patch similarity in every attention block</h3>'
        '<p class="soft">Horizontal: cosine similarity of two patches of one window, or of one image where attention '
        'is '
        'global. Vertical: the density of '
        f'the pairs that have it, on a logarithmic scale from {FLOOR:g} up. A wide curve means that the model tells '
        'the patches apart, a peak at 1 that they look the same to it; synthesis widens the curve. Entropy of the '
        'densities, mean over the blocks, in nats (at most +0.69): '
        f'{text(", ".join(means))}.</p>'
        + legend([(label, style) for style, (label, _) in enumerate(sets)])
        + f'<div class="grid charts">{"".join(charts)}</div>'
    )


def _least(block: BlockDensity) -> float:
    """The similarity, in whole fifths of 1, below which less than half a per cent of the pairs lie."""
    share = (block.density.cumsum(0) / block.density.sum()).tolist()
    first = next(x for x, below in zip(block.centers.tolist(), share) if below >= 0.005)
    return max(-1.0, math.floor(first * 5) / 5)


def _short(name: str, number: int) -> str:
    """``stage 3, block 2`` for a Swin's module name; its number alone for another's."""
    digits = [part for part in name.split('.') if part.isdigit()]
    if len(digits) == 2:
        return f'stage {int(digits[0]) + 1}, block {int(digits[1]) + 1}'
    return f'block {number + 1}'


def _scenes(model: ModelReport) -> str:
    if not model.scenes:
        return ''
    key = ''.join(
        f'<span><i style="background:rgb({r},{g},{b})"></i>{text(name)}</span>' for name, (r, g, b) in model.legend
    )
    return (
        '<h3>Held-out scenes</h3>'
        + (f'<p class="soft">{text(model.scenes_note)}</p>' if model.scenes_note else '')
        + (f'<p class="legend key">{key}</p>' if key else '')
        + ''.join(picture_grid(scene.pictures, 'four') for scene in model.scenes)
    )


def _section(model: ModelReport) -> str:
    samples = '<h3>Samples</h3>' + picture_grid(model.samples, 'two') if model.samples else ''
    return (
        f'<section id="{text(model.name)}"><h2>{text(model.heading)}</h2>'
        f'<p>{text(model.description)}</p>{_results(model)}'
        '<p class="soft">In brackets: the difference to full precision.</p>'
        f'{_all_metrics(model)}{_scenes(model)}{samples}{_densities(model)}{_seconds(model)}</section>'
    )


def write_report(
    path: Union[str, os.PathLike],
    title: str,
    lead: Sequence[str],
    models: Sequence[ModelReport],
    facts: Mapping[str, object],
    versions: Mapping[str, str],
) -> None:
    """Write one HTML file that needs no other file and no network; it is whole or not there.

    Args:
        path: The file; folders are made.
        title: Its heading.
        lead: Paragraphs below it, plain text.
        models: A section each.
        facts: Settings and totals of the whole run.
        versions: Program to version.

    Raises:
        DataError: No model, or one without runs.
        OSError: The file cannot be written; what stood there is untouched.
    """
    if not models or any(not model.runs for model in models):
        raise DataError('there is nothing to report: give at least one model with at least one run')
    links = ' &middot; '.join(f'<a href="#{text(m.name)}">{text(m.heading)}</a>' for m in models)
    body = (
        [f'<h1>{text(title)}</h1>']
        + [f'<p>{text(p)}</p>' for p in lead]
        + [f'<p>{links}</p>' if len(models) > 1 else '']
    )
    body.extend(_section(model) for model in models)
    for heading, rows in (('About this run', facts), ('Versions', versions)):
        cells = [[text(name), text(value)] for name, value in rows.items()]
        if cells:
            body.append(f'<h2>{heading}</h2>' + table([], cells, heading))
    write_whole(page(title, '\n'.join(part for part in body if part)).encode('utf-8'), path)
