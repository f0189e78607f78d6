# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Scenes: a few large shapes with wavy outlines before a background, covered with patterns of small random networks."""

import math
from typing import Callable, ClassVar, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor

from psaq_mm.pictures.base import Source, mixed, number_seed
from psaq_mm.pictures.image_spec import ImageSpec
from psaq_mm.pictures.noise import (
    blurred,
    bounds,
    correlated,
    odd_side,
    power_law_noise,
    row_means,
    softened,
    uniform_in,
)
from psaq_mm.pictures.registry import register_source

__all__ = ['Scenes', 'outline', 'pattern_maps']

OBJECTS = (3, 16)
"""(least, greatest) number of shapes."""
ROUGHNESS = 0.5
"""Greatest amplitude of an outline's waves, relative to its radius."""
TEXTURE = (0.05, 0.8)
"""(least, greatest) spread of a surface's pattern, in standard units."""
SHADING = 0.8
"""Greatest difference of brightness across half the picture, in standard units."""
COLOR_CORRELATION = (0.3, 0.95)
"""(least, greatest) correlation of a pattern's channels."""
CONTRAST = (0.6, 1.3)
"""(least, greatest) spread of the whole picture, in standard units."""

_ACTIVATIONS: Tuple[Callable[[Tensor], Tensor], ...] = (
    torch.sin,
    torch.cos,
    torch.tanh,
    torch.abs,
    torch.relu,
    torch.frac,
    lambda x: torch.sin(3 * x),
    lambda x: torch.exp(-x * x),
    lambda x: x,
)
_WIDTH = 12
"""Units of a layer of the random network."""
_EXTENT = (0.8, 12.0)
"""Range of the coordinates over the shorter side: the greater, the finer the pattern."""
_SHARED = 16
"""As many pictures, by number, share their surfaces, because surfaces take most of the time."""
_NETWORKS = 4
"""Random networks whose patterns those pictures share."""
_ANGLES = 256
"""Directions in which the radius of an outline is stored."""


@register_source('scenes')
class Scenes(Source):
    """A few objects before a background, with outlines and surfaces of many kinds.

    Dead leaves cover the whole picture with shapes of every size, and a classifier takes them all for the same few
    classes.

    Surfaces are compositional patterns: a small network with random weights maps the coordinates of a pixel to its
    colour (Stanley, Compositional pattern producing networks, Genetic Programming and Evolvable Machines 8, 2007), here
    on coordinates that smooth noise bends. That pictures of random programs teach more than dead leaves: Baradad et
    al., Procedural image programs for representation learning, arXiv 2211.16412. The composition is this project's.

    Args:
        radius: (least, greatest) mean radius, as a share of the shorter side.
        color_blur: As for :class:`DeadLeaves`.
        seed: As for :class:`Source`.

    Raises:
        DataError: A setting is out of range.

    Example:
        >>> Scenes().draw(range(8), (224, 224), ImageSpec()).shape
        torch.Size([8, 3, 224, 224])
    """

    fixed: ClassVar[Tuple[str, ...]] = tuple('objects roughness texture shading color_correlation contrast'.split())

    def __init__(self, radius: Sequence[float] = (0.05, 0.4), color_blur: int = 1, seed: int = 0) -> None:
        super().__init__(seed)
        self.radius = bounds('radius', radius, 0.005, 1.0)
        self.color_blur = odd_side('color_blur', color_blur)

    def pictures(self, numbers: Sequence[int], size: Tuple[int, int], image_spec: ImageSpec, seed: int) -> Tensor:
        """See :meth:`Source.pictures`."""
        generator = torch.Generator()
        pictures = torch.empty(len(numbers), image_spec.channels, *size)
        for group in sorted({number // _SHARED for number in numbers}):
            surfaces = self._surfaces(
                size, image_spec.channels, generator.manual_seed(number_seed(mixed(seed, 1), group))
            )
            for place, number in enumerate(numbers):
                if number // _SHARED == group:
                    scene = self._scene(surfaces, generator.manual_seed(number_seed(seed, number)))
                    pictures[place] = softened(scene, self.color_blur)
        return pictures

    def _scene(self, surfaces: Tensor, generator: torch.Generator) -> Tensor:
        """One picture, (C, H, W), in standard units."""
        height, width = surfaces.shape[2:]
        least, most = OBJECTS
        y, x = _coordinates((height, width))
        everywhere = slice(0, height), slice(0, width)
        picture = blurred(
            self._surface(surfaces, y, x, everywhere, generator), 2 * int(torch.randint(8, (), generator=generator)) + 1
        )
        for _ in range(least + int(torch.randint(most - least + 1, (), generator=generator))):
            shape = outline(
                uniform_in((0, float(y[-1])), generator),
                uniform_in((0, float(x[-1])), generator),
                self._radius(generator),
                uniform_in((0.35, 1.0), generator),
                ROUGHNESS,
                generator,
            )
            rows, columns = (_reached(axis.flatten(), at, shape.reach) for axis, at in ((y, shape.y), (x, shape.x)))
            surface = self._surface(surfaces, y, x, (rows, columns), generator)
            part = picture[:, rows, columns]
            part.copy_(torch.where(shape.covers(y[rows], x[columns]), surface, part))
        picture = blurred(picture, 3) if uniform_in((0, 1), generator) < 0.5 else picture
        picture = picture - row_means(picture).view(-1, 1, 1)
        spread = row_means(picture.square().unsqueeze(0))[0].sqrt().clamp(min=0.01)  # a picture of one colour stays one
        return picture * (uniform_in(CONTRAST, generator) / spread) + uniform_in((-0.6, 0.6), generator)

    def _radius(self, generator: torch.Generator) -> float:
        low, high = (math.log(r) for r in self.radius)
        return math.exp(uniform_in((low, high), generator))

    def _surfaces(self, size: Tuple[int, int], channels: int, generator: torch.Generator) -> Tensor:
        """Patterns and noise that the objects of some pictures share, (n, C, H, W); zero mean and unit spread each."""
        patterns = [pattern_maps(size, 2, channels, COLOR_CORRELATION, generator) for _ in range(_NETWORKS)]
        grain = [power_law_noise(1, size, uniform_in((0.6, 1.6), generator), generator) for _ in range(2)]
        return torch.cat([*patterns, torch.stack(grain).expand(-1, channels, -1, -1)])

    def _surface(
        self, surfaces: Tensor, y: Tensor, x: Tensor, part: Tuple[slice, slice], generator: torch.Generator
    ) -> Tensor:
        """A random piece of one of the surfaces for some rows and columns of the picture, (C, rows, columns).

        It has a random colour, and light that falls off in a random direction.
        """
        colour = correlated(torch.randn(surfaces.shape[1], generator=generator), 0.75)
        which, *moved = torch.rand(3, generator=generator).tolist()
        pattern = surfaces[int(which * len(surfaces))]
        for axis, (piece, share) in enumerate(zip(part, moved), 1):
            length = piece.stop - piece.start
            pattern = pattern.narrow(axis, int(share * (pattern.shape[axis] - length + 1)), length)
        turn, slope = uniform_in((0, 2 * math.pi), generator), 2 * uniform_in((0, SHADING), generator)
        light = (y[part[0]] - 0.5) * (slope * math.sin(turn)) + (x[part[1]] - 0.5) * (slope * math.cos(turn))
        return (pattern * uniform_in(TEXTURE, generator)).add_(colour[:, None, None]).add_(light)


def _coordinates(size: Tuple[int, int]) -> Tuple[Tensor, Tensor]:
    """Coordinates y (H, 1) and x (W,) of the centres of the pixels; the shorter side goes from 0 to 1."""
    height, width = size
    return (torch.arange(height) + 0.5).unsqueeze(1) / min(size), (torch.arange(width) + 0.5) / min(size)


def _reached(places: Tensor, middle: float, reach: float) -> slice:
    """Slice of the sorted coordinates that are within ``reach`` of the middle."""
    first, last = torch.searchsorted(places, torch.tensor([middle - reach, middle + reach])).tolist()
    return slice(first, last)


# ---------------------------------------------------------------------- patterns
def pattern_maps(
    size: Tuple[int, int], count: int, channels: int, color_correlation: Sequence[float], generator: torch.Generator
) -> Tensor:
    """Patterns of one random network of the coordinates; each colours the units of its last layer in another way.

    Args:
        size: (height, width) in pixels.
        count: Number of patterns.
        channels: Channels of each.
        color_correlation: (least, greatest) correlation of any two channels.
        generator: On the CPU.

    Returns:
        (count, channels, height, width), float32, zero mean a channel and unit spread a pattern.
    """
    (y, x), extent = _coordinates(size), math.exp(uniform_in([math.log(s) for s in _EXTENT], generator))
    bent = power_law_noise(2, size, uniform_in((1.9, 2.6), generator), generator) * uniform_in((0.0, 0.3), generator)
    middle = torch.rand(2, generator=generator).tolist()
    across, down = ((axis + way - at) * extent for axis, way, at in zip((x, y), bent, middle))
    turns = int(torch.randint(1, 7, (), generator=generator))
    inputs = [across, down, (across.square() + down.square()).sqrt(), torch.sin(turns * torch.atan2(down, across))]
    if uniform_in((0, 1), generator) < 0.5:
        inputs += list(power_law_noise(2, size, uniform_in((1.6, 2.6), generator), generator))
    units = torch.stack(inputs).flatten(1)
    for _ in range(int(torch.randint(2, 5, (), generator=generator))):
        weight = torch.randn(_WIDTH, len(units), generator=generator) / len(units) ** 0.5
        units = weight @ units + torch.randn(_WIDTH, 1, generator=generator)
        kinds = torch.randint(len(_ACTIVATIONS), (_WIDTH,), generator=generator).tolist()
        units = _standard(torch.stack([_ACTIVATIONS[kind](row) for kind, row in zip(kinds, units)]))
    coloured = []
    for _ in range(count):
        colours = correlated(
            torch.randn(channels, _WIDTH, generator=generator), uniform_in(color_correlation, generator)
        )
        coloured.append(colours @ units / _WIDTH**0.5)
    maps = torch.stack(coloured)
    maps = maps - row_means(maps.flatten(0, 1)).view(count, channels, 1)
    return (maps / row_means(maps.square()).view(count, 1, 1).sqrt().clamp(min=1e-6)).view(count, channels, *size)


def _standard(rows: Tensor) -> Tensor:
    """Rows of zero mean and unit spread; rows that hardly vary are not amplified, they would be rounding errors."""
    rows = rows - rows.mean(1, keepdim=True)
    return rows / rows.square().mean(1, keepdim=True).sqrt().clamp(min=0.1)


# ---------------------------------------------------------------------- shapes
class Outline(NamedTuple):
    """A shape: its middle and its radius in :data:`_ANGLES` directions, in shorter sides; turned, squeezed."""

    y: float
    x: float
    radii: Tensor
    turn: float
    squeeze: float

    @property
    def reach(self) -> float:
        """Distance of its farthest point from the middle."""
        return float(self.radii.max())

    def covers(self, y: Tensor, x: Tensor) -> Tensor:
        """Whether points are inside: ``y`` (H, 1) and ``x`` (W,) to (H, W), bool."""
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        dx, dy = x - self.x, y - self.y
        along, aside = dx * cos + dy * sin, (dy * cos - dx * sin) / self.squeeze
        places = ((torch.atan2(aside, along) / (2 * math.pi) + 0.5) * _ANGLES).long().clamp_(max=_ANGLES - 1)
        return along.square() + aside.square() < self.radii.square()[places]


def outline(y: float, x: float, radius: float, squeeze: float, roughness: float, generator: torch.Generator) -> Outline:
    """A closed curve around (``y``, ``x``): a circle with two to eight waves; shorter waves are weaker."""
    waves = int(torch.randint(2, 9, (), generator=generator))
    order = torch.arange(1.0, waves + 1).unsqueeze(1)
    phase, amount = torch.rand(2, waves, 1, generator=generator)
    angles = (torch.arange(_ANGLES) + 0.5) * (2 * math.pi / _ANGLES)
    swing = (roughness * amount / order**0.8 * torch.cos(order * angles + 2 * math.pi * phase)).sum(0)
    return Outline(y, x, radius * (1 + swing).clamp(min=0.05), uniform_in((0, math.pi), generator), squeeze)
