# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Samples out of a trained model: noise is changed until the model sees diverse patches in it."""

import functools
import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from psaq_mm.calibration import find_attention
from psaq_mm.errors import DataError
from psaq_mm.pictures import Source, source_names, source_of
from psaq_mm.pictures.image_spec import ImageSpec
from psaq_mm.psaq_vit.priors import VARIATION_RANGE, variation_prior
from psaq_mm.psaq_vit.similarity import patch_similarity_entropy
from psaq_mm.psaq_vit.taps import AttentionTaps
from psaq_mm.ranks import WholeBatch, sum_

__all__ = ['GeneratedSamples', 'SampleGenerator']

Weight = Union[float, Callable[[float], float]]

GLOBAL_RATE, WINDOW_RATE = 0.20, 0.25
"""Learning rates of PSAQ-ViT's released code for global attention (ViT, DeiT) and for attention in windows (Swin)."""


@dataclass
class GeneratedSamples:
    """Result of :meth:`SampleGenerator.generate`.

    Attributes:
        samples: Shape (B, C, H, W), float32, detached, in the model's units and within its valid range.
        history: One dict per step: ``step``, ``lr``, the terms of the loss that took part (``entropy`` in nats,
            ``prior``, ``discrepancy``, ``class``), ``weight`` of the discrepancy, ``total``, and ``grad_norm``.
    """

    samples: Tensor
    history: List[Dict[str, float]] = field(default_factory=list)


def _outside_inference_mode(method: Callable) -> Callable:
    """Runs a method that needs gradients of its own under ``torch.inference_mode()`` too, which has none to switch
    on.
    """

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
        size: (height, width) of the samples in pixels.
        batch_size: Number of samples made together.
        steps: Optimizer steps of one round.
        rounds: How often the learning rate schedule runs; the optimizer keeps its state in between.
        lr: Greatest learning rate of Adam, in standard units a step. None takes PSAQ-ViT's for the model that
            :meth:`generate` is given: 0.25 for attention in windows (Swin), 0.20 for global attention (ViT, DeiT).
        betas: Of Adam.
        warmup: Share of a round in which the learning rate rises linearly; it falls as a cosine afterwards.
        entropy_weight: Weight of the patch similarity entropy. 0 switches it off, also for models without attention.
        prior_weight: Weight of the total variation prior.
        discrepancy_weight: Weight of the discrepancy where the caller gives one.
        class_weight: Weight of the class loss where the caller gives one.
        variation: Range the target of the total variation is drawn from, once a call of ``generate``.
        jitter: Greatest roll in pixels, by one offset in both axes; one value, or one a round.
        flip: Probability of a horizontal flip of the batch.
        init: Source of the first images: a name of :func:`~psaq_mm.pictures.source_names` such as 'gaussian', 'pink' and
            'dead_leaves', or what :func:`~psaq_mm.pictures.source_of` takes, such as
            ``dict(type='psaq_mm.DeadLeaves')``.
        drop_tokens: Leading tokens to leave out of the patch similarity: 1 for a class token. Defaults to None, as many
            as the model has before its patches, which whoever calls :meth:`generate` knows.
        points: Grid points of the similarity density.
        bandwidth: Bandwidth of the similarity density.
        value_range: Similarities that bound the grid of the density. Defaults to None, those of each batch as in the
            released code; no gradient flows through them, so a step can narrow the grid and lower the entropy it
            raises on the grid it saw. A fixed range such as (-1, 1) does not move.
        min_size: Least (height, width) the model takes: one patch, or one window.
        seed: Seed of a run that is given no random generator.

    Raises:
        DataError: On a setting out of range, naming it.

    Example:
        >>> made = SampleGenerator(size=(224, 224), batch_size=8, steps=100, drop_tokens=1).generate(vit, ImageSpec())
        >>> made.samples.shape
        torch.Size([8, 3, 224, 224])
    """

    def __init__(
        self,
        size: Tuple[int, int] = (224, 224),
        batch_size: int = 8,
        steps: int = 100,
        rounds: int = 1,
        lr: Optional[float] = 0.25,
        betas: Tuple[float, float] = (0.5, 0.9),
        warmup: float = 0.2,
        entropy_weight: float = 1.0,
        prior_weight: float = 0.05,
        discrepancy_weight: float = 1.0,
        class_weight: float = 1.0,
        variation: Tuple[float, float] = VARIATION_RANGE,
        jitter: Union[int, Sequence[int]] = 30,
        flip: float = 0.5,
        init: Union[str, Source, Mapping, Sequence] = 'gaussian',
        drop_tokens: Optional[int] = None,
        points: int = 10,
        bandwidth: float = 0.01,
        value_range: Optional[Tuple[float, float]] = None,
        min_size: Union[int, Tuple[int, int]] = 1,
        seed: int = 0,
    ) -> None:
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.min_size = (min_size, min_size) if isinstance(min_size, int) else tuple(min_size)
        self.batch_size, self.steps, self.rounds = batch_size, steps, rounds
        self.lr, self.betas, self.warmup = lr, tuple(betas), warmup
        self.entropy_weight, self.prior_weight = entropy_weight, prior_weight
        self.discrepancy_weight, self.class_weight = discrepancy_weight, class_weight
        self.variation, self.flip, self.drop_tokens = tuple(variation), flip, drop_tokens
        self.init = init if isinstance(init, str) else source_of(init)
        self.jitter = (jitter,) * rounds if isinstance(jitter, int) else tuple(jitter)
        self.points, self.bandwidth, self.seed = points, bandwidth, seed
        self.value_range = None if value_range is None else tuple(value_range)
        self._check()

    def _check(self) -> None:
        if len(self.size) != 2 or len(self.min_size) != 2:
            raise DataError(f'size={self.size} and min_size={self.min_size} must be (height, width)')
        for name in ('batch_size', 'steps', 'rounds'):
            if getattr(self, name) < 1:
                raise DataError(f'{name}={getattr(self, name)} must be at least 1')
        if self.lr is not None and not self.lr > 0:
            raise DataError(f'lr={self.lr} must be positive')
        for name in ('warmup', 'flip'):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f'{name}={getattr(self, name)} must be within 0 .. 1')
        if len(self.jitter) != self.rounds or min(self.jitter) < 0:
            raise DataError(
                f'jitter={self.jitter} must be one nonnegative number of pixels for each of the {self.rounds} rounds'
            )
        if len(self.variation) != 2 or not 0 <= self.variation[0] <= self.variation[1]:
            raise DataError(f'variation={self.variation} must be a nonnegative (least, greatest)')
        if self.value_range is not None and not (
            len(self.value_range) == 2 and self.value_range[0] < self.value_range[1]
        ):
            raise DataError(f'value_range={self.value_range} must be (least, greatest) similarity, or None')
        if isinstance(self.init, str) and self.init not in source_names():
            raise DataError(
                f'init={self.init!r} must be one of {source_names()}, or a source; pass a tensor to generate() instead'
            )
        if not source_of(self.init).procedural:
            raise DataError(
                'init holds generated samples, which the synthesis cannot begin with: take a procedural source, such '
                'as '
                "dict(type='psaq_mm.PinkNoise')"
            )
        self._check_size(*self.size)

    def _check_size(self, height: int, width: int) -> None:
        if height < self.min_size[0] or width < self.min_size[1]:
            raise DataError(
                f'samples of {height} x {width} pixels are smaller than the {self.min_size[0]} x '
                f'{self.min_size[1]} of one patch or window; choose a larger size'
            )

    @_outside_inference_mode
    def generate(
        self,
        model: nn.Module,
        image_spec: ImageSpec,
        forward: Optional[Callable[[Tensor], Any]] = None,
        discrepancy: Optional[Callable[[Tensor], Tensor]] = None,
        class_loss: Optional[Callable[[Any], Tensor]] = None,
        weight: Optional[Weight] = None,
        init: Optional[Tensor] = None,
        generator: Optional[torch.Generator] = None,
        progress: Optional[Callable[[Dict[str, float]], None]] = None,
        prefix_tokens: int = 0,
        whole: Optional[WholeBatch] = None,
    ) -> GeneratedSamples:
        """Makes one batch of samples.

        Only the images are changed: no parameter of the model, or of what ``discrepancy`` calls, gets a gradient, and
        the global random state is not touched. The model runs in the mode (train or eval) it is in. It works under
        ``torch.no_grad()`` and ``torch.inference_mode()`` too; only the model must not have been built under the
        latter.

        Args:
            model: Teacher that the attention taps are put on.
            image_spec: Channels and range of the model's input.
            forward: Runs the teacher on images (B, C, H, W) in its units, in each step and before ``discrepancy``,
                which can thus use features kept by it. Defaults to ``model`` itself.
            discrepancy: What the student still gets wrong on images, a scalar that the samples raise. Defaults to
                None, without a student.
            class_loss: Scalar loss of the output of ``forward``, for example the cross entropy to a random class.
            weight: Weight of the discrepancy instead of ``discrepancy_weight``: a number, or a callable that gets the
                value of the discrepancy in each step and returns the weight.
            init: First images (B, C, H, W) in the model's units, which also give batch and size. Defaults to None, the
                source named by ``init`` of the class.
            generator: Source of randomness, on the CPU. Defaults to None, a new one seeded with ``seed``. Pass one to
                get other samples in each call.
            progress: Called after each step with its entry of the history.
            prefix_tokens: Tokens that the model puts before its patches, left out where ``drop_tokens`` is None.
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
        level = self.variation[0] + (self.variation[1] - self.variation[0]) * _uniform(generator)
        dropped = prefix_tokens if self.drop_tokens is None else self.drop_tokens
        taps = AttentionTaps(model, dropped) if self.entropy_weight else None
        greatest = self.rate_for(model)
        weight = self.discrepancy_weight if weight is None else weight
        history: List[Dict[str, float]] = []

        values = image_spec.to_standard(images)
        del images  # the same tensor, or one that is not needed again
        bounds = torch.tensor([image_spec.low, image_spec.high], device=device)[..., None, None]
        low, high = image_spec.to_standard(bounds)
        optimizer = torch.optim.Adam([values], lr=greatest, betas=self.betas)
        with _frozen(model):
            for step in range(self.steps * self.rounds):
                entry: Dict[str, float] = dict(step=step, lr=greatest * self._schedule(step % self.steps))
                move = self._draw_move(self.jitter[step // self.steps], generator)
                moved = move.apply(values).requires_grad_()
                with torch.enable_grad():
                    terms = self._terms(model, image_spec, moved, level, forward, discrepancy, class_loss, taps, whole)
                    total = self._total(terms, weight, entry)
                    # By the moved images, and not by the values: the move's own copies need no graph.
                    (grad,) = torch.autograd.grad(total, moved)
                entry['grad_norm'] = _finite(_norm(grad, whole), 'the gradient of the samples', step)
                values.grad = move.undo(grad)
                del moved, grad, terms, total
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

    def quality(
        self,
        model: nn.Module,
        image_spec: ImageSpec,
        values: Tensor,
        forward: Callable[[Tensor], Any],
        prefix_tokens: int = 0,
        whole: Optional[WholeBatch] = None,
    ) -> Tensor:
        """What samples are without a student: the terms of patch similarity and prior, for one who takes the gradient
        along.

        Args:
            model: Frozen teacher that the attention taps are put on.
            image_spec: Channels and range of the model's input.
            values: Samples in standard units, (B, C, H, W), that require a gradient. The target of their total
                variation is the middle of ``variation``.
            forward: Runs the teacher on the images, once.
            prefix_tokens: As for :meth:`generate`.
            whole: As for :meth:`generate`.

        Returns:
            The loss, ``()``; 0 where both weights are 0.

        Raises:
            DataError: A term is not finite.
            UnsupportedModelError: As for :meth:`generate`.
        """
        if not self.entropy_weight and not self.prior_weight:
            forward(image_spec.from_standard(values))
            return values.new_zeros(())
        dropped = prefix_tokens if self.drop_tokens is None else self.drop_tokens
        taps = AttentionTaps(model, dropped) if self.entropy_weight else None
        terms = self._terms(model, image_spec, values, sum(self.variation) / 2, forward, None, None, taps, whole)
        return self._total(terms, 0.0, dict(step=0))

    def _first_images(
        self, image_spec: ImageSpec, init: Optional[Tensor], generator: torch.Generator, device: torch.device
    ) -> Tensor:
        if init is None:
            return source_of(self.init)(self.batch_size, self.size, image_spec, generator, device=device)
        if init.dim() != 4 or not len(init) or init.shape[1] != image_spec.channels:
            raise DataError(f'init of shape {tuple(init.shape)} must be (batch, {image_spec.channels}, height, width)')
        self._check_size(*init.shape[2:])
        return image_spec.clamp(init.detach().to(device, torch.float32, copy=True))

    def _draw_move(self, jitter: int, generator: torch.Generator) -> '_Move':
        """A roll by one offset in both axes and a flip, for the whole batch alike."""
        offset = int(torch.randint(-jitter, jitter + 1, (), generator=generator))
        return _Move(offset, _uniform(generator) < self.flip)

    def _terms(
        self,
        model: nn.Module,
        image_spec: ImageSpec,
        moved: Tensor,
        level: float,
        forward: Optional[Callable[[Tensor], Any]],
        discrepancy: Optional[Callable[[Tensor], Tensor]],
        class_loss: Optional[Callable[[Any], Tensor]],
        taps: Optional[AttentionTaps],
        whole: Optional[WholeBatch],
    ) -> Dict[str, Tensor]:
        """Terms of the loss that take part, by name and without their weights."""
        images = image_spec.from_standard(moved)
        run = model if forward is None else forward
        terms: Dict[str, Tensor] = {}
        # Before the forward pass, so that autograd comes to it last: its gradient is not held while the network's is
        # computed.
        prior = variation_prior(moved, level, whole) if self.prior_weight else None
        if taps is not None:
            with taps.record(images) as record:
                output = run(images)
            terms['entropy'] = sum(
                patch_similarity_entropy(
                    tap.tokens,
                    tap.valid,
                    self.points,
                    self.bandwidth,
                    value_range=self.value_range,
                    groups_per_image=tap.groups_per_image,
                    reduce_range=None if whole is None else whole.range,
                )
                for tap in record
            )
        elif class_loss is not None or forward is not None:
            output = run(images)
        if prior is not None:
            terms['prior'] = prior
        if discrepancy is not None:
            terms['discrepancy'] = discrepancy(images)
        if class_loss is not None:
            terms['class'] = class_loss(output)
        if not terms:
            raise DataError('no term of the loss takes part; set entropy_weight or prior_weight above 0')
        for name, term in terms.items():
            if term.dim():
                raise DataError(f'the {name} term has shape {tuple(term.shape)} but must be a scalar')
            if whole is not None and name != 'prior':
                terms[name] = whole.mean(term)
        return terms

    def _total(self, terms: Dict[str, Tensor], weight: Weight, entry: Dict[str, float]) -> Tensor:
        """Weighted sum of the terms; writes their values into the entry."""
        numbers = torch.stack([term.detach().double() for term in terms.values()]).tolist()
        for name, value in zip(terms, numbers):
            entry[name] = _finite(value, f'the {name} term', entry['step'])
        weights = dict(entropy=-self.entropy_weight, prior=self.prior_weight, **{'class': self.class_weight})
        if 'discrepancy' in terms:
            entry['weight'] = float(weight(entry['discrepancy']) if callable(weight) else weight)
            weights['discrepancy'] = -entry['weight']
        entry['total'] = sum(weights[name] * entry[name] for name in terms)
        return sum(weights[name] * term for name, term in terms.items())

    def rate_for(self, model: nn.Module) -> float:
        """The greatest learning rate for a model: ``lr``, or PSAQ-ViT's for its kind of attention."""
        if self.lr is not None:
            return self.lr
        windows = any(getattr(module, 'window_size', None) is not None for _, module in find_attention(model))
        return WINDOW_RATE if windows else GLOBAL_RATE

    def _schedule(self, step: int) -> float:
        """Share of the learning rate in a step of a round: linear warm-up, then a cosine to zero."""
        warm = int(self.warmup * self.steps)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / (self.steps - warm)))


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


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Switches the gradients of a model's parameters off: their graph would only cost memory."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


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
