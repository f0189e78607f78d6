# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Dead leaves: pictures of shapes that hide each other, with sizes, edges and textures like those of a photograph."""

import math
from typing import Callable, ClassVar, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor

from psaq_mm.errors import DataError
from psaq_mm.pictures.base import Source, number_seed
from psaq_mm.pictures.image_spec import ImageSpec
from psaq_mm.pictures.noise import correlated, odd_side, power_law_noise, softened, uniform_in
from psaq_mm.pictures.registry import register_source

__all__ = ['DeadLeaves', 'SHAPES', 'leaf_maps', 'mean_square', 'power_law']

SHAPES = ('disc', 'rectangle', 'polygon')
"""Ellipses, rectangles, and polygons of 3, 5 or 6 corners; all turned and stretched."""

COVERAGE = 3.0
"""Total area of the leaves over that of the picture: about a twentieth of the picture stays uncovered."""
SHAPE_WEIGHTS = (1.0, 1.0, 1.0)
"""How often each of :data:`SHAPES` is drawn."""
STRETCH = 0.4
"""Least ratio of a leaf's short side to its long one."""
TEXTURE = 0.6
"""Greatest spread of a leaf's texture, in standard units: 1/f noise in half of the leaves, a grating in the others."""
WAVELENGTH = (3.0, 24.0)
"""(shortest, longest) period of the gratings, in pixels."""
NOISE_EXPONENT = (0.6, 1.4)
"""(least, greatest) fall of the noise's amplitude."""
SHADING = 0.6
"""Greatest difference of brightness from the middle of a leaf to its edge, in standard units."""
CONTRAST = 1.0
"""Spread of the leaves' colours, in standard units."""
COLOR_CORRELATION = 0.8
"""Correlation of a leaf's colour between any two channels."""

_SIDES = (3, 5, 6)
_CHUNK = 1 << 18  # pixels tested at a time: a few megabytes
_TOGETHER = 1 << 21  # pixels of the pictures that are laid out at a time

Leaves = Dict[str, Tensor]


def power_law(count: int, low: float, high: float, exponent: float, generator: torch.Generator) -> Tensor:
    """``count`` values in ``low`` .. ``high`` whose density falls as x ** -exponent, (count,), float32."""
    share = torch.rand(count, generator=generator, dtype=torch.float64)
    if abs(exponent - 1) < 1e-9:
        return (low * (high / low) ** share).float()
    power = 1 - exponent
    return (low**power + share * (high**power - low**power)).pow(1 / power).float()


def mean_square(low: float, high: float, exponent: float) -> float:
    """Mean of x ** 2 under :func:`power_law`."""

    def integral(power: float) -> float:
        return (
            math.log(high / low) if abs(power + 1) < 1e-9 else (high ** (power + 1) - low ** (power + 1)) / (power + 1)
        )

    return low**2 if low == high else integral(2 - exponent) / integral(-exponent)


@register_source('dead_leaves')
class DeadLeaves(Source):
    """Shapes of power-law sizes, laid over each other until they cover the picture, each shaded and textured.

    Sizes that fall with the third power make the picture look alike at every scale, as natural ones do. Occlusion gives
    edges and corners, which noise lacks (Lee, Mumford and Huang, Occlusion models for natural images, IJCV 41, 2001).
    Shapes other than discs, shading and textures are this project's.

    The picture is periodic: a leaf that crosses one side comes in on the opposite one. Where no leaf lies, 1/f noise is
    seen.

    Args:
        exponent: Fall of the density of the radii.
        radius: (least, greatest) radius: the least in pixels, the greatest as a share of the shorter side, at most 0.5.
        color_blur: Side in pixels, odd, of the squares over which colour, not brightness, is averaged, twice; 1 leaves
            it sharp. In photographs colour is coarser than brightness, because of the sensors' mosaics and JPEG's
            subsampling.
        seed: As for :class:`Source`.

    Raises:
        DataError: A setting is out of range.
    """

    fixed: ClassVar[Tuple[str, ...]] = tuple(
        'coverage shapes stretch texture wavelength noise_exponent shading contrast color_correlation'.split()
    )

    def __init__(
        self, exponent: float = 3.0, radius: Tuple[float, float] = (3.0, 0.4), color_blur: int = 1, seed: int = 0
    ) -> None:
        super().__init__(seed)
        self.exponent, self.radius = float(exponent), tuple(radius)
        self.color_blur = odd_side('color_blur', color_blur)
        if len(self.radius) != 2 or not self.radius[0] >= 0.5 or not 0 < self.radius[1] <= 0.5:
            raise DataError(
                f'radius={self.radius} must be (least in pixels, 0.5 or more; greatest as a share of the shorter side, '
                'at most 0.5)'
            )
        if not 0 <= self.exponent <= 10:
            raise DataError(f'exponent={self.exponent} must be within 0 .. 10')

    def pictures(self, numbers: Sequence[int], size: Tuple[int, int], image_spec: ImageSpec, seed: int) -> Tensor:
        """See :meth:`Source.pictures`."""
        generator = torch.Generator()
        together = max(1, _TOGETHER // (size[0] * size[1]))
        painted: List[Tensor] = []
        for begin in range(0, len(numbers), together):
            drawn = []
            for number in numbers[begin : begin + together]:
                generator.manual_seed(number_seed(seed, number))
                drawn.append((self.leaves(size, generator), self._paints(size, image_spec.channels, generator)))
            maps = leaf_maps([leaves for leaves, _ in drawn], size)
            painted += [
                softened(_painted(ids, leaves, paints), self.color_blur) for ids, (leaves, paints) in zip(maps, drawn)
            ]
        return torch.stack(painted)

    def leaves(self, size: Tuple[int, int], generator: torch.Generator) -> Leaves:
        """Geometry of all leaves of a picture, the hindmost first.

        Returns:
            ``x``, ``y`` (centre, pixels), ``long``, ``short`` (half axes, pixels), ``angle`` (radians), each (n,)
            float32; ``shape``, indices into :data:`SHAPES`, and ``sides``, of a polygon, (n,) int64.
        """
        (height, width), (low, high), count = size, self._radii(size), self._count(size)
        long = power_law(count, low, high, self.exponent, generator)
        x, y, ratio, angle, kind, sides = torch.rand(6, count, generator=generator)
        edges = torch.tensor(SHAPE_WEIGHTS).cumsum(0)
        shape = torch.searchsorted(edges / edges[-1], kind, right=True).clamp_(max=len(SHAPES) - 1)
        return dict(
            x=x * width,
            y=y * height,
            long=long,
            short=long * (STRETCH + (1 - STRETCH) * ratio),
            angle=angle * math.pi,
            shape=shape,
            sides=torch.tensor(_SIDES)[(sides * len(_SIDES)).long()],
        )

    def _radii(self, size: Tuple[int, int]) -> Tuple[float, float]:
        low = min(self.radius[0], 0.5 * min(size))
        return low, max(low, self.radius[1] * min(size))

    def _count(self, size: Tuple[int, int]) -> int:
        """Number of leaves of a picture."""
        mean_leaf = _mean_area() * mean_square(*self._radii(size), self.exponent)
        return max(1, round(COVERAGE * size[0] * size[1] / mean_leaf))

    def _paints(self, size: Tuple[int, int], channels: int, generator: torch.Generator) -> 'Paints':
        """Colours and textures: the first is the background's, then one for each leaf."""
        height, width = size
        field = power_law_noise(1, size, uniform_in(NOISE_EXPONENT, generator), generator)[0]
        count = 1 + self._count(size)
        colour = CONTRAST * correlated(torch.randn(channels, count, generator=generator), COLOR_CORRELATION)
        tint = 1 + 0.3 * torch.randn(channels, count, generator=generator)
        amount, kind, slope, light, turn, period, phase, down, right = torch.rand(9, count, generator=generator)
        amount, grating = TEXTURE * amount, kind < 0.5
        amount[0], grating[0], slope[0] = 1.0, False, 0.0
        short, long = WAVELENGTH
        return Paints(
            field,
            colour,
            tint,
            shade=SHADING * slope,
            light=2 * math.pi * light,
            wave=torch.where(grating, amount * 2**0.5, 0.0),
            number=2 * math.pi / (short * (long / short) ** period),
            turn=math.pi * turn,
            phase=2 * math.pi * phase,
            grain=torch.where(grating, 0.0, amount),
            offset=(down * height).long() * (2 * width) + (right * width).long(),
        )


class Paints(NamedTuple):
    """Colours and textures of the background and of each leaf, in this order.

    Attributes:
        field: 1/f noise, (H, W), of which each leaf shows a part of its own.
        colour: Colour of each leaf, (C, n).
        tint: Strength of the texture in each channel, (C, n).
        shade: Difference of brightness from the middle to the edge, (n,).
        light: Direction in which brightness rises, in radians, (n,).
        wave: Amplitude of a leaf's grating, (n,).
        number: Wave number of the grating, in radians a pixel, (n,).
        turn: Direction of the grating, in radians, (n,).
        phase: Phase of the grating, in radians, (n,).
        grain: Amplitude of the noise, (n,).
        offset: Where a leaf's part of the field begins, in the field laid out twice in each direction, (n,) int64.
    """

    field: Tensor
    colour: Tensor
    tint: Tensor
    shade: Tensor
    light: Tensor
    wave: Tensor
    number: Tensor
    turn: Tensor
    phase: Tensor
    grain: Tensor
    offset: Tensor


def _painted(ids: Tensor, leaves: Leaves, paints: Paints) -> Tensor:
    """Picture (C, H, W) in standard units from the number of each pixel's leaf (:func:`leaf_maps`) and the paints."""
    height, width = ids.shape
    none, channels, ids = torch.zeros(1), len(paints.colour), ids.flatten()
    slope = paints.shade / torch.cat([none + 1, leaves['long']])
    table = torch.stack(
        [
            torch.cat([none, leaves['x']]),
            torch.cat([none, leaves['y']]),
            slope * paints.light.cos(),
            slope * paints.light.sin(),
            paints.number * paints.turn.cos(),
            paints.number * paints.turn.sin(),
            paints.phase,
            paints.wave,
            paints.grain,
        ]
    )
    x, y, across, down, wave_x, wave_y, phase, wave, grain = table.index_select(1, ids).view(len(table), height, width)
    dx = _around(torch.arange(width, dtype=torch.float32) - x, width)
    dy = _around(torch.arange(height, dtype=torch.float32).unsqueeze(1) - y, height)
    places = torch.arange(height).unsqueeze(1) * (2 * width) + torch.arange(width)
    places = places.flatten() + paints.offset.index_select(0, ids)
    texture = paints.field.repeat(2, 2).flatten().index_select(0, places).view(height, width).mul_(grain)
    texture.add_(phase.add_(wave_x.mul_(dx)).add_(wave_y.mul_(dy)).sin_().mul_(wave))
    texture = paints.tint.index_select(1, ids).view(channels, height, width).mul_(texture)
    light = across.mul_(dx).add_(down.mul_(dy))
    return paints.colour.index_select(1, ids).view(channels, height, width).add_(texture).add_(light)


def _around(difference: Tensor, length: int) -> Tensor:
    """Differences of positions on a circle of ``length``, -length / 2 .. length / 2."""
    return difference.sub_(torch.round(difference / length).mul_(length))


def _mean_area() -> float:
    """Mean area of a leaf of radius 1, over shapes and ratios of the sides."""
    ratio = (1 + STRETCH) / 2
    slim = math.log(2 / (1 + STRETCH**2)) / (1 - STRETCH)  # mean of 2 r / (1 + r^2)
    corners = sum(n / 2 * math.sin(2 * math.pi / n) for n in _SIDES) / len(_SIDES)
    areas = (math.pi * ratio, 2 * slim, corners * ratio)
    return sum(weight * area for weight, area in zip(SHAPE_WEIGHTS, areas)) / sum(SHAPE_WEIGHTS)


# ---------------------------------------------------------------------- which leaf is seen where
def leaf_maps(pictures: Sequence[Leaves], size: Tuple[int, int]) -> Tensor:
    """Number of the leaf that is seen at each pixel, counted from 1; 0 where none lies.

    Leaves of about one size, of all pictures, are tested together on squares that hold them. The foremost leaf at a
    pixel has the greatest number. Only sums, products and comparisons are used, so that each picture's result does not
    depend on the other pictures.

    Args:
        pictures: One or more, as :meth:`DeadLeaves.leaves` gives them.
        size: (height, width) in pixels.

    Returns:
        Shape (len(pictures), height, width), int64.
    """
    height, width = size
    seen = torch.zeros(len(pictures) * height * width, dtype=torch.int32)
    table = torch.cat([_coefficients(leaves, number * height * width) for number, leaves in enumerate(pictures)], 1)
    side = (2 * table[2]).floor().long() + 1  # pixels that a leaf can reach, in a row
    for least, most in _classes(int(side.max())):
        held = (side > least) & (side <= most)
        for shape, inside in enumerate((_in_ellipse, _in_rectangle, _in_polygon)):
            chosen = (held & (table[4] == shape)).nonzero().flatten()
            for part in chosen.split(max(1, _CHUNK // most**2)):
                _lay(seen, table.index_select(1, part), most, inside, size)
    return seen.view(len(pictures), height, width).long()


def _classes(largest: int) -> Iterator[Tuple[int, int]]:
    """Sides of squares as (side before, side), four an octave from 8 on."""
    before, step = 0, 2
    while before < largest:
        side = 8 if not before else before + step
        yield before, side
        before, step = side, step * 2 if side & (side - 1) == 0 and side > 8 else step


def _coefficients(leaves: Leaves, start: int) -> Tensor:
    """Coefficients of the tests below, one column a leaf; float64, so that numbers and places are exact.

    Rows: centre (x, y), reach, number, shape, first place of the picture, then three to thirteen numbers of the test of
    the shape.
    """
    cos, sin, long, short = leaves['angle'].cos(), leaves['angle'].sin(), leaves['long'], leaves['short']
    count = len(long)
    rows = torch.zeros(6 + 2 * max(_SIDES) + 1, count, dtype=torch.float64)
    rows[:6] = torch.stack(
        [
            leaves['x'].double(),
            leaves['y'].double(),
            long.double(),
            torch.arange(1.0, count + 1, dtype=torch.float64),
            leaves['shape'].double(),
            torch.full((count,), float(start), dtype=torch.float64),
        ]
    )
    ellipse = torch.stack(
        [
            (cos / long).square() + (sin / short).square(),
            2 * cos * sin * (long**-2 - short**-2),
            (sin / long).square() + (cos / short).square(),
        ]
    )
    # the corners reach as far as an ellipse's long half axis does
    corner = long / (long.square() + short.square()).sqrt()
    rectangle = torch.stack(
        [cos / (long * corner), sin / (long * corner), -sin / (short * corner), cos / (short * corner)]
    )
    sides = leaves['sides']
    turn = 2 * math.pi * torch.remainder(torch.arange(max(_SIDES)).unsqueeze(1), sides) / sides
    u, v = turn.cos() / long, turn.sin() / short  # normals of the edges along the leaf's own axes
    polygon = torch.cat([u * cos - v * sin, u * sin + v * cos, (math.pi / sides).cos().unsqueeze(0)])
    for shape, numbers in enumerate((ellipse, rectangle, polygon)):
        rows[6 : 6 + len(numbers)] = torch.where(leaves['shape'] == shape, numbers.double(), rows[6 : 6 + len(numbers)])
    return rows


def _lay(seen: Tensor, leaves: Tensor, side: int, inside: Callable[..., Tensor], size: Tuple[int, int]) -> None:
    """Put leaves (columns of coefficients) into ``seen``, each on a square of ``side`` pixels that holds it."""
    height, width = size
    x, y, reach, number, _, start = leaves[:6].unsqueeze(2)
    left, top = (x - reach).ceil(), (y - reach).ceil()
    steps = torch.arange(side)
    columns, rows = left.long() + steps, top.long() + steps
    columns, rows = torch.remainder(columns, width), torch.remainder(rows, height) * width + start.long()
    dx, dy = (left - x + steps).float().unsqueeze(1), (top - y + steps).float().unsqueeze(2)
    covered = inside(dx, dy, leaves[6:].float().view(len(leaves) - 6, -1, 1, 1))
    places = rows.unsqueeze(2) + columns.unsqueeze(1)
    seen.scatter_reduce_(0, places.flatten(), (covered * number.int().unsqueeze(2)).flatten(), 'amax')


def _in_ellipse(dx: Tensor, dy: Tensor, c: Tensor) -> Tensor:
    return ((c[1] * dx) * dy).add_(c[0] * dx.square()).add_(c[2] * dy.square()) <= 1


def _in_rectangle(dx: Tensor, dy: Tensor, c: Tensor) -> Tensor:
    along, across = c[0] * dx + c[1] * dy, c[2] * dx + c[3] * dy
    return torch.maximum(along.abs_(), across.abs_()) <= 1


def _in_polygon(dx: Tensor, dy: Tensor, c: Tensor) -> Tensor:
    sides = max(_SIDES)
    farthest = c[0] * dx + c[sides] * dy
    for number in range(1, sides):
        torch.maximum(farthest, c[number] * dx + c[sides + number] * dy, out=farthest)
    return farthest <= c[2 * sides]
