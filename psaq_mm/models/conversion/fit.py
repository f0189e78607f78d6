# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Checks that renamed weights are those of a model: the same names and shapes on both sides."""

import re
from fnmatch import fnmatchcase
from typing import Dict, List, NamedTuple, Sequence

from torch import Tensor, nn

from psaq_mm.errors import CheckpointError, UnsupportedModelError, first_of
from psaq_mm.models.conversion.naming import Renamed, backbone_prefix
from psaq_mm.models.loading import absent_parts

__all__ = ['Conversion', 'fit_weights']

_FROM_THE_MODEL = re.compile(r'(^|\.)(relative_position_index|relative_coords_table|num_batches_tracked)$')
_OUTPUT_NORM = re.compile(r'(^|\.)norm\d+\.(weight|bias)$')


class Conversion(NamedTuple):
    """The result of a conversion.

    Attributes:
        state_dict: For the model to load.
        unplaced: Old names and shapes of weights that the model has no place for.
        missing: The model's weights that the checkpoint lacks.
        wrong: Sentences about shapes that do not fit.
        left_out: Old names of weights that were left out on purpose.
        untrained: Weights that the checkpoint lacks and that keep their initial values: output norms of a backbone
            alone (1 and 0), and an auxiliary head.
    """

    state_dict: Dict[str, Tensor]
    unplaced: List[str]
    missing: List[str]
    wrong: List[str]
    left_out: List[str]
    untrained: List[str]

    def check(self) -> 'Conversion':
        """Raise where weights are missing, unplaced or of a wrong shape; else return itself.

        Raises:
            CheckpointError: One sentence with the first names, and the way out.
        """
        if self.wrong:
            raise CheckpointError(
                f'the checkpoint does not fit the config: {first_of(self.wrong)}; give the config of the model that '
                'it was trained with'
            )
        if self.missing:
            raise CheckpointError(
                f'the checkpoint lacks {len(self.missing)} weights of the model ({first_of(self.missing)}): give the '
                'config of the model that it was trained with, or convert its backbone alone with --backbone-only'
            )
        if self.unplaced:
            raise CheckpointError(
                f'{len(self.unplaced)} weights found no place in the model ({first_of(self.unplaced)}): give the '
                'config of the model that it was trained with, or leave them out by name with --drop'
            )
        return self


def fit_weights(
    renamed: Renamed, model: nn.Module, backbone_only: bool = False, drop: Sequence[str] = ()
) -> Conversion:
    """Assign renamed weights to a full-precision model. Misfits are recorded; :meth:`Conversion.check` raises for them.

    Position indices are taken from the model, and so are BatchNorm's counters where the checkpoint has none.

    Args:
        renamed: See :func:`psaq_mm.models.conversion.rename_swin`.
        model: Full-precision, of mmdet 3, mmseg 1 or mmpretrain, with its Swin under ``backbone``.
        backbone_only: Leave heads out on both sides. Output norms that the checkpoint lacks, such as a classifier's,
            keep their initial values.
        drop: Shell-style patterns of old names to leave out.

    Raises:
        UnsupportedModelError: The model has no Swin of OpenMMLab under ``backbone``.
        CheckpointError: A pattern of ``drop`` matches nothing.
    """
    expected = model.state_dict()
    if backbone_prefix(expected) != 'backbone.' or not any('.attn.w_msa.' in name for name in expected):
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
    dropped, unneeded = absent_parts(renamed.weights, expected), absent_parts(expected, renamed.weights)
    for new, value in renamed.weights.items():
        old = renamed.sources[new]
        if (
            any(fnmatchcase(old, pattern) for pattern in drop)
            or new.startswith(dropped)
            or (backbone_only and not new.startswith('backbone.'))
        ):
            result.left_out.append(old)
        elif new not in expected:
            result.unplaced.append(f'{old} {tuple(value.shape)}')
        elif value.shape != expected[new].shape:
            misfits.add(new)
            result.wrong.append(
                f'{old} is {tuple(value.shape)} in the checkpoint and {tuple(expected[new].shape)} in the model'
            )
        else:
            result.state_dict[new] = value.to(expected[new].dtype)
    for name, value in expected.items():
        if name in result.state_dict or name in misfits or backbone_only and not name.startswith('backbone.'):
            continue
        if _FROM_THE_MODEL.search(name):
            result.state_dict[name] = value.clone()
        elif name.startswith(unneeded) or backbone_only and _OUTPUT_NORM.fullmatch(name[len('backbone.') :]):
            result.untrained.append(name)
        else:
            result.missing.append(name)
    return result._replace(state_dict={name: result.state_dict[name] for name in expected if name in result.state_dict})
