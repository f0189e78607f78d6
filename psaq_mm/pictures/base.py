# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a source of samples is: pictures by number, each made from the seed and its number alone."""

from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from psaq_mm.errors import DataError
from psaq_mm.pictures.image_spec import ImageSpec

__all__ = ['Generated', 'SampleStream', 'Source', 'checked_size', 'mixed', 'number_seed', 'of_rank']

Make = Callable[[int], Tensor]
"""A count to as many synthesized samples, (count, C, H, W)."""

_MASK = (1 << 64) - 1


def mixed(*parts: int) -> int:
    """Integers to one of 64 bits in which every bit of each counts (the finalizer of SplitMix64)."""
    value = 0
    for part in parts:
        value = (value + (int(part) & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
        value ^= value >> 31
    return value


def number_seed(seed: int, number: int) -> int:
    """Seed of one sample, 32 bits: all that torch's generator on the CPU takes in. Of one ``seed`` no two numbers share
    one.
    """
    value = (int(number) ^ mixed(seed)) & 0xFFFFFFFF
    # Murmur's finalizer: one to one on 32 bits.
    value = ((value ^ value >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    value = ((value ^ value >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return value ^ value >> 16


def of_rank(numbers: Sequence[int], rank: int = 0, world_size: int = 1) -> Sequence[int]:
    """The part of a batch that is one rank's; the parts of all ranks, one after the other, are the batch.

    Raises:
        DataError: There is no such rank.
    """
    if not 0 <= rank < world_size:
        raise DataError(f'rank={rank} must be within 0 .. world_size - 1, and world_size is {world_size}')
    return numbers[len(numbers) * rank // world_size : len(numbers) * (rank + 1) // world_size]


def checked_size(batch: int, size: Tuple[int, int]) -> Tuple[int, int]:
    """(height, width), where they and the number of pictures are positive."""
    height, width = size
    if batch < 1 or height < 1 or width < 1:
        raise DataError(f'batch={batch} and size={size} must be positive')
    return height, width


def _drawn(generator: Optional[torch.Generator]) -> int:
    return 0 if generator is None else int(torch.randint(0, 2**62, (), generator=generator))


class Source:
    """Pictures by number. Number 7 of a seed is the same picture alone and in any batch, on one rank and on many.

    A source of one's own has :meth:`picture`; one whose pictures are not made one by one has :meth:`pictures` instead.

    Args:
        seed: Beside the run's seed, for two sources of one kind that are to differ.
    """

    procedural = True
    """Whether pictures are made without a model: such a source can make each of the student's batches anew."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def picture(self, size: Tuple[int, int], image_spec: ImageSpec, generator: torch.Generator) -> Tensor:
        """One picture, (C, height, width), in standard units (:class:`~psaq_mm.pictures.ImageSpec`), range not yet
        kept.
        """
        raise NotImplementedError

    def pictures(self, numbers: Sequence[int], size: Tuple[int, int], image_spec: ImageSpec, seed: int) -> Tensor:
        """The pictures of some numbers, (len(numbers), C, height, width), as :meth:`picture` makes one; ``seed`` is the
        run's and the source's in one. Here each has a generator to itself, of its own seed.
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
        """The pictures of some numbers.

        Args:
            numbers: 0 or more, in any order, each 0 .. 2**32 - 1.
            size: (height, width) in pixels.
            image_spec: Channels and range of the model's input.
            seed: Of the run.
            generated: Makes synthesized samples, for sources that hold :class:`Generated`.

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
        """``batch`` pictures out of a random generator, as :func:`psaq_mm.pictures.gaussian_noise` is called: what a
        synthesis begins with. Here the generator gives the seed, and the pictures are those of the numbers from 0 on.
        """
        checked_size(batch, size)
        return self.draw(range(batch), size, image_spec, _drawn(generator)).to(device)

    def _of(self, generator: Optional[torch.Generator]) -> Optional[torch.Generator]:
        """The generator itself, or one of its own for a source that has a seed."""
        return (
            torch.Generator().manual_seed(number_seed(mixed(_drawn(generator), self.seed), 0))
            if self.seed
            else generator
        )

    def __repr__(self) -> str:
        settings = ', '.join(f'{k}={v!r}' for k, v in vars(self).items() if not k.startswith('_'))
        return f'{type(self).__name__}({settings})'


class Generated(Source):
    """Samples out of the teacher (:class:`~psaq_mm.psaq_vit.SampleGenerator`), as a part of a mixture."""

    procedural = False

    def draw(
        self,
        numbers: Sequence[int],
        size: Tuple[int, int],
        image_spec: ImageSpec,
        seed: int = 0,
        generated: Optional[Make] = None,
    ) -> Tensor:
        """``generated(len(numbers))``: what is synthesized depends on the model and on the step, not on a number.

        Raises:
            DataError: No model is there to make them.
        """
        if generated is None:
            raise DataError(
                'generated samples are made by a run, which has the teacher: take a procedural source here, such as '
                "dict(type='psaq_mm.PinkNoise')"
            )
        return generated(len(numbers))


class SampleStream:
    """The pictures of a source in the order of their numbers, each once.

    Args:
        source: Where they come from.
        size: (height, width) in pixels.
        image_spec: Channels and range of the model's input.
        seed: Of the run.
        name: Two streams of one source and seed give other pictures where their names differ.

    Example:
        >>> stream = SampleStream(PinkNoise(), (224, 224), ImageSpec(), seed=0)
        >>> stream.take(8).shape, stream.position
        (torch.Size([8, 3, 224, 224]), 8)
    """

    def __init__(
        self, source: Source, size: Tuple[int, int], image_spec: ImageSpec, seed: int = 0, name: str = ''
    ) -> None:
        self.source, self.size, self.image_spec = source, tuple(size), image_spec
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
        """The next ``count`` pictures, or one rank's part of them, as :func:`of_rank` has it, or some of them.

        Args:
            count: Of all ranks together, 1 or more.
            generated: As for :meth:`Source.draw`.
            rank, world_size: Every rank asks for the same counts, so that all go on at the same number.
            only: Which of the ``count``, from 0, instead; may be none.
        """
        if count < 1:
            raise DataError(f'{count} pictures cannot be taken from a source: take 1 or more')
        numbers = range(self.position, self.position + count)
        numbers = of_rank(numbers, rank, world_size) if only is None else [numbers[place] for place in only]
        self.position += count
        if not numbers:
            return torch.empty(0, self.image_spec.channels, *self.size)
        return self.source.draw(numbers, self.size, self.image_spec, self.seed, generated)

    def state_dict(self) -> Dict[str, Any]:
        """State, to be saved in a checkpoint."""
        return dict(position=self.position)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""
        self.position = int(state['position'])
