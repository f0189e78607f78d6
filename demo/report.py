"""The demo's page: what quantization without data did to models, in numbers, pictures, samples and seconds."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from psaq_mm.errors import DataError
from psaq_mm.files import PathLike, write_whole
from psaq_mm.visualization import BlockDensity, Line, Picture, area_chart, render

Number = Optional[float]
FLOOR = 0.01  # least density drawn: one pair in ten thousand for a hundred bins
MINUS = '\u2212'  # as wide as the plus
DASH = '\u2013'  # no value


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
class ModelReport:
    """Everything about one model.

    Args:
        name: Identifier, used as the section's anchor.
        heading: The section's heading.
        description: What the model is and how it was quantized, in one or two sentences.
        runs: The first is full precision; the differences of the others are taken to it.
        shown: The metrics of the main table.
        scenes: Held-out pictures before and after; those of one scene stand side by side.
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
    scenes: Sequence[Sequence[Picture]] = ()
    scenes_note: str = ''
    legend: Sequence[Tuple[str, Tuple[int, int, int]]] = ()
    samples: Sequence[Picture] = ()
    densities: Mapping[str, Sequence[BlockDensity]] = field(default_factory=dict)

    @property
    def metric_keys(self) -> List[str]:
        """Of all runs, in the order in which they come."""
        return list(dict.fromkeys(key for run in self.runs for key in run.metrics))

    @property
    def steps(self) -> List[str]:
        """Steps of all runs. The run with the most steps tells their order."""
        return list(
            dict.fromkeys(step for run in sorted(self.runs, key=lambda r: -len(r.seconds)) for step in run.seconds)
        )

    @property
    def density_lines(self) -> List[Line]:
        """A line a set of images: name and style, without points."""
        return [Line(label, (), (), style=style) for style, label in enumerate(self.densities)]

    @property
    def entropies(self) -> str:
        """Mean entropy of each set of images, in words."""
        means = {label: sum(d.entropy for d in blocks) / len(blocks) for label, blocks in self.densities.items()}
        return ', '.join(f'{label} {mean:+.2f}'.replace('-', MINUS) for label, mean in means.items())

    @property
    def charts(self) -> List[str]:
        """A chart of densities a block, as SVG.

        Raises:
            DataError: A set of images lacks a block.
        """
        by_name: Dict[str, Dict[str, BlockDensity]] = {
            label: {block.name: block for block in blocks} for label, blocks in self.densities.items()
        }
        low = min(_least(block) for blocks in by_name.values() for block in blocks.values())
        charts = []
        for number, name in enumerate(next(iter(by_name.values()))):
            lines = []
            for style, (label, blocks) in enumerate(by_name.items()):
                if name not in blocks:
                    raise DataError(f'the densities of {label!r} lack {name}: take all of them from one model')
                block = blocks[name]
                lines.append(Line(label, block.centers.tolist(), block.density.tolist(), style=style))
            charts.append(area_chart(_short(name, number), lines, (low, 1), (low, (low + 1) / 2, 1), floor=FLOOR))
        return charts


def _known(value: Number) -> bool:
    return value is not None and math.isfinite(value)


def _shown(value: Number, form: str = '.1f') -> str:
    return format(value, form) if _known(value) else DASH


def _difference(value: Number, before: Number, factor: float) -> str:
    """In brackets, one decimal with its sign; empty where one of the two is not known."""
    if not _known(value) or not _known(before):
        return ''
    return f'({round((value - before) * factor, 1) + 0.0:+.1f})'.replace('-', MINUS)


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


def write_report(
    path: PathLike,
    title: str,
    lead: Sequence[str],
    models: Sequence[ModelReport],
    facts: Mapping[str, object],
    versions: Mapping[str, str],
) -> None:
    """Write one HTML file that needs no other file and no network.

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
    page = render(
        Path(__file__).parent / 'report.html',
        title=title,
        lead=lead,
        models=models,
        lists={'About this run': facts, 'Versions': versions},
        floor=FLOOR,
        shown=_shown,
        difference=_difference,
    )
    write_whole(path, page)
