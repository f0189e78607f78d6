"""What is special of backbones with unusual attention; tests/models/test_every_backbone.py has all else."""

import pytest
import torch
from backbone_builders import ROWS, build, images_of, run
from backbone_builders import tensors as tensors_of

from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models import quantize_model_
from psaq_mm.models.task import TaskModel
from psaq_mm.psaq_vit import AttentionTaps
from psaq_mm.quantization import calibrate, norm_before, set_mode
from psaq_mm.quantization.rows import valid_rows_of

pytestmark = pytest.mark.filterwarnings('ignore')


def model_of(name, **changes):
    """A row's model, quantized as ``w8a8`` and calibrated; ``changes`` of its config."""
    row = next(row for row in ROWS if row.id == name)
    row = row._replace(config=lambda config=row.config: dict(config(), **changes))
    model = build(row)
    quantize_model_(model, 'w8a8')
    calibrate(model, lambda: run(model, images_of(row)))
    return model, images_of(row)


@pytest.mark.parametrize('name', ['mmpretrain_levit', 'mmpretrain_tinyvit', 'mmpretrain_efficientformer'])
def test_a_student_in_eval_mode_learns_its_position_bias(name):
    """The libraries keep a copy of it in eval mode, which has no gradient and would not follow a change."""
    model, images = model_of(name)
    before = run(model, images)
    sum(out.square().sum() for out in tensors_of(model(images))).backward()
    biases = [(key, value) for key, value in model.named_parameters() if key.endswith('attention_biases')]
    assert biases and all(value.grad.abs().sum() > 0 for _, value in biases)
    with torch.no_grad():
        biases[0][1].add_(torch.randn_like(biases[0][1]))
    assert any(not torch.equal(a, b) for a, b in zip(run(model, images), before))


def test_padded_rows_of_tinyvits_windows_are_told():
    """A map of 8 x 8 tokens is padded to windows of 3 x 3. Padded queries take no part in ranges."""
    model, images = model_of('mmpretrain_tinyvit')
    with AttentionTaps(model).record(images) as record:
        model(images)
    valid = record[0].valid
    assert valid.sum() == 64 and valid.numel() == 81  # of one picture
    assert all(tap.valid is None for tap in record[1:])  # 4 x 4 tokens are one window
    attention, seen = model.stages[1].blocks[0].attn, []
    attention.matmul_qk.register_forward_pre_hook(lambda module, inputs: seen.append(valid_rows_of(*inputs[::2])))
    model(images)
    assert seen[0].shape == (len(images) * 64 * attention.num_heads, attention.key_dim)


def test_reentrant_checkpointing_of_tinyvit_is_refused():
    with pytest.raises(UnsupportedModelError, match='build it with use_checkpoint=False'):
        model_of('mmpretrain_tinyvit', use_checkpoint=True)


def test_norms_that_the_stream_of_class_tokens_reads_are_not_folded():
    model, _ = model_of('mmpretrain_xcit')
    block = model.ca_layers[0]
    layers = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
    assert len(layers) == 6 and not any(norm_before(layer) for layer in layers)
    assert norm_before(model.xca_layers[0].attn.qkv) is model.xca_layers[0].norm1


@pytest.mark.parametrize('name', ['mmpretrain_xcit', 'mmpretrain_xcit_of_small_patches', 'mmpretrain_poolformer'])
def test_the_smallest_pictures_run(name):
    model, _ = model_of(name)
    set_mode(model, 'off')
    side = TaskModel(model).min_size
    assert all(out.numel() and out.isfinite().all() for out in run(model, torch.randn(1, 3, side, side)))
