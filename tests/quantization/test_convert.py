"""Conversion in place, calibration and the state dict of whole models."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from psaq_mm.errors import DataError, NotCalibratedError, SpecError
from psaq_mm.quantization import (
    ADAPTERS,
    SAME_AS_LINEAR,
    QuantConv2d,
    Quantizer,
    QuantLinear,
    QuantMatMul,
    QuantSpec,
    adopt,
    calibrate,
    is_quantizer_key,
    quantize_,
    quantizers,
    register_adapter,
    set_mode,
)

REPOSITORY = Path(__file__).resolve().parents[2]


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attn = self.attend(q, k.transpose(-2, -1)).softmax(-1)
        return self.proj(self.mix(attn, v).transpose(1, 2).reshape(x.shape))

    def attend(self, q, k):
        return q @ k

    def mix(self, attn, v):
        return attn @ v


class QuantAttention:
    def attend(self, q, k):
        return self.qk(q, k)

    def mix(self, attn, v):
        return self.av(attn, v)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 2, stride=2)
        self.blocks = nn.ModuleList([Attention(8, 2), Attention(8, 2)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x).mean(1))


LAYER_NAMES = ['patch_embed', 'blocks.0.qkv', 'blocks.0.proj', 'blocks.1.qkv', 'blocks.1.proj', 'head']


def state_keys_of(model):
    """State-dict keys of all quantizers, also under the second name of a shared module."""
    modules = dict(model.named_modules(remove_duplicate=False)).items()
    return {f'{name}.{key}' for name, module in modules if isinstance(module, Quantizer) for key in module.state_dict()}


def convert_attention(module, name, spec):
    adopt(module, QuantAttention)
    module.qk = QuantMatMul.from_spec(spec.resolve(f'{name}.qk'))
    module.av = QuantMatMul.from_spec(spec.resolve(f'{name}.av'), spec.quantize_softmax)
    return module


@pytest.fixture
def adapter():
    register_adapter(lambda m: isinstance(m, Attention) and not isinstance(m, QuantAttention), convert_attention)
    yield
    ADAPTERS.pop()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def calibrated(net, x, spec='w4a8', **kwargs):
    quantize_(net, spec, **kwargs)
    calibrate(net, lambda: net(x))
    return net


def test_layers_are_swapped_and_reported(net):
    report = quantize_(net, 'w4a6', first_layer='patch_embed')
    assert [row.name for row in report.layers] == LAYER_NAMES and report.floats == []
    assert {row.name: (row.kind, row.w_bits, row.a_bits) for row in report.layers}['patch_embed'] == ('Conv2d', 4, 8)
    assert report.layers[-1] == ('head', 'Linear', 4, 6)
    assert isinstance(net.patch_embed, QuantConv2d) and isinstance(net.head, QuantLinear)
    assert len(list(quantizers(net))) == 12 and all(q.name == name for name, q in quantizers(net))
    table = report.to_table().splitlines()
    assert len(table) == 7 and table[-1].split() == ['head', 'Linear', '4', '6']


def test_adapters_convert_composites_and_their_layers(net, adapter):
    report = quantize_(net, QuantSpec(quantize_softmax=False))
    kinds = {row.name: row.kind for row in report.layers}
    assert set(kinds) == set(LAYER_NAMES) | {f'blocks.{i}.{m}' for i in (0, 1) for m in ('qk', 'av')}
    assert kinds['blocks.1.qk'] == 'QuantMatMul' and isinstance(net.blocks[0].qkv, QuantLinear)
    assert isinstance(net.blocks[0], Attention) and net.blocks[0].av.lhs_quantizer is None
    assert {(row.name, row.reason) for row in report.floats} == {
        (f'blocks.{i}.av', 'left operand left in float') for i in (0, 1)
    }


def test_points_linear_leaves_the_products_alone(net, adapter):
    report = quantize_(net, QuantSpec(points='linear'))
    assert not any('.qk.' in name or '.av.' in name for name, _ in quantizers(net))
    assert {(row.name, row.reason) for row in report.floats} == {
        (f'blocks.{i}.{m}', "points='linear'") for i in (0, 1) for m in ('qk', 'av')
    }


def test_adapter_may_return_another_module(net):
    replaced = []

    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.proj = inner.proj

        def forward(self, x):
            return self.proj(x)

    register_adapter(lambda m: isinstance(m, Attention), lambda m, name, spec: replaced.append(name) or Wrapped(m))
    net.blocks[1] = net.blocks[0]  # shared: converted once, exchanged in both places
    net.alias = net.blocks[0]
    try:
        quantize_(net, 'w8a8')
        assert replaced == ['blocks.0']
        assert isinstance(net.blocks[0], Wrapped) and net.blocks[0] is net.blocks[1] is net.alias
        assert isinstance(net.alias.proj, QuantLinear)
        with pytest.raises(SpecError, match='exchanged in place'):
            quantize_(Attention(4, 2), 'w8a8')
    finally:
        ADAPTERS.pop()


def test_switched_off_it_is_bit_equal_to_the_float_model(net, x, adapter):
    expected = net(x)
    quantize_(net, 'w4a4')
    assert len(set_mode(net, 'off')) == 20
    assert torch.equal(net(x), expected)


def test_quantized_output_is_near_and_not_equal(net, x, adapter):
    expected = net(x)
    calibrated(net, x, 'w8a8')
    error = (net(x) - expected).norm() / expected.norm()
    assert 0 < error < 0.05


def test_uncalibrated_layer_is_named_unless_switched_off(net, x):
    quantize_(net, 'w8a8')
    with pytest.raises(NotCalibratedError, match="'patch_embed.input_quantizer'"):
        net(x)
    set_mode(net, 'off', 'patch_embed')
    with pytest.raises(NotCalibratedError, match="'blocks.0.qkv.input_quantizer'"):
        net(x)


def test_set_mode_patterns(net):
    quantize_(net, 'w8a8')
    assert set_mode(net, 'off', 'head') == ['head.input_quantizer', 'head.weight_quantizer']
    assert set_mode(net, 'off', '*.weight_quantizer') == [n for n, _ in quantizers(net) if 'weight' in n]
    assert set_mode(net, 'on') == [n for n, _ in quantizers(net)]
    with pytest.raises(SpecError, match="'heads'.*'head'"):
        set_mode(net, 'off', 'heads')
    with pytest.raises(SpecError, match="mode='observe'"):
        set_mode(net, 'observe')


def test_overrides(net):
    report = quantize_(net, dict(overrides=[dict(pattern='blocks.1.*', w_bits=4), dict(pattern='head', float=True)]))
    assert {row.name: row.w_bits for row in report.layers} == {
        'patch_embed': 8,
        'blocks.0.qkv': 8,
        'blocks.0.proj': 8,
        'blocks.1.qkv': 4,
        'blocks.1.proj': 4,
    }
    assert report.floats == [('head', 'Linear', 'override')] and type(net.head) is nn.Linear


def test_override_that_matches_nothing_names_near_layers_and_changes_nothing(net):
    with pytest.raises(SpecError, match=r"'block.0.qkv'.*'blocks.0.qkv'"):
        quantize_(net, dict(overrides=[dict(pattern='block.0.qkv', w_bits=4)]))
    assert type(net.head) is nn.Linear
    with pytest.raises(SpecError, match="first_layer='patch'.*'patch_embed'"):
        quantize_(net, 'w8a8', first_layer='patch')


def test_overrides_reach_products_of_adapters(net, adapter):
    quantize_(net, dict(overrides=[dict(pattern='*.av', a_bits=4), dict(pattern='blocks.1', float=True)]))
    assert net.blocks[0].av.lhs_quantizer.bits == 4 and net.blocks[0].qk.lhs_quantizer.bits == 8
    assert net.blocks[1].av.lhs_quantizer is None and net.blocks[1].qk.rhs_quantizer is None
    with pytest.raises(SpecError, match="'\\*.avv'"):
        quantize_(Net(), dict(overrides=[dict(pattern='*.avv', a_bits=4)]))


def test_filter(net):
    report = quantize_(net, 'w8a8', filter_fn=lambda name, module: name.startswith('blocks'))
    assert [row.name for row in report.layers] == LAYER_NAMES[1:-1]
    assert [(row.name, row.reason) for row in report.floats] == [
        ('patch_embed', 'outside the scope'),
        ('head', 'outside the scope'),
    ]


def test_second_conversion_is_refused(net):
    quantize_(net, 'w8a8')
    with pytest.raises(SpecError, match='quantized already'):
        quantize_(net, 'w8a8')


def test_layers_with_a_forward_of_their_own_stay_float():

    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    class Same(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model = nn.ModuleDict(
        dict(
            odd=Odd(2, 2),
            same=Same(2, 2),
            patched=nn.Linear(2, 2),
            lazy=nn.LazyLinear(2),
            mha=nn.MultiheadAttention(2, 1, add_bias_kv=True),  # no adapter knows it
        )
    )
    model['patched'].forward = lambda x: x
    name = f'{Same.__module__}.{Same.__qualname__}'
    SAME_AS_LINEAR.add(name)
    try:
        report = quantize_(model, 'w8a8')
    finally:
        SAME_AS_LINEAR.remove(name)
    assert [row.name for row in report.layers] == ['same'] and isinstance(model['same'], Same)
    reasons = {row.name: row.reason for row in report.floats}
    assert 'Odd has a forward of its own' in reasons['odd'] and 'replaced' in reasons['patched']
    assert 'lazy' in reasons['lazy'] and 'never called' in reasons['mha.out_proj']


def test_shared_layers_are_converted_once():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    report = quantize_(model, 'w8a8')
    assert len(report.layers) == 1 and model[0] is model[2]
    assert set(model.state_dict()) - {'0.weight', '0.bias', '2.weight', '2.bias'} == state_keys_of(model)


def test_a_bare_layer_is_converted_in_place():
    layer = nn.Linear(3, 3)
    calibrate_input = torch.randn(4, 3)
    quantize_(layer, 'w8a8')
    calibrate(layer, lambda: layer(calibrate_input))
    assert layer(calibrate_input).shape == (4, 3)


# Calibration


def test_calibration_is_one_full_precision_run(net, x):
    inputs = []
    net.head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    net(x)
    calibrated(net, x)
    assert len(inputs) == 2 and torch.equal(inputs[0], inputs[1]) and not inputs[1].requires_grad
    torch.testing.assert_close(net.head.input_quantizer.scale, (inputs[0].max() - inputs[0].min()) / 255)


def test_unseen_quantizers_are_named(net, x):
    quantize_(net, 'w8a8')
    with pytest.raises(DataError, match=r'6 quantizers saw no data.*patch_embed.input_quantizer.* and 1 more'):
        calibrate(net, lambda: None)
    net.unused = nn.Identity()
    calibrate(net, lambda: net.patch_embed(x), allow_unseen=True)
    net.patch_embed(x)
    with pytest.raises(NotCalibratedError, match='blocks.0.qkv'):
        net(x)


def test_weight_with_nan_is_named(net, x):
    quantize_(net, 'w8a8')
    with torch.no_grad():
        net.blocks[1].proj.weight[0, 0] = float('nan')
    with pytest.raises(DataError, match='blocks.1.proj.weight_quantizer'):
        calibrate(net, lambda: net(x))


def test_failing_run_restores_the_modes(net, x):
    calibrated(net, x)
    set_mode(net, 'off', 'head')
    modes = {n: q.mode for n, q in quantizers(net)}
    expected = net(x)
    with pytest.raises(DataError, match='patch_embed.input_quantizer.*NaN'):
        calibrate(net, lambda: net(x * float('nan')))
    assert {n: q.mode for n, q in quantizers(net)} == modes
    assert torch.equal(net(x), expected)


def test_quantizers_that_are_off_are_left_alone(net, x):
    quantize_(net, 'w8a8')
    set_mode(net, 'off', 'head')
    calibrate(net, lambda: net(x))
    assert not net.head.input_quantizer.calibrated and not net.head.weight_quantizer.calibrated
    assert net(x).shape == (2, 4)


# State dict


def mmengine_load(module, state_dict, prefix='', missing=None, unexpected=None):
    """The recursion of mmengine's loader: ``_load_from_state_dict`` of each module, never ``load_state_dict``."""
    missing, unexpected = [] if missing is None else missing, [] if unexpected is None else unexpected
    errors = []
    module._load_from_state_dict(state_dict, prefix, {}, True, missing, unexpected, errors)
    for name, child in module._modules.items():
        if child is not None:
            child_prefix = f'{prefix}{name}.'
            part = {k: v for k, v in state_dict.items() if k.startswith(child_prefix)}
            errors += mmengine_load(child, part, child_prefix, missing, unexpected)[2]
    return missing, unexpected, errors


def test_float_keys_stay_and_float_checkpoints_load(net, x, adapter):
    state = copy.deepcopy(net.state_dict())
    quantize_(net, 'w4a8')
    keys = set(net.state_dict())
    assert set(state) < keys and keys - set(state) == state_keys_of(net)
    assert {k for k in keys if is_quantizer_key(k)} == state_keys_of(net)
    result = net.load_state_dict(state, strict=False)
    assert set(result.missing_keys) == state_keys_of(net) and result.unexpected_keys == []
    missing, unexpected, errors = mmengine_load(net, state)
    assert set(missing) == state_keys_of(net) and unexpected == errors == []


@pytest.mark.parametrize('loader', ['torch', 'assign', 'mmengine recursion', 'mmengine'])
def test_quantized_checkpoint_makes_a_never_calibrated_model_equal(net, x, adapter, loader):
    twin = copy.deepcopy(net)
    calibrated(net, x)
    state = copy.deepcopy(net.state_dict())
    quantize_(twin, 'w4a8')
    if loader == 'torch':
        twin.load_state_dict(state)
    elif loader == 'assign':
        twin.load_state_dict(state, assign=True)
    elif loader == 'mmengine recursion':
        assert mmengine_load(twin, state) == ([], [], [])
    else:
        pytest.importorskip('mmengine.runner.checkpoint').load_state_dict(twin, state, strict=True)
    with torch.no_grad():
        assert torch.equal(twin(x), net(x))


def test_reloading_replaces_the_cached_weight(net, x):
    calibrated(net, x)
    state = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        expected = net(x)
        net.head.weight.mul_(3)
        assert not torch.equal(net(x), expected)
        mmengine_load(net, state)
        assert torch.equal(net(x), expected)


def test_checkpoint_of_other_bits_is_refused(net, x):
    twin = copy.deepcopy(net)
    calibrated(net, x, 'w8a8')
    quantize_(twin, 'w4a8')
    with pytest.raises(RuntimeError, match='head.weight_quantizer was saved with codes'):
        twin.load_state_dict(net.state_dict())
    with pytest.raises(NotCalibratedError):
        twin(x)


def test_deepcopy_is_equal_and_independent(net, x, adapter):
    calibrated(net, x)
    expected = net(x)
    teacher = copy.deepcopy(net)
    assert torch.equal(teacher(x), expected)
    set_mode(teacher, 'off')
    assert not torch.equal(teacher(x), expected) and torch.equal(net(x), expected)


@pytest.mark.parametrize(
    'key, expected',
    [
        ('backbone.layers.0.qkv.input_quantizer.scale', True),
        ('weight_quantizer.zero_point', True),
        ('a.lhs_quantizer.calibrated', True),
        ('a.rhs_quantizer.code_range', True),
        ('a.weight', False),
        ('a.scale', False),
        ('input_quantizer.weight', False),
        ('input_quantizer.scale.x', False),
    ],
)
def test_is_quantizer_key(key, expected):
    assert is_quantizer_key(key) is expected


# Training and several processes


def test_training_moves_weights_and_not_ranges(net, x, adapter):
    calibrated(net, x)
    net.train()
    ranges = {k: v.clone() for k, v in net.state_dict().items() if is_quantizer_key(k)}
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = net(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in ranges.items())


DDP_WORKER = """
import sys, torch
from torch import nn
from psaq_mm.quantization import calibrate, quantize_
rank, file = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group('gloo', init_method='file://' + file, rank=rank, world_size=2)
torch.manual_seed(0)
net, x = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)), torch.randn(4, 6)
quantize_(net, 'w4a8')
calibrate(net, lambda: net(x))
ddp = nn.parallel.DistributedDataParallel(net)
if rank == 1:  # the next forward broadcasts the buffers of rank 0
    net[0].input_quantizer.scale.mul_(3)
ddp(x[rank * 2:rank * 2 + 2]).sum().backward()
with torch.no_grad():
    print(net[0].input_quantizer.scale.item(), net[0].weight.grad.sum().item(), net.eval()(x).sum().item())
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason='needs torch.distributed')
def test_buffers_survive_the_broadcast_of_ddp(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, '-c', DDP_WORKER, str(rank), str(tmp_path / 'init')],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(os.environ, PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS='1'),
        )
        for rank in range(2)
    ]
    try:
        out = [worker.communicate(timeout=600) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], out
    assert out[0][0] == out[1][0] != ''
