# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Names of Swin's weights in its releases, in timm and in OpenMMLab.

Three namings are known; the names alone tell which one a checkpoint has:

============  =====================================================  ===================================
naming        used by                                                a block's attention
============  =====================================================  ===================================
``original``  Swin's releases: classification, mmdet 2, mmseg 0.x,   ``layers.0.blocks.0.attn.qkv``,
              and timm before 0.9                                    ``layers.0.downsample``
``timm``      timm since 0.9, where downsampling is the first        ``layers.0.blocks.0.attn.qkv``,
              part of a stage and not the last                       ``layers.1.downsample``
``openmmlab`` mmdet, mmseg and mmpretrain                            ``stages.0.blocks.0.attn.w_msa.qkv``
============  =====================================================  ===================================

Tables of relative positions and the order of queries, keys and values are the same in all of them. Patch merging is
not: OpenMMLab gathers the four neighbours with ``nn.Unfold``, channel by channel, the others neighbour by neighbour
(:func:`unfold_order`).
"""

import re
from typing import Dict, List, Mapping, NamedTuple, Optional, Tuple

from torch import Tensor

from psaq_mm.errors import CheckpointError

__all__ = ['Renamed', 'backbone_prefix', 'rename_swin', 'unfold_order']

_BLOCK = re.compile(r'(?P<prefix>.*?)(?:layers|stages)[._](?P<stage>\d+)\.blocks\.\d+\.(?P<rest>.+)')
_DERIVED = re.compile(r'(^|\.)(relative_position_index|relative_coords_table|attn_mask)$')
_VERSION_2 = re.compile(r'\.attn\.(logit_scale|cpb_mlp\.)')

_IN_A_BLOCK = (('attn.', 'attn.w_msa.'), ('mlp.fc1.', 'ffn.layers.0.0.'), ('mlp.fc2.', 'ffn.layers.1.'))


class Renamed(NamedTuple):
    """A checkpoint under OpenMMLab's names.

    Attributes:
        weights: New name to weight; weights that are no part of the backbone keep their name.
        sources: New name to old name.
        derived: Old names of tensors that a model computes when it is built: position indices and attention masks.
        naming: ``'original'``, ``'timm'`` or ``'openmmlab'``.
    """

    weights: Dict[str, Tensor]
    sources: Dict[str, str]
    derived: List[str]
    naming: str


def unfold_order(x: Tensor) -> Tensor:
    """Reorder the last axis of a patch-merging weight as ``nn.Unfold`` orders it.

    Swin concatenates the four neighbours (row, column) = (0, 0), (1, 0), (0, 1), (1, 1), each with all its channels
    (arXiv 2103.14030, section 3.1, released code); unfolding gives each channel with its four neighbours, row by row.

    Args:
        x: (4 C) or (outputs, 4 C): the LayerNorm's or the reduction's weight.

    Returns:
        A tensor of the same shape.

    Raises:
        CheckpointError: The last axis is no multiple of 4.
    """
    if x.dim() == 0 or x.shape[-1] % 4:
        raise CheckpointError(
            f'a patch-merging weight of shape {tuple(x.shape)} does not hold four neighbours: the checkpoint is no '
            "Swin Transformer's"
        )
    by_column = x.unflatten(-1, (2, 2, x.shape[-1] // 4))  # (..., column, row, C)
    return by_column.movedim(-1, -3).transpose(-1, -2).flatten(-3).contiguous()


def backbone_prefix(names) -> Optional[str]:
    """The prefix of ``layers.0.blocks...`` or ``stages.0.blocks...`` in ``names``; None where there are no such blocks.

    Args:
        names: Of weights.

    Raises:
        CheckpointError: There are several backbones.
    """
    prefixes = {match['prefix'] for match in map(_BLOCK.fullmatch, names) if match}
    if len(prefixes) > 1:
        raise CheckpointError(
            f'the checkpoint holds several backbones ({", ".join(map(repr, sorted(prefixes)))}): save one of them alone'
        )
    return prefixes.pop() if prefixes else None


def _naming(names: List[str]) -> Tuple[str, int]:
    """The naming of a backbone's weights, without prefix, and its number of stages."""
    stages = 1 + max(int(match['stage']) for match in map(_BLOCK.fullmatch, names) if match)
    if any('.attn.w_msa.' in name for name in names):
        return 'openmmlab', stages
    opens = any(re.match(rf'layers[._]{stages - 1}\.downsample\.', name) for name in names) if stages > 1 else False
    return ('timm' if opens else 'original'), stages


def rename_swin(weights: Mapping[str, Tensor]) -> Renamed:
    """Rename the weights of a checkpoint with a Swin backbone to OpenMMLab's names, the backbone under ``backbone.``.

    A classification head of Swin's releases and of timm (``head.*``) becomes mmpretrain's ``head.fc.*``; the LayerNorm
    after the last stage (``norm.*``) becomes the output norm of that stage, ``norm3.*``.

    Args:
        weights: State dict in any of the three namings, the backbone under any one prefix or none.

    Raises:
        CheckpointError: There is no Swin in it, several, or a Swin Transformer V2.
    """
    prefix = backbone_prefix(weights)
    if prefix is None:
        shown = ', '.join(list(weights)[:3])
        raise CheckpointError(
            f'the checkpoint holds no Swin Transformer (its first keys are {shown}): give one with blocks such as '
            'layers.0.blocks.0.attn.qkv.weight or stages.0.blocks.0.attn.w_msa.qkv.weight'
        )
    version_2 = next((name for name in weights if _VERSION_2.search(name)), None)
    if version_2:
        raise CheckpointError(
            f'the checkpoint is a Swin Transformer V2 ({version_2}), which is not converted: give one of the first '
            'version'
        )
    names = [name[len(prefix) :] for name in weights if name.startswith(prefix)]
    naming, stages = _naming(names)
    renamed = Renamed({}, {}, [], naming)
    for name, value in weights.items():
        if _DERIVED.search(name):
            renamed.derived.append(name)
            continue
        if name.startswith(prefix):
            new, value = _rename(name[len(prefix) :], value, naming, stages)
            inside = new.startswith('head.') and 'backbone' not in prefix
            new = new if inside else f'backbone.{new}'
        else:
            new = name
        if new in renamed.weights:
            raise CheckpointError(f'{renamed.sources[new]} and {name} are both {new}: save one of them alone')
        renamed.weights[new], renamed.sources[new] = value, name
    return renamed


def _rename(name: str, value: Tensor, naming: str, stages: int) -> Tuple[str, Tensor]:
    """New name and weight of a backbone's weight, both without prefix."""
    if re.match(r'norm\.', name):
        return name.replace('norm.', f'norm{stages - 1}.', 1), value
    if naming == 'openmmlab':
        return name, value
    if re.fullmatch(r'head\.(weight|bias)', name):
        return name.replace('head.', 'head.fc.'), value
    if name == 'absolute_pos_embed' and value.dim() == 4:  # mmdet 2 and mmseg 0.x: (1, C, H, W)
        return name, value.flatten(2).transpose(1, 2).contiguous()
    if name.startswith('patch_embed.proj.'):
        return name.replace('proj.', 'projection.', 1), value
    match = re.fullmatch(r'layers[._](\d+)\.(blocks\.\d+\.|downsample\.)(.+)', name)
    if match is None:
        return name, value
    stage, part, rest = int(match[1]), match[2], match[3]
    if part == 'downsample.':
        stage -= naming == 'timm'
        merges = rest.split('.')[0] in ('norm', 'reduction')
        return f'stages.{stage}.{part}{rest}', unfold_order(value) if merges else value
    for old, new in _IN_A_BLOCK:
        if rest.startswith(old):
            rest = new + rest[len(old) :]
            break
    return f'stages.{stage}.{part}{rest}', value
