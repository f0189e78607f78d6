# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Samples and student evolving in turn under a frozen teacher (PSAQ-ViT V2, arXiv 2209.05687, section III).

The paper gives the principle (no class label, samples that compete with the student, a student that learns the
teacher); its code was never released. Every figure below is this project's decision, see docs/method.md.
"""

import contextlib
import dataclasses
import time
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Mapping, Optional, Protocol, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.calibration.discrepancy import normalized_l1
from psaq_mm.calibration.guidance import sensitivity_loss
from psaq_mm.errors import ConfigError, DataError
from psaq_mm.pictures import SOURCES as NOISES
from psaq_mm.pictures import ImageSpec, SampleStream
from psaq_mm.psaq_vit.generator import SampleGenerator
from psaq_mm.psaq_vit.joint import Drawn, scale_gradient, step_of
from psaq_mm.psaq_vit.pool import SamplePool
from psaq_mm.psaq_vit.weighting import AdaptiveWeight
from psaq_mm.quantization import (
    RoundedLayer,
    calibrate,
    hold_weights,
    is_quantized_layer,
    learned_ranges,
    round_weights_,
    row_importance,
)
from psaq_mm.ranks import WholeBatch, broadcast_, gathered, minimum_, own_part, ranks, sum_

__all__ = ['CoEvolutionSettings', 'CoEvolution', 'Network', 'SOURCES']

SOURCES = ('generated', *NOISES, 'real')
"""Where samples come from. All but ``generated`` are controls that go through the same quantizer."""


ROUNDINGS = ('nearest', 'compensated', 'guided', 'auto')


class Network(Protocol):
    """What teacher and student offer: :class:`psaq_mm.models.TaskModel` is one."""

    model: nn.Module
    image_spec: ImageSpec
    min_size: int
    fixed_size: Optional[Tuple[int, int]]
    prefix_tokens: int
    num_classes: Optional[int]

    def outputs(self, images: Tensor) -> List[Tensor]:
        """Tensors to distil for normalized ``images`` (B, C, H, W)."""

    def run(self, images: Tensor, with_logits: bool = False) -> Any:
        """``parts`` (as :meth:`outputs`) and ``logits`` (B, classes) or None, of one forward pass."""

    def calibration_forward(self, images: Tensor, scope: str = 'backbone') -> None:
        """Run every layer that ``scope`` quantizes."""


@dataclasses.dataclass(frozen=True)
class CoEvolutionSettings:
    """Settings of a run.

    Args:
        size: Height and width of the samples, in pixels.
        batch_size: Samples in a student step; of each rank, in a distributed run, as the generator's is.
        calibration_samples: Samples that set the ranges.
        pool_size: Samples kept; from a full pool some leave at random, so that the student does not forget.
        evolve_every: Student steps between two rounds of synthesis; 0: the first samples are the only ones.
        evolve_samples: New samples a round.
        source: One of :data:`SOURCES`.
        reobserve: Whether ranges are calibrated anew after each round, on samples drawn from the pool.
        scope: The quantizer's scope: which layers calibration has to reach.
        augment: Whether the student sees pool samples flipped and rolled at random.
        classes: ``'random'`` makes each sample for a class of its own, drawn once, where the model is a classifier (the
            one-hot term of PSAQ-ViT, arXiv 2203.02250, section 3.3); None is class-free.
        rounding: How weights come to their first codes: ``'nearest'``, or ``'compensated'``, on the first samples, as
            :func:`psaq_mm.quantization.round_weights_` says, or ``'guided'``: compensated, each token or place weighing
            what a classifier's probabilities, or else the outputs to distil, make of it
            (:func:`psaq_mm.quantization.row_importance`). ``'auto'`` is guided where weights have fewer than 8 bits and
            compensated where all have 8, which is all the same then and needs no gradients. Training, where there is
            any, goes on from there.
        damping: Of the compensated rounding: how little the samples are trusted.
        prior_rows: Of the guided rounding, in place of ``damping`` where not None: the damping of a layer falls with
            the tokens or places that count in it (:func:`psaq_mm.quantization.round_weights_`).
        logits_weight: Of the Kullback-Leibler divergence of the teacher's and the student's class probabilities (Hinton
            et al., arXiv 1503.02531, temperature 1), beside the discrepancy, where the model is a classifier. 0 leaves
            it out.
        joint_lr: How far the samples of the pool move in each step of the student that draws them, in standard units,
            by the same backward pass (:mod:`psaq_mm.psaq_vit.joint`). They are then moved there and not in rounds: none
            is added, and ``evolve_every`` says when ranges are calibrated anew. 0: in rounds.
    """

    size: Tuple[int, int] = (224, 224)
    batch_size: int = 8
    calibration_samples: int = 32
    pool_size: int = 128
    evolve_every: int = 50
    evolve_samples: int = 16
    source: str = 'generated'
    reobserve: bool = True
    scope: str = 'backbone'
    augment: bool = True
    classes: Optional[str] = None
    rounding: str = 'nearest'
    damping: float = 0.1
    prior_rows: Optional[float] = None
    logits_weight: float = 0.0
    joint_lr: float = 0.0

    def __post_init__(self):
        if not 0 <= self.joint_lr < float('inf'):
            raise ConfigError(f'dfq.joint_lr={self.joint_lr} must be 0 (samples move in rounds) or more')
        if self.rounding not in ROUNDINGS:
            raise ConfigError(f'dfq.rounding={self.rounding!r} is not known: use one of {", ".join(ROUNDINGS)}')
        if not 0 < self.damping < float('inf'):
            raise ConfigError(f'dfq.damping={self.damping} must be positive: 0.1 is the usual value')
        if self.prior_rows is not None and not 0 < self.prior_rows < float('inf'):
            raise ConfigError(
                f'dfq.prior_rows={self.prior_rows} must be positive, or None for dfq.damping: 32 is the usual value'
            )
        if not 0 <= self.logits_weight < float('inf'):
            raise ConfigError(f'dfq.logits_weight={self.logits_weight} must be 0 (off) or more')
        if self.source not in SOURCES:
            raise ConfigError(f'dfq.source={self.source!r} is no source of samples: use one of {", ".join(SOURCES)}')
        if self.classes not in (None, 'random'):
            raise ConfigError(
                f"dfq.classes={self.classes!r} is not known: use 'random' for one random class a sample, or None"
            )
        for name in ('batch_size', 'calibration_samples', 'pool_size', 'evolve_samples'):
            if getattr(self, name) < 1:
                raise ConfigError(f'dfq.{name}={getattr(self, name)} must be at least 1')
        if self.evolve_every and self.pool_size < self.evolve_samples:
            raise ConfigError(
                f'dfq.pool_size={self.pool_size} is smaller than dfq.evolve_samples={self.evolve_samples}: '
                'make it at least as large'
            )
        if self.evolve_every < 0:
            raise ConfigError(f'dfq.evolve_every={self.evolve_every} must be 0 (never) or more')
        if self.pool_size < self.calibration_samples:
            raise ConfigError(
                f'dfq.pool_size={self.pool_size} is smaller than '
                f'dfq.calibration_samples={self.calibration_samples}: make it at least as large'
            )


class CoEvolution:
    """The pool of samples, the student's ranges, and the loss of a student step.

    In a distributed run every rank holds the whole pool and makes every random choice, and works on its part of each
    batch: what comes out is what one rank with batches as many times as large would have.

    Args:
        teacher: Full precision, frozen.
        student: The same network with quantizers.
        generator: How samples are synthesized.
        settings: See :class:`CoEvolutionSettings`.
        seed: Seed of every random choice made here; the global random state is neither read nor set.
        real_source: Count to images (count, C, H, W), normalized; only for ``source='real'``. In a distributed run it
            takes ``only`` too, as :class:`~psaq_mm.pictures.SampleStream` does.
        progress: Called with a dict after each synthesis step.

    Raises:
        ConfigError: The sample size is smaller than one attention window or another than the only one that the model
            takes, or ``real`` is asked for without images.
    """

    def __init__(
        self,
        teacher: Network,
        student: Network,
        generator: SampleGenerator,
        settings: CoEvolutionSettings,
        *,
        seed: int = 0,
        real_source: Optional[Callable[[int], Tensor]] = None,
        progress: Optional[Callable[[Dict[str, Any]], None]] = None,
    ):
        if min(settings.size) < teacher.min_size:
            raise ConfigError(
                f'dfq.size={tuple(settings.size)} is smaller than one attention window of '
                f'{teacher.min_size} pixels: give a larger size'
            )
        if teacher.fixed_size is not None and tuple(settings.size) != tuple(teacher.fixed_size):
            raise ConfigError(
                f'dfq.size={tuple(settings.size)} does not fit the position embedding of the model: set '
                f'dfq.size={tuple(teacher.fixed_size)}'
            )
        if settings.source == 'real' and real_source is None:
            raise ConfigError("dfq.source='real' needs a training dataset in the config; a data-free run has none")
        self.teacher, self.student, self.generator, self.settings = teacher, student, generator, settings
        # A source by name gives the pictures that its class gives by number, see SourcedEvolution.
        self.named = (
            SampleStream(NOISES[settings.source], settings.size, teacher.image_spec, seed)
            if settings.source in NOISES
            else None
        )
        self.real_source, self.progress = real_source, progress
        self.pool = SamplePool(settings.pool_size, replace='random', seed=seed)
        # A generator of weight 0 does not compete: the rule that adapts the weight is then never asked.
        self.weight = AdaptiveWeight(generator.discrepancy_weight or 1.0)
        self.latest: Optional[Tensor] = None
        self.labels: Optional[Tensor] = None  # classes that the latest samples were made for, (n,)
        self.random = torch.Generator().manual_seed(seed)
        self.drawn: Optional[Drawn] = None  # how the latest batch came out of the pool
        self.rounds = 0
        self.rounded: List[RoundedLayer] = []
        self.history: List[Dict[str, float]] = []

    @property
    def device(self) -> torch.device:
        """Where the networks live."""
        return next(self.student.model.parameters()).device

    # ------------------------------------------------------------------ samples
    def make_samples(self, count: int, compete: bool) -> Tensor:
        """``count`` new samples, (count, C, H, W) on the CPU; ``compete``: hard for the student as well."""
        spec, size = self.teacher.image_spec, self.settings.size
        source = self.settings.source
        if self.named is not None:
            return taken_from(self.named, count)
        if source == 'real':
            return self._real(count)
        first = NOISES[self.generator.init](count, size, spec, generator=self.random)
        self.labels = self._random_classes(count)
        together = self.generator.batch_size * ranks()[1]
        parts = [slice(start, start + together) for start in range(0, count, together)]
        return torch.cat(
            [
                self._synthesize(first[part], None if self.labels is None else self.labels[part], compete)
                for part in parts
            ]
        )

    def _real(self, count: int) -> Tensor:
        if ranks()[1] == 1:
            return self.real_source(count)
        if count < ranks()[1]:
            return broadcast_(self.real_source(count))
        own = own_part(count)
        return gathered(self.real_source(count, only=range(own.start, own.stop)), count)

    def _random_classes(self, count: int) -> Optional[Tensor]:
        if self.settings.classes is None or self.teacher.num_classes is None:
            return None
        return torch.randint(0, self.teacher.num_classes, (count,), generator=self.random)

    def _synthesize(self, first: Tensor, labels: Optional[Tensor], compete: bool) -> Tensor:
        count, world = len(first), ranks()[1]
        if world == 1:
            return self._synthesize_part(first, labels, compete, None)
        if count < world:  # a rank without an image has nothing to run: each makes all of them, and rank 0's count
            return broadcast_(self._synthesize_part(first, labels, compete, None))
        own = own_part(count)
        whole = WholeBatch(own.stop - own.start)
        return gathered(
            self._synthesize_part(first[own], None if labels is None else labels[own], compete, whole), count
        )

    def _synthesize_part(
        self, first: Tensor, labels: Optional[Tensor], compete: bool, whole: Optional[WholeBatch]
    ) -> Tensor:
        taught: List[Tensor] = []
        begun, steps = time.perf_counter(), self.generator.steps * self.generator.rounds

        def forward(images: Tensor) -> Optional[Tensor]:
            found = self.teacher.run(images, with_logits=labels is not None)
            taught[:] = found.parts
            return found.logits

        def discrepancy(images: Tensor) -> Tensor:
            return normalized_l1(self.student.outputs(images), taught)

        def class_loss(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits, labels.to(logits.device))

        def report(entry: Dict[str, float]) -> None:
            if self.progress is not None:
                done = entry['step'] + 1
                self.progress(dict(entry, steps=steps, eta=(time.perf_counter() - begun) / done * (steps - done)))

        rival = discrepancy if compete and self.generator.discrepancy_weight > 0 else None
        # Frozen, a student keeps its quantized weights from step to step, and nothing for gradients that nobody asks
        # for.
        with _frozen(self.student.model):
            made = self.generator.generate(
                self.teacher.model,
                self.teacher.image_spec,
                forward=forward,
                discrepancy=rival,
                class_loss=None if labels is None else class_loss,
                weight=self.weight,
                init=first,
                generator=self.random,
                progress=report,
                prefix_tokens=self.teacher.prefix_tokens,
                whole=whole,
            )
        self.history.extend(dict(step, round=self.rounds) for step in made.history)
        return made.samples.cpu()

    # ------------------------------------------------------------------ rounds
    def prepare(self, given: Optional[Tensor] = None, labels: Optional[Tensor] = None) -> None:
        """First samples, without competition (there is no student yet), then the student's ranges and first codes on
        them.

        Args:
            given: Samples (n, C, H, W) in the model's units, n within the pool's size, instead of making some.
            labels: Classes that they were made for, (n,).
        """
        if given is None:
            self._renew(self.settings.calibration_samples, compete=False)
        else:
            self.latest, self.labels = given, labels
            self._keep()
        self.observe(self.latest)
        rounding = self.settings.rounding
        if rounding == 'auto':
            rounding = 'guided' if self._has_few_bits() else 'compensated'
        if rounding != 'nearest':
            importance = self._importance(self.latest) if rounding == 'guided' else None
            self.rounded = round_weights_(
                self.student.model,
                self._passing(self.latest),
                self.settings.prior_rows or 32.0,
                importance=importance,
            )

    def _has_few_bits(self) -> bool:
        return any(
            layer.weight_quantizer.bits < 8 for layer in self.student.model.modules() if is_quantized_layer(layer)
        )

    def _importance(self, samples: Tensor) -> Dict[str, Tensor]:
        """Of the rows that :meth:`_passing` sends through each layer for ``samples``, in its order."""
        seeds = torch.randint(0, 2**31, (len(samples),), generator=self.random)
        own = own_part(len(samples))

        def run() -> None:
            size = self.settings.batch_size
            for batch, drawn in zip(samples[own].split(size), seeds[own].split(size)):
                if len(batch):
                    images = batch.to(self.device).requires_grad_()
                    found = self.student.run(images, with_logits=True)
                    sensitivity_loss(found.parts, found.logits, drawn).backward()

        with torch.enable_grad(), _frozen(self.student.model):
            return row_importance(self.student.model, run)

    def _renew(self, count: int, compete: bool) -> None:
        self.latest = self.make_samples(count, compete)
        self._keep()

    def _keep(self) -> None:
        self.pool.add(self.latest)
        self.rounds += 1

    def observe(self, samples: Tensor) -> None:
        """Calibrate all ranges of the student on ``samples`` (n, C, H, W), batch by batch."""
        calibrate(self.student.model, self._passing(samples))

    def _passing(self, samples: Tensor) -> Callable[[], None]:
        """What puts this rank's part of ``samples`` through the student, batch by batch."""
        own = samples[own_part(len(samples))]

        def run() -> None:
            for batch in own.split(self.settings.batch_size) if len(own) else ():
                self.student.calibration_forward(batch.to(self.device), self.settings.scope)

        return run

    def due(self, step: int) -> bool:
        """Whether a round of synthesis comes before student step ``step``."""
        every = self.settings.evolve_every
        return (
            bool(every) and step > 0 and step % every == 0 and (self.settings.reobserve or not self.settings.joint_lr)
        )

    def evolve(self) -> None:
        """One round: samples that the student still gets wrong join the pool, and ranges follow the moved weights."""
        if not self.settings.joint_lr:
            self._renew(self.settings.evolve_samples, compete=True)
        if self.settings.reobserve:
            self.observe(self._drawn(self.settings.calibration_samples))

    def _drawn(self, count: int) -> Tensor:
        samples, _ = self.pool.draw(min(count, len(self.pool)), generator=self.random)
        return samples

    # ------------------------------------------------------------------ student
    def draw(self, batches: int = 1) -> Tensor:
        """Samples for the student, (batches * batch_size, C, H, W), flipped and rolled at random where ``augment`` is
        set.

        Args:
            batches: Batches that one step is made of.
        """
        world = ranks()[1]
        count = min(self.settings.batch_size * batches * world, len(self.pool))
        own = range(count) if count < world else range(ranks()[0], count, world)
        batch, indices = self.pool.draw(count, generator=self.random, only=own)
        flip, shift = torch.zeros(len(own), dtype=torch.bool), (0, 0)
        if self.settings.augment:
            flip = torch.rand(count, generator=self.random)[list(own)] < 0.5
            shift = tuple(int(torch.randint(0, n, (1,), generator=self.random)) for n in batch.shape[-2:])
        self.drawn = Drawn(indices, own, count, flip.view(-1, 1, 1, 1), shift)
        return self.drawn.moved(batch).to(self.device)

    def _put_back(self, images: Tensor) -> None:
        """Samples of the latest batch, moved, into their places in the pool; on every rank those of all ranks."""
        drawn, world = self.drawn, ranks()[1]
        images, indices = drawn.moved_back(images).cpu(), drawn.indices
        if world > drawn.count:
            images = broadcast_(images)
        elif world > 1:
            images, indices = (
                sum_(part.new_zeros(drawn.count, *part.shape[1:]).index_copy_(0, torch.tensor(list(drawn.own)), part))
                for part in (images, indices)
            )
        replayed = indices >= 0
        if bool(replayed.any()):
            self.pool.update(indices[replayed], images[replayed])

    def learn(
        self,
        images: Tensor,
        backward: Callable[[Tensor], None],
        batches: int = 1,
        context: Callable[[], ContextManager] = contextlib.nullcontext,
    ) -> Tensor:
        """Gradients of the loss on a batch whose images lie on several ranks, and go through the student in several
        parts.

        Args:
            images: This rank's, normalized, (n, C, H, W).
            backward: Called with the loss of each part at its weight in the whole: the gradients that it adds up,
                summed over the ranks, are those of the loss on the whole batch.
            batches: How many parts.
            context: Of each forward pass, such as autocast.

        Returns:
            The loss on the whole batch, a scalar without gradient, the same on every rank.

        Raises:
            DataError: It is NaN or infinite.
        """
        total, sums, changed = WholeBatch(len(images)).total, 0, []
        with hold_weights(self.student.model):
            for part in self._parts(images, batches):
                if self.settings.joint_lr:
                    found, pixels = self._joint_step(part, total, backward, context)
                    changed.append(pixels)
                else:
                    with context():
                        found = self._loss(part)
                    backward(found[0] * (len(part) / total))
                sums = sums + torch.stack([term.detach().double() for term in found]) * len(part)
        value, discrepancy = sum_(sums) / total
        if not torch.isfinite(value):
            raise DataError(f'the loss of the student became {float(value)}: lower dfq.lr')
        self.weight.observe(float(discrepancy))  # what samples compete for is the discrepancy alone
        if changed:
            self._put_back(torch.cat(changed))
        return value

    def _parts(self, images: Tensor, batches: int) -> Sequence[Tensor]:
        if not self.settings.joint_lr or ranks()[1] == 1:
            return images.chunk(batches)
        # Joint steps compare their samples with those of the other ranks: as many parts on each, also where a small
        # pool gives one more.
        return images.tensor_split(int(minimum_(torch.tensor(min(batches, len(images))))))

    def _joint_step(
        self, images: Tensor, total: int, backward: Callable[[Tensor], None], context: Callable[[], ContextManager]
    ) -> Tuple[Tuple[Tensor, Tensor], Tensor]:
        """The terms of :meth:`_loss`, whose gradients are made, and the images moved against the student."""
        spec, reverse = self.teacher.image_spec, -self.generator.discrepancy_weight
        values = spec.to_standard(images).detach().requires_grad_()
        seen: List[Tuple[Tensor, Any]] = []

        def forward(images: Tensor) -> Optional[Tensor]:
            seen.append((images, self.teacher.run(images, with_logits=self._logits_wanted)))
            return seen[0][1].logits

        whole = WholeBatch(len(images)) if ranks()[1] > 1 else None
        with context():
            quality = self.generator.quality(
                self.teacher.model, spec, values, forward, self.teacher.prefix_tokens, whole
            )
            images, taught = seen[0]
            found = self.student.run(scale_gradient(images, reverse), with_logits=self._logits_wanted)
            # Class probabilities: samples seek where the student's are wrong, and not where the teacher's change.
            terms = self._terms(
                found,
                [scale_gradient(part, reverse) for part in taught.parts],
                None if taught.logits is None else taught.logits.detach(),
            )
        # The quality is that of all ranks' images already, the discrepancy this rank's.
        together = len(values) if whole is None else whole.total
        backward(terms[0] * (len(values) / total) + quality * (together / total))
        return terms, step_of(values, self.settings.joint_lr, spec)

    def _loss(self, images: Tensor) -> Tuple[Tensor, Tensor]:
        """The loss and, of it, the discrepancy."""
        with torch.no_grad():
            taught = self.teacher.run(images, with_logits=self._logits_wanted)
        return self._terms(self.student.run(images, with_logits=self._logits_wanted), taught.parts, taught.logits)

    @property
    def _logits_wanted(self) -> bool:
        return self.settings.logits_weight > 0 and self.teacher.num_classes is not None

    def _terms(self, found: Any, parts: List[Tensor], logits: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        value = discrepancy = normalized_l1(found.parts, parts)
        if self._logits_wanted:
            value = value + self.settings.logits_weight * _divergence(found.logits, logits)
        return value, discrepancy

    # ------------------------------------------------------------------ state
    def state_dict(self) -> Dict[str, Any]:
        """What a resumed run needs beside weights and optimizer."""
        real = self.real_source.state_dict() if hasattr(self.real_source, 'state_dict') else None
        named = None if self.named is None else self.named.state_dict()
        return dict(
            named=named,
            pool=self.pool.state_dict(),
            weight=self.weight.state_dict(),
            random=self.random.get_state(),
            rounds=self.rounds,
            history=list(self.history),
            real=real,
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.pool.load_state_dict(state['pool'])
        self.weight.load_state_dict(state['weight'])
        self.random.set_state(state['random'].cpu())
        self.rounds, self.history = state['rounds'], list(state['history'])
        if self.named is not None:
            # A state from before names had numbers: go on behind those that its samples would have had.
            made = self.settings.calibration_samples + max(self.rounds - 1, 0) * self.settings.evolve_samples
            self.named.load_state_dict(state.get('named') or dict(position=made))
        if state.get('real') is not None and hasattr(self.real_source, 'load_state_dict'):
            self.real_source.load_state_dict(state['real'])


def taken_from(stream: SampleStream, count: int) -> Tensor:
    """The next ``count`` pictures of a procedural source, (count, C, H, W); in a distributed run each rank makes a part
    of them.
    """
    rank, world = ranks()
    return (
        gathered(stream.take(count, rank=rank, world_size=world), count) if 1 < world <= count else stream.take(count)
    )


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    learned = [p for p in (*model.parameters(), *learned_ranges(model)) if p.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of the class probabilities of logits (B, classes), in nats an image."""
    return F.kl_div(
        student.float().log_softmax(1), teacher.float().log_softmax(1), reduction='batchmean', log_target=True
    )
