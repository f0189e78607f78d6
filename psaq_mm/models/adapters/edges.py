# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which LayerNorm of a transformer block feeds which Linear, and which sums are edges."""

from typing import Iterable, List, NamedTuple, Optional, Tuple

from torch import nn

from psaq_mm.models.adapters.match import class_named
from psaq_mm.quantization import (
    AdapterSpec,
    ConvertFn,
    adopt,
    edge_quantizer,
    feeds_activation,
    norm_feeds,
    quantize_output_,
    takes_folding,
)

SEQUENTIAL_FFN = ('mmcv.cnn.bricks.transformer.FFN', 'mmpretrain.models.backbones.deit3.DeiT3FFN')
_PACKED_GATE = ('mmpretrain.models.utils.swiglu_ffn.SwiGLUFFN', 'mmpretrain.models.utils.swiglu_ffn.SwiGLUFFNFused')
TIMM_MLP = ('timm.layers.mlp.Mlp',)
_TIMM_PACKED_GATE = ('timm.layers.mlp.GluMlp',)


class BlockParts(NamedTuple):
    """Parts of a transformer block: ``norm1`` feeds the attention's ``qkv``, ``norm2`` the first layer of ``ffn``.

    Attributes:
        norm1: LayerNorm before the attention.
        attention: Has ``qkv`` and ``proj``.
        norm2: LayerNorm before the feed-forward network.
        ffn: Feed-forward network.
    """

    norm1: nn.Module
    attention: nn.Module
    norm2: nn.Module
    ffn: nn.Module


def join(name: str, child: str) -> str:
    """Dotted name of a child; the model itself is called ``''``."""
    return f'{name}.{child}' if name else child


def adopt_block(block: nn.Module, mixin: type, parts: BlockParts, name: str, spec: AdapterSpec) -> nn.Module:
    """Make a transformer block an instance of ``mixin`` too, with what its norms feed and its residual sums; the block.

    Args:
        block: Of a library.
        mixin: Its forward applies ``residual1_quantizer`` and ``residual2_quantizer``.
        parts: Of the block.
        name: Its dotted name.
        spec: As an adapter gets it.
    """
    mark_norm(parts.norm1, parts.attention.qkv)
    mark_ffn(parts.ffn, parts.norm2)
    return add_residual_edges(adopt(block, mixin), name, spec)


def add_residual_edges(block: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
    """Give a transformer block a quantizer for each residual sum, None where the spec quantizes none; the block."""
    block.residual1_quantizer = edge_quantizer(spec, join(name, 'residual1'))
    block.residual2_quantizer = edge_quantizer(spec, join(name, 'residual2'))
    return block


def mark_norm(norm: nn.Module, layer: nn.Module) -> None:
    """Tell that ``norm`` feeds ``layer`` alone, where the two are a LayerNorm and a layer that its scales fold into."""
    if isinstance(norm, nn.LayerNorm) and takes_folding(layer):
        norm_feeds(norm, layer)


def first_layers(ffn: nn.Module) -> Tuple[Optional[nn.Module], List[nn.Module]]:
    """The layer of a feed-forward network that reads its input, and the layers that go straight to an activation.

    A gated network (``SwiGLU``) multiplies half of its first layer's output with the activation of the other half: that
    output stays an edge of its own. Two layers side by side (timm's unpacked ``SwiGLU``) share their LayerNorm, whose
    scales cannot be folded into one of them. Of these, and of unknown classes, there is no first layer.

    Args:
        ffn: Feed-forward network of mmcv, mmpretrain or timm.
    """
    if class_named(ffn, SEQUENTIAL_FFN):
        hidden = [layer[0] for layer in ffn.layers if isinstance(layer, nn.Sequential)]
        return hidden[0], hidden
    if class_named(ffn, TIMM_MLP):
        return ffn.fc1, [ffn.fc1]
    if class_named(ffn, _TIMM_PACKED_GATE):
        return ffn.fc1, []
    return (ffn.w12 if class_named(ffn, _PACKED_GATE) else None), []


def mark_ffn(ffn: nn.Module, norm: Optional[nn.Module] = None) -> None:
    """Tell which layers of a feed-forward network go straight to an activation, and which one ``norm`` feeds.

    Args:
        ffn: Feed-forward network; nothing is told of a class that is not known.
        norm: LayerNorm whose output goes to the network alone, or None.
    """
    first, hidden = first_layers(ffn)
    for layer in hidden:
        feeds_activation(layer)
    if norm is not None and first is not None:
        mark_norm(norm, first)


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
