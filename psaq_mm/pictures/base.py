# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The interface of all sources of samples: pictures by number, each made from the seed and its number alone."""

from typing import Any, Callable, ClassVar, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from psaq_mm.errors import DataError
from psaq_mm.pictures.image_spec import ImageSpec
from psaq_mm.progress import stage

__all__ = ['SampleStream', 'Source', 'checked_size', 'mixed', 'number_seed', 'of_rank']

Make = Callable[[int], Tensor]
"""Makes ``count`` synthesized samples, (count, C, H, W)."""

_MASK = (1 << 64) - 1

_TOGETHER = 8
"""Pictures that a stream draws in one call of its source. Each depends on its number alone."""


def mixed(*parts: int) -> int:
    """Hash integers to one of 64 bits (the finalizer of SplitMix64)."""
    value = 0
    for part in parts:
        value = (value + (int(part) & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
        value ^= value >> 31
    return value


def number_seed(seed: int, number: int) -> int:
    """Seed of one sample: 32 bits, all that torch's CPU generator uses; different for every number of a seed."""
    value = (int(number) ^ mixed(seed)) & 0xFFFFFFFF
    # Murmur's finalizer: one to one on 32 bits.
    value = ((value ^ value >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    value = ((value ^ value >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return value ^ value >> 16


def of_rank(numbers: Sequence[int], rank: int = 0, world_size: int = 1) -> Sequence[int]:
    """One rank's part of a batch. The parts of all ranks, joined in order, are the batch.

    Raises:
        DataError: There is no such rank.
    """
    if not 0 <= rank < world_size:
        raise DataError(f'rank={rank} must be within 0 .. world_size - 1, and world_size is {world_size}')
    return numbers[len(numbers) * rank // world_size : len(numbers) * (rank + 1) // world_size]


def checked_size(batch: int, size: Tuple[int, int]) -> Tuple[int, int]:
    """Check that the number of pictures and (height, width) are positive; returns (height, width)."""
    height, width = size
    if batch < 1 or height < 1 or width < 1:
        raise DataError(f'batch={batch} and size={size} must be positive')
    return height, width


class Source:
    """Pictures by number. Number 7 of a seed is the same picture alone and in any batch, on one rank and on many.

    A subclass has :meth:`picture`, or :meth:`pictures` where pictures are not made one by one. Register it with
    :func:`psaq_mm.pictures.register_source`.

    Args:
        seed: Added to the run's seed, so that two sources of one class can differ.
    """

    fixed: ClassVar[Tuple[str, ...]] = ()
    """Former settings that are constants now: a config that gives one is refused with a message of its own."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    @property
    def procedural(self) -> bool:
        """Whether no synthesis is needed, so that every batch of the student can be made anew."""
        return True

    def procedural_part(self) -> Optional['Source']:
        """The part of the source that needs no synthesis; None if all of it does."""
        return self if self.procedural else None

    @property
    def paths(self) -> List[str]:
        """Files and folders that the source reads."""
        return []

    def open(self, model: Any, config: Any, seed: int) -> None:
        """Prepare for a run; called once, before the first picture. Procedural sources need nothing.

        Args:
            model: The network that gets the pictures, with its ``data_preprocessor``.
            config: The run's config.
            seed: The run's seed.
        """

    def picture(self, size: Tuple[int, int], image_spec: ImageSpec, generator: torch.Generator) -> Tensor:
        """One picture (C, height, width) in standard units (:class:`~psaq_mm.pictures.ImageSpec`), not clamped yet."""
        raise NotImplementedError

    def pictures(self, numbers: Sequence[int], size: Tuple[int, int], image_spec: ImageSpec, seed: int) -> Tensor:
        """Pictures (len(numbers), C, height, width) in standard units; each has a random generator of its own.

        Args:
            numbers: As for :meth:`draw`.
            size: As for :meth:`draw`.
            image_spec: As for :meth:`draw`.
            seed: The run's and the source's seed in one.
        """
        generator = torch.Generator()
        return torch.stack(
            [self.picture(size, image_spec, generator.manual_seed(number_seed(seed, n))) for n in numbers]
        )

    def draw(
        self,
        numbers: Sequence[int],
        size: Tuple[int, int],
        image_spec: ImageSpec,
        seed: int = 0,
        generated: Optional[Make] = None,
    ) -> Tensor:
        """Pictures by their numbers.

        Args:
            numbers: One or more numbers in any order, each 0 .. 2**32 - 1.
            size: (height, width) in pixels.
            image_spec: Channels and range of the model's input.
            seed: Seed of the run.
            generated: Makes synthesized samples, for sources that contain :class:`Generated`.

        Returns:
            Shape (len(numbers), C, height, width), float32, on the CPU, in the model's units and within its valid
            range.

        Raises:
            DataError: No numbers, or a size that is not positive.
        """
        values = self.pictures(numbers, checked_size(len(numbers), size), image_spec, mixed(seed, self.seed))
        return image_spec.clamp(image_spec.from_standard(values))

    def __call__(
        self,
        batch: int,
        size: Tuple[int, int],
        image_spec: ImageSpec,
        generator: Optional[torch.Generator] = None,
        device: Union[str, torch.device, None] = None,
    ) -> Tensor:
        """Pictures of the numbers from 0 on, under a seed that is drawn from ``generator``: the start of a synthesis.

        Args:
            batch: Number of pictures.
            size: (height, width) in pixels.
            image_spec: Channels and range of the model's input.
            generator: Source of randomness, on the CPU. Defaults to None, the seed 0.
            device: Device of the result.

        Returns:
            Shape (batch, C, height, width), float32, in the model's units and within its valid range.
        """
        checked_size(batch, size)
        seed = 0 if generator is None else int(torch.randint(0, 2**62, (), generator=generator))
        return self.draw(range(batch), size, image_spec, seed).to(device)

    def __repr__(self) -> str:
        settings = ', '.join(f'{k}={v!r}' for k, v in vars(self).items() if not k.startswith('_'))
        return f'{type(self).__name__}({settings})'


class SampleStream:
    """The pictures of a source in the order of their numbers, each once.

    Args:
        source: Source of the pictures.
        size: (height, width) in pixels.
        image_spec: Channels and range of the model's input.
        seed: Seed of the run.
        name: Streams of one source and seed with different names give different pictures.

    Example:
        >>> stream = SampleStream(PinkNoise(), (224, 224), ImageSpec(), seed=0)
        >>> stream.take(8).shape, stream.position
        (torch.Size([8, 3, 224, 224]), 8)
    """

    def __init__(
        self, source: Source, size: Tuple[int, int], image_spec: ImageSpec, seed: int = 0, name: str = ''
    ) -> None:
        self.source, self.image_spec = source, image_spec
        self.size = (int(size[0]), int(size[1]))
        self.seed = mixed(seed, *name.encode())
        self.position = 0

    def take(
        self,
        count: int,
        generated: Optional[Make] = None,
        rank: int = 0,
        world_size: int = 1,
        only: Optional[Sequence[int]] = None,
    ) -> Tensor:
        """The next ``count`` pictures, one rank's part of them (:func:`of_rank`), or some of them.

        Args:
            count: Pictures of all ranks together, 1 or more.
            generated: As for :meth:`Source.draw`.
            rank: The rank whose part is returned. Every rank asks for the same counts: positions stay equal.
            world_size: Number of ranks.
            only: Places among the ``count``, from 0, to return instead of a rank's part; may be empty.
        """
        if count < 1:
            raise DataError(f'{count} pictures cannot be taken from a source: take 1 or more')
        numbers: Sequence[int] = range(self.position, self.position + count)
        numbers = of_rank(numbers, rank, world_size) if only is None else [numbers[place] for place in only]
        self.position += count
        if not numbers:
            return torch.empty(0, self.image_spec.channels, *self.size)
        if not self.source.procedural:
            return self.source.draw(numbers, self.size, self.image_spec, self.seed, generated)
        pictures = torch.empty(len(numbers), self.image_spec.channels, *self.size)
        with stage('Drawing pictures', len(numbers)) as drawing:
            for start in range(0, len(numbers), _TOGETHER):
                part = numbers[start : start + _TOGETHER]
                drawn = self.source.draw(part, self.size, self.image_spec, self.seed, generated)
                pictures[start : start + len(part)] = drawn
                drawing.advance(len(part))
        return pictures

    def state_dict(self) -> Dict[str, Any]:
        """State, to be saved in a checkpoint."""
        return dict(position=self.position)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""
        self.position = int(state['position'])
