"""Every supported backbone at reduced size: one function for each backbone of each library.

To add one, write a function that returns its config, and say in the decorator what works::

    @backbone('BEiT', 'mmpretrain', folding=4, rotation='a LayerScale', similarity=2, export=True, dynamic='a dynamic')
    def mmpretrain_beit():
        return dict(type='BEiTViT', img_size=32, patch_size=8, ...)

- The first argument is the name that people know it by, the second the library in whose scope the config is built:
  mmdet, mmseg, mmpretrain, or timm for a ``TimmClassifier`` or ``TIMMBackbone`` of mmpretrain. Two functions of one
  backbone and library are two rows; ``build_of`` tells them apart in the docs.
- The function returns the config of a backbone or of a whole model. Reduced: one or two blocks a stage, 16 or 32
  channels, heads 16 wide (the root is a power of two, so that scaling is exact), pictures of 32 to 64 pixels.
- ``size`` is the height and width of the pictures, in pixels. ``inside`` puts a bare backbone into a model whose neck
  or head is known (:func:`classifier`, :func:`detector`, :func:`segmentor`): a stream that ends in the backbone's
  outputs is rotated only where everything that reads them is known. ``exact=False``: with its quantizers off the model
  equals the library's to rounding and not to the last bit; say why in a comment.
- ``floats`` are the operations inside the backbone that stay in floating point and that ``psaq-inspect`` names, such as
  ``'einsum with a parameter'``; there are none in most.
- The rest are the cells of the table in docs/reference/backbones.md. A number or True says that it works, and the test
  exercises it. A text says that it is refused, and the test finds these words in what psaq_mm says:

  ========== ================================================== ==================================================
  cell       works                                              refused: words out of
  ========== ================================================== ==================================================
  folding    number of layers whose LayerNorm RepQ folds        ``capabilities(model)['folding']``
  rotation   number of residual streams that are rotated        ``rotate_model_``'s report of what it left
  similarity number of attention modules that are tapped        the error of ``AttentionTaps``
  export     True: exported and verified on a runtime           the error of ``export_model``
  dynamic    True: one graph takes several sizes                the error of ``export_model(..., dynamic=True)``
  ========== ================================================== ==================================================

tests/models/test_every_backbone.py runs all of them; a function needs no test of its own.
"""

import copy
import inspect
from functools import lru_cache, partial
from typing import Any, Callable, Dict, List, NamedTuple, Tuple, Union

import pytest
import torch

CELLS = ('folding', 'rotation', 'similarity', 'export', 'dynamic')


class Row(NamedTuple):
    """A backbone of a library.

    Attributes:
        id: Name of its function.
        title: As people know it.
        library: Whose it is.
        build_of: What is special of this build, for the docs; '' for the usual one.
        config: Its function.
        size: (height, width) of its pictures, in pixels.
        exact: Whether the outputs are the library's to the last bit.
        floats: What it computes in floating point, see :class:`psaq_mm.models.uncovered.Uncovered`.
        inside: Config of the backbone to that of the model around it, for its rotation.
        cells: See the module.
    """

    id: str
    title: str
    library: str
    build_of: str
    config: Callable[[], Dict]
    size: Tuple[int, int]
    exact: bool
    floats: Tuple[str, ...]
    inside: Callable[[Dict], Dict]
    cells: Dict[str, Union[int, str]]


ROWS: List[Row] = []


def backbone(
    title: str,
    library: str,
    build_of: str = '',
    size: Tuple[int, int] = (32, 32),
    exact: bool = True,
    floats: Tuple[str, ...] = (),
    inside: Callable[[Dict], Dict] = dict,
    **cells: Union[int, str],
) -> Callable:
    """Register the function below as a row; see the module."""
    assert set(cells) == set(CELLS), f'{title} of {library} declares {sorted(cells)}, not {CELLS}'

    def register(config: Callable[[], Dict]) -> Callable[[], Dict]:
        ROWS.append(Row(config.__name__, title, library, build_of, config, size, exact, floats, inside, cells))
        return config

    return register


def build(row: Row, seed: int = 0, inside: bool = False) -> torch.nn.Module:
    """The full-precision model of a row, with weights that make attention uneven; ``inside`` the model around it."""
    scope = 'mmpretrain' if row.library == 'timm' else row.library
    for library in {row.library, scope}:
        pytest.importorskip(library)
    return copy.deepcopy(_built(scope, row.config, row.inside if inside else dict, seed))


@lru_cache(maxsize=None)
def _built(scope: str, config: Callable[[], Dict], inside: Callable[[Dict], Dict], seed: int) -> torch.nn.Module:
    from mmengine.config import ConfigDict
    from mmengine.registry import MODELS, DefaultScope

    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(ConfigDict(inside(config())))
    with torch.no_grad():
        for module in model.modules():
            # timm starts the norms of Swin V2 at 0: the branches in front of them would be nothing.
            if isinstance(module, torch.nn.LayerNorm) and not module.weight.any():
                module.weight.fill_(1)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.eval()  # returns None in some libraries
    return model


def row_named(name: str, **options: Any) -> Row:
    """The row of a function by its name, with other options in its config."""
    row = next(row for row in ROWS if row.id == name)
    return row._replace(config=lambda: {**row.config(), **options}) if options else row


def images_of(row: Row, batch: int = 2, seed: int = 1) -> torch.Tensor:
    """Noise that a row takes, (batch, 3, height, width)."""
    return torch.randn(batch, 3, *row.size, generator=torch.Generator().manual_seed(seed))


def tensors(outputs: Any) -> List[torch.Tensor]:
    """The tensors of nested tuples and lists, in order."""
    return [outputs] if isinstance(outputs, torch.Tensor) else [t for o in outputs for t in tensors(o)]


def run(model: torch.nn.Module, images: torch.Tensor) -> List[torch.Tensor]:
    """Every tensor that the model returns, without gradients."""
    # Backbones of masked pre-training take a mask; without one they give features.
    whole = dict(mask=None) if 'mask' in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        return tensors(model(images, **whole))


def unfuse(model: torch.nn.Module) -> torch.nn.Module:
    """Make the library take its own explicit path through attention, in place; the model."""
    for module in model.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = False
        attend = getattr(module, 'scaled_dot_product_attention', None)
        # A partial is the explicit path already, with a scale of its own (T2T-ViT).
        if attend is not None and not isinstance(attend, partial):
            from mmpretrain.models.utils.attention import scaled_dot_product_attention_pyimpl

            module.scaled_dot_product_attention = scaled_dot_product_attention_pyimpl
    return model


# ---------------------------------------------------------------------- models around a backbone, for its rotation
def classifier(channels: int, head: str = 'LinearClsHead') -> Callable[[Dict], Dict]:
    """A backbone in mmpretrain's ImageClassifier: behind a pooling of its map, or with a head of class tokens."""
    neck = dict(type='GlobalAveragePooling') if head == 'LinearClsHead' else None
    parts = dict(head=dict(type=head, in_channels=channels, num_classes=5), neck=neck)
    return lambda config: dict(type='ImageClassifier', backbone=config, **parts)


def detector(*channels: int) -> Callable[[Dict], Dict]:
    """A backbone in mmdet's RetinaNet, with an FPN of its outputs."""
    neck = dict(type='FPN', in_channels=list(channels), out_channels=16, num_outs=len(channels))
    anchors = dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1, ratios=[1.0], strides=[8] * 2)
    anchors['strides'] = [8 * 2**i for i in range(len(channels))]
    coder = dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[1.0] * 4)
    head = dict(
        type='RetinaHead',
        num_classes=3,
        in_channels=16,
        feat_channels=16,
        stacked_convs=1,
        anchor_generator=anchors,
        bbox_coder=coder,
    )
    return lambda config: dict(type='RetinaNet', backbone=config, neck=neck, bbox_head=head)


def segmentor(*channels: int) -> Callable[[Dict], Dict]:
    """A backbone in mmseg's EncoderDecoder with a UPerHead of its outputs."""
    head = dict(
        type='UPerHead',
        in_channels=list(channels),
        in_index=list(range(len(channels))),
        channels=8,
        num_classes=3,
        norm_cfg=dict(type='BN'),
    )
    return lambda config: dict(type='EncoderDecoder', backbone=config, decode_head=head, test_cfg=dict(mode='whole'))


# ---------------------------------------------------------------------- Swin
_NOT_DYNAMIC = 'does not export with a dynamic size'
_SWIN = dict(embed_dims=16, depths=[2, 1], num_heads=[1, 2], strides=(4, 2), window_size=7, out_indices=(0, 1))
_SWIN_WORKS = dict(size=(56, 72), folding=7, rotation=1, similarity=3, export=True)


@backbone('Swin', 'mmdet', inside=detector(16, 32), dynamic=True, **_SWIN_WORKS)
def mmdet_swin():
    return dict(type='SwinTransformer', **_SWIN)


@backbone('Swin', 'mmseg', inside=segmentor(16, 32), dynamic=True, **_SWIN_WORKS)
def mmseg_swin():
    return dict(type='SwinTransformer', **_SWIN)


@backbone('Swin', 'mmpretrain', inside=classifier(32), dynamic=True, **_SWIN_WORKS)
def mmpretrain_swin():
    arch = dict(embed_dims=16, depths=[2, 1], num_heads=[1, 2])
    return dict(type='SwinTransformer', arch=arch, window_size=7, out_indices=(1,), pad_small_map=True)


@backbone('Swin', 'mmpretrain', 'pad_small_map=False', inside=classifier(32), dynamic=_NOT_DYNAMIC, **_SWIN_WORKS)
def mmpretrain_swin_of_small_maps():
    return dict(mmpretrain_swin(), pad_small_map=False)


@backbone('Swin', 'timm', dynamic=_NOT_DYNAMIC, **_SWIN_WORKS)
def timm_swin():
    return dict(
        type='TimmClassifier',
        model_name='swin_tiny_patch4_window7_224',
        img_size=(56, 72),
        embed_dim=16,
        depths=(2, 1),
        num_heads=(1, 2),
        num_classes=5,
        window_size=7,
    )


# ---------------------------------------------------------------------- ViT and DeiT
_VIT = dict(arch=dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64), img_size=32, patch_size=8)
_TIMM_VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
_VIT_WORKS = dict(folding=4, rotation=1, similarity=2, export=True, dynamic=_NOT_DYNAMIC)


@backbone('ViT, DeiT', 'mmpretrain', inside=classifier(32, 'VisionTransformerClsHead'), **_VIT_WORKS)
def mmpretrain_vit():
    return dict(type='VisionTransformer', **_VIT)


@backbone('DeiT, distilled', 'mmpretrain', inside=classifier(32, 'DeiTClsHead'), **_VIT_WORKS)
def mmpretrain_distilled_deit():
    return dict(type='DistilledVisionTransformer', **_VIT)


@backbone(
    'DeiT III',
    'mmpretrain',
    inside=classifier(32, 'VisionTransformerClsHead'),
    **{**_VIT_WORKS, 'folding': 'is read by 2 layers'},
)
def mmpretrain_deit3():
    return dict(type='DeiT3', **_VIT)


@backbone('ViT, DeiT', 'mmseg', **{**_VIT_WORKS, 'rotation': 'its parts are not told'})
def mmseg_vit():
    return dict(
        type='VisionTransformer',
        img_size=32,
        patch_size=8,
        embed_dims=32,
        num_layers=2,
        num_heads=2,
        mlp_ratio=2,
        out_indices=(0, 1),
    )


@backbone('ViT, DeiT', 'timm', **_VIT_WORKS)
def timm_vit():
    return dict(type='TimmClassifier', model_name='vit_tiny_patch16_224', **_TIMM_VIT)


@backbone('DeiT, distilled', 'timm', **_VIT_WORKS)
def timm_distilled_deit():
    return dict(type='TimmClassifier', model_name='deit_tiny_distilled_patch16_224', **_TIMM_VIT)


# ---------------------------------------------------------------------- ViT and its relatives
# Rows of this family stand below.


# ---------------------------------------------------------------------- Swin V2, windows
_POST_NORM = dict(folding='stand behind the layers', rotation='a LayerNorm stands between each branch and the stream')
_SWIN_V2 = dict(size=(36, 60), similarity=3, export=True, **_POST_NORM)


@backbone('Swin V2', 'mmpretrain', inside=classifier(32), dynamic=True, **_SWIN_V2)
def mmpretrain_swin_v2():
    arch = dict(embed_dims=16, depths=[2, 1], num_heads=[1, 2], extra_norm_every_n_blocks=0)
    return dict(
        type='SwinTransformerV2',
        arch=arch,
        window_size=4,
        pretrained_window_sizes=[0, 3],
        pad_small_map=True,
        drop_path_rate=0.2,
        out_indices=(1,),
    )


@backbone(
    'Swin V2', 'mmpretrain', 'giant, checkpointed', dynamic=_NOT_DYNAMIC, **dict(_SWIN_V2, size=(64, 48), similarity=2)
)
def mmpretrain_swin_v2_giant():
    """An extra norm behind every second block, position embeddings, no biases, maps that are never padded."""
    return dict(
        type='SwinTransformerV2',
        arch=dict(embed_dims=16, depths=[2], num_heads=[1], extra_norm_every_n_blocks=2),
        img_size=64,
        window_size=4,
        stage_cfgs=dict(block_cfgs=dict(attn_cfgs=dict(qkv_bias=False))),
        use_abs_pos_embed=True,
        with_cp=True,
        out_indices=(0,),
    )


_TIMM_SWIN_V2 = dict(
    type='TimmClassifier',
    model_name='swinv2_tiny_window8_256',
    embed_dim=16,
    depths=(2, 1),
    num_heads=(1, 2),
    num_classes=5,
    window_size=4,
)


@backbone('Swin V2', 'timm', dynamic=_NOT_DYNAMIC, **dict(_SWIN_V2, size=(64, 32)))
def timm_swin_v2():
    return dict(_TIMM_SWIN_V2, img_size=(64, 32))


@backbone('Swin V2', 'timm', 'strict_img_size=False', dynamic=_NOT_DYNAMIC, **_SWIN_V2)
def timm_swin_v2_of_any_size():
    return dict(_TIMM_SWIN_V2, img_size=64, strict_img_size=False)


@backbone('Swin V2', 'timm', 'features_only=True', dynamic=_NOT_DYNAMIC, **dict(_SWIN_V2, size=(64, 32)))
def timm_swin_v2_features():
    config = dict(_TIMM_SWIN_V2, type='TIMMBackbone', img_size=(64, 32), features_only=True, out_indices=(0, 1))
    del config['num_classes']
    return config


_POSITIONS = dict(_SWIN_WORKS, size=(56, 56), folding=6, dynamic=_NOT_DYNAMIC)


@backbone('Swin', 'mmdet', 'position embedding, no patch_norm', inside=detector(16, 32), **_POSITIONS)
def mmdet_swin_with_positions():
    return dict(type='SwinTransformer', **_SWIN, use_abs_pos_embed=True, pretrain_img_size=56, patch_norm=False)


@backbone('Swin', 'mmpretrain', 'out_after_downsample', dynamic=True, **dict(_SWIN_WORKS, rotation='outputs after'))
def mmpretrain_swin_after_downsampling():
    return dict(mmpretrain_swin(), out_after_downsample=True, out_indices=(0, 1), with_cp=True)


_SIMMIM_WORKS = dict(size=(36, 60), folding=7, similarity=3, export=True, dynamic=_NOT_DYNAMIC)


@backbone('Swin, SimMIM', 'mmpretrain', inside=classifier(32), rotation=1, **_SIMMIM_WORKS)
def mmpretrain_simmim_swin():
    arch = dict(embed_dims=16, depths=[2, 1], num_heads=[1, 2])
    stage = dict(block_cfgs=dict(window_size=4))
    more = dict(img_size=64, stage_cfgs=stage, out_indices=(1,), pad_small_map=True, use_abs_pos_embed=True)
    return dict(type='SimMIMSwinTransformer', arch=arch, **more)


_DAVIT_WORKS = dict(folding=8, rotation='depthwise convolutions', similarity=4, export=True, dynamic=_NOT_DYNAMIC)


@backbone('DaViT', 'mmpretrain', size=(56, 72), **_DAVIT_WORKS)
def mmpretrain_davit():
    arch = dict(embed_dims=16, depths=[1, 1], num_heads=[1, 2])
    return dict(type='DaViT', arch=arch, window_size=4, pad_small_map=True, out_indices=(0, 1), drop_path_rate=0.1)


@backbone('DaViT', 'mmpretrain', 'out_after_downsample, checkpointed', size=(64, 64), **_DAVIT_WORKS)
def mmpretrain_davit_after_downsampling():
    more = dict(out_after_downsample=True, with_cp=True, pad_small_map=False, out_indices=(1,))
    return dict(mmpretrain_davit(), **more)


def _hivit(depths, **more):
    arch = dict(embed_dims=32, depths=depths, num_heads=2)
    return dict(arch=arch, img_size=64, out_indices=[depths[-1] - 1], drop_path_rate=0.1, **more)


# Blocks and mergings of the first stages have the first numbers in out_indices: the last block needs a greater one.
# The first row has in each of the first two stages two feed-forward networks and a merging, seven whole blocks behind;
# the others have the mergings alone, and three blocks.
_HIVIT_WORKS = dict(size=(64, 64), folding=8, similarity=3, export=True, dynamic=_NOT_DYNAMIC)


@backbone('HiViT', 'mmpretrain', rotation=1, **dict(_HIVIT_WORKS, folding=20, similarity=7))
def mmpretrain_hivit():
    return dict(type='HiViT', rpe=True, layer_scale_init_value=0.5, **_hivit([1, 1, 7]))


@backbone('HiViT', 'mmpretrain', 'another size', rotation=1, **dict(_HIVIT_WORKS, size=(64, 96)))
def mmpretrain_hivit_of_another_size():
    return dict(type='HiViT', **_hivit([0, 0, 3]))


@backbone('HiViT, MAE', 'mmpretrain', rotation=1, **_HIVIT_WORKS)
def mmpretrain_mae_hivit():
    return dict(type='MAEHiViT', **_hivit([0, 0, 3]))


@backbone('HiViT, iTPN', 'mmpretrain', rotation=1, **_HIVIT_WORKS)
def mmpretrain_itpn_hivit():
    return dict(type='iTPNHiViT', reconstruction_type='clip', **_hivit([0, 0, 3]))


_MIXMIM_WORKS = dict(size=(64, 64), folding=7, similarity=3, export=True, dynamic=_NOT_DYNAMIC)


def _pooled_classifier(config):
    head = dict(type='LinearClsHead', in_channels=32, num_classes=5)
    return dict(type='ImageClassifier', backbone=config, head=head)


@backbone('MixMIM', 'mmpretrain', inside=_pooled_classifier, rotation=1, **_MIXMIM_WORKS)
def mmpretrain_mixmim():
    arch = dict(embed_dims=16, depths=[2, 1], num_heads=[1, 2])
    return dict(type='MixMIMTransformer', arch=arch, img_size=64, window_size=[4, 8], drop_path_rate=0.1)


@backbone('MixMIM', 'mmpretrain', 'pre-training', rotation='no linear head', **_MIXMIM_WORKS)
def mmpretrain_mixmim_of_pretraining():
    return dict(mmpretrain_mixmim(), type='MixMIMPretrainTransformer', use_checkpoint=True)


_SAM_WORKS = dict(folding=4, rotation='which no LayerNorm reads', similarity=2, export=True, dynamic=_NOT_DYNAMIC)


@backbone('SAM', 'mmpretrain', size=(48, 72), floats=('einsum with a parameter',), **_SAM_WORKS)
def mmpretrain_sam():
    arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64, global_attn_indexes=[1])
    return dict(type='ViTSAM', arch=arch, img_size=48, patch_size=8, window_size=4, out_channels=16)


@backbone('SAM', 'mmpretrain', 'without positions', size=(32, 64), **_SAM_WORKS)
def mmpretrain_sam_without_positions():
    more = dict(out_channels=0, use_rel_pos=False, use_abs_pos=False, qkv_bias=False, out_type='avg_featmap')
    return dict(mmpretrain_sam(), **more)


# ---------------------------------------------------------------------- MiT, PVT, Twins
# Rows of this family stand below. The first block of each has a reduced map: two layers read its first LayerNorm.
_PYRAMID = dict(embed_dims=16, num_stages=2, num_layers=[1, 1], num_heads=[1, 2], strides=[4, 2], sr_ratios=[2, 1])
_TWINS = dict(
    embed_dims=[16, 32],
    depths=[2, 1],
    num_heads=[1, 2],
    patch_sizes=[4, 2],
    strides=[4, 2],
    mlp_ratios=[2, 2],
    sr_ratios=[2, 1],
)
_PYRAMID_WORKS = dict(
    size=(32, 48), folding=4, rotation='it begins behind the LayerNorm', similarity=2, export=True, dynamic=True
)
_TWINS_WORKS = dict(_PYRAMID_WORKS, size=(40, 48), folding=6, similarity=3)


@backbone('MiT (SegFormer)', 'mmseg', inside=segmentor(16, 32), **_PYRAMID_WORKS)
def mmseg_mit():
    return dict(type='MixVisionTransformer', patch_sizes=[7, 3], mlp_ratio=2, out_indices=(0, 1), **_PYRAMID)


@backbone('PVT', 'mmdet', inside=detector(16, 32), **_PYRAMID_WORKS)
def mmdet_pvt():
    return dict(
        type='PyramidVisionTransformer',
        pretrain_img_size=32,
        patch_sizes=[4, 2],
        paddings=[0, 0],
        mlp_ratios=[2, 2],
        out_indices=(0, 1),
        **_PYRAMID,
    )


# Four stages: the sizes of its patches are those of four.
@backbone('PVT v2', 'mmdet', **{**_PYRAMID_WORKS, 'folding': 8, 'similarity': 4})
def mmdet_pvt_v2():
    return dict(
        type='PyramidVisionTransformerV2',
        embed_dims=16,
        num_layers=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        sr_ratios=[2, 2, 1, 1],
        mlp_ratios=[2, 2, 2, 2],
    )


@backbone('Twins PCPVT', 'mmseg', inside=segmentor(16, 32), **_TWINS_WORKS)
def mmseg_twins_pcpvt():
    return dict(type='PCPVT', out_indices=(0, 1), qkv_bias=True, **_TWINS)


@backbone('Twins SVT', 'mmseg', inside=segmentor(16, 32), **{**_TWINS_WORKS, 'dynamic': _NOT_DYNAMIC})
def mmseg_twins_svt():
    return dict(type='SVT', out_indices=(0, 1), windiow_sizes=[7, 7], qkv_bias=True, **_TWINS)


# Without a reduced map queries have a layer of their own, and the norm before it two readers.
@backbone('Twins PCPVT', 'mmpretrain', inside=classifier(32), **{**_TWINS_WORKS, 'folding': 5})
def mmpretrain_twins_pcpvt():
    return dict(type='PCPVT', arch=_TWINS, out_indices=(1,), norm_after_stage=[False, True], qkv_bias=True)


@backbone('Twins SVT', 'mmpretrain', inside=classifier(32), **{**_TWINS_WORKS, 'dynamic': _NOT_DYNAMIC})
def mmpretrain_twins_svt():
    return dict(type='SVT', arch=dict(_TWINS, window_sizes=[7, 7]), out_indices=(1,), qkv_bias=True)


# ---------------------------------------------------------------------- ConvNeXt
# Rows of this family stand below.
_CONVNEXT = dict(type='ConvNeXt', arch=dict(depths=[1, 2], channels=[16, 32]), out_indices=[0, 1])
_TIMM_CONVNEXT = dict(type='TimmClassifier', depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=5)
_CONVNEXT_WORKS = dict(
    folding=4,
    rotation='depthwise convolutions read its channels one by one',
    similarity='patch similarity cannot be measured',
    export=True,
    dynamic=True,
)


@backbone('ConvNeXt', 'mmpretrain', **_CONVNEXT_WORKS)
def mmpretrain_convnext():
    return dict(_CONVNEXT, layer_scale_init_value=0.5, gap_before_final_norm=False)


@backbone('ConvNeXt', 'mmpretrain', 'linear_pw_conv=False', **_CONVNEXT_WORKS)
def mmpretrain_convnext_of_convolutions():
    return dict(_CONVNEXT, layer_scale_init_value=0.5, linear_pw_conv=False)


@backbone('ConvNeXt V2', 'mmpretrain', **_CONVNEXT_WORKS)
def mmpretrain_convnext_v2():
    return dict(_CONVNEXT, layer_scale_init_value=0.0, use_grn=True)


@backbone('ConvNeXt', 'timm', **{**_CONVNEXT_WORKS, 'folding': 7, 'dynamic': _NOT_DYNAMIC})
def timm_convnext():
    return dict(_TIMM_CONVNEXT, model_name='convnext_tiny', ls_init_value=2.0)


@backbone('ConvNeXt', 'timm', 'features_only=True', **{**_CONVNEXT_WORKS, 'folding': 7})
def timm_convnext_features():
    more = dict(features_only=True, out_indices=(1, 3), depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
    return dict(type='TIMMBackbone', model_name='convnext_tiny', ls_init_value=2.0, **more)


@backbone('ConvNeXt V2', 'timm', **{**_CONVNEXT_WORKS, 'folding': 7, 'dynamic': _NOT_DYNAMIC})
def timm_convnext_v2():
    return dict(_TIMM_CONVNEXT, model_name='convnextv2_tiny')


# ---------------------------------------------------------------------- Convolutions and attention side by side
# Rows of this family stand below.
_MOBILEVIT = [['mobilenetv2', 16, 2, 2, 2], ['mobilevit', 24, 2, 64, 64, 2, 2]]
_SHAPED = dict(export=True, dynamic=_NOT_DYNAMIC)


# Two layers of each transformer, and the norm that a convolution reads. 13 x 9 positions are resized to whole patches.
@backbone('MobileViT', 'mmpretrain', size=(104, 72), folding=5, rotation=1, similarity=2, **_SHAPED)
def mmpretrain_mobilevit():
    return dict(type='MobileViT', arch=_MOBILEVIT, out_indices=(1,))


def _conformer(**more):
    arch = dict(embed_dims=32, depths=3, num_heads=2, channel_ratio=1)
    return dict(type='Conformer', arch=arch, base_channels=16, mlp_ratio=2.0, drop_path_rate=0.1, **more)


@backbone('Conformer', 'mmpretrain', size=(64, 48), folding=6, rotation='adds activations', similarity=3, **_SHAPED)
def mmpretrain_conformer():
    return _conformer()


@backbone(
    'Conformer',
    'mmpretrain',
    'no class token, padded',
    size=(72, 48),
    folding=6,
    rotation='adds activations',
    similarity=3,
    **_SHAPED,
)
def mmpretrain_conformer_without_class_token():
    return _conformer(with_cls_token=False, out_indices=(2, 3), qkv_bias=False)


_MVIT = dict(embed_dims=16, num_layers=3, num_heads=1, downscale_indices=[1])
# Relative positions: sums over the channels of queries and embeddings.
_MVIT_WORKS = dict(size=(64, 48), rotation='pooled to its greatest values', similarity=3, **_SHAPED)


@backbone('MViT v2', 'mmpretrain', folding=5, floats=('einsum with a parameter',), **_MVIT_WORKS)
def mmpretrain_mvit():
    return dict(type='MViT', arch=_MVIT, img_size=64, out_scales=[0, 1], drop_path_rate=0.1)


@backbone('MViT v2', 'mmpretrain', 'widened behind attention', folding=5, **_MVIT_WORKS)
def mmpretrain_mvit_widened_behind_attention():
    more = dict(dim_mul_in_attention=False, rel_pos_spatial=False, use_abs_pos_embed=True, residual_pooling=False)
    return dict(type='MViT', arch=_MVIT, img_size=64, **more)


# Blocks with attention have a LayerScale of nearly nothing, whatever the config says: a stage without them comes last.
@backbone('EdgeNeXt', 'mmpretrain', **{**_CONVNEXT_WORKS, 'folding': 7, 'similarity': 1})
def mmpretrain_edgenext():
    arch = dict(channels=[16, 32, 32], depths=[1, 2, 1], num_heads=[1, 2, 2])
    blocks = dict(global_blocks=[0, 1, 0], global_block_type=['None', 'SDTA', 'None'], d2_scales=[2, 3, 3])
    more = dict(use_pos_embd_csa=[False, True, False], out_indices=(1, 2), gap_before_final_norm=False)
    return dict(type='EdgeNeXt', arch=arch, conv_kernel_sizes=[3, 5, 7], layer_scale_init_value=0.5, **blocks, **more)


_RIFORMER = dict(layers=[1, 2], embed_dims=[16, 32], mlp_ratios=[2, 2], layer_scale_init_value=0.5)
_NO_ATTENTION = dict(
    folding='is a GroupNorm and no LayerNorm',
    rotation='norms that are no LayerNorm',
    similarity='patch similarity cannot be measured',
    **_SHAPED,
)


@backbone('RIFormer', 'mmpretrain', **_NO_ATTENTION)
def mmpretrain_riformer():
    return dict(type='RIFormer', arch=_RIFORMER, out_indices=(0, 2), drop_path_rate=0.1)


@backbone('RIFormer', 'mmpretrain', 'deployed', **_NO_ATTENTION)
def mmpretrain_riformer_of_deployment():
    return dict(mmpretrain_riformer(), deploy=True)


# ---------------------------------------------------------------------- BEiT
_BEIT = dict(size=(32, 32), folding=4, similarity=2, export=True, dynamic=_NOT_DYNAMIC)


def _beit(kind='BEiTViT', **more):
    arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
    return dict(type=kind, arch=arch, img_size=32, patch_size=8, layer_scale_init_value=0.5, **more)


def _with_linear_head(config):
    head = dict(type='LinearClsHead', in_channels=32, num_classes=5)
    return dict(type='ImageClassifier', backbone=config, head=head)


@backbone('BEiT', 'mmpretrain', inside=_with_linear_head, rotation=1, **_BEIT)
def mmpretrain_beit():
    return _beit(out_type='avg_featmap', use_abs_pos_emb=False, use_rel_pos_bias=True, use_shared_rel_pos_bias=False)


@backbone('BEiT', 'mmpretrain', 'shared position bias, no LayerScale', rotation='its tokens are read', **_BEIT)
def mmpretrain_beit_of_pretraining():
    return dict(_beit('BEiTPretrainViT', use_shared_rel_pos_bias=True), layer_scale_init_value=0.0)


@backbone('BEiT', 'mmseg', rotation='its parts are not told', **_BEIT)
def mmseg_beit():
    return _mmseg_beit('BEiT')


@backbone('MAE', 'mmseg', rotation='its parts are not told', **_BEIT)
def mmseg_mae():
    return _mmseg_beit('MAE')


def _mmseg_beit(kind):
    return dict(
        type=kind,
        img_size=(32, 32),
        patch_size=8,
        embed_dims=32,
        num_layers=2,
        num_heads=2,
        mlp_ratio=2,
        out_indices=(0, 1),
        init_values=0.5,
    )


@backbone('BEiT', 'timm', rotation=1, **_BEIT)
def timm_beit():
    return dict(
        type='TimmClassifier',
        model_name='beit_base_patch16_224',
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=5,
        init_values=0.5,
    )


# ---------------------------------------------------------------------- EVA-02 and masked pre-training
_EVA = dict(size=(32, 32), export=True, dynamic=_NOT_DYNAMIC, similarity=2)


@backbone('EVA-02', 'mmpretrain', folding=6, rotation=1, inside=_with_linear_head, **_EVA)
def mmpretrain_eva02():
    arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=128)
    return dict(
        type='ViTEVA02', arch=arch, img_size=32, patch_size=8, sub_ln=True, out_type='avg_featmap', final_norm=False
    )


@backbone('EVA-02', 'timm', exact=False, folding=4, rotation=1, **_EVA)  # the bias is added behind the product
def timm_eva02():
    return dict(
        type='TimmClassifier',
        model_name='eva02_tiny_patch14_224',
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=5,
        mlp_ratio=32,
    )


@backbone(
    'ViT, MAE',
    'mmpretrain',
    size=(32, 32),
    folding=4,
    rotation='its tokens are read',
    similarity=2,
    export=True,
    dynamic=_NOT_DYNAMIC,
)
def mmpretrain_mae():
    arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
    return dict(type='MAEViT', arch=arch, img_size=32, patch_size=8)


@backbone(
    'ViT, DINOv2',
    'mmpretrain',
    size=(32, 32),
    inside=classifier(32, 'VisionTransformerClsHead'),
    folding=4,
    rotation=1,
    similarity=2,
    export=True,
    dynamic=_NOT_DYNAMIC,
)
def mmpretrain_dinov2():
    arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
    return dict(type='VisionTransformer', arch=arch, img_size=32, patch_size=8, layer_scale_init_value=0.5)


# ---------------------------------------------------------------------- Further relatives of ViT
_RELATIVE = dict(folding=4, similarity=2, export=True, dynamic=_NOT_DYNAMIC)


@backbone(
    'ViT, CLIP',
    'mmpretrain',
    'pre_norm, maps without a class token',
    rotation='read by more than',
    inside=classifier(32),
    **_RELATIVE,
)
def mmpretrain_clip():
    return dict(type='VisionTransformer', pre_norm=True, with_cls_token=False, out_type='featmap', **_VIT)


@backbone('ViT', 'mmpretrain', 'mean of the tokens', rotation=1, inside=_with_linear_head, **_RELATIVE)
def mmpretrain_vit_of_mean():
    return dict(type='VisionTransformer', out_type='avg_featmap', final_norm=False, **_VIT)


@backbone(
    'ViT, DINOv2 giant',
    'mmpretrain',
    'gated feed-forward network',
    rotation=1,
    inside=classifier(32, 'VisionTransformerClsHead'),
    **_RELATIVE,
)
def mmpretrain_dinov2_giant():
    gate = dict(layer_scale_init_value=0.5, layer_cfgs=dict(ffn_type='swiglu_fused'))
    return dict(type='VisionTransformer', **gate, **_VIT)


@backbone('ViT, DINOv2', 'timm', 'register tokens', rotation=1, **_RELATIVE)
def timm_dinov2_with_registers():
    more = dict(model_name='vit_small_patch14_reg4_dinov2', init_values=0.5)
    return dict(type='TimmClassifier', **more, **_TIMM_VIT)


@backbone('ViT, CLIP', 'timm', 'norm_pre', rotation='a LayerNorm before the first block', **_RELATIVE)
def timm_clip():
    return dict(type='TimmClassifier', model_name='vit_base_patch32_clip_224', **_TIMM_VIT)


# The two layers that make the tokens fold two norms each as well.
@backbone(
    'T2T-ViT',
    'mmpretrain',
    rotation=1,
    inside=classifier(32, 'VisionTransformerClsHead'),
    **dict(_RELATIVE, folding=8),
)
def mmpretrain_t2t_vit():
    return dict(
        type='T2T_ViT',
        img_size=32,
        embed_dims=32,
        num_layers=2,
        t2t_cfg=dict(token_dims=16),
        layer_cfgs=dict(num_heads=2, feedforward_channels=64),
    )


# Two blocks in each of two layers, and the projection of the first tokens. Similarity is that of patches, not pixels.
@backbone('TNT', 'mmpretrain', exact=False, rotation='it begins behind the LayerNorm', **dict(_RELATIVE, folding=9))
def mmpretrain_tnt():
    arch = dict(embed_dims_outer=32, embed_dims_inner=16, num_layers=2, num_heads_outer=2, num_heads_inner=1)
    return dict(type='TNT', arch=arch, img_size=32, patch_size=8, first_stride=4, ffn_ratio=2)


def _with_head_of_both_streams(config):
    head = dict(type='LinearClsHead', in_channels=64, num_classes=5)
    return dict(type='ImageClassifier', backbone=config, head=head)


@backbone('Reversible ViT', 'mmpretrain', rotation=1, inside=_with_head_of_both_streams, **_RELATIVE)
def mmpretrain_reversible_vit():
    return dict(type='RevVisionTransformer', **_VIT)


# ---------------------------------------------------------------------- Unusual attention
_DEPTHWISE = 'depthwise convolutions read'


# Each block of cross-covariance attention folds two norms; its third is read by a depthwise convolution.
@backbone(
    'XCiT', 'mmpretrain', size=(64, 48), folding=4, rotation=_DEPTHWISE, similarity=2, export=True, dynamic=_NOT_DYNAMIC
)
def mmpretrain_xcit():
    sizes = dict(patch_size=16, embed_dims=32, depth=2, cls_attn_layers=1, num_heads=2)
    return dict(type='XCiT', layer_scale_init_value=0.5, tokens_norm=True, drop_path_rate=0.1, **sizes)


@backbone(
    'XCiT',
    'mmpretrain',
    'patches of 8 pixels',
    folding=4,
    rotation=_DEPTHWISE,
    similarity=2,
    export=True,
    dynamic=_NOT_DYNAMIC,
)
def mmpretrain_xcit_of_small_patches():
    return dict(mmpretrain_xcit(), patch_size=8, tokens_norm=False, qkv_bias=False)


_POOLFORMER = dict(layers=[1, 2], embed_dims=[16, 32], layer_scale_init_value=0.5)


@backbone(
    'PoolFormer',
    'mmpretrain',
    folding='is a GroupNorm and no LayerNorm',
    rotation='a norm that is no LayerNorm',
    similarity='patch similarity cannot be measured',
    export=True,
    dynamic=_NOT_DYNAMIC,
)
def mmpretrain_poolformer():
    return dict(type='PoolFormer', arch=_POOLFORMER, out_indices=[0, 2], drop_path_rate=0.1)


@backbone(
    'TinyViT',
    'mmpretrain',
    size=(64, 64),
    folding=6,
    rotation=_DEPTHWISE,
    similarity=3,
    export=True,
    dynamic=_NOT_DYNAMIC,
)
def mmpretrain_tinyvit():
    arch = dict(channels=[16, 16, 32, 32], num_heads=[1, 1, 2, 2], depths=[1, 1, 1, 1])
    return dict(type='TinyViT', arch=arch, img_size=(64, 64), window_size=[3, 3, 4, 2], drop_path_rate=0.1)


_LEVIT_WORKS = dict(
    size=(64, 64),
    folding='whose readers are not told',
    rotation='batch normalizations stand behind the layers',
    similarity=3,
    export=True,
    dynamic=_NOT_DYNAMIC,
)


def _small_levit(**more):
    """The library takes no arch of its own: it asks a dict for other keys than it reads."""
    from mmpretrain.models import LeViT

    arch = dict(embed_dims=[16, 32], num_heads=[1, 2], depths=[1, 1], key_dims=[16, 16])
    return dict(type=type('SmallLeViT', (LeViT,), dict(arch_zoo=dict(small=arch))), arch='small', img_size=64, **more)


@backbone('LeViT', 'mmpretrain', **_LEVIT_WORKS)
def mmpretrain_levit():
    return _small_levit(drop_path_rate=0.1)


@backbone('LeViT', 'mmpretrain', 'deploy=True', **_LEVIT_WORKS)
def mmpretrain_levit_deployed():
    return _small_levit(deploy=True, out_indices=(0, 1))


# Its LayerScale would be nearly nothing, whatever the config says.
@backbone(
    'EfficientFormer',
    'mmpretrain',
    size=(28, 28),
    folding=2,
    rotation='a pooling',
    similarity=1,
    export=True,
    dynamic=_NOT_DYNAMIC,
)
def mmpretrain_efficientformer():
    arch = dict(layers=[1, 1, 1, 2], embed_dims=[16, 16, 16, 16], downsamples=[False] * 4, vit_num=1)
    return dict(type='EfficientFormer', arch=arch, out_indices=[0, 3], drop_path_rate=0.1, use_layer_scale=False)
