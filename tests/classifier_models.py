"""Small classifiers of mmpretrain and timm, and the config of one as a file."""

import pytest
import torch

CLASSES = 5
IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])

_VIT = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch=dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=64),
        img_size=32,
        patch_size=8,
    ),
    head=dict(type='VisionTransformerClsHead', num_classes=CLASSES, in_channels=32),
)
_SWIN = dict(
    type='ImageClassifier',
    backbone=dict(
        type='SwinTransformer', arch=dict(embed_dims=16, depths=[1, 2], num_heads=[1, 2]), img_size=56, out_indices=(1,)
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=CLASSES, in_channels=32),
)
_TIMM_VIT = dict(
    type='TimmClassifier',
    model_name='vit_tiny_patch16_224',
    img_size=32,
    patch_size=8,
    embed_dim=32,
    depth=4,
    num_heads=2,
    num_classes=CLASSES,
)
_TIMM_SWIN = dict(
    type='TimmClassifier',
    model_name='swin_tiny_patch4_window7_224',
    img_size=56,
    embed_dim=16,
    depths=(1, 2),
    num_heads=(1, 2),
    num_classes=CLASSES,
)

MODELS = {
    'mmpretrain-vit': _VIT,
    'mmpretrain-swin': _SWIN,
    'timm-vit': _TIMM_VIT,
    'timm-deit-distilled': dict(_TIMM_VIT, model_name='deit_tiny_distilled_patch16_224'),
    'timm-swin': _TIMM_SWIN,
}
"""Configs of classifiers of a few thousand weights."""

SIZES = {'mmpretrain-vit': 32, 'mmpretrain-swin': 56, 'timm-vit': 32, 'timm-deit-distilled': 32, 'timm-swin': 56}


def build_classifier(name, seed=0, quant=None):
    """One of :data:`MODELS` with random weights of a trained model's size; quantized where ``quant`` says how."""
    pytest.importorskip('mmpretrain')
    if name.startswith('timm'):
        pytest.importorskip('timm')
    from mmengine.registry import MODELS as REGISTRY
    from mmengine.registry import DefaultScope

    config = dict(MODELS[name], data_preprocessor=dict(num_classes=CLASSES, to_rgb=True, **IMAGENET))
    if quant is not None:
        config = dict(config, type='psaq_mm.Quantized', base_type=config['type'], quant=quant)
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = REGISTRY.build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.eval()
    return model


CLASSIFIER = """
_base_ = ['mmpretrain::deit/deit-tiny_4xb256_in1k.py']
model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=64),
                  img_size=32, patch_size=8),
    head=dict(num_classes=5, in_channels=32))
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='ResizeEdge', scale=36, edge='short'),
                 dict(type='CenterCrop', crop_size=32), dict(type='PackInputs')]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
"""
"""A tiny DeiT out of mmpretrain's zoo config, for :class:`tiny.Project`."""
