"""ConvNeXt: a backbone without attention. tests/models/test_every_backbone.py has what all backbones share."""

import pytest
import torch
from backbone_builders import build, images_of, row_named, run

from psaq_mm.calibration import Calibration, CalibrationSettings
from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models import TaskModel, quantize_model_, report_of, rotate_model_
from psaq_mm.models.task import default_parts
from psaq_mm.psaq_vit import AttentionTaps
from psaq_mm.quantization import calibrate, is_quantized_layer, norm_before, quantizers, set_mode

pytestmark = pytest.mark.filterwarnings('ignore')


def quantized(name, spec):
    model = build(row_named(name))
    quantize_model_(model, spec)
    calibrate(model, lambda: run(model, images_of(row_named(name))))
    return model


def test_depthwise_convolutions_have_a_scale_for_each_channel():
    model = quantized('mmpretrain_convnext', 'w4a8')
    layer = model.stages[0][0].depthwise_conv
    assert layer.groups == 16 and layer.weight_quantizer.scale.shape == (16,) and layer.weight_quantizer.bits == 4
    assert len(layer.weight_quantizer.scale.unique()) == 16
    assert not [module for module in model.modules() if type(module) in (torch.nn.Conv2d, torch.nn.Linear)]


@pytest.mark.parametrize('name', ['mmpretrain_convnext', 'mmpretrain_convnext_of_convolutions'])
def test_each_norm_is_folded_into_the_one_layer_that_reads_it(name):
    model = quantized(name, 'repq_w8a8')
    block = model.stages[1][0]
    assert norm_before(block.pointwise_conv1) is block.norm
    assert norm_before(model.downsample_layers[1][1]) is model.downsample_layers[1][0]
    assert norm_before(block.depthwise_conv) is None and norm_before(block.pointwise_conv2) is None


def test_response_normalization_is_named_where_there_is_some():
    rows = {row.name: row.reason for row in report_of(quantized('mmpretrain_convnext_v2', 'w8a8')).floats}
    assert set(rows) == {'stages.0.0.grn', 'stages.1.0.grn', 'stages.1.1.grn'}
    assert 'multiplies an activation with a statistic of itself' in rows['stages.0.0.grn']
    assert not report_of(quantized('mmpretrain_convnext', 'w8a8')).floats


@pytest.mark.parametrize('name', ['mmpretrain_convnext_v2', 'timm_convnext_v2'])
def test_residual_sums_are_edges_and_what_norm_and_activation_read_is_none(name):
    names = dict(quantizers(quantized(name, 'psaq_v1_w8a8')))
    prefix, first = ('', 'pointwise_conv1') if name == 'mmpretrain_convnext_v2' else ('model.', 'mlp.fc1')
    block = f'{prefix}stages.1.{"0" if name == "mmpretrain_convnext_v2" else "blocks.0"}'
    assert f'{block}.residual_quantizer' in names and f'{block}.{first}.output_quantizer' not in names
    assert not any('depthwise' in key or 'conv_dw' in key for key in names if key.endswith('output_quantizer'))
    stem = 'downsample_layers.0' if name == 'mmpretrain_convnext_v2' else 'model.stem'
    assert f'{stem}.1.output_quantizer' in names and f'{stem}.0.output_quantizer' not in names


def test_guided_rounding_needs_no_attention_and_checkpointing_keeps_its_gradients():
    weights = []
    for with_cp in (False, True):
        model = build(row_named('mmpretrain_convnext_of_convolutions', with_cp=with_cp))
        quantize_model_(model, 'w3a8')
        assert default_parts(model) == ('backbone', 'neck')
        calibration = Calibration(TaskModel(model), CalibrationSettings(rounding='guided', batch_size=2))
        calibration.run(images_of(row_named('mmpretrain_convnext_of_convolutions'), batch=4))
        layers = [module for module in model.modules() if is_quantized_layer(module)]
        assert len(calibration.rounded) == len(layers)
        weights.append(torch.cat([layer.weight.detach().flatten() for layer in layers]))
    assert torch.equal(*weights)


@pytest.mark.parametrize('name', ['mmpretrain_convnext', 'timm_convnext', 'timm_convnext_features'])
def test_what_needs_attention_is_refused_in_one_sentence(name):
    model = quantized(name, 'w8a8')
    with pytest.raises(UnsupportedModelError, match="patch similarity cannot be measured: use a method .* 'fast'"):
        AttentionTaps(model)
    report = rotate_model_(model, row_named(name).size)
    assert not report.heads and not report.streams and 'depthwise convolutions' in report.left[0]
    side = TaskModel(model).min_size
    set_mode(model, 'off')
    assert run(model, torch.randn(1, 3, side, side))[-1].isfinite().all()
    with pytest.raises(RuntimeError):
        run(model, torch.randn(1, 3, side - 1, side - 1))


def test_the_form_for_pretraining_is_refused_with_the_way_out():
    pytest.importorskip('mmpretrain')
    from mmpretrain.models import SparseConvNeXt

    with pytest.raises(UnsupportedModelError, match='SparseConvNeXt.*load its weights into mmpretrain.ConvNeXt'):
        quantize_model_(SparseConvNeXt(arch=dict(depths=[1, 1], channels=[8, 16]), out_indices=[1]), 'w8a8')
