"""nn.MultiheadAttention of one tensor or of several: equal to torch's with its quantizers off, and quantized with them
on."""

import copy

import pytest
import torch
from torch import nn

from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models.adapters.packed_attention import QuantPackedAttentionMixin, adopt_packed
from psaq_mm.quantization import (
    AdapterSpec,
    QuantSpec,
    attention_parts,
    calibrate,
    hold_weights,
    is_quantizer_key,
    norm_feeds,
    quantize_,
    quantizers,
    register_adapter,
    rotate_heads_,
    set_mode,
)

INPUTS = {'self': ('qkv',), 'reduced': ('q', 'kv'), 'positions': ('qk', 'v'), 'cross': ('q', 'k', 'v')}
WIDTH, HEADS = 32, 2


class Holder(nn.Module):
    """Attention as a child, which an adapter converts, and tensors of the kind that it reads."""

    def __init__(self, kind, **options):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.uniform_(self.norm.weight, 0.1, 3.0)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, **options)
        if self.attn.in_proj_bias is not None:
            nn.init.normal_(self.attn.in_proj_bias)
        self.kind = kind

    def tensors(self):
        generator = torch.Generator().manual_seed(1)
        shapes = [(2, length, WIDTH) if self.attn.batch_first else (length, 2, WIDTH) for length in (9, 5, 5, 9)]
        query, key, value, other = (torch.randn(shape, generator=generator) for shape in shapes)
        return {
            'self': (query,) * 3,
            'reduced': (query, key, key),
            'positions': (query, query, other),
            'cross': (query, key, value),
        }[self.kind]

    def forward(self, **masks):
        tensors = self.tensors()
        if self.kind == 'reduced':
            reduced = self.norm(tensors[1])
            tensors = tensors[0], reduced, reduced
        return self.attn(*tensors, **masks)[0]


def _convert(module, name, spec):
    attention = adopt_packed(module.attn, 'attn', spec, INPUTS[module.kind])
    if module.kind == 'reduced':
        norm_feeds(module.norm, attention.kv)
    return module


register_adapter(lambda module: isinstance(module, Holder), _convert)


def converted(kind, spec='w8a8', calibrated=True, **options):
    plain = Holder(kind, **options).eval()
    model = copy.deepcopy(plain)
    quantize_(model, spec)
    if calibrated:
        calibrate(model, model)
    return plain, model


def masks_of(kind, batch=2):
    keys = 9 if kind in ('self', 'positions') else 5
    padding = torch.zeros(batch, keys, dtype=torch.bool)
    padding[0, -2:] = True
    pairs = torch.rand(batch * HEADS, 9, keys, generator=torch.Generator().manual_seed(2)) < 0.3
    pairs[..., 0] = False
    return {
        'none': {},
        'keys': dict(key_padding_mask=padding),
        'one for all': dict(attn_mask=pairs[0]),
        'each head': dict(attn_mask=pairs, key_padding_mask=padding),
        'added': dict(attn_mask=torch.randn(pairs.shape, generator=torch.Generator().manual_seed(3))),
    }


@pytest.mark.parametrize('kind', INPUTS)
@pytest.mark.parametrize('batch_first', [False, True])
def test_with_quantizers_off_it_is_torchs_attention_under_every_mask(kind, batch_first):
    plain, model = converted(kind, batch_first=batch_first)
    set_mode(model, 'off')
    outputs = []
    for masks in masks_of(kind).values():
        outputs.append(plain(**masks))
        torch.testing.assert_close(model(**masks), outputs[-1], rtol=1e-5, atol=1e-6)
        if not masks:
            assert torch.equal(model(), outputs[-1])
    assert all((out - outputs[0]).abs().max() > 1e-3 for out in outputs[1:])  # every mask matters


@pytest.mark.parametrize('kind', INPUTS)
def test_every_projection_is_a_layer_and_no_key_moves(kind):
    plain, model = converted(kind, 'w4a8', bias=kind != 'cross')
    assert isinstance(model.attn, QuantPackedAttentionMixin) and isinstance(model.attn, nn.MultiheadAttention)
    assert {k for k in model.state_dict() if not is_quantizer_key(k)} == set(plain.state_dict())
    for parts in INPUTS[kind]:
        layer = getattr(model.attn, parts)
        assert layer.weight_quantizer.bits == 4 and layer.weight_quantizer.scale.shape == (len(parts) * WIDTH,)
    weights = torch.cat([getattr(model.attn, parts).weight for parts in INPUTS[kind]])
    assert torch.equal(weights, plain.attn.in_proj_weight)
    full, on = plain(), model()
    for name, _ in quantizers(model):
        set_mode(model, 'off', name)
        assert not torch.equal(model(), on), name  # each quantizer counts
        set_mode(model, 'on', name)
    assert (on - full).square().mean() < 0.05 * full.var()
    fresh = converted(kind, 'w4a8', calibrated=False, bias=kind != 'cross')[1]
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(), on)


def test_the_weights_of_its_parts_are_quantized_once_and_follow_the_packed_parameter():
    _, model = converted('reduced')
    layer, packed = model.attn.kv, model.attn.in_proj_weight
    with torch.no_grad():
        before = layer.quantized_weight()
        assert layer.quantized_weight() is before
        packed[-1] += 1.0
        assert not torch.equal(layer.quantized_weight(), before)
        packed[0] += 1.0  # a row of the queries
        model.attn.in_proj_weight = nn.Parameter(torch.zeros_like(packed))
        assert not layer.quantized_weight().any()
    _, model = converted('reduced')
    calls = []
    model.attn.kv.weight_quantizer.round_once = lambda w, inner=model.attn.kv.weight_quantizer.round_once: (
        calls.append(1) or inner(w)
    )
    with hold_weights(model):
        for _ in range(3):
            model().square().mean().backward()
    assert len(calls) == 1 and model.attn.in_proj_weight.grad.abs().amin(1).gt(0).sum() > 0


def test_a_norm_before_one_part_is_folded_into_its_rows_alone():
    plain, model = converted('reduced', 'repq_w8a8')
    changed = (model.attn.in_proj_weight != plain.attn.in_proj_weight).any(1)
    assert not changed[:WIDTH].any() and changed[WIDTH:].all()
    folded = model.attn.kv.input_quantizer.folded_bias
    assert folded.any() and not hasattr(model.attn.q.input_quantizer, 'folded_bias')
    set_mode(model, 'off')
    torch.testing.assert_close(model(), plain(), rtol=1e-4, atol=1e-5)
    model.load_state_dict(model.state_dict())
    assert folded.any()
    model.load_state_dict(plain.state_dict(), strict=False)  # full-precision weights: nothing is folded any more
    assert not folded.any()
    torch.testing.assert_close(model(), plain(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', INPUTS)
def test_its_heads_can_be_rotated(kind):
    plain, model = converted(kind, calibrated=False)
    set_mode(model, 'off')
    parts = attention_parts(model.attn)
    assert parts.heads == HEADS and parts.proj is model.attn.out_proj
    rotate_heads_(parts, torch.Generator().manual_seed(0))
    changed = (model.attn.in_proj_weight != plain.attn.in_proj_weight).any(1)
    assert changed.all() and not torch.equal(model.attn.out_proj.weight, plain.attn.out_proj.weight)
    torch.testing.assert_close(model(), plain(), rtol=1e-4, atol=1e-5)


def test_inputs_that_one_projection_cannot_read_are_refused():
    _, model = converted('self')
    query, key, value = Holder('cross').tensors()
    with pytest.raises(UnsupportedModelError, match="projects q and k and v from one tensor.*for 'k'"):
        model.attn(query, key, value)
    with pytest.raises(UnsupportedModelError, match='give it a batch'):
        model.attn(query[:, 0])
    for options in (dict(kdim=16), dict(add_bias_kv=True), dict(add_zero_attn=True)):
        with pytest.raises(UnsupportedModelError, match=f'(?s)attn, a torch.*{next(iter(options))}'):
            adopt_packed(nn.MultiheadAttention(WIDTH, HEADS, **options), 'attn', AdapterSpec(QuantSpec()), ('q', 'kv'))


@pytest.mark.parametrize('average', [True, False])
def test_its_attention_weights_are_the_librarys(average):
    plain, model = converted('cross')
    set_mode(model, 'off')
    options = dict(average_attn_weights=average, need_weights=True)
    expected, given = (part.attn(*part.tensors(), **options)[1] for part in (plain, model))
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)
    assert model.attn(*model.tensors(), need_weights=False)[1] is None


def test_keys_and_values_may_have_a_width_of_their_own():
    plain, model = converted('cross', kdim=16, vdim=8, calibrated=False)
    assert adopt_packed(model.attn, 'attn', AdapterSpec(QuantSpec())) is model.attn  # once is enough
    query, key, value = plain.tensors()
    tensors = query, key[..., :16], value[..., :8]
    expected = plain.attn(*tensors)[0]
    set_mode(model, 'off')
    assert torch.equal(model.attn(*tensors)[0], expected)
    set_mode(model, 'on')
    calibrate(model, lambda: model.attn(*tensors))
    assert (model.attn(*tensors)[0] - expected).square().mean() < 1e-3 * expected.var()
    assert model.attn.k.weight_quantizer.scale.shape == (WIDTH,) and model.attn.k.weight.shape == (WIDTH, 16)
