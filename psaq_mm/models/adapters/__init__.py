# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Adapters: one for each class of attention or block that multiplies matrices or adds tensors outside of any module.

Importing this package registers them all. No adapter imports the library it adapts: classes are recognized by their
qualified names, so that a user with mmdet alone needs neither mmseg nor mmpretrain.
"""

from psaq_mm.models.adapters import conv_module, multihead  # noqa: F401  register their adapters
from psaq_mm.models.adapters.match import class_named
from psaq_mm.models.adapters.mmseg_vit import MMSEG_VIT_ARCHITECTURES
from psaq_mm.models.adapters.swin import SWIN_BACKBONES
from psaq_mm.models.adapters.timm_swin import TIMM_SWIN_ARCHITECTURES
from psaq_mm.models.adapters.timm_vit import TIMM_VIT_ARCHITECTURES
from psaq_mm.models.adapters.vit import VIT_ARCHITECTURES

__all__ = ['ARCHITECTURES', 'SUPPORTED_BACKBONES', 'class_named']

ARCHITECTURES = VIT_ARCHITECTURES + MMSEG_VIT_ARCHITECTURES + TIMM_VIT_ARCHITECTURES + TIMM_SWIN_ARCHITECTURES
"""Backbones whose blocks are checked one by one. The Swin of mmdet, mmseg and mmpretrain offers no other block."""

SUPPORTED_BACKBONES = SWIN_BACKBONES + tuple(name for kind in ARCHITECTURES for name in kind.backbones)
