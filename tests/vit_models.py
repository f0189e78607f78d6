"""Small models of every supported kind with one class of attention each, and the library's own explicit attention."""

import copy
from functools import lru_cache

import pytest
import torch

_ARCH = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
_VIT = dict(arch=_ARCH, img_size=32, patch_size=8, drop_path_rate=0.1)
_TIMM_VIT = dict(patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
_TIMM_SWIN = dict(embed_dim=16, depths=(2, 2), num_heads=(1, 2), num_classes=5, window_size=7, drop_path_rate=0.1)
_BACKBONE = dict(type='mmpretrain.TIMMBackbone', features_only=True, img_size=32, out_indices=(0, 1))


def _classifier(name, **more):
    return 'mmpretrain', dict(type='TimmClassifier', model_name=name, **more)


CONFIGS = {
    'mmpretrain-vit': ('mmpretrain', dict(type='VisionTransformer', **_VIT)),
    'mmpretrain-vit-options': (
        'mmpretrain',
        dict(
            type='VisionTransformer',
            pre_norm=True,
            layer_scale_init_value=0.5,
            out_type='avg_featmap',
            with_cls_token=False,
            **_VIT,
        ),
    ),
    'mmpretrain-vit-gated': (
        'mmpretrain',
        dict(
            type='VisionTransformer',
            layer_cfgs=dict(ffn_type='swiglu_fused', qkv_bias=False),
            out_type='featmap',
            **_VIT,
        ),
    ),
    'mmpretrain-deit': ('mmpretrain', dict(type='DistilledVisionTransformer', **_VIT)),
    'mmpretrain-deit3': ('mmpretrain', dict(type='DeiT3', **_VIT)),
    'mmseg-vit': (
        'mmseg',
        dict(
            type='VisionTransformer',
            img_size=32,
            patch_size=8,
            embed_dims=32,
            num_layers=2,
            num_heads=2,
            mlp_ratio=2,
            drop_path_rate=0.1,
            out_indices=(0, 1),
        ),
    ),
    'mmseg-vit-options': (
        'mmseg',
        dict(
            type='VisionTransformer',
            img_size=32,
            patch_size=8,
            embed_dims=32,
            num_layers=2,
            num_heads=2,
            mlp_ratio=2,
            pre_norm=True,
            patch_norm=True,
            final_norm=True,
            with_cls_token=False,
            qkv_bias=False,
            with_cp=True,
        ),
    ),
    'timm-vit': _classifier('vit_tiny_patch16_224', img_size=32, **_TIMM_VIT),
    'timm-vit-options': _classifier(
        'vit_tiny_patch16_224',
        img_size=32,
        qk_norm=True,
        init_values=0.5,
        pre_norm=True,
        no_embed_class=True,
        global_pool='avg',
        **_TIMM_VIT,
    ),
    'timm-deit': _classifier('deit_tiny_distilled_patch16_224', img_size=32, **_TIMM_VIT),
    'timm-swin': _classifier('swin_tiny_patch4_window7_224', img_size=(56, 72), **_TIMM_SWIN),
    'timm-swin-dynamic': _classifier('swin_tiny_patch4_window7_224', img_size=56, strict_img_size=False, **_TIMM_SWIN),
    'timm-backbone-vit': (
        'mmdet',
        dict(_BACKBONE, model_name='vit_tiny_patch16_224', patch_size=8, embed_dim=32, depth=2, num_heads=2),
    ),
    'timm-backbone-tokens': (
        'mmpretrain',
        dict(
            type='TIMMBackbone',
            model_name='deit_tiny_patch16_224',
            img_size=32,
            patch_size=8,
            embed_dim=32,
            depth=2,
            num_heads=2,
        ),
    ),
    'timm-backbone-swin': (
        'mmseg',
        dict(
            _BACKBONE,
            model_name='swin_tiny_patch4_window7_224',
            img_size=(56, 72),
            embed_dim=16,
            depths=(2, 2),
            num_heads=(1, 2),
            window_size=7,
        ),
    ),
}
"""(library, config) of each. Every head is 16 wide: the square root is a power of two, and scaling by it is exact."""

MODELS = tuple(CONFIGS)
PADDED = ('timm-swin', 'timm-swin-dynamic', 'timm-backbone-swin')
"""Those whose windows are padded on :func:`images_of` them."""


def build(name, seed=0, **more):
    """The full-precision model, with weights that make attention uneven."""
    library, config = CONFIGS[name]
    pytest.importorskip(library)
    if 'timm' in name:
        pytest.importorskip('timm')
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
    """Noise of a size that the model takes; one that pads windows where there are windows."""
    size = (56, 72) if name in PADDED else (32, 32)
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def tensors(outputs):
    """The tensors of nested tuples and lists, in order."""
    return [outputs] if isinstance(outputs, torch.Tensor) else [t for o in outputs for t in tensors(o)]


def run(model, images):
    """Every tensor that the model returns, without gradients."""
    with torch.no_grad():
        return tensors(model(images))


def unfuse(model):
    """Make the library take its own explicit path through attention, in place."""
    for module in model.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = False
        if hasattr(module, 'scaled_dot_product_attention'):
            from mmpretrain.models.utils.attention import scaled_dot_product_attention_pyimpl

            module.scaled_dot_product_attention = scaled_dot_product_attention_pyimpl
    return model
