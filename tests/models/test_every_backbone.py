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

NEAR = 0.05
"""Greatest relative error of an output at W8A8; 0.004 to 0.02 are usual. One activation quantizer with a tenth of its
range is beyond it."""


def quantized(row: Row, spec, seed: int = 0):
    """Quantized, calibrated on noise."""
    model = build(row, seed)
    quantize_model_(model, spec)
    calibrate(model, lambda: run(model, images_of(row)))
    return model


@pytest.fixture(scope='module', params=ROWS, ids=lambda row: row.id)
def row(request):
    return request.param


@pytest.fixture(scope='module')
def images(row):
    return images_of(row)


@pytest.fixture(scope='module')
def expected(row, images):
    """What the library's model gives for the images."""
    return run(unfuse(build(row)), images)


@pytest.fixture(scope='module')
def student(row):
    """Quantized to W8A8 and calibrated, once for all tests of a row: they leave it as they found it."""
    return quantized(row, 'w8a8')


def relative_error(outputs, expected) -> float:
    """The worst output's."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(outputs, expected, strict=True))


def works(row: Row, cell: str) -> bool:
    """Whether a cell declares that something works."""
    return not isinstance(row.cells[cell], str)


def test_off_it_is_the_librarys_model_and_at_8_bits_near_it(row, student, images, expected):
    exact = dict(rtol=0, atol=0) if row.exact else dict(rtol=1e-6, atol=1e-6)
    with in_mode([quantizer for _, quantizer in quantizers(student)], 'off'):
        found = run(student, images)
    for out, library in zip(found, expected, strict=True):
        torch.testing.assert_close(out, library, **exact)
    assert 0 < relative_error(run(student, images), expected) < NEAR


def test_a_broken_quantizer_is_not_near(student, images, expected):
    """The bound of the test above would be none if this passed."""
    last = [quantizer for name, quantizer in quantizers(student) if name.endswith('input_quantizer')][-1]
    scale = last.scale.clone()
    with torch.no_grad():
        last.scale.mul_(0.1)
    found = run(student, images)
    with torch.no_grad():
        last.scale.copy_(scale)
    assert relative_error(found, expected) > NEAR


def test_saved_and_loaded_it_gives_the_same(row, images, tmp_path):
    model = quantized(row, 'psaq_v1_w8a8')
    torch.save(model.state_dict(), tmp_path / 'student.pth')
    fresh = build(row, seed=1)
    quantize_model_(fresh, 'psaq_v1_w8a8')
    # Not strict, as MMEngine loads: the model itself refuses what does not fit. mmpretrain's Swin V2 drops its indices.
    fresh.load_state_dict(torch.load(tmp_path / 'student.pth', weights_only=True), strict=False)
    for out, wanted in zip(run(fresh, images), run(model, images), strict=True):
        torch.testing.assert_close(out, wanted, rtol=0, atol=0)


def test_folding(row, images, expected):
    model = quantized(row, 'repq_w4a8')
    folded = [m for m in model.modules() if isinstance(getattr(m, 'input_quantizer', None), ReparameterizedQuantizer)]
    said = capabilities(model)['folding']
    assert said.number == len(folded)
    if works(row, 'folding'):
        assert len(folded) == row.cells['folding']
        assert all(layer.input_quantizer.fill.abs().max() > 0 for layer in folded)
    else:
        assert not folded and row.cells['folding'] in said.text
    with in_mode([quantizer for _, quantizer in quantizers(model)], 'off'):
        for out, library in zip(run(model, images), expected, strict=True):
            torch.testing.assert_close(out, library, rtol=1e-4, atol=1e-4)


def test_rotation(row, images):
    model = build(row, inside=True)
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


def test_patch_similarity(row, student):
    images = images_of(row).requires_grad_()
    said = capabilities(student)['similarity']
    if not works(row, 'similarity'):
        with pytest.raises(UnsupportedModelError, match=row.cells['similarity']):
            AttentionTaps(student)
        assert said.number == 0
        return
    with AttentionTaps(student).record(images) as record:
        student(images)
    assert len(record) == row.cells['similarity'] == said.number
    assert all(len(tap.tokens) == len(images) * tap.groups_per_image for tap in record)
    sum((tap.tokens**2).mean() for tap in record).backward()
    student.zero_grad()
    assert images.grad.isfinite().all() and (images.grad != 0).any()


def test_export_and_dynamic_size(row, student, tmp_path):
    """A graph that takes several sizes is verified at two of them, in place of one of a single size."""
    model, images = student, images_of(row, batch=1)
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
