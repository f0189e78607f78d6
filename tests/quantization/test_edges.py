"""The point set 'all': outputs and sums as edges of their own, and what overrides call them."""

import json

import pytest
import torch
from torch import nn

from psaq_mm.errors import SpecError
from psaq_mm.quantization import (
    ADAPTERS,
    QuantSpec,
    adopt,
    apply_edge,
    attention_products,
    calibrate,
    edge_quantizer,
    feeds_activation,
    quantize_,
    quantize_output_,
    quantizers,
    register_adapter,
)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


class QuantResidualMixin:
    def forward(self, x):
        return apply_edge(self.residual_quantizer, super().forward(x))


@pytest.fixture(autouse=True)
def adapter():

    def convert(module, name, spec):
        feeds_activation(module.fc1)
        module = adopt(module, QuantResidualMixin)
        module.residual_quantizer = edge_quantizer(spec, f'{name}.residual')
        quantize_output_(module.norm, f'{name}.norm', spec)
        return module

    register_adapter(lambda m: type(m) is Residual, convert)
    yield
    ADAPTERS.pop()


def build(quant):
    torch.manual_seed(0)
    model = nn.Sequential(Residual(), nn.Linear(6, 3))
    return model, quantize_(model, quant)


def names(model):
    return {name for name, _ in quantizers(model)}


def test_all_adds_outputs_and_sums_and_gemm_has_none():
    model, report = build('psaq_v1_w8a8')
    edges = {'0.fc2.output_quantizer', '0.norm.output_quantizer', '0.residual_quantizer', '1.output_quantizer'}
    assert edges <= names(model) and '0.fc1.output_quantizer' not in names(model)
    assert {row.name for row in report.layers if row.kind == 'activation'} == {n[: -len('_quantizer')] for n in edges}
    lean, _ = build('w8a8')
    assert not edges & names(lean)
    assert model.state_dict().keys() - lean.state_dict().keys() == {
        f'{edge}.{state}' for edge in edges for state in ('scale', 'zero_point', 'calibrated', 'code_range')
    }


def test_outputs_lie_on_their_grid():
    model, _ = build('psaq_v1_w4a4')
    x = torch.randn(32, 6)
    calibrate(model, lambda: model(x))
    assert len(model(x).unique()) <= 16
    assert len(model[0](x).unique()) <= 16


@pytest.mark.parametrize(
    'pattern, gone',
    [
        ('1.output', '1.output_quantizer'),
        ('0.residual', '0.residual_quantizer'),
        ('0.norm.output', '0.norm.output_quantizer'),
    ],
)
def test_an_edge_stays_float_by_name(pattern, gone):
    model, _ = build(dict(preset='psaq_v1_w8a8', overrides=[dict(pattern=pattern, float=True)]))
    full, _ = build('psaq_v1_w8a8')
    assert names(full) - names(model) == {gone}


def test_an_edge_gets_bits_by_name():
    model, _ = build(dict(preset='psaq_v1_w4a4', overrides=[dict(pattern='*.output', a_bits=8)]))
    assert model[1].output_quantizer.bits == 8 and model[1].input_quantizer.bits == 4


def test_an_override_of_an_edge_that_the_points_do_not_have():
    with pytest.raises(SpecError, match="'0.residual' matches no layer"):
        build(dict(preset='w8a8', overrides=[dict(pattern='0.residual', float=True)]))


def test_products_under_all_quantize_the_scores_alone():
    scores, weighted = attention_products(QuantSpec.parse('psaq_v1_w8a6'), 'attn')
    assert scores.lhs_quantizer is None and scores.rhs_quantizer is None and scores.output_quantizer.bits == 6
    assert weighted.lhs_quantizer is None and weighted.rhs_quantizer is None and weighted.output_quantizer is None


def test_products_of_repq_quantize_softmax_on_a_log_scale():
    scores, weighted = attention_products(QuantSpec.parse('repq_w4a4'), 'attn')
    assert weighted.lhs_quantizer.base == 'log_sqrt2' and weighted.rhs_quantizer.observer_name == 'percentile'
    assert scores.lhs_quantizer.bits == 4 and scores.output_quantizer is None
    q, k, v = torch.randn(3, 2, 5, 4)
    calibrate(nn.ModuleList([scores, weighted]), lambda: weighted(scores(q, k.mT).softmax(-1), v))
    attention = scores(q, k.mT).softmax(-1)
    levels = weighted.lhs_quantizer(attention)
    ratio = -2 * torch.log2(levels[levels > 0] / weighted.lhs_quantizer.scale)
    assert torch.allclose(ratio, ratio.round(), atol=1e-4) and ratio.min() > -0.5 and ratio.max() < 15.5


@pytest.mark.parametrize(
    'text, message', [('repo_w4a4', 'did you mean repq'), ('w4', 'is no preset'), ('psaq_v1_w9a8', 'w_bits=9')]
)
def test_wrong_presets(text, message):
    with pytest.raises(SpecError, match=message):
        QuantSpec.parse(text)


def test_recipes_go_round_json():
    for preset in ('psaq_v1_w8a8', 'repq_w4a4', 'W6A6', 'RepQ_W6A6'):
        spec = QuantSpec.parse(preset)
        assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert QuantSpec.parse(dict(preset='repq_w6a6', scope='full')).scope == 'full'


def test_full_range_contradicts_asymmetric_weights():
    with pytest.raises(SpecError, match='contradicts'):
        QuantSpec(w_symmetric=False, w_full_range=True)


@pytest.mark.parametrize('points', ['linear', 'all'])
def test_symmetric_attention_needs_operands_of_its_own(points):
    with pytest.raises(SpecError, match='symmetric_attention=True contradicts'):
        QuantSpec(symmetric_attention=True, points=points)


def test_symmetric_attention_is_of_queries_and_values():
    spec = QuantSpec.parse(dict(preset='w8a8', symmetric_attention=True))
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    scores, product = attention_products(spec, 'attn')
    symmetric = {
        name: child.symmetric
        for which, module in (('qk', scores), ('av', product))
        for name, child in ((f'{which}.{side}', getattr(module, f'{side}_quantizer')) for side in ('lhs', 'rhs'))
    }
    assert symmetric == {'qk.lhs': True, 'qk.rhs': False, 'av.lhs': False, 'av.rhs': True}
    product.rhs_quantizer.calibrate_from(torch.tensor([-1.0, 3.0]))
    assert int(product.rhs_quantizer.zero_point) == 0 and float(product.rhs_quantizer.scale) == pytest.approx(3 / 127)


def test_psaq_v1_weights_use_every_code():
    model, _ = build('psaq_v1_w4a8')
    model[1].weight_quantizer.calibrate_from(model[1].weight)
    expected = model[1].weight.abs().amax(1) / 7.5
    assert torch.equal(model[1].weight_quantizer.scale, expected)
