"""Reduced backbones, one function each, for the test of all backbones: float, evaluated, with weights that make
attention uneven. Each returns the model and images that it takes."""

import pytest
import torch


def _build(library, config, size, seed=0):
    pytest.importorskip(library)
    from mmengine.registry import MODELS, DefaultScope

    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope(library):
        model = MODELS.build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.eval()
    return model, torch.randn(2, 3, *size)


def _timm(name, size, type='TimmClassifier', **more):
    pytest.importorskip('timm')
    return _build('mmpretrain', dict(type=type, model_name=name, **more), size)


# ---------------------------------------------------------------------- windows
def mmpretrain_swin_v2(**more):
    arch = dict(embed_dims=16, depths=[2, 2], num_heads=[1, 2], extra_norm_every_n_blocks=0)
    config = dict(
        type='SwinTransformerV2',
        arch=arch,
        img_size=64,
        window_size=4,
        pretrained_window_sizes=[0, 3],
        drop_path_rate=0.2,
        pad_small_map=True,
        out_indices=(0, 1),
    )
    return _build('mmpretrain', {**config, **more}, (36, 60))


def mmpretrain_swin_v2_giant():
    """An extra norm behind every second block, an absolute position embedding, no biases of the projections."""
    arch = dict(embed_dims=16, depths=[2, 2], num_heads=[1, 2], extra_norm_every_n_blocks=2)
    return mmpretrain_swin_v2(
        arch=arch,
        use_abs_pos_embed=True,
        with_cp=True,
        stage_cfgs=dict(block_cfgs=dict(attn_cfgs=dict(qkv_bias=False)), downsample_cfg=dict(use_post_norm=True)),
    )


_TIMM_SWIN_V2 = dict(embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4, drop_path_rate=0.1)


def timm_swin_v2():
    return _timm('swinv2_tiny_window8_256', (64, 32), img_size=(64, 32), num_classes=5, **_TIMM_SWIN_V2)


def timm_swin_v2_dynamic():
    """Any size: windows are padded."""
    return _timm(
        'swinv2_tiny_window8_256', (36, 60), img_size=64, num_classes=5, strict_img_size=False, **_TIMM_SWIN_V2
    )


def timm_swin_v2_features():
    return _timm(
        'swinv2_tiny_window8_256',
        (64, 32),
        type='TIMMBackbone',
        features_only=True,
        img_size=(64, 32),
        out_indices=(0, 1),
        **_TIMM_SWIN_V2,
    )
