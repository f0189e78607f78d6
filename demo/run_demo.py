"""Quantize a detector and a segmentor without data, and show what came of it: ``make demo``.

The detector finds cells in pictures of a microscope, the segmentor parts of drawn scenes. For both: box and mask AP or
mIoU on held-out pictures at full precision, with ranges from Gaussian noise (the control), and quantized without data
by ``fast``, ``best`` and, the segmentor, PSAQ-ViT V2. Checkpoints and pictures of cells come with the repository, the
scenes are drawn here; only evaluation sees them. Leaves a page, ``index.html``, and the numbers alone,
``summary.json``, in ``work_dirs/demo``.

Example:
    python demo/run_demo.py --only detector
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = 160  # scenes
QUICK_HELD_OUT = 2
NUCLEI = 108
SHEET = 16  # pictures of a sheet
DRAWN = 4  # pictures on the page, spread evenly over the test set, so that nobody has chosen them


def quick_settings(method: str) -> Dict[str, Any]:
    """Few of everything: shows that a run works, and nothing else."""
    settings: Dict[str, Any] = dict(size=(160, 160), calibration_samples=2, pool_size=4, batch_size=2)
    if method == 'psaq_v2':
        settings.update(
            iters=2, evolve_every=1, evolve_samples=2, generator=dict(batch_size=2, steps=2), sheet_interval=1
        )
    return settings


class Variant(NamedTuple):
    """A way to quantize.

    Attributes:
        method: ``--method`` of the commands.
        bits: ``--quant`` of the commands.
        seconds: Of the run without evaluation, on two cores, for the estimate of the time left.
    """

    method: str
    bits: str
    seconds: float

    @property
    def key(self) -> str:
        """Its name in the summary and of its folder."""
        return f'{self.method}_{self.bits}'

    @property
    def label(self) -> str:
        """Its name on the page."""
        names = dict(gaussian='ranges from Gaussian noise', psaq_v2='PSAQ-ViT V2')
        return f'{self.bits.upper()}, {names.get(self.method, self.method)}'

    @property
    def control(self) -> bool:
        """Whether it is there to be compared with."""
        return self.method == 'gaussian'


class Task(NamedTuple):
    """One of the demo's models.

    Attributes:
        name: Of its config, its checkpoint and its entry in the summary.
        folder: Of its config, inside ``configs``.
        short: Its name on the console and in ``--only``.
        heading: Its name on the page.
        about: What it was trained on, a sentence.
        metrics: The evaluator's key, the name shown, and the factor to per cent of those in the main table.
        seconds: Of one evaluation on two cores, for the estimate of the time left.
        variants: The ways to quantize it.
        shown: Keys of those whose predictions are on the page.
        note: How to read the pictures.
    """

    name: str
    folder: str
    short: str
    heading: str
    about: str
    metrics: Sequence[Tuple[str, str, float]]
    seconds: float
    variants: Sequence[Variant]
    shown: Sequence[str]
    note: str


TASKS = (
    Task(
        'mask_rcnn_swin_nuclei',
        'nuclei',
        'detector',
        'Detector: cells under the microscope',
        'A Mask R-CNN with a small Swin, trained from scratch on 533 pictures of the Data Science Bowl 2018 (CC0).',
        (
            ('coco/bbox_mAP', 'box AP', 100.0),
            ('coco/bbox_mAP_50', 'box AP50', 100.0),
            ('coco/segm_mAP', 'mask AP', 100.0),
        ),
        45.0,
        (
            Variant('gaussian', 'w8a8', 5.0),
            Variant('fast', 'w8a8', 15.0),
            Variant('best', 'w8a8', 40.0),
            Variant('best', 'w4a8', 40.0),
        ),
        ('best_w8a8', 'best_w4a8'),
        f'{DRAWN} of the held-out pictures, evenly spread. Detections of a confidence of 0.5 and more are drawn, with '
        'mask and box.',
    ),
    Task(
        'upernet_swin_demo',
        'demo',
        'segmentor',
        'Segmentor: drawn scenes',
        'A UperNet with a small Swin, trained from scratch on scenes that demo/scenes.py draws.',
        (('mIoU', 'mIoU', 1.0), ('aAcc', 'pixel accuracy', 1.0)),
        5.0,
        (
            Variant('gaussian', 'w8a8', 2.0),
            Variant('fast', 'w8a8', 8.0),
            Variant('best', 'w8a8', 15.0),
            Variant('psaq_v2', 'w8a8', 50.0),
            Variant('best', 'w4a8', 15.0),
        ),
        ('best_w8a8', 'best_w4a8'),
        f'{DRAWN} of the held-out scenes, evenly spread, each pixel of an object in the colour of its class.',
    ),
)


class Result(NamedTuple):
    """What one variant (or full precision) gave: metrics, seconds of each step, and where its checkpoint is."""

    metrics: Dict[str, Optional[float]]
    seconds: Dict[str, float]
    checkpoint: Path


class Demo:
    """One run of the demo.

    Args:
        out: Folder of everything it writes.
        pictures: Of each model by name: the folder of its test set, and its annotations (None: the config's).
        checkpoints: Folder of the full-precision checkpoints.
        seed: Seed of samples and training.
        quick: Few samples, few steps.
        progress: The console.
    """

    def __init__(
        self,
        out: Path,
        pictures: Mapping[str, Tuple[Path, Optional[Path]]],
        checkpoints: Path,
        seed: int,
        quick: bool,
        progress,
    ):
        self.out, self.pictures, self.checkpoints = out, pictures, checkpoints
        self.seed, self.quick, self.progress = seed, quick, progress
        self._names = 0

    # ------------------------------------------------------------------ configs
    def config(self, task: Task, purpose: str, variant: Optional[Variant] = None):
        """The config of a model under one variant (None: the first), with its own work folder, log and pictures."""
        from psaq_mm.commands.common import load_config

        variant = variant or task.variants[0]
        leaf = ROOT / 'configs' / task.folder / f'{task.name}_w8a8.py'
        config = load_config(str(leaf), quant=variant.bits, method=variant.method)
        config.work_dir = str(self.out / task.name / purpose)
        config.load_from = str(self.checkpoints / f'{task.name}.pth')
        # MMEngine keeps every logger and visualizer of the process by name: a run of the same would get the old one.
        self._names += 1
        config.experiment_name = f'{task.short}_{purpose}_{os.getpid()}_{self._names}'
        config.visualizer.name = config.experiment_name
        root, annotations = self.pictures[task.name]
        config.test_dataloader.dataset.data_root = f'{root}/'
        if annotations:
            config.test_dataloader.dataset.ann_file = str(annotations)
            config.test_evaluator.ann_file = str(annotations)
        dfq = config.dfq if isinstance(config.dfq, Mapping) else dict(preset=config.dfq)
        config.dfq = {**dfq, **(quick_settings(variant.method) if self.quick else {}), 'seed': self.seed}
        return config

    # ------------------------------------------------------------------ steps
    def full_precision(self, task: Task) -> Result:
        """Metrics of the model as it was trained."""
        from psaq_mm.commands.evaluation import evaluate
        from psaq_mm.engine.checkpoint import read_checkpoint
        from psaq_mm.errors import CheckpointError

        config = self.config(task, 'full_precision')
        source = Path(config.load_from)
        if not source.is_file():
            raise CheckpointError(
                f'there is no checkpoint {_near(source)}: fetch it with the repository, or train it with '
                f'python demo/train_full_precision.py configs/{task.folder}/{task.name}.py --out {_near(source)}'
            )
        with self.progress.step():
            begun = time.perf_counter()
            metrics = evaluate(config, read_checkpoint(source), str(source), full_precision=True)
            seconds = time.perf_counter() - begun
        return self._result(task, metrics, dict(evaluation=seconds), source)

    def variant(self, task: Task, variant: Variant) -> Tuple[Result, Any]:
        """Quantize and evaluate; also the loop's samples, teacher and student."""
        from progress import LogBeat

        from psaq_mm.commands.evaluation import evaluate
        from psaq_mm.engine.checkpoint import read_checkpoint
        from psaq_mm.engine.config import to_data_free
        from psaq_mm.engine.running import data_free_runner

        with self.progress.step():
            config = self.config(task, variant.key, variant)
            begun = time.perf_counter()
            runner = data_free_runner(to_data_free(config))
            runner.logger.addHandler(LogBeat(self.progress))
            runner.train()
            made = time.perf_counter()
            student = Path(runner.work_dir) / 'student.pth'
            config = self.config(task, f'{variant.key}/test', variant)
            metrics = evaluate(config, read_checkpoint(student), str(student))
            loop = runner.train_loop
            spent = {'pictures and calibration': loop.clock.seconds['synthesis']}
            if loop.training is not None:
                spent['training the student'] = loop.clock.seconds['student']
            spent['loading and saving'] = made - begun - sum(spent.values())
            spent['evaluation'] = time.perf_counter() - made
        return self._result(task, metrics, spent, student), loop

    def _result(
        self, task: Task, metrics: Mapping[str, float], seconds: Mapping[str, float], checkpoint: Path
    ) -> Result:
        from psaq_mm.commands.metrics import scalars

        clean = scalars(metrics)
        shown = '   '.join(f'{label} {_shown(clean.get(key), factor)}' for key, label, factor in task.metrics)
        self.progress.say(f'{"":10}{shown}   ({sum(seconds.values()):.0f} s)')
        return Result(clean, dict(seconds), checkpoint)

    # ------------------------------------------------------------------ one model
    def run(self, task: Task):
        """Everything for one model: its entry of the summary, and its section of the page."""
        results = {'full_precision': self.full_precision(task)}
        loops = {}
        for variant in task.variants:
            results[variant.key], loops[variant.method] = self.variant(task, variant)
        with self.progress.step():
            section = self._section(task, results, loops)
        return {key: _entry(result) for key, result in results.items()}, section

    def _section(self, task: Task, results: Mapping[str, Result], loops: Mapping[str, Any]):
        from predictions import BACKGROUND, build, ground_truth, normalized, pictures_of, predict, side_by_side
        from report import ModelReport, Run, ShownMetric

        from psaq_mm.engine.checkpoint import read_checkpoint

        config = self.config(task, 'pictures')
        meta = config.test_dataloader.dataset.metainfo
        drawn = pictures_of(config, DRAWN)
        columns = [('Ground truth', [ground_truth(picture, meta) for picture in drawn])]
        by_key = {variant.key: variant for variant in task.variants}
        for key in ('full_precision', *task.shown):
            variant, source = by_key.get(key), results[key].checkpoint
            model = build(self.config(task, 'pictures', variant), read_checkpoint(source), str(source), variant is None)
            columns.append((_label(key, task), predict(model, drawn, meta)))
        rows = [side_by_side(i, [(label, predicted[i]) for label, predicted in columns]) for i in range(len(drawn))]
        teacher = loops['best'].teacher.model
        samples, densities = self._samples(loops, [normalized(teacher, [picture]) for picture in drawn])
        return ModelReport(
            name=task.name,
            heading=task.heading,
            description=_description(task, loops['best']),
            runs=[Run(_label(k, task), r.metrics, r.seconds, k.startswith('best')) for k, r in results.items()],
            shown=[ShownMetric(*metric) for metric in task.metrics],
            scenes=rows,
            scenes_note=task.note,
            legend=[(n, tuple(c)) for n, c in zip(meta['classes'], meta['palette']) if n != BACKGROUND],
            samples=samples,
            densities=densities,
        )

    def _samples(self, loops: Mapping[str, Any], held_out: Sequence[Any]):
        """Sheets of what calibrated, and how different the model's patches are on it, pictures held out beside."""
        import torch

        from psaq_mm.visualization import Picture, sample_sheet, similarity_densities

        words = dict(
            gaussian=('Gaussian noise', 'The control.', 'Sheet of noise without any structure'),
            fast=('dead leaves', 'All pictures that "fast" sees are such.', 'Sheet of overlapping discs of one colour'),
            best=('pictures of best', 'Dead leaves and scenes.', 'Sheet of overlapping discs, and of larger objects'),
            psaq_v2=('synthesized samples', 'Out of the model itself.', 'Sheet of samples with blotches of colour'),
        )
        task_model = loops['best'].teacher
        spec, teacher, prefix = task_model.image_spec, task_model.model, task_model.prefix_tokens
        sheets, densities = [], {}
        for method in ('best', 'psaq_v2', 'fast', 'gaussian'):
            if method not in loops:
                continue
            pictures, (name, sentence, alternative) = loops[method].newest_pictures[:SHEET], words[method]
            name = name[0].upper() + name[1:]
            sheets.append(Picture(sample_sheet(pictures, spec), f'{name}. {sentence}', alternative))
            if method != 'fast':
                densities[name] = similarity_densities(teacher, pictures, drop_tokens=prefix)
        height, width = (min(picture.shape[axis] for picture in held_out) for axis in (-2, -1))
        held_out = torch.cat([picture[..., :height, :width] for picture in held_out])
        densities['Held-out pictures (only to compare)'] = similarity_densities(teacher, held_out, drop_tokens=prefix)
        return sheets, densities


def _shown(value: Optional[float], factor: float) -> str:
    return '-' if value is None else f'{value * factor:.1f}'


def _entry(result: Result) -> Dict[str, Optional[float]]:
    seconds = {k: round(v, 2) for k, v in result.seconds.items()}
    return dict(result.metrics, seconds=round(sum(seconds.values()), 2), seconds_of=seconds)


def _label(key: str, task: Task) -> str:
    return dict(full_precision='Full precision', **{v.key: v.label for v in task.variants})[key]


def _description(task: Task, loop) -> str:
    height, width = loop.picture_settings.size
    return (
        f'{task.about} Its backbone is quantized: weights to 8 or 4 bits, one scale an output channel, activations to '
        f'8 bits, one scale a tensor. Calibration pictures are {height} x {width} pixels.'
    )


# ---------------------------------------------------------------------------------------------------- the whole
def _plan(tasks: Sequence[Task], quick: bool) -> List[Tuple[str, float]]:
    steps: List[Tuple[str, float]] = []
    for task in tasks:
        evaluation = 2.0 if quick else task.seconds
        steps.append((f'{task.short}: full precision, evaluating', evaluation))
        for variant in task.variants:
            trained = ', training' if variant.method == 'psaq_v2' else ''
            steps.append(
                (
                    f'{task.short}: {variant.label}: calibrating{trained}, evaluating',
                    evaluation + (2.0 if quick else variant.seconds),
                )
            )
        steps.append((f'{task.short}: pictures for the page', 6.0))
    return steps


def _table(summary: Mapping[str, Mapping[str, Mapping]], tasks: Sequence[Task]) -> str:
    from psaq_mm.tables import text_table

    tables = []
    for task in tasks:
        head = (task.name, *(label for _, label, _ in task.metrics), 'seconds')
        rows = [
            (
                _label(key, task),
                *(_shown(entry.get(metric), factor) for metric, _, factor in task.metrics),
                f'{entry["seconds"]:.0f}',
            )
            for key, entry in summary[task.name].items()
        ]
        tables.append(text_table(head, rows, 'l' + 'r' * (len(head) - 1)))
    return '\n\n'.join(tables)


def _versions() -> Dict[str, str]:
    import mmcv
    import mmdet
    import mmengine
    import mmseg
    import numpy
    import torch

    import psaq_mm

    found = {m.__name__: m.__version__ for m in (psaq_mm, torch, mmengine, mmcv, mmdet, mmseg, numpy)}
    return {'Python': platform.python_version(), **found}


def _facts(demo: Demo, elapsed: float, summary: Mapping[str, Mapping[str, Mapping]]) -> Dict[str, object]:
    import torch

    evaluation = sum(entry['seconds_of'].get('evaluation', 0.0) for runs in summary.values() for entry in runs.values())
    return {
        'Seed': demo.seed,
        'Processor': f'{platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores',
        'Evaluation': f'{evaluation:.0f} s, all runs together',
        'Whole run': f'{elapsed:.0f} s',
        **(dict(Note='a quick run with few pictures and steps: its numbers say nothing') if demo.quick else {}),
    }


def _lead() -> List[str]:
    return [
        'Two trained models, quantized without a single real picture. "fast" and "best" draw pictures by a small '
        'program that knows nothing of the model or its data, set the ranges of the activations on them and choose the '
        'codes of the weights so that their errors cancel. Nothing is synthesized or trained. PSAQ-ViT V2, a '
        'published method, synthesizes samples out of the model and trains the student on them.',
        'All numbers are from pictures that neither training nor quantization has seen, from one seed. Rows of "best" '
        'have a tinted ground; ranges from Gaussian noise go through the same quantizer and are the control.',
    ]


def _test_sets(tasks: Sequence[Task], out: Path, quick: bool, progress) -> Dict[str, Tuple[Path, Optional[Path]]]:
    """Folder and annotations of each model's test set. A quick run has few pictures: the evaluators count what is
    missing of a whole set as missed.
    """
    from scenes import make_scenes

    sets: Dict[str, Tuple[Path, Optional[Path]]] = {}
    for task in tasks:
        if task.folder == 'nuclei':
            whole = ROOT / 'demo' / 'nuclei' / 'annotations' / 'val.json'
            sets[task.name] = (
                ROOT / 'demo' / 'nuclei',
                _first_pictures(whole, out / 'nuclei-quick.json') if quick else whole,
            )
            progress.say(f'{QUICK_HELD_OUT if quick else NUCLEI} held-out pictures of cells in demo/nuclei')
        else:
            folder = out / 'scenes-quick' if quick else ROOT / 'work_dirs' / 'demo' / 'scenes'
            count = QUICK_HELD_OUT if quick else HELD_OUT
            scenes, fresh = make_scenes(folder, dict(val=count))
            sets[task.name] = (scenes / 'segmentation', None)
            progress.say(f'{"Made" if fresh else "Found"} {count} held-out scenes in {_near(scenes)}')
    return sets


def _first_pictures(annotations: Path, out: Path) -> Path:
    """The first pictures of a COCO data set as one of its own."""
    from psaq_mm.files import write_whole

    whole = json.loads(annotations.read_text(encoding='utf-8'))
    images = whole['images'][:QUICK_HELD_OUT]
    kept = {image['id'] for image in images}
    found = [annotation for annotation in whole['annotations'] if annotation['image_id'] in kept]
    write_whole(out, json.dumps({**whole, 'images': images, 'annotations': found}))
    return out


def run_demo(tasks: Sequence[Task], out: Path, checkpoints: Path, seed: int, quick: bool, console) -> Path:
    """Everything; returns the page's path. Results are written at the end, whole."""
    from progress import Progress, clock
    from report import write_report

    from psaq_mm.files import write_whole

    progress = Progress(_plan(tasks, quick), console)
    demo = Demo(out, _test_sets(tasks, out, quick, progress), checkpoints, seed, quick, progress)
    summary, sections = {}, []
    for task in tasks:
        summary[task.name], section = demo.run(task)
        sections.append(section)
    write_whole(out / 'summary.json', json.dumps(summary, indent=2, allow_nan=False) + '\n')
    page = out / 'index.html'
    write_report(
        page,
        'Quantized without data',
        _lead(),
        sections,
        _facts(demo, progress.elapsed, summary),
        _versions(),
    )
    progress.say()
    progress.say(_table(summary, tasks))
    progress.say()
    progress.say(
        f'{clock(progress.elapsed)} minutes; the page is {_near(page)}, '
        f'the numbers are in {_near(out / "summary.json")}'
    )
    return page


def _near(path: Path) -> str:
    """A path as short as it gets from the repository's root."""
    with contextlib.suppress(ValueError):
        return str(Path(path).resolve().relative_to(ROOT))
    return str(path)


def _parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='run_demo', description=__doc__.split('\n')[0])
    parser.add_argument('--only', choices=[task.short for task in TASKS], help='one of the two models')
    parser.add_argument('--seed', type=int, default=0, help='seed of samples and training (default: %(default)s)')
    parser.add_argument(
        '--out', type=Path, default=ROOT / 'work_dirs' / 'demo', help='folder of results (default: work_dirs/demo)'
    )
    parser.add_argument(
        '--checkpoints',
        type=Path,
        default=ROOT / 'demo' / 'checkpoints',
        help='folder of the full-precision checkpoints (default: demo/checkpoints)',
    )
    parser.add_argument('--quick', action='store_true', help='few scenes, samples and steps: to see that it runs')
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line; returns the exit status: 0, 1 for a failure that is named, 130 when interrupted."""
    args = _parse(argv)
    out, checkpoints = args.out.resolve(), args.checkpoints.resolve()
    os.chdir(ROOT)  # paths in the configs are relative to it
    sys.path[:0] = [str(ROOT), str(ROOT / 'demo')]
    tasks = [task for task in TASKS if args.only in (None, task.short)]
    console, log = sys.stdout, out / 'console.log'
    try:
        out.mkdir(parents=True, exist_ok=True)
        # The libraries' own lines, hundreds of them, go to a file.
        with (
            open(log, 'w', encoding='utf-8') as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            try:
                run_demo(tasks, out, checkpoints, args.seed, args.quick, console)
            except BaseException:
                traceback.print_exc(file=file)
                raise
    except KeyboardInterrupt:
        print('run_demo: interrupted; results of an earlier run are untouched', file=sys.stderr)
        return 130
    except Exception as error:  # one sentence for the reader, the rest in the file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'
        named = type(error).__module__.startswith('psaq_mm') or isinstance(error, (OSError, ValueError))
        prefix = '' if named else f'{type(error).__name__}: '
        where = f' (all of it is in {_near(log)})' if log.is_file() else ''
        print(f'run_demo: {prefix}{reason}{where}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
