"""A quantized model on another device, emulated or a GPU, is the one on the CPU; its codes are, its sums may be added
up in another order."""

import copy

import pytest
import torch
from classifier_models import SIZES, build_classifier

from psaq_mm.models import TaskModel, rotate_model_
from psaq_mm.quantization import calibrate, quantizers, round_weights_

pytestmark = pytest.mark.filterwarnings('ignore')


def close(found, expected, device, share=1e-3):
    """Equal but for ties of rounding, which sums in another order move by a step."""
    assert found.device.type == device.type
    assert float((found.cpu() - expected).norm() / expected.norm()) <= share


@pytest.mark.parametrize('name', ['mmpretrain-swin', 'timm-vit'])
def test_outputs_ranges_and_codes_of_a_classifier(device, name):
    images = torch.randn(2, 3, SIZES[name], SIZES[name], generator=torch.Generator().manual_seed(0))
    here = build_classifier(name, quant=dict(preset='w8a8', scope='full'))
    there = copy.deepcopy(here).to(device)
    for model, batch in ((here, images), (there, images.to(device))):
        task = TaskModel(model)
        calibrate(model, lambda: task.calibration_forward(batch, 'full'))
        round_weights_(model, lambda: task.calibration_forward(batch, 'full'))
    for (key, one), (_, other) in zip(quantizers(here), quantizers(there)):
        torch.testing.assert_close(other.scale.cpu(), one.scale, rtol=1e-3, atol=0, msg=key)
    with torch.no_grad():
        close(TaskModel(there).outputs(images.to(device))[-1], TaskModel(here).outputs(images)[-1], device, 0.05)


def test_a_rotated_model_is_the_same_function(device):
    model = build_classifier('mmpretrain-vit', quant='w8a8')
    other = copy.deepcopy(model).to(device)
    rotate_model_(model, (32, 32), 3)
    rotate_model_(other, (32, 32), 3)
    for (key, one), (_, two) in zip(model.named_parameters(), other.named_parameters()):
        assert two.device.type == device.type
        torch.testing.assert_close(two.detach().cpu(), one.detach(), rtol=1e-4, atol=1e-5, msg=key)
