# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The samples a student learns from, a bounded number of them."""

from typing import Any, Callable, Dict, Optional, Protocol, Sequence, Tuple

import torch
from torch import Tensor

from psaq_mm.errors import DataError

__all__ = ['FreshPool', 'SamplePool']

POLICIES = ('oldest', 'random', 'easiest')


class SamplePool:
    """Bounded pool of samples of one shape, on the CPU.

    A full pool replaces a sample for each one added. Drawing and replacing take their randomness from a generator
    that is part of the state, so that a run resumes exactly.

    Args:
        capacity: Greatest number of samples.
        replace: Which sample makes room: the 'oldest', a 'random' one, or the 'easiest' (least score).
        dtype: Type samples are stored in; float16 halves the memory.
        seed: Seed of the pool's own generator.

    Raises:
        DataError: On a capacity below 1 or an unknown policy.

    Example:
        >>> pool = SamplePool(capacity=64)
        >>> pool.add(torch.randn(8, 3, 224, 224))
        >>> images, indices = pool.draw(4)
    """

    def __init__(
        self, capacity: int, replace: str = 'oldest', dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> None:
        if capacity < 1:
            raise DataError(f'capacity={capacity} must be at least 1')
        if replace not in POLICIES:
            raise DataError(f'replace={replace!r} must be one of {POLICIES}')
        self.capacity, self.replace, self.dtype = capacity, replace, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self._samples: Optional[Tensor] = None
        self._scores = torch.zeros(capacity)
        self._ages = torch.zeros(capacity, dtype=torch.int64)
        self._size = 0
        self._added = 0

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Tensor:
        """One sample (C, H, W), float32."""
        if not -self._size <= index < self._size:
            raise IndexError(f'sample {index} of a pool of {self._size}')
        return self._samples[: self._size][index].float()

    @property
    def samples(self) -> Tensor:
        """All samples, (len, C, H, W), float32."""
        self._filled()
        return self._samples[: self._size].float()

    @property
    def scores(self) -> Tensor:
        """Last score of each sample, shape (len,)."""
        return self._scores[: self._size].clone()

    def add(self, samples: Tensor, scores: Optional[Tensor] = None) -> Tensor:
        """Adds samples, in place of others where the pool is full.

        Args:
            samples: Shape (B, C, H, W), finite, B no more than the capacity.
            scores: How hard each sample is, shape (B,). Defaults to None, all 0.

        Returns:
            Indices the samples got, shape (B,).

        Raises:
            DataError: If shapes do not fit the pool, or a value is not finite.
        """
        samples = self._checked(samples)
        if len(samples) > self.capacity:
            raise DataError(
                f'{len(samples)} samples do not fit a pool of capacity {self.capacity}; add fewer at a time'
            )
        if self._samples is None:
            self._samples = torch.zeros(self.capacity, *samples.shape[1:], dtype=self.dtype)
        free = torch.arange(self._size, min(self.capacity, self._size + len(samples)))
        indices = torch.cat([free, self._displaced(len(samples) - len(free))])
        self._size += len(free)
        self._ages[indices] = torch.arange(self._added, self._added + len(samples))
        self._added += len(samples)
        self._store(indices, samples, torch.zeros(len(samples)) if scores is None else scores)
        return indices

    def update(self, indices: Tensor, samples: Optional[Tensor] = None, scores: Optional[Tensor] = None) -> None:
        """Writes changed samples or their scores back to where they were drawn from; their age stays.

        Args:
            indices: As :meth:`draw` gave them, shape (B,).
            samples: Shape (B, C, H, W), or None to leave them.
            scores: Shape (B,), or None to leave them.
        """
        self._filled()
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self._size:
            raise DataError(f'indices {indices.tolist()} must be within a pool of {self._size} samples')
        self._store(indices, None if samples is None else self._checked(samples), scores)

    def draw(
        self, batch: int, generator: Optional[torch.Generator] = None, only: Optional[Sequence[int]] = None
    ) -> Tuple[Tensor, Tensor]:
        """Draws different samples with equal probability.

        Args:
            batch: How many, no more than the pool holds.
            generator: Source of randomness, on the CPU. Defaults to None, the pool's own.
            only: Places in the batch, in rising order, whose samples are returned, such as those of one rank; the
                randomness is that of the whole batch. Defaults to None, all.

        Returns:
            Samples (batch, C, H, W), float32 copies, and their indices (batch,).

        Raises:
            DataError: If the pool holds fewer samples.
        """
        self._filled()
        if not 1 <= batch <= self._size:
            raise DataError(f'batch={batch} cannot be drawn from a pool of {self._size} samples; add samples first')
        indices = torch.randperm(self._size, generator=generator or self.generator)[:batch]
        if only is not None:
            indices = indices[list(only)]
        return self._samples[indices].float(), indices

    def state_dict(self) -> Dict[str, Any]:
        """State, to be saved in a checkpoint."""
        return dict(
            samples=None if self._samples is None else self._samples[: self._size].clone(),
            scores=self._scores[: self._size].clone(),
            ages=self._ages[: self._size].clone(),
            added=self._added,
            generator=self.generator.get_state(),
        )

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave.

        Raises:
            DataError: If keys are missing or the samples exceed the capacity.
        """
        missing = {'samples', 'scores', 'ages', 'added', 'generator'} - set(state)
        if missing:
            raise DataError(f'state of a pool lacks {sorted(missing)}; it was not saved by SamplePool')
        samples = state['samples']
        size = 0 if samples is None else len(samples)
        if size > self.capacity:
            raise DataError(f'state holds {size} samples, more than capacity={self.capacity}; raise the capacity')
        self._samples = None
        if samples is not None:
            self._samples = torch.zeros(self.capacity, *samples.shape[1:], dtype=self.dtype)
            self._samples[:size] = samples.to(self.dtype)
        self._scores[:size] = state['scores']
        self._ages[:size] = state['ages']
        self._size, self._added = size, int(state['added'])
        self.generator.set_state(state['generator'].cpu())

    def _displaced(self, count: int) -> Tensor:
        """Indices of the samples that make room for ``count`` new ones."""
        if self.replace == 'random':
            return torch.randperm(self._size, generator=self.generator)[:count]
        order = self._ages if self.replace == 'oldest' else self._scores
        return order[: self._size].argsort(stable=True)[:count]

    def _store(self, indices: Tensor, samples: Optional[Tensor], scores: Optional[Tensor]) -> None:
        for name, values in (('samples', samples), ('scores', scores)):
            if values is not None and len(values) != len(indices):
                raise DataError(f'{len(values)} {name} for {len(indices)} places in the pool; give one each')
        if samples is not None:
            self._samples[indices] = samples.to(self.dtype)
        if scores is not None:
            self._scores[indices] = scores.detach().to('cpu', torch.float32)

    def _checked(self, samples: Tensor) -> Tensor:
        if samples.dim() != 4 or not samples.numel():
            raise DataError(f'samples of shape {tuple(samples.shape)} must be a non-empty (batch, C, H, W)')
        if self._samples is not None and samples.shape[1:] != self._samples.shape[1:]:
            raise DataError(
                f'samples of shape {tuple(samples.shape[1:])} do not fit a pool of '
                f'{tuple(self._samples.shape[1:])}; keep one pool for each size'
            )
        samples = samples.detach().cpu()
        if not bool(torch.isfinite(samples.to(self.dtype)).all()):
            raise DataError(f'samples hold values that are not finite as {self.dtype}; they cannot be learned from')
        return samples

    def _filled(self) -> None:
        if not self._size:
            raise DataError('the pool is empty; add samples first')


class Stream(Protocol):
    """What makes new samples: :class:`psaq_mm.pictures.SampleStream` is one."""

    take: Callable[..., Tensor]
    state_dict: Callable[[], Dict[str, Any]]
    load_state_dict: Callable[[Dict[str, Any]], None]


class FreshPool(SamplePool):
    """A pool of which only a part of each batch is replayed: the rest is made for it and never seen again.

    A replayed sample is learned by heart sooner or later; one that costs next to nothing need not be kept.

    Args:
        capacity: As for :class:`SamplePool`.
        stream: Makes the fresh samples, by number, so that a resumed run goes on with the next one.
        share: Fresh part of a batch, above 0 and at most 1, rounded to whole samples; of a share below 1 at least one
            of two or more is replayed, and one fresh.
        **kwargs: As for :class:`SamplePool`.

    Raises:
        DataError: ``share`` is out of range.

    Example:
        >>> pool = FreshPool(64, SampleStream(PinkNoise(), (224, 224), ImageSpec()), share=1.0)
        >>> images, indices = pool.draw(8)   # 8 pictures that nobody has seen; their indices are -1
    """

    def __init__(self, capacity: int, stream: Stream, share: float = 1.0, **kwargs) -> None:
        super().__init__(capacity, **kwargs)
        if not 0 < share <= 1:
            raise DataError(f'share={share} of fresh samples must be above 0 and at most 1')
        self.stream, self.share, self.made = stream, float(share), 0

    def draw(
        self, batch: int, generator: Optional[torch.Generator] = None, only: Optional[Sequence[int]] = None
    ) -> Tuple[Tensor, Tensor]:
        """Fresh samples and replayed ones, the fresh ones first.

        Args:
            batch: How many; of those to replay no more than the pool holds.
            generator: Of the choice of those that are replayed.
            only: As for :meth:`SamplePool.draw`; other fresh samples are not made.

        Returns:
            Samples (batch, C, H, W), float32, and their indices (batch,), -1 for fresh ones.

        Raises:
            DataError: If the pool holds fewer samples than are to be replayed, or ``batch`` is below 1.
        """
        fresh = min(max(round(self.share * batch), 1), batch if self.share == 1 or batch < 2 else batch - 1)
        own = None if only is None else [place for place in only if place < fresh]
        images = (self.stream.take(fresh) if own is None else self.stream.take(fresh, only=own)).float()
        self.made += fresh
        indices = torch.full((len(images),), -1)
        if fresh == batch:
            return images, indices
        replayed, places = super().draw(
            batch - fresh, generator, None if only is None else [p - fresh for p in only if p >= fresh]
        )
        return torch.cat([images, replayed]), torch.cat([indices, places])

    def state_dict(self) -> Dict[str, Any]:
        """State, to be saved in a checkpoint."""
        return dict(super().state_dict(), stream=self.stream.state_dict(), made=self.made)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self.stream.load_state_dict(state['stream'])
        self.made = int(state['made'])
