# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""One adapter an attention class: where a library multiplies matrices outside of any module, an adapter says so.

Importing this package registers them all. No adapter imports the library it adapts: classes are known by their qualified
names, so that a user with mmdet alone needs neither mmseg nor mmpretrain.
"""
from .match import class_named
from .swin import SWIN_BACKBONES

__all__ = ['SUPPORTED_BACKBONES', 'class_named']

SUPPORTED_BACKBONES = SWIN_BACKBONES
