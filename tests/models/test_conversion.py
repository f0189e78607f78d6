"""Converted checkpoints by what they compute: the same weights and the same input give the same features under another
library."""

import pytest
import torch
from original_swin import OriginalSwin
from torch import nn

from psaq_mm.errors import CheckpointError, UnsupportedModelError
from psaq_mm.models.conversion import fit_weights, rename_swin, unfold_order

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')
SIZES = dict(depths=(2, 2, 2), heads=(1, 2, 4))


def original(seed=0, **settings):
    """A Swin of the original release in double precision, every weight of its own."""
    torch.manual_seed(seed)
    model = OriginalSwin(**{**SIZES, **settings})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.double().eval()


class Backbone(nn.Module):
    """What a detector is to the conversion: something with a backbone and a head."""

    def __init__(self, backbone, **heads):
        super().__init__()
        self.backbone = backbone
        for name, head in heads.items():
            self.add_module(name, head)


def target(library, window=7, out_indices=(0, 1, 2), heads=(), **more):
    """A full-precision model around the library's Swin, in double precision."""
    pytest.importorskip(library)
    from mmengine.registry import MODELS, DefaultScope

    if library == 'mmpretrain':
        config = dict(arch=dict(embed_dims=16, depths=[2, 2, 2], num_heads=[1, 2, 4]), pad_small_map=True)
    else:
        config = dict(embed_dims=16, depths=[2, 2, 2], num_heads=[1, 2, 4], strides=(4, 2, 2))
    with DefaultScope.overwrite_default_scope(library):
        swin = MODELS.build(dict(type='SwinTransformer', window_size=window, out_indices=out_indices, **config, **more))
    model = Backbone(swin, **dict(heads)).double()
    model.eval()
    return model


def same_features(found, expected, **tolerance):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, **(tolerance or dict(rtol=1e-9, atol=1e-9)))


def convert(weights, model, **settings):
    """Convert, check, and load with nothing left over on either side."""
    conversion = fit_weights(rename_swin(weights), model, **settings).check()
    if not settings.get('backbone_only'):
        model.load_state_dict(conversion.state_dict, strict=True)
    else:
        assert not model.load_state_dict(conversion.state_dict, strict=False).unexpected_keys
    return conversion


@pytest.mark.parametrize('prefix', ['backbone.', '', 'module.backbone.'])
@pytest.mark.parametrize('library', LIBRARIES)
def test_the_original_release_gives_the_same_features(library, prefix):
    """Sizes that pad windows, shift them, and have odd rows to merge."""
    source, model = original(), target(library)
    conversion = convert({prefix + name: value for name, value in source.state_dict().items()}, model)
    assert not conversion.left_out and not conversion.untrained
    for size in ((64, 96), (68, 84), (128, 56)):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            same_features(model.backbone(images), source(images))


@pytest.mark.parametrize('library', LIBRARIES)
def test_another_window_and_absolute_positions(library):
    """The detectors' position embedding is (1, C, H, W); OpenMMLab's are tokens."""
    more = (
        dict(img_size=64, use_abs_pos_embed=True)
        if library == 'mmpretrain'
        else dict(pretrain_img_size=64, use_abs_pos_embed=True)
    )
    source, model = original(window=4, positions=16), target(library, window=4, **more)
    convert(source.state_dict(), model)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        same_features(model.backbone(images), source(images))


def test_the_order_of_patch_merging_matters():
    """Without it the features differ: the test above would see it."""
    source, model = original(), target('mmdet')
    conversion = fit_weights(rename_swin(source.state_dict()), model).check()
    wrong = dict(conversion.state_dict)
    key = 'backbone.stages.0.downsample.reduction.weight'
    assert torch.equal(wrong[key], unfold_order(source.state_dict()['layers.0.downsample.reduction.weight']))
    wrong[key] = source.state_dict()['layers.0.downsample.reduction.weight']
    model.load_state_dict(wrong)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert float((model.backbone(images)[1] - source(images)[1]).abs().max()) > 0.1


def timm_swin(**more):
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    net = timm.create_model(
        'swin_tiny_patch4_window7_224',
        img_size=128,
        window_size=4,
        embed_dim=16,
        depths=(2, 2, 2),
        num_heads=(1, 2, 4),
        num_classes=5,
        **more,
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return net.double().eval()


class _Head(nn.Module):
    """mmpretrain's linear head, as far as its names go."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 5)


def test_timm_to_mmpretrain_with_its_head():
    source = timm_swin()
    model = target('mmpretrain', window=4, out_indices=(2,), heads=dict(head=_Head()))
    convert(source.state_dict(), model)
    images = torch.randn(2, 3, 128, 128, dtype=torch.float64)
    with torch.no_grad():
        features = model.backbone(images)[-1]
        same_features([features], [source.forward_features(images).permute(0, 3, 1, 2)])
        same_features([model.head.fc(features.mean((2, 3)))], [source(images)])


@pytest.mark.parametrize('library', ['mmdet', 'mmseg'])
def test_timm_to_the_backbone_of_a_detector(library):
    """A classifier has one output norm; the stages before the last start from 1 and 0, and are named."""
    source, model = timm_swin(), target(library, window=4, heads=dict(neck=nn.Linear(2, 2)))
    conversion = convert(
        {f'model.{name}': value for name, value in source.state_dict().items()}, model, backbone_only=True
    )
    assert conversion.untrained == [f'backbone.norm{i}.{kind}' for i in (0, 1) for kind in ('weight', 'bias')]
    assert conversion.left_out == ['model.head.fc.weight', 'model.head.fc.bias'] and not any(
        'neck' in key for key in conversion.state_dict
    )
    images = torch.randn(2, 3, 128, 128, dtype=torch.float64)
    with torch.no_grad():
        same_features([model.backbone(images)[-1]], [source.forward_features(images).permute(0, 3, 1, 2)])


def test_timm_before_0_9_and_the_classification_release():
    """Downsampling one stage earlier, ``head.weight``, and attention masks among the weights."""
    source = timm_swin()
    old = {}
    for name, value in source.state_dict().items():
        for stage in (1, 2):
            name = name.replace(f'layers.{stage}.downsample', f'layers.{stage - 1}.downsample')
        old[name.replace('head.fc.', 'head.')] = value
    old['layers.0.blocks.1.attn_mask'] = torch.zeros(64, 16, 16)
    old['layers.0.blocks.1.attn.relative_position_index'] = torch.zeros(16, 16, dtype=torch.long)
    renamed = rename_swin(old)
    assert renamed.naming == 'original'
    assert renamed.derived == ['layers.0.blocks.1.attn_mask', 'layers.0.blocks.1.attn.relative_position_index']
    model = target('mmpretrain', window=4, out_indices=(2,), heads=dict(head=_Head()))
    convert(old, model)
    images = torch.randn(1, 3, 128, 128, dtype=torch.float64)
    with torch.no_grad():
        same_features([model.backbone(images)[-1]], [source.forward_features(images).permute(0, 3, 1, 2)])


def test_mmpretrain_to_mmdet_and_back():
    source = target('mmpretrain', heads=dict(head=_Head()))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model = target('mmdet')
    conversion = convert(source.state_dict(), model, drop=['head.*'])
    assert conversion.left_out == ['head.fc.weight', 'head.fc.bias']
    images = torch.randn(1, 3, 68, 84, dtype=torch.float64)
    with torch.no_grad():
        same_features(model.backbone(images), source.backbone(images))
    again = target('mmpretrain')
    convert(model.state_dict(), again)
    with torch.no_grad():
        same_features(again.backbone(images), source.backbone(images))


def test_feature_extractors_of_timm_have_another_spelling():
    source, model = timm_swin(features_only=True), target('mmdet', window=4)
    conversion = convert(source.state_dict(), model, backbone_only=True)
    assert len(conversion.untrained) == 6
    images = torch.randn(1, 3, 128, 128, dtype=torch.float64)
    with torch.no_grad():
        expected = [nn.functional.layer_norm(stage, stage.shape[-1:]).permute(0, 3, 1, 2) for stage in source(images)]
        same_features(model.backbone(images), expected)


def test_half_precision_weights_become_the_models():
    source = {
        name: value.half() if value.is_floating_point() else value for name, value in original().state_dict().items()
    }
    conversion = fit_weights(rename_swin(source), target('mmdet')).check()
    assert conversion.state_dict['backbone.norm0.weight'].dtype == torch.float64


# ---------------------------------------------------------------------- what does not fit
def test_blocks_that_a_smaller_model_lacks_are_named_though_every_shape_fits():
    weights = original(depths=(2, 4, 2)).state_dict()
    conversion = fit_weights(rename_swin(weights), target('mmdet'))
    assert not conversion.wrong and not conversion.missing
    assert conversion.unplaced[0] == 'layers.1.blocks.2.norm1.weight (32,)'
    with pytest.raises(CheckpointError, match=r'26 weights found no place .*layers\.1\.blocks\.2\.norm1\.weight'):
        conversion.check()


def test_every_wrong_shape_is_found():
    conversion = fit_weights(rename_swin(original(window=4).state_dict()), target('mmdet'))
    assert len(conversion.wrong) == 6
    with pytest.raises(
        CheckpointError,
        match=r'relative_position_bias_table is \(49, 1\) in the checkpoint and \(169, 1\) in the model',
    ):
        conversion.check()


def test_weights_that_are_not_there():
    weights = original().state_dict()
    del weights['layers.1.blocks.0.mlp.fc1.bias']
    with pytest.raises(CheckpointError, match='lacks 1 weights .*stages.1.blocks.0.ffn.layers.0.0.bias'):
        fit_weights(rename_swin(weights), target('mmdet')).check()
    with pytest.raises(CheckpointError, match='lacks 2 weights .*neck.weight'):
        fit_weights(rename_swin(original().state_dict()), target('mmdet', heads=dict(neck=nn.Linear(2, 2)))).check()


def test_what_is_left_out_by_name_is_missed_where_the_model_has_it():
    weights = original().state_dict()
    with pytest.raises(CheckpointError, match='lacks 2 weights .*norm1'):
        fit_weights(rename_swin(weights), target('mmdet'), drop=['norm1.*']).check()
    with pytest.raises(CheckpointError, match="'norm9.*' matches no weight"):
        fit_weights(rename_swin(weights), target('mmdet'), drop=['norm9.*'])


@pytest.mark.parametrize(
    'weights, message',
    [
        ({'conv1.weight': torch.zeros(2)}, 'holds no Swin Transformer .*conv1.weight'),
        ({'layers.0.blocks.0.attn.logit_scale': torch.zeros(2)}, 'Swin Transformer V2 .*logit_scale'),
        (
            {
                'teacher.layers.0.blocks.0.norm1.weight': torch.zeros(2),
                'student.layers.0.blocks.0.norm1.weight': torch.zeros(2),
            },
            "several backbones .*'student.', 'teacher.'",
        ),
        (
            {
                'layers.0.blocks.0.norm1.weight': torch.zeros(2),
                'layers.1.blocks.0.norm1.weight': torch.zeros(2),
                'norm.weight': torch.zeros(2),
                'norm1.weight': torch.zeros(2),
            },
            'norm.weight and norm1.weight are both backbone.norm1.weight',
        ),
        (
            {'layers.0.blocks.0.norm1.weight': torch.zeros(2), 'layers.0.downsample.norm.weight': torch.zeros(6)},
            r'shape \(6,\)',
        ),
    ],
)
def test_checkpoints_that_are_not_converted(weights, message):
    with pytest.raises(CheckpointError, match=message):
        rename_swin(weights)


def test_a_model_without_a_swin_of_openmmlab():
    with pytest.raises(UnsupportedModelError, match='has no SwinTransformer'):
        fit_weights(rename_swin(original().state_dict()), Backbone(nn.Conv2d(3, 3, 1)))
    with pytest.raises(UnsupportedModelError, match='has no SwinTransformer'):
        fit_weights(rename_swin(original().state_dict()), Backbone(timm_swin()))
