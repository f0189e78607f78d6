"""QuantProductsMixin: a library's forward whose products are quantized where it calls them."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models.adapters.attention import adopt_attention
from psaq_mm.models.adapters.match import qualified_name
from psaq_mm.models.adapters.products import QuantProductsMixin
from psaq_mm.quantization import LogQuantizer, calibrate, quantize_, quantizers, register_adapter, set_mode


class Attention(nn.Module):
    """Attention whose products are written as ``form`` says."""

    def __init__(self, form, channels=16):
        super().__init__()
        self.form = form
        self.qkv = nn.Linear(channels, 3 * channels)
        self.table = nn.Parameter(torch.randn(channels, channels))
        self.inner = None

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        q = q + torch.matmul(q, self.table) + q @ self.table.t()
        if self.form in ('fused', 'masked', 'causal', 'biased'):
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(-2) if self.form == 'masked' else None
            mask = torch.linspace(0, 1, x.shape[1]) if self.form == 'biased' else mask
            return F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=self.form == 'causal', **({'scale': 0.3} if self.form == 'biased' else {})
            )
        multiply = {
            'operator': lambda a, b: a @ b,
            'matmul': torch.matmul,
            'method': lambda a, b: a.matmul(b),
            'bmm': torch.bmm,
        }[self.form]
        weights = multiply(q, k.transpose(-2, -1)).softmax(-1)
        v = v if self.inner is None else v + self.inner(x)
        return multiply(weights, v)


class QuantAttentionMixin(QuantProductsMixin):
    """Its products in the usual order."""


register_adapter(
    lambda module: qualified_name(type(module)) == qualified_name(Attention),
    lambda module, name, spec: adopt_attention(module, QuantAttentionMixin, name, spec),
)

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
FORMS = ('operator', 'matmul', 'method', 'bmm', 'fused', 'masked', 'causal', 'biased')


def relative_error(out, expected):
    """Of a tensor."""
    return float((out.float() - expected).detach().norm() / expected.detach().norm())


def models(form, spec='w8a8', nested=False):
    """A model of one attention, and the same quantized and calibrated."""
    torch.manual_seed(0)
    plain = nn.Sequential(Attention(form), nn.Identity())
    if nested:
        plain[0].inner = Attention('operator')
    model = copy.deepcopy(plain)
    quantize_(model, spec)
    calibrate(model, lambda: model(X))
    return plain, model


@pytest.mark.parametrize('form', FORMS)
def test_both_products_are_quantized_and_nothing_else_changes(form):
    plain, model = models(form)
    for name in ('matmul_qk', 'matmul_av'):
        assert all(bool(quantizer.calibrated) for _, quantizer in quantizers(getattr(model[0], name)))
    assert 0 < relative_error(model(X), plain(X)) < 0.05
    set_mode(model, 'off')
    exact = form in FORMS[:4]
    torch.testing.assert_close(model(X), plain(X), **(dict(rtol=0, atol=0) if exact else dict(rtol=1e-5, atol=1e-5)))


def test_attention_weights_get_the_quantizer_of_nonnegative_values():
    _, model = models('operator', 'repq_w4a4')
    assert isinstance(model[0].matmul_av.lhs_quantizer, LogQuantizer)
    assert not isinstance(model[0].matmul_qk.lhs_quantizer, LogQuantizer)


def test_an_adapted_module_inside_keeps_its_products():
    """Each product is the one of its own module, in two calls of one pass."""
    plain, model = models('operator', nested=True)
    calls = []
    for attention in (model[0], model[0].inner):
        for name in ('matmul_qk', 'matmul_av'):
            getattr(attention, name).register_forward_hook(lambda *_, key=(attention, name): calls.append(key))
    model(X)
    inner, outer = model[0].inner, model[0]
    expected = [(outer, 'matmul_qk'), (inner, 'matmul_qk'), (inner, 'matmul_av'), (outer, 'matmul_av')]
    assert calls == expected
    model(X)
    assert calls == 2 * expected
    set_mode(model, 'off')
    torch.testing.assert_close(model(X), plain(X), rtol=0, atol=0)


def test_what_hooks_of_layers_multiply_is_not_attentions():
    """Also products of batches, in a hook that is older than the mode."""
    plain, model = models('operator')
    grams = []
    model[0].qkv.register_forward_pre_hook(lambda layer, inputs: grams.append(inputs[0].transpose(1, 2) @ inputs[0]))
    model[0].qkv.register_forward_hook(lambda layer, inputs, out: grams.append(out.transpose(1, 2) @ out))
    assert relative_error(model(X), plain(X)) < 0.05
    torch.testing.assert_close(grams[0], X.transpose(1, 2) @ X, rtol=0, atol=0)
    assert len(grams) == 2


def test_gradients_and_checkpointing_agree():
    _, model = models('operator')
    x, again = X.clone().requires_grad_(), X.clone().requires_grad_()
    model(x).square().sum().backward()
    checkpoint(model, again, use_reentrant=False).square().sum().backward()
    assert x.grad.abs().sum() > 0
    torch.testing.assert_close(again.grad, x.grad, rtol=0, atol=0)


def test_under_autocast():
    plain, model = models('fused')
    with torch.autocast('cpu', torch.bfloat16):
        out = model(X)
    assert out.dtype == torch.bfloat16 and relative_error(out, plain(X)) < 0.1


@pytest.mark.filterwarnings('ignore')
def test_it_is_traced():
    onnx = pytest.importorskip('onnx')
    _, model = models('fused')
    set_mode(model, 'off')
    file = io.BytesIO()
    options = dict(dynamo=False) if 'dynamo' in torch.onnx.export.__code__.co_varnames else {}
    torch.onnx.export(model, (X,), file, opset_version=17, **options)
    kinds = [node.op_type for node in onnx.load_model_from_string(file.getvalue()).graph.node]
    assert kinds.count('Softmax') == 1 and kinds.count('MatMul') == 5


def test_another_number_of_products_is_an_error_that_names_the_module():
    _, model = models('operator')
    model[0].product_names = ('qk',)
    with pytest.raises(UnsupportedModelError, match=r'^0 of class Attention computes 2 products'):
        model(X)
    torch.testing.assert_close(X @ X.mT, torch.matmul(X, X.mT))  # nothing is left entered
