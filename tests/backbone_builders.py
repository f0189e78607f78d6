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


def mmpretrain_davit(**more):
    arch = dict(embed_dims=16, depths=[1, 1], num_heads=[1, 2])
    config = dict(type='DaViT', arch=arch, window_size=4, pad_small_map=True, out_indices=(0, 1), drop_path_rate=0.1)
    return _build('mmpretrain', {**config, **more}, (56, 72))


def mmpretrain_davit_after_downsample():
    return mmpretrain_davit(out_after_downsample=True, with_cp=True, out_indices=(1,))


def _hivit(type, size=(64, 64), **more):
    # The first stages have the numbers 0 to 5 in out_indices: the last block needs a greater one.
    arch = dict(embed_dims=32, depths=[1, 1, 7], num_heads=2)
    return _build('mmpretrain', dict(type=type, arch=arch, img_size=64, drop_path_rate=0.1, **more), size)


def mmpretrain_hivit():
    return _hivit('HiViT', rpe=True, layer_scale_init_value=0.5, out_indices=[6])


def mmpretrain_hivit_other_size():
    return _hivit('HiViT', (64, 96), out_indices=[6])


def mmpretrain_hivit_mae():
    return _hivit('MAEHiViT', out_indices=[6])


def mmpretrain_hivit_itpn():
    return _hivit('iTPNHiViT', reconstruction_type='clip', out_indices=[6])


_MIXMIM = dict(arch=dict(embed_dims=16, depths=[2, 1], num_heads=[1, 2]), img_size=64, window_size=[4, 8])


def mmpretrain_mixmim():
    return _build('mmpretrain', dict(type='MixMIMTransformer', drop_path_rate=0.1, **_MIXMIM), (64, 64))


def mmpretrain_mixmim_pretraining():
    return _build('mmpretrain', dict(type='MixMIMPretrainTransformer', use_checkpoint=True, **_MIXMIM), (64, 64))


def mmpretrain_simmim_swin():
    arch = dict(embed_dims=16, depths=[2, 2], num_heads=[1, 2])
    stage = dict(block_cfgs=dict(window_size=4))
    config = dict(type='SimMIMSwinTransformer', arch=arch, img_size=64, stage_cfgs=stage, out_indices=(0, 1))
    return _build('mmpretrain', dict(config, pad_small_map=True, use_abs_pos_embed=True), (36, 60))


_SAM = dict(
    arch=dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64, global_attn_indexes=[1]),
    img_size=48,
    patch_size=8,
    window_size=4,
    out_channels=16,
)


def mmpretrain_sam():
    return _build('mmpretrain', dict(type='ViTSAM', **_SAM), (48, 72))


def mmpretrain_sam_plain():
    """Without positions and without the reduction of channels; nothing is padded."""
    config = {**_SAM, 'out_channels': 0, 'use_rel_pos': False, 'use_abs_pos': False, 'qkv_bias': False}
    return _build('mmpretrain', dict(type='ViTSAM', out_type='avg_featmap', **config), (32, 64))
