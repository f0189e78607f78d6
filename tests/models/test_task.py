"""The view of a model that a data-free run has: colour range, sizes, outputs, and a forward through every layer."""

import pytest
import torch
from swin_models import build_backbone

from psaq_mm.errors import ConfigError
from psaq_mm.models import TaskModel, quantize_model_
from psaq_mm.psaq_vit import SampleGenerator
from psaq_mm.quantization import quantizers, set_mode


class Preprocessor:
    """Mean and standard deviation, as the libraries' preprocessors keep them, or none."""

    def __init__(self, mean=None, std=None):
        if mean is not None:
            self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)


def with_preprocessor(preprocessor, **swin):
    model = build_backbone('mmdet', **swin)
    model.data_preprocessor = preprocessor
    quantize_model_(model, 'w8a8')
    set_mode(model, 'off')
    return TaskModel(model)


@pytest.mark.parametrize('channels', [1, 3, 5])
def test_any_number_of_channels_without_mean_and_std(channels):
    task = with_preprocessor(Preprocessor(), in_channels=channels)
    assert task.image_spec.channels == channels
    made = SampleGenerator(size=(56, 64), batch_size=2, steps=2).generate(
        task.model, task.image_spec, init=torch.zeros(2, channels, 56, 64)
    )
    assert made.samples.shape == (2, channels, 56, 64)
    assert float(made.samples.min()) >= 0.0 and 1.0 < float(made.samples.max()) <= 255.0


def test_the_clamp_follows_mean_and_std():
    task = with_preprocessor(Preprocessor([10.0, 20.0], [5.0, 10.0]), in_channels=2)
    assert task.image_spec.low == pytest.approx((-2.0, -2.0)) and task.image_spec.high == pytest.approx((49.0, 23.5))


def test_least_size_is_one_window():
    assert with_preprocessor(Preprocessor()).min_size == 28


def test_a_part_that_no_model_has():
    with pytest.raises(ConfigError, match='head'):
        TaskModel(build_backbone('mmdet'), parts=('backbone', 'heads'))


@pytest.mark.parametrize('detector', ['StandardRoIHead', 'CascadeRoIHead'])
def test_full_scope_reaches_every_layer_of_a_two_stage_detector(detector):
    pytest.importorskip('mmdet')
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    base = 'cascade-mask-rcnn_r50_fpn' if detector.startswith('Cascade') else 'mask-rcnn_r50_fpn'
    text = f"_base_ = ['mmdet::_base_/models/{base}.py']\n"
    config = Config.fromstring(text, '.py')
    model = config.model
    model.backbone = dict(
        type='SwinTransformer', embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], window_size=7
    )
    model.neck.update(in_channels=[16, 32, 64, 128], out_channels=16)
    model.rpn_head.update(in_channels=16, feat_channels=16)
    for extractor in ('bbox_roi_extractor', 'mask_roi_extractor'):
        model.roi_head[extractor].out_channels = 16
    model.roi_head.mask_head.update(in_channels=16, conv_out_channels=16, num_convs=1)
    heads = model.roi_head.bbox_head
    for head in heads if isinstance(heads, list) else [heads]:
        head.update(in_channels=16, fc_out_channels=16)
    init_default_scope('mmdet')
    built = MODELS.build(
        dict(model, type='psaq_mm.Quantized', base_type=model.type, quant=dict(preset='w8a8', scope='full'))
    )
    built.eval()
    from psaq_mm.quantization import calibrate

    task = TaskModel(built)
    calibrate(built, lambda: task.calibration_forward(torch.randn(1, 3, 64, 96), 'full'))
    assert all(bool(q.calibrated) for _, q in quantizers(built))
    assert any(n.startswith('roi_head.mask_head') for n, _ in quantizers(built))


def test_a_classifier():
    pytest.importorskip('mmpretrain')
    from mmengine.registry import MODELS, DefaultScope

    config = dict(
        type='psaq_mm.Quantized',
        base_type='ImageClassifier',
        quant=dict(preset='w8a8', scope='full'),
        backbone=dict(
            type='SwinTransformer', arch=dict(embed_dims=16, depths=[1, 1], num_heads=[1, 2]), out_indices=(1,)
        ),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=5, in_channels=32),
    )
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(config)
    model.eval()
    task = TaskModel(model, ('backbone', 'head'))
    from psaq_mm.quantization import calibrate

    images = torch.randn(2, 3, 56, 56)
    calibrate(model, lambda: task.calibration_forward(images, 'full'))
    assert [tuple(t.shape) for t in task.outputs(images)] == [(2, 32, 7, 7), (2, 5)]
