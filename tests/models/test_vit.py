"""What holds for every ViT, DeiT and timm Swin: nothing changes with quantizers off, and every quantizer is reached."""

import copy

import pytest
import torch
from torch import nn
from vit_models import MODELS, PADDED, build, images_of, run, unfuse

from psaq_mm.models import quantize_model_
from psaq_mm.psaq_vit import AttentionTaps
from psaq_mm.quantization import ReparameterizedQuantizer, calibrate, is_quantizer_key, quantizers, set_mode

RECIPES = ('w8a8', 'psaq_v1_w8a8', 'repq_w4a8')
TOKENS = {'mmpretrain-deit': 18, 'timm-deit': 18, 'mmpretrain-vit-options': 16, 'mmseg-vit-options': 16}
"""Tokens of one group, where they are not 16 patches and a class token."""

ONE_OF_EACH = ('mmpretrain-vit', 'mmseg-vit', 'timm-vit', 'timm-swin')
"""One model for each class of attention."""


def quantized(name, spec, calibrated=True):
    model = build(name)
    report = quantize_model_(model, spec)
    if calibrated:
        calibrate(model, lambda: model(images_of(name)))
    return model, report


def folded_layers(model):
    return [m for m in model.modules() if isinstance(getattr(m, 'input_quantizer', None), ReparameterizedQuantizer)]


@pytest.mark.parametrize('name', MODELS)
def test_off_equals_the_librarys_explicit_attention_to_the_last_bit_and_its_fused_one_to_rounding(name):
    plain, images = build(name), images_of(name)
    model, _ = quantized(name, 'psaq_v1_w4a4', calibrated=False)
    set_mode(model, 'off')
    found = run(model, images)
    for expected, out in zip(run(plain, images), found, strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    # nn.MultiheadAttention runs tokens first: the same products in another order of rows, which the bits may depend on.
    exact = dict(rtol=1e-6, atol=1e-6) if name.startswith('mmseg') else dict(rtol=0, atol=0)
    for expected, out in zip(run(unfuse(plain), images), found, strict=True):
        torch.testing.assert_close(out, expected, **exact)


@pytest.mark.parametrize('name', MODELS)
def test_a_full_precision_checkpoint_loads_and_only_quantizer_state_is_new(name):
    plain = build(name)
    model = build(name, seed=1)
    quantize_model_(model, 'repq_w4a8')
    new = set(model.state_dict()) - set(plain.state_dict())
    assert new and all(is_quantizer_key(k) for k in new)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys and all(is_quantizer_key(k) for k in result.missing_keys)
    set_mode(model, 'off')
    for expected, out in zip(run(plain, images_of(name)), run(model, images_of(name)), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('spec', RECIPES)
@pytest.mark.parametrize('name', MODELS)
def test_calibrated_on_noise_it_is_near_its_full_precision(name, spec):
    model, report = quantized(name, spec)
    assert all(bool(q.calibrated) for _, q in quantizers(model))
    reasons = {row.reason for row in report.floats if not row.name.endswith('matmul_av')}
    assert reasons <= {'outside the scope'}
    for expected, out in zip(run(build(name), images_of(name)), run(model, images_of(name)), strict=True):
        assert 0 < (out - expected).abs().mean() < 0.3 * expected.abs().mean()


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_linear_points_leave_the_products_and_edges_in_floating_point(name):
    model, _ = quantized(name, dict(preset='w8a8', points='linear'))
    assert {n.rpartition('.')[2] for n, _ in quantizers(model)} == {'input_quantizer', 'weight_quantizer'}
    assert run(model, images_of(name))[0].isfinite().all()


@pytest.mark.parametrize('name', MODELS)
def test_every_edge_of_a_block_is_quantized_under_points_all(name):
    _, report = quantized(name, 'psaq_v1_w8a8', calibrated=False)
    rows = {row.name for row in report.layers}
    attention = [n.rpartition('.')[0] for n in rows if n.endswith('attn.qkv')]
    assert attention
    for attn in attention:
        block = attn.partition('.attn')[0]
        output = 'out_proj' if 'mmseg' in name else 'proj'
        assert {f'{attn}.qkv.output', f'{attn}.matmul_qk', f'{attn}.{output}.output'} <= rows
        assert {f'{block}.residual1', f'{block}.residual2'} <= rows
        if 'swin' in name:
            assert f'{attn}.scores' in rows
    hidden = [n for n in rows if n.endswith(('mlp.fc1', 'ffn.layers.0.0'))]
    assert len(hidden) == (0 if 'gated' in name else len(attention))
    # the activation after it is an edge: the next layer's input
    assert not [n for n in hidden if f'{n}.output' in rows]
    embedding = {'mmpretrain': 'drop_after_pos', 'mmseg': 'drop_after_pos', 'timm': 'pos_drop'}[name.split('-')[0]]
    assert any(n.endswith(('patch_embed.norm.output' if 'swin' in name else f'{embedding}.output')) for n in rows)


@pytest.mark.parametrize('name', MODELS)
def test_taps_see_tokens_of_the_images_and_carry_gradients(name):
    model, _ = quantized(name, 'w8a8')
    images = images_of(name).requires_grad_()
    taps = AttentionTaps(model)
    with taps.record(images) as record:
        model(images)
    windows = name in PADDED
    assert len(record) == (4 if windows else 2)
    for tap in record:
        assert tap.tokens.shape[1:] == (49 if windows else TOKENS.get(name, 17), 16)
        assert len(tap.tokens) == len(images) * tap.groups_per_image
        assert (tap.valid is None) != windows
    if windows:  # one mask for all images: 14 x 18 tokens in 2 x 3 windows of 7 x 7
        assert int(record[0].valid.sum()) == 14 * 18
    sum((tap.tokens**2).mean() for tap in record).backward()
    assert images.grad.isfinite().all() and (images.grad != 0).any()


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_a_copy_is_independent_of_its_original(name):
    model, _ = quantized(name, 'w8a8')
    twin, images = copy.deepcopy(model), images_of(name)
    before = run(model, images)
    for expected, out in zip(before, run(twin, images), strict=True):
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    for expected, out, changed in zip(before, run(model, images), run(twin, images), strict=True):
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        assert not torch.equal(changed, expected)


@pytest.mark.parametrize('name', MODELS)
def test_reparameterization_changes_nothing_in_full_precision_padded_windows_included(name):
    model, _ = quantized(name, 'repq_w4a8')
    layers = folded_layers(model)
    # qkv and the first feed-forward layer of each block, and Swin's reduction; DeiT3 normalizes twice with one
    # LayerNorm.
    assert len(layers) == (0 if 'deit3' in name else 9 if name in PADDED else 4)
    assert all(layer.input_quantizer.fill.abs().max() > 0 for layer in layers)
    set_mode(model, 'off')
    for expected, out in zip(run(build(name), images_of(name)), run(model, images_of(name)), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_full_precision_weights_put_over_folded_ones_are_taken_as_they_are(name):
    model, _ = quantized(name, 'repq_w4a8')
    plain = build(name, seed=1)
    model.load_state_dict(plain.state_dict(), strict=False)
    set_mode(model, 'off')
    for expected, out in zip(run(plain, images_of(name)), run(model, images_of(name)), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_a_calibrated_checkpoint_serves_a_fresh_model(name):
    model, _ = quantized(name, 'repq_w4a8')
    fresh = build(name, seed=1)
    quantize_model_(fresh, 'repq_w4a8')
    fresh.load_state_dict(model.state_dict())
    for expected, out in zip(run(model, images_of(name)), run(fresh, images_of(name)), strict=True):
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


# ---------------------------------------------------------------------- mmpretrain's attention by itself
OPTIONS = [
    dict(),
    dict(v_shortcut=True, num_heads=1, input_dims=24),
    dict(use_layer_scale=True),
    dict(qk_scale=0.3),
    dict(layer_scale_init_value=0.2, qkv_bias=False, proj_bias=False),
]


@pytest.mark.parametrize('options', OPTIONS)
def test_every_option_of_mmpretrains_attention(options):
    pytest.importorskip('mmpretrain')
    from mmpretrain.models.utils.attention import MultiheadAttention

    from psaq_mm.quantization import quantize_

    torch.manual_seed(0)
    attention = MultiheadAttention(**{**dict(embed_dims=32, num_heads=2), **options}).eval()
    x = torch.randn(2, 9, attention.input_dims)
    model = nn.Sequential(copy.deepcopy(attention))
    quantize_(model, 'w8a8')
    set_mode(model, 'off')
    with torch.no_grad():
        torch.testing.assert_close(model(x), attention(x), rtol=1e-5, atol=1e-6)


def test_dropout_of_attention_weights_is_on_in_training_only():
    pytest.importorskip('mmpretrain')
    from mmpretrain.models.utils.attention import MultiheadAttention

    from psaq_mm.quantization import quantize_

    model = nn.Sequential(MultiheadAttention(32, 2, attn_drop=0.5))
    quantize_(model, 'w8a8')
    set_mode(model, 'off')
    x = torch.randn(1, 9, 32)
    model.eval()
    torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(x), model(x))
