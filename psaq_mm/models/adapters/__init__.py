# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Adapters: one file for each kind of backbone, and what they share.

Importing this package registers them all. No adapter imports the library it adapts: classes are recognized by their
qualified names, so that a user with mmdet alone needs neither mmseg nor mmpretrain.
"""

from psaq_mm.models.adapters import (
    beit,  # noqa: F401  each registers what it describes
    conformer,  # noqa: F401
    conv_module,  # noqa: F401
    convnext,  # noqa: F401
    davit,  # noqa: F401
    edgenext,  # noqa: F401
    efficientformer,  # noqa: F401
    eva,  # noqa: F401
    hivit,  # noqa: F401
    levit,  # noqa: F401
    lora,  # noqa: F401
    mixmim,  # noqa: F401
    mmseg_vit,  # noqa: F401
    mobilevit,  # noqa: F401
    mvit,  # noqa: F401
    poolformer,  # noqa: F401
    pyramid,  # noqa: F401
    queries,  # noqa: F401
    revvit,  # noqa: F401
    riformer,  # noqa: F401
    swin,  # noqa: F401
    swin_v2,  # noqa: F401
    t2t_vit,  # noqa: F401
    timm_swin,  # noqa: F401
    timm_swin_v2,  # noqa: F401
    timm_vit,  # noqa: F401
    tinyvit,  # noqa: F401
    tnt,  # noqa: F401
    transformers_pyramids,  # noqa: F401
    transformers_vit,  # noqa: F401
    twins,  # noqa: F401
    vit,  # noqa: F401
    vit_sam,  # noqa: F401
    xcit,  # noqa: F401
)
from psaq_mm.models.adapters.backbone import BACKBONES, Backbone, backbone_of, register_backbone
from psaq_mm.models.adapters.match import class_named

__all__ = ['BACKBONES', 'Backbone', 'backbone_of', 'class_named', 'register_backbone']
