# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""``psaq_mm.Quantized``: the user's own model type, with its layers replaced when it is built.

The model is converted when it is built, and not in a hook, so that the library's own tools, inferencers and test-time
augmentation use the quantized model: inferencers run no hooks, and TTA and DDP wrap the model before any hook runs.
"""

import copy
import importlib.util
import logging
from typing import Mapping, Union

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS as ROOT_MODELS
from torch import nn

from psaq_mm.errors import ConfigError, UnsupportedModelError
from psaq_mm.models.loading import guard_loading
from psaq_mm.models.network import find_backbone
from psaq_mm.models.scope import check_backbone, first_layer_name, scope_filter
from psaq_mm.models.tasks import task_of
from psaq_mm.quantization import (
    ConversionReport,
    QuantSpec,
    ReparameterizedQuantizer,
    quantize_,
    quantizers,
    use_full_float32,
)
from psaq_mm.registry import MODELS
from psaq_mm.type_names import type_name

__all__ = ['Quantized', 'build_named', 'quantize_model_', 'quantized_part', 'report_of', 'spec_of']


def spec_of(model: nn.Module) -> QuantSpec:
    """The spec that a model, or its backbone alone, was quantized under.

    Raises:
        UnsupportedModelError: Neither is quantized.
    """
    return quantized_part(model).quant_spec


def report_of(model: nn.Module) -> ConversionReport:
    """The report of a model, or of its backbone alone: what is quantized, and what stays float.

    Raises:
        UnsupportedModelError: Neither is quantized.
    """
    return quantized_part(model).quant_report


def quantized_part(model: nn.Module) -> nn.Module:
    """The model, or its backbone where that alone was quantized. Names in overrides are relative to it.

    Raises:
        UnsupportedModelError: Neither is quantized.
    """
    for part in (model, find_backbone(model)):
        if getattr(part, 'quant_spec', None) is not None:
            return part
    raise UnsupportedModelError(
        f'{type(model).__name__} is not quantized, nor is its backbone: build it with '
        "model = dict(type='psaq_mm.Quantized', ...), give --quant, or call psaq_mm.models.quantize_model_"
    )


def quantize_model_(model: nn.Module, quant: Union[QuantSpec, Mapping, str]) -> ConversionReport:
    """Quantize a built OpenMMLab model in place.

    Args:
        model: A detector, segmentor, classifier or backbone.
        quant: A :class:`~psaq_mm.quantization.QuantSpec`, its dict, or a preset such as ``'w8a8'``.

    Returns:
        What was quantized, at which bits, and what stays float.

    Raises:
        UnsupportedModelError: The backbone is not a supported one.
        SpecError: The spec is invalid, or an override's pattern matches nothing.
    """
    spec = QuantSpec.parse(quant)
    check_backbone(model)
    if use_full_float32() and torch.cuda.is_available():
        print_log('TF32 is switched off for this process: it would round quantized values a second time', 'current')
    report = quantize_(model, spec, filter_fn=scope_filter(model, spec.scope), first_layer=first_layer_name(model))
    if spec.reparameterize and not any(isinstance(q, ReparameterizedQuantizer) for _, q in quantizers(model)):
        print_log(
            f'reparameterize=True folds nothing in {type(find_backbone(model)).__name__}, where no LayerNorm feeds one '
            'Linear alone: ranges are those of whole tensors',
            'current',
            logging.WARNING,
        )
    report.name_parts(task_of(model).float_parts(model))
    model.quant_spec = spec
    model.quant_report = report
    guard_loading(model)
    return report


def _without_fairscale(config: Mapping) -> Mapping:
    """The config without the activation checkpointing of an encoder that mmdet builds with fairscale alone, where that
    is not installed. It saves memory in training and changes no result.
    """
    encoder = config.get('encoder')
    if not isinstance(encoder, Mapping) or not encoder.get('num_cp') or importlib.util.find_spec('fairscale'):
        return config
    print_log(f'encoder.num_cp={encoder["num_cp"]} needs fairscale, which is not installed: taken as 0', 'current')
    config, encoder = copy.copy(config), copy.copy(encoder)
    encoder['num_cp'] = 0
    config['encoder'] = encoder
    return config


def build_named(config: Mapping) -> nn.Module:
    """Build a model of OpenMMLab; where its language model cannot be loaded, the error says what is needed.

    Args:
        config: Of the model.

    Raises:
        ConfigError: The language model is not here.
    """
    language = config.get('language_model')
    try:
        return ROOT_MODELS.build(_without_fairscale(config))
    except (ImportError, OSError, RuntimeError) as error:
        if not isinstance(language, Mapping) or isinstance(error, NotImplementedError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f'the language model {language.get("name", type_name(language.get("type")))} of '
            f'{type_name(config.get("base_type", config.get("type")))} cannot be loaded ({reason}): install '
            'transformers, and set model.language_model.name to a folder with its config, vocabulary and weights, or '
            'to a name that can be downloaded here'
        ) from error


@MODELS.register_module()  # A function, named like a class: configs name it as their ``type``.
def Quantized(base_type: Union[str, type], quant: Union[Mapping, str] = 'w8a8', **model) -> nn.Module:
    """Build ``base_type`` and quantize it; a config needs no other change.

    Args:
        base_type: The model type that the user's config had, e.g. ``'MaskRCNN'``, ``'mmseg.EncoderDecoder'`` or the
            class itself.
        quant: See :func:`quantize_model_`.
        **model: The other keys of the user's model config, untouched.

    Returns:
        An instance of ``base_type``, with ``quant_spec`` and ``quant_report`` as attributes. Until it is calibrated or
        a quantized checkpoint is loaded, its forward raises :class:`~psaq_mm.errors.NotCalibratedError`.

    Example:
        >>> _base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py']
        >>> model = dict(type='psaq_mm.Quantized', base_type={{_base_.model.type}}, quant='w8a8')
    """
    if type_name(base_type) in ('', 'Quantized'):
        raise ConfigError(
            f'base_type={base_type!r} is no model type: write base_type={{{{_base_.model.type}}}} in the config '
            'that inherits the full-precision one'
        )
    built = build_named(dict(type=base_type, **model))
    quantize_model_(built, quant)
    return built
