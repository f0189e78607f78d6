"""Quantize a detector and a segmentor without data, and show what came of it: ``make demo``.

For both models: box and mask AP or mIoU on held-out scenes at full precision, with ranges from Gaussian noise (the
control), and quantized without data, at W8A8 and W4A8. The checkpoints come with the repository; the scenes are drawn
here, and only evaluation sees them. Leaves a page, ``index.html``, and the numbers alone, ``summary.json``, in
``work_dirs/demo``.

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
HELD_OUT = 160
QUICK_HELD_OUT = 6
START = dict(gaussian='Gaussian noise', pink='1/f noise')  # what synthesis begins with
DRAWN = 4  # scenes on the page: the first ones, so that nobody has chosen them

# One run with few of everything: shows that all of it works, and nothing else.
QUICK = dict(
    iters=2,
    evolve_every=1,
    evolve_samples=2,
    calibration_samples=2,
    pool_size=4,
    batch_size=2,
    generator=dict(batch_size=2, steps=2),
    sheet_interval=1,
)


class Task(NamedTuple):
    """One of the demo's models.

    Attributes:
        name: Of its config, its checkpoint and its entry in the summary.
        short: Its name on the console and in ``--only``.
        heading: Its name on the page.
        scenes: Folder of its data set inside the scenes.
        metrics: The evaluator's key, the name shown, and the factor to per cent of those in the main table.
        seconds: Of evaluation and of one data-free run on two cores, for the estimate of the time left.
        note: How to read the pictures.
    """

    name: str
    short: str
    heading: str
    scenes: str
    metrics: Sequence[Tuple[str, str, float]]
    seconds: Tuple[float, float]
    note: str


TASKS = (
    Task(
        'mask_rcnn_swin_demo',
        'detector',
        'Detector: Mask R-CNN with a small Swin',
        'detection',
        (
            ('coco/bbox_mAP', 'box AP', 100.0),
            ('coco/bbox_mAP_50', 'box AP50', 100.0),
            ('coco/segm_mAP', 'mask AP', 100.0),
        ),
        (7.0, 60.0),
        f'The first {DRAWN} of the held-out scenes. Detections of a confidence of 0.5 and more are drawn, with mask, '
        'box and confidence.',
    ),
    Task(
        'upernet_swin_demo',
        'segmentor',
        'Segmentor: UperNet with a small Swin',
        'segmentation',
        (('mIoU', 'mIoU', 1.0), ('aAcc', 'pixel accuracy', 1.0)),
        (5.0, 48.0),
        f'The first {DRAWN} of the held-out scenes, each pixel of an object in the colour of its class.',
    ),
)


class Variant(NamedTuple):
    """A way to quantize: its key in the summary, its name, its bits, and whether it is the method or a control."""

    key: str
    label: str
    bits: str
    data_free: bool


VARIANTS = (
    Variant('gaussian_w8a8', 'W8A8, ranges from Gaussian noise', 'w8a8', False),
    Variant('data_free_w8a8', 'W8A8, data-free', 'w8a8', True),
    Variant('gaussian_w4a8', 'W4A8, ranges from Gaussian noise', 'w4a8', False),
    Variant('data_free_w4a8', 'W4A8, data-free', 'w4a8', True),
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
        scenes: Folder of the scenes.
        checkpoints: Folder of the full-precision checkpoints.
        seed: Seed of samples and training.
        quick: Few samples, few steps.
        progress: The console.
    """

    def __init__(self, out: Path, scenes: Path, checkpoints: Path, seed: int, quick: bool, progress):
        self.out, self.scenes, self.checkpoints = out, scenes, checkpoints
        self.seed, self.quick, self.progress = seed, quick, progress
        self._names = 0

    # ------------------------------------------------------------------ configs
    def config(self, task: Task, bits: str, purpose: str, data_free: bool = True):
        """The leaf config of a model at some bits, with its own work folder, log and data-free settings."""
        from psaq_mm.commands.common import load_config
        from psaq_mm.engine.methods import METHODS

        config = load_config(str(ROOT / 'configs' / 'demo' / f'{task.name}_{bits}.py'))
        config.work_dir = str(self.out / task.name / purpose)
        config.load_from = str(self.checkpoints / f'{task.name}.pth')
        # MMEngine keeps every logger and visualizer of the process by name: a run of the same would get the old one.
        self._names += 1
        config.experiment_name = f'{task.short}_{purpose}_{os.getpid()}_{self._names}'
        config.visualizer.name = config.experiment_name
        root = f'{self.scenes / task.scenes}/'
        config.test_dataloader.dataset.data_root = root
        if config.test_evaluator.get('ann_file'):
            config.test_evaluator.ann_file = root + config.test_dataloader.dataset.ann_file
        settings = {**config.dfq, **(QUICK if self.quick else {}), 'seed': self.seed}
        if not data_free:
            # The control differs from the method in these alone: as many samples, from noise, and nothing is trained.
            settings.update(METHODS['gaussian'].settings, preset='gaussian')
        config.dfq = settings
        return config

    # ------------------------------------------------------------------ steps
    def full_precision(self, task: Task) -> Result:
        """Metrics of the model as it was trained."""
        from psaq_mm.commands.evaluation import evaluate
        from psaq_mm.engine.checkpoint import read_checkpoint
        from psaq_mm.errors import CheckpointError

        config = self.config(task, 'w8a8', 'full_precision')
        source = Path(config.load_from)
        if not source.is_file():
            raise CheckpointError(
                f'there is no checkpoint {_near(source)}: fetch it with the repository, or train it with '
                f'python demo/train_full_precision.py configs/demo/{task.name}.py --out {_near(source)}'
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
            config = self.config(task, variant.bits, variant.key, variant.data_free)
            begun = time.perf_counter()
            runner = data_free_runner(to_data_free(config))
            runner.logger.addHandler(LogBeat(self.progress))
            runner.train()
            made = time.perf_counter()
            student = Path(runner.work_dir) / 'student.pth'
            config = self.config(task, variant.bits, f'{variant.key}/test')
            metrics = evaluate(config, read_checkpoint(student), str(student))
            loop = runner.train_loop
            spent = {'synthesis and calibration': loop.seconds['synthesis']}
            if variant.data_free:
                spent['training the student'] = loop.seconds['student']
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
        for variant in VARIANTS:
            results[variant.key], loop = self.variant(task, variant)
            if variant.data_free:
                loops[variant.key] = loop
        with self.progress.step():
            section = self._section(task, results, loops['data_free_w8a8'])
        return {key: _entry(result) for key, result in results.items()}, section

    def _section(self, task: Task, results: Mapping[str, Result], loop):
        from predictions import BACKGROUND, build, ground_truth, normalized, predict, scenes_of, side_by_side
        from report import ModelReport, Run, ShownMetric

        from psaq_mm.engine.checkpoint import read_checkpoint

        shown = (
            ('full_precision', 'Full precision', 'w8a8'),
            ('data_free_w8a8', 'W8A8, data-free', 'w8a8'),
            ('data_free_w4a8', 'W4A8, data-free', 'w4a8'),
        )
        config = self.config(task, 'w8a8', 'pictures')
        meta = config.test_dataloader.dataset.metainfo
        scenes = scenes_of(config, 16)
        drawn = scenes[:DRAWN]
        columns = [('Ground truth', [ground_truth(scene, meta) for scene in drawn])]
        for key, label, bits in shown:
            source = results[key].checkpoint
            model = build(
                self.config(task, bits, 'pictures'), read_checkpoint(source), str(source), key == 'full_precision'
            )
            columns.append((label, predict(model, drawn, meta)))
        rows = [side_by_side(i, [(label, predicted[i]) for label, predicted in columns]) for i in range(len(drawn))]
        labels = dict(full_precision='Full precision', **{v.key: v.label for v in VARIANTS})
        bits_free = [v.key for v in VARIANTS if v.data_free]
        samples, densities = self._samples(task, loop, normalized(loop.teacher.model, scenes))
        return ModelReport(
            name=task.name,
            heading=task.heading,
            description=_description(task, loop),
            runs=[Run(labels[k], r.metrics, r.seconds, k in bits_free) for k, r in results.items()],
            shown=[ShownMetric(*metric) for metric in task.metrics],
            scenes=rows,
            scenes_note=task.note,
            legend=[(n, tuple(c)) for n, c in zip(meta['classes'], meta['palette']) if n != BACKGROUND],
            samples=samples,
            densities=densities,
        )

    def _samples(self, task: Task, loop, real):
        import torch

        from psaq_mm.pictures import GaussianNoise
        from psaq_mm.visualization import Picture, sample_sheet, similarity_densities

        spec, samples = loop.teacher.image_spec, loop.training.pool.samples[:16]
        generator = torch.Generator().manual_seed(self.seed)
        noise = GaussianNoise()(len(samples), tuple(samples.shape[-2:]), spec, generator)
        sheets = [
            Picture(sample_sheet(noise, spec), 'Gaussian noise, the control.', 'Sheet of noise without any structure')
        ]
        for key, words in (('data_free_w8a8', 'W8A8'), ('data_free_w4a8', 'W4A8')):
            files = sorted((self.out / task.name / key / 'samples').glob('*.png'))
            if key == 'data_free_w8a8':
                start = START[loop.synthesis.generator.init]
                sheets.append(
                    Picture(
                        _read(files[0]),
                        f'Samples made out of {start} before there is a student; they set its first ranges.',
                        'Sheet of generated samples with blotches of colour',
                    )
                )
            sheets.append(
                Picture(
                    _read(files[-1]),
                    f'The last samples, made also to be hard for the {words} student.',
                    f'Sheet of the last samples of the {words} run',
                )
            )
        teacher, prefix = loop.teacher.model, loop.teacher.prefix_tokens
        densities = {
            'generated samples': similarity_densities(teacher, samples, drop_tokens=prefix),
            'Gaussian noise': similarity_densities(teacher, noise, drop_tokens=prefix),
            'held-out scenes (only to compare)': similarity_densities(teacher, real, drop_tokens=prefix),
        }
        return sheets, densities


def _read(path: Path):
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert('RGB'))


def _shown(value: Optional[float], factor: float) -> str:
    return '-' if value is None else f'{value * factor:.1f}'


def _entry(result: Result) -> Dict[str, Optional[float]]:
    seconds = {k: round(v, 2) for k, v in result.seconds.items()}
    return dict(result.metrics, seconds=round(sum(seconds.values()), 2), seconds_of=seconds)


def _description(task: Task, loop) -> str:
    height, width = loop.picture_settings.size
    first, later = loop.calibration_settings.calibration_samples, loop.training_settings.evolve_samples
    return (
        f'Trained at full precision on drawn scenes; its backbone is quantized: weights to 8 or 4 bits, one scale an '
        f'output channel, activations to 8 bits, one scale a tensor. Samples are {height} x {width} pixels: '
        f'{first} set the ranges, {later} more join at each round.'
    )


# ---------------------------------------------------------------------------------------------------- the whole
def _plan(tasks: Sequence[Task], quick: bool) -> List[Tuple[str, float]]:
    steps: List[Tuple[str, float]] = []
    for task in tasks:
        evaluation, training = (2.0, 2.0) if quick else task.seconds
        steps.append((f'{task.short}: full precision, evaluating', evaluation))
        for variant in VARIANTS:
            what = 'making samples, training, evaluating' if variant.data_free else 'calibrating, evaluating'
            steps.append(
                (f'{task.short}: {variant.label}: {what}', evaluation + (training if variant.data_free else 2.0))
            )
        steps.append((f'{task.short}: pictures for the page', 6.0))
    return steps


def _table(summary: Mapping[str, Mapping[str, Mapping]], tasks: Sequence[Task]) -> str:
    from psaq_mm.tables import text_table

    labels = dict(full_precision='full precision', **{v.key: v.label for v in VARIANTS})
    tables = []
    for task in tasks:
        head = (task.name, *(label for _, label, _ in task.metrics), 'seconds')
        rows = [
            (
                labels[key],
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


def _facts(demo: Demo, count: int, elapsed: float, summary: Mapping[str, Mapping[str, Mapping]]) -> Dict[str, object]:
    import torch

    free = sum(
        sum(v for k, v in entry['seconds_of'].items() if k != 'evaluation')
        for runs in summary.values()
        for key, entry in runs.items()
        if key.startswith('data_free')
    )
    return {
        'Held-out scenes': count,
        'Seed': demo.seed,
        'Processor': f'{platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores',
        'Data-free part': f'{free:.0f} s, all runs together',
        'Whole run': f'{elapsed:.0f} s',
        **(dict(Note='a quick run with few samples and steps: its numbers say nothing') if demo.quick else {}),
    }


def _lead(count: int) -> List[str]:
    return [
        'A detector and a segmentor with a small Swin backbone, quantized without a single real image: samples are '
        'synthesized out of the full-precision model, they set the ranges of the quantized one, and that one is then '
        'trained to give the outputs of the first while new samples look for what it still gets wrong (PSAQ-ViT V2).',
        f'All numbers are from {count} drawn scenes that neither training nor quantization has seen, from one seed. '
        'Rows with a tinted ground are the method; ranges from Gaussian noise go through the same quantizer and are '
        'the control. The backbone alone is quantized. These models and scenes are small and easy; they show how it '
        'works, not how well it works on large ones.',
    ]


def run_demo(tasks: Sequence[Task], out: Path, checkpoints: Path, seed: int, quick: bool, console) -> Path:
    """Everything; returns the page's path. Results are written at the end, whole."""
    from progress import Progress, clock
    from report import write_report
    from scenes import make_scenes

    from psaq_mm.files import write_whole

    progress = Progress(_plan(tasks, quick), console)
    # Quick runs have scenes of their own: the evaluators count what is missing of a whole set as missed.
    folder = out / 'scenes-quick' if quick else ROOT / 'work_dirs' / 'demo' / 'scenes'
    count = QUICK_HELD_OUT if quick else HELD_OUT
    scenes, fresh = make_scenes(folder, dict(val=count))
    progress.say(f'{"Made" if fresh else "Found"} {count} held-out scenes in {_near(scenes)}')
    demo = Demo(out, scenes, checkpoints, seed, quick, progress)
    summary, sections = {}, []
    for task in tasks:
        summary[task.name], section = demo.run(task)
        sections.append(section)
    write_whole(out / 'summary.json', json.dumps(summary, indent=2, allow_nan=False) + '\n')
    page = out / 'index.html'
    write_report(
        page,
        'Quantized without data',
        _lead(count),
        sections,
        _facts(demo, count, progress.elapsed, summary),
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
