"""Quantizer modules: a scale and a zero point as buffers, which calibration sets and fake quantization uses."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Iterable, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.errors import DataError, NotCalibratedError, SpecError
from psaq_mm.quantization.grids import Grid, LogGrid, UniformGrid
from psaq_mm.quantization.logarithmic import fake_log_quantize
from psaq_mm.quantization.observers import LogObserver, Observer, build_observer
from psaq_mm.quantization.primitives import Rounded, fake_quantize, learned_fake_quantize, round_once

MODES = ('on', 'off')

# Values of the buffer ``calibrated`` that say which kind of quantizer has the range; 0 means that none was set. Older
# checkpoints have 1 (True) for every kind.
KINDS = {'affine': 2, 'log2': 3, 'log_sqrt2': 4}

# Buffers of a quantizer, the last component of its state-dict keys. The last two belong to a reparameterized input.
STATE_NAMES = ('scale', 'zero_point', 'calibrated', 'code_range', 'fill', 'folded_bias')


@dataclass(frozen=True, eq=False)
class Range:
    """Result of calibration: the scale and zero point of a quantizer, not set yet.

    Raises:
        DataError: They do not fit the quantizer.
    """

    quantizer: 'Quantizer'
    scale: Tensor
    zero_point: Tensor

    def __post_init__(self) -> None:
        self.quantizer.check_qparams(self.scale, self.zero_point)

    def set(self) -> None:
        """Set them."""
        self.quantizer.set_qparams(self.scale, self.zero_point)


class Quantizer(nn.Module):
    """Base of all quantizers: buffers, a mode, and an observer inside :func:`observing`.

    The buffers ``scale`` (float32), ``zero_point`` (int32), both ``()`` or ``(C,)``, ``calibrated`` (uint8, 0 or a
    number of :data:`KINDS`) and ``code_range`` (int32, least and greatest code) are in the state dict. The last two are
    compared on loading: a checkpoint of other bits, or of another kind of quantizer, is refused and leaves the
    quantizer uncalibrated. It would give wrong values without an error otherwise. Older checkpoints have ``calibrated``
    as a bool, which fits every kind.

    Args:
        grid: Which values the codes stand for.
        shape: Of scale and zero point.
        kind: One of :data:`KINDS`.

    Attributes:
        name: What errors call this quantizer; set on conversion.
        mode: ``'on'`` fake-quantizes, ``'off'`` passes the input on.
        observer: None outside :func:`observing`. Inside it records the input, which is passed on in every mode.
    """

    scale: Tensor
    zero_point: Tensor
    calibrated: Tensor
    code_range: Tensor

    def __init__(self, grid: Grid, shape: Tuple[int, ...] = (), kind: str = 'affine'):
        super().__init__()
        self.grid, self.bits, self.kind = grid, grid.bits, kind
        self.qmin, self.qmax = grid.qmin, grid.qmax
        self.name = ''
        self.mode = 'on'
        self.observer: Optional[Observer] = None
        self.register_buffer('scale', torch.ones(shape))
        self.register_buffer('zero_point', torch.zeros(shape, dtype=torch.int32))
        # The kind has no key of its own, so that older checkpoints load strictly here, and new ones in older versions.
        self.register_buffer('calibrated', torch.tensor(0, dtype=torch.uint8))
        self.register_buffer('code_range', torch.tensor([self.qmin, self.qmax], dtype=torch.int32))
        # A copy of ``calibrated``: to read the buffer in every forward would make the host wait for the device.
        self._ready = False

    def forward(self, x: Tensor, valid: Optional[Tensor] = None) -> Tensor:
        """Record ``x`` while observing, else apply the current mode.

        Args:
            x: Any shape; channels on ``channel_axis`` if there is one.
            valid: Row mask for observing, see :func:`.rows.valid_rows_of`; without effect otherwise.

        Returns:
            ``x`` itself while observing and in the mode ``'off'``, else a new tensor of its shape and dtype.

        Raises:
            NotCalibratedError: The mode is ``'on'`` and no range was set.
            DataError: NaN or infinity was observed, or a shape does not fit.
        """
        if self.observer is not None:
            self._observe(self.observer, x, valid)
        elif self.mode == 'on':
            self.require_calibrated()
            return self.fake_quantize(x)
        elif self.mode != 'off':
            raise SpecError(
                f'mode={self.mode!r} of quantizer {self.name!r} is not known: choose one of '
                f'{", ".join(map(repr, MODES))}.'
            )
        return x

    def require_calibrated(self) -> None:
        """Raise NotCalibratedError, naming the quantizer, if it has no range."""
        # The buffer is read only before an error: weight averaging may have copied into it.
        if not self._ready and not self._refresh():
            raise NotCalibratedError(
                f'Quantizer {self.name!r} was never calibrated: calibrate the model, load a quantized checkpoint, or '
                f"switch it off with set_mode(model, 'off', {self.name!r})."
            )

    def _refresh(self) -> bool:
        self._ready = not self.calibrated.is_meta and bool(self.calibrated)
        return self._ready

    # ------------------------------------------------------------------ what each kind defines
    def fake_quantize(self, x: Tensor) -> Tensor:
        """Quantize and dequantize ``x`` with a straight-through gradient."""
        raise NotImplementedError

    def new_observer(self) -> Observer:
        """An observer that has seen nothing."""
        raise NotImplementedError

    # ------------------------------------------------------------------ calibration
    def _observe(self, observer: Observer, x: Tensor, valid: Optional[Tensor] = None) -> None:
        try:
            observer.observe(x, valid)
        except DataError as error:
            raise DataError(f'Quantizer {self.name!r}: {error}') from error

    @property
    def saw_data(self) -> bool:
        """Whether the current observer saw any value."""
        return self.observer is not None and self.observer.saw_data

    def finish(self, owner: nn.Module) -> List[Range]:
        """Ranges that follow from the observed data. Nothing is set yet.

        Args:
            owner: Parent module of this quantizer.

        Returns:
            The range of this quantizer, and of others that change with it.

        Raises:
            NotCalibratedError: Nothing was observed.
        """
        return [Range(self, *self._observed().qparams(self.grid))]

    def _observed(self) -> Observer:
        if self.observer is None or not self.observer.saw_data:
            raise NotCalibratedError(
                f'Quantizer {self.name!r} saw no data in calibration: run at least one image '
                f"through it, or switch it off with set_mode(model, 'off', {self.name!r})."
            )
        return self.observer

    def calibrate_from(self, x: Tensor) -> None:
        """Set the range from one tensor (a weight).

        Raises:
            DataError: The tensor is empty or not finite.
        """
        self.range_of(x).set()

    def range_of(self, x: Tensor) -> Range:
        """The range for one tensor (a weight), which is not set.

        Raises:
            DataError: The tensor is empty or not finite.
        """
        observer = self.new_observer()
        self._observe(observer, x)
        if not observer.saw_data:
            raise DataError(
                f'Quantizer {self.name!r}: a tensor of shape {tuple(x.shape)} has no value to take a range from.'
            )
        return Range(self, *observer.qparams(self.grid))

    # ------------------------------------------------------------------ effects of folding, see :mod:`.reparam`
    def shifted(self, bias: Optional[Tensor], dtype: torch.dtype) -> Optional[Tensor]:
        """The bias to add after the product with this quantizer's output: the layer's own and the folded one.

        Args:
            bias: The layer's own, or None.
            dtype: Of the layer's weight.
        """
        return bias

    def fill_padding(self, x: Tensor, valid: Tensor) -> Tensor:
        """The input ``x``, ``(..., C)``, whose padding (``valid``, ``(...)``, is False) gets the value of 0 now."""
        return x

    def forget_folding(self) -> None:
        """Undo the folding. Called before full-precision weights replace the folded ones."""

    @torch.no_grad()
    def forget_range(self) -> None:
        """Mark the quantizer as not calibrated."""
        self.calibrated.fill_(0)
        self._ready = False

    @torch.no_grad()
    def set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set scale and zero point, in place, and mark the quantizer as calibrated.

        Args:
            scale: Positive, finite, of the shape of the buffer.
            zero_point: Integers in ``[qmin, qmax]``, same shape.

        Raises:
            DataError: Shape or value does not fit.
        """
        self.check_qparams(scale, zero_point)
        # In place: a DDP wrapper or an average of weights may hold the buffers.
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.calibrated.fill_(KINDS[self.kind])
        self._ready = True

    def check_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """Raise DataError where :meth:`set_qparams` does not take the two."""
        if scale.shape != self.scale.shape or zero_point.shape != self.scale.shape:
            raise DataError(
                f'Quantizer {self.name!r} needs a scale of shape {tuple(self.scale.shape)}, not '
                f'{tuple(scale.shape)} (zero point {tuple(zero_point.shape)}).'
            )
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise DataError(f'Quantizer {self.name!r} needs a positive, finite scale, not {scale.min().item()}.')
        if not bool(((zero_point >= self.qmin) & (zero_point <= self.qmax)).all()):
            raise DataError(f'Quantizer {self.name!r} needs zero points from {self.qmin} to {self.qmax}.')

    def _apply(self, fn, *args, **kwargs):
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer.is_floating_point()}
        super()._apply(fn, *args, **kwargs)
        # Ranges stay float32 whatever the dtype of the model: model.half() would round the scale.
        for name, buffer in exact.items():
            if self._buffers[name].dtype != torch.float32:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        # Not in load_state_dict: mmengine's loader calls this method of every module directly.
        problem = self._problem_of(state_dict.get(prefix + 'code_range'), state_dict.get(prefix + 'calibrated'))
        if problem:
            error_msgs.append(f'{prefix[:-1]} was saved {problem}')
            self.forget_range()
        else:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            if self._refresh():
                # An older checkpoint does not say the kind; one saved from now on does.
                self.calibrated = self.calibrated.to(torch.uint8).fill_(KINDS[self.kind])
        self._refresh()

    def _problem_of(self, codes: Optional[Tensor], calibrated: Optional[Tensor]) -> str:
        """Why a state does not fit this quantizer; empty where it does, or where nothing tells."""
        if codes is not None and codes.tolist() != [self.qmin, self.qmax]:
            return (
                f'with codes {codes.tolist()} but has {[self.qmin, self.qmax]} here: build the model with the bits '
                f'of the checkpoint.'
            )
        kind = 0 if calibrated is None or calibrated.is_meta else int(calibrated)
        if kind in (0, 1, KINDS[self.kind]):
            return ''
        name = next((name for name, number in KINDS.items() if number == kind), f'unknown (number {kind})')
        return (
            f'by a quantizer of kind {name!r} but is {self.kind!r} here: build the model with the softmax_quantizer '
            f'of the checkpoint.'
        )


def check_mode(mode: str) -> None:
    """Raise SpecError where the mode is not known."""
    if mode not in MODES:
        raise SpecError(f"mode={mode!r} is not known: choose 'on' or 'off'.")


@contextmanager
def in_mode(chosen: Iterable[Quantizer], mode: str) -> Iterator[None]:
    """Quantizers have one mode inside the ``with`` block; afterwards each has its own again.

    Args:
        chosen: Quantizers of a model.
        mode: ``'on'`` or ``'off'``.

    Raises:
        SpecError: The mode is not known; no quantizer has changed.
    """
    check_mode(mode)
    modes = [(quantizer, quantizer.mode) for quantizer in chosen]
    try:
        for quantizer, _ in modes:
            quantizer.mode = mode
        yield
    finally:
        for quantizer, before in modes:
            quantizer.mode = before


@contextmanager
def observing(quantizers: Iterable[Quantizer]) -> Iterator[None]:
    """Quantizers record their inputs inside the ``with`` block and pass them on.

    Each has a new observer, which is removed at the end: call :meth:`Quantizer.finish` inside the block.
    """
    watched = list(quantizers)
    try:
        for quantizer in watched:
            quantizer.observer = quantizer.new_observer()
        yield
    finally:
        for quantizer in watched:
            quantizer.observer = None


class AffineQuantizer(Quantizer):
    """Fake quantization of one tensor with equal steps.

    Args:
        bits: Width of a code, 2 to 8.
        symmetric: Signed codes and zero point 0, else unsigned codes.
        channel_axis: Axis with one scale per channel, None for one scale.
        num_channels: Number of channels, needed with ``channel_axis``.
        observer: Name of the observer that finds the range, see :func:`.observers.build_observer`.
        full_range: See :func:`.primitives.choose_qparams`.

    Attributes:
        log_ratio: None, or the parameter that the scale is learned by, see :func:`.ranges.learn_ranges_`.
        reduced_range: Whether the codes have 7 bits because integer kernels add two products in 16 bits, see
            ``w_reduce_range`` of :class:`.spec.QuantSpec`.

    Raises:
        SpecError: A setting is out of range.

    Example:
        >>> quantizer = AffineQuantizer(bits=8)
        >>> quantizer.calibrate_from(torch.tensor([-1., 2.]))
        >>> quantizer(torch.tensor([0., 5.]))
        tensor([0., 2.])
    """

    log_ratio: Optional[Tensor] = None
    reduced_range = False

    def __init__(
        self,
        bits: int,
        symmetric: bool = False,
        channel_axis: Optional[int] = None,
        num_channels: Optional[int] = None,
        observer: str = 'minmax',
        full_range: bool = False,
    ):
        if (channel_axis is None) != (num_channels is None):
            raise SpecError(
                f'channel_axis={channel_axis} and num_channels={num_channels} belong together: give both or neither.'
            )
        grid = UniformGrid(bits, symmetric, full_range)
        super().__init__(grid, () if num_channels is None else (num_channels,))
        self.symmetric = symmetric
        self.channel_axis = channel_axis
        self.observer_name = observer
        build_observer(observer)  # a wrong name fails here and not in calibration

    def extra_repr(self) -> str:
        """Settings for ``repr``."""
        channels = '' if self.channel_axis is None else f', channels={self.scale.numel()} on axis {self.channel_axis}'
        return (
            f'bits={self.bits}, symmetric={self.symmetric}{channels}, observer={self.observer_name}, mode={self.mode}'
        )

    def fake_quantize(self, x: Tensor) -> Tensor:
        """As :meth:`Quantizer.fake_quantize`."""
        if self.log_ratio is not None and self.log_ratio.requires_grad and torch.is_grad_enabled():
            return learned_fake_quantize(x, self.scale, self.log_ratio, self.zero_point, self.qmin, self.qmax)
        return fake_quantize(x, self.scale, self.zero_point, self.qmin, self.qmax, self.channel_axis)

    def round_once(self, x: Tensor) -> Rounded:
        """See :func:`.primitives.round_once`; the quantizer has to be calibrated."""
        return round_once(x, self.scale, self.zero_point, self.qmin, self.qmax, self.channel_axis)

    def new_observer(self) -> Observer:
        """As :meth:`Quantizer.new_observer`."""
        return build_observer(self.observer_name, self.channel_axis)


class LogQuantizer(Quantizer):
    """Fake quantization of one nonnegative tensor with steps of equal ratio (RepQ-ViT, arXiv 2212.08254, section 3.3).

    ``scale`` is the value of code 0, the greatest one; ``zero_point`` is 0 and unused. See
    :func:`.logarithmic.log_quantize` for the codes.

    Args:
        bits: Width of a code, 2 to 8.
        base: ``'log2'`` or ``'log_sqrt2'``.

    Raises:
        SpecError: A setting is out of range.
    """

    def __init__(self, bits: int, base: str = 'log_sqrt2'):
        super().__init__(LogGrid(bits, base), kind=base)
        self.base = base

    def extra_repr(self) -> str:
        """Settings for ``repr``."""
        return f'bits={self.bits}, base={self.base}, mode={self.mode}'

    def fake_quantize(self, x: Tensor) -> Tensor:
        """As :meth:`Quantizer.fake_quantize`."""
        return fake_log_quantize(x, self.scale, self.bits, self.base)

    def new_observer(self) -> Observer:
        """As :meth:`Quantizer.new_observer`."""
        return LogObserver()
