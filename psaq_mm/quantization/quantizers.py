"""The quantizer modules: a range as buffers, and the three things a quantizer can do with a tensor."""

from contextlib import contextmanager
from typing import Iterable, Iterator, Optional, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.errors import DataError, NotCalibratedError, SpecError
from psaq_mm.quantization.logarithmic import LogObserver, fake_log_quantize
from psaq_mm.quantization.observers import build_observer
from psaq_mm.quantization.primitives import (
    Rounded,
    choose_qparams,
    fake_quantize,
    learned_fake_quantize,
    qrange,
    round_once,
)

MODES = ('on', 'observe', 'off')

# What the buffer ``calibrated`` holds beside 0: of which kind of quantizer the range is. Older checkpoints have 1
# (True) for each.
KINDS = {'affine': 2, 'log2': 3, 'log_sqrt2': 4}

# Buffers of a quantizer, the last component of its state-dict keys. The last two belong to a reparameterized input.
STATE_NAMES = ('scale', 'zero_point', 'calibrated', 'code_range', 'fill', 'folded_bias')


class Quantizer(nn.Module):
    """What every quantizer is: buffers, a mode, and an observer while it observes.

    The buffers ``scale`` (float32), ``zero_point`` (int32), both ``()`` or ``(C,)``, ``calibrated`` (uint8, 0 or a
    number of :data:`KINDS`) and ``code_range`` (int32, least and greatest code) are in the state dict. The last two are
    compared on loading: a checkpoint of other bits, or of another kind of quantizer, is refused and leaves the
    quantizer uncalibrated, instead of giving wrong values silently. Older checkpoints have ``calibrated`` as a bool,
    which fits every kind.

    Args:
        bits: Width of a code, 2 to 8.
        codes: Least and greatest code.
        shape: Of scale and zero point.
        kind: One of :data:`KINDS`.

    Attributes:
        name: What errors call this quantizer; set on conversion.
        mode: ``'on'`` fake-quantizes, ``'observe'`` records and passes the input on, ``'off'`` passes it on.
    """

    def __init__(self, bits: int, codes: Tuple[int, int], shape: Tuple[int, ...] = (), kind: str = 'affine'):
        super().__init__()
        self.bits, self.kind = bits, kind
        self.qmin, self.qmax = codes
        self.name = ''
        self.mode = 'on'
        self.observer = None
        self.register_buffer('scale', torch.ones(shape))
        self.register_buffer('zero_point', torch.zeros(shape, dtype=torch.int32))
        # The kind is kept here and not under a key of its own: strict loading of checkpoints from before, and by code
        # from before, goes on.
        self.register_buffer('calibrated', torch.tensor(0, dtype=torch.uint8))
        self.register_buffer('code_range', torch.tensor([self.qmin, self.qmax], dtype=torch.int32))
        # Reading the buffer in every forward would make the host wait for the device.
        self._ready = False

    @property
    def state_names(self) -> Tuple[str, ...]:
        """Names of this quantizer's buffers."""
        return tuple(self._buffers)

    def forward(self, x: Tensor, valid: Optional[Tensor] = None) -> Tensor:
        """Apply the current mode.

        Args:
            x: Any shape; channels on ``channel_axis`` if there is one.
            valid: Row mask for observing, see :func:`.rows.valid_rows_of`; without effect in the other modes.

        Returns:
            ``x`` itself in the modes ``'off'`` and ``'observe'``, else a new tensor of its shape and dtype.

        Raises:
            NotCalibratedError: The mode is ``'on'`` and no range was set.
            DataError: NaN or infinity was observed, or a shape does not fit.
        """
        if self.mode == 'on':
            self.require_calibrated()
            return self.fake_quantize(x)
        if self.mode == 'observe':
            self._observe(x, valid)
        elif self.mode != 'off':
            raise SpecError(
                f'mode={self.mode!r} of quantizer {self.name!r} is not known: choose one of '
                f'{", ".join(map(repr, MODES))}.'
            )
        return x

    def require_calibrated(self) -> None:
        """Raise NotCalibratedError, naming the quantizer, if it has no range."""
        # The buffer itself is asked only on the way to an error: weight averaging may have copied into it.
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

    def new_observer(self):
        """An observer that has seen nothing."""
        raise NotImplementedError

    def observed_qparams(self) -> Tuple[Tensor, Tensor]:
        """Scale and zero point for what the observer saw."""
        raise NotImplementedError

    # ------------------------------------------------------------------ calibration
    def begin_observing(self) -> None:
        """Start over with a new observer; from now on inputs are recorded and passed on."""
        self.observer = self.new_observer()
        self.mode = 'observe'

    def _observe(self, x: Tensor, valid: Optional[Tensor] = None) -> None:
        if self.observer is None:
            self.observer = self.new_observer()
        try:
            self.observer.update(x.detach(), valid)
        except DataError as error:
            raise DataError(f'Quantizer {self.name!r}: {error}') from error

    @property
    def saw_data(self) -> bool:
        """Whether the current observer saw any value."""
        return self.observer is not None and self.observer.saw_data

    def finish_observing(self) -> None:
        """Set the range from what was observed, drop the observer and switch on.

        Raises:
            NotCalibratedError: Nothing was observed.
        """
        if not self.saw_data:
            raise NotCalibratedError(
                f'Quantizer {self.name!r} saw no data in calibration: run at least one image '
                f"through it, or switch it off with set_mode(model, 'off', {self.name!r})."
            )
        self.set_qparams(*self.observed_qparams())
        self.observer = None
        self.mode = 'on'

    def calibrate_from(self, x: Tensor) -> None:
        """Set the range from one tensor (a weight), whatever was observed before; the mode stays.

        Raises:
            DataError: The tensor is empty or not finite.
        """
        self.set_qparams(*self.qparams_of(x))
        self.observer = None

    def qparams_of(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Scale and zero point for one tensor, which are not set; what was observed stays.

        Raises:
            DataError: The tensor is empty or not finite.
        """
        kept, self.observer = self.observer, None
        try:
            self._observe(x)
            if not self.saw_data:
                raise DataError(
                    f'Quantizer {self.name!r}: a tensor of shape {tuple(x.shape)} has no value to take a range from.'
                )
            return self.checked(*self.observed_qparams())
        finally:
            self.observer = kept

    @torch.no_grad()
    def set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set scale and zero point, in place, and mark the quantizer as calibrated.

        Args:
            scale: Positive, finite, of the shape of the buffer.
            zero_point: Integers in ``[qmin, qmax]``, same shape.

        Raises:
            DataError: Shape or value does not fit.
        """
        self.checked(scale, zero_point)
        # In place: whoever holds the buffers (a DDP wrapper, an average of weights) keeps seeing the right ones.
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.calibrated.fill_(KINDS[self.kind])
        self._ready = True

    def checked(self, scale: Tensor, zero_point: Tensor) -> Tuple[Tensor, Tensor]:
        """The two, as :meth:`set_qparams` takes them; DataError where it does not."""
        if scale.shape != self.scale.shape or zero_point.shape != self.scale.shape:
            raise DataError(
                f'Quantizer {self.name!r} needs a scale of shape {tuple(self.scale.shape)}, not '
                f'{tuple(scale.shape)} (zero point {tuple(zero_point.shape)}).'
            )
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise DataError(f'Quantizer {self.name!r} needs a positive, finite scale, not {scale.min().item()}.')
        if not bool(((zero_point >= self.qmin) & (zero_point <= self.qmax)).all()):
            raise DataError(f'Quantizer {self.name!r} needs zero points from {self.qmin} to {self.qmax}.')
        return scale, zero_point

    def _apply(self, fn, *args, **kwargs):
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer.is_floating_point()}
        super()._apply(fn, *args, **kwargs)
        # model.half() would round the scale; ranges stay float32 whatever the dtype of the model.
        for name, buffer in exact.items():
            if self._buffers[name].dtype != torch.float32:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        # Not load_state_dict: mmengine's loader calls this method of every module itself.
        problem = self._problem_of(state_dict.get(prefix + 'code_range'), state_dict.get(prefix + 'calibrated'))
        if problem:
            error_msgs.append(f'{prefix[:-1]} was saved {problem}')
            self.calibrated.fill_(0)
        else:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            if self._refresh():
                # Also from a checkpoint that does not say the kind: what is saved from here on does.
                self.calibrated = self.calibrated.to(torch.uint8).fill_(KINDS[self.kind])
        self._refresh()

    def _problem_of(self, codes: Optional[Tensor], calibrated: Optional[Tensor]) -> str:
        """Why a state is not this quantizer's; empty where it is, or does not say."""
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
    """Refuse what is no mode that a caller sets; to observe is :func:`.convert.calibrate`'s."""
    if mode not in ('on', 'off'):
        raise SpecError(f"mode={mode!r} is not known: choose 'on' or 'off'.")


@contextmanager
def in_mode(chosen: Iterable[Quantizer], mode: str) -> Iterator[None]:
    """Quantizers in one mode inside the ``with`` block, each in its own again afterwards.

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
        log_ratio: None, or what the scale is learned by, see :func:`.ranges.learn_ranges_`.
        reduced_range: Whether its codes are of 7 bits so that products of a byte and two of them fit into 16 bits, see
            :class:`.spec.QuantSpec`.

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
        super().__init__(bits, qrange(bits, symmetric), () if num_channels is None else (num_channels,))
        self.symmetric, self.full_range = symmetric, full_range
        self.channel_axis = channel_axis
        self.observer_name = observer
        build_observer(observer)  # a wrong name shall fail here, not in calibration

    def extra_repr(self) -> str:
        channels = '' if self.channel_axis is None else f', channels={self.scale.numel()} on axis {self.channel_axis}'
        return (
            f'bits={self.bits}, symmetric={self.symmetric}{channels}, observer={self.observer_name}, mode={self.mode}'
        )

    def fake_quantize(self, x: Tensor) -> Tensor:
        if self.log_ratio is not None and self.log_ratio.requires_grad and torch.is_grad_enabled():
            return learned_fake_quantize(x, self.scale, self.log_ratio, self.zero_point, self.qmin, self.qmax)
        return fake_quantize(x, self.scale, self.zero_point, self.qmin, self.qmax, self.channel_axis)

    def round_once(self, x: Tensor) -> Rounded:
        """See :func:`.primitives.round_once`; the quantizer has to be calibrated."""
        return round_once(x, self.scale, self.zero_point, self.qmin, self.qmax, self.channel_axis)

    def new_observer(self):
        return build_observer(self.observer_name, self.channel_axis)

    def observed_qparams(self) -> Tuple[Tensor, Tensor]:
        low, high = self.observer.range(self.bits, self.symmetric)
        return choose_qparams(low, high, self.bits, self.symmetric, self.full_range)


class LogQuantizer(Quantizer):
    """Fake quantization of one nonnegative tensor with steps of equal ratio (RepQ-ViT, arXiv 2212.08254, section 3.3).

    ``scale`` is the greatest value, that of code 0; ``zero_point`` is 0 and unused. See
    :func:`.logarithmic.log_quantize` for the codes.

    Args:
        bits: Width of a code, 2 to 8.
        base: ``'log2'`` or ``'log_sqrt2'``.

    Raises:
        SpecError: A setting is out of range.
    """

    def __init__(self, bits: int, base: str = 'log_sqrt2'):
        if base not in ('log2', 'log_sqrt2'):
            raise SpecError(f"base={base!r} is not known: choose 'log2' or 'log_sqrt2'.")
        super().__init__(bits, qrange(bits, symmetric=False), kind=base)
        self.base = base

    def extra_repr(self) -> str:
        return f'bits={self.bits}, base={self.base}, mode={self.mode}'

    def fake_quantize(self, x: Tensor) -> Tensor:
        return fake_log_quantize(x, self.scale, self.bits, self.base)

    def new_observer(self):
        return LogObserver()

    def observed_qparams(self) -> Tuple[Tensor, Tensor]:
        return self.observer.delta(self.bits, self.base), torch.zeros_like(self.zero_point)
