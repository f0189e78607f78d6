"""What a data-free run knows of a classifier: sizes, tokens, classes, outputs, and a forward through every layer."""

import pytest
import torch
from classifier_models import CLASSES, MODELS, SIZES, build_classifier

from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models import TaskModel, report_of, spec_of
from psaq_mm.quantization import calibrate, quantizers, set_mode

pytestmark = pytest.mark.filterwarnings('ignore')


def images(name, batch=2):
    return torch.randn(batch, 3, SIZES[name], SIZES[name], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    'name, prefix, fixed',
    [
        ('mmpretrain-vit', 1, None),
        ('mmpretrain-swin', 0, None),
        ('timm-vit', 1, (32, 32)),
        ('timm-deit-distilled', 2, (32, 32)),
        ('timm-swin', 0, (56, 56)),
    ],
)
def test_tokens_sizes_and_classes(name, prefix, fixed):
    task = TaskModel(build_classifier(name))
    assert task.prefix_tokens == prefix and task.fixed_size == fixed and task.num_classes == CLASSES
    # mmpretrain's Swin refuses maps that are smaller than a window, also in its second stage; timm's pads them.
    assert task.min_size == {'mmpretrain-swin': 56, 'timm-swin': 28}.get(name, 8)
    assert task.image_spec.mean == pytest.approx((123.675, 116.28, 103.53)) and task.image_spec.channels == 3


@pytest.mark.parametrize('name', MODELS)
def test_logits_are_the_models_own_whatever_is_distilled(name):
    model = build_classifier(name)
    batch = images(name)
    with torch.no_grad():
        expected = model(batch)
        for parts in (None, ('blocks',), ('backbone',), ('head',)):
            found = TaskModel(model, parts).run(batch, with_logits=True)
            torch.testing.assert_close(found.logits, expected, rtol=0, atol=0)
            assert TaskModel(model, parts).run(batch).logits is None
        torch.testing.assert_close(TaskModel(model, ('head',)).outputs(batch)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize('name', MODELS)
def test_default_is_every_third_block(name):
    task = TaskModel(build_classifier(name))
    assert task.parts == ('blocks',)
    with torch.no_grad():
        shapes = [tuple(t.shape) for t in task.outputs(images(name))]
    if 'swin' in name:  # three blocks over two stages: the third is the last
        assert shapes == [(2, 49, 32)]
    else:
        tokens = 16 + task.prefix_tokens
        assert shapes == [(2, tokens, 32), (2, tokens, 32)]


def test_blocks_and_logits_where_both_are_asked_for():
    name = next(iter(MODELS))
    parts = TaskModel(build_classifier(name), ('blocks', 'head')).outputs(images(name))
    assert parts[-1].shape == (2, CLASSES) and len(parts) > 1


def test_a_swin_classifier_with_several_stages_gives_its_stages():
    model = build_classifier('mmpretrain-swin')
    model.backbone.out_indices = (0, 1)
    assert TaskModel(model).parts == ('backbone', 'neck')


@pytest.mark.parametrize('scope', ['backbone', 'full'])
@pytest.mark.parametrize('name', MODELS)
def test_calibration_reaches_every_quantized_layer(name, scope):
    model = build_classifier(name, quant=dict(preset='w8a8', scope=scope))
    assert spec_of(model).scope == scope
    task = TaskModel(model)
    calibrate(model, lambda: task.calibration_forward(images(name), scope))
    assert all(bool(q.calibrated) for _, q in quantizers(model))
    assert all(torch.isfinite(t).all() for t in task.outputs(images(name)))
    if scope == 'full':
        assert any('head' in row.name for row in report_of(model).layers)


@pytest.mark.parametrize('name', ['mmpretrain-vit', 'timm-vit', 'timm-swin'])
def test_the_samples_gradient_flows_through_blocks_and_logits(name):
    task = TaskModel(build_classifier(name, quant=dict(preset='w8a8', scope='full')), ('blocks', 'head'))
    set_mode(task.model, 'off')
    for index in range(2):
        batch = images(name).requires_grad_()
        output = task.outputs(batch)[index]
        (gradient,) = torch.autograd.grad(output.square().sum(), batch)
        assert float(gradient.abs().max()) > 0


def test_a_model_that_is_not_quantized_is_named():
    with pytest.raises(UnsupportedModelError, match='ImageClassifier is not quantized'):
        spec_of(build_classifier('mmpretrain-vit'))
    with pytest.raises(UnsupportedModelError, match='ImageClassifier is not quantized'):
        report_of(build_classifier('mmpretrain-vit'))


def test_what_no_classifier_has():
    from swin_models import build_backbone

    task = TaskModel(build_backbone('mmdet'))
    assert task.num_classes is None and task.prefix_tokens == 0 and task.fixed_size is None
    assert task.parts == ('backbone', 'neck')
    assert task.run(torch.randn(1, 3, 56, 56), with_logits=True).logits is None


def test_absolute_position_embedding_of_mmdets_swin_fixes_the_size():
    from swin_models import build_backbone

    task = TaskModel(build_backbone('mmdet', use_abs_pos_embed=True, pretrain_img_size=56))
    assert task.fixed_size == (56, 56)
    task.outputs(torch.randn(1, 3, 56, 56))
