"""Small Swin backbones of the three libraries, and inputs that pad and shift their windows."""

import pytest
import torch

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')
SIZES = [(56, 56), (64, 96), (57, 75), (112, 84), (90, 130)]
"""Multiples of a window, and not; odd; smaller than a window in the last stages."""


def swin_config(library, **more):
    """A Swin of a few thousand weights, window 7, shifted blocks in every stage."""
    if library == 'mmpretrain':
        config = dict(
            arch=dict(embed_dims=16, depths=[2, 2, 2], num_heads=[1, 2, 4]),
            window_size=7,
            drop_path_rate=0.2,
            out_indices=(0, 1, 2),
            pad_small_map=True,
        )
    else:
        config = dict(
            embed_dims=16,
            depths=[2, 2, 2],
            num_heads=[1, 2, 4],
            strides=(4, 2, 2),
            window_size=7,
            mlp_ratio=4,
            out_indices=(0, 1, 2),
            drop_path_rate=0.2,
        )
    return {**config, **more}


def build_backbone(library, type_name='SwinTransformer', seed=0, **more):
    """Build through the root registry under the library's scope, with weights that make attention uneven."""
    pytest.importorskip(library)
    from mmengine.registry import MODELS, DefaultScope

    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope(library):
        model = MODELS.build(dict(type=type_name, **swin_config(library, **more)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.eval()
    return model
