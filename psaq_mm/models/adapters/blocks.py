# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The parts of a transformer block: which norm feeds which layers, what is added to the stream, which sums are edges.

Quantization (edges), RepQ's folding and rotation read the same parts.
"""

from typing import Iterable, NamedTuple, Optional, Tuple

from torch import Tensor, nn

from psaq_mm.models.adapters.match import class_named
from psaq_mm.quantization import (
    AdapterSpec,
    ConvertFn,
    adopt,
    attention_parts,
    edge_quantizer,
    feeds_activation,
    norm_feeds,
    quantize_output_,
    takes_folding,
)

__all__ = [
    'BlockParts',
    'Feed',
    'FeedForward',
    'Writer',
    'add_residual_edges',
    'adopt_block',
    'feed_forward',
    'is_identity',
    'join',
    'layer_scale',
    'mark_parts',
    'outputs_are_edges',
    'quantize_outputs',
    'standard_parts',
]

_SEQUENTIAL_FFN = ('mmcv.cnn.bricks.transformer.FFN', 'mmpretrain.models.backbones.deit3.DeiT3FFN')
_PACKED_GATE = ('mmpretrain.models.utils.swiglu_ffn.SwiGLUFFN', 'mmpretrain.models.utils.swiglu_ffn.SwiGLUFFNFused')
_TIMM_MLP = ('timm.layers.mlp.Mlp',)
_TIMM_PACKED_GATE = ('timm.layers.mlp.GluMlp',)
_TIMM_GATE = ('timm.layers.mlp.SwiGLU',)


class Feed(NamedTuple):
    """A norm, and all layers that read its output.

    Attributes:
        norm: LayerNorm, or what a build of the model has in its place.
        layers: Every Linear layer and convolution that reads it. RepQ folds scales into one of them alone.
        padded: Whether the output is padded with zeros as tokens, by a window.
    """

    norm: nn.Module
    layers: Tuple[nn.Module, ...]
    padded: bool = False


class Writer(NamedTuple):
    """A layer whose output is added to the residual stream.

    Attributes:
        layer: Linear layer or convolution.
        scale: (channels,), the LayerScale between the layer and the sum, or None.
    """

    layer: nn.Module
    scale: Optional[nn.Parameter] = None


class BlockParts(NamedTuple):
    """Parts of a block of a backbone.

    Attributes:
        feeds: Norms that read the residual stream, with what reads them.
        writers: Layers that write to the stream.
        hidden: Layers whose output goes straight to an activation.
        inner: Norms inside of a branch (between values and output projection, in a gated network), with what reads
            them: their scales may be folded as well.
    """

    feeds: Tuple[Feed, ...]
    writers: Tuple[Writer, ...]
    hidden: Tuple[nn.Module, ...] = ()
    inner: Tuple[Feed, ...] = ()


class FeedForward(NamedTuple):
    """Parts of a feed-forward network.

    Attributes:
        first: Layers that read its input: two side by side in an unpacked gated network; none in an unknown class.
        hidden: Those whose output goes straight to an activation. A gated network multiplies half of its first layer's
            output with the activation of the other half: that output stays an edge of its own.
        last: The layer that gives its output; None in an unknown class.
        scale: LayerScale behind ``last`` inside of the network, or None.
    """

    first: Tuple[nn.Module, ...] = ()
    hidden: Tuple[nn.Module, ...] = ()
    last: Optional[nn.Module] = None
    scale: Optional[nn.Parameter] = None


def is_identity(*modules: object) -> bool:
    """Whether nothing is computed there: None or Identity."""
    return all(module is None or isinstance(module, nn.Identity) for module in modules)


def layer_scale(module: Optional[nn.Module]) -> Optional[nn.Parameter]:
    """The factors (channels,) of a LayerScale of any library; None where there is none."""
    if is_identity(module):
        return None
    if isinstance(module, nn.Parameter):
        return module
    return next(module.parameters())


def feed_forward(ffn: nn.Module) -> FeedForward:
    """Parts of a feed-forward network of mmcv, mmpretrain or timm; of an unknown class there are none."""
    if class_named(ffn, _SEQUENTIAL_FFN):
        hidden = tuple(layer[0] for layer in ffn.layers if isinstance(layer, nn.Sequential))
        last = [layer for layer in ffn.layers.modules() if isinstance(layer, nn.Linear)][-1]
        return FeedForward(hidden[:1], hidden, last, layer_scale(getattr(ffn, 'gamma2', None)))
    if class_named(ffn, _TIMM_MLP):
        return FeedForward((ffn.fc1,), (ffn.fc1,), ffn.fc2)
    if class_named(ffn, _TIMM_PACKED_GATE):
        return FeedForward((ffn.fc1,), (), ffn.fc2)
    if class_named(ffn, _TIMM_GATE):
        return FeedForward((ffn.fc1_g, ffn.fc1_x), (ffn.fc1_g,), ffn.fc2)
    if class_named(ffn, _PACKED_GATE):
        return FeedForward((ffn.w12,), (), ffn.w3, layer_scale(getattr(ffn, 'gamma2', None)))
    return FeedForward()


def standard_parts(
    norm1: nn.Module,
    attention: nn.Module,
    norm2: nn.Module,
    ffn: nn.Module,
    scale1: Optional[Tensor] = None,
    scale2: Optional[Tensor] = None,
    padded: bool = False,
) -> BlockParts:
    """Parts of a block that normalizes before its attention and before its feed-forward network.

    Args:
        norm1: Before the attention.
        attention: As :func:`psaq_mm.quantization.attention_parts` tells it. Of one that it does not tell, the layers
            stay unknown.
        norm2: Before the feed-forward network. The same module as ``norm1`` is one feed.
        ffn: Feed-forward network.
        scale1: LayerScale (channels,) behind the attention.
        scale2: LayerScale behind the feed-forward network, if not inside of it.
        padded: Whether a window pads between ``norm1`` and the projections.
    """
    parts, network = attention_parts(attention), feed_forward(ffn)
    if parts is None:  # mmseg's, before it is converted
        return BlockParts((Feed(norm1, (), padded), Feed(norm2, network.first)), (), network.hidden)
    projections = tuple(dict.fromkeys((parts.queries.layer, parts.keys.layer, parts.values.layer)))
    feeds = (Feed(norm1, projections, padded), Feed(norm2, network.first))
    if norm1 is norm2:
        feeds = (Feed(norm1, projections + network.first, padded),)
    writers = [Writer(parts.proj, scale1)]
    if network.last is not None:
        writers.append(Writer(network.last, network.scale if scale2 is None else scale2))
    return BlockParts(feeds, tuple(writers), network.hidden)


def join(name: str, child: str) -> str:
    """Dotted name of a child; the model itself is called ``''``."""
    return f'{name}.{child}' if name else child


def mark_parts(parts: BlockParts) -> None:
    """Tell the layers of a block which norm feeds them alone, and which of them go straight to an activation."""
    for feed in parts.feeds + parts.inner:
        if len(feed.layers) == 1:
            mark_norm(feed.norm, feed.layers[0])
    for layer in parts.hidden:
        feeds_activation(layer)


def mark_norm(norm: nn.Module, layer: nn.Module) -> None:
    """Tell that ``norm`` feeds ``layer`` alone, where the two are a LayerNorm and a layer that its scales fold into."""
    if isinstance(norm, nn.LayerNorm) and takes_folding(layer):
        norm_feeds(norm, layer)


def adopt_block(block: nn.Module, mixin: Optional[type], parts: BlockParts, name: str, spec: AdapterSpec) -> nn.Module:
    """Make a transformer block an instance of ``mixin`` too, with what its norms feed and its residual sums; the block.

    Args:
        block: Of a library.
        mixin: Its forward applies ``residual1_quantizer`` and ``residual2_quantizer``. None: the library's forward
            stays, and the sums are no edges.
        parts: Of the block.
        name: Its dotted name.
        spec: As an adapter gets it.
    """
    mark_parts(parts)
    return block if mixin is None else add_residual_edges(adopt(block, mixin), name, spec)


def add_residual_edges(block: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    """Give a transformer block a quantizer for each residual sum, None where the spec quantizes none; the block."""
    block.residual1_quantizer = edge_quantizer(spec, join(name, 'residual1'))
    block.residual2_quantizer = edge_quantizer(spec, join(name, 'residual2'))
    return block


def quantize_outputs(module: nn.Module, name: str, spec: AdapterSpec, children: Iterable[str]) -> None:
    """Make the outputs of some children edges; those that are missing, None or an Identity are left out.

    Args:
        module: The parent.
        name: Its dotted name.
        spec: As an adapter gets it.
        children: Names relative to ``module``, dotted if deeper.
    """
    for path in children:
        child = module
        for part in path.split('.'):
            child = getattr(child, part, None)
        if isinstance(child, nn.Module) and not isinstance(child, nn.Identity):
            quantize_output_(child, join(name, path), spec)


def outputs_are_edges(*children: str) -> ConvertFn:
    """The adapter of a module that only needs :func:`quantize_outputs` of these children."""

    def convert(module: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        quantize_outputs(module, name, spec, children)
        return module

    return convert
