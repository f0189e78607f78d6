"""Swin V2, SAM's encoder and their relatives: padding, the position bias that an MLP computes, checkpoints, exports."""

import copy

import pytest
import torch
from backbone_builders import ROWS, build, images_of, row_named, run

from psaq_mm.deploy import export_model
from psaq_mm.deploy.verify import verify
from psaq_mm.errors import CheckpointError, UnsupportedModelError
from psaq_mm.models import TaskModel, quantize_model_, report_of
from psaq_mm.models.adapters.windows import valid_query_rows
from psaq_mm.psaq_vit import AttentionTaps
from psaq_mm.quantization import AffineQuantizer, calibrate, quantizers, set_mode
from psaq_mm.runtime import RUNTIMES

pytest.importorskip('mmpretrain')
pytestmark = pytest.mark.filterwarnings('ignore')

BY_ID = {row.id: row for row in ROWS}


def quantized(name, spec='w8a8', **options):
    """Calibrated on noise; with other options in its config."""
    model = build(row_named(name, **options))
    quantize_model_(model, spec)
    calibrate(model, lambda: run(model, images_of(BY_ID[name])))
    return model


def attention_of(model, name):
    blocks = {
        'mmpretrain_swin_v2': lambda: model.stages[0].blocks[0].attn.w_msa,
        'timm_swin_v2_of_any_size': lambda: model.model.layers[0].blocks[0].attn,
        'mmpretrain_sam': lambda: model.layers[0].attn,
    }
    return blocks[name]()


def make_padding_distinct(model, name):
    """Padding is zero before the projection, so that its queries are their bias: here they have the widest range."""
    attention = attention_of(model, name)
    if name == 'mmpretrain_sam':  # a real token adds about -3200 to the bias
        model.layers[0].ln1.bias.fill_(-1.0)
        attention.qkv.weight[:32] += 100.0
        attention.qkv.bias[:32] = 1000.0
    else:  # normalized, 1 in one place, which the query of a real token is not
        attention.q_bias.zero_()
        attention.q_bias[0] = 1e-3


PADDED = ('mmpretrain_swin_v2', 'timm_swin_v2_of_any_size', 'mmpretrain_sam')


@pytest.mark.parametrize('name', PADDED)
def test_padded_queries_take_no_part_in_calibration(name):
    seen, model = [], build(BY_ID[name])
    with torch.no_grad():
        make_padding_distinct(model, name)
    quantize_model_(model, 'w8a8')
    quantizer = attention_of(model, name).matmul_qk.lhs_quantizer
    quantizer.register_forward_pre_hook(lambda m, args: seen.append((args[0], args[1])))
    calibrate(model, lambda: run(model, images_of(BY_ID[name])))
    (x, valid) = seen[0]
    valid = valid.expand(x.shape[:-1])
    alone, with_padding = (AffineQuantizer(8).range_of(rows).scale for rows in (x[valid], x))
    assert not valid.all() and with_padding > 1.001 * alone
    torch.testing.assert_close(quantizer.scale, alone)


@pytest.mark.parametrize('name', PADDED)
def test_patch_similarity_sees_the_tokens_of_the_image_alone(name):
    row = BY_ID[name]
    model = quantized(name)
    with AttentionTaps(model).record(images_of(row)) as record:
        run(model, images_of(row))
    tap, patch = record[0], 8 if name == 'mmpretrain_sam' else 4
    height, width = (side // patch for side in row.size)
    assert torch.equal(tap.valid, valid_query_rows(height, width, 4)) and not tap.valid.all()
    assert tap.groups_per_image == len(tap.valid) and int(tap.valid.sum()) == height * width


def test_rectangular_shifts_move_the_padding():
    x = torch.zeros(6, 8, dtype=torch.bool)
    x[:5, :7] = True
    wanted = torch.roll(x, (-1, -2), (0, 1)).reshape(2, 3, 2, 4).transpose(1, 2).reshape(4, 12)
    assert torch.equal(valid_query_rows(5, 7, (3, 4), (1, 2)), wanted)


def test_the_position_bias_of_swin_v2_stays_float_and_is_told():
    model = quantized('mmpretrain_swin_v2', dict(preset='psaq_v1_w8a8'))
    told = {row.name: row.reason for row in report_of(model).floats}
    name = 'stages.0.blocks.0.attn.w_msa.cpb_mlp.2'
    assert told[name] == "position bias: a constant of the window's size"
    assert not [n for n, _ in quantizers(model) if '.cpb_mlp.' in n]


def test_scores_of_cosine_attention_have_a_greatest_scale():
    """Of each head exp(logit_scale), at most 100 (Swin V2, section 3.3)."""
    model = build(BY_ID['mmpretrain_swin_v2'])
    model.stages[0].blocks[0].attn.w_msa.logit_scale.data.fill_(50.0)
    plain = copy.deepcopy(model)
    quantize_model_(model, 'w8a8')
    set_mode(model, 'off')
    images = images_of(BY_ID['mmpretrain_swin_v2'])
    for out, expected in zip(run(model, images), run(plain, images)):
        assert expected.isfinite().all() and torch.equal(out, expected)


ONE_STAGE = dict(
    mmpretrain_swin_v2=dict(
        arch=dict(embed_dims=16, depths=[2], num_heads=[1], extra_norm_every_n_blocks=0),
        pretrained_window_sizes=[0],
        out_indices=(0,),
    ),
    timm_swin_v2_of_any_size=dict(depths=(2,), num_heads=(1,)),
    mmpretrain_sam=dict(),
)
"""Two blocks, of which one shifts its windows."""


@pytest.mark.parametrize(
    'name, spec',
    [('mmpretrain_swin_v2', 'w4a8'), ('timm_swin_v2_of_any_size', 'w8a8'), ('mmpretrain_sam', 'repq_w8a8')],
)
def test_codes_of_padded_windows_in_both_runtimes(name, spec, tmp_path):
    model = quantized(name, spec, **ONE_STAGE[name])
    exported = export_model(model, tmp_path / 'out', [BY_ID[name].size])
    assert not [weight for weight in exported.exportable.weights if 'cpb_mlp' in weight]  # the graph has the bias alone
    for runtime in ('onnxruntime', 'openvino'):
        pytest.importorskip(runtime)
        found = verify(model, exported, images_of(BY_ID[name], batch=1), runtime, threads=1)
        assert found.good, found.to_table()
        # Where integer kernels are not exact, as on a processor without VNNI, others are chosen.
        if RUNTIMES[runtime].exact_way() in ('integer', 'unsigned'):
            assert found.kernels == ('integer',)
        told = {layer.name for layer in found.layers}
        assert {n for n, m in model.named_modules() if n.endswith(('lhs_quantizer', 'rhs_quantizer'))} <= told


# ---------------------------------------------------------------------- checkpoints and sizes
def test_a_checkpoint_of_another_window_is_taken_and_one_that_lacks_weights_is_not():
    """The indices of another window have another shape; the library drops them. The MLP has the same weights."""
    row = BY_ID['mmpretrain_swin_v2']
    other = build(row._replace(config=lambda: dict(row.config(), window_size=8)), seed=1)
    state = other.state_dict()
    model = build(row)
    quantize_model_(model, 'w8a8')
    model.load_state_dict(dict(state), strict=False)
    weight = 'stages.0.blocks.0.attn.w_msa.cpb_mlp.0.weight'
    assert torch.equal(model.state_dict()[weight], state[weight])
    del state[weight]
    with pytest.raises(CheckpointError, match='cpb_mlp'):
        model.load_state_dict(state, strict=False)


def test_sam_takes_a_checkpoint_of_another_image_size():
    row = BY_ID['mmpretrain_sam']
    state = build(row._replace(config=lambda: dict(row.config(), img_size=64))).state_dict()
    model = build(row)
    quantize_model_(model, 'w8a8')
    model.load_state_dict(state, strict=False)
    assert model.layers[1].attn.rel_pos_h.shape == (11, 16)


def test_the_least_size_where_small_maps_are_not_padded():
    row = BY_ID['mmpretrain_davit_after_downsampling']
    assert TaskModel(build(row)).min_size == 32  # 4 pixels a token, halved once, a window of 4
    with pytest.raises(AssertionError):  # the library's own
        run(build(row), torch.randn(1, 3, 16, 64))


def test_a_mask_of_pretraining_is_refused_in_one_sentence():
    model = quantized('mmpretrain_mixmim_of_pretraining')
    with pytest.raises(UnsupportedModelError, match='attn_mask is not supported'):
        model(images_of(BY_ID['mmpretrain_mixmim_of_pretraining']), True)


def pretraining_model():
    row = BY_ID['mmpretrain_simmim_swin']
    neck = dict(type='SimMIMLinearDecoder', in_channels=32, encoder_stride=8)
    loss = dict(type='PixelReconstructionLoss', criterion='L1', channel=3)
    config = dict(type='SimMIM', neck=neck, head=dict(type='SimMIMHead', patch_size=4, loss=loss))
    return build(row._replace(config=lambda: dict(config, backbone=row.config()))), images_of(row)


def test_a_model_of_pretraining_is_quantized_as_what_extracts_features(tmp_path):
    model, images = pretraining_model()
    with pytest.raises(UnsupportedModelError, match="scope='full' does not cover SimMIM, whose neck and head restore"):
        quantize_model_(copy.deepcopy(model), dict(preset='w8a8', scope='full'))
    with torch.no_grad():
        expected = model.backbone(images, mask=None)
    quantize_model_(model, 'w8a8')
    view = TaskModel(model, ('backbone',))
    calibrate(model, lambda: view.calibration_forward(images))
    (out,), (wanted,) = view.outputs(images), expected
    assert 0 < (out - wanted).norm() / wanted.norm() < 0.05
    exported = export_model(model, tmp_path / 'out', [BY_ID['mmpretrain_simmim_swin'].size])
    assert 'SimMIM restores masked pictures with it' in str(exported.manifest)


def test_folding_that_finds_nothing_is_told(monkeypatch):
    said = []
    monkeypatch.setattr('psaq_mm.models.quantized.print_log', lambda message, *args: said.append(message))
    quantize_model_(build(BY_ID['timm_swin_v2']), 'repq_w8a8')
    assert any('folds nothing in SwinTransformerV2' in message for message in said)
