"""Scale reparameterization: ranges per channel after a LayerNorm, folded away so that one scale serves.

Source: RepQ-ViT (arXiv 2212.08254), section 3.2. A LayerNorm output y, observed with a scale s and zero point z for
each channel, is rewritten with one scale s~ and zero point z~ for all::

    ratio = s / s~          shift = s * (z - z~)          y' = (y + shift) / ratio

which LayerNorm gives when its gain is divided by ``ratio`` and its offset becomes ``(offset + shift) / ratio``. The
Linear that reads y' takes the change back: ``W' = W * ratio`` and ``b' = b - W @ shift``, so that ``W' @ y' + b' = W @
y + b``. The code of y' under (s~, z~) is that of y under (s, z). s~ is the mean of the scales as in the released code;
z~ is the *rounded* mean of the zero points, moved into the code range, where the released code keeps a fraction that no
integer kernel has.

A channel that is constant on the samples has no scale. Its value goes into the bias as a whole: y' is 0 there.
"""

from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.errors import DataError, NotCalibratedError, SpecError
from psaq_mm.quantization.channel_observers import build_channel_observer
from psaq_mm.quantization.quantizers import AffineQuantizer

# A channel that hardly varies on the samples would get a gain out of float32's comfort, and clip all that varies more.
MIN_RATIO = 1e-4


def norm_feeds(norm: nn.Module, linear: nn.Module) -> None:
    """Tell that the output of a LayerNorm goes to one Linear and nowhere else but through row-wise moves.

    Without :attr:`.QuantSpec.reparameterize` it has no effect. A LayerNorm without gain and offset has nothing to fold
    into: its Linear then keeps one range.

    Raises:
        SpecError: The Linear has another norm before it already.
    """
    if getattr(norm, 'weight', None) is None or getattr(norm, 'bias', None) is None:
        return
    if norm_before(linear) not in (None, norm):
        raise SpecError('A Linear can only be reparameterized with one LayerNorm before it.')
    # In a tuple: as an attribute of its own it would be a second name of the LayerNorm, with state-dict keys.
    linear.norm_before = (norm,)


def norm_before(linear: nn.Module) -> Optional[nn.Module]:
    """The LayerNorm that :func:`norm_feeds` named for a Linear, or None."""
    return getattr(linear, 'norm_before', (None,))[0]


class ReparameterizedQuantizer(AffineQuantizer):
    """Input quantizer of a Linear after a LayerNorm: observes per channel, quantizes per tensor.

    Two more buffers hold what folding leaves behind: ``fill`` ``(in_features,)``, the image of 0 under it, which
    whoever pads the LayerNorm output has to pad with, and ``folded_bias`` ``(out_features,)``, to be added after the
    product (a buffer and not the layer's bias, because some layers have none). Both are 0 before any folding.

    Args:
        bits: Width of a code, 2 to 8.
        in_features: Channels of the LayerNorm.
        out_features: Outputs of the Linear.
        observer: As for :class:`.AffineQuantizer`, here per channel.
    """

    def __init__(self, bits: int, in_features: int, out_features: int, observer: str = 'percentile'):
        super().__init__(bits, observer=observer)
        self.register_buffer('fill', torch.zeros(in_features))
        self.register_buffer('folded_bias', torch.zeros(out_features))

    def new_observer(self):
        return build_channel_observer(self.observer_name)

    def observed_qparams(self) -> Tuple[Tensor, Tensor]:
        raise SpecError(f'Quantizer {self.name!r} is calibrated with its layer: call calibrate(model, run).')

    @torch.no_grad()
    def forget_folding(self) -> None:
        """Full-precision weights took the place of folded ones: what folding left behind goes with those."""
        self.fill.zero_()
        self.folded_bias.zero_()
        self.calibrated.fill_(0)
        self._refresh()


class Folding(NamedTuple):
    """What folding the ranges of a layer's input into LayerNorm and layer comes to.

    Attributes:
        scale, zero_point: Of all channels from then on, ``()``, float32 and int32.
        ratio, shift: Of each channel, (in_features,), float64; see the top of this file.
    """

    scale: Tensor
    zero_point: Tensor
    ratio: Tensor
    shift: Tensor


@torch.no_grad()
def folding_of(layer: nn.Module) -> Folding:
    """What :func:`reparameterize_` would do; nothing is changed.

    Raises:
        As :func:`reparameterize_`.
    """
    quantizer, norm = layer.input_quantizer, norm_before(layer)
    if not quantizer.saw_data:
        raise NotCalibratedError(f'Quantizer {quantizer.name!r} saw no data: put samples through its layer first.')
    scale, zero_point = (t.double() for t in quantizer.observer.qparams(quantizer.bits))
    if not norm.weight.shape == scale.shape == (layer.weight.shape[1],):
        raise DataError(
            f'The LayerNorm before {quantizer.name!r} has {norm.weight.numel()} channels and the layer '
            f'{layer.weight.shape[1]}: name the LayerNorm that feeds it.'
        )
    live, value = ~quantizer.observer.constant, quantizer.observer.low.double()
    if bool(live.any()):
        one_scale = scale[live].mean()
        one_zero = zero_point[live].mean().round().clamp(quantizer.qmin, quantizer.qmax)
    else:
        one_scale, one_zero = scale.new_ones(()), scale.new_zeros(())
    floor = one_scale * MIN_RATIO
    # Where the floor holds, the zero point moves with the scale: the middle of the range keeps its code.
    middle = (quantizer.qmax - quantizer.qmin) / 2
    center = (middle - zero_point) * scale
    held = live & (scale < floor)
    scale = torch.where(held, floor, scale)
    zero_point = torch.where(held, (middle - center / scale).round(), zero_point)
    ratio = torch.where(live, scale / one_scale, torch.ones_like(scale))
    shift = torch.where(live, scale * (zero_point - one_zero), -value)
    return Folding(*quantizer.checked(one_scale.float(), one_zero.to(torch.int32)), ratio, shift)


def folded_weight(layer: nn.Module, folding: Folding) -> Tensor:
    """The layer's weight as it will be."""
    # float64: the product of a division and a multiplication has to give the weight back.
    return (layer.weight.detach().double() * folding.ratio).to(layer.weight.dtype)


@torch.no_grad()
def reparameterize_(layer: nn.Module) -> None:
    """Fold the ranges that a layer's :class:`ReparameterizedQuantizer` observed into LayerNorm and layer, in place.

    In full precision the two together give what they gave before, up to rounding. Folding a layer that was folded
    before adds up. The layer's weight quantizer has to be calibrated anew afterwards.

    Args:
        layer: Quantized Linear; its LayerNorm as :func:`norm_feeds` named it.

    Raises:
        NotCalibratedError: The quantizer observed nothing.
        DataError: The channels of LayerNorm and layer differ. Nothing is changed then.
    """
    fold_(layer, folding_of(layer))


@torch.no_grad()
def fold_(layer: nn.Module, folding: Folding) -> None:
    """Do what :func:`folding_of` found."""
    quantizer, norm, ratio, shift = layer.input_quantizer, norm_before(layer), folding.ratio, folding.shift
    quantizer.folded_bias.copy_(quantizer.folded_bias.double() - layer.weight.double() @ shift)
    quantizer.fill.copy_((quantizer.fill.double() + shift) / ratio)
    layer.weight.copy_(folded_weight(layer, folding))
    norm.weight.copy_(norm.weight.double() / ratio)
    norm.bias.copy_((norm.bias.double() + shift) / ratio)
    quantizer.set_qparams(folding.scale, folding.zero_point)
    quantizer.observer = None
    quantizer.mode = 'on'
