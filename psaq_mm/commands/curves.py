# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Agreement with full precision while the student trains, and its chart: ``tools/compare.py --train --curve 8``."""

import functools
import statistics
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import torch
from mmengine.hooks import Hook

from psaq_mm.commands.agreement import Agreement, Predictions

__all__ = ['CurveHook', 'draw_curves', 'fixed_subset']

Point = Dict[str, Any]


def fixed_subset(count: int, wanted: int) -> List[int]:
    """``wanted`` of ``count`` positions, evenly spread, the first and the last included. All, if there are no more."""
    if wanted >= count:
        return list(range(count))
    return [round(place * (count - 1) / max(wanted - 1, 1)) for place in range(wanted)]


class CurveHook(Hook):
    """Evaluates the student on a part of the test set: after calibration, during training, and at its end.

    The time of evaluation is not counted (:meth:`psaq_mm.engine.runner.loop.DataFreeTrainLoop.paused`).

    Args:
        truth: Predictions of full precision on the whole test set.
        config: Has the test set.
        points: Number of evaluations during training, evenly spread over its steps, or over its seconds if they are
            its limit.
        pictures: Number of test images; the same ones in every evaluation and every row.
    """

    priority = 'LOWEST'

    def __init__(self, truth: Predictions, config: Mapping, points: int, pictures: int = 100):
        self.truth, self.config, self.points = truth, config, points
        self.places = fixed_subset(len(truth), pictures)
        self.curve: List[Point] = []
        self._dataset = None

    def before_train_epoch(self, runner) -> None:
        """Evaluate after calibration, before training."""
        self._evaluate(runner, 0)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Evaluate when the next point is due."""
        loop = runner.train_loop
        done = max((runner.iter + 1) / max(loop.max_iters, 1), loop.progress)
        if done < 1 and done * self.points >= len(self.curve):
            self._evaluate(runner, runner.iter + 1)

    def after_train(self, runner) -> None:
        """Evaluate the student that is saved."""
        if self.curve[-1]['step'] != runner.iter:
            self._evaluate(runner, runner.iter)

    @torch.no_grad()
    def _evaluate(self, runner, step: int) -> None:
        loop = runner.train_loop
        with loop.clock.paused():
            seconds, agreement = loop.clock.elapsed, Agreement(self.truth)
            model, collate = loop.model, self._collate()
            size = int(self.config['test_dataloader'].get('batch_size') or 1)
            for begin in range(0, len(self.places), size):
                places = self.places[begin : begin + size]
                samples = model.test_step(collate([self._items()[place] for place in places]))
                for place, sample in zip(places, samples):
                    agreement.add(place, sample)
            self.curve.append(dict(step=step, seconds=round(seconds, 2), agreement=agreement.result()['agreement']))

    def _items(self):
        if self._dataset is None:
            from mmengine.registry import DATASETS

            dataset = DATASETS.build(self.config['test_dataloader']['dataset'])
            getattr(dataset, 'full_init', lambda: None)()
            self._dataset = dataset
        return self._dataset

    def _collate(self):
        from mmengine.registry import FUNCTIONS

        collate = self.config['test_dataloader'].get('collate_fn') or dict(type='pseudo_collate')
        if not isinstance(collate, Mapping):
            return collate
        kind, settings = collate['type'], {key: value for key, value in collate.items() if key != 'type'}
        return functools.partial(FUNCTIONS.get(kind) if isinstance(kind, str) else kind, **settings)


# ---------------------------------------------------------------------- the picture
def _mean_curve(label: str, curves: Sequence[Sequence[Point]], key: str) -> Any:
    """The mean of several seeds, point by point, as a line with a band. None, if no point has a value."""
    from psaq_mm.visualization import Line

    groups = [[point for point in group if point['agreement'] is not None] for group in zip(*curves)]
    groups = [group for group in groups if group]
    if not groups:
        return None
    positions = [statistics.fmean(point[key] for point in group) for group in groups]
    values = [[point['agreement'] for point in group] for group in groups]
    return Line(label, positions, list(map(statistics.fmean, values)), list(map(min, values)), list(map(max, values)))


def draw_curves(rows: Sequence[Tuple[str, str, Mapping]], folder: Path) -> List[Path]:
    """Write a PNG for each group of rows: agreement against steps, and against seconds.

    A line is the mean of the seeds of a label, its band their range.

    Args:
        rows: (group, label, row); rows without a ``curve`` are left out. A group is a model at a precision.
        folder: Where ``curves_<group>.png`` goes.

    Returns:
        The files.
    """
    from psaq_mm.visualization import Panel, line_chart, write_png

    written = []
    for group in dict.fromkeys(name for name, _, _ in rows):
        curves: Dict[str, List[Sequence[Point]]] = {}
        for name, label, row in rows:
            if name == group and row.get('curve'):
                curves.setdefault(label, []).append(row['curve'])
        panels = []
        for key, axis in (('step', 'steps of the student'), ('seconds', 'seconds, samples included')):
            lines = [line for label, seeds in curves.items() if (line := _mean_curve(label, seeds, key)) is not None]
            panels.append(Panel(axis, 'agreement', lines))
        if panels[0].lines:
            path = Path(folder) / f'curves_{"_".join("".join(c if c.isalnum() else " " for c in group).split())}.png'
            write_png(line_chart(f'{group}: agreement with full precision', panels), path)
            written.append(path)
    return written
