"""Models of the library transformers through psaq_mm.quantize: small ones with random weights."""

import numpy as np
import pytest
import torch

import psaq_mm
from psaq_mm.errors import ConfigError, UnsupportedModelError
from psaq_mm.quantization import set_mode

transformers = pytest.importorskip('transformers', reason='pip install psaq_mm[transformers]')

KNOWN = dict(mean=[127.5] * 3, std=[127.5] * 3, method='fast')
VIT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, num_labels=5)
MODELS = {
    'ViT': ('ViTForImageClassification', 'ViTConfig', dict(VIT, intermediate_size=64)),
    'DeiT': ('DeiTForImageClassificationWithTeacher', 'DeiTConfig', dict(VIT, intermediate_size=64)),
    'DINOv2': ('Dinov2ForImageClassification', 'Dinov2Config', dict(VIT, mlp_ratio=2)),
    'Swin': (
        'SwinForImageClassification',
        'SwinConfig',
        dict(image_size=64, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[1, 2], window_size=7, num_labels=5),
    ),
    'SegFormer': (
        'SegformerForSemanticSegmentation',
        'SegformerConfig',
        dict(
            hidden_sizes=[16, 32],
            depths=[1, 1],
            num_encoder_blocks=2,
            sr_ratios=[4, 1],
            num_attention_heads=[1, 2],
            patch_sizes=[7, 3],
            strides=[4, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
            num_labels=5,
            image_size=64,
        ),
    ),
}


def build(name, **changes):
    title, config, settings = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**{**settings, **changes})
    eager = dict(attn_implementation='eager') if name in ('ViT', 'DeiT', 'DINOv2') else {}
    model = getattr(transformers, title)._from_config(config, **eager)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.mark.parametrize('name', MODELS)
def test_a_student_of_transformers(name, tmp_path):
    """Off it is the model to the last bit; exported, its codes are those of the student."""
    pytest.importorskip('onnxruntime')
    model = build(name)
    side = model.config.image_size
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    wanted = model(images).logits
    student = psaq_mm.quantize(model, quant='w8a8', calibration_samples=2, rotate=False, rounding='nearest', **KNOWN)
    layers = {row.name for row in student.quant_report.layers}
    assert type(student) is type(model) and sum('attention' in layer for layer in layers) >= 2 * 4
    assert not torch.equal(student(images).logits, wanted)
    psaq_mm.export(student, tmp_path / 'deployed', verify=True, runtime='onnxruntime')
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    [ours] = psaq_mm.predict(student, picture)
    [theirs] = psaq_mm.predict(tmp_path / 'deployed', picture, runtime='onnxruntime')
    assert ours.task == theirs.task and ours.size == (40, 50)
    # The codes are compared above; a code that falls to the other side of a rounding shows in a model this small.
    assert np.allclose(ours.logits, theirs.logits, atol=0.03 * np.abs(ours.logits).max())
    psaq_mm.save(student, tmp_path / 'student.pth')
    loaded = psaq_mm.load(tmp_path / 'student.pth', model=model)
    assert torch.equal(loaded(images).logits, student(images).logits)
    set_mode(student, 'off')
    assert torch.equal(student(images).logits, wanted)


def test_what_is_not_known_or_not_supported_is_said():
    with pytest.raises(ConfigError, match='255 times image_mean and image_std of its image processor'):
        psaq_mm.quantize(build('ViT'))
    with pytest.raises(UnsupportedModelError, match='output_attentions=True'):
        psaq_mm.quantize(build('ViT', output_attentions=True), **KNOWN)
    beit = transformers.BeitForImageClassification(
        transformers.BeitConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    )
    with pytest.raises(UnsupportedModelError, match='BeitModel is not supported: use one of'):
        psaq_mm.quantize(beit, **KNOWN)


def test_names_of_classes_come_from_the_config():
    names = ['bolt', 'nut', 'rivet', 'screw', 'washer']
    model = build('ViT', id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    student = psaq_mm.quantize(model, calibration_samples=1, **KNOWN)
    [prediction] = psaq_mm.predict(student, np.zeros((8, 8, 3), np.uint8))
    assert sorted(prediction.names) == names
