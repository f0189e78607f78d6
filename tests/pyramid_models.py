"""Small backbones, one function a kind; each has weights that make attention uneven, and is in eval mode.

Each function has a ``size`` of a picture (height, width) in :data:`SIZES` that pads windows where there are some.
"""

import copy
from functools import lru_cache

import pytest
import torch

_PYRAMID = dict(
    embed_dims=16,
    num_layers=[1, 2],
    num_heads=[1, 2],
    strides=[4, 2],
    sr_ratios=[2, 1],
    num_stages=2,
    drop_path_rate=0.1,
)
_SVT = dict(
    embed_dims=[16, 32],
    depths=[2, 2],
    num_heads=[1, 2],
    patch_sizes=[4, 2],
    strides=[4, 2],
    mlp_ratios=[2, 2],
    sr_ratios=[2, 1],
)
_CONVNEXT = dict(arch=dict(depths=[1, 2], channels=[16, 32]), drop_path_rate=0.1, layer_scale_init_value=0.5)

CONFIGS = {
    'mit': (
        'mmseg',
        dict(type='MixVisionTransformer', out_indices=(0, 1), patch_sizes=[7, 3], mlp_ratio=2, **_PYRAMID),
    ),
    'mit-checkpointed': (
        'mmseg',
        dict(
            type='MixVisionTransformer', out_indices=(1,), patch_sizes=[7, 3], with_cp=True, qkv_bias=False, **_PYRAMID
        ),
    ),
    'pvt': (
        'mmdet',
        dict(
            type='PyramidVisionTransformer',
            pretrain_img_size=32,
            patch_sizes=[4, 2],
            paddings=[0, 0],
            mlp_ratios=[2, 2],
            out_indices=(0, 1),
            **_PYRAMID,
        ),
    ),
    'pvt-v2': (
        'mmdet',
        dict(
            type='PyramidVisionTransformerV2',
            embed_dims=8,
            num_layers=[1, 1, 1, 1],
            num_heads=[1, 2, 2, 2],
            sr_ratios=[2, 2, 1, 1],
            mlp_ratios=[2, 2, 2, 2],
        ),
    ),
    'twins-pcpvt-mmseg': ('mmseg', dict(type='PCPVT', out_indices=(0, 1), drop_path_rate=0.1, qkv_bias=True, **_SVT)),
    'twins-svt-mmseg': (
        'mmseg',
        dict(type='SVT', out_indices=(0, 1), windiow_sizes=[7, 7], norm_after_stage=True, qkv_bias=True, **_SVT),
    ),
    'twins-pcpvt-mmpretrain': (
        'mmpretrain',
        dict(type='PCPVT', arch=_SVT, out_indices=(1,), norm_after_stage=[False, True], qkv_bias=True),
    ),
    'twins-svt-mmpretrain': (
        'mmpretrain',
        dict(type='SVT', arch=dict(_SVT, window_sizes=[7, 7]), out_indices=(0, 1), drop_path_rate=0.1),
    ),
    'convnext': ('mmpretrain', dict(type='ConvNeXt', out_indices=[0, 1], gap_before_final_norm=False, **_CONVNEXT)),
    'convnext-convolutions': (
        'mmpretrain',
        dict(type='ConvNeXt', out_indices=[1], linear_pw_conv=False, with_cp=True, **_CONVNEXT),
    ),
    'convnext-v2': (
        'mmpretrain',
        dict(type='ConvNeXt', out_indices=[1], **{**_CONVNEXT, 'use_grn': True, 'layer_scale_init_value': 0.0}),
    ),
    'timm-convnext': (
        'mmpretrain',
        dict(
            type='TimmClassifier', model_name='convnext_atto', depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=5
        ),
    ),
    'timm-convnext-v2': (
        'mmpretrain',
        dict(
            type='TimmClassifier', model_name='convnextv2_atto', depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=5
        ),
    ),
    'timm-backbone-convnext': (
        'mmdet',
        dict(
            type='mmpretrain.TIMMBackbone',
            model_name='convnext_tiny',
            features_only=True,
            depths=(1, 1, 1, 1),
            dims=(8, 8, 16, 16),
            out_indices=(0, 1, 2, 3),
        ),
    ),
}
"""(library, config) of each."""

SIZES = {name: (40, 56) if 'twins' in name else (48, 64) for name in CONFIGS}
"""A picture of each, (height, width)."""


def build(name, seed=0, **more):
    """The full-precision model."""
    library, config = CONFIGS[name]
    pytest.importorskip(library)
    if 'timm' in name:
        pytest.importorskip('timm')
    if 'timm' in name or config['type'].startswith('mmpretrain.'):
        pytest.importorskip('mmpretrain')
    return copy.deepcopy(_built(library, repr({**config, **more}), seed))


@lru_cache(maxsize=None)
def _built(library, config, seed):
    from mmengine.registry import MODELS as REGISTRY
    from mmengine.registry import DefaultScope

    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope(library):
        model = REGISTRY.build(eval(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval()  # returns None in some libraries
    return model


def images_of(name, batch=2, seed=1):
    """Noise of :data:`SIZES`."""
    return torch.randn(batch, 3, *SIZES[name], generator=torch.Generator().manual_seed(seed))
