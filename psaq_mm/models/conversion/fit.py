# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Whether renamed weights are those of a model: every one has a place, every place has one, every shape fits."""

import re
from fnmatch import fnmatchcase
from typing import Dict, List, NamedTuple, Sequence

from torch import Tensor, nn

from psaq_mm.errors import CheckpointError, UnsupportedModelError, first_of
from psaq_mm.models.conversion.naming import Renamed, backbone_prefix
from psaq_mm.models.loading import absent_parts

__all__ = ['Conversion', 'fit_weights']

_MADE_BY_THE_MODEL = re.compile(r'(^|\.)(relative_position_index|num_batches_tracked)$')
_OUTPUT_NORM = re.compile(r'(^|\.)norm\d+\.(weight|bias)$')


class Conversion(NamedTuple):
    """What became of a checkpoint.

    Attributes:
        state_dict: What the model loads.
        unplaced: Old names and shapes of weights that found no place in the model.
        missing: The model's weights that the checkpoint lacks.
        wrong: Sentences about shapes that do not fit.
        left_out: Old names of what was left out on purpose.
        untrained: What the checkpoint lacks and keeps its initial values: output norms of a backbone alone, 1 and 0,
            and an auxiliary head.
    """

    state_dict: Dict[str, Tensor]
    unplaced: List[str]
    missing: List[str]
    wrong: List[str]
    left_out: List[str]
    untrained: List[str]

    def check(self) -> 'Conversion':
        """Itself, where all is in its place.

        Raises:
            CheckpointError: One sentence with the first names, and the way out.
        """
        if self.wrong:
            raise CheckpointError(
                f'the checkpoint does not fit the config: {first_of(self.wrong)}; give the config of the model that it '
                f'was '
                'trained with'
            )
        if self.missing:
            raise CheckpointError(
                f'the checkpoint lacks {len(self.missing)} weights of the model ({first_of(self.missing)}): give the '
                f'config '
                'of the model that it was trained with, or convert its backbone alone with --backbone-only'
            )
        if self.unplaced:
            raise CheckpointError(
                f'{len(self.unplaced)} weights found no place in the model ({first_of(self.unplaced)}): give the config '
                f'of '
                'the model that it was trained with, or leave them out by name with --drop'
            )
        return self


def fit_weights(
    renamed: Renamed, model: nn.Module, backbone_only: bool = False, drop: Sequence[str] = ()
) -> Conversion:
    """Put renamed weights into the places of a full-precision model; nothing is raised yet, :meth:`Conversion.check`
    does.

    Position indices are the model's own, and so are the counters of BatchNorm where the checkpoint has none.

    Args:
        renamed: See :func:`psaq_mm.models.conversion.rename_swin`.
        model: Full-precision, of mmdet 3, mmseg 1 or mmpretrain, with its Swin under ``backbone``.
        backbone_only: The backbone alone: heads on either side are left out, and output norms that the checkpoint
            lacks, as that of a classifier does, keep their initial values.
        drop: Shell-style patterns over old names that are left out.

    Raises:
        UnsupportedModelError: The model has no Swin of OpenMMLab under ``backbone``.
        CheckpointError: A pattern of ``drop`` matches nothing.
    """
    own = model.state_dict()
    if backbone_prefix(own) != 'backbone.' or not any('.attn.w_msa.' in name for name in own):
        raise UnsupportedModelError(
            f'{type(model).__name__} has no SwinTransformer of mmdet, mmseg or mmpretrain as its backbone: give a '
            "config that has one (timm's networks read timm's checkpoints as they are)"
        )
    for pattern in drop:
        if not any(fnmatchcase(name, pattern) for name in renamed.sources.values()):
            raise CheckpointError(
                f'--drop {pattern!r} matches no weight of the checkpoint: its names are such as '
                f'{next(iter(renamed.sources.values()), "none")}'
            )
    result, misfits = Conversion({}, [], [], [], [], []), set()
    dropped, unneeded = absent_parts(renamed.weights, own), absent_parts(own, renamed.weights)
    for new, value in renamed.weights.items():
        old = renamed.sources[new]
        if (
            any(fnmatchcase(old, pattern) for pattern in drop)
            or new.startswith(dropped)
            or (backbone_only and not new.startswith('backbone.'))
        ):
            result.left_out.append(old)
        elif new not in own:
            result.unplaced.append(f'{old} {tuple(value.shape)}')
        elif value.shape != own[new].shape:
            misfits.add(new)
            result.wrong.append(
                f'{old} is {tuple(value.shape)} in the checkpoint and {tuple(own[new].shape)} in the model'
            )
        else:
            result.state_dict[new] = value.to(own[new].dtype)
    for name, value in own.items():
        if name in result.state_dict or name in misfits or backbone_only and not name.startswith('backbone.'):
            continue
        if _MADE_BY_THE_MODEL.search(name):
            result.state_dict[name] = value.clone()
        elif name.startswith(unneeded) or backbone_only and _OUTPUT_NORM.fullmatch(name[len('backbone.') :]):
            result.untrained.append(name)
        else:
            result.missing.append(name)
    return result._replace(state_dict={name: result.state_dict[name] for name in own if name in result.state_dict})
