"""Student steps under autocast, and steps made of several batches."""

import pytest
import torch
from classifier_models import SIZES, build_classifier
from tiny_classifier import ClassifierProject

from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.engine.checkpoint import read_checkpoint
from psaq_mm.engine.hooks.data_free_quant_hook import checkpoints_in
from psaq_mm.quantization import (
    AffineQuantizer,
    LogQuantizer,
    calibrate,
    dequantize,
    log_dequantize,
    log_quantize,
    quantize,
    quantizers,
)

pytestmark = pytest.mark.filterwarnings('ignore')

DFQ = dict(size=(32, 32), evolve_every=0, calibration_samples=4, augment=True)


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    pytest.importorskip('mmpretrain')
    return ClassifierProject(tmp_path_factory.mktemp('amp'), per_class=1)


def run(project, name, *options, quant='w8a8', **dfq):
    """The student and the losses of its steps."""
    work_dir = project.folder / name
    config = project.config(quant, f'{name}.py', **{**DFQ, **dfq})
    assert dfq_train([str(config), '--work-dir', str(work_dir), *options]) == 0
    history = read_checkpoint(checkpoints_in(work_dir)[-1])['message_hub']['log_scalars']['train/loss']
    return read_checkpoint(work_dir / 'student.pth'), [float(v) for v in history.data[0]]


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12))


# ---------------------------------------------------------------------- autocast
@pytest.fixture(scope='module')
def float32(project):
    return run(project, 'float32')


def test_a_student_learns_under_bfloat16_and_keeps_its_ranges(project, float32):
    (plain, plain_losses), (student, losses) = float32, run(project, 'bfloat16', amp='bfloat16')
    assert student['meta']['psaq_mm']['dfq']['amp'] == 'bfloat16'
    # At 8 bits the discrepancy is not much more than bfloat16's own rounding, which is added to it.
    assert losses == pytest.approx(plain_losses, rel=0.3) and losses != plain_losses
    moved = 0
    for key, value in plain['state_dict'].items():
        found = student['state_dict'][key]
        assert found.dtype == value.dtype, key
        if key.endswith(('.scale', '.zero_point')) and 'weight_quantizer' not in key:
            assert torch.equal(found, value), key  # calibrated in float32
        moved += not torch.equal(found, value)
    assert moved


def test_the_command_lines_option_is_the_same_run(project, tmp_path):
    by_config, _ = run(project, 'by_config', amp='bfloat16', iters=1)
    by_option, _ = run(project, 'by_option', '--amp', iters=1)
    assert by_option['meta']['psaq_mm']['dfq']['amp'] == 'bfloat16'
    assert all(torch.equal(by_option['state_dict'][k], v) for k, v in by_config['state_dict'].items())


@pytest.mark.parametrize('amp, match', [('half', "dfq.amp='half' is not known"), ('float16', 'needs a GPU')])
def test_types_that_do_not_go(project, amp, match, capsys):
    if amp == 'float16' and torch.cuda.is_available():
        pytest.skip('float16 goes on a GPU')
    config = project.config('w8a8', f'{amp}.py', **DFQ, amp=amp)
    assert dfq_train([str(config), '--work-dir', str(project.folder / amp)]) == 1
    assert match in capsys.readouterr().err


def values():
    return torch.randn(64, 48, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_scales_and_codes_are_computed_in_float32_under_autocast(dtype):
    affine, log = AffineQuantizer(bits=8), LogQuantizer(bits=4)
    x, positive = values().to(dtype), values().softmax(1).to(dtype)
    affine.calibrate_from(x.float())
    log.calibrate_from(positive.float())
    with torch.autocast('cpu', torch.bfloat16):
        again = AffineQuantizer(bits=8)
        again.calibrate_from(x)
        found, found_log = affine(x.requires_grad_()), log(positive.requires_grad_())
        codes = quantize(x, affine.scale, affine.zero_point, affine.qmin, affine.qmax)
    assert (
        again.scale.dtype == torch.float32
        and torch.equal(again.scale, affine.scale)
        and torch.equal(again.zero_point, affine.zero_point)
    )
    expected = quantize(x.float(), affine.scale, affine.zero_point, affine.qmin, affine.qmax)
    assert torch.equal(codes, expected)
    assert torch.equal(found, dequantize(expected, affine.scale, affine.zero_point).to(dtype))
    logs = log_quantize(positive.float(), log.scale, 4, log.base)
    assert torch.equal(found_log, log_dequantize(logs, log.scale, 4, log.base).to(dtype))


def test_weights_are_quantized_from_float32_in_a_model_under_autocast():
    model = build_classifier('timm-vit', quant=dict(preset='w4a8', scope='full')).eval()
    images = torch.randn(2, 3, *(SIZES['timm-vit'],) * 2, generator=torch.Generator().manual_seed(0))
    calibrate(model, lambda: model(images))
    seen = {}

    def hook(name):
        return lambda quantizer, args, output: seen.update({name: (args[0].detach(), output.detach())})

    for name, quantizer in quantizers(model):
        quantizer.register_forward_hook(hook(name))
    model.requires_grad_(True)
    with torch.autocast('cpu', torch.bfloat16):
        model(images).float().sum().backward()
    states = model.state_dict()
    checked = 0
    for name, quantizer in quantizers(model):
        assert quantizer.scale.dtype == torch.float32
        given, out = seen.get(name, (None, None))
        if given is None:
            continue
        if name.endswith('weight_quantizer'):
            assert given.dtype == out.dtype == torch.float32, name
        codes = quantize(
            given.float(), quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax, quantizer.channel_axis
        )
        assert torch.equal(
            out, dequantize(codes, quantizer.scale, quantizer.zero_point, quantizer.channel_axis).to(given.dtype)
        ), name
        checked += given.dtype == torch.bfloat16
    assert checked > 4, 'no activation came in bfloat16: autocast did nothing'
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None) and states


# ---------------------------------------------------------------------- accumulation
def test_a_step_of_two_batches_is_that_of_one_twice_as_large(project, float32):
    (large, large_losses), (_, small_losses) = run(project, 'large', batch_size=4), float32
    found, losses = run(project, 'accumulated', batch_size=2, accumulative_counts=2)
    assert found['meta']['psaq_mm']['dfq']['accumulative_counts'] == 2
    assert (
        losses == pytest.approx(large_losses, rel=1e-4)
        and len(losses) == 4
        and losses != pytest.approx(small_losses, rel=1e-3)
    )
    for key, value in large['state_dict'].items():
        assert relative(found['state_dict'][key], value) <= 1e-4, key


def test_the_wrappers_own_key_counts_too(project):
    """In a config that is in data-free form already, as a run leaves it in its work dir."""
    from mmengine.config import Config

    from psaq_mm.engine.config import to_data_free
    from psaq_mm.engine.running import data_free_runner

    config = to_data_free(Config.fromfile(project.config('w8a8', 'wrapper.py', **DFQ, batch_size=2)))
    config.work_dir, config.optim_wrapper.accumulative_counts = str(project.folder / 'wrapper'), 2
    config.launcher = 'none'
    data_free_runner(config).train()
    expected, _ = run(project, 'by_dfq', batch_size=2, accumulative_counts=2)
    found = read_checkpoint(project.folder / 'wrapper' / 'student.pth')
    assert found['meta']['psaq_mm']['dfq']['accumulative_counts'] == 2
    assert all(torch.equal(found['state_dict'][k], v) for k, v in expected['state_dict'].items())


def test_no_batch_at_all(project, capsys):
    config = project.config('w8a8', 'none.py', **DFQ, accumulative_counts=0)
    assert dfq_train([str(config), '--work-dir', str(project.folder / 'none')]) == 1
    assert 'dfq.accumulative_counts=0' in capsys.readouterr().err


def test_float16_is_decided_where_the_run_is(project, monkeypatch):
    """And not where its config was written, which may be a computer without a GPU."""
    from mmengine.config import Config
    from mmengine.optim import OptimWrapper
    from mmengine.registry import OPTIM_WRAPPERS

    import psaq_mm.engine.optim as optim
    from psaq_mm.engine.config import to_data_free

    config = to_data_free(Config.fromfile(project.config('w8a8', 'float16.py', **DFQ, amp='float16')))
    written = Config.fromstring(config.pretty_text, '.py').optim_wrapper
    made = {}

    class Scaled:  # AmpOptimWrapper itself is refused without a GPU
        def __init__(self, **settings):
            made.update(settings)

    monkeypatch.setattr(optim, 'AmpOptimWrapper', Scaled)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    settings = dict(type=written.type, clip_grad=written.clip_grad, optimizer=optimizer)
    monkeypatch.setattr(optim, 'get_device', lambda: 'cpu')
    assert type(OPTIM_WRAPPERS.build(dict(settings))) is OptimWrapper and not made
    monkeypatch.setattr(optim, 'get_device', lambda: 'cuda')
    assert type(OPTIM_WRAPPERS.build(dict(settings))) is Scaled
    assert made['dtype'] == 'float16' and made['optimizer'] is optimizer
