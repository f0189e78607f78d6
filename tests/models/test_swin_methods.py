"""Swin of the three libraries under PSAQ-ViT's full set of edges and RepQ-ViT's reparameterization."""

import copy

import pytest
import torch
from swin_models import LIBRARIES, build_backbone

from psaq_mm.models import quantize_model_
from psaq_mm.models.adapters.windows import valid_query_rows
from psaq_mm.quantization import (
    ReparameterizedQuantizer,
    calibrate,
    is_quantized_layer,
    norm_before,
    quantizers,
    set_mode,
)

PADDED = (57, 75)


def calibrated(library, quant, size=PADDED, **more):
    model = build_backbone(library, **more)
    reference = copy.deepcopy(model)
    report = quantize_model_(model, quant)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    calibrate(model, lambda: model(images))
    return model, reference, images, report


@pytest.mark.parametrize('library', LIBRARIES)
def test_psaq_v1_quantizes_every_edge_and_no_softmax(library):
    model, _, images, report = calibrated(library, 'psaq_v1_w8a8')
    edges = {row.name for row in report.layers if row.kind == 'activation'}
    assert 'drop_after_pos.output' in edges
    for block in ('stages.0.blocks.0', 'stages.2.blocks.1'):
        attention = f'{block}.attn.w_msa'
        for edge in (
            f'{block}.residual1',
            f'{block}.residual2',
            f'{attention}.qkv.output',
            f'{attention}.proj.output',
            f'{attention}.matmul_qk.output',
            f'{attention}.scores',
        ):
            assert edge in edges
        assert f'{block}.ffn.layers.0.0.output' not in edges, 'the activation function reads it'
        assert f'{block}.ffn.layers.1.output' in edges
    assert not any('matmul_av' in name for name, _ in quantizers(model))
    assert all(torch.isfinite(out).all() for out in model(images))


def test_residual_sums_lie_on_the_grid_of_their_quantizer():
    model, _, images, _ = calibrated('mmdet', 'psaq_v1_w8a8')
    block, seen = model.stages[1].blocks[0], []
    block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(images)
    quantizer = block.residual2_quantizer
    codes = seen[0] / quantizer.scale
    assert torch.equal(codes.round() * quantizer.scale, seen[0])
    assert len(seen[0].unique()) <= 256


def test_scores_are_observed_before_the_mask():
    model, _, _, _ = calibrated('mmdet', 'psaq_v1_w8a8')
    shifted = model.stages[0].blocks[1].attn.w_msa
    # The mask's -100 would make the step at least 100 / 255.
    assert float(shifted.scores_quantizer.scale) < 0.2


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.parametrize('size', [(56, 56), PADDED, (90, 130)])
def test_reparameterization_leaves_the_float_model_as_it_was(library, size):
    model, reference, images, _ = calibrated(library, 'repq_w4a4', size)
    set_mode(model, 'off')
    moved = model.stages[0].blocks[0].norm1.weight
    assert not torch.allclose(moved, reference.stages[0].blocks[0].norm1.weight), 'nothing was folded'
    for ours, theirs in zip(model(images), reference(images)):
        assert (ours - theirs).abs().max() <= 2e-4 * theirs.abs().max()


def test_padding_left_at_zero_would_show():
    """The control of the test above: with 0 in place of its image, padded windows give something else."""
    model, reference, images, _ = calibrated('mmdet', 'repq_w4a4', PADDED)
    assert valid_query_rows(15, 19, 7, 0) is not None, 'the size has to pad'
    set_mode(model, 'off')
    for _, quantizer in quantizers(model):
        if isinstance(quantizer, ReparameterizedQuantizer):
            quantizer.fill.zero_()
    ours, theirs = model(images)[0], reference(images)[0]
    assert (ours - theirs).abs().max() > 0.01 * theirs.abs().max()


def test_which_layers_are_reparameterized():
    model, _, _, _ = calibrated('mmdet', 'repq_w6a6')
    folded = [
        name
        for name, m in model.named_modules()
        if is_quantized_layer(m) and isinstance(m.input_quantizer, ReparameterizedQuantizer)
    ]
    blocks = 6
    assert len(folded) == 2 * blocks + 2, 'qkv and fc1 of each block, and two reductions'
    reduction = model.stages[0].downsample.reduction
    assert reduction.bias is None and reduction.input_quantizer.folded_bias.abs().max() > 0
    assert norm_before(reduction) is model.stages[0].downsample.norm


def test_zero_points_are_integers_and_one_scale_serves():
    model, _, _, _ = calibrated('mmdet', 'repq_w4a4')
    for _, quantizer in quantizers(model):
        if isinstance(quantizer, ReparameterizedQuantizer):
            assert quantizer.scale.shape == () and quantizer.zero_point.dtype == torch.int32
            assert 0 <= int(quantizer.zero_point) <= 15


def test_student_state_goes_round_and_full_precision_weights_undo_the_folding():
    model, reference, images, _ = calibrated('mmdet', 'repq_w4a4')
    wanted = model(images)
    again = build_backbone('mmdet')
    quantize_model_(again, 'repq_w4a4')
    again.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again(images), wanted))

    again.load_state_dict(reference.state_dict(), strict=False)
    set_mode(again, 'off')
    assert all(torch.equal(a, b) for a, b in zip(again(images), reference(images)))


def test_folding_twice_adds_up():
    model, reference, images, _ = calibrated('mmdet', 'repq_w4a4')
    calibrate(model, lambda: model(images * 1.7))
    set_mode(model, 'off')
    for ours, theirs in zip(model(images), reference(images)):
        assert (ours - theirs).abs().max() <= 5e-4 * theirs.abs().max()


def test_copies_fold_their_own_layernorm():
    model = build_backbone('mmdet')
    quantize_model_(model, 'repq_w4a4')
    twin = copy.deepcopy(model)
    before = model.stages[0].blocks[0].norm1.weight.clone()
    calibrate(twin, lambda: twin(torch.randn(1, 3, *PADDED)))
    assert torch.equal(model.stages[0].blocks[0].norm1.weight, before)
    assert not torch.equal(twin.stages[0].blocks[0].norm1.weight, before)
