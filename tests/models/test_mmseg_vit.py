"""mmseg's ViT: the packed projection of nn.MultiheadAttention, and an output projection that torch never calls."""

import copy
import pickle

import pytest
import torch
from torch import nn
from vit_models import build, images_of, run

from psaq_mm.models import quantize_model_
from psaq_mm.models.adapters.packed_attention import PackedProjection
from psaq_mm.psaq_vit import AttentionTaps
from psaq_mm.quantization import calibrate, is_quantizer_key, quantizers, set_mode

pytest.importorskip('mmseg')

SEGMENTOR = """
_base_ = ['mmseg::vit/vit_deit-s16_mln_upernet_8xb2-160k_ade20k-512x512.py']
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(img_size=(64, 64), embed_dims=32, num_layers=4, num_heads=2, out_indices=(0, 1, 2, 3)),
    neck=dict(in_channels=[32, 32, 32, 32], out_channels=16),
    decode_head=dict(in_channels=[16, 16, 16, 16], channels=16, num_classes=5, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=16, channels=16, num_classes=5, norm_cfg=norm_cfg))
"""


def calibrated(spec='w8a8'):
    model = build('mmseg-vit')
    quantize_model_(model, spec)
    calibrate(model, lambda: model(images_of('mmseg-vit')))
    return model, model.layers[0].attn.attn


def test_the_packed_projection_is_quantized_as_a_linear_and_owns_nothing():
    model, attention = calibrated('w4a8')
    assert isinstance(attention.qkv, PackedProjection) and isinstance(attention, nn.MultiheadAttention)
    assert not list(attention.qkv._parameters) and attention.qkv.weight is attention.in_proj_weight
    assert attention.qkv.weight_quantizer.scale.shape == (96,) and attention.qkv.weight_quantizer.bits == 4
    assert attention.qkv.input_quantizer.scale.shape == ()
    keys = {k for k in model.state_dict() if k.startswith('layers.0.attn.') and not is_quantizer_key(k)}
    assert keys == {
        f'layers.0.attn.attn.{k}' for k in ('in_proj_weight', 'in_proj_bias', 'out_proj.weight', 'out_proj.bias')
    }


@pytest.mark.parametrize('layer', ['qkv', 'out_proj'])
@pytest.mark.parametrize('part', ['weight', 'input'])
def test_each_quantizer_of_the_attention_matters(layer, part):
    model, _ = calibrated('w4a4')
    before = run(model, images_of('mmseg-vit'))[0]
    assert set_mode(model, 'off', f'layers.0.attn.attn.{layer}.{part}_quantizer')
    assert not torch.equal(run(model, images_of('mmseg-vit'))[0], before)


def test_a_step_on_the_packed_weight_is_seen_by_the_projection():
    model, attention = calibrated()
    images = images_of('mmseg-vit')
    before = run(model, images)[0]
    model(images)[0].square().mean().backward()
    assert attention.in_proj_weight.grad.abs().max() > 0
    torch.optim.SGD([attention.in_proj_weight], lr=1.0).step()
    assert not torch.equal(run(model, images)[0], before)


def test_the_projection_follows_its_attention_when_the_dtype_changes():
    model, attention = calibrated()
    model.double()
    assert attention.qkv.weight.dtype == torch.float64
    assert attention.qkv.weight_quantizer.scale.dtype == torch.float32
    assert run(model, images_of('mmseg-vit').double())[0].dtype == torch.float64


def test_copies_and_pickles_look_at_their_own_weights():
    _, attention = calibrated()
    for twin in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert twin.qkv.weight is twin.in_proj_weight and twin.qkv.weight is not attention.in_proj_weight
        x = torch.randn(9, 2, 32)
        with torch.no_grad():
            torch.testing.assert_close(twin(x)[0], attention(x)[0], rtol=0, atol=0)


def test_batch_first_is_honoured():
    _, attention = calibrated()
    x = torch.randn(9, 2, 32)
    with torch.no_grad():
        expected = attention(x)[0]
        attention.batch_first = True
        torch.testing.assert_close(attention(x.transpose(0, 1))[0].transpose(0, 1), expected, rtol=0, atol=0)


def test_checkpointed_layers_give_the_same_tapped_gradients():
    grads = []
    for with_cp in (False, True):
        model = build('mmseg-vit', with_cp=with_cp)
        quantize_model_(model, 'w8a8')
        set_mode(model, 'off')
        images = images_of('mmseg-vit').requires_grad_()
        with AttentionTaps(model).record(images) as record:
            model(images)
        sum((tap.tokens**2).mean() for tap in record).backward()
        grads.append(images.grad)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-8)


def test_a_zoo_config_and_its_checkpoint():
    """UperNet on DeiT, made small: mmengine's loader finds no key missing or left over but quantizer state."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope
    from mmengine.runner import load_state_dict

    config = Config.fromstring(SEGMENTOR, '.py').model
    init_default_scope('mmseg')
    plain = MODELS.build(copy.deepcopy(config))
    model = MODELS.build(dict(config, type='psaq_mm.Quantized', base_type=config.type, quant='w8a8'))
    assert not set(plain.state_dict()) - set(model.state_dict())
    assert all(is_quantizer_key(k) for k in set(model.state_dict()) - set(plain.state_dict()))
    load_state_dict(model, plain.state_dict())
    for part in (plain, model):
        part.eval()
    set_mode(model, 'off')
    images = torch.randn(1, 3, 48, 64)  # another size than that of the position embedding
    for expected, out in zip(run(plain, images), run(model, images), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    set_mode(model, 'on')
    calibrate(model, lambda: model(images))
    assert all(n.startswith('backbone.') for n, _ in quantizers(model))
    assert run(model, images)[0].isfinite().all()
