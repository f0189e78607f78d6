# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What is checked whenever weights reach a quantized model, whoever loads them.

MMEngine loads without ``strict``: wrong shapes and missing keys end in a warning, and the run goes on with random weights.
The check therefore sits in a load hook of the model itself, so that tools, inferencers and test-time augmentation of every
library pass through it.
"""
import contextlib
import sys
from collections import OrderedDict
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Set

from torch import Tensor, nn

from psaq_mm.errors import CheckpointError
from psaq_mm.models.scope import find_backbone
from psaq_mm.quantization import is_quantizer_key

__all__ = ['check_state_dict', 'convert_timm_keys', 'guard_loading', 'whole_loading']

_SHOWN = 3


def _some(names: List[str]) -> str:
    rest = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
    return ', '.join(names[:_SHOWN]) + rest


def _own_state(model: nn.Module) -> Dict[str, Tensor]:
    """A model's weights under the names that its modules have.

    mmpretrain's TimmClassifier takes its prefix off in a hook when a state dict is made, and puts it on in another before one
    is loaded: where loading is checked, after that hook, both sides must have it.
    """
    hooks, model._state_dict_hooks = model._state_dict_hooks, OrderedDict()
    try:
        return model.state_dict()
    finally:
        model._state_dict_hooks = hooks


_RESIZERS = {'_prepare_pos_embed': 'pos_embed', '_prepare_abs_pos_embed': 'absolute_pos_embed',
             '_prepare_relative_position_bias_table': 'relative_position_bias_table'}
"""Methods with which mmpretrain's backbones fit positions of another image size, in a hook that runs after this check, and the
weights they fit."""


def _resized_by_the_library(model: nn.Module) -> Set[str]:
    """Names of the weights whose number of positions may differ: the model resizes them as it loads them."""
    names: Set[str] = set()
    for prefix, module in model.named_modules():
        for method, weight in _RESIZERS.items():
            if hasattr(module, method):
                below = ((f'{prefix}.' if prefix else '') + name for name, _ in module.named_parameters())
                names.update(name for name in below if name.rpartition('.')[2] == weight)
    return names


def check_state_dict(model: nn.Module, state_dict: Dict[str, Tensor], prefix: str = '') -> None:
    """Check that ``state_dict`` has every weight of ``model``, in its shape, under the names of the model's modules.

    Quantizer state may be absent as a whole (a full-precision checkpoint), not in part.

    Raises:
        CheckpointError: One sentence that names the keys, the shapes and the way out.
    """
    own = _own_state(model)
    given = {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix)}
    resized = _resized_by_the_library(model)
    wrong = [
        f'{k} is {tuple(given[k].shape)} in the checkpoint and {tuple(own[k].shape)} in the model' for k in own
        if k in given and not is_quantizer_key(k) and given[k].shape != own[k].shape
        and not (k in resized and given[k].dim() == own[k].dim() and given[k].shape[-1] == own[k].shape[-1])
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
    # with_module: a copy of the model (the teacher) checks itself, and does not hold on to the original.
    model._register_load_state_dict_pre_hook(_check_loading, with_module=True)


def _check_loading(module: nn.Module, state_dict: Dict[str, Tensor], prefix: str, *args) -> None:
    # By name, not inside guard_loading: a model with the hook can be pickled.
    check_state_dict(module, state_dict, prefix)


@contextlib.contextmanager
def whole_loading(model: nn.Module) -> Iterator[None]:
    """While the ``with`` block runs, ``model`` loads state dicts that fit it and hold nothing else, and no others.

    The check runs after the hooks with which a model converts keys, and before anything is copied.

    Raises:
        CheckpointError: Inside, from ``load_state_dict``: keys or shapes do not fit, or weights have no place in the model.
    """

    def check(module, state_dict, prefix, *args):
        check_state_dict(module, state_dict, prefix)
        own = _own_state(module)
        strangers = [k for k in state_dict if k[len(prefix):] not in own and not k.endswith('num_batches_tracked')]
        if strangers:
            raise CheckpointError(f'{len(strangers)} weights have no place in the model ({_some(strangers)}): '
                                  'use the config that it was trained with')

    handle = model._register_load_state_dict_pre_hook(check, with_module=True)
    try:
        yield
    finally:
        handle.remove()


_RESAMPLED = ('pos_embed', 'patch_embed.proj.weight', 'relative_position_bias_table')
"""Weights that timm's conversion also fits to another image size: a config for another size is a mistake here."""


def convert_timm_keys(model: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A full-precision checkpoint of an older timm, or of a model's original release, under the names of today's timm.

    Swin of timm 0.6 and of its own release has its downsampling one stage earlier, other names in its head, and attention masks
    among its weights. What to do is timm's knowledge: its ``checkpoint_filter_fn`` beside the class of the network is called,
    where names differ. Positions are not resampled: weights for another image size keep their shape, and do not fit.

    Args:
        model: A classifier around a timm network, such as mmpretrain's TimmClassifier; any other is left alone.
        weights: State dict.

    Returns:
        ``weights`` itself where its names fit, or where there is nothing to convert with.
    """
    network = find_backbone(model)
    convert = _timm_conversion(network)
    own = {k for k in model.state_dict() if not is_quantizer_key(k)}
    if convert is None or own <= set(weights) and not set(weights) - own or any(is_quantizer_key(k) for k in weights):
        return weights
    converted = dict(convert(dict(weights), network))
    for key in converted:
        if key.endswith(_RESAMPLED) and key in weights and weights[key].numel() != converted[key].numel():
            converted[key] = weights[key]
    return converted


def _timm_conversion(network: nn.Module) -> Optional[Callable]:
    for base in type(network).__mro__:
        if base.__module__.startswith('timm.'):
            found = getattr(sys.modules.get(base.__module__), 'checkpoint_filter_fn', None)
            if found is not None:
                return found
    return None
