"""Every supported backbone of every library, as tests/backbone_builders.py builds and declares it.

What a row declares to work is exercised; what it declares to be refused is refused with the declared words.
"""

import pytest
import torch
from backbone_builders import ROWS, Row, build, images_of, run, unfuse

from psaq_mm.deploy.export import export_model
from psaq_mm.deploy.verify import verify
from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models import quantize_model_, rotate_model_
from psaq_mm.models.capabilities import capabilities
from psaq_mm.psaq_vit import AttentionTaps
from psaq_mm.quantization import ReparameterizedQuantizer, calibrate, in_mode, quantizers, set_mode

pytestmark = pytest.mark.filterwarnings('ignore')

EVERY = pytest.mark.parametrize('row', ROWS, ids=lambda row: row.id)
NEAR = 0.05
"""Greatest relative error of an output at W8A8; 0.004 to 0.02 are usual. One activation quantizer with a tenth of its
range is beyond it."""


def quantized(row: Row, spec, seed: int = 0):
    """Quantized, calibrated on noise."""
    model = build(row, seed)
    quantize_model_(model, spec)
    calibrate(model, lambda: run(model, images_of(row)))
    return model


def relative_error(outputs, expected) -> float:
    """The worst output's."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(outputs, expected, strict=True))


def works(row: Row, cell: str) -> bool:
    """Whether a cell declares that something works."""
    return not isinstance(row.cells[cell], str)


@EVERY
def test_off_it_is_the_librarys_model_and_at_8_bits_near_it(row):
    plain, images = unfuse(build(row)), images_of(row)
    model = build(row)
    quantize_model_(model, 'w8a8')
    set_mode(model, 'off')
    expected = run(plain, images)
    exact = dict(rtol=0, atol=0) if row.exact else dict(rtol=1e-6, atol=1e-6)
    for out, library in zip(run(model, images), expected, strict=True):
        torch.testing.assert_close(out, library, **exact)
    set_mode(model, 'on')
    calibrate(model, lambda: run(model, images))
    assert 0 < relative_error(run(model, images), expected) < NEAR


@EVERY
def test_a_broken_quantizer_is_not_near(row):
    """The bound of the test above would be none if this passed."""
    images = images_of(row)
    expected = run(unfuse(build(row)), images)
    model = quantized(row, 'w8a8')
    inputs = [quantizer for name, quantizer in quantizers(model) if name.endswith('input_quantizer')]
    with torch.no_grad():
        inputs[-1].scale.mul_(0.1)
    assert relative_error(run(model, images), expected) > NEAR


@EVERY
def test_saved_and_loaded_it_gives_the_same(row, tmp_path):
    model = quantized(row, 'psaq_v1_w8a8')
    torch.save(model.state_dict(), tmp_path / 'student.pth')
    fresh = build(row, seed=1)
    quantize_model_(fresh, 'psaq_v1_w8a8')
    # Not strict, as MMEngine loads: the model itself refuses what does not fit. mmpretrain's Swin V2 drops its indices.
    fresh.load_state_dict(torch.load(tmp_path / 'student.pth', weights_only=True), strict=False)
    for out, expected in zip(run(fresh, images_of(row)), run(model, images_of(row)), strict=True):
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


@EVERY
def test_folding(row):
    model, images = quantized(row, 'repq_w4a8'), images_of(row)
    folded = [m for m in model.modules() if isinstance(getattr(m, 'input_quantizer', None), ReparameterizedQuantizer)]
    said = capabilities(model)['folding']
    assert said.number == len(folded)
    if works(row, 'folding'):
        assert len(folded) == row.cells['folding']
        assert all(layer.input_quantizer.fill.abs().max() > 0 for layer in folded)
    else:
        assert not folded and row.cells['folding'] in said.text
    with in_mode([quantizer for _, quantizer in quantizers(model)], 'off'):
        for out, expected in zip(run(model, images), run(build(row), images), strict=True):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@EVERY
def test_rotation(row):
    model, images = build(row, inside=True), images_of(row)
    quantize_model_(model, 'w8a8')
    set_mode(model, 'off')
    before = run(model, images)
    said = capabilities(model)['rotation']
    report = rotate_model_(model, row.size)
    assert relative_error(run(model, images), before) < 1e-3
    assert said.number == len(report.streams)
    if works(row, 'rotation'):
        assert len(report.streams) == row.cells['rotation']
    else:
        assert not report.streams and any(row.cells['rotation'] in reason for reason in report.left)
        assert row.cells['rotation'] in said.text


@EVERY
def test_patch_similarity(row):
    model, images = quantized(row, 'w8a8'), images_of(row).requires_grad_()
    said = capabilities(model)['similarity']
    if not works(row, 'similarity'):
        with pytest.raises(UnsupportedModelError, match=row.cells['similarity']):
            AttentionTaps(model)
        assert said.number == 0
        return
    with AttentionTaps(model).record(images) as record:
        model(images)
    assert len(record) == row.cells['similarity'] == said.number
    assert all(len(tap.tokens) == len(images) * tap.groups_per_image for tap in record)
    sum((tap.tokens**2).mean() for tap in record).backward()
    assert images.grad.isfinite().all() and (images.grad != 0).any()


@pytest.mark.parametrize(
    'row', [pytest.param(row, id=row.id, marks=[pytest.mark.slow] if row.build_of else []) for row in ROWS]
)  # special builds of a backbone export as the usual one does, and exporting is what takes time here
def test_export_and_dynamic_size(row, tmp_path):
    """A graph that takes several sizes is verified at two of them, in place of one of a single size."""
    model, images = quantized(row, 'w8a8'), images_of(row, batch=1)
    height, width = (-(-side // 32) * 32 for side in row.size)
    assert capabilities(model)['dynamic'].number == works(row, 'dynamic')
    if works(row, 'dynamic'):
        exported = export_model(model, tmp_path / 'dynamic', [row.size], dynamic=True)
        pictures = [torch.randn(1, 3, *size) for size in ((height, width), (height + 32, width))]
    else:
        with pytest.raises(UnsupportedModelError, match=row.cells['dynamic']):
            export_model(model, tmp_path / 'dynamic', [row.size], dynamic=True)
        if not works(row, 'export'):
            with pytest.raises(UnsupportedModelError, match=row.cells['export']):
                export_model(model, tmp_path / 'fixed', [row.size])
            return
        exported, pictures = export_model(model, tmp_path / 'fixed', [row.size]), [images]
    for picture in pictures:
        assert verify(model, exported, picture, 'onnxruntime').good
