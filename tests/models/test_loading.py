"""What is checked when weights reach a quantized model, and what the library may still change about them."""

import pickle

import pytest
import torch

pytest.importorskip('mmpretrain')
from mmengine.registry import MODELS, init_default_scope  # noqa: E402

from psaq_mm.errors import CheckpointError  # noqa: E402
from psaq_mm.quantization import set_mode  # noqa: E402


def classifier(size, quant=None, **backbone):
    init_default_scope('mmpretrain')
    arch = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
    model = dict(
        type='ImageClassifier',
        backbone=dict(type='VisionTransformer', arch=arch, img_size=size, patch_size=8, **backbone),
        head=dict(type='VisionTransformerClsHead', num_classes=3, in_channels=16),
    )
    if quant:
        model = dict(model, type='psaq_mm.Quantized', base_type='ImageClassifier', quant=quant)
    torch.manual_seed(0)
    return MODELS.build(model).eval()


def test_positions_of_another_image_size_are_resized_by_the_library():
    small, large = classifier(32), classifier(48, 'w8a8')
    large.load_state_dict(small.state_dict(), strict=False)
    wanted = classifier(48)
    wanted.load_state_dict(small.state_dict())
    assert large.backbone.pos_embed.shape[1] == 37
    set_mode(large, 'off')
    images = torch.randn(1, 3, 48, 48)
    assert torch.allclose(large(images)[0], wanted(images)[0], atol=1e-5)


def test_positions_of_another_width_are_refused():
    weights = classifier(32).state_dict()
    weights['backbone.pos_embed'] = torch.zeros(1, 17, 24)
    with pytest.raises(CheckpointError, match='pos_embed is .*24.* in the checkpoint'):
        classifier(48, 'w8a8').load_state_dict(weights, strict=False)


def test_a_quantized_model_can_be_pickled_and_still_checks_what_it_loads():
    model = pickle.loads(pickle.dumps(classifier(32, 'repq_w4a4')))
    with pytest.raises(CheckpointError, match='lacks'):
        model.load_state_dict({'backbone.pos_embed': model.backbone.pos_embed}, strict=False)
