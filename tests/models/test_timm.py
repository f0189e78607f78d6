"""timm's networks inside mmpretrain's TimmClassifier and TIMMBackbone: scope, padding, and what is refused."""

import pytest
import torch
from torch import nn
from vit_models import CONFIGS, build, images_of, run

from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models import quantize_model_
from psaq_mm.models.adapters.windows import valid_query_rows
from psaq_mm.models.scope import find_backbone, first_layer_name
from psaq_mm.quantization import calibrate, quantizers, set_mode

pytest.importorskip('timm')
pytest.importorskip('mmpretrain')


def from_config(library, config):
    from mmengine.registry import MODELS, DefaultScope

    with DefaultScope.overwrite_default_scope(library):
        model = MODELS.build(config)
    model.eval()
    return model


def converted_names(model, spec):
    return {row.name for row in quantize_model_(model, spec).layers}


# ---------------------------------------------------------------------- scope
@pytest.mark.parametrize(
    'name, heads',
    [('timm-vit', {'model.head'}), ('timm-deit', {'model.head', 'model.head_dist'}), ('timm-swin', {'model.head.fc'})],
)
def test_the_head_of_a_classifier_belongs_to_the_full_scope_alone(name, heads):
    found = {scope: converted_names(build(name), dict(preset='w8a8', scope=scope)) for scope in ('backbone', 'full')}
    assert found['full'] - found['backbone'] == heads
    assert found['backbone'] < found['full']


def test_the_backbone_of_a_timm_classifier_is_its_network():
    model = build('timm-swin')
    assert find_backbone(model) is model.model
    assert first_layer_name(model) == 'model.patch_embed.proj'


@pytest.mark.parametrize('name', ['timm-vit', 'timm-swin'])
def test_the_image_keeps_its_own_bits(name):
    model = build(name)
    quantize_model_(model, 'w4a4')
    bits = {n: q.bits for n, q in quantizers(model)}
    assert bits['model.patch_embed.proj.input_quantizer'] == 8
    assert {b for n, b in bits.items() if not n.startswith('model.patch_embed')} == {4}


def test_the_builder_takes_a_timm_classifier_and_predicts():
    library, config = CONFIGS['timm-deit']
    model = from_config(
        library,
        {
            **config,
            'type': 'psaq_mm.Quantized',
            'base_type': config['type'],
            'quant': dict(preset='w8a8', scope='full'),
        },
    )
    calibrate(model, lambda: model(images_of('timm-deit')))
    with torch.no_grad():
        samples = model(images_of('timm-deit', batch=3), mode='predict')
    assert [tuple(s.pred_score.shape) for s in samples] == [(5,)] * 3


def test_a_bare_network_of_timm():
    import timm

    model = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    model.eval()
    names = converted_names(model, 'w8a8')
    assert {'patch_embed.proj', 'blocks.0.attn.matmul_qk', 'blocks.0.mlp.fc2'} <= names and 'head' not in names


# ---------------------------------------------------------------------- inside detectors and segmentors
def test_a_timm_backbone_inside_a_detector():
    pytest.importorskip('mmdet')
    from mmengine.config import Config

    config = Config.fromstring("_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py']\n", '.py').model
    config.backbone = CONFIGS['timm-backbone-vit'][1]
    config.neck.update(in_channels=[32, 32], out_channels=16, start_level=0, num_outs=2)
    config.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1, num_classes=3)
    config.bbox_head.anchor_generator.strides = [8, 16]
    model = from_config('mmdet', dict(config, type='psaq_mm.Quantized', base_type=config.type, quant='psaq_v1_w8a8'))
    names = {row.name for row in model.quant_report.layers}
    assert 'backbone.timm_model.model.pos_drop.output' in names
    assert all(n.startswith('backbone.timm_model.') for n in names)
    assert first_layer_name(model) == 'backbone.timm_model.model.patch_embed.proj'
    images = images_of('timm-backbone-vit')
    calibrate(model, lambda: model(images, mode='tensor'))
    assert all(t.isfinite().all() for t in run(model, images))


def test_a_timm_backbone_inside_a_segmentor():
    pytest.importorskip('mmseg')
    head = dict(
        type='FCNHead', in_channels=32, channels=8, num_convs=1, num_classes=3, in_index=1, norm_cfg=dict(type='BN')
    )
    model = from_config(
        'mmseg',
        dict(
            type='psaq_mm.Quantized',
            base_type='EncoderDecoder',
            backbone=CONFIGS['timm-backbone-vit'][1],
            decode_head=head,
            quant=dict(preset='w8a8', scope='full'),
        ),
    )
    names = {row.name for row in model.quant_report.layers}
    assert {'backbone.timm_model.model.blocks.1.attn.matmul_av', 'decode_head.conv_seg'} <= names
    images = images_of('timm-backbone-vit')
    calibrate(model, lambda: model(images))
    assert run(model, images)[0].shape == (2, 3, 4, 4)


# ---------------------------------------------------------------------- refused by name
def timm_classifier(name, **more):
    return from_config('mmpretrain', dict(type='TimmClassifier', model_name=name, num_classes=3, **more))


def timm_backbone(name, **more):
    return from_config('mmpretrain', dict(type='TIMMBackbone', model_name=name, **more))


SMALL_VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
REFUSED = [
    (timm_classifier, 'resnet10t', dict(), 'timm.models.resnet.ResNet'),
    (timm_backbone, 'resnet10t', dict(features_only=True), 'resnet10t'),
    (timm_classifier, 'vit_tiny_patch16_224', dict(SMALL_VIT, global_pool='map'), 'attn_pool .*AttentionPoolLatent'),
]


@pytest.mark.parametrize('make, name, options, message', REFUSED)
def test_what_is_no_vit_deit_or_swin_is_refused_by_name(make, name, options, message):
    model = make(name, **options)
    with pytest.raises(UnsupportedModelError, match=message):
        quantize_model_(model, 'w8a8')
    assert not list(quantizers(model))


def test_a_parallel_block_is_refused_by_name():
    from timm.models.vision_transformer import ParallelScalingBlock

    model = timm_classifier('vit_tiny_patch16_224', **SMALL_VIT, block_fn=ParallelScalingBlock)
    with pytest.raises(UnsupportedModelError, match='blocks.0 .*ParallelScalingBlock'):
        quantize_model_(model, 'w8a8')


def test_attention_of_another_kind_in_a_known_block_is_refused_by_name():
    from timm.models.vision_transformer import Attention

    class Rotated(Attention):
        def forward(self, x):
            return super().forward(x.flip(1))

    model = timm_classifier('vit_tiny_patch16_224', **SMALL_VIT)
    model.model.blocks[0].attn.__class__ = Rotated
    with pytest.raises(UnsupportedModelError, match='blocks.0.attn .*Rotated'):
        quantize_model_(model, 'w8a8')


# ---------------------------------------------------------------------- window padding
@pytest.mark.parametrize(
    'height, width, window, shift', [(15, 22, (7, 7), 0), (15, 22, (7, 7), 3), (9, 7, (7, 7), 3), (8, 5, (4, 3), 1)]
)
def test_valid_rows_are_what_the_library_keeps(height, width, window, shift):
    """A map of ones through the library's own shifting, padding and cutting."""
    from timm.models.swin_transformer import SwinTransformerBlock

    block = SwinTransformerBlock(4, (height, width), num_heads=1, window_size=window, shift_size=shift)
    seen = []
    block.attn.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    block._attn(torch.ones(1, height, width, 4))
    expected = seen[0][..., 0] > 0
    torch.testing.assert_close(valid_query_rows(height, width, block.window_size), expected)
    assert not expected.all()


def test_no_mask_where_nothing_is_padded():
    assert valid_query_rows(14, 21, (7, 7)) is None


def test_padded_queries_take_no_part_in_calibration():
    """Padded tokens are zero after the LayerNorm: their query is the bias alone, here far below that of any real
    token."""
    model = build('timm-swin')
    block = model.model.layers[0].blocks[0]
    with torch.no_grad():
        block.norm1.bias.fill_(100.0)
        block.attn.qkv.weight[:16] = 1.0
        block.attn.qkv.bias[:16] = -1000.0
    quantize_model_(model, 'w8a8')
    quantizer, seen = block.attn.matmul_qk.lhs_quantizer, {}
    quantizer.register_forward_pre_hook(lambda m, args: seen.update(x=args[0], valid=args[1]))
    calibrate(model, lambda: model(images_of('timm-swin')))
    valid = seen['valid'].expand(seen['x'].shape[:-1])
    assert seen['x'][~valid].max() < -200 and seen['x'][valid].min() > 0
    assert int(quantizer.zero_point) == quantizer.qmin  # nothing below 0 was observed


def test_padding_becomes_the_image_of_zero_after_reparameterization():
    """Without it the outputs differ far beyond rounding: the test of equality above could not pass by chance."""
    model, images = build('timm-swin'), images_of('timm-swin')
    expected = run(model, images)[0]
    quantize_model_(model, 'repq_w4a8')
    calibrate(model, lambda: model(images))
    set_mode(model, 'off')
    torch.testing.assert_close(run(model, images)[0], expected, rtol=1e-4, atol=1e-4)
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(getattr(module, 'input_quantizer', None), 'fill'):
            module.input_quantizer.fill.zero_()
    assert (run(model, images)[0] - expected).abs().max() > 1e-2
