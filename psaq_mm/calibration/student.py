# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A student that learns its teacher on pictures: the pool, the rounds that renew it, and the student's steps."""

import contextlib
import dataclasses
from typing import Any, Callable, ContextManager, Dict, Mapping, NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from psaq_mm.calibration.calibration import Calibration
from psaq_mm.calibration.discrepancy import normalized_l1
from psaq_mm.calibration.network import Network
from psaq_mm.calibration.pool import SamplePool
from psaq_mm.errors import ConfigError, DataError
from psaq_mm.pictures import SampleStream
from psaq_mm.quantization import hold_weights
from psaq_mm.ranks import WholeBatch, broadcast_, gathered, own_part, ranks, sum_
from psaq_mm.settings import Settings, setting

__all__ = ['StepLosses', 'StudentTraining', 'TrainingSettings', 'take_pictures']


@dataclasses.dataclass(frozen=True)
class TrainingSettings(Settings):
    """What a student learns from, and what it learns."""

    pool_size: int = setting(128, 'Pictures kept. In a full pool new ones replace random ones.')
    evolve_every: int = setting(
        50, 'Student steps between two rounds of new pictures; 0: the first pictures are the only ones.'
    )
    evolve_samples: int = setting(16, 'New pictures of a round.')
    reobserve: bool = setting(True, 'Whether ranges are set anew after each round, on pictures of the pool.')
    augment: bool = setting(True, 'Whether the student sees pictures of the pool flipped and rolled at random.')
    logits_weight: float = setting(
        0.0,
        "Weight of the Kullback-Leibler divergence of a classifier's probabilities (Hinton et al., arXiv 1503.02531, "
        'temperature 1), beside the discrepancy. 0 leaves it out.',
    )

    def __post_init__(self) -> None:
        if not 0 <= self.logits_weight < float('inf'):
            raise ConfigError(f'logits_weight={self.logits_weight} must be 0 (off) or more')
        for name in ('pool_size', 'evolve_samples'):
            if getattr(self, name) < 1:
                raise ConfigError(f'{name}={getattr(self, name)} must be at least 1')
        if self.evolve_every < 0:
            raise ConfigError(f'evolve_every={self.evolve_every} must be 0 (never) or more')
        if self.evolve_every and self.pool_size < self.evolve_samples:
            raise ConfigError(
                f'pool_size={self.pool_size} is smaller than evolve_samples={self.evolve_samples}: '
                'make it at least as large'
            )


class StepLosses(NamedTuple):
    """Losses of one student step on the whole batch, scalars without gradient, the same on every rank.

    Attributes:
        loss: What the student's weights go down.
        discrepancy: The part of it that compares feature maps.
    """

    loss: Tensor
    discrepancy: Tensor


def take_pictures(stream: SampleStream, count: int) -> Tensor:
    """The next ``count`` pictures, (count, C, H, W), the same on every rank: each rank makes a part of them."""
    if ranks()[1] == 1:
        return stream.take(count)
    if count < ranks()[1]:
        return broadcast_(stream.take(count))
    part = own_part(count)
    return gathered(stream.take(count, only=range(part.start, part.stop)), count)


class StudentTraining:
    """Trains a calibrated student on pictures against its frozen teacher.

    In a distributed run every rank holds the whole pool and makes every random choice, and works on its part of each
    batch: the result is that of one rank with batches as many times as large.

    Args:
        teacher: Full precision, frozen.
        calibration: Of the student. Its settings give the batch size, its generator the random choices.
        stream: The first pictures and those of later rounds.
        settings: See :class:`TrainingSettings`.
        fresh: Makes each batch of the student anew, in place of the pool: a picture that comes again and again is
            learned by heart sooner or later. Defaults to None, batches are drawn from the pool.
        seed: Of the pool.

    Attributes:
        latest: The newest pictures, those of the last round; None after :meth:`load_state_dict`.
        rounds: How often pictures came into the pool.
        fresh_samples: How many pictures ``fresh`` has made.
    """

    def __init__(
        self,
        teacher: Network,
        calibration: Calibration,
        stream: SampleStream,
        settings: Optional[TrainingSettings] = None,
        *,
        fresh: Optional[SampleStream] = None,
        seed: int = 0,
    ) -> None:
        self.teacher, self.calibration, self.settings = teacher, calibration, settings or TrainingSettings()
        self.stream, self.fresh, self.fresh_samples = stream, fresh, 0
        self.student, self.random = calibration.student, calibration.random
        if self.settings.pool_size < calibration.settings.calibration_samples:
            raise ConfigError(
                f'pool_size={self.settings.pool_size} is smaller than '
                f'calibration_samples={calibration.settings.calibration_samples}: make it at least as large'
            )
        self.pool = SamplePool(self.settings.pool_size, seed)
        self.latest: Optional[Tensor] = None
        self.rounds = 0

    # ------------------------------------------------------------------ pictures
    def pictures(self, count: int) -> Tensor:
        """``count`` new pictures, (count, C, H, W) on the CPU."""
        return take_pictures(self.stream, count)

    def prepare(self, pictures: Optional[Tensor] = None) -> None:
        """Calibrate the student on the first pictures, which the pool keeps.

        Args:
            pictures: (n, C, H, W), normalized, n within the pool's size. Defaults to None, taken from the stream.
        """
        first = self.pictures(self.calibration.settings.calibration_samples) if pictures is None else pictures
        self._keep(first)
        self.calibration.run(first)

    def due(self, step: int) -> bool:
        """Whether a round comes before student step ``step``."""
        every = self.settings.evolve_every
        return bool(every) and step > 0 and step % every == 0

    def evolve(self) -> None:
        """One round: new pictures join the pool, and ranges follow the weights that have moved."""
        self._keep(self.pictures(self.settings.evolve_samples))
        if self.settings.reobserve:
            count = min(self.calibration.settings.calibration_samples, len(self.pool))
            self.calibration.observe(self._batch(count, range(count)))

    def draw(self, batches: int = 1) -> Tensor:
        """This rank's pictures for a student step, (n, C, H, W), augmented, on the student's device.

        Args:
            batches: Batches that one step is made of; of all ranks together no more pictures than the pool holds.
        """
        rank, world = ranks()
        count = min(self.calibration.settings.batch_size * batches * world, len(self.pool))
        part = range(count) if count < world else range(rank, count, world)
        images = self._batch(count, part)
        if self.settings.augment:
            flip = torch.rand(count, generator=self.random)[list(part)] < 0.5
            shifts = tuple(int(torch.randint(0, side, (1,), generator=self.random)) for side in images.shape[-2:])
            images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images).roll(shifts, dims=(-2, -1))
        return images.to(self.calibration.device)

    def _batch(self, count: int, part: Sequence[int]) -> Tensor:
        """The pictures at the places ``part`` of a batch of ``count``: fresh ones, or of the pool."""
        if self.fresh is None:
            return self.pool.draw(count, self.random, part)
        self.fresh_samples += count
        return self.fresh.take(count, only=part)

    def _keep(self, pictures: Tensor) -> None:
        self.latest = pictures
        self.pool.add(pictures)
        self.rounds += 1

    # ------------------------------------------------------------------ steps
    def learn(
        self,
        images: Tensor,
        backward: Callable[[Tensor], None],
        batches: int = 1,
        context: Callable[[], ContextManager] = contextlib.nullcontext,
    ) -> StepLosses:
        """Gradients of the loss on a batch whose images lie on several ranks, and go through the student in parts.

        Args:
            images: This rank's, normalized, (n, C, H, W).
            backward: Called with the loss of each part at its weight in the whole: the gradients that it adds up,
                summed over the ranks, are those of the loss on the whole batch.
            batches: How many parts.
            context: Of each forward pass, such as autocast.

        Raises:
            DataError: The loss is NaN or infinite.
        """
        total, sums = WholeBatch(len(images)).total, torch.zeros(2, dtype=torch.float64, device=images.device)
        with hold_weights(self.student.model):
            for part in images.chunk(batches):
                with context():
                    losses = self._losses(part)
                backward(losses.loss * (len(part) / total))
                sums = sums + torch.stack([term.detach().double() for term in losses]) * len(part)
        loss, discrepancy = sum_(sums) / total
        if not torch.isfinite(loss):
            raise DataError(f'the loss of the student became {float(loss)}: lower its learning rate')
        return StepLosses(loss, discrepancy)

    def _losses(self, images: Tensor) -> StepLosses:
        """Losses of a part of a batch, with gradient."""
        with_logits = self.settings.logits_weight > 0 and self.teacher.num_classes is not None
        with torch.no_grad():
            target = self.teacher.run(images, with_logits=with_logits)
        chosen = getattr(target, 'chosen', None)
        queries = {} if chosen is None else dict(chosen=chosen)
        output = self.student.run(images, with_logits=with_logits, **queries)
        loss = discrepancy = normalized_l1(output.parts, target.parts)
        if with_logits:
            loss = loss + self.settings.logits_weight * _divergence(output.logits, target.logits)
        return StepLosses(loss, discrepancy)

    # ------------------------------------------------------------------ state
    def state_dict(self) -> Dict[str, Any]:
        """What a resumed run needs beside weights and optimizer."""
        return dict(
            pool=self.pool.state_dict(),
            stream=self.stream.state_dict(),
            fresh=None if self.fresh is None else dict(self.fresh.state_dict(), made=self.fresh_samples),
            random=self.random.get_state(),
            rounds=self.rounds,
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, of this release or of an earlier one."""
        self.pool.load_state_dict(state['pool'])
        self.random.set_state(state['random'].cpu())
        self.rounds, self.latest = state['rounds'], None
        taken = self.calibration.settings.calibration_samples + max(self.rounds - 1, 0) * self.settings.evolve_samples
        # Earlier releases had a key for each kind of source, and none for synthesized pictures.
        streams = [state.get(key) for key in ('stream', 'named', 'real')]
        self.stream.load_state_dict(next(filter(None, streams), dict(position=taken)))
        if self.fresh is not None:
            fresh, pool = state.get('fresh'), state['pool']
            fresh = dict(pool.get('stream') or dict(position=0), made=pool.get('made', 0)) if fresh is None else fresh
            self.fresh.load_state_dict(fresh)
            self.fresh_samples = int(fresh['made'])


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of the class probabilities of logits (B, classes), in nats an image."""
    return F.kl_div(
        student.float().log_softmax(1), teacher.float().log_softmax(1), reduction='batchmean', log_target=True
    )
