# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Samples beside noise, and how alike their patches are to the model: one page, and one picture for the documentation.

    python benchmarks/sample_page.py CONFIG --samples 'PSAQ-ViT V1=work_dirs/v1/samples.pt' --real 32 --out
    work_dirs/samples_page python benchmarks/sample_page.py CONFIG --sources gaussian pink dead_leaves mixture --samples
    best=work_dirs/best/samples.pt --real 32 \
        --results docs/results/samples.json

CONFIG is a quantized config with ``load_from``; the full-precision model is what looks at the pictures. Each NAME=PATH
is a ``samples.pt``, as ``dfq.save_samples=True`` leaves it, or a folder of images. Procedural sources are made here.
``--real N`` adds the curve of N images of the training set: photographs are measured, and never shown nor stored. With
``--results``, each source says what a student got out of it: the rows of ``tools/compare.py ... --rows`` for this model
whose source has the same name (``gaussian``, ``pink``, ..., ``real``, or the NAME of ``--samples``).
"""

import argparse
import io
import sys
from collections import Counter
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from psaq_mm.commands.common import add_config_arguments, load_config, run_command  # noqa: E402
from psaq_mm.commands.quiet import silence  # noqa: E402
from psaq_mm.errors import CheckpointError, ConfigError, DataError  # noqa: E402
from psaq_mm.files import write_whole  # noqa: E402
from psaq_mm.models import TaskModel  # noqa: E402
from psaq_mm.pictures import SampleStream, source_of  # noqa: E402
from psaq_mm.tables import text_table  # noqa: E402
from psaq_mm.visualization import (  # noqa: E402
    STYLES,
    BlockDensity,
    Line,
    Picture,
    area_chart,
    render,
    similarity_densities,
    to_pixels,
)

COLUMNS = 3  # pictures side by side, and classes shown
TITLES = dict(
    gaussian='Gaussian noise',
    pink='1/f noise',
    dead_leaves='Dead leaves',
    scenes='Scenes',
    mixture='Half 1/f noise, half dead leaves',
)
MADE_HERE = ('gaussian', 'pink')
NOISE_COUNT = 32
REAL = 'real images'
FLOOR = 0.01  # least density drawn, on a logarithmic scale
MINUS = '\u2212'  # as wide as the plus

FIXED_STYLES = {
    'Gaussian noise': 1,
    REAL: 2,
    '1/f noise': 3,
    'Dead leaves': 6,
    'Half 1/f noise, half dead leaves': 7,
    'Scenes': 5,
}
SAMPLE_STYLES = (0, 4, 5, 6, 7)
"""Numbers in the page's style sheet: procedural sources and real images look the same on every page; samples take what
is free."""


class Source(NamedTuple):
    """A set of images as the model sees it.

    Attributes:
        name: Shown.
        style: Of its curve.
        count: Images measured.
        pictures: (uint8 picture (H, W, 3) in RGB, caption); none of real images.
        density: Mean over the blocks; its entropy is the mean of the blocks' entropies.
        mean, spread: Mean over the blocks of the mean similarity and of its standard deviation.
        agreement: Share of the labelled samples that the model classifies as their label, or None.
        student: What a student got out of it, in words; empty where that is not known.
    """

    name: str
    style: int
    count: int
    pictures: List[Tuple[np.ndarray, str]]
    density: BlockDensity
    mean: float
    spread: float
    agreement: Optional[float]
    student: str = ''

    @property
    def figures(self) -> List[Picture]:
        """Pictures of the page."""
        return [
            Picture(picture, caption, f'{self.name}, picture {number + 1}{", " + caption if caption else ""}')
            for number, (picture, caption) in enumerate(self.pictures)
        ]

    @property
    def numbers(self) -> List[str]:
        """Cells of the table after the name."""
        share = '\u2013' if self.agreement is None else f'{self.agreement:.1%}'
        return [str(self.count), _signed(self.mean), f'{self.spread:.2f}', _signed(self.density.entropy), share]


def _signed(value: float) -> str:
    return f'{value:+.2f}'.replace('-', MINUS)


# ---------------------------------------------------------------------- what is measured
def named_paths(given: Sequence[str], sources: Sequence[str] = MADE_HERE) -> Dict[str, Path]:
    """Paths by name out of ``NAME=PATH``; ``sources`` are the procedural ones beside them.

    Raises:
        ConfigError: One has another form, a name is taken, or there are too many to tell apart.
        DataError: Nothing is there.
    """
    found: Dict[str, Path] = {}
    for entry in given:
        name, _, path = entry.partition('=')
        if not name or not path:
            raise ConfigError(
                f'--samples {entry} is not of the form NAME=PATH: write for example V1=work_dirs/v1/samples.pt'
            )
        if name in found or name in FIXED_STYLES:
            raise ConfigError(
                f'--samples has the name {name!r} twice, or it stands for noise or real images: give another name'
            )
        if not Path(path).exists():
            raise DataError(f'--samples {entry} does not exist: give a samples.pt or a folder of images')
        found[name] = Path(path)
    free = len(_free_styles(sources))
    if len(found) > free:
        raise ConfigError(
            f'--samples has {len(found)} entries and {free} can be told apart beside the sources: make two pages'
        )
    return found


def _free_styles(sources: Sequence[str]) -> List[int]:
    taken = [FIXED_STYLES[TITLES[name]] for name in sources]
    return [style for style in SAMPLE_STYLES if style not in taken]


def students(path: Optional[Path], model: str, bits: Sequence[str] = ()) -> Dict[str, str]:
    """What students got, in words, by the name of their source.

    Args:
        path: Rows that ``tools/compare.py --rows`` wrote; None: nothing is known.
        model: Of the rows.
        bits: Precisions to tell of, such as ``'W4A8'``; all by default. Of each, the longest training counts.

    Raises:
        ConfigError: The file holds nothing of this model at these precisions.
        DataError: It holds something else.
    """
    from psaq_mm.commands.sample_rows import DIVERGENCE, read_rows

    if path is None:
        return {}
    rows = [row for row in read_rows(path) if row['model'] == model and (not bits or row['bits'] in bits)]
    if not rows:
        raise ConfigError(
            f'--results {path} has no rows of {model}{" at " + ", ".join(bits) if bits else ""}: run tools/compare.py '
            f'with '
            f'--rows {path}, or name another file, --model or --bits'
        )
    said: Dict[str, List[str]] = {}
    for name, precision in dict.fromkeys((row['source'], row['bits']) for row in rows):
        own = [row for row in rows if (row['source'], row['bits']) == (name, precision)]
        most = max(row['steps'] for row in own)
        own = [row for row in own if row['steps'] == most]
        agreement = list({row['seed']: row['agreement'] for row in own if row['agreement'] is not None}.values())
        # a line has room for two numbers
        metrics = dict.fromkeys(row['metric'] for row in own if row['metric'] != DIVERGENCE)
        values = [
            f'{key.rpartition("/")[2]} {np.mean([row["value"] for row in own if row["metric"] == key]):.4g}'
            for key in metrics
            if all(row['value'] is not None for row in own)
        ]
        shown = [f'agreement {np.mean(agreement):.3f}'] if agreement else []
        if len(agreement) > 1:
            shown[0] += f' ({min(agreement):.3f} to {max(agreement):.3f})'
        how = f'{most} steps' if most else 'calibrated'
        seeds = len({row['seed'] for row in own})
        said.setdefault(name, []).append(
            f'{precision}, {how}: {", ".join(shown + values)}' + (f', {seeds} seeds' if seeds > 1 else '')
        )
    return {name: '; '.join(lines) for name, lines in said.items()}


def load_teacher(config) -> Tuple[TaskModel, Tuple[int, int]]:
    """The full-precision model of a quantized config, and the (height, width) of its samples.

    Raises:
        PsaqError: The config or its checkpoint does not serve.
    """
    from psaq_mm.engine.building import build_model
    from psaq_mm.engine.checkpoint import is_quantized, load_weights, read_checkpoint
    from psaq_mm.engine.config import to_data_free
    from psaq_mm.quantization import set_mode

    free = to_data_free(config)
    path = free.train_cfg.teacher['checkpoint']
    checkpoint = read_checkpoint(path)
    if is_quantized(checkpoint):
        raise CheckpointError(f'{path} is quantized already: set load_from to the full-precision checkpoint')
    with silence():
        model = build_model(free)
        load_weights(model, checkpoint, path)
    set_mode(model, 'off')  # and not the library's own model: this one tells which rows are window padding
    model.eval()
    return TaskModel(model), tuple(free.train_cfg.size)


def picked(count: int, labels: Optional[Tensor], rows: int, classes: Sequence[int], name: str) -> List[Tuple[int, str]]:
    """Samples to show, with captions: a class a column, the most frequent ones where ``classes`` names none.

    Raises:
        DataError: There is no sample of any of ``classes``.
    """
    if labels is None:
        return [(number, '') for number in range(min(count, COLUMNS * rows))]
    known = labels.tolist()
    frequent = [label for label, _ in Counter(known).most_common(COLUMNS)]  # of equal numbers the first ones
    chosen = [label for label in classes if label in known] or ([] if classes else frequent)
    if not chosen:
        raise DataError(
            f'{name} has no sample of the classes {", ".join(map(str, classes))}: it has '
            f'{", ".join(map(str, sorted(set(known))))}'
        )
    columns = [[number for number, label in enumerate(known) if label == wanted] for wanted in chosen]
    return [
        (column[row], f'class {label}')
        for row in range(rows)
        for column, label in zip(columns, chosen)
        if row < len(column)
    ]


@torch.no_grad()
def share_classified(teacher: TaskModel, samples: Tensor, labels: Optional[Tensor]) -> Optional[float]:
    """Share of samples whose greatest logit is their label's; None without labels or classes."""
    if labels is None or teacher.num_classes is None:
        return None
    found = torch.cat([teacher.run(batch, with_logits=True).logits.argmax(1) for batch in samples.split(8)])
    return float((found == labels).float().mean())


def measure(
    teacher: TaskModel,
    name: str,
    style: int,
    samples: Tensor,
    labels: Optional[Tensor],
    shown: Sequence[Tuple[int, str]],
) -> Source:
    """Density, table row and pictures of normalized samples, (n, C, H, W)."""
    from psaq_mm.models.task import reads_rgb

    blocks = similarity_densities(teacher.model, samples, drop_tokens=teacher.prefix_tokens)
    count = len(blocks)
    entropy = sum(block.entropy for block in blocks) / count
    density = BlockDensity(
        f'mean of {count} blocks', blocks[0].centers, sum(block.density for block in blocks) / count, entropy
    )
    pictures: List[Tuple[np.ndarray, str]] = []
    if shown:
        pixels = to_pixels(samples[[number for number, _ in shown]], teacher.image_spec)
        pixels = pixels if reads_rgb(teacher.model) else pixels[..., ::-1]
        pictures = [(np.ascontiguousarray(picture), caption) for picture, (_, caption) in zip(pixels, shown)]
    return Source(
        name,
        style,
        len(samples),
        pictures,
        density,
        sum(block.mean for block in blocks) / count,
        sum(block.spread for block in blocks) / count,
        share_classified(teacher, samples, labels),
    )


def measure_all(
    config,
    paths: Dict[str, Path],
    real: Optional[int] = None,
    rows: int = 1,
    classes: Sequence[int] = (),
    seed: int = 0,
    say: Callable[[str], None] = print,
    sources: Sequence[str] = MADE_HERE,
    learned: Optional[Dict[str, str]] = None,
) -> List[Source]:
    """Every source: the given samples, procedural ones, and real images last.

    Args:
        config: A quantized config.
        paths: Samples by name.
        real: Images of the training set that are measured; None: none.
        rows: Rows of pictures shown of each, see :func:`picked`.
        classes: Classes shown of labelled samples, see :func:`picked`.
        seed: Of procedural sources and of the choice of real images.
        say: Called with a line of progress.
        sources: Names of :data:`TITLES`.
        learned: From :func:`students`.

    Raises:
        PsaqError: The config, its checkpoint, its training set or a file of samples does not serve.
    """
    from mmengine.runner import set_random_seed

    from psaq_mm.engine.samples import build_source, load_samples

    if rows < 1 or (real is not None and real < 1):
        raise ConfigError(f'--rows {rows} and --real {real} must be at least 1: give greater numbers')
    teacher, size = load_teacher(config)
    learned = learned or {}
    spec, found = teacher.image_spec, []
    # before anything takes time
    loaded = {name: load_samples(path, size, teacher.model, spec) for name, path in paths.items()}
    for style, (name, (samples, labels)) in zip(_free_styles(sources), loaded.items()):
        shown = picked(len(samples), labels, rows, classes, name)
        say(f'{name}: {len(samples)} samples')
        found.append(measure(teacher, name, style, samples, labels, shown)._replace(student=learned.get(name, '')))
    for name in sources:
        title = TITLES[name]
        noise = source_of(name)(max(NOISE_COUNT, COLUMNS * rows), size, spec, torch.Generator().manual_seed(seed))
        say(f'{title}: {len(noise)} made')
        seen = measure(teacher, title, FIXED_STYLES[title], noise, None, picked(len(noise), None, rows, (), title))
        found.append(seen._replace(student=learned.get(name, '')))
    if real:
        set_random_seed(seed)  # the training pipeline crops and flips at random
        images = SampleStream(build_source('real', teacher.model, config, seed), size, spec, seed).take(real)
        say(f'{REAL}: {real} of the training set')
        found.append(
            measure(teacher, REAL, FIXED_STYLES[REAL], images, None, ())._replace(student=learned.get('real', ''))
        )
    return found


# ---------------------------------------------------------------------- the page
HEAD = ('Source', 'Images', 'Mean', 'Spread', 'Entropy', 'As labelled')


def page_of(sources: Sequence[Source], model: str) -> str:
    """The whole page, HTML, with everything inside."""
    blocks = sources[0].density.name
    lines = [Line(s.name, s.density.centers.tolist(), s.density.density.tolist(), style=s.style) for s in sources]
    ticks = (-1, -0.5, 0, 0.5, 1)
    return render(
        Path(__file__).parent / 'sample_page.html',
        model=model,
        sources=sources,
        lines=lines,
        chart=area_chart(f'Patch similarity, {blocks}', lines, (-1, 1), ticks, floor=FLOOR, size=(360, 240)),
        columns=HEAD,
        blocks=blocks,
        floor=FLOOR,
        real=any(source.name == REAL for source in sources),
        taught=any(source.student for source in sources),
    )


# ---------------------------------------------------------------------- the PNG
WIDTH, GAP, EDGE, TITLE, TOLD, CAPTION, AXES = 1120, 4, 14, 46, 16, 22, 320  # pixels
INK, SOFT = '#1d1f21', '#5b6166'


def _cells(source: Source, cell: int) -> List[np.ndarray]:
    """Pictures made as wide as a cell."""
    return [
        np.asarray(
            Image.fromarray(p).resize((cell, max(1, round(cell * p.shape[0] / p.shape[1]))), Image.Resampling.LANCZOS)
        )
        for p, _ in source.pictures
    ]


def _told(source: Source) -> List[str]:
    """What students got out of a source, a line for each precision."""
    return source.student.split('; ') if source.student else []


def draw(sources: Sequence[Source]) -> np.ndarray:
    """Pictures, two sources a row, and the chart in what is left of the last row or below; (H, 1120, 3), uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panel = (WIDTH - 3 * EDGE) // 2
    cell = (panel - (COLUMNS - 1) * GAP) // COLUMNS
    panels = [(source, _cells(source, cell)) for source in sources if source.pictures]
    above = TITLE + TOLD * max(len(_told(source)) for source in sources)
    heights = [above + -(-len(cells) // COLUMNS) * (max(len(c) for c in cells) + CAPTION) for _, cells in panels]
    rows = [max(heights[i : i + 2]) for i in range(0, len(heights), 2)]
    beside = len(panels) % 2 == 1
    if beside:
        rows[-1] = max(rows[-1], above + 200)
    height = EDGE * (len(rows) + 1) + sum(rows) + (0 if beside else AXES + EDGE)
    figure = Figure(figsize=(WIDTH / 100, height / 100), dpi=100, facecolor='white')
    canvas = FigureCanvasAgg(figure)

    def put(x: float, y: float, words: str, size: float, colour: str = INK) -> None:
        figure.text(x / WIDTH, 1 - y / height, words, fontsize=size, color=colour, va='top', parse_math=False)

    top = EDGE
    for number, (source, cells) in enumerate(panels):
        left = EDGE + number % 2 * (panel + EDGE)
        put(left, top, source.name, 11.5)
        share = '' if source.agreement is None else f', {source.agreement:.0%} classified as labelled'
        put(
            left,
            top + 21,
            f'similarity {_signed(source.mean)}, spread {source.spread:.2f}, entropy '
            f'{_signed(source.density.entropy)}{share}',
            8.5,
            SOFT,
        )
        for line, words in enumerate(_told(source)):
            put(left, top + 37 + TOLD * line, words, 8.5, SOFT)
        tallest = max(len(c) for c in cells)
        for place, (picture, (_, caption)) in enumerate(zip(cells, source.pictures)):
            x, y = left + place % COLUMNS * (cell + GAP), top + above + place // COLUMNS * (tallest + CAPTION)
            figure.figimage(picture, x, height - y - len(picture), origin='upper')
            put(x, y + len(picture) + 4, caption, 8.5, SOFT)
        if number % 2:
            top += rows[number // 2] + EDGE
    _chart(
        figure,
        sources,
        (EDGE + panel + EDGE, top, panel, rows[-1]) if beside else (EDGE, top, WIDTH - 2 * EDGE, AXES),
        height,
    )
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _chart(figure, sources: Sequence[Source], box: Tuple[int, int, int, int], height: int) -> None:
    left, top, wide, high = box
    names = wide // 200  # side by side in the legend
    unseen = next((_told(source) for source in sources if source.name == REAL), [])
    above = 28 + TOLD * len(unseen) + 17 * -(-len(sources) // names)
    axes = figure.add_axes(
        ((left + 46) / WIDTH, 1 - (top + high - 40) / height, (wide - 52) / WIDTH, (high - 40 - above) / height)
    )
    for source in sources:
        colour, dashes = STYLES[source.style]
        x, y = source.density.centers.numpy(), source.density.density.numpy()
        seen = np.where(y > 0, np.maximum(y, FLOOR / 10), np.nan)  # goes down to the axis and ends there
        axes.plot(
            x,
            seen,
            color=colour,
            linestyle=(0, dashes) if dashes else '-',
            linewidth=1.8,
            label=source.name + (' (never shown)' if source.name == REAL else ''),
        )
        if source.style == 0:
            axes.fill_between(x, FLOOR, np.maximum(y, FLOOR), color=colour, alpha=0.12, linewidth=0)
    axes.set(yscale='log', xlim=(-1, 1), ylim=(FLOOR, None))
    axes.set_xlabel('cosine similarity of two patches', fontsize=9, color=SOFT)
    axes.set_xticks((-1, -0.5, 0, 0.5, 1))
    axes.tick_params(labelsize=8.5, colors=SOFT)
    axes.xaxis.set_major_formatter(lambda value, _: f'{value:g}'.replace('-', MINUS))
    axes.yaxis.set_major_formatter(lambda value, _: f'{value:g}')
    for side in ('top', 'right'):
        axes.spines[side].set_visible(False)
    axes.legend(
        loc='lower left', bbox_to_anchor=(0, 1), ncols=names, fontsize=8.5, frameon=False, borderpad=0, labelspacing=0.3
    )
    for line, words in enumerate(unseen):
        figure.text(
            left / WIDTH,
            1 - (top + 19 + TOLD * line) / height,
            f'{REAL}: {words}',
            fontsize=8.5,
            color=SOFT,
            va='top',
            parse_math=False,
        )
    figure.text(
        (left + 46) / WIDTH,
        1 - top / height,
        f'Density of patch similarity, {sources[0].density.name}',
        fontsize=11.5,
        color=INK,
        va='top',
    )


def _drawn_colours() -> List[int]:
    """Colours of letters and lines, and halfway to white: rare ones, which would be lost among those of the
    pictures.
    """
    exact = [
        [int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in (INK, SOFT, *(colour for colour, _ in STYLES))
    ]
    return [255] * 3 + [
        round(255 + (value - 255) * share) for share in (1, 0.5, 0.12) for colour in exact for value in colour
    ]


def encode(picture: np.ndarray, kilobytes: float) -> bytes:
    """PNG with as many colours, at most 256, as fit into ``kilobytes`` (of 1000 bytes).

    Raises:
        ConfigError: Not even the fewest colours do.
    """
    image, drawn = Image.fromarray(picture), _drawn_colours()
    for colours in (224, 176, 144, 112, 80, 32):
        palette = Image.new('P', (1, 1))
        palette.putpalette(drawn + image.quantize(colours).getpalette()[: 3 * colours])
        buffer = io.BytesIO()
        image.quantize(palette=palette).save(buffer, format='PNG', optimize=True)
        if buffer.tell() <= kilobytes * 1000:
            return buffer.getvalue()
    raise ConfigError(
        f'--kilobytes {kilobytes:g} is too little, {buffer.tell() / 1000:.0f} are needed: give more, or fewer --rows'
    )


def write(content: Union[str, bytes], path: Path) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise DataError(f'{path} cannot be written ({error.strerror}): give another folder') from error


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog='sample_page', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument(
        '--samples', nargs='+', default=[], metavar='NAME=PATH', help='samples.pt files, or folders of images'
    )
    parser.add_argument(
        '--sources', nargs='*', choices=list(TITLES), default=list(MADE_HERE), help='made here (default: %(default)s)'
    )
    parser.add_argument(
        '--results', type=Path, metavar='FILE', help='rows of tools/compare.py --rows: what students got out of them'
    )
    parser.add_argument('--model', help='of the rows (default: the name of the config)')
    parser.add_argument('--bits', nargs='+', default=[], help='precisions of the rows, such as W4A8 (default: all)')
    parser.add_argument(
        '--real', type=int, metavar='N', help='measure this many images of the training set, too; they are not shown'
    )
    parser.add_argument(
        '--classes', type=int, nargs='+', default=[], help='classes of labelled samples to show (default: three)'
    )
    parser.add_argument('--rows', type=int, default=1, help='rows of pictures a source (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='seed of the noise and of the choice of real images')
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/samples_page'), help='folder of page and PNG (default: %(default)s)'
    )
    parser.add_argument('--png', type=Path, help='where the PNG goes (default: OUT/samples.png)')
    parser.add_argument(
        '--kilobytes', type=float, default=400.0, help='greatest size of the PNG (default: %(default)g)'
    )

    def command(args) -> None:
        args.sources = list(dict.fromkeys(args.sources))
        if not args.samples and not args.sources:
            raise ConfigError('there is nothing to show: give --samples or --sources')
        paths = named_paths(args.samples, args.sources)
        learned = students(args.results, args.model or Path(args.config).stem, args.bits)
        config = load_config(args.config, args.cfg_options)
        sources = measure_all(
            config, paths, args.real, args.rows, args.classes, args.seed, print, args.sources, learned
        )
        picture = encode(draw(sources), args.kilobytes)
        html, png = args.out / 'index.html', args.png or args.out / 'samples.png'
        write(page_of(sources, Path(args.config).stem), html)
        write(picture, png)
        print('\n' + text_table(HEAD, [(source.name, *source.numbers) for source in sources], 'lrrrrr'))
        print(f'\nThe page is {html}, the picture {png} ({len(picture) / 1000:.0f} kB)')

    return run_command(command, parser, argv)


if __name__ == '__main__':
    sys.exit(main())
