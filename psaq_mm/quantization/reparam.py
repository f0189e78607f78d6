"""Scale reparameterization: ranges per channel after a LayerNorm are folded into the weights around, leaving one scale.

Source: RepQ-ViT (arXiv 2212.08254), section 3.2. A LayerNorm output y, observed with a scale s and zero point z for
each channel, is replaced by a y' with one scale s~ and zero point z~ for all::

    ratio = s / s~          shift = s * (z - z~)          y' = (y + shift) / ratio

which LayerNorm gives when its gain is divided by ``ratio`` and its offset becomes ``(offset + shift) / ratio``. The
Linear that reads y' takes the change back: ``W' = W * ratio`` and ``b' = b - W @ shift``, so that ``W' @ y' + b' = W @
y + b``. The code of y' under (s~, z~) is that of y under (s, z). s~ is the mean of the scales as in the released code;
z~ is the *rounded* mean of the zero points, moved into the code range, where the released code keeps a fraction that no
integer kernel has.

A channel that is constant on the samples has no scale. Its value is moved into the bias: y' is 0 there.

A convolution without padding and without groups takes the change back as a Linear does, for each place of its kernel:
the 1 x 1 convolution of a feed-forward network, or the one that downsamples after a LayerNorm (ConvNeXt). Where zeros
are padded, zero would have to mean something else.
"""

from dataclasses import dataclass
from typing import List, Optional

import torch
from torch import Tensor, nn

from psaq_mm.errors import DataError, SpecError
from psaq_mm.quantization.grids import ChannelGrid
from psaq_mm.quantization.observers import FeatureObserver, Observer, build_rule
from psaq_mm.quantization.quantizers import AffineQuantizer, Range

# Least ratio of a channel's scale. Without it a channel that hardly varies on the samples would get a huge gain, and a
# value that varies more would be clipped.
MIN_RATIO = 1e-4


def takes_folding(layer: nn.Module) -> bool:
    """Whether what a LayerNorm before ``layer`` gives up can be folded into it: a Linear, or a convolution without
    padding and without groups.
    """
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding in ((0, 0), 'valid')
    return isinstance(layer, nn.Linear)


def norm_feeds(norm: nn.Module, layer: nn.Module) -> None:
    """Declare that only this layer reads the output of a LayerNorm. Rows may be moved in between.

    Without :attr:`.QuantSpec.reparameterize` it has no effect. A LayerNorm without gain and offset has nothing to fold
    into: its layer then keeps one range.

    Args:
        norm: LayerNorm.
        layer: A Linear, whose input has its channels last, or a convolution, whose input has them second.

    Raises:
        SpecError: The layer has another norm before it already, or is none that :func:`takes_folding`.
    """
    if getattr(norm, 'weight', None) is None or getattr(norm, 'bias', None) is None:
        return
    if norm_before(layer) not in (None, norm):
        raise SpecError('A Linear can only be reparameterized with one LayerNorm before it.')
    if not takes_folding(layer):
        raise SpecError(
            f'{layer} cannot be reparameterized with the LayerNorm before it: only a Linear, or a convolution without '
            'padding and groups, can.'
        )
    # In a tuple: as an attribute of its own it would be a second name of the LayerNorm, with state-dict keys.
    vars(layer)['norm_before'] = (norm,)


def norm_before(layer: nn.Module) -> Optional[nn.Module]:
    """The LayerNorm that :func:`norm_feeds` named for a layer, or None."""
    return getattr(layer, 'norm_before', (None,))[0]


@dataclass(frozen=True, eq=False)
class Folding(Range):
    """The range of a layer's input that holds once its channels are folded into LayerNorm and layer.

    Attributes:
        norm: The LayerNorm.
        layer: The Linear or convolution that reads its output, through this quantizer.
        ratio: ``(in_features,)``, float64, see the top of this file.
        shift: ``(in_features,)``, float64, see the top of this file.
    """

    norm: nn.Module
    layer: nn.Module
    ratio: Tensor
    shift: Tensor

    def weight(self) -> Tensor:
        """The layer's weight as it will be."""
        weight = self.layer.weight.detach()
        # float64: the product of a division and a multiplication has to give the weight back.
        ratio = self.ratio.reshape(-1, *[1] * (weight.dim() - 2))
        return (weight.double() * ratio).to(weight.dtype)

    @torch.no_grad()
    def set(self) -> None:
        """Fold, in place.

        In full precision LayerNorm and layer together give what they gave before, up to rounding. Folding a layer that
        was folded before adds up.
        """
        super().set()
        quantizer, norm, ratio, shift = self.layer.input_quantizer, self.norm, self.ratio, self.shift
        weight = self.layer.weight.double()
        quantizer.folded_bias.copy_(
            quantizer.folded_bias.double() - weight.reshape(*weight.shape[:2], -1).sum(-1) @ shift
        )
        quantizer.fill.copy_((quantizer.fill.double() + shift) / ratio)
        self.layer.weight.copy_(self.weight())
        norm.weight.copy_(norm.weight.double() / ratio)
        norm.bias.copy_((norm.bias.double() + shift) / ratio)


class ReparameterizedQuantizer(AffineQuantizer):
    """Input quantizer of a layer after a LayerNorm: observes per channel, quantizes per tensor.

    Two more buffers hold what folding does not write into LayerNorm and layer. ``fill`` ``(in_features,)`` is what 0
    becomes: pad the LayerNorm output with it. ``folded_bias`` ``(out_features,)`` is added after the product; it is a
    buffer and not the layer's bias, because some layers have none. Both are 0 before any folding.

    Args:
        bits: Width of a code, 2 to 8.
        in_features: Channels of the LayerNorm.
        out_features: Outputs of the layer.
        observer: As for :class:`.AffineQuantizer`, here per channel.
        symmetric: Signed codes with zero point 0. Nothing is lost by it: LayerNorm's offset moves each channel.
        axis: Of the channels: -1 before a Linear, 1 before a convolution.
    """

    fill: Tensor
    folded_bias: Tensor

    def __init__(
        self,
        bits: int,
        in_features: int,
        out_features: int,
        observer: str = 'percentile',
        symmetric: bool = False,
        axis: int = -1,
    ):
        super().__init__(bits, symmetric, observer=observer)
        self.axis = axis
        self.register_buffer('fill', torch.zeros(in_features))
        self.register_buffer('folded_bias', torch.zeros(out_features))

    def new_observer(self) -> Observer:
        """As :meth:`.Quantizer.new_observer`, per channel."""
        return FeatureObserver(build_rule(self.observer_name))

    def _observe(self, observer: Observer, x: Tensor, valid: Optional[Tensor] = None) -> None:
        super()._observe(observer, x.movedim(self.axis, -1) if x.dim() else x, valid)

    def finish(self, owner: nn.Module) -> List[Range]:
        """As :meth:`.Quantizer.finish`: the :class:`Folding`, and the range of the weight that it will make.

        Raises:
            NotCalibratedError: Nothing was observed.
            DataError: The channels of LayerNorm and layer differ, or the folded weight is not finite.
        """
        folding, weight_quantizer = self._folding(owner), owner.weight_quantizer
        if weight_quantizer.mode == 'off':
            return [folding]
        return [folding, weight_quantizer.range_of(folding.weight())]

    @torch.no_grad()
    def _folding(self, layer: nn.Module) -> Folding:
        observer, norm = self._observed(), norm_before(layer)
        if norm is None:
            raise SpecError(f'Quantizer {self.name!r} has no LayerNorm before it: name the one that feeds its layer.')
        scale, zero_point = (t.double() for t in observer.qparams(ChannelGrid(self.bits)))
        if not norm.weight.shape == scale.shape == (layer.weight.shape[1],):
            raise DataError(
                f'The LayerNorm before {self.name!r} has {norm.weight.numel()} channels and the layer '
                f'{layer.weight.shape[1]}: name the LayerNorm that feeds it.'
            )
        zero_point = zero_point + self.qmin  # the grid counts from 0
        low, high = observer.ends()
        live = low != high  # a constant channel is one that a norm's weight of 0 makes, for example
        if bool(live.any()):
            one_scale = scale[live].mean()
            one_zero = zero_point[live].mean().round().clamp(self.qmin, self.qmax)
            one_zero = one_zero.new_zeros(()) if self.symmetric else one_zero
        else:
            one_scale, one_zero = scale.new_ones(()), scale.new_zeros(())
        floor = one_scale * MIN_RATIO
        # Where the floor holds, the zero point moves with the scale: the middle of the range keeps its code.
        middle = (self.qmax + self.qmin) / 2
        center = (middle - zero_point) * scale
        held = live & (scale < floor)
        scale = torch.where(held, floor, scale)
        zero_point = torch.where(held, (middle - center / scale).round(), zero_point)
        ratio = torch.where(live, scale / one_scale, torch.ones_like(scale))
        shift = torch.where(live, scale * (zero_point - one_zero), -low.double())
        return Folding(self, one_scale.float(), one_zero.to(torch.int32), norm, layer, ratio, shift)

    def shifted(self, bias: Optional[Tensor], dtype: torch.dtype) -> Optional[Tensor]:
        """As :meth:`.Quantizer.shifted`, with the folded bias."""
        folded = self.folded_bias.to(dtype)
        return folded if bias is None else bias + folded

    def fill_padding(self, x: Tensor, valid: Tensor) -> Tensor:
        """As :meth:`.Quantizer.fill_padding`: the image of 0 under the folding."""
        return torch.where(valid.unsqueeze(-1), x, self.fill.to(x.dtype))

    @torch.no_grad()
    def forget_folding(self) -> None:
        """As :meth:`.Quantizer.forget_folding`."""
        self.fill.zero_()
        self.folded_bias.zero_()
        self.forget_range()
