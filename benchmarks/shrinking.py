# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The model of any config at a size that is built and run in a second, with the structure that it has.

Kept: the kind of attention, norms, layer scales, position biases, window sizes, the number of stages. Reduced: blocks
of a stage, layers of encoders and decoders, queries, and the widths of a backbone where what reads it can follow.
"""

import contextlib
import copy
import inspect
from typing import Any, Dict, Iterator, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.contexts import replaced
from psaq_mm.type_names import type_name

TOWERS = ('backbone', 'image_encoder', 'vision_encoder', 'vision_backbone', 'visual_encoder')
"""Keys under which a model has the network that reads the picture."""

TINY_TEXT = 'TinyTextModel'
"""Stand-in for a language model whose weights would be downloaded; see :func:`register_tiny_text`."""

_LAYERS = ('depths', 'depth', 'num_layers', 'layers')
_PATCHES = 4
"""Patches of a side of the pictures of a network with position embeddings of one size."""


def tower_path(model: Mapping) -> Optional[Tuple[str, ...]]:
    """Where the config of a model has that of its backbone or image tower; None where it has none.

    Example:
        >>> tower_path(dict(type='ImageClassifier', backbone=dict(type='SwinTransformer')))
        ('backbone',)
    """
    for key in TOWERS:
        part = model.get(key)
        if isinstance(part, (list, tuple)) and part and isinstance(part[0], dict):
            return key, 0
        if isinstance(part, dict) and 'type' in part:
            return (key, 'module') if isinstance(part.get('module'), dict) else (key,)
    return None


def part_of(model: Mapping, path: Sequence) -> Any:
    """The part of a nested config at a path."""
    for key in path:
        model = model[key]
    return model


# ---------------------------------------------------------------------- settings of an architecture
def _fewer(layers: Any, outputs: int = 1) -> Any:
    """Two blocks in the first stage (one of them shifts its windows) and one in each other; a plain stack keeps one
    for each output.
    """
    if isinstance(layers, (list, tuple)):
        return [min(number, 2 if i == 0 else 1) for i, number in enumerate(layers)]
    return min(layers, max(2, outputs))


_SPECIAL = dict(
    MViT=dict(num_layers=4, downscale_indices=[1, 2, 3]),  # the layers that begin a stage
    ViTSAM=dict(num_layers=2, global_attn_indexes=[1]),  # the layers without windows
    Conformer=dict(depths=6),  # three stages of convolutions beside the tokens
    EfficientFormer=dict(layers=[2, 1, 1, 2], vit_num=1),  # attention in the last of all blocks alone
    HiViT=dict(depths=[1, 1, 8]),  # numbers of its outputs are those of a block of the last stage, and of no other
)
"""Settings of classes whose layers depend on each other."""

_SIZES = dict(DaViT=224, EfficientFormer=224)
"""Sides of pictures, in pixels, of classes without an argument for it."""


def _shrink_settings(settings: Dict, outputs: int, widths: bool) -> None:
    """Reduce an architecture, as a library's table or a config gives it, in place."""
    for key in _LAYERS:
        if isinstance(settings.get(key), (int, list, tuple)):
            settings[key] = _fewer(settings[key], outputs)
    if widths:
        _shrink_widths(settings)


def _shrink_widths(settings: Dict) -> None:
    heads = settings.get('num_heads')
    width = settings.get('embed_dims', settings.get('channels'))
    key = 'embed_dims' if 'embed_dims' in settings else 'channels'
    if isinstance(heads, int) and isinstance(width, int) and width % heads == 0 and heads > 3:
        settings.update(num_heads=3, **{key: 3 * (width // heads)})
        if 'feedforward_channels' in settings:
            settings['feedforward_channels'] = int(settings['feedforward_channels'] * 3 / heads) // 2 * 2
    elif isinstance(heads, (list, tuple)) and all(b == 2 * a for a, b in zip(heads, heads[1:])):
        each = (width if isinstance(width, int) else width[0]) // heads[0] if width else 0
        few = [2**i for i in range(len(heads))]
        if isinstance(width, int):
            settings.update(num_heads=few, **{key: each})
        elif width and all(w == each * h for w, h in zip(width, heads)):
            settings.update(num_heads=few, **{key: [each * number for number in few]})
    elif heads is None and isinstance(settings.get('channels'), (list, tuple)) and 'depths' in settings:
        settings['channels'] = [32 * 2**i for i in range(len(settings['channels']))]  # ConvNeXt
    elif heads is None and isinstance(settings.get('embed_dims'), (list, tuple)) and 'layers' in settings:
        settings['embed_dims'] = [32 * 2**i for i in range(len(settings['embed_dims']))]  # PoolFormer, RIFormer


@contextlib.contextmanager
def table_entry(cls: type, arch: Optional[str], settings: Optional[Dict]) -> Iterator[None]:
    """Inside the block an architecture of a class has other settings in the class's table."""
    name = next((name for name in ('arch_zoo', 'arch_settings') if isinstance(getattr(cls, name, None), dict)), None)
    if settings is None or name is None:
        yield
        return
    table = getattr(cls, name)
    holder = next(base for base in cls.__mro__ if name in vars(base))
    setattr(holder, name, {**table, arch: settings})
    try:
        yield
    finally:
        setattr(holder, name, table)


def settings_of(cls: type, arch: Any) -> Optional[Dict]:
    """The settings that a class's table has for an architecture; None where the class has no such table."""
    for name in ('arch_zoo', 'arch_settings'):
        table = getattr(cls, name, None)
        if isinstance(table, dict) and isinstance(arch, str):
            for key in (arch, arch.lower()):
                if isinstance(table.get(key), dict):
                    return copy.deepcopy(table[key])
    return None


# ---------------------------------------------------------------------- the backbone
def _outputs(tower: Dict) -> int:
    """How many outputs of a plain stack of layers a config names."""
    indices = tower.get('out_indices')
    if isinstance(indices, (list, tuple)):
        return max(len(indices), -min(indices))
    return abs(indices) if isinstance(indices, int) else 1


def _image_size(tower: Dict, cls: type) -> Any:
    """The size of pictures that a backbone is built for: its config's, else its class's default; None without one."""
    if cls.__name__ in _SIZES:
        return None
    default = inspect.signature(cls).parameters.get('img_size')
    if 'img_size' in tower or default is None:
        return tower.get('img_size')
    return None if default.default is inspect.Parameter.empty else default.default


def shrink_tower(tower: Dict, cls: type, widths: bool) -> Tuple[Optional[str], Optional[Dict]]:
    """Reduce the config of a backbone in place.

    Args:
        tower: Of the backbone.
        cls: Its class.
        widths: Whether its widths are reduced too.

    Returns:
        Name and settings for :func:`table_entry`, or None twice where the config needs none.
    """
    arch = tower.get('arch')
    settings = settings_of(cls, arch)
    outputs = _outputs(tower)
    for one in (tower, settings, arch if isinstance(arch, dict) else None):
        if one is not None:
            plain = any(isinstance(one.get(key), int) for key in _LAYERS)
            _shrink_settings(one, outputs, widths)
            if plain and isinstance(tower.get('out_indices'), (list, tuple)) and min(tower['out_indices']) >= 0:
                tower['out_indices'] = list(range(outputs))
    for key in ('pretrained', 'frozen_stages'):
        tower.pop(key, None)
    for base in cls.__mro__:
        for one in (tower, settings):
            if one is not None:
                one.update({key: value for key, value in _SPECIAL.get(base.__name__, {}).items() if key in one})
    patch, size = tower.get('patch_size'), _image_size(tower, cls)
    if isinstance(patch, int) and size:
        side = _PATCHES * patch
        tower['img_size'] = side if isinstance(size, int) else (side, side)
    elif size:
        tower['img_size'] = size
    return (arch.lower() if hasattr(cls, 'arch_zoo') else arch, settings) if settings else (None, None)


# ---------------------------------------------------------------------- necks and heads
_READERS = ('neck', 'decode_head', 'auxiliary_head', 'panoptic_head', 'head')
_FEW = dict(
    num_layers=1,
    num_cp=0,  # activation checkpointing, for which mmdet wants another package
    num_queries=10,
    fc_out_channels=32,
    decoder_depth=1,
    num_dyhead_blocks=1,
    max_per_img=5,
    dense_topk_ratio=1.5,
)


_TIED = ('kernel_generate_head', 'san_cfg', 'maskgen_cfg')
"""Parts whose settings must agree with those of another part: they stay as they are."""


def _is_free(head: Dict) -> bool:
    """Whether nothing outside of a head of a segmentor depends on its hidden width."""
    return type_name(head) in ('UPerHead', 'FCNHead', 'SegformerHead') and head.get('num_convs') != 0


def shrink_others(model: Any) -> None:
    """Reduce layers, queries and hidden widths of every part of a model but its backbone, in place."""
    if isinstance(model, dict):
        for key, value in model.items():
            if key in _FEW and isinstance(value, int) and not isinstance(value, bool):
                model[key] = min(value, _FEW[key])
            elif key == 'channels' and _is_free(model):
                model[key] = 32
            elif key not in (*TOWERS, *_TIED):
                shrink_others(value)
    elif isinstance(model, (list, tuple)):
        for value in model:
            shrink_others(value)


def image_side(cls: type) -> Optional[int]:
    """The side in pixels of the pictures that a class without an argument for it takes; None where it takes any."""
    return _SIZES.get(cls.__name__)


def follow_widths(model: Dict, widths: Sequence[int]) -> None:
    """Have what reads a backbone take its widths, in place.

    Args:
        model: Config of a detector, segmentor or classifier.
        widths: Channels of each output of its backbone.
    """
    neck = model.get('neck')
    first = neck[0] if isinstance(neck, (list, tuple)) and neck else neck
    if first and 'in_channels' in first:
        _set_channels(first, widths)
        if isinstance(first.get('in_channels'), int) and model.get('head'):
            return
        if type_name(model.get('type')) != 'ImageClassifier':
            return
    for key in _READERS[1:]:
        for head in model[key] if isinstance(model.get(key), (list, tuple)) else [model.get(key)]:
            head = (head or {}).get('kernel_generate_head', head)
            if head and 'in_channels' in head:
                _set_channels(head, widths)


def _set_channels(reader: Dict, widths: Sequence[int]) -> None:
    """Take the widths of the outputs that a neck or head reads."""
    indices = reader.get('in_index')
    if isinstance(reader['in_channels'], (list, tuple)):
        chosen = [widths[i] for i in indices] if isinstance(indices, (list, tuple)) else list(widths)
        reader['in_channels'] = chosen[: len(reader['in_channels'])]
    else:
        reader['in_channels'] = widths[indices if isinstance(indices, int) else -1]
        if reader.get('num_convs') == 0 and 'channels' in reader:
            reader['channels'] = reader['in_channels']


# ---------------------------------------------------------------------- language models
class TinyTextModel(nn.Module):
    """A language model of random weights, as far as mmdet's Grounding DINO uses one: a token a word.

    Args:
        width: Channels of its tokens.
        **ignored: What the real one is given.
    """

    pad_to_max, max_tokens = False, 256

    def __init__(self, width: int = 768, **ignored: Any):
        super().__init__()
        body = nn.Embedding(16, width)
        body.language_dim = width
        self.language_backbone = nn.ModuleDict(dict(body=body))

    def forward(self, captions: Sequence[str], **ignored: Any) -> Dict[str, Tensor]:
        """Features (B, tokens, width), masks and positions of the words of captions of one length."""
        words = torch.tensor([[sum(map(ord, word)) % 16 for word in caption.split()] for caption in captions])
        count = words.shape[1]
        return dict(
            embedded=self.language_backbone['body'](words),
            masks=torch.eye(count, dtype=torch.bool).expand(len(words), -1, -1),
            position_ids=torch.arange(count).expand(len(words), -1),
            text_token_mask=torch.ones_like(words, dtype=torch.bool),
        )


def register_tiny_text() -> None:
    """Have mmdet's registry know :data:`TINY_TEXT`."""
    from mmdet.registry import MODELS

    if TINY_TEXT not in MODELS:
        MODELS.register_module(name=TINY_TEXT, module=TinyTextModel)


def drop_training_parts(model: Dict) -> None:
    """Take out what a self-supervised model computes its targets with, whose weights would be downloaded, in place."""
    if 'target_generator' in model:
        model['target_generator'] = None


@contextlib.contextmanager
def no_downloads() -> Iterator[None]:
    """Inside the block a class that loads weights as it is built fails."""
    from mmengine.runner.checkpoint import CheckpointLoader

    def refuse(path: str, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f'needs a download: {path}')

    with replaced(CheckpointLoader, 'load_checkpoint', refuse):
        yield


def replace_text(model: Dict) -> bool:
    """Put :data:`TINY_TEXT` in place of the language model of a detector's config; whether it has one."""
    if not isinstance(model.get('language_model'), dict):
        return False
    model['language_model'] = dict(type=TINY_TEXT)
    return True


def plain(value: Any) -> Any:
    """A config as dictionaries and lists that may be changed; types are as they were."""
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value
