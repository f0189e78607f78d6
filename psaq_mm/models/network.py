# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Where the parts of a model are: its backbone, the network inside of it, and what is used in training alone."""

import inspect
from typing import Optional

from torch import nn

from psaq_mm.models.adapters.match import class_named, inherits

__all__ = [
    'TIMM_CLASSIFIER',
    'TRAINING_ONLY',
    'find_backbone',
    'is_pretraining',
    'is_timm',
    'is_transformers',
    'network_of',
    'takes_levels_alone',
    'tower_name',
]

TRAINING_ONLY = ('auxiliary_head', 'data_preprocessor')
"""Parts that are not used at test time: they stay float in every scope."""

TIMM_CLASSIFIER = ('mmpretrain.models.classifiers.timm.TimmClassifier',)
_TIMM_BACKBONE = ('mmpretrain.models.backbones.timm_backbone.TIMMBackbone',)
_TOWERS = ('image_encoder', 'vision_backbone', 'vision_encoder', 'visual_encoder')
_FEATURE_GETTER = ('timm.models._features.FeatureGetterNet',)


def find_backbone(model: nn.Module) -> nn.Module:
    """The backbone of a detector, segmentor or classifier, timm's whole network in a ``TimmClassifier``, the base model
    of one of transformers; the model itself where it is a backbone.
    """
    if class_named(model, TIMM_CLASSIFIER):
        return model.model
    if is_transformers(model):
        return getattr(model, model.base_model_prefix, model)
    return getattr(model, 'backbone', model)


def tower_name(model: nn.Module) -> Optional[str]:
    """The child that a model of pictures and texts has as its image tower; None where it has none of a known name."""
    return next((name for name in _TOWERS if isinstance(getattr(model, name, None), nn.Module)), None)


def network_of(backbone: nn.Module) -> nn.Module:
    """The network itself: timm's, inside the wrappers of mmpretrain and timm."""
    if class_named(backbone, _TIMM_BACKBONE):
        backbone = backbone.timm_model
    return backbone.model if class_named(backbone, _FEATURE_GETTER) else backbone


def is_transformers(model: nn.Module) -> bool:
    """Whether a model is one of the library ``transformers``."""
    return inherits(model, 'transformers.modeling_utils.PreTrainedModel')


def is_timm(network: nn.Module) -> bool:
    """Whether a network has the interface of timm's classifiers."""
    return hasattr(network, 'forward_features') and hasattr(network, 'forward_head')


def is_pretraining(model: nn.Module) -> bool:
    """Whether a model is one of mmpretrain's self-supervised pre-training (MAE, SimMIM, ...), whose neck and head
    restore masked pictures and whose backbone is what is used afterwards.
    """
    return inherits(model, 'mmpretrain.models.selfsup.base.BaseSelfSupervisor')


def takes_levels_alone(part: nn.Module) -> bool:
    """Whether the forward of a neck or head needs the feature maps and nothing else (texts, queries, data samples)."""
    if type(part).forward is nn.Module.forward:  # it has none of its own: other code calls its parts
        return False
    try:
        inspect.signature(part.forward).bind(())
    except TypeError:
        return False
    return True
