# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Ranges and first codes of a small student, with PyTorch alone and without synthesis."""

import subprocess
import sys

import pytest
import torch
from toys import ToyTask, ToyTransformer

from psaq_mm.calibration import Calibration, CalibrationSettings, check_size, take_pictures
from psaq_mm.errors import ConfigError
from psaq_mm.pictures import ImageSpec, PinkNoise, SampleStream
from psaq_mm.quantization import calibrate, quantize_, quantizers
from psaq_mm.quantization.primitives import fake_quantize

SIZE, SPEC = (8, 12), ImageSpec((120.0,) * 3, (60.0,) * 3)


def pictures(count=4):
    return take_pictures(SampleStream(PinkNoise(), SIZE, SPEC, 5), count)


def calibration_of(quant='w4a8', seed=5, **settings):
    student = ToyTransformer()
    quantize_(student, quant)
    settings = CalibrationSettings(**{**dict(batch_size=3, calibration_samples=4), **settings})
    return Calibration(ToyTask(student, SPEC), settings, random=torch.Generator().manual_seed(seed))


def calibrated(**settings):
    calibration = calibration_of(**settings)
    calibration.run(pictures())
    return calibration


def ranges_of(calibration):
    return {
        name: torch.cat([quantizer.scale.flatten(), quantizer.zero_point.flatten()])
        for name, quantizer in quantizers(calibration.student.model)
    }


def equal_ranges(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_calibration_needs_no_synthesis():
    code = 'import sys, psaq_mm.calibration; print([name for name in sys.modules if "psaq_vit" in name])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


def test_ranges_are_those_of_all_pictures_and_weights_stay():
    calibration, wanted = calibrated(), calibration_of()
    assert calibration.student.calls == 2, 'batches of 3 and 1'
    calibrate(wanted.student.model, lambda: wanted.student.model(pictures()))
    assert equal_ranges(ranges_of(calibration), ranges_of(wanted)) and not calibration.rounded
    for one, other in zip(calibration.student.model.parameters(), wanted.student.model.parameters()):
        assert torch.equal(one, other), 'nearest codes leave the weights'


def test_ranges_are_observed_anew_on_other_pictures():
    calibration = calibrated()
    before = ranges_of(calibration)
    calibration.observe(2 * pictures())
    assert not equal_ranges(before, ranges_of(calibration))
    calibration.observe(pictures())
    assert equal_ranges(before, ranges_of(calibration)), 'nothing is left of the pictures before'


@pytest.mark.parametrize('rounding', ['compensated', 'guided'])
def test_weights_are_rounded_on_the_pictures(rounding):
    calibration, nearest = calibrated(rounding=rounding), calibrated()
    assert equal_ranges(ranges_of(calibration), ranges_of(nearest)), 'scales stay'
    rounded = {layer.name for layer in calibration.rounded if not layer.reason}
    assert {'embed', 'head', 'blocks.0.attn.qkv'} <= rounded
    for name in rounded:
        layer, plain = (c.student.model.get_submodule(name) for c in (calibration, nearest))
        quantizer = layer.weight_quantizer
        codes = fake_quantize(layer.weight, quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax, 0)
        torch.testing.assert_close(layer.weight, codes, rtol=0, atol=1e-6)
        assert not torch.equal(layer.quantized_weight(), plain.quantized_weight())
    assert all(p.requires_grad and p.grad is None for p in calibration.student.model.parameters())


def test_guided_rounding_leaves_a_frozen_parameter_frozen():
    calibration = calibration_of(rounding='guided')
    parameter = next(calibration.student.model.parameters()).requires_grad_(False)
    calibration.run(pictures())
    assert not parameter.requires_grad


@pytest.mark.parametrize('quant, same', [('w8a8', 'compensated'), ('w4a8', 'guided')])
def test_auto_rounds_by_the_bits_of_the_weights(quant, same):
    weights = {
        rounding: calibrated(quant=quant, rounding=rounding).student.model.blocks[0].attn.qkv.weight
        for rounding in ('auto', 'compensated', 'guided')
    }
    assert torch.equal(weights['auto'], weights[same])
    assert not torch.equal(weights['guided'], weights['compensated'])


def test_importance_has_one_value_a_row_and_depends_on_the_generator_alone():
    one, again, other = (calibrated(seed=seed) for seed in (5, 5, 6))
    rows = [calibration.importance(pictures()) for calibration in (one, again, other)]
    tokens = 1 + (SIZE[0] // 4) * (SIZE[1] // 4)
    assert len(rows[0]['blocks.0.attn.qkv']) == 4 * tokens
    assert all(torch.equal(rows[0][name], rows[1][name]) for name in rows[0])
    assert any(not torch.equal(rows[0][name], rows[2][name]) for name in rows[0])


@pytest.mark.parametrize(
    'settings, match',
    [
        (dict(rounding='up'), "^rounding='up' is not known"),
        (dict(prior_rows=0.0), 'prior_rows=0.0 must be positive'),
        (dict(batch_size=0), 'batch_size=0'),
        (dict(calibration_samples=0), 'calibration_samples=0'),
        (dict(prior_row=32), 'prior_row is no setting: did you mean prior_rows'),
    ],
)
def test_settings_that_do_not_go_are_named(settings, match):
    with pytest.raises(ConfigError, match=match):
        CalibrationSettings.from_dict(settings)


def test_a_size_that_does_not_fit_the_network_is_named():
    task = ToyTask(ToyTransformer(), SPEC)
    check_size(task, SIZE)
    with pytest.raises(ConfigError, match=r'^size=\(2, 12\) is smaller than one attention window of 4 pixels'):
        check_size(task, (2, 12))
    task.fixed_size = (8, 8)
    with pytest.raises(ConfigError, match=r'does not fit the position embedding of the model: set size=\(8, 8\)'):
        check_size(task, SIZE)
