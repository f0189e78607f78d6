# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What is checked whenever weights reach a quantized model, whoever loads them.

MMEngine loads without ``strict``: wrong shapes and missing keys end in a warning, and the run goes on with random
weights. The check therefore sits in a load hook of the model itself, so that tools, inferencers and test-time
augmentation of every library pass through it.
"""

import contextlib
import re
import sys
from collections import OrderedDict
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

from torch import Tensor, nn

from psaq_mm.contexts import hooked, replaced
from psaq_mm.errors import CheckpointError, first_of
from psaq_mm.models.network import TRAINING_ONLY, find_backbone
from psaq_mm.quantization import is_quantizer_key

__all__ = [
    'Matched',
    'absent_parts',
    'check_state_dict',
    'convert_timm_keys',
    'guard_loading',
    'match_names',
    'unwrapped',
    'usable_weights',
    'whole_loading',
]


def _own_state(model: nn.Module) -> Dict[str, Tensor]:
    """A model's weights under the names that its modules have.

    mmpretrain's TimmClassifier takes its prefix off in a hook when a state dict is made, and puts it on in another
    before one is loaded: where loading is checked, after that hook, both sides must have it.
    """
    with replaced(model, '_state_dict_hooks', OrderedDict()):
        return model.state_dict()


_RESIZERS = {
    '_prepare_pos_embed': 'pos_embed',
    '_prepare_abs_pos_embed': 'absolute_pos_embed',
    '_prepare_relative_position_bias_table': 'relative_position_bias_table',
}
"""Methods with which mmpretrain's backbones fit positions of another image size, in a hook that runs after this check,
and the weights they fit."""


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

    Quantizer state may be absent as a whole (a full-precision checkpoint), not in part; so may an auxiliary head, which
    takes no part in inference.

    Raises:
        CheckpointError: One sentence that names the keys, the shapes and the way out.
    """
    own = _own_state(model)
    given = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
    resized = _resized_by_the_library(model)
    wrong = [
        f'{k} is {tuple(given[k].shape)} in the checkpoint and {tuple(own[k].shape)} in the model'
        for k in own
        if k in given
        and not is_quantizer_key(k)
        and given[k].shape != own[k].shape
        and not (k in resized and given[k].dim() == own[k].dim() and given[k].shape[-1] == own[k].shape[-1])
    ]
    if wrong:
        raise CheckpointError(
            f'the checkpoint does not fit the model: {first_of(wrong)}; use the config that it was trained with'
        )
    unneeded = absent_parts(own, given)
    missing = [
        k
        for k in own
        if k not in given
        and not is_quantizer_key(k)
        and not k.endswith('num_batches_tracked')
        and not k.startswith(unneeded)
    ]
    if missing:
        alone = given and all(k.startswith('backbone.') for k in given)
        way = (
            'it holds a backbone alone, give the checkpoint of the whole trained model'
            if alone
            else 'use the config that it was trained with, or convert its keys first'
        )
        raise CheckpointError(f'the checkpoint lacks {len(missing)} weights of the model ({first_of(missing)}): {way}')
    has_state = {k for k in given if is_quantizer_key(k)}
    wants_state = {k for k in own if is_quantizer_key(k)}
    if has_state and has_state != wants_state:
        odd = sorted(has_state ^ wants_state)
        raise CheckpointError(
            f'the checkpoint was quantized under another spec ({first_of(odd)} stand on one side only): '
            'give the config the quant= that it was made with'
        )


def absent_parts(own: Iterable[str], given: Iterable[str]) -> Tuple[str, ...]:
    """Prefixes of parts that serve training alone, of which ``own`` has weights and ``given`` none.

    Example:
        >>> absent_parts(['decode_head.bias', 'auxiliary_head.bias'], ['decode_head.bias'])
        ('auxiliary_head.',)
    """
    parts = tuple(f'{name}.' for name in TRAINING_ONLY)
    held = {part for part in parts if any(k.startswith(part) for k in given)}
    return tuple(part for part in parts if part not in held and any(k.startswith(part) for k in own))


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
        CheckpointError: Inside, from ``load_state_dict``: keys or shapes do not fit, or weights have no place in the
            model.
    """

    def check(module, state_dict, prefix, *args):
        check_state_dict(module, state_dict, prefix)
        own = _own_state(module)
        strangers = [k for k in state_dict if k[len(prefix) :] not in own and not k.endswith('num_batches_tracked')]
        if strangers:
            raise CheckpointError(
                f'{len(strangers)} weights have no place in the model ({first_of(strangers)}): '
                'use the config that it was trained with'
            )

    with hooked([model], lambda module: module._register_load_state_dict_pre_hook(check, with_module=True)):
        yield


def unwrapped(weights: Mapping[str, Any]) -> Dict[str, Any]:
    """Weights without what DistributedDataParallel (``module.``) and ``torch.compile`` (``_orig_mod.``) put into their
    names.

    Example:
        >>> unwrapped({'module._orig_mod.backbone._orig_mod.norm.bias': 0})
        OrderedDict([('backbone.norm.bias', 0)])
    """
    found = OrderedDict((re.sub(r'(?<![^.])_orig_mod\.', '', name), value) for name, value in weights.items())
    found = found if len(found) == len(weights) else OrderedDict(weights)
    while found and all(name.startswith('module.') for name in found):
        found = OrderedDict((name[len('module.') :], value) for name, value in found.items())
    return found


class Matched(NamedTuple):
    """Weights of a checkpoint, and a sentence for each kind of what was left out of them.

    Attributes:
        weights: State dict.
        notes: For the log.
    """

    weights: Dict[str, Tensor]
    notes: List[str]


def _note(names: Sequence[str], why: str) -> str:
    return f'{len(names)} weights are left out, such as {names[0]}: {why}'


def _chosen(prefixes: Sequence[str], meta: Mapping) -> str:
    """Which one of several copies of a model is to be used."""
    if {'teacher.', 'student.'} <= set(prefixes):
        # mmdet's semi-supervised detectors: its config says whose predictions are the model's, by default the
        # teacher's.
        said = re.search(
            r"""predict_on['"]?\s*[=:]\s*['"](teacher|student)""", str(meta.get('cfg') or meta.get('config') or '')
        )
        return f'{said[1] if said else "teacher"}.'
    if 'model.' in prefixes:
        return 'model.'
    raise CheckpointError(
        f'the checkpoint holds the model {len(prefixes)} times ({", ".join(sorted(prefixes))}): save one of them alone'
    )


def _below(weights: Mapping[str, Tensor], prefix: str, notes: List[str]) -> Dict[str, Tensor]:
    others = [name for name in weights if not name.startswith(prefix)]
    if others:
        notes.append(_note(others, f'the model is what lies under {prefix[:-1]!r}'))
    return OrderedDict((name[len(prefix) :], value) for name, value in weights.items() if name.startswith(prefix))


def _without_averages(weights: Mapping[str, Tensor], notes: List[str]) -> Mapping[str, Tensor]:
    """Without the second copy that the EMA hooks of mmcv 1 and mmdet 2 keep as buffers of the model.

    For ``backbone.norm.bias`` it is ``ema_backbone_norm_bias``. The hooks swap the two before a checkpoint is saved, so
    that averages stand under the plain names, which those releases test with.
    """
    second = {'ema_' + name.replace('.', '_'): value for name, value in weights.items() if not name.startswith('ema_')}
    dropped = [name for name, value in weights.items() if name in second and value.shape == second[name].shape]
    if not dropped:
        return weights
    notes.append(
        _note(dropped, 'a second copy of the weights that an EMA hook kept, whose averages stand under the plain names')
    )
    return OrderedDict((name, value) for name, value in weights.items() if name not in set(dropped))


def usable_weights(weights: Mapping[str, Tensor], meta: Mapping) -> Matched:
    """Weights without what tells by its names alone that it takes no part in inference, for a model that is not built.

    Args:
        weights: State dict.
        meta: The checkpoint's.
    """
    notes: List[str] = []
    heads = {name.split('.')[0] + '.' for name in weights}
    if {'teacher.', 'student.'} <= heads:
        weights = _below(weights, _chosen(sorted(heads), meta), notes)
    elif heads == {'model.'}:
        weights = _below(weights, 'model.', notes)
    return Matched(dict(_without_averages(weights, notes)), notes)


def match_names(model: nn.Module, weights: Mapping[str, Tensor], meta: Mapping) -> Matched:
    """Weights under the names of the model, where they have them under a prefix or beside what takes no part in
    inference.

    What a training program puts before all names (``model.`` of Lightning and OTX, any other) is found by what the
    model asks for. A second copy of the weights, and an auxiliary head that the config no longer has, are left out.
    Nothing else is: what has no place in the model then is a mistake.

    Args:
        model: That is to load them.
        weights: State dict.
        meta: The checkpoint's.

    Raises:
        CheckpointError: The model is in it several times, and nothing says which is to be used.
    """
    notes: List[str] = []
    own = [k for k in model.state_dict() if not is_quantizer_key(k) and not k.endswith('num_batches_tracked')]
    needed = [k for k in own if not k.startswith(tuple(f'{part}.' for part in TRAINING_ONLY))]
    if needed and not all(k in weights for k in needed):
        anchor = max(needed, key=len)
        prefixes = [name[: -len(anchor)] for name in weights if name.endswith(f'.{anchor}')]
        prefixes = [prefix for prefix in prefixes if all(prefix + k in weights for k in needed)]
        if prefixes:
            weights = _below(weights, prefixes[0] if len(prefixes) == 1 else _chosen(prefixes, meta), notes)
        elif all(name.startswith('model.') for name in weights) and not all(k.startswith('model.') for k in own):
            weights = _below(weights, 'model.', notes)  # names of another release, perhaps
    weights = _without_averages(weights, notes)
    for part in absent_parts(weights, own):
        dropped = [name for name in weights if name.startswith(part)]
        notes.append(_note(dropped, f'the config has no {part[:-1]}, which takes no part in inference'))
        weights = OrderedDict((name, value) for name, value in weights.items() if not name.startswith(part))
    for part in absent_parts(own, weights):
        notes.append(
            f'it has no {part[:-1]}: that of the config, which takes no part in inference, keeps its initial weights'
        )
    return Matched(weights, notes)


_RESAMPLED = ('pos_embed', 'patch_embed.proj.weight', 'relative_position_bias_table')
"""Weights that timm's conversion also fits to another image size: a config for another size is a mistake here."""


def convert_timm_keys(model: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A full-precision checkpoint of an older timm, or of a model's original release, under the names of today's timm.

    Swin of timm 0.6 and of its own release has its downsampling one stage earlier, other names in its head, and
    attention masks among its weights. What to do is timm's knowledge: its ``checkpoint_filter_fn`` beside the class of
    the network is called, where names differ. Positions are not resampled: weights for another image size keep their
    shape, and do not fit.

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
