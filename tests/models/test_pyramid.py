"""MiT, PVT, Twins: the layers of attention to reduced maps, what is folded into them, which sums are edges, and windows
that the library pads without masking them. tests/models/test_every_backbone.py has what all backbones share."""

import pytest
import torch
from backbone_builders import build, images_of, row_named, run

from psaq_mm.engine.forks import find_configs_of_forks
from psaq_mm.models import TaskModel, quantize_model_
from psaq_mm.psaq_vit import AttentionTaps
from psaq_mm.quantization import calibrate, is_quantizer_key, norm_before, quantizers, set_mode

pytestmark = pytest.mark.filterwarnings('ignore')


def quantized(name, spec):
    model, images = build(row_named(name)), images_of(row_named(name))
    quantize_model_(model, spec)
    calibrate(model, lambda: run(model, images))
    return model, images


@pytest.mark.parametrize('name, block', [('mmseg_mit', 0), ('mmdet_pvt', 1)])
def test_a_reduced_map_has_a_projection_and_a_norm_of_its_own(name, block):
    model, _ = quantized(name, 'w4a8')
    reduced, whole = model.layers[0][1][block], model.layers[1][1][block]
    keys = {key for key in model.state_dict() if not is_quantizer_key(key)}
    assert keys == set(build(row_named(name)).state_dict())
    assert reduced.attn.attn.inputs == ('q', 'kv') and whole.attn.attn.inputs == ('qkv',)
    layers = reduced.attn.attn.q, reduced.attn.attn.kv, reduced.attn.sr, *reduced.ffn.layers[:2]
    assert all(layer.weight_quantizer.bits == 4 for layer in layers if hasattr(layer, 'weight'))
    # Two layers read norm1; the others have one reader each, the feed-forward network a 1 x 1 convolution.
    assert norm_before(reduced.attn.attn.q) is None and norm_before(reduced.attn.sr) is None
    assert norm_before(reduced.attn.attn.kv) is reduced.attn.norm
    assert norm_before(reduced.ffn.layers[0]) is reduced.norm2
    assert norm_before(whole.attn.attn.qkv) is whole.norm1


EDGES = {
    'mmseg_mit': {'layers.0.0.norm.output', 'layers.0.1.0.residual1', 'layers.1.1.0.residual2'},
    'mmdet_pvt': {'layers.0.0.norm.output', 'layers.0.1.0.drop.output', 'layers.0.1.1.residual1'},
    'mmseg_twins_svt': {'position_encoding_drops.0.output', 'position_encodings.1.output', 'layers.0.0.residual1'},
    'mmpretrain_twins_pcpvt': {'position_encoding_drops.1.output', 'stages.0.0.residual2'},
}


@pytest.mark.parametrize('name', EDGES)
def test_sums_and_embeddings_are_edges_and_what_an_activation_reads_is_none(name):
    model, images = quantized(name, 'psaq_v1_w8a8')
    before = run(model, images)[-1]
    for edge in EDGES[name]:
        assert set_mode(model, 'off', f'{edge}_quantizer')
        assert not torch.equal(run(model, images)[-1], before), edge  # none is without effect
        set_mode(model, 'on', f'{edge}_quantizer')
    hidden = {'mmseg_mit': 'layers.0.1.0.ffn.layers.1', 'mmdet_pvt': 'layers.0.1.1.ffn.layers.0'}.get(name)
    assert f'{hidden}.output_quantizer' not in dict(quantizers(model))
    assert name != 'mmseg_mit' or 'layers.0.1.0.ffn.layers.0.output_quantizer' in dict(quantizers(model))


def test_checkpointed_blocks_give_the_same_tapped_gradients():
    grads = []
    for with_cp in (False, True):
        model = build(row_named('mmseg_mit', with_cp=with_cp))
        quantize_model_(model, 'w8a8')
        set_mode(model, 'off')
        images = images_of(row_named('mmseg_mit')).requires_grad_()
        with AttentionTaps(model).record(images) as record:
            model(images)
        sum((tap.tokens**2).mean() for tap in record).backward()
        grads.append(images.grad)
    assert len(record) == 2 and grads[0].abs().max() > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize('name', ['mmseg_mit', 'mmdet_pvt_v2', 'mmseg_twins_svt', 'mmpretrain_twins_svt'])
def test_the_least_picture_has_a_position_on_every_reduced_map(name):
    model = build(row_named(name))
    side = TaskModel(model, ('backbone',)).min_size
    assert all(out.isfinite().all() for out in run(model, torch.randn(1, 3, side, side)))


@pytest.mark.parametrize('size', [(56, 56), (40, 56), (40, 48)])
@pytest.mark.parametrize('name', ['mmseg_twins_svt', 'mmpretrain_twins_svt'])
def test_windows_are_masked_as_the_library_masks_them(name, size):
    """Not at all where one side alone is padded: its slice from -0 on takes in every token."""
    images = torch.randn(2, 3, *size)
    model, plain = build(row_named(name)), build(row_named(name))
    quantize_model_(model, 'w8a8')
    set_mode(model, 'off')
    local = 'layers.0.0.attn' if name == 'mmseg_twins_svt' else 'stages.0.0.attn'
    expected, out = {}, {}
    for part, outputs in ((plain, expected), (model, out)):
        attention = part.get_submodule(local)
        handle = attention.register_forward_hook(
            lambda module, args, result, outputs=outputs: outputs.update(local=result)
        )
        outputs['last'] = run(part, images)[-1]
        handle.remove()
    assert torch.equal(out['local'], expected['local'])
    torch.testing.assert_close(out['last'], expected['last'], rtol=1e-5, atol=1e-5)  # fused attention in mmpretrain


def test_padded_rows_of_windows_take_no_part():
    (model, images), (height, width) = quantized('mmseg_twins_svt', 'w8a8'), row_named('mmseg_twins_svt').size
    images = images[:1]
    with AttentionTaps(model).record(images) as record:
        run(model, images)
    local, reduced = record[:2]
    assert local.groups_per_image == 4 and local.valid.sum() == height // 4 * (width // 4)
    assert reduced.valid is None and reduced.tokens.shape[:2] == (1, height // 4 * (width // 4))
    block = model.layers[0][0]
    with torch.no_grad():  # a token's query is near 0, that of padding, which is 0 behind the norm, the bias alone
        block.norm1.weight.fill_(0.01)
        block.norm1.bias.fill_(1.0)
        block.attn.qkv.weight[:16] = -1000.0 / 16
        block.attn.qkv.bias[:16] = 1000.0
    calibrate(model, lambda: run(model, images))
    quantizer = block.attn.matmul_qk.lhs_quantizer
    assert 255 * quantizer.scale < 100


SEGFORMER = """
_base_ = ['mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py']
model = dict(
    data_preprocessor=dict(size=(64, 96)),
    backbone=dict(embed_dims=16, num_layers=[1, 1, 1, 1], num_heads=[1, 2, 4, 4], init_cfg=None),
    decode_head=dict(in_channels=[16, 32, 64, 64], channels=16, num_classes=5, norm_cfg=dict(type='BN')))
"""


def test_a_zoo_segformer_is_quantized_with_its_head():
    pytest.importorskip('mmseg')
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    find_configs_of_forks()
    config = Config.fromstring(SEGFORMER, '.py').model
    init_default_scope('mmseg')
    model = MODELS.build(
        dict(config, type='psaq_mm.Quantized', base_type=config.type, quant=dict(preset='w8a8', scope='full'))
    )
    model.eval()
    view = TaskModel(model, ('head',))
    images = torch.randn(2, 3, 64, 96)
    set_mode(model, 'off')
    expected = view.outputs(images)[0].clone()
    set_mode(model, 'on')
    calibrate(model, lambda: view.calibration_forward(images, 'full'))
    assert any(name.startswith('decode_head.fusion_conv') for name, _ in quantizers(model))
    assert (view.outputs(images)[0] - expected).square().mean() < 0.01 * expected.var()
