# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What is checked whenever weights reach a quantized model, whoever loads them.

MMEngine loads without ``strict``: wrong shapes and missing keys end in a warning, and the run goes on with random weights.
The check therefore sits in a load hook of the model itself, so that tools, inferencers and test-time augmentation of every
library pass through it.
"""
from typing import Dict, List

from torch import Tensor, nn

from psaq_mm.errors import CheckpointError
from psaq_mm.quantization import is_quantizer_key

__all__ = ['check_state_dict', 'guard_loading']

_SHOWN = 3


def _some(names: List[str]) -> str:
    rest = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
    return ', '.join(names[:_SHOWN]) + rest


def check_state_dict(model: nn.Module, state_dict: Dict[str, Tensor], prefix: str = '') -> None:
    """Check that ``state_dict`` has every weight of ``model``, in its shape, with no stranger among them.

    Quantizer state may be absent as a whole (a full-precision checkpoint), not in part.

    Raises:
        CheckpointError: One sentence that names the keys, the shapes and the way out.
    """
    own = model.state_dict()
    given = {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix)}
    wrong = [
        f'{k} is {tuple(given[k].shape)} in the checkpoint and {tuple(own[k].shape)} in the model' for k in own
        if k in given and not is_quantizer_key(k) and given[k].shape != own[k].shape
    ]
    if wrong:
        raise CheckpointError(f'the checkpoint does not fit the model: {_some(wrong)}; use the config that it was trained with')
    missing = [k for k in own if k not in given and not is_quantizer_key(k) and not k.endswith('num_batches_tracked')]
    if missing:
        raise CheckpointError(f'the checkpoint lacks {len(missing)} weights of the model ({_some(missing)}): '
                              'use the config that it was trained with, or convert its keys first')
    has_state = {k for k in given if is_quantizer_key(k)}
    wants_state = {k for k in own if is_quantizer_key(k)}
    if has_state and has_state != wants_state:
        odd = sorted(has_state ^ wants_state)
        raise CheckpointError(f'the checkpoint was quantized under another spec ({_some(odd)} stand on one side only): '
                              'give the config the quant= that it was made with')


def guard_loading(model: nn.Module) -> None:
    """Have :func:`check_state_dict` run before anything is copied into ``model``."""

    def check(module, state_dict, prefix, *args):
        check_state_dict(module, state_dict, prefix)

    # with_module: a copy of the model (the teacher) checks itself, and does not hold on to the original.
    model._register_load_state_dict_pre_hook(check, with_module=True)
