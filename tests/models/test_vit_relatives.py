"""What the rows of all backbones do not show of ViT's relatives."""

import pytest
import torch
from backbone_builders import build, images_of, row_named, run, unfuse
from torch import nn

from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models import quantize_model_, rotate_model_
from psaq_mm.psaq_vit import AttentionTaps
from psaq_mm.quantization import calibrate, set_mode

pytest.importorskip('mmpretrain')

VIT = dict(img_size=32, patch_size=8, arch=dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64))


def test_backbone_of_mff_gives_features_of_whole_pictures():
    """The library's drops patches at random, with and without a mask."""
    row = row_named('mmpretrain_vit', out_type='raw')
    plain = unfuse(build(row))
    model = build(row._replace(config=lambda: dict(type='MFFViT', out_indices=[0, 1], **VIT)))
    model.load_state_dict(plain.state_dict(), strict=False)
    quantize_model_(model, 'w8a8')
    set_mode(model, 'off')
    out, expected = run(model, images_of(row)), run(plain, images_of(row))
    assert torch.equal(out[-1], expected[-1])
    set_mode(model, 'on')
    calibrate(model, lambda: run(model, images_of(row)))
    assert 0 < (run(model, images_of(row))[-1] - expected[-1]).norm() / expected[-1].norm() < 0.05


@pytest.mark.parametrize('name', ['mmpretrain_t2t_vit', 'mmpretrain_tnt'])
def test_only_tokens_of_patches_are_tapped(name):
    row = row_named(name)
    model = build(row)
    quantize_model_(model, 'w8a8')
    set_mode(model, 'off')
    with AttentionTaps(model, drop_tokens=1).record(2) as record:
        model(images_of(row))
    patches = 4 if name == 'mmpretrain_t2t_vit' else 16
    assert [tuple(tap.tokens.shape[:2]) for tap in record] == [(2, patches)] * 2


def test_layer_of_tnt_leaves_its_inputs():
    """Rounding computes a layer again of the inputs that it has kept."""
    model = build(row_named('mmpretrain_tnt'))
    quantize_model_(model, 'w8a8')
    set_mode(model, 'off')
    pixels, patches = torch.randn(32, 4, 16), torch.randn(2, 17, 32)
    before = pixels.clone(), patches.clone()
    model.layers[0](pixels, patches)
    assert torch.equal(pixels, before[0]) and torch.equal(patches, before[1])


def test_quantized_reversible_layers_learn_and_leave_the_random_numbers():
    """The library's layers seed all random numbers anew, and its own backward pass inverts sums."""
    row = row_named('mmpretrain_reversible_vit')
    model = build(row)
    quantize_model_(model, 'w8a8')
    calibrate(model, lambda: run(model, images_of(row)))
    state = torch.get_rng_state()
    model.train()
    (model(images_of(row))[0] ** 2).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.layers[0].attn.qkv.weight.grad.abs().sum() > 0


def test_failed_rotation_puts_positions_back_that_are_a_buffer(monkeypatch):
    row = row_named('mmpretrain_t2t_vit')
    model = build(row, inside=True)
    before = model.backbone.pos_embed.clone()
    monkeypatch.setattr('psaq_mm.models.rotation.TOLERANCE', 0)
    with pytest.raises(UnsupportedModelError, match='changed its outputs'):
        rotate_model_(model, row.size)
    assert torch.equal(model.backbone.pos_embed, before)


def test_what_is_refused_says_the_way_out():
    lora = dict(type='LoRAModel', module=dict(type='VisionTransformer', **VIT), rank=2, targets=[dict(type='qkv')])
    row = row_named('mmpretrain_vit')
    with pytest.raises(UnsupportedModelError, match=r'merge_lora_weight\.py, and use VisionTransformer'):
        quantize_model_(build(row._replace(config=lambda: lora)), 'w8a8')
    model = nn.Module()
    model.vision_backbone = build(row)
    with pytest.raises(UnsupportedModelError, match=r'quantize_model_\(model\.vision_backbone, spec\)'):
        quantize_model_(model, 'w8a8')
