"""Weights whose rounding errors make up for one another."""

import math

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from psaq_mm.errors import DataError
from psaq_mm.quantization import calibrate, full_precision_weights, quantize_, quantizers, rounding, set_mode
from psaq_mm.quantization.primitives import fake_quantize
from psaq_mm.quantization.rounding import BLOCK, compensated_rounding, round_weights_


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that operations make inside the ``with`` block.

    Attributes:
        peak: Most that lived at a time.
        largest: Of the largest one that each operation made, by name.
    """

    def __init__(self):
        super().__init__()
        self.peak, self.largest = 0, {}
        self.live = {}  # by storage: a weak reference and its bytes; 0 where it was there before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.live = {key: value for key, value in self.live.items() if not value[0].expired()}
        for tensor in self.tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            self.live.setdefault(storage._cdata, (StorageWeakRef(storage), 0))
        out = func(*args, **(kwargs or {}))
        for tensor in self.tensors(out):
            storage = tensor.untyped_storage()
            self.live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
            self.largest[func.name()] = max(self.largest.get(func.name(), 0), tensor.numel() * tensor.element_size())
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out

    @staticmethod
    def tensors(tree):
        return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def correlated(rows, inputs, seed=0):
    """Inputs of which neighbours say nearly the same."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(rows, max(inputs // 4, 1), generator=generator)
    return few @ torch.randn(few.shape[1], inputs, generator=generator) + 0.1 * torch.randn(
        rows, inputs, generator=generator
    )


def halves(columns):
    return (columns * 2).round() / 2


def output_error(x, weight, rounded):
    return float((x @ (rounded - weight).t()).pow(2).sum())


@pytest.mark.parametrize('inputs', [1, 7, 128, 300])
def test_the_outputs_change_less_than_by_the_nearest_codes(inputs):
    x, weight = correlated(2000, inputs), torch.randn(16, inputs, generator=torch.Generator().manual_seed(1))
    rounded = compensated_rounding(weight, x.t() @ x, halves, damping=1e-3)
    assert torch.equal(rounded, halves(rounded))
    nearest = output_error(x, weight, halves(weight))
    assert output_error(x, weight, rounded) <= nearest * (1.0 if inputs == 1 else 0.7)


def test_uncorrelated_inputs_leave_nothing_to_make_up_for():
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    energy = torch.linspace(1.0, 3.0, 40)
    assert torch.equal(compensated_rounding(weight, torch.diag(energy), halves), halves(weight))


def test_much_damping_is_rounding_to_the_nearest():
    x, weight = correlated(500, 24), torch.randn(8, 24, generator=torch.Generator().manual_seed(1))
    gram = x.t() @ x
    assert not torch.equal(compensated_rounding(weight, gram, halves, damping=1e-3), halves(weight))
    assert torch.equal(compensated_rounding(weight, gram, halves, damping=1e9), halves(weight))


def test_two_equal_inputs_share_their_error():
    # 0.3 + 0.3 is nearer to 0.5 + 0 than to 0.5 + 0.5.
    rounded = compensated_rounding(torch.tensor([[0.3, 0.3]]), torch.ones(2, 2), halves, damping=1e-6)
    assert sorted(rounded[0].tolist()) == [0.0, 0.5]


def test_an_input_that_is_always_zero_does_no_harm():
    x = correlated(500, 20)
    x[:, 3] = 0
    weight = torch.randn(4, 20, generator=torch.Generator().manual_seed(1))
    rounded = compensated_rounding(weight, x.t() @ x, halves)
    assert torch.equal(rounded[:, 3], halves(weight[:, 3]))
    silent = compensated_rounding(weight, torch.zeros(20, 20), halves)
    assert torch.equal(silent, halves(weight))


@pytest.mark.parametrize(
    'call, word',
    [
        (lambda: compensated_rounding(torch.ones(2, 3), torch.eye(2), halves), 'Gram matrix'),
        (lambda: compensated_rounding(torch.ones(2, 3), torch.eye(3), halves, damping=0.0), 'damping=0'),
        (lambda: compensated_rounding(torch.ones(2, 3), torch.eye(3), halves, damping=math.nan), 'damping=nan'),
        (lambda: compensated_rounding(torch.ones(2, 3), torch.full((3, 3), math.nan), halves), 'NaN'),
    ],
)
def test_bad_input_is_named(call, word):
    with pytest.raises(DataError, match=word):
        call()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 2, 1)
        self.grouped = nn.Conv2d(16, 16, 3, 1, 1, groups=4)
        self.fc1, self.fc2 = nn.Linear(16, 48), nn.Linear(48, 10)

    def forward(self, x):
        x = self.grouped(self.conv(x)).flatten(2).transpose(1, 2)
        return self.fc2(self.fc1(x).relu())


@pytest.fixture(params=['w4a8', 'repq_w4a4', 'w3a8'])
def calibrated(request):
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(4, 3, 16, 16).cumsum(-1).cumsum(-2) / 8
    with torch.no_grad():
        expected = net(x)
    spec = dict(preset='w4a8', w_bits=3) if request.param == 'w3a8' else request.param
    quantize_(net, spec)
    calibrate(net, lambda: net(x))
    return net, x, expected


def test_a_model_gets_nearer_to_full_precision_with_the_same_scales(calibrated):
    net, x, expected = calibrated
    state = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        before = (net(x) - expected).pow(2).mean()
        report = {layer.name: layer for layer in round_weights_(net, lambda: net(x), prior_rows=2.56)}
        after = (net(x) - expected).pow(2).mean()
    assert after < 0.9 * before
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, state[k])}
    assert changed == {'conv.weight', 'fc1.weight', 'fc2.weight'}
    assert report['grouped'].reason == '4 groups'
    for name in ('conv', 'fc1', 'fc2'):
        assert report[name].compensated < report[name].nearest and not report[name].reason
    # Every weight stands on its code now.
    quantizer = net.fc2.weight_quantizer
    on_grid = fake_quantize(net.fc2.weight, quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax, 0)
    torch.testing.assert_close(net.fc2.weight, on_grid, rtol=0, atol=1e-6)


def test_the_reported_error_is_the_layers_own(calibrated, monkeypatch):
    net, x, _ = calibrated
    monkeypatch.setattr(rounding, 'GRAM_BYTES', 1)  # a pass a layer
    seen = []
    net.fc1.register_forward_hook(lambda layer, args, out: seen.append(layer.input_quantizer(args[0]).flatten(0, 1)))
    weight, bias = net.fc1.weight.detach().clone(), net.fc1.full_bias()
    with torch.no_grad():
        report = {layer.name: layer for layer in round_weights_(net, lambda: net(x))}
        inputs = seen[-1]  # of the pass in which fc1 was rounded or a later one: what comes before it is settled
        error = (net.fc1.quantized_weight() - weight) @ inputs.t()
    assert bias is not None
    assert report['fc1'].compensated == pytest.approx(
        float(error.pow(2).sum() / (weight @ inputs.t()).pow(2).sum()), rel=1e-4
    )


def test_inputs_are_those_of_weights_in_full_precision(calibrated):
    """What is to be rounded in the same pass is not at its nearest codes meanwhile; activations are."""
    net, x, _ = calibrated
    seen = []
    handle = net.fc2.register_forward_hook(
        lambda layer, args, out: seen.append(layer.input_quantizer(args[0]).flatten(0, 1))
    )
    weight, nearest = net.fc2.weight.detach().clone(), net.fc2.quantized_weight().detach()
    with torch.no_grad():
        net(x)
        with full_precision_weights(net):
            net(x)
        handle.remove()
        error, spoilt = (
            float(((nearest - weight) @ inputs.t()).pow(2).sum() / (weight @ inputs.t()).pow(2).sum())
            for inputs in (seen[1], seen[0])
        )
        report = {layer.name: layer for layer in round_weights_(net, lambda: net(x))}
    assert report['fc2'].nearest == pytest.approx(error, rel=1e-4)
    assert report['fc2'].nearest != pytest.approx(spoilt, rel=1e-4)
    assert all(quantizer.mode == 'on' for _, quantizer in quantizers(net))


def test_passes_are_as_many_as_the_memory_asks_for(calibrated, monkeypatch):
    net, x, _ = calibrated
    for memory, passes in ((rounding.GRAM_BYTES, 1), (1, 3)):  # conv, fc1, fc2: one each
        monkeypatch.setattr(rounding, 'GRAM_BYTES', memory)
        runs = []
        round_weights_(net, lambda: runs.append(net(x)))
        assert len(runs) == passes


def test_what_cannot_be_rounded_stays_and_says_so(calibrated, monkeypatch):
    net, x, _ = calibrated
    monkeypatch.setattr(rounding, 'MAX_INPUTS', 40)
    weight = net.fc2.weight.clone()
    report = {layer.name: layer for layer in round_weights_(net, lambda: net(x))}
    assert 'more than 40' in report['fc2'].reason and torch.equal(net.fc2.weight, weight)
    set_mode(net, 'off', 'fc1')
    assert 'fc1' not in {layer.name for layer in round_weights_(net, lambda: net(x))}


def test_a_layer_that_no_sample_reaches_stays(calibrated):
    net, x, _ = calibrated
    weight = net.fc1.weight.clone()
    report = {layer.name: layer for layer in round_weights_(net, lambda: net.conv(x))}
    assert report['fc1'].reason == 'no sample went through it' and torch.equal(net.fc1.weight, weight)


def test_nan_in_a_sample_names_the_layer(calibrated):
    net, x, _ = calibrated
    with pytest.raises(DataError, match="'conv'"):
        round_weights_(net, lambda: net(x * math.nan))


def test_padded_rows_take_no_part():
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(3, 10, 8).cumsum(-1)
    quantize_(layer, 'w4a8')
    calibrate(layer, lambda: layer(x))
    valid = torch.ones(3, 10, dtype=torch.bool)
    valid[:, 7:] = False
    weight, results = layer[0].weight.clone(), []
    for spoil in (0.0, 1e3):
        with torch.no_grad():
            layer[0].weight.copy_(weight)
        spoilt = torch.where(valid[..., None], x, x + spoil)
        round_weights_(layer, lambda: layer[0](spoilt, valid))
        results.append(layer[0].weight.clone())
    assert torch.equal(*results) and not torch.equal(results[0], weight)


# ---------------------------------------------------------------------- autocast
@pytest.mark.parametrize('batches', [1, 4])
@pytest.mark.parametrize('importance', [False, True])
def test_autocast_around_the_samples_changes_no_sum(batches, importance):
    """Inputs of whole numbers have no rounding of their own, so that what differs is the sum."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(24, 8)), torch.randint(-8, 8, (4, 300, 24)).float()
    x[..., 1] = x[..., 0]
    quantize_(net, 'w3a8')
    calibrate(net, lambda: net(x))
    start, found = net[0].weight.detach().clone(), []
    weights = {'0': torch.rand(1200, generator=torch.Generator().manual_seed(0))} if importance else None
    for enabled in (False, True):
        with torch.no_grad():
            net[0].weight.copy_(start)

        def run():
            with torch.autocast('cpu', dtype=torch.bfloat16, enabled=enabled):
                for batch in x.chunk(batches):
                    net(batch)

        (report,) = round_weights_(net, run, prior_rows=0.1, importance=weights)
        found.append((report, net[0].weight.detach().clone()))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1]) and not found[0][0].reason


# ---------------------------------------------------------------------- what cannot be inverted
def low_rank(prior_rows=5e-29):
    """A layer whose inputs are all alike."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(40, 8)), torch.ones(50, 40)
    quantize_(net, 'w4a8')
    calibrate(net, lambda: net(x))
    return net, lambda: round_weights_(net, lambda: net(x), prior_rows=prior_rows)


def test_inputs_of_too_low_a_rank_are_named():
    with pytest.raises(DataError, match='damping=1e-30 is too little.*fewer directions'):
        compensated_rounding(torch.randn(3, 20), torch.ones(20, 20), halves, damping=1e-30)
    net, rounding = low_rank()
    weight = net[0].weight.detach().clone()
    (report,) = rounding()
    assert 'damping=1e-30 is too little' in report.reason and report.nearest == report.compensated > 0
    assert torch.equal(net[0].weight, weight)
    (report,) = low_rank(5.0)[1]()
    assert not report.reason and report.compensated < report.nearest


def test_nothing_gained_is_nothing_changed():
    """Uncorrelated inputs of one energy: every weight is at its best code already."""
    net, x = nn.Sequential(nn.Linear(8, 8, bias=False)), torch.eye(8).repeat(3, 1)
    with torch.no_grad():
        net[0].weight.copy_(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    quantize_(net, 'w4a8')
    calibrate(net, lambda: net(x))
    weight = net[0].weight.detach().clone()
    (report,) = round_weights_(net, lambda: net(x))
    assert report.reason == 'nothing gained' and report.nearest == report.compensated > 0
    assert torch.equal(net[0].weight, weight), 'not even moved to its codes'


# ---------------------------------------------------------------------- memory
def test_rounding_holds_one_matrix_beside_the_gram_matrix():
    inputs, outputs = 640, 16
    x, weight = correlated(1000, inputs), torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))
    gram = x.t() @ x
    with PeakMemory() as memory:
        compensated_rounding(weight, gram, halves, damping=1e-2)
    matrix = 8 * inputs**2
    strips = 2 * 4 * BLOCK * inputs
    assert matrix < memory.peak < matrix + strips + 4 * 8 * outputs * inputs


def test_a_layer_is_rounded_with_one_matrix_beside_the_gram_matrix():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(640, 16)), correlated(200, 640)
    quantize_(net, 'w4a8')
    calibrate(net, lambda: net(x))
    gram, matrix = 4 * 640**2, 8 * 640**2
    with PeakMemory() as memory:
        round_weights_(net, lambda: net(x))
    assert gram + matrix < memory.peak < gram + 1.6 * matrix


@pytest.mark.parametrize(
    'settings',
    [
        dict(),
        dict(padding=1),
        dict(padding=(0, 2), stride=(2, 1)),
        dict(dilation=(2, 1), padding=1),
        dict(stride=3, padding=2, dilation=2),
    ],
)
@pytest.mark.parametrize('weighed', [False, True])
def test_a_convolution_is_unfolded_in_strips(settings, weighed, monkeypatch):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(4, 6, (3, 2), **settings)), torch.randn(2, 4, 33, 21).cumsum(-1)
    quantize_(net, 'w3a8')
    calibrate(net, lambda: net(x))
    rows = net(x)[:, 0].numel()
    weights = {'0': torch.rand(rows, generator=torch.Generator().manual_seed(0))} if weighed else None
    start, whole = net[0].weight.detach().clone(), 4 * 24 * rows // 2
    found = []
    for strip in (rounding.STRIP, whole // 5):
        monkeypatch.setattr(rounding, 'STRIP', strip)
        with torch.no_grad():
            net[0].weight.copy_(start)
        with PeakMemory() as memory:
            (report,) = round_weights_(net, lambda: net(x), importance=weights)
        found.append((report, torch.cat(list(rounding._rows(net[0], x))), memory.largest['aten::im2col']))
    assert torch.equal(found[0][1], found[1][1]), 'the same rows in the same order'
    assert found[0][0].nearest == pytest.approx(found[1][0].nearest, rel=1e-4), 'and each with its weight'
    assert found[0][0].compensated == pytest.approx(found[1][0].compensated, rel=0.05)
    assert found[0][2] == whole > 3 * found[1][2]
