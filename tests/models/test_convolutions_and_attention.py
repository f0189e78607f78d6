"""Backbones with convolutions and attention side by side: their edges, their folding, what is refused."""

import pytest
import torch
from backbone_builders import ROWS, build, classifier, images_of, run

from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models import TaskModel, quantize_model_, report_of, rotate_model_
from psaq_mm.psaq_vit import AttentionTaps
from psaq_mm.quantization import calibrate, norm_before, quantizers, set_mode

pytest.importorskip('mmpretrain')
pytestmark = pytest.mark.filterwarnings('ignore')


def row_of(name, **changes):
    """A row by its name, with other settings."""
    row = next(row for row in ROWS if row.id == name)
    return row._replace(config=lambda: dict(row.config(), **changes))


def quantized(row, spec='w8a8'):
    """Calibrated on noise."""
    model = build(row)
    quantize_model_(model, spec)
    calibrate(model, lambda: run(model, images_of(row)))
    return model


def edges(model):
    """Names of the quantizers of edges that are no layer's own."""
    owners = {name.rpartition('.')[0] for name, _ in quantizers(model)}
    layers = {name.rpartition('.')[0] for name, _ in quantizers(model) if name.endswith('weight_quantizer')}
    return {name for name, _ in quantizers(model) if name.rpartition('.')[0] in owners - layers}


def test_pooled_queries_keys_and_values_of_mvit_and_both_of_its_sums_are_edges():
    model = quantized(row_of('mmpretrain_mvit'), 'psaq_v1_w8a8')
    for block in ('blocks.0', 'blocks.1'):
        wanted = {f'attn.norm_{part}.output' for part in 'qkv'} | {'residual1', 'residual2'}
        assert {f'{block}.{name}_quantizer' for name in wanted} <= edges(model)
    assert not [name for name, _ in quantizers(model) if 'pool_' in name and name.endswith('output_quantizer')]


def test_products_with_position_embeddings_are_told_where_there_are_some():
    reasons = {row.reason for row in report_of(quantized(row_of('mmpretrain_mvit'))).floats}
    assert reasons == {'products of queries and position embeddings are in floating point'}
    assert not report_of(quantized(row_of('mmpretrain_mvit_widened_behind_attention'))).floats


def test_a_norm_of_mvit_that_two_layers_read_is_not_folded():
    for name, widened in (('mmpretrain_mvit', 1), ('mmpretrain_mvit_widened_behind_attention', 0)):
        blocks = quantized(row_of(name)).blocks
        assert norm_before(blocks[2].attn.qkv) is blocks[2].norm1 and norm_before(blocks[2].mlp.fc1) is blocks[2].norm2
        layer = blocks[widened].attn.qkv if widened else blocks[widened].mlp.fc1
        assert blocks[widened].proj is not None and norm_before(layer) is None


def test_the_last_norm_of_a_mobilevit_block_is_folded_into_a_convolution():
    layer = quantized(row_of('mmpretrain_mobilevit'), 'repq_w4a8').layers[1][1]
    assert norm_before(layer.conv_proj.conv) is layer.global_rep[2]
    assert layer.conv_proj.conv.input_quantizer.fill.shape == (64,)


@pytest.mark.parametrize('size', [(104, 72), (96, 64)])
def test_the_streams_of_mobilevit_are_rotated_also_where_maps_are_resized(size):
    model = build(row_of('mmpretrain_mobilevit'))
    images = torch.randn(2, 3, *size)
    before = run(model, images)
    weight = model.layers[1][1].local_rep[1].conv.weight.clone()
    report = rotate_model_(model, size)
    assert report.heads == 8 and report.streams == [('the stream of MobileViT block 1', 64)]
    assert not torch.allclose(model.layers[1][1].local_rep[1].conv.weight, weight, atol=0.01)
    for out, expected in zip(run(model, images), before):
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


def test_what_conformers_transformer_layers_read_and_its_sums_of_maps_are_edges():
    names = edges(quantized(row_of('mmpretrain_conformer'), 'psaq_v1_w8a8'))
    wanted = ('tokens', 'cnn_block.act3.output', 'trans_block.residual1', 'trans_block.residual2')
    assert {f'conv_trans_2.{name}_quantizer' for name in wanted} <= names
    assert 'conv_1.act3.output_quantizer' in names


@pytest.mark.parametrize('name, tokens', [('mmpretrain_conformer', 1), ('mmpretrain_conformer_without_class_token', 0)])
def test_tokens_of_conformer_before_those_of_patches(name, tokens):
    row = row_of(name)
    model, images = quantized(row), images_of(row)
    assert TaskModel(model).prefix_tokens == tokens
    with AttentionTaps(model, drop_tokens=tokens).record(images) as record:
        run(model, images)
    height, width = (-(-side // 16) for side in row.size)
    assert {tap.tokens.shape[1] for tap in record} == {height * width}


def test_attention_of_edgenext_is_quantized_and_its_positions_are_a_constant():
    model = quantized(row_of('mmpretrain_edgenext'), 'repq_w8a8')
    block = model.stages[1][1]
    assert {'matmul_qk', 'matmul_av'} <= dict(block.csa.named_children()).keys()
    assert norm_before(block.csa.qkv) is block.norm_csa and norm_before(block.pointwise_conv1) is block.norm
    told = {row.name: row.reason for row in report_of(model).floats}
    assert told == {'stages.1.1.pos_embed.proj': 'position encoding: a constant of the size'}


def test_edgenext_with_positions_before_its_first_stage_is_refused():
    with pytest.raises(UnsupportedModelError, match='build it with use_pos_embd_global=False'):
        quantize_model_(build(row_of('mmpretrain_edgenext', use_pos_embd_global=True)), 'w8a8')


def test_riformer_of_deployment_computes_what_the_trained_one_does():
    trained = build(row_of('mmpretrain_riformer'))
    images = images_of(row_of('mmpretrain_riformer'))
    expected = run(trained, images)
    trained.switch_to_deploy()
    quantize_model_(trained, 'w8a8')
    set_mode(trained, 'off')
    assert not hasattr(trained.network[0][0], 'token_mixer')
    for out, wanted in zip(run(trained, images), expected):
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'name, channels',
    [('mmpretrain_riformer', 32), ('mmpretrain_mobilevit', 96), ('mmpretrain_mvit', 32), ('mmpretrain_edgenext', 32)],
)
def test_the_smallest_pictures_run_in_a_classifier(name, channels):
    row = row_of(name)
    model = build(row._replace(inside=classifier(channels)), inside=True)
    quantize_model_(model, dict(preset='w8a8', scope='full'))
    set_mode(model, 'off')
    side = TaskModel(model).min_size
    (logits,) = run(model, torch.randn(1, 3, side, side))
    assert logits.shape[0] == 1 and logits.isfinite().all()
