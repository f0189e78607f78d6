# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What is known of a kind of backbone: one registered class, from which everything else reads.

Quantization takes the classes of its blocks and its attention from it, RepQ's folding and the rotation the norms and
layers of a block, patch similarity the number of prefix tokens, the pictures their size. A project elsewhere adds a
backbone by one class of its own, see docs/guides/adding_a_backbone.md.
"""

import re
from typing import Iterator, List, Mapping, Optional, Set, Tuple, Type

from torch import nn

from psaq_mm.errors import ConfigError
from psaq_mm.models.adapters.attention import adopt_attention
from psaq_mm.models.adapters.blocks import BlockParts, adopt_block, is_identity, outputs_are_edges
from psaq_mm.models.adapters.match import class_named
from psaq_mm.models.adapters.streams import NamedStreams
from psaq_mm.quantization import AdapterSpec, ConvertFn, register_adapter

__all__ = ['BACKBONES', 'Backbone', 'backbone_of', 'register_backbone']


class Backbone:
    """Description of one kind of backbone; subclass it and register the class with :func:`register_backbone`.

    Classes of libraries are named by ``module.ClassName``, so that no library is imported for them. A subclass of such
    a class counts as it, as long as it does not override the forward.

    Attributes:
        names: Classes of the network.
        wrappers: Classes that hold its blocks without being the network: timm's extractors of features, which hold
            anything.
        block_path: Regular expression over the dotted names, inside the network, of its blocks. Every module that it
            matches must be of a class in ``blocks``: another one would stay in floating point silently, and is refused.
        blocks: Classes of blocks, each with the mixin that has the quantized forward. Its residual sums are edges.
            None: the library's forward stays, and the sums are no edges.
        attention: Classes of attention, each with its mixin.
        edges: Children of the network whose outputs are edges: what the first block reads.
        others: Further classes inside the network, each with the function that converts it.
        post_norm: Whether the norms of its blocks stand behind the layers of their branches: none feeds a layer.
    """

    names: Tuple[str, ...] = ()
    wrappers: Tuple[str, ...] = ()
    block_path: str = ''
    blocks: Mapping[str, Optional[type]] = {}
    attention: Mapping[str, Optional[type]] = {}
    edges: Tuple[str, ...] = ()
    others: Mapping[str, ConvertFn] = {}
    post_norm: bool = False

    def describes(self, net: nn.Module) -> bool:
        """Whether this is the description of a network."""
        if class_named(net, self.names):
            return True
        return class_named(net, self.wrappers) is not None and any(
            class_named(block, self.blocks) for _, block in self.block_list(net)
        )

    # ---------------------------------------------------------------- parts
    def attention_of(self, block: nn.Module) -> Tuple[nn.Module, ...]:
        """Attention modules of a block; none of a block without attention."""
        return (block.attn,)

    def parts(self, block: nn.Module) -> BlockParts:
        """Norms and layers of a block; by default nothing is known of them."""
        return BlockParts((), ())

    def streams(self, model: nn.Module, net: nn.Module) -> NamedStreams:
        """Residual streams that may be rotated.

        Args:
            model: Detector, segmentor or classifier that holds the network, or the network itself.
            net: The network.

        Returns:
            Titles, each with a function that gives the stream or raises :class:`.streams.Unrotatable`.
        """
        return []

    def rotates_heads(self, attention: nn.Module) -> Tuple[bool, bool]:
        """Whether queries and keys of an attention module may be rotated together, and values with the output
        projection. By default a norm or a shortcut in between forbids it.
        """
        scores = is_identity(getattr(attention, 'q_norm', None), getattr(attention, 'k_norm', None))
        values = is_identity(getattr(attention, 'norm', None)) and not getattr(attention, 'v_shortcut', False)
        return scores, values

    # ---------------------------------------------------------------- pictures
    def prefix_tokens(self, net: nn.Module) -> int:
        """Tokens before those of the patches: class, distillation and register tokens."""
        return 0

    def fixed_size(self, net: nn.Module) -> Optional[Tuple[int, int]]:
        """The only (height, width) in pixels that the network takes; None where it takes several."""
        return None

    def patch(self, net: nn.Module) -> int:
        """Pixels of a side of a patch: the stride of the first convolution."""
        return next((max(module.stride) for module in net.modules() if isinstance(module, nn.Conv2d)), 1)

    def min_side(self, net: nn.Module) -> int:
        """The least side of a picture, in pixels: one attention window, or one patch under global attention."""
        for module in net.modules():
            size = getattr(module, 'window_size', None)
            if isinstance(size, (int, tuple)):
                return self.patch(net) * (size if isinstance(size, int) else max(size))
        return self.patch(net)

    def dynamic_size(self, net: nn.Module) -> bool:
        """Whether the network exports to a graph that takes pictures of any size."""
        return False

    # ---------------------------------------------------------------- conversion
    def unsupported(self, net: nn.Module) -> Optional[str]:
        """Why this build of the network cannot be quantized, in a sentence without its end; None where it can."""
        return None

    def convert_block(self, block: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """Convert a block, see :func:`psaq_mm.quantization.register_adapter`."""
        return adopt_block(block, self.blocks[class_named(block, self.blocks)], self.parts(block), name, spec)

    def convert_attention(self, attention: nn.Module, name: str, spec: AdapterSpec) -> nn.Module:
        """Convert an attention module; its two products are quantized."""
        mixin = self.attention[class_named(attention, self.attention)]
        return attention if mixin is None else adopt_attention(attention, mixin, name, spec)

    def block_list(self, net: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
        """Names and modules of the blocks of a network."""
        return ((name, part) for name, part in net.named_modules() if re.fullmatch(self.block_path, name))

    def strangers(self, net: nn.Module) -> List[Tuple[str, nn.Module]]:
        """Names and modules of blocks and attention of a class that is not described: they would stay in floating
        point silently. A parallel block is one, or attention that pools the tokens.
        """
        strangers: List[Tuple[str, nn.Module]] = []
        inside: Tuple[str, ...] = ()
        names = {module: name for name, module in net.named_modules()}
        blocks = dict(self.block_list(net))
        for name, module in net.named_modules():
            if name in blocks:
                inside = (name + '.',)
                if not class_named(module, self.blocks):
                    strangers.append((name, module))
                else:
                    strangers += [
                        (names.get(part, name), part)
                        for part in self.attention_of(module)
                        if not class_named(part, self.attention)
                    ]
            elif name and isinstance(getattr(module, 'num_heads', None), int) and not name.startswith(inside):
                strangers.append((name, module))
        return strangers


BACKBONES: List[Backbone] = []
"""The descriptions, in the order of registration."""

_ADAPTED: Set[str] = set()
"""Classes of blocks, attention and other parts that have an adapter."""


def register_backbone(cls: Type[Backbone]) -> Type[Backbone]:
    """Register a description: from then on its backbones are supported everywhere.

    Raises:
        ConfigError: It names no class, or a network of another description.
    """
    backbone = cls()
    if not backbone.names:
        raise ConfigError(f'{cls.__name__} names no class of a network: set names')
    for other in BACKBONES:
        shared = set(other.names) & set(backbone.names)
        if shared:
            raise ConfigError(
                f'{cls.__name__} describes {sorted(shared)[0]}, which {type(other).__name__} describes already: '
                'name it in one of them'
            )
    BACKBONES.append(backbone)
    edges = {name: outputs_are_edges(*backbone.edges) for name in backbone.names} if backbone.edges else {}
    for names, convert in (
        (backbone.blocks, backbone.convert_block),
        (backbone.attention, backbone.convert_attention),
        *((dict.fromkeys([name]), convert) for name, convert in {**edges, **backbone.others}.items()),
    ):
        new = frozenset(names) - _ADAPTED  # relatives share blocks and attention
        if new:
            _ADAPTED.update(new)
            register_adapter(lambda module, new=new: class_named(module, new) is not None, convert)
    return cls


def backbone_of(net: nn.Module) -> Optional[Backbone]:
    """The description of a network; None where there is none."""
    return next((backbone for backbone in BACKBONES if backbone.describes(net)), None)
