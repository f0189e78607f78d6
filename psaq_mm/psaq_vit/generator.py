# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Samples out of a trained model: noise is changed until the model sees diverse patches in it."""

import dataclasses
import functools
import math
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from psaq_mm.calibration import find_attention
from psaq_mm.contexts import frozen
from psaq_mm.errors import DataError
from psaq_mm.pictures import ImageSpec, Source, source_names, source_of
from psaq_mm.psaq_vit.priors import VARIATION_RANGE, variation_prior
from psaq_mm.psaq_vit.similarity import patch_similarity_entropy
from psaq_mm.psaq_vit.taps import AttentionTap, AttentionTaps
from psaq_mm.psaq_vit.weighting import AdaptiveWeight
from psaq_mm.ranks import WholeBatch, sum_
from psaq_mm.settings import Settings, read_groups, setting

__all__ = ['Density', 'GeneratedSamples', 'Loss', 'Moves', 'Objective', 'SampleGenerator', 'Schedule']

GLOBAL_RATE, WINDOW_RATE = 0.20, 0.25
"""Learning rates of PSAQ-ViT's released code for global attention (ViT, DeiT) and for attention in windows (Swin)."""


@dataclasses.dataclass(frozen=True)
class Loss(Settings):
    """Weights of the terms of the loss of the samples; 0 leaves a term out."""

    entropy_weight: float = setting(1.0, 'Of the patch similarity entropy. A model without attention needs 0.')
    prior_weight: float = setting(0.05, 'Of the total variation prior.')
    discrepancy_weight: float = setting(1.0, 'Of what the student still gets wrong; where it adapts, the first weight.')
    class_weight: float = setting(1.0, 'Of the cross entropy to the class of a sample, where samples have one.')
    variation: Tuple[float, float] = setting(
        VARIATION_RANGE, 'Range that the target of the total variation is drawn from, once a batch.'
    )

    def __post_init__(self) -> None:
        if len(self.variation) != 2 or not 0 <= self.variation[0] <= self.variation[1]:
            raise DataError(f'variation={self.variation} must be a nonnegative (least, greatest)')


@dataclasses.dataclass(frozen=True)
class Schedule(Settings):
    """Steps of the samples and their learning rate."""

    steps: int = setting(100, 'Optimizer steps of one round.')
    rounds: int = setting(1, 'How often the learning rate schedule runs; the optimizer keeps its state in between.')
    lr: Optional[float] = setting(
        0.25,
        "Greatest learning rate of Adam, in standard units a step. None takes PSAQ-ViT's for the model: 0.25 for "
        'attention in windows (Swin), 0.20 for global attention (ViT, DeiT).',
    )
    betas: Tuple[float, float] = setting((0.5, 0.9), 'Of Adam.')
    warmup: float = setting(0.2, 'Share of a round in which the rate rises linearly; afterwards it falls as a cosine.')

    def __post_init__(self) -> None:
        for name in ('steps', 'rounds'):
            if getattr(self, name) < 1:
                raise DataError(f'{name}={getattr(self, name)} must be at least 1')
        if self.lr is not None and not self.lr > 0:
            raise DataError(f'lr={self.lr} must be positive')
        if not 0 <= self.warmup <= 1:
            raise DataError(f'warmup={self.warmup} must be within 0 .. 1')

    def share(self, step: int) -> float:
        """Share of the learning rate in step ``step`` of all rounds together: warm-up, then a cosine to zero."""
        step, warm = step % self.steps, int(self.warmup * self.steps)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / (self.steps - warm)))


@dataclasses.dataclass(frozen=True)
class Moves(Settings):
    """How the batch is moved in each step, so that no sample depends on the borders of patches."""

    jitter: Union[int, Tuple[int, ...]] = setting(
        30, 'Greatest roll in pixels, by one offset in both axes; one value, or one a round.'
    )
    flip: float = setting(0.5, 'Probability of a horizontal flip of the batch.')

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise DataError(f'flip={self.flip} must be within 0 .. 1')


@dataclasses.dataclass(frozen=True)
class Density(Settings):
    """How the density of the patch similarities is estimated."""

    drop_tokens: Optional[int] = setting(
        None, 'Leading tokens to leave out: 1 for a class token. None: as many as the model has before its patches.'
    )
    points: int = setting(10, 'Grid points of the similarity density.')
    bandwidth: float = setting(0.01, 'Bandwidth of the similarity density.')
    value_range: Optional[Tuple[float, float]] = setting(
        None,
        'Similarities that bound the grid. None: those of each batch, as in the released code; no gradient flows '
        'through them, so a step can narrow the grid and lower the entropy that it raises on the grid it saw. A fixed '
        'range such as (-1, 1) does not move.',
    )

    def __post_init__(self) -> None:
        bounds = self.value_range
        if bounds is not None and not (len(bounds) == 2 and bounds[0] < bounds[1]):
            raise DataError(f'value_range={bounds} must be (least, greatest) similarity, or None')


@dataclasses.dataclass(frozen=True)
class Objective:
    """What takes part in the loss beside patch similarity and prior.

    Attributes:
        forward: Runs the teacher on images (B, C, H, W) in its units, in each step and before ``discrepancy``, which
            can thus use features that it keeps. None is the model itself.
        discrepancy: What the student still gets wrong on images, a scalar that the samples raise. None: there is no
            student.
        class_loss: Scalar loss of the output of ``forward``, such as the cross entropy to a random class.
        weight: Adapts the weight of the discrepancy in each step. None keeps ``discrepancy_weight``.
        prefix_tokens: Tokens that the model puts before its patches, left out where ``drop_tokens`` is None.
    """

    forward: Optional[Callable[[Tensor], Any]] = None
    discrepancy: Optional[Callable[[Tensor], Tensor]] = None
    class_loss: Optional[Callable[[Any], Tensor]] = None
    weight: Optional[AdaptiveWeight] = None
    prefix_tokens: int = 0


@dataclasses.dataclass
class GeneratedSamples:
    """Result of :meth:`SampleGenerator.generate`.

    Attributes:
        samples: Shape (B, C, H, W), float32, detached, in the model's units and within its valid range.
        history: One dict per step: ``step``, ``lr``, the terms of the loss that took part (``entropy`` in nats,
            ``prior``, ``discrepancy``, ``class``), ``weight`` of the discrepancy, ``total``, and ``grad_norm``.
    """

    samples: Tensor
    history: List[Dict[str, float]] = dataclasses.field(default_factory=list)


def _outside_inference_mode(method: Callable) -> Callable:
    """Let a method that computes gradients run inside ``torch.inference_mode()``, which cannot record any."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return run


class SampleGenerator:
    """Turns noise into samples by gradient descent on the pixels.

    The loss of a step, on the batch moved by a random roll and flip::

        -entropy_weight * sum over blocks of the patch similarity entropy
        + prior_weight * |TV - target| / scale
        - discrepancy_weight * discrepancy(images)
        + class_weight * class_loss(output)

    Source: entropy, one-hot term, total variation, schedule and moves are those of PSAQ-ViT (arXiv 2203.02250,
    Sec. 3.3 and released code), which ``SampleGenerator(batch_size=32, steps=500, rounds=2, jitter=(15, 30))`` with
    a class loss runs. The discrepancy term is this project's reading of PSAQ-ViT V2 (arXiv 2209.05687).

    Args:
        size: (height, width) of the samples in pixels, where :meth:`generate` is given no first images.
        batch_size: Number of samples made together.
        init: Source of the first images: a name of :func:`~psaq_mm.pictures.source_names` such as 'gaussian' and
            'pink', or what :func:`~psaq_mm.pictures.source_of` takes, such as ``dict(type='psaq_mm.DeadLeaves')``.
        seed: Seed of a run that is given no random generator.
        **settings: Settings of the groups :class:`Loss`, :class:`Schedule`, :class:`Moves` and :class:`Density`.

    Attributes:
        loss, schedule, moves, density: The groups.

    Raises:
        ConfigError: A setting is not known.
        DataError: A setting is out of range; the message names it.

    Example:
        >>> made = SampleGenerator(size=(224, 224), batch_size=8, steps=100, drop_tokens=1).generate(vit, ImageSpec())
        >>> made.samples.shape
        torch.Size([8, 3, 224, 224])
    """

    def __init__(
        self,
        size: Tuple[int, int] = (224, 224),
        batch_size: int = 8,
        init: Union[str, Source, Mapping, Sequence] = 'gaussian',
        seed: int = 0,
        **settings: Any,
    ) -> None:
        self.size: Tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.batch_size, self.init, self.seed = batch_size, init, seed
        self.loss, self.schedule, self.moves, self.density = read_groups(settings, Loss, Schedule, Moves, Density)
        rounds, jitter = self.schedule.rounds, self.moves.jitter
        self._jitter = (jitter,) * rounds if isinstance(jitter, int) else jitter
        if len(self._jitter) != rounds or min(self._jitter) < 0:
            raise DataError(f'jitter={jitter} must be one nonnegative number of pixels for each of the {rounds} rounds')
        if len(self.size) != 2 or min(self.size) < 1:
            raise DataError(f'size={self.size} must be (height, width)')
        if batch_size < 1:
            raise DataError(f'batch_size={batch_size} must be at least 1')
        self.source = _procedural(init)

    def settings(self) -> Dict[str, Any]:
        """All settings by name, as a config gives them."""
        groups = (self.loss, self.schedule, self.moves, self.density)
        flat = {name: value for group in groups for name, value in group.to_dict().items()}
        return dict(flat, jitter=self._jitter, batch_size=self.batch_size, init=self.init, seed=self.seed)

    def first_images(self, count: int, size: Tuple[int, int], image_spec: ImageSpec, random: torch.Generator) -> Tensor:
        """``count`` images (count, C, H, W) to begin with, on the CPU."""
        return self.source(count, size, image_spec, random)

    @_outside_inference_mode
    def generate(
        self,
        model: nn.Module,
        image_spec: ImageSpec,
        objective: Optional[Objective] = None,
        *,
        init: Optional[Tensor] = None,
        generator: Optional[torch.Generator] = None,
        progress: Optional[Callable[[Dict[str, float]], None]] = None,
        whole: Optional[WholeBatch] = None,
    ) -> GeneratedSamples:
        """Make one batch of samples.

        Only the images are changed: no parameter of the model, or of what the objective calls, gets a gradient, and
        the global random state is not touched. The model runs in the mode (train or eval) it is in. It works under
        ``torch.no_grad()`` and ``torch.inference_mode()`` too; only the model must not have been built under the
        latter.

        Args:
            model: Teacher that the attention taps are put on.
            image_spec: Channels and range of the model's input.
            objective: What else takes part in the loss. Defaults to None, nothing.
            init: First images (B, C, H, W) in the model's units, which also give batch and size. Defaults to None, of
                the source ``init`` of the class.
            generator: Source of randomness, on the CPU. Defaults to None, a new one seeded with ``seed``. Pass one to
                get other samples in each call.
            progress: Called after each step with its entry of the history.
            whole: The batch that ``init`` is this rank's part of, in distributed runs: samples and history are those of
                one rank with the whole batch. All ranks then have to pass a ``generator`` in one state. Defaults to
                None, ``init`` is all of it.

        Returns:
            GeneratedSamples: Samples, on the model's device, and history.

        Raises:
            DataError: If a term of the loss or the gradient is not finite (naming the term), or ``init`` does not fit.
            UnsupportedModelError: If the model has no attention to tap, or its taps carry no gradient.
        """
        generator = torch.Generator().manual_seed(self.seed) if generator is None else generator
        device = next((p.device for p in model.parameters()), torch.device('cpu'))
        images = self._first_images(image_spec, init, generator, device)
        terms = _Terms(self, model, image_spec, objective or Objective(), self._draw_level(generator), whole)
        rate = self.rate_for(model)
        history: List[Dict[str, float]] = []

        values = image_spec.to_standard(images)
        del images  # the same tensor, or one that is not needed again
        bounds = torch.tensor([image_spec.low, image_spec.high], device=device)[..., None, None]
        low, high = image_spec.to_standard(bounds)
        optimizer = torch.optim.Adam([values], lr=rate, betas=self.schedule.betas)
        with frozen(model.parameters()):  # their graph would only cost memory
            for step in range(self.schedule.steps * self.schedule.rounds):
                entry: Dict[str, float] = dict(step=step, lr=rate * self.schedule.share(step))
                move = self._draw_move(self._jitter[step // self.schedule.steps], generator)
                moved = move.apply(values).requires_grad_()
                with torch.enable_grad():
                    total = terms.total(moved, entry)
                    # By the moved images, and not by the values: the move's own copies need no graph.
                    (grad,) = torch.autograd.grad(total, moved)
                entry['grad_norm'] = _finite(_norm(grad, whole), 'the gradient of the samples', step)
                values.grad = move.undo(grad)
                del moved, grad, total
                optimizer.param_groups[0]['lr'] = entry['lr']
                optimizer.step()
                values.grad = None  # the next forward pass needs the room
                with torch.no_grad():
                    torch.minimum(torch.maximum(values, low, out=values), high, out=values)
                history.append(entry)
                if progress is not None:
                    progress(entry)
        samples = image_spec.clamp(image_spec.from_standard(values))
        return GeneratedSamples(samples, history)

    def rate_for(self, model: nn.Module) -> float:
        """The greatest learning rate for a model: ``lr``, or PSAQ-ViT's for its kind of attention."""
        if self.schedule.lr is not None:
            return self.schedule.lr
        windows = any(getattr(module, 'window_size', None) is not None for _, module in find_attention(model))
        return WINDOW_RATE if windows else GLOBAL_RATE

    def _first_images(
        self, image_spec: ImageSpec, init: Optional[Tensor], generator: torch.Generator, device: torch.device
    ) -> Tensor:
        if init is None:
            return self.first_images(self.batch_size, self.size, image_spec, generator).to(device)
        if init.dim() != 4 or not len(init) or init.shape[1] != image_spec.channels:
            raise DataError(f'init of shape {tuple(init.shape)} must be (batch, {image_spec.channels}, height, width)')
        return image_spec.clamp(init.detach().to(device, torch.float32, copy=True))

    def _draw_level(self, generator: torch.Generator) -> float:
        """Target of the total variation, at the reference shape."""
        low, high = self.loss.variation
        return low + (high - low) * _uniform(generator)

    def _draw_move(self, jitter: int, generator: torch.Generator) -> '_Move':
        """A roll by one offset in both axes and a flip, for the whole batch alike."""
        offset = int(torch.randint(-jitter, jitter + 1, (), generator=generator))
        return _Move(offset, _uniform(generator) < self.moves.flip)


def _procedural(init: Union[str, Source, Mapping, Sequence]) -> Source:
    """The source that a synthesis begins with."""
    if isinstance(init, str) and init not in source_names():
        raise DataError(
            f'init={init!r} must be one of {source_names()}, or a source; pass a tensor to generate() instead'
        )
    source = source_of(init)
    if not source.procedural:
        raise DataError(
            'init holds generated samples, which the synthesis cannot begin with: take a procedural source, such as '
            "dict(type='psaq_mm.PinkNoise')"
        )
    return source


class _Terms:
    """The loss of the samples of one batch."""

    def __init__(
        self,
        generator: SampleGenerator,
        model: nn.Module,
        image_spec: ImageSpec,
        objective: Objective,
        level: float,
        whole: Optional[WholeBatch],
    ) -> None:
        self.loss, self.density = generator.loss, generator.density
        self.image_spec, self.objective, self.level, self.whole = image_spec, objective, level, whole
        self.forward: Callable[[Tensor], Any] = model if objective.forward is None else objective.forward
        dropped = self.density.drop_tokens
        dropped = objective.prefix_tokens if dropped is None else dropped
        self.taps = AttentionTaps(model, dropped) if self.loss.entropy_weight else None

    def total(self, moved: Tensor, entry: Dict[str, float]) -> Tensor:
        """Weighted sum of the terms on ``moved`` (B, C, H, W), in standard units; ``entry`` gets their values."""
        terms = self._terms(moved)
        numbers = torch.stack([term.detach().double() for term in terms.values()]).tolist()
        for name, value in zip(terms, numbers):
            entry[name] = _finite(value, f'the {name} term', entry['step'])
        weights = {
            'entropy': -self.loss.entropy_weight,
            'prior': self.loss.prior_weight,
            'class': self.loss.class_weight,
        }
        if 'discrepancy' in terms:
            adaptive = self.objective.weight
            value = entry['discrepancy']
            entry['weight'] = self.loss.discrepancy_weight if adaptive is None else adaptive.follow(value)
            weights['discrepancy'] = -entry['weight']
        entry['total'] = sum(weights[name] * entry[name] for name in terms)
        return functools.reduce(torch.add, (weights[name] * term for name, term in terms.items()))

    def _terms(self, moved: Tensor) -> Dict[str, Tensor]:
        """Terms that take part, by name and without their weights."""
        images, objective = self.image_spec.from_standard(moved), self.objective
        terms: Dict[str, Tensor] = {}
        # Before the forward pass, so that autograd comes to it last: its gradient is not held while the network's is
        # computed.
        prior = variation_prior(moved, self.level, self.whole) if self.loss.prior_weight else None
        output = None
        if self.taps is not None:
            with self.taps.record(images) as taps:
                output = self.forward(images)
            terms['entropy'] = self._entropy(taps)
        elif objective.class_loss is not None or objective.forward is not None:
            output = self.forward(images)
        if prior is not None:
            terms['prior'] = prior
        if objective.discrepancy is not None:
            terms['discrepancy'] = objective.discrepancy(images)
        if objective.class_loss is not None:
            terms['class'] = objective.class_loss(output)
        if not terms:
            raise DataError('no term of the loss takes part; set entropy_weight or prior_weight above 0')
        for name, term in terms.items():
            if term.dim():
                raise DataError(f'the {name} term has shape {tuple(term.shape)} but must be a scalar')
            if self.whole is not None and name != 'prior':
                terms[name] = self.whole.mean(term)
        return terms

    def _entropy(self, taps: Sequence[AttentionTap]) -> Tensor:
        """Sum of the patch similarity entropies of the blocks."""
        entropies = (
            patch_similarity_entropy(
                tap.tokens,
                tap.valid,
                self.density.points,
                self.density.bandwidth,
                value_range=self.density.value_range,
                groups_per_image=tap.groups_per_image,
                reduce_range=None if self.whole is None else self.whole.range,
            )
            for tap in taps
        )
        return functools.reduce(torch.add, entropies)


class _Move(NamedTuple):
    """A roll by one offset in both axes, then a horizontal flip."""

    offset: int
    flip: bool

    def apply(self, images: Tensor) -> Tensor:
        """A moved copy of images (B, C, H, W)."""
        moved = torch.roll(images, (self.offset, self.offset), (2, 3))
        return moved.flip(3) if self.flip else moved

    def undo(self, images: Tensor) -> Tensor:
        """What :meth:`apply` made, moved back."""
        back = images.flip(3) if self.flip else images
        return torch.roll(back, (-self.offset, -self.offset), (2, 3))


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


def _norm(gradient: Tensor, whole: Optional[WholeBatch]) -> float:
    return gradient.norm().item() if whole is None else float(sum_(gradient.double().square().sum()).sqrt())


def _finite(value: float, name: str, step: Union[int, float]) -> float:
    if not math.isfinite(value):
        raise DataError(
            f'{name} is {value} in step {step:g}; lower lr, or check the model for weights that are not finite'
        )
    return value
