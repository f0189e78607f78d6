"""Kernels that are exact on the processor at hand, the choice between them, and weights held within 7 bits."""

import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from swin_models import build_backbone
from vit_models import build as build_other

from psaq_mm.deploy import export_model, load
from psaq_mm.deploy.report import execution
from psaq_mm.deploy.verify import verify, wrong_weights
from psaq_mm.errors import ConfigError
from psaq_mm.models import quantize_model_
from psaq_mm.quantization import calibrate
from psaq_mm.runtime import RUNTIMES, registry, start
from psaq_mm.runtime.bundle import read_manifest
from psaq_mm.runtime.kernels import NARROW, is_exact, make_probe

SIZE = (57, 75)
SWIN = dict(depths=[2, 1], num_heads=[1, 2], strides=(4, 2), out_indices=(0, 1))


def exported_swin(quant, out):
    model, images = (
        build_backbone('mmdet', **SWIN),
        torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(2)),
    )
    quantize_model_(model, quant)
    calibrate(model, lambda: model(images))
    return model, images, export_model(model, out, [SIZE])


@pytest.fixture(scope='module')
def wide(tmp_path_factory):
    return exported_swin('w8a8', tmp_path_factory.mktemp('wide') / 'out')


@pytest.fixture(scope='module')
def few_bits(tmp_path_factory):
    return exported_swin('w4a8', tmp_path_factory.mktemp('few') / 'out')


@pytest.fixture(scope='module')
def reduced(tmp_path_factory):
    return exported_swin(dict(preset='w8a8', w_reduce_range=True), tmp_path_factory.mktemp('reduced') / 'out')


@pytest.fixture
def without_vnni(monkeypatch):
    """What the probe finds on a processor without VNNI, whatever this one is."""
    for name, way in dict(openvino='weights', onnxruntime='unsigned').items():
        monkeypatch.setattr(RUNTIMES[name], 'exact_way', lambda way=way: way)
    monkeypatch.setattr(registry, '_warned', set())


def check_codes(student, name, kernels='auto'):
    model, images, exported = student
    found = verify(model, exported, images[:1], name, 1, kernels)
    # So few elements a layer that one at a tie may be more than a thousandth of them.
    assert found.equal >= 0.999 and max(layer.step for layer in found.layers) <= 1, found.to_table()
    return found


# ---------------------------------------------------------------------- the probe
@pytest.mark.parametrize('name', RUNTIMES)
def test_the_probe_runs_in_integer_kernels(name):
    """Else it would tell nothing about them. A convolution is an integer one in ONNX Runtime only where its output is
    quantized."""
    pytest.importorskip(name)
    probe = make_probe(127)
    onnx.checker.check_model(onnx.load_model_from_string(probe.graph))
    products = RUNTIMES[name](probe.graph, 1, 'integer').products(probe.graph)
    other = [product.name for product in products if product.how != 'integer']
    assert other == (['map'] if name == 'onnxruntime' else []) and len(products) - len(other) >= 4, products
    assert {product.how for product in RUNTIMES[name](probe.graph, 1, 'float').products(probe.graph)} == {'float'}


@pytest.mark.parametrize('name', RUNTIMES)
def test_what_is_chosen_is_exact(name):
    pytest.importorskip(name)
    way = RUNTIMES[name].exact_way()
    probe = make_probe(NARROW if way == 'weights' else 127)
    session = RUNTIMES[name](probe.graph, 1, way)
    assert is_exact(session.run, probe)
    saturated = {
        output: np.clip(value, -0.7 * value.max(), 0.7 * value.max()) for output, value in probe.wanted.items()
    }
    assert not is_exact(lambda _: saturated, probe)
    assert not is_exact(lambda _: {output: value * np.nan for output, value in probe.wanted.items()}, probe)


def test_where_no_kernel_is_exact_nothing_is_started(wide, monkeypatch):
    pytest.importorskip('openvino')
    registry._find_exact_way.cache_clear()
    monkeypatch.setattr(registry, 'is_exact', lambda run, probe: False)
    with pytest.raises(
        ConfigError, match="OpenVINO multiplies 8-bit codes wrongly .* choose another runtime, one of 'onnxruntime'"
    ):
        load(wide[2].directory, 'openvino', 1).session(SIZE)


# ---------------------------------------------------------------------- the choice
@pytest.mark.parametrize('name, kernels', [('openvino', 'float'), ('openvino', 'weights'), ('onnxruntime', 'float')])
def test_codes_are_the_same_with_float_kernels(wide, few_bits, name, kernels):
    pytest.importorskip(name)
    found = check_codes(few_bits if kernels == 'weights' else wide, name, kernels)
    assert found.kernels == (kernels,) and 'float' in found.to_table().split('ran the graph with ')[1]


def test_kernels_are_those_that_are_asked_for(few_bits):
    pytest.importorskip('openvino')
    told, integer, scores = {}, {}, {}
    for kernels in ('integer', 'weights', 'float'):
        deployed = load(few_bits[2].directory, 'openvino', 1, kernels)
        told[kernels] = execution(deployed, SIZE)
        rows = deployed.session(SIZE).products(deployed.graph(SIZE))
        # Fused or not, the name of an attention's primitive ends in the precision of its first operand.
        integer[kernels] = sum('FullyConnected' in row.kind and row.how == 'integer' for row in rows)
        scores[kernels] = sum(row.kind.startswith(('Subgraph', 'MatMul')) and row.kind.endswith('i8') for row in rows)
    assert integer['integer'] == integer['weights'] > integer['float'] == 0, told
    assert (scores['integer'], scores['weights'], scores['float']) == (sum(SWIN['depths']), 0, 0), told
    assert (
        'float kernels' in told['float']
        and 'products of activations' in told['weights']
        and 'kernels' not in told['integer']
    )
    with pytest.raises(ConfigError, match="kernels='fast' is not known: .*auto, integer, weights, float"):
        load(few_bits[2].directory, 'openvino', 1, kernels='fast')


def test_a_processor_without_vnni_gets_exact_kernels_and_one_sentence(wide, few_bits, reduced, without_vnni):
    pytest.importorskip('openvino')
    with pytest.warns(
        UserWarning, match="OpenVINO's integer kernels are not exact on this processor.*w_reduce_range=True"
    ):
        deployed = load(wide[2].directory, 'openvino', 1)
        assert deployed.kernels == () and deployed.session(SIZE).kernels == 'float' and deployed.kernels == ('float',)
    with pytest.warns(UserWarning, match='every product of activations in this model .* runs in float kernels'):
        assert load(few_bits[2].directory, 'openvino', 1).session(SIZE).kernels == 'weights'
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # said once
        assert load(reduced[2].directory, 'openvino', 1).session(SIZE).kernels == 'weights'
        assert load(wide[2].directory, 'openvino', 1).session(SIZE).kernels == 'float'


@pytest.mark.parametrize('name', RUNTIMES)
def test_codes_are_exact_without_vnni(wide, few_bits, reduced, without_vnni, name):
    pytest.importorskip(name)
    for student in (wide, few_bits, reduced):
        check_codes(student, name)


def test_integer_kernels_are_kept_where_they_are_exact(wide):
    pytest.importorskip('openvino')
    if RUNTIMES['openvino'].exact_way() != 'integer':
        pytest.skip("OpenVINO's integer kernels are not exact on this processor (no VNNI)")
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert load(wide[2].directory, 'openvino', 1).session(SIZE).kernels == 'integer'


def test_integer_kernels_are_left_where_they_saturate(wide, few_bits):
    pytest.importorskip('openvino')
    if RUNTIMES['openvino'].exact_way() == 'integer':
        pytest.skip("OpenVINO's integer kernels are exact on this processor (VNNI)")
    for (model, images, exported), kernels in ((wide, 'float'), (few_bits, 'weights')):
        assert load(exported.directory, 'openvino', 1).session(SIZE).kernels == kernels
        assert not verify(model, exported, images[:1], 'openvino', 1, 'integer').good


# ---------------------------------------------------------------------- ONNX Runtime, one weight in two products
def shared_weight():
    """Two products with one wide weight, as graphs were written before each had its own; and what they give."""
    rng = np.random.default_rng(0)
    weight = rng.choice([-127, -1, 127], (16, 8)).astype(np.int8)
    constants = dict(
        one=np.ones((), np.float32),
        zero=np.zeros((), np.uint8),
        weight=weight,
        scale=np.ones(8, np.float32),
        weight_zero=np.zeros(8, np.int8),
    )
    nodes, wanted, inputs = (
        [helper.make_node('DequantizeLinear', ['weight', 'scale', 'weight_zero'], ['w'], axis=1)],
        {},
        {},
    )
    for i in '01':
        inputs[f'x{i}'] = rng.integers(0, 256, (1, 6, 16)).astype(np.float32)
        nodes += [
            helper.make_node('QuantizeLinear', [f'x{i}', 'one', 'zero'], [f'c{i}']),
            helper.make_node('DequantizeLinear', [f'c{i}', 'one', 'zero'], [f'v{i}']),
            helper.make_node('MatMul', [f'v{i}', 'w'], [f'y{i}']),
        ]
        wanted[f'y{i}'] = inputs[f'x{i}'] @ weight.astype(np.float32)
    ends = [
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v.shape) for k, v in values.items()]
        for values in (inputs, wanted)
    ]
    graph = helper.make_graph(nodes, 'g', *ends, [numpy_helper.from_array(v, k) for k, v in constants.items()])
    return (
        helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8).SerializeToString(),
        inputs,
        wanted,
    )


def test_a_graph_that_shares_a_wide_weight_is_started_all_the_same(without_vnni):
    pytest.importorskip('onnxruntime')
    graph, inputs, wanted = shared_weight()
    with pytest.raises(Exception, match='replace the existing tensor'):
        RUNTIMES['onnxruntime'](graph, 1, 'unsigned')
    with pytest.warns(UserWarning, match="ONNX Runtime's integer kernels are not exact on this processor"):
        session = start(graph, 'onnxruntime', 1)
    assert session.kernels == 'float'
    found = session.run(inputs)
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


# ---------------------------------------------------------------------- weights held within 7 bits
@pytest.mark.parametrize('preset', ['w8a8', 'psaq_v1_w8a8', 'psaq_v2_w8a8', 'repq_w8a8'])
def test_a_reduced_range_holds_every_code_within_7_bits(preset, tmp_path):
    student = exported_swin(dict(preset=preset, w_reduce_range=True), tmp_path / 'out')
    model, _, exported = student
    codes = {name: weight.codes for name, weight in exported.exportable.weights.items()}
    assert all(int(c.to(torch.int16).abs().max()) <= NARROW for c in codes.values())
    assert max(int(c.max()) for c in codes.values()) > 32 and wrong_weights(model, exported) == []
    assert read_manifest(exported.directory)['quant']['w_reduce_range'] is True
    for name in RUNTIMES:
        pytest.importorskip(name)
        check_codes(student, name)


def test_a_layer_that_has_8_bits_among_fewer_is_held_too(tmp_path):
    quant = dict(preset='w4a8', w_reduce_range=True, overrides=[dict(pattern='patch_embed*', w_bits=8)])
    model, _, exported = exported_swin(quant, tmp_path / 'out')
    assert exported.exportable.weights['patch_embed.projection'].bits == 7
    assert all(int(w.codes.to(torch.int16).abs().max()) <= NARROW for w in exported.exportable.weights.values())


def test_a_reduced_range_needs_no_other_kernels_where_weights_alone_are_products(tmp_path, without_vnni):
    """A ViT's products of activations have zero points, for which OpenVINO has no integer kernel."""
    pytest.importorskip('openvino')
    model, images = build_other('timm-vit'), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    quantize_model_(model, dict(preset='w8a8', w_reduce_range=True))
    calibrate(model, lambda: model(images))
    exported = export_model(model, tmp_path / 'out', [(32, 32)])
    found = verify(model, exported, images[:1], 'openvino', 1)
    assert found.equal >= 0.999 and found.kernels == ('weights',), found.to_table()
