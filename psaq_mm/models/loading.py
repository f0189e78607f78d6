# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Checks of weights whenever a quantized model loads them, and the names that checkpoints have them under.

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

    mmpretrain's TimmClassifier removes its prefix in a hook when a state dict is made, and adds it in another hook
    before one is loaded. Loading is checked after that hook, where both sides must have the prefix.
    """
    with replaced(model, '_state_dict_hooks', OrderedDict()):
        return model.state_dict()


_RESIZERS = {
    '_prepare_pos_embed': ('pos_embed',),
    '_prepare_abs_pos_embed': ('absolute_pos_embed',),
    '_prepare_relative_position_bias_table': ('relative_position_bias_table',),
    '_prepare_relative_position': ('rel_pos_h', 'rel_pos_w'),
}
"""Methods with which mmpretrain's backbones fit positions of another image size, in a hook that runs after this check,
and the weights they fit."""

_DERIVED = re.compile(r'(^|\.)relative_(position_index|coords_table)$')
"""Buffers that a model computes when it is built: a checkpoint may lack them. mmpretrain's Swin V2 drops them from each
checkpoint that it loads."""


def _resized_by_the_library(model: nn.Module) -> Set[str]:
    """Names of the weights whose number of positions may differ: the model resizes them as it loads them."""
    names: Set[str] = set()
    for prefix, module in model.named_modules():
        for method, fitted in _RESIZERS.items():
            if hasattr(module, method):
                below = ((f'{prefix}.' if prefix else '') + name for name, _ in module.named_parameters())
                names.update(name for name in below if name.rpartition('.')[2] in fitted)
    return names


def check_state_dict(model: nn.Module, state_dict: Dict[str, Tensor], prefix: str = '') -> None:
    """Check that ``state_dict`` has every weight of ``model``, in its shape, under the names of the model's modules.

    The state of all quantizers may be absent (a full-precision checkpoint), that of some may not. An auxiliary head may
    be absent: it is not used in inference.

    Args:
        model: Quantized or not.
        state_dict: As the model loads it.
        prefix: Of its names, before those of the model.

    Raises:
        CheckpointError: One sentence that names the keys, the shapes and the way out.
    """
    weights = _own_state(model)
    loaded = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
    resized = _resized_by_the_library(model)
    dropped = tuple(
        f'{name}.' if name else '' for name, part in model.named_modules() if hasattr(part, '_delete_reinit_params')
    )
    wrong = [
        f'{k} is {tuple(loaded[k].shape)} in the checkpoint and {tuple(weights[k].shape)} in the model'
        for k in weights
        if k in loaded
        and not is_quantizer_key(k)
        and not (_DERIVED.search(k) and k.startswith(dropped))
        and loaded[k].shape != weights[k].shape
        and not (k in resized and loaded[k].dim() == weights[k].dim() and loaded[k].shape[-1] == weights[k].shape[-1])
    ]
    if wrong:
        raise CheckpointError(
            f'the checkpoint does not fit the model: {first_of(wrong)}; use the config that it was trained with'
        )
    unneeded = absent_parts(weights, loaded)
    missing = [
        k
        for k in weights
        if k not in loaded
        and not is_quantizer_key(k)
        and not k.endswith('num_batches_tracked')
        and not _DERIVED.search(k)
        and not k.startswith(unneeded)
    ]
    if missing:
        backbone_alone = loaded and all(k.startswith('backbone.') for k in loaded)
        way = (
            'it holds a backbone alone, give the checkpoint of the whole trained model'
            if backbone_alone
            else 'use the config that it was trained with, or convert its keys first'
        )
        raise CheckpointError(f'the checkpoint lacks {len(missing)} weights of the model ({first_of(missing)}): {way}')
    loaded_state = {k for k in loaded if is_quantizer_key(k)}
    model_state = {k for k in weights if is_quantizer_key(k)}
    if loaded_state and loaded_state != model_state:
        one_sided = sorted(loaded_state ^ model_state)
        raise CheckpointError(
            f'the checkpoint was quantized under another spec ({first_of(one_sided)} stand on one side only): '
            'give the config the quant= that it was made with'
        )


def absent_parts(names: Iterable[str], others: Iterable[str]) -> Tuple[str, ...]:
    """Prefixes of parts used in training alone, which ``names`` has weights of and ``others`` has not.

    Example:
        >>> absent_parts(['decode_head.bias', 'auxiliary_head.bias'], ['decode_head.bias'])
        ('auxiliary_head.',)
    """
    parts = tuple(f'{name}.' for name in TRAINING_ONLY)
    present = {part for part in parts if any(name.startswith(part) for name in others)}
    return tuple(part for part in parts if part not in present and any(name.startswith(part) for name in names))


def guard_loading(model: nn.Module) -> None:
    """Have :func:`check_state_dict` run before anything is copied into ``model``."""
    # with_module: a copy of the model (the teacher) checks itself, and does not hold on to the original.
    model._register_load_state_dict_pre_hook(_check_loading, with_module=True)


def _check_loading(module: nn.Module, state_dict: Dict[str, Tensor], prefix: str, *args) -> None:
    # By name, not inside guard_loading: a model with the hook can be pickled.
    check_state_dict(module, state_dict, prefix)


@contextlib.contextmanager
def whole_loading(model: nn.Module) -> Iterator[None]:
    """Inside the block ``model`` loads only state dicts with exactly its weights.

    The check runs after the hooks with which a model converts keys, and before anything is copied.

    Raises:
        CheckpointError: Inside, from ``load_state_dict``: keys or shapes do not fit, or weights have no place in the
            model.
    """

    def check(module, state_dict, prefix, *args):
        check_state_dict(module, state_dict, prefix)
        weights = _own_state(module)
        unplaced = [k for k in state_dict if k[len(prefix) :] not in weights and not k.endswith('num_batches_tracked')]
        if unplaced:
            raise CheckpointError(
                f'{len(unplaced)} weights have no place in the model ({first_of(unplaced)}): '
                'use the config that it was trained with'
            )

    with hooked([model], lambda module: module._register_load_state_dict_pre_hook(check, with_module=True)):
        yield


def unwrapped(weights: Mapping[str, Any]) -> Dict[str, Any]:
    """Weights without the name parts of DistributedDataParallel (``module.``) and ``torch.compile`` (``_orig_mod.``).

    Example:
        >>> unwrapped({'module._orig_mod.backbone._orig_mod.norm.bias': 0})
        OrderedDict([('backbone.norm.bias', 0)])
    """
    plain = OrderedDict((re.sub(r'(?<![^.])_orig_mod\.', '', name), value) for name, value in weights.items())
    plain = plain if len(plain) == len(weights) else OrderedDict(weights)
    while plain and all(name.startswith('module.') for name in plain):
        plain = OrderedDict((name[len('module.') :], value) for name, value in plain.items())
    return plain


class Matched(NamedTuple):
    """Weights of a checkpoint, and a sentence for each kind of weights that were left out.

    Attributes:
        weights: State dict.
        notes: For the log.
    """

    weights: Dict[str, Tensor]
    notes: List[str]


def _note(names: Sequence[str], why: str) -> str:
    return f'{len(names)} weights are left out, such as {names[0]}: {why}'


def _chosen(prefixes: Sequence[str], meta: Mapping) -> str:
    """The prefix of the copy to be used, of several copies of a model."""
    if {'teacher.', 'student.'} <= set(prefixes):
        # mmdet's semi-supervised detectors: its config says whose predictions are the model's, by default the
        # teacher's.
        setting = re.search(
            r"""predict_on['"]?\s*[=:]\s*['"](teacher|student)""", str(meta.get('cfg') or meta.get('config') or '')
        )
        return f'{setting[1] if setting else "teacher"}.'
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
    """Drops the second copy of the weights that the EMA hooks of mmcv 1 and mmdet 2 keep as buffers of the model.

    For ``backbone.norm.bias`` it is ``ema_backbone_norm_bias``. The hooks swap the two copies before a checkpoint is
    saved: the averages, which those releases test with, have the plain names.
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
    """Weights without those whose names alone say that inference does not use them, for a model that is not built.

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
    """Weights under the names of the model.

    A prefix that a training program puts before all names (``model.`` of Lightning and OTX, or any other) is told by
    the names of the model. A second copy of the weights, and an auxiliary head that the config no longer has, are left
    out. Nothing else is: other weights without a place in the model are a mistake.

    Args:
        model: The model that loads them.
        weights: State dict.
        meta: The checkpoint's.

    Raises:
        CheckpointError: The checkpoint holds the model several times, and nothing says which copy is to be used.
    """
    notes: List[str] = []
    names = [k for k in model.state_dict() if not is_quantizer_key(k) and not k.endswith('num_batches_tracked')]
    needed = [k for k in names if not k.startswith(tuple(f'{part}.' for part in TRAINING_ONLY))]
    if needed and not all(k in weights for k in needed):
        anchor = max(needed, key=len)
        prefixes = [name[: -len(anchor)] for name in weights if name.endswith(f'.{anchor}')]
        prefixes = [prefix for prefix in prefixes if all(prefix + k in weights for k in needed)]
        if prefixes:
            weights = _below(weights, prefixes[0] if len(prefixes) == 1 else _chosen(prefixes, meta), notes)
        elif all(name.startswith('model.') for name in weights) and not all(k.startswith('model.') for k in names):
            weights = _below(weights, 'model.', notes)  # names of another release, perhaps
    weights = _without_averages(weights, notes)
    for part in absent_parts(weights, names):
        dropped = [name for name in weights if name.startswith(part)]
        notes.append(_note(dropped, f'the config has no {part[:-1]}, which takes no part in inference'))
        weights = OrderedDict((name, value) for name, value in weights.items() if not name.startswith(part))
    for part in absent_parts(names, weights):
        notes.append(
            f'it has no {part[:-1]}: that of the config, which takes no part in inference, keeps its initial weights'
        )
    return Matched(weights, notes)


_RESAMPLED = ('pos_embed', 'patch_embed.proj.weight', 'relative_position_bias_table')
"""Weights that timm's conversion also resizes for another image size: a config for another size is a mistake here."""


def convert_timm_keys(model: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A full-precision checkpoint of an older timm, or of a model's original release, under the names of today's timm.

    Swin of timm 0.6 and of its original release has its downsampling one stage earlier, other names in its head, and
    attention masks among its weights. Where names differ, timm's names ``checkpoint_filter_fn``, from the module of the
    network's class, converts them. Positions are not resampled: weights for another image size keep their shape, and do
    not fit.

    Args:
        model: A classifier around a timm network, such as mmpretrain's TimmClassifier; any other is left alone.
        weights: State dict.

    Returns:
        ``weights`` itself where its names fit, or where there is nothing to convert with.
    """
    network = find_backbone(model)
    convert = _timm_conversion(network)
    names = {k for k in model.state_dict() if not is_quantizer_key(k)}
    if (
        convert is None
        or names <= set(weights)
        and not set(weights) - names
        or any(is_quantizer_key(k) for k in weights)
    ):
        return weights
    converted = dict(convert(dict(weights), network))
    for key in converted:
        if key.endswith(_RESAMPLED) and key in weights and weights[key].numel() != converted[key].numel():
            converted[key] = weights[key]
    return converted


def _timm_conversion(network: nn.Module) -> Optional[Callable]:
    for base in type(network).__mro__:
        if base.__module__.startswith('timm.'):
            convert = getattr(sys.modules.get(base.__module__), 'checkpoint_filter_fn', None)
            if convert is not None:
                return convert
    return None
