"""The quantizer module: modes, calibration, and what its buffers survive."""

import copy
import pickle

import pytest
import torch

from psaq_mm.errors import DataError, NotCalibratedError, SpecError
from psaq_mm.quantization import AffineQuantizer, LogQuantizer, choose_qparams, fake_quantize, in_mode, observing


def calibrated(bits=8, **kwargs):
    quantizer = AffineQuantizer(bits, **kwargs)
    quantizer.calibrate_from(torch.tensor([-1.0, 2.0]))
    return quantizer


def test_uncalibrated_quantizer_names_itself():
    quantizer = AffineQuantizer(8)
    quantizer.name = 'layers.0.fc1.input_quantizer'
    with pytest.raises(NotCalibratedError, match='layers.0.fc1.input_quantizer.*calibrate'):
        quantizer(torch.zeros(2))
    quantizer.mode = 'off'
    x = torch.zeros(2)
    assert quantizer(x) is x


@pytest.mark.parametrize('bits', range(2, 9))
@pytest.mark.parametrize('symmetric', [True, False])
def test_observing_sets_the_range(bits, symmetric):
    quantizer = AffineQuantizer(bits, symmetric)
    x = torch.randn(10, 4, requires_grad=True)
    with observing([quantizer]):
        assert quantizer(x[:5]) is not None and quantizer.observer.ends()[0].requires_grad is False
        assert quantizer(x) is x
        (found,) = quantizer.finish(quantizer)
    assert not quantizer.calibrated, 'nothing is set yet'
    found.set()
    qparams = choose_qparams(x.min(), x.max(), bits, symmetric)
    assert torch.equal(quantizer.scale, qparams[0]) and torch.equal(quantizer.zero_point, qparams[1])
    assert torch.equal(quantizer(x), fake_quantize(x, *qparams, quantizer.qmin, quantizer.qmax))
    assert quantizer.observer is None and quantizer.mode == 'on'


def observe(quantizer, *args):
    with observing([quantizer]):
        quantizer(*args)
        for found in quantizer.finish(quantizer):
            found.set()


def test_observing_starts_over():
    quantizer = calibrated()
    observe(quantizer, torch.tensor([0.0, 255.0]))
    assert quantizer.scale == 1


def test_observing_ends_with_an_error():
    quantizers = [calibrated(), calibrated()]
    quantizers[1].mode = 'off'
    with pytest.raises(DataError), observing(quantizers):
        quantizers[0](torch.tensor([float('nan')]))
    assert [(q.mode, q.observer) for q in quantizers] == [('on', None), ('off', None)]


def test_no_data_leaves_the_range_alone():
    quantizer = calibrated()
    quantizer.name = 'head'
    scale = quantizer.scale.clone()
    with pytest.raises(NotCalibratedError, match="'head' saw no data"):
        observe(quantizer, torch.zeros(0, 5))
    assert torch.equal(quantizer.scale, scale) and quantizer.calibrated


def test_bad_data_names_the_quantizer():
    quantizer = AffineQuantizer(8)
    quantizer.name = 'head'
    with pytest.raises(DataError, match="'head'.*NaN"):
        quantizer.calibrate_from(torch.tensor([1.0, float('nan')]))
    with pytest.raises(DataError, match="'head'.*no value"):
        quantizer.calibrate_from(torch.zeros(0))


def test_valid_rows_reach_the_observer():
    quantizer = AffineQuantizer(8)
    observe(quantizer, torch.tensor([[255.0], [900.0]]), torch.tensor([True, False]))
    assert quantizer.scale == 1


@pytest.mark.parametrize('kwargs', [dict(bits=9), dict(bits=8, observer='x'), dict(bits=8, channel_axis=0)])
def test_bad_settings(kwargs):
    with pytest.raises(SpecError):
        AffineQuantizer(**kwargs)


def test_unknown_mode():
    quantizer = calibrated()
    quantizer.mode = 'offf'
    with pytest.raises(SpecError, match="'offf'"):
        quantizer(torch.zeros(1))


@pytest.mark.parametrize(
    'scale, zero_point, message',
    [
        (torch.ones(2), torch.zeros(2), 'shape'),
        (torch.tensor(0.0), torch.tensor(0), 'positive'),
        (torch.tensor(float('nan')), torch.tensor(0), 'positive'),
        (torch.tensor(1.0), torch.tensor(256), 'zero points from 0 to 255'),
    ],
)
def test_set_qparams_refuses_what_does_not_fit(scale, zero_point, message):
    with pytest.raises(DataError, match=message):
        AffineQuantizer(8).set_qparams(scale, zero_point)


def test_state_round_trip_makes_a_new_quantizer_usable():
    first, second = calibrated(), AffineQuantizer(8)
    second.load_state_dict(first.state_dict())
    x = torch.randn(100)
    assert torch.equal(first(x), second(x))
    second = AffineQuantizer(8)
    # As mmengine's loader does: each module's own method, never load_state_dict.
    second._load_from_state_dict(first.state_dict(), '', {}, True, [], [], [])
    assert torch.equal(first(x), second(x))
    second = AffineQuantizer(8)
    second.load_state_dict(first.state_dict(), assign=True)
    assert torch.equal(first(x), second(x))


def test_loading_an_uncalibrated_state_makes_it_unusable_again():
    quantizer = calibrated()
    quantizer.load_state_dict(AffineQuantizer(8).state_dict())
    with pytest.raises(NotCalibratedError):
        quantizer(torch.zeros(1))


def test_buffers_that_are_copied_into_are_seen():
    source, target = calibrated(), AffineQuantizer(8)
    for a, b in zip(target.buffers(), source.buffers()):
        a.copy_(b)
    x = torch.randn(100)
    assert torch.equal(source(x), target(x))


def test_state_of_other_bits_is_refused_and_leaves_the_quantizer_uncalibrated():
    quantizer = calibrated(8)
    with pytest.raises(RuntimeError, match=r'codes \[0, 15\].*bits of the checkpoint'):
        quantizer.load_state_dict(calibrated(4).state_dict())
    with pytest.raises(NotCalibratedError):
        quantizer(torch.zeros(1))
    assert quantizer.code_range.tolist() == [0, 255]


@pytest.mark.parametrize('copier', [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_copies_are_independent(copier):
    quantizer = calibrated()
    twin = copier(quantizer)
    x = torch.randn(10)
    assert torch.equal(twin(x), quantizer(x))
    twin.set_qparams(torch.tensor(1.0), torch.tensor(0))
    assert quantizer.scale != 1


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_ranges_stay_float32_when_the_model_is_cast(dtype):
    quantizer = calibrated()
    before = quantizer.scale.clone()
    quantizer.to(dtype)
    assert quantizer.scale.dtype == torch.float32 and torch.equal(quantizer.scale, before)
    assert quantizer.zero_point.dtype == torch.int32
    assert quantizer(torch.zeros(2, dtype=dtype)).dtype == dtype


def test_buffers_move():
    assert {b.device.type for b in calibrated().to('meta').buffers()} == {'meta'}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_device_gives_the_same_values():
    x = torch.randn(100_000) * 2
    for quantizer in (calibrated(), calibrated(4)):
        expected = quantizer(x)
        assert torch.equal(quantizer.cuda()(x.cuda()).cpu(), expected)


# ---------------------------------------------------------------------- the kind of a state
KINDS = {
    'affine': lambda: AffineQuantizer(4),
    'log2': lambda: LogQuantizer(4, 'log2'),
    'log_sqrt2': lambda: LogQuantizer(4, 'log_sqrt2'),
}


def of_kind(kind):
    quantizer = KINDS[kind]()
    quantizer.name = 'matmul_av.lhs_quantizer'
    quantizer.calibrate_from(torch.tensor([0.0, 0.2, 1.0]))
    return quantizer


@pytest.mark.parametrize(
    'loader', [lambda q, state: q.load_state_dict(state), lambda q, state: q.load_state_dict(dict(state), strict=False)]
)
@pytest.mark.parametrize('source', KINDS)
@pytest.mark.parametrize('target', KINDS)
def test_a_state_of_another_kind_is_refused_and_leaves_the_quantizer_uncalibrated(source, target, loader):
    saved, quantizer = of_kind(source), of_kind(target)
    x = torch.tensor([0.05, 0.25, 0.9])
    if source == target:
        loader(quantizer, saved.state_dict())
        assert torch.equal(quantizer(x), saved(x))
        return
    with pytest.raises(RuntimeError, match=f"by a quantizer of kind '{source}' but is '{target}' here"):
        loader(quantizer, saved.state_dict())
    with pytest.raises(NotCalibratedError):
        quantizer(x)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('assign', [False, True])
def test_states_of_before_kinds_were_told_apart_load_and_are_marked_from_then_on(kind, assign):
    saved, quantizer, x = of_kind(kind), KINDS[kind](), torch.tensor([0.05, 0.25, 0.9])
    state = saved.state_dict()
    old = {**state, 'calibrated': torch.tensor(True)}  # what it was: a bool
    assert not quantizer.load_state_dict(old, assign=assign).missing_keys
    assert torch.equal(quantizer(x), saved(x))
    assert torch.equal(quantizer.state_dict()['calibrated'], state['calibrated'])
    with pytest.raises(NotCalibratedError):
        quantizer.load_state_dict({**state, 'calibrated': torch.tensor(False)})
        quantizer(x)


def test_a_state_fits_where_code_of_before_looks_for_it():
    """The same keys and shapes, and a number that a bool takes in."""
    state = of_kind('log2').state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == dict(
        scale=(), zero_point=(), calibrated=(), code_range=(2,)
    )
    assert bool(torch.tensor(False).copy_(state['calibrated'])) and state['code_range'].tolist() == [0, 15]


@pytest.mark.parametrize('mode', ['offf', 'observe', None])
def test_a_mode_that_is_none_is_refused_before_any_quantizer_has_it(mode):
    quantizer = calibrated()
    with pytest.raises(SpecError, match=f'mode={mode!r} is not known'):
        with in_mode([quantizer], mode):
            pytest.fail('the block runs')
    assert quantizer.mode == 'on'
