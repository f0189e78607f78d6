# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What adapters tell of a transformer beyond its attention: which LayerNorm feeds which Linear, and which sums are
edges.
"""

from typing import Iterable, Optional

from torch import nn

from psaq_mm.models.adapters.match import class_named
from psaq_mm.quantization import edge_quantizer, feeds_activation, norm_feeds, quantize_output_

__all__ = ['SEQUENTIAL_FFN', 'TIMM_MLP', 'add_residual_edges', 'join', 'mark_ffn', 'mark_norm', 'quantize_outputs']

SEQUENTIAL_FFN = ('mmcv.cnn.bricks.transformer.FFN', 'mmpretrain.models.backbones.deit3.DeiT3FFN')
_PACKED_GATE = ('mmpretrain.models.utils.swiglu_ffn.SwiGLUFFN', 'mmpretrain.models.utils.swiglu_ffn.SwiGLUFFNFused')
TIMM_MLP = ('timm.layers.mlp.Mlp',)
_TIMM_PACKED_GATE = ('timm.layers.mlp.GluMlp',)


def join(name: str, child: str) -> str:
    """Dotted name of a child; the model itself is called ``''``."""
    return f'{name}.{child}' if name else child


def add_residual_edges(block: nn.Module, name: str, spec) -> nn.Module:
    """Give a transformer block a quantizer for each of its two residual sums, None where the spec has no such points;
    the block.
    """
    block.residual1_quantizer = edge_quantizer(spec, join(name, 'residual1'))
    block.residual2_quantizer = edge_quantizer(spec, join(name, 'residual2'))
    return block


def mark_norm(norm: nn.Module, layer: nn.Module) -> None:
    """Tell that ``norm`` feeds ``layer`` alone, where the two are a LayerNorm and a Linear."""
    if isinstance(norm, nn.LayerNorm) and isinstance(layer, nn.Linear):
        norm_feeds(norm, layer)


def mark_ffn(ffn: nn.Module, norm: Optional[nn.Module] = None) -> None:
    """Tell which Linear layers of a feed-forward network go straight to an activation, and which one its LayerNorm
    feeds.

    A gated one (``SwiGLU``) multiplies half of its first layer's output with the activation of the other half: that
    output stays an edge of its own. Two layers side by side (timm's unpacked ``SwiGLU``) share their LayerNorm, whose
    scales can then not be folded into one of them. Nothing is told of a class that is not known.

    Args:
        ffn: Feed-forward network of mmcv, mmpretrain or timm.
        norm: LayerNorm whose output goes to the network alone, or None.
    """
    first, hidden = None, []
    if class_named(ffn, SEQUENTIAL_FFN):
        hidden = [layer[0] for layer in ffn.layers if isinstance(layer, nn.Sequential)]
        first = hidden[0]
    elif class_named(ffn, TIMM_MLP):
        first, hidden = ffn.fc1, [ffn.fc1]
    elif class_named(ffn, _TIMM_PACKED_GATE):
        first = ffn.fc1
    elif class_named(ffn, _PACKED_GATE):
        first = ffn.w12
    for layer in hidden:
        feeds_activation(layer)
    if norm is not None and first is not None:
        mark_norm(norm, first)


def quantize_outputs(module: nn.Module, name: str, spec, children: Iterable[str]) -> None:
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
