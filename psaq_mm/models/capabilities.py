# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What works with a model's backbone beyond plain quantization, and in a sentence why the rest does not."""

from typing import Dict, List, NamedTuple

from torch import nn

from psaq_mm.calibration import find_attention
from psaq_mm.models.adapters import backbone_of
from psaq_mm.models.adapters.blocks import Feed
from psaq_mm.models.network import find_backbone, network_of
from psaq_mm.models.rotation import streams_of
from psaq_mm.quantization import norm_before, takes_folding

__all__ = ['Capability', 'capabilities']


class Capability(NamedTuple):
    """One thing that works with a backbone or does not.

    Attributes:
        number: How many layers, streams or modules it works on; 0 where it does not.
        text: What it works on, and why not on the rest; one line.
    """

    number: int
    text: str


def capabilities(model: nn.Module) -> Dict[str, Capability]:
    """What works with the backbone of a quantized model.

    Args:
        model: Quantized detector, segmentor, classifier or backbone.

    Returns:
        ``folding``: layers whose LayerNorm takes the scales of their channels (RepQ-ViT, arXiv 2212.08254, section
        3.2); ``rotation``: residual streams; ``similarity``: attention whose output patch similarity sees (PSAQ-ViT,
        arXiv 2203.02250, section 3.2); ``dynamic``: whether one graph takes pictures of every size.
    """
    net = network_of(find_backbone(model))
    return dict(
        folding=_folding(net),
        rotation=_rotation(model, net),
        similarity=_similarity(net),
        dynamic=_dynamic(net),
    )


def _folding(net: nn.Module) -> Capability:
    folded = sum(norm_before(module) is not None for module in net.modules())
    left = _unfolded(net)
    text = f'the LayerNorms of {folded} layers' if folded else 'no LayerNorm'
    return Capability(folded, text + (f'; not {"; ".join(left)}' if left else ''))


def _unfolded(net: nn.Module) -> List[str]:
    """Norms of the blocks whose scales are not folded, by reason."""
    backbone = backbone_of(net)
    names = {module: name for name, module in net.named_modules()}
    blocks = [] if backbone is None else [backbone.parts(block) for _, block in backbone.block_list(net)]
    reasons: Dict[str, List[str]] = {}
    for feed in (feed for parts in blocks for feed in parts.feeds + parts.inner):
        reason = _why_not_folded(feed)
        if reason:
            reasons.setdefault(reason, []).append(names.get(feed.norm, type(feed.norm).__name__))
    left = [
        f'{found[0]}{f" and {len(found) - 1} more" if len(found) > 1 else ""}, which {reason}'
        for reason, found in reasons.items()
    ]
    if backbone is not None and backbone.post_norm:
        left.append(f'those of {type(net).__name__}, which stand behind the layers of their branches')
    elif not any(parts.feeds + parts.inner for parts in blocks):
        left.append(f'those of {type(net).__name__}, whose readers are not told')
    return left


def _why_not_folded(feed: Feed) -> str:
    if not isinstance(feed.norm, nn.LayerNorm):
        return f'is a {type(feed.norm).__name__} and no LayerNorm'
    if not feed.layers:
        return 'is read by a feed-forward network that is not known'
    if len(feed.layers) > 1:
        return f'is read by {len(feed.layers)} layers'
    layer = feed.layers[0]
    return '' if takes_folding(layer) else f'is read by a {type(layer).__mro__[1].__name__}'


def _rotation(model: nn.Module, net: nn.Module) -> Capability:
    streams, left = streams_of(model, net)
    text = ', '.join(f'{title} ({stream.channels} channels)' for title, stream in streams) or 'no residual stream'
    return Capability(len(streams), text + (f'; not {"; ".join(left)}' if left else ''))


def _similarity(net: nn.Module) -> Capability:
    attention = find_attention(net)
    if not attention:
        return Capability(0, f'{type(net).__name__} has no attention over patches whose projections are told')
    return Capability(len(attention), f'{len(attention)} attention modules')


def _dynamic(net: nn.Module) -> Capability:
    backbone = backbone_of(net)
    if backbone is not None and backbone.dynamic_size(net):
        return Capability(1, f'pictures of any size from {backbone.min_side(net)} pixels')
    size = None if backbone is None else backbone.fixed_size(net)
    return Capability(0, f'one graph takes one size{"" if size is None else f", here {size[0]} x {size[1]} alone"}')
