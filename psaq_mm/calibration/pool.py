# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Pictures that a student learns from: a bounded number of them, drawn again and again."""

from typing import Any, Dict, Mapping, Optional, Sequence

import torch
from torch import Tensor

from psaq_mm.errors import DataError

__all__ = ['SamplePool']


class SamplePool:
    """Bounded pool of pictures of one shape, float32, on the CPU.

    In a full pool each new picture replaces a random one, so that the student does not forget. The pool has a random
    generator of its own, which is part of the state, so that a run resumes exactly.

    Args:
        capacity: Greatest number of pictures.
        seed: Seed of the choice of those that are replaced.

    Raises:
        DataError: On a capacity below 1.

    Example:
        >>> pool = SamplePool(capacity=64)
        >>> pool.add(torch.randn(8, 3, 224, 224))
        >>> images = pool.draw(4, torch.Generator().manual_seed(0))
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        if capacity < 1:
            raise DataError(f'capacity={capacity} must be at least 1')
        self.capacity = capacity
        self.generator = torch.Generator().manual_seed(seed)
        self._samples: Optional[Tensor] = None  # of the whole capacity, so that adding copies no pool
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def samples(self) -> Tensor:
        """All pictures, (len, C, H, W)."""
        return self._stored()[: self._size]

    def add(self, samples: Tensor) -> None:
        """Add pictures (B, C, H, W), in place of random ones where the pool is full.

        Raises:
            DataError: The shape does not fit, a value is not finite, or B is above the capacity.
        """
        samples = self._checked(samples)
        if self._samples is None:
            self._samples = torch.zeros(self.capacity, *samples.shape[1:])
        free = torch.arange(self._size, min(self.capacity, self._size + len(samples)))
        replaced = torch.randperm(self._size, generator=self.generator)[: len(samples) - len(free)]
        self._size += len(free)
        self._samples[torch.cat([free, replaced])] = samples

    def draw(self, count: int, generator: torch.Generator, only: Optional[Sequence[int]] = None) -> Tensor:
        """Different pictures, each with equal probability.

        Args:
            count: How many, no more than the pool holds.
            generator: Source of randomness, on the CPU.
            only: Places in the batch, in rising order, whose pictures are returned, such as those of one rank; the
                randomness is that of the whole batch. Defaults to None, all.

        Returns:
            Copies, (count or len(only), C, H, W).

        Raises:
            DataError: The pool holds fewer.
        """
        samples = self._stored()
        if not 1 <= count <= self._size:
            raise DataError(f'batch={count} cannot be drawn from a pool of {self._size} samples; add samples first')
        indices = torch.randperm(self._size, generator=generator)[:count]
        return samples[indices if only is None else indices[list(only)]]

    def state_dict(self) -> Dict[str, Any]:
        """State, to be saved in a checkpoint."""
        return dict(samples=self.samples.clone() if self._size else None, generator=self.generator.get_state())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave. Other keys, which earlier releases wrote, are not read.

        Raises:
            DataError: Keys are missing, or the samples exceed the capacity.
        """
        missing = {'samples', 'generator'} - set(state)
        if missing:
            raise DataError(f'state of a pool lacks {sorted(missing)}; it was not saved by SamplePool')
        samples = state['samples']
        size = 0 if samples is None else len(samples)
        if size > self.capacity:
            raise DataError(f'state holds {size} samples, more than capacity={self.capacity}; raise the capacity')
        self._samples, self._size = None, size
        if samples is not None:
            self._samples = torch.zeros(self.capacity, *samples.shape[1:])
            self._samples[:size] = samples
        self.generator.set_state(state['generator'].cpu())

    def _checked(self, samples: Tensor) -> Tensor:
        if samples.dim() != 4 or not samples.numel():
            raise DataError(f'samples of shape {tuple(samples.shape)} must be a non-empty (batch, C, H, W)')
        if self._samples is not None and samples.shape[1:] != self._samples.shape[1:]:
            raise DataError(
                f'samples of shape {tuple(samples.shape[1:])} do not fit a pool of '
                f'{tuple(self._samples.shape[1:])}; keep one pool for each size'
            )
        if len(samples) > self.capacity:
            raise DataError(
                f'{len(samples)} samples do not fit a pool of capacity {self.capacity}; add fewer at a time'
            )
        samples = samples.detach().to('cpu', torch.float32)
        if not bool(torch.isfinite(samples).all()):
            raise DataError('samples hold values that are not finite; they cannot be learned from')
        return samples

    def _stored(self) -> Tensor:
        if self._samples is None or not self._size:
            raise DataError('the pool is empty; add samples first')
        return self._samples
