"""Cluttered scenes of simple shapes: data for detection and segmentation, made on this machine.

A scene is a textured background, clutter that belongs to no class (lines, specks, letters, long ellipses, half discs)
and a few shapes of :data:`CLASSES` that overlap each other, under uneven light and sensor noise. Backgrounds are dull
and objects vivid, but clutter may be either. In detection only the outline tells which class an object is of; in
segmentation each class also has a range of hues, as grass and sky have, which clutter wears too. A scene depends on its
seed, its split and its number alone, so a set can be made again bit for bit and ``val`` never repeats a scene of
``train``.

The folder written holds a set in COCO's layout and another in that of ADE20K::

    <out>/detection/{train,val}/000000.png
    <out>/detection/annotations/instances_{train,val}.json      masks of the visible parts, run-length encoded
    <out>/segmentation/images/{training,validation}/000000.png
    <out>/segmentation/annotations/{training,validation}/000000.png   0 = background, 1..6 = CLASSES
    <out>/scenes.json                                            what the set was made with, written last

Example:
    python demo/scenes.py --out work_dirs/demo/scenes
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

import cv2
import numpy as np

CLASSES = ('circle', 'square', 'triangle', 'star', 'ring', 'cross')
SPLITS = ('train', 'val')
ADE_SPLITS = {'train': 'training', 'val': 'validation'}
#: Raised whenever the same seed would give other pictures, so that an older set is not taken for a current one.
VERSION = 2
MIN_VISIBLE = 0.6  # an object more hidden than this could no longer be told by its outline
SUBPIXEL_BITS = 4  # cv2.fillPoly takes fixed-point corners


class Scene(NamedTuple):
    """One scene.

    Attributes:
        image: (S, S, 3) uint8, BGR.
        labels: (S, S) uint8, 0 = background, class index + 1 elsewhere.
        masks: (n, S, S) bool, the visible part of each object.
        classes: n indices into :data:`CLASSES`.
    """

    image: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    classes: List[int]


# ---------------------------------------------------------------------------------------------------- textures
def _smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Random field (S, S) in 0..1 whose blobs are about ``size / cells`` wide."""
    coarse = rng.random((cells, cells), dtype=np.float32)
    return np.clip(cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC), 0, 1)


def _wave(rng: np.random.Generator, size: int, low: float, high: float) -> np.ndarray:
    """Plane wave (S, S) in -1..1 with a wavelength of ``low`` to ``high`` pixels in a random direction."""
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    frequency = 2 * np.pi / rng.uniform(low, high)
    ramp = np.arange(size, dtype=np.float32) * np.float32(frequency)
    return np.sin(
        ramp[None, :] * np.float32(np.cos(angle)) + ramp[:, None] * np.float32(np.sin(angle)) + np.float32(phase)
    )


def _pattern(rng: np.random.Generator, size: int) -> np.ndarray:
    """Mixing weight (S, S) in 0..1 between the two colours of a surface."""
    kind = rng.integers(5)
    if kind == 0:  # blotches
        return _smooth_noise(rng, size, int(rng.integers(6, 24)))
    if kind == 1:  # stripes
        return (_wave(rng, size, 8, 24) > 0).astype(np.float32)
    if kind == 2:  # chequers
        return (_wave(rng, size, 12, 28) * _wave(rng, size, 12, 28) > 0).astype(np.float32)
    if kind == 3:  # slow gradient
        return 0.5 + 0.5 * _wave(rng, size, 1.5 * size, 4 * size)
    return np.full((size, size), rng.random(), np.float32)  # plain


def _surface(rng: np.random.Generator, size: int, colour: np.ndarray, spread: float) -> np.ndarray:
    """Texture (S, S, 3), float32, of two colours around ``colour`` (at most ``spread`` away from it in each
    channel).
    """
    other = np.clip(colour + rng.uniform(-spread, spread, 3), 0, 255).astype(np.float32)
    weight = _pattern(rng, size)[..., None]
    return colour.astype(np.float32) * (1 - weight) + other * weight


# ------------------------------------------------------------------------------------------------------ shapes
def _regular(corners: int, radius: float = 1.0) -> np.ndarray:
    angles = np.arange(corners) * (2 * np.pi / corners)
    return radius * np.stack([np.cos(angles), np.sin(angles)], 1)


def _outline(rng: np.random.Generator, name: str) -> List[np.ndarray]:
    """Closed curves of a shape in the unit circle; a second curve is a hole."""
    if name == 'circle':
        return [_regular(40)]
    if name == 'ring':
        return [_regular(40), _regular(40, rng.uniform(0.45, 0.62))]
    if name == 'square':
        return [_regular(4)]
    if name == 'triangle':
        return [_regular(3)]
    if name == 'star':
        points = _regular(10)
        points[1::2] *= rng.uniform(0.38, 0.5)
        return [points]
    arm = rng.uniform(0.26, 0.36)  # half the width of a cross's arm
    corner = np.array([[1, -arm], [1, arm], [arm, arm]])
    turns = [np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]) for t in np.arange(4) * np.pi / 2]
    return [np.concatenate([corner @ turn.T for turn in turns])]


def _cover(curves: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Share of each pixel (S, S), 0..1, that closed curves (in pixels) cover, holes left out."""
    canvas = np.zeros((size, size), np.uint8)
    fixed = [np.round(curve * (1 << SUBPIXEL_BITS)).astype(np.int32) for curve in curves]
    cv2.fillPoly(canvas, fixed, 255, lineType=cv2.LINE_AA, shift=SUBPIXEL_BITS)
    return canvas.astype(np.float32) / 255


def _place(rng: np.random.Generator, name: str, size: int) -> np.ndarray:
    """A shape of ``name`` at a random place, size (16 to 48 % of the picture) and turn, as :func:`_cover`."""
    radius = 0.5 * size * np.exp(rng.uniform(np.log(0.17), np.log(0.48)))
    # what reaches the unit circle with its corners only looks small
    if name in ('square', 'triangle', 'star', 'cross'):
        radius *= 1.1
    turn, squeeze = rng.uniform(0, 2 * np.pi), rng.uniform(0.82, 1.0)
    centre = rng.uniform(0.7 * radius, size - 0.7 * radius, 2)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    shape = [curve * radius * (1.0, squeeze) @ rotation.T + centre for curve in _outline(rng, name)]
    return _cover(shape, size)


def _clutter(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Paint things of no class onto ``image`` (S, S, 3)."""
    size = image.shape[0]
    canvas = np.ascontiguousarray(image)
    for _ in range(int(rng.integers(4, 10))):
        colour = [float(v) for v in rng.uniform(0, 255, 3)]
        x, y = (int(v) for v in rng.integers(0, size, 2))
        kind = rng.integers(5)
        if kind == 0:
            end = tuple(int(v) for v in rng.integers(0, size, 2))
            cv2.line(canvas, (x, y), end, colour, int(rng.integers(1, 4)), cv2.LINE_AA)
        elif kind == 1:
            cv2.circle(canvas, (x, y), int(rng.integers(1, max(2, size // 40))), colour, -1, cv2.LINE_AA)
        elif kind == 2:
            letter = chr(int(rng.integers(ord('A'), ord('Z') + 1)))
            cv2.putText(
                canvas,
                letter,
                (x, y),
                cv2.FONT_HERSHEY_SIMPLEX,
                rng.uniform(0.004, 0.009) * size,
                colour,
                2,
                cv2.LINE_AA,
            )
        elif kind == 3:
            long = int(rng.integers(size // 12, size // 5))
            cv2.ellipse(
                canvas, (x, y), (long, max(2, long // 4)), float(rng.uniform(0, 180)), 0, 360, colour, -1, cv2.LINE_AA
            )
        else:
            radius = int(rng.integers(size // 16, size // 8))
            cv2.ellipse(canvas, (x, y), (radius, radius), float(rng.uniform(0, 360)), 0, 160, colour, -1, cv2.LINE_AA)
    return canvas


def _vivid_colour(rng: np.random.Generator) -> np.ndarray:
    """A saturated colour (3,), 0..255: one channel high, one low, one anywhere between."""
    return rng.permutation([rng.uniform(0, 70), rng.uniform(0, 255), rng.uniform(170, 255)])


def _hue_colour(rng: np.random.Generator, index: int) -> np.ndarray:
    """A saturated colour (3,), BGR 0..255, of the hues of class ``index``."""
    hue = (360 / len(CLASSES) * index + rng.uniform(-25, 25)) % 360
    # OpenCV's 8-bit hues are degrees halved.
    pixel = np.array([[[hue / 2, rng.uniform(150, 255), rng.uniform(120, 255)]]]).astype(np.uint8)
    return cv2.cvtColor(pixel, cv2.COLOR_HSV2BGR)[0, 0].astype(np.float64)


def _dull_colour(rng: np.random.Generator) -> np.ndarray:
    """A colour (3,), 0..255, close to grey."""
    return np.clip(rng.uniform(20, 235) + rng.uniform(-20, 20, 3), 0, 255)


def _light_and_sensor(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Uneven light, slight blur and noise on ``image`` (S, S, 3) float32; returns uint8."""
    size = image.shape[0]
    light = 0.95 + rng.uniform(0, 0.25) * _wave(rng, size, 1.5 * size, 4 * size)
    image = cv2.GaussianBlur(image * light[..., None], (0, 0), rng.uniform(0.3, 0.8))
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(2, 9))
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def draw_scene(rng: np.random.Generator, size: int = 160, hues: bool = False) -> Scene:
    """Draw one scene.

    Args:
        rng: Source of every random choice.
        size: Side of the picture in pixels, at least 64.
        hues: Whether each class has its own range of hues, 50 of the 360 degrees.

    Returns:
        Scene with 1 to 6 objects, each at least 60 % visible.

    Raises:
        ValueError: If ``size`` is below 64, where shapes can no longer be told apart.

    Example:
        >>> draw_scene(np.random.default_rng(0), 160).image.shape
        (160, 160, 3)
    """
    if size < 64:
        raise ValueError(f'size={size} is too small for scenes whose shapes can be told apart; give at least 64.')
    image = _clutter(rng, _surface(rng, size, _dull_colour(rng), 30))
    masks: List[np.ndarray] = []
    areas: List[int] = []
    classes: List[int] = []
    wanted = int(rng.integers(2, 7))
    for _ in range(4 * wanted):  # a crowded scene turns some shapes away
        index = int(rng.integers(len(CLASSES)))
        cover = _place(rng, CLASSES[index], size)
        mask = cover > 0.5
        left = [m & ~mask for m in masks]
        if any(m.sum() < MIN_VISIBLE * area for m, area in zip(left, areas)):
            continue
        colour = _hue_colour(rng, index) if hues else _vivid_colour(rng)
        surface = _surface(rng, size, colour, 50)
        image = image * (1 - cover[..., None]) + surface * cover[..., None]
        masks, areas, classes = left + [mask], areas + [int(mask.sum())], classes + [index]
        if len(masks) == wanted:
            break
    labels = np.zeros((size, size), np.uint8)
    for mask, index in zip(masks, classes):
        labels[mask] = index + 1
    return Scene(_light_and_sensor(rng, image.astype(np.float32)), labels, np.stack(masks), classes)


def scene(split: str, number: int, size: int = 160, seed: int = 0, hues: bool = False) -> Scene:
    """Scene ``number`` of ``split``: the same one at every call.

    Args:
        split: One of :data:`SPLITS`.
        number: Index in the split, from 0.
        size: Side of the picture in pixels.
        seed: Seed of the whole set.
        hues: As for :func:`draw_scene`; such scenes are others than those without.

    Returns:
        Scene.

    Raises:
        ValueError: If ``split`` is unknown or ``size`` too small.
    """
    if split not in SPLITS:
        raise ValueError(f'split={split!r} is unknown; choose from {", ".join(SPLITS)}.')
    return draw_scene(np.random.default_rng([seed, SPLITS.index(split), number] + [1] * hues), size, hues)


# ----------------------------------------------------------------------------------------------- COCO and ADE
def encode_rle(mask: np.ndarray) -> Dict:
    """Uncompressed COCO run-length code of ``mask`` (H, W) bool: runs down the columns, starting with zeros."""
    flat = np.concatenate([[False], mask.flatten(order='F'), [False]])
    borders = np.flatnonzero(flat[1:] != flat[:-1])
    runs = np.diff(np.concatenate([[0], borders, [mask.size]]))
    if borders.size and borders[-1] == mask.size:  # the mask reaches the last pixel, the closing run is empty
        runs = runs[:-1]
    return dict(size=list(mask.shape), counts=[int(run) for run in runs])


def _annotation(mask: np.ndarray, category: int, image_id: int, annotation_id: int) -> Dict:
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    return dict(
        id=annotation_id,
        image_id=image_id,
        category_id=category,
        iscrowd=0,
        area=int(mask.sum()),
        bbox=[int(v) for v in box],
        segmentation=encode_rle(mask),
    )


def _write(path: Path, image: np.ndarray) -> None:
    if not cv2.imwrite(str(path), image, [cv2.IMWRITE_PNG_COMPRESSION, 1]):
        raise OSError(f'{path} could not be written.')


def _write_split(root: Path, split: str, count: int, size: int, seed: int) -> None:
    pictures = root / 'detection' / split
    images = root / 'segmentation' / 'images' / ADE_SPLITS[split]
    labels = root / 'segmentation' / 'annotations' / ADE_SPLITS[split]
    coco_file = root / 'detection' / 'annotations' / f'instances_{split}.json'
    for folder in (pictures, images, labels, coco_file.parent):
        folder.mkdir(parents=True, exist_ok=True)
    coco = dict(
        info=dict(description=f'psaq_mm demo scenes, version {VERSION}'),
        licenses=[],
        images=[],
        annotations=[],
        categories=[dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)],
    )
    for number in range(count):
        drawn = scene(split, number, size, seed)
        name = f'{number:06d}.png'
        _write(pictures / name, drawn.image)
        coloured = scene(split, number, size, seed, hues=True)
        _write(images / name, coloured.image)
        _write(labels / name, coloured.labels)
        coco['images'].append(dict(id=number, file_name=name, width=size, height=size))
        for mask, index in zip(drawn.masks, drawn.classes):
            coco['annotations'].append(_annotation(mask, index + 1, number, len(coco['annotations']) + 1))
    coco_file.write_text(json.dumps(coco), encoding='utf-8')


def _made_with(out: Path) -> Dict:
    """Settings of the complete set at ``out``; empty where there is none."""
    try:
        return json.loads((out / 'scenes.json').read_text(encoding='utf-8'))
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _serves(made: Dict, wanted: Dict) -> bool:
    scenes = made.get('scenes', {})
    return all(made.get(key) == wanted[key] for key in ('version', 'size', 'seed')) and all(
        scenes.get(split) == count for split, count in wanted['scenes'].items()
    )


def _swap_in(fresh: Path, out: Path, old: Path) -> None:
    """Move ``fresh`` to ``out`` and what was there to ``old``; put that back if the move does not succeed."""
    if out.exists():
        out.rename(old)
    try:
        fresh.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise


def make_scenes(out, counts: Dict[str, int], size: int = 160, seed: int = 0) -> Tuple[Path, bool]:
    """Make a set of scenes, or reuse the one that is there.

    The set is written beside ``out`` and moved there when it is complete: an interrupted run leaves no half of one. A
    set made with other settings is replaced; a folder that holds anything else is left alone.

    Args:
        out: Folder of the set.
        counts: Scenes for each split, such as ``dict(train=1000, val=160)``.
        size: Side of the pictures in pixels.
        seed: Seed of the set.

    Returns:
        The folder and whether it was made anew.

    Raises:
        ValueError: For an unknown split, a count below 1, a size below 64, or an ``out`` that holds something else.

    Example:
        >>> make_scenes('work_dirs/demo/scenes', dict(val=160))  # doctest: +SKIP
    """
    out = Path(out)
    if not counts or any(split not in SPLITS for split in counts):
        raise ValueError(f'splits {sorted(counts)} cannot be made; choose from {", ".join(SPLITS)}.')
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f'{count} scenes for {split} make no data set; ask for at least 1.')
    if size < 64:
        raise ValueError(f'size={size} is too small for scenes whose shapes can be told apart; give at least 64.')
    wanted = dict(version=VERSION, size=size, seed=seed, scenes=dict(counts))
    made = _made_with(out)
    if _serves(made, wanted):
        return out, False
    if not made and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f'{out} holds something that is no set of scenes; give another --out or empty it.')

    out.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f'.{out.name}-', dir=out.parent))
    try:
        fresh = workplace / 'new'
        fresh.mkdir()
        for split, count in counts.items():
            _write_split(fresh, split, count, size, seed)
        (fresh / 'scenes.json').write_text(json.dumps(wanted), encoding='utf-8')
        if _serves(_made_with(out), wanted):  # another process was quicker
            return out, False
        _swap_in(fresh, out, workplace / 'old')
    finally:
        shutil.rmtree(workplace)
    return out, True


def main(argv: Sequence[str] = None) -> int:
    parser = argparse.ArgumentParser(description='Make cluttered scenes of shapes as COCO and ADE data sets.')
    parser.add_argument('--out', default='work_dirs/demo/scenes', help='folder of the set (default: %(default)s)')
    parser.add_argument('--split', nargs='+', default=list(SPLITS), choices=SPLITS, help='splits to make')
    parser.add_argument('--num-train', type=int, default=2000, help='scenes to train on (default: %(default)s)')
    parser.add_argument('--num-val', type=int, default=160, help='scenes to evaluate on (default: %(default)s)')
    parser.add_argument('--size', type=int, default=160, help='side in pixels (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='seed of the set (default: %(default)s)')
    args = parser.parse_args(argv)
    numbers = dict(train=args.num_train, val=args.num_val)
    try:
        out, fresh = make_scenes(args.out, {split: numbers[split] for split in args.split}, args.size, args.seed)
    except ValueError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(
        f'{"made" if fresh else "reused"} {out}: '
        + ', '.join(f'{numbers[split]} scenes in {split}' for split in args.split)
    )
    return 0


if __name__ == '__main__':
    sys.exit(main())
