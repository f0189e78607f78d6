"""Each piece of the graph against what it stands for: quantizers, masks, pooling, folded normalization."""

import tempfile

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from psaq_mm.deploy.exportable import Codes, ExportableModel, IntegerWeight
from psaq_mm.deploy.lowering import WeightStore, lower, mask_regions, with_weights
from psaq_mm.deploy.pooling import LinearPooling
from psaq_mm.deploy.symbols import DOMAIN
from psaq_mm.quantization import fake_log_quantize, log_quantize, quantize
from psaq_mm.runtime import RUNTIMES as ALL_RUNTIMES
from psaq_mm.runtime import start

RUNTIMES = ('onnxruntime', 'openvino')


def run_quantizer(codes, x, runtime):
    """Codes and values of one quantizer in a graph of its own."""
    node = helper.make_node('Quantizer', ['x'], ['y'], domain=DOMAIN, name='q')
    node.attribute.append(helper.make_attribute('name', 'q'))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(x.shape)) for name in 'xy']
    model = helper.make_model(
        helper.make_graph([node], 'g', ends[:1], ends[1:]),
        opset_imports=[helper.make_opsetid('', 17), helper.make_opsetid(DOMAIN, 1)],
        ir_version=8,
    )
    lowered = lower(model, ExportableModel(None, quantizers=dict(q=codes)), WeightStore())
    onnx.checker.check_model(lowered.model)
    (code,) = lowered.codes['q']
    kind = TensorProto.FLOAT if codes.log_base else TensorProto.UINT8
    lowered.model.graph.output.append(helper.make_tensor_value_info(code, kind, list(x.shape)))
    found = start(with_weights(lowered, {}).SerializeToString(), runtime, 1).run({'x': x.numpy()})
    return found[code].astype(np.int64), found['y']


@pytest.mark.parametrize('runtime', RUNTIMES)
@pytest.mark.parametrize('bits', [2, 4, 6, 8])
def test_affine_codes_are_those_of_the_primitives(runtime, bits):
    pytest.importorskip(runtime)
    high = 2**bits - 1
    x = torch.cat(
        [torch.randn(2000, generator=torch.Generator().manual_seed(bits)) * 3, torch.tensor([0.0, 1e6, -1e6])]
    )[None]
    codes = Codes(float(torch.tensor(7 / high)), high // 3, 0, high)
    wanted = quantize(x, torch.tensor(codes.scale), torch.tensor(codes.zero_point, dtype=torch.int32), 0, high)
    found, values = run_quantizer(codes, x, runtime)
    gap = np.abs(found - wanted.numpy())
    assert gap.max() <= 1 and (gap == 0).mean() >= 0.999
    assert {0, high} <= set(found.ravel())
    assert np.allclose(values, (found - codes.zero_point) * np.float32(codes.scale), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('runtime', RUNTIMES)
@pytest.mark.parametrize('base', ['log2', 'log_sqrt2'])
@pytest.mark.parametrize('bits', [4, 8])
def test_logarithmic_codes_are_those_of_the_primitives(runtime, base, bits):
    pytest.importorskip(runtime)
    scores = torch.randn(40, 49, generator=torch.Generator().manual_seed(1)) * 6
    # Below 2**-126, the smallest normal float32, the graph sees a 0.
    x = torch.cat([scores.softmax(-1).reshape(-1), torch.tensor([0.0, 1.0, 1e-30, 1e-37])])[None]
    delta = torch.tensor(0.93)
    found, values = run_quantizer(Codes(float(delta), 0, 0, 2**bits - 1, base), x, runtime)
    wanted = log_quantize(x, delta, bits, base).numpy()
    gap = np.abs(found - wanted)
    assert (gap == 0).mean() >= 0.999
    # A difference at the threshold of zero is one step too.
    assert gap.max() <= 1
    same = gap == 0
    assert np.allclose(values[same], fake_log_quantize(x, delta, bits, base).numpy()[same], rtol=1e-4, atol=1e-38)
    assert found[0, -4] == 2**bits and values[0, -4] == 0


def library_mask(height, width, window, shift):
    """The mask as the libraries work it out (mmdet's ShiftWindowMSA)."""
    from mmdet.models.backbones.swin import ShiftWindowMSA

    image = torch.zeros(1, height, width, 1)
    slices = slice(0, -window), slice(-window, -shift), slice(-shift, None)
    for i, (rows, columns) in enumerate((r, c) for r in slices for c in slices):
        image[:, rows, columns] = i
    module = ShiftWindowMSA(8, 1, window, shift)
    parts = module.window_partition(image).view(-1, window * window)
    return parts[:, None] != parts[:, :, None]


@pytest.mark.parametrize('height, width', [(7, 7), (14, 14), (14, 28), (21, 7)])
def test_mask_regions_give_the_libraries_mask(height, width):
    pytest.importorskip('mmdet')
    found = torch.from_numpy(mask_regions(height, width, 7, 7, 3, 3).astype(np.int64))
    assert torch.equal(found[:, None] != found[:, :, None], library_mask(height, width, 7, 3))


@pytest.mark.parametrize('size', [(16, 16), (5, 5), (7, 13), (20, 31)])
@pytest.mark.parametrize('cells', [1, 2, 3, 6, (None, 3), (2, 5)])
def test_pooling_is_pytorchs(size, cells):
    x = torch.randn(2, 4, *size)
    assert torch.allclose(LinearPooling(cells)(x), F.adaptive_avg_pool2d(x, cells), atol=1e-6)


@pytest.mark.parametrize('gains', ['positive', 'mixed', 'zero'])
@pytest.mark.parametrize('quant', ['w8a8', 'w4a8', 'psaq_v2_w4a8', 'repq_w8a8'])
def test_folded_normalization_changes_no_code(gains, quant):
    pytest.importorskip('mmcv')
    from mmcv.cnn import ConvModule

    from psaq_mm.deploy.exportable import make_exportable
    from psaq_mm.quantization import calibrate, quantize_

    torch.manual_seed(0)
    model = nn.Sequential(ConvModule(4, 6, 3, padding=1, norm_cfg=dict(type='BN'))).eval()
    norm = model[0].norm
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.uniform_(0.5, 2)
        norm.running_var.uniform_(0.5, 2)
        if gains != 'positive':
            norm.weight[::2] *= -1 if gains == 'mixed' else 0
    x = torch.randn(2, 4, 9, 9)
    quantize_(model, quant)
    calibrate(model, lambda: model(x))
    made = make_exportable(model)
    weight = made.weights['0.conv']
    conv = model[0].conv
    wanted = quantize(
        conv.weight,
        conv.weight_quantizer.scale,
        conv.weight_quantizer.zero_point,
        conv.weight_quantizer.qmin,
        conv.weight_quantizer.qmax,
        0,
    )
    shape = -1, 1, 1, 1
    gap, other = (
        weight.codes.int() - weight.zero_point.int().view(shape),
        wanted - conv.weight_quantizer.zero_point.view(shape),
    )
    assert torch.equal(gap.abs(), other.abs())
    folded = isinstance(made.model[0].norm, nn.Identity)
    assert folded == (gains == 'positive') or gains == 'mixed'
    assert folded or '0.conv' in made.notes
    # What the graph multiplies with gives what the layer gives.
    with torch.no_grad():
        y = F.conv2d(conv.input_quantizer(x), gap * weight.scale.view(shape), weight.bias, padding=1)
        assert torch.allclose(made.model[0].norm(y).relu(), model(x), atol=1e-4)


# ---------------------------------------------------------------------- products with weights
def integer_weight(*shape, bits=8, seed=0):
    greatest = 2 ** (bits - 1) - 1
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-greatest, greatest + 1, shape, generator=generator).to(torch.int8)
    scale = (torch.rand(shape[0], generator=generator) + 0.5) / greatest
    zero_point = torch.zeros(shape[0], dtype=torch.int8)
    return IntegerWeight(codes, scale, zero_point, 0, bits, -(2 ** (bits - 1)))


def exact_kernels(runtime):
    """Integer kernels where they are exact on this processor for weights of all 8 bits, else those in float."""
    way = ALL_RUNTIMES[runtime].exact_way()
    return way if way in ('integer', 'unsigned') else 'float'


class Convolution:
    """Quantizer, convolution, activation function, quantizer; several times with one weight, on inputs of several
    sizes.

    Args:
        activation: Kind of the function, None without one.
        bits: Of the output's codes.
        w_bits: Of the weight.
        seen: Whether the convolution's output is one of the graph.
        sizes: Of the inputs, one convolution for each.
        bias: Factor of the bias.
        zero_point: Of the output's codes.
    """

    def __init__(self, activation='Relu', bits=8, w_bits=8, seen=False, sizes=(9,), bias=1.0, zero_point=0):
        self.weight, self.function = integer_weight(16, 32, 3, 3, bits=w_bits), activation
        self.bias = bias * torch.randn(16, generator=torch.Generator().manual_seed(1))
        self.inputs = [torch.rand(1, 32, n, n, generator=torch.Generator().manual_seed(n)) * 4 - 1 for n in sizes]
        self.read = Codes(5 / 255, 51, 0, 255)
        self.written = Codes(60 / (2**bits - 1), zero_point, 0, 2**bits - 1)
        nodes, outputs = [], []
        for i, x in enumerate(self.inputs):
            nodes += [
                self.symbol('Quantizer', [f'x{i}'], f'v{i}', name='read'),
                self.symbol('Weight', [], f'w{i}', name='conv'),
                helper.make_node('Conv', [f'v{i}', f'w{i}', 'bias'], [f'y{i}'], name=f'conv{i}', pads=[1] * 4),
            ]
            if activation:
                ends = ['zero', 'most'] if activation == 'Clip' else []
                nodes.append(helper.make_node(activation, [f'y{i}', *ends], [f'z{i}'], name=f'z{i}'))
            nodes.append(self.symbol('Quantizer', [f'z{i}' if activation else f'y{i}'], f'out{i}', name='written'))
            shape = [1, 16, *x.shape[2:]]
            outputs += [(f'out{i}', shape)] + ([(f'y{i}', shape)] if seen else [])
        model = helper.make_model(
            helper.make_graph(
                nodes,
                'g',
                [helper.make_tensor_value_info(f'x{i}', 1, list(x.shape)) for i, x in enumerate(self.inputs)],
                [helper.make_tensor_value_info(name, 1, shape) for name, shape in outputs],
                [numpy_helper.from_array(self.bias.numpy(), 'bias')]
                + [numpy_helper.from_array(np.float32(v), n) for n, v in (('zero', 0), ('most', 70))],
            ),
            opset_imports=[helper.make_opsetid('', 17), helper.make_opsetid(DOMAIN, 1)],
            ir_version=8,
        )
        tables = ExportableModel(
            None, quantizers=dict(read=self.read, written=self.written), weights=dict(conv=self.weight)
        )
        store = WeightStore()
        self.lowered = lower(model, tables, store)
        for name, x in zip(self.lowered.codes['written'], self.inputs):
            row = helper.make_tensor_value_info(name, TensorProto.UINT8, [1, 16, *x.shape[2:]])
            self.lowered.model.graph.output.append(row)
        self.graph = with_weights(self.lowered, store.weights).SerializeToString()
        self.names = {name for name in store.weights if name.endswith('.codes')}

    @staticmethod
    def symbol(kind, inputs, output, name):
        node = helper.make_node(kind, inputs, [output], domain=DOMAIN, name=output)
        node.attribute.append(helper.make_attribute('name', name))
        return node

    def wanted(self, x):
        """Codes of the fake-quantized convolution."""

        def codes(x, row):
            zero_point = torch.tensor(row.zero_point, dtype=torch.int32)
            return quantize(x, torch.tensor(row.scale), zero_point, row.low, row.high)

        x = (codes(x, self.read) - self.read.zero_point) * self.read.scale
        weight = self.weight.codes * self.weight.scale[:, None, None, None]
        y = F.conv2d(x.double(), weight.double(), self.bias.double(), padding=1).float()
        y = y.clamp(min=0) if self.function else y
        return codes(y, self.written).numpy()

    def check(self, runtime, kernels=None):
        """The graph in a runtime, by kernels that are exact on this processor; its codes are right."""
        session = ALL_RUNTIMES[runtime](self.graph, 1, kernels or exact_kernels(runtime))
        outputs = session.run({f'x{i}': x.numpy() for i, x in enumerate(self.inputs)})
        gaps = [
            np.abs(outputs[name].astype(int) - self.wanted(x)).ravel()
            for x, name in zip(self.inputs, self.lowered.codes['written'])
        ]
        gap = np.concatenate(gaps)
        assert gap.max() <= 1 and (gap == 0).mean() >= 0.999, (runtime, kernels, (gap == 0).mean())
        return session.products(self.graph)


@pytest.mark.parametrize(
    'case, integer',
    [
        (dict(), True),
        (dict(activation=None, zero_point=120), True),
        (dict(activation='Clip'), True),  # at more than the greatest code
        (dict(zero_point=20), False),  # the activation function changes codes
        (dict(activation=None, seen=True), False),
        (dict(bits=4), False),
        (dict(w_bits=3), False),  # a bias in such coarse units would move codes
        (dict(bias=1e9), False),  # it does not fit into int32
    ],
)
def test_a_convolution_that_a_quantizer_reads_is_an_integer_one_everywhere(case, integer):
    pytest.importorskip('onnxruntime')
    convolution = Convolution(**case)
    onnx.checker.check_model(onnx.load_model_from_string(convolution.graph))
    (product,) = convolution.check('onnxruntime')
    assert product.how == ('integer' if integer else 'float') and bool(product.why) != integer, product
    assert integer == (product.kind == 'QLinearConv')
    convolution.check('onnxruntime', 'float')
    pytest.importorskip('openvino')
    (product,) = convolution.check('openvino')
    if exact_kernels('openvino') == 'integer':
        assert product.how == 'integer'


def test_weights_of_float_products_are_dequantized_once():
    """When ONNX Runtime loads the graph, and not in every call."""
    pytest.importorskip('onnxruntime')
    session = ALL_RUNTIMES['onnxruntime']
    for case in (dict(activation=None, seen=True), dict(bits=4), dict(w_bits=3)):
        graph = Convolution(**case).graph
        kinds = [node.op_type for node in optimized_nodes(session, graph)]
        assert kinds.count('DequantizeLinear') <= 2 and not {'Mul', 'Cast'} & set(kinds), kinds


def optimized_nodes(runtime, graph):
    with tempfile.TemporaryDirectory() as folder:
        runtime._new_session(graph, 1, 'integer', f'{folder}/optimized.onnx')
        return list(onnx.load(f'{folder}/optimized.onnx').graph.node)


@pytest.mark.parametrize('case', [dict(), dict(activation=None, seen=True), dict(w_bits=7)])
def test_a_weight_of_five_levels_loads_with_unsigned_weights_too(case):
    """As an RPN has it: ONNX Runtime with weights plus 128 refuses two products that read one tensor."""
    pytest.importorskip('onnxruntime')
    convolution = Convolution(sizes=(12, 9, 7, 5, 3), **case)
    for kernels in ('unsigned', 'integer'):
        if kernels in ('unsigned', exact_kernels('onnxruntime')):
            products = convolution.check('onnxruntime', kernels)
        else:  # on this processor sums saturate; it loads all the same
            products = ALL_RUNTIMES['onnxruntime'](convolution.graph, 1, kernels).products(convolution.graph)
        assert len(products) == 5 and {product.how for product in products} == {
            'float' if 'seen' in case else 'integer'
        }
    assert len(convolution.names) == (5 if not case else 1)


def test_joined_maps_are_quantized_before_they_are_joined_where_a_convolution_makes_one():
    """The codes are the same; and the convolution is an integer one in ONNX Runtime."""
    pytest.importorskip('onnxruntime')
    weight = integer_weight(8, 32, 3, 3)
    nodes = [
        Convolution.symbol('Quantizer', ['x'], 'v', name='read'),
        Convolution.symbol('Weight', [], 'w', name='conv'),
        helper.make_node('Conv', ['v', 'w'], ['y'], name='y', pads=[1] * 4),
        helper.make_node('Relu', ['y'], ['z'], name='z'),
        helper.make_node('Shape', ['z'], ['shape'], name='shape'),
        helper.make_node('Expand', ['x2', 'shape'], ['e'], name='e'),
        helper.make_node('Concat', ['z', 'e'], ['j'], name='j', axis=1),
        Convolution.symbol('Quantizer', ['j'], 'out', name='written'),
    ]
    x = torch.rand(1, 32, 9, 9, generator=torch.Generator().manual_seed(0)) * 4 - 1
    x2 = torch.rand(1, 1, 1, 1) * 30
    ends = [helper.make_tensor_value_info(n, 1, list(v.shape)) for n, v in (('x', x), ('x2', x2))]
    model = helper.make_model(
        helper.make_graph(nodes, 'g', ends, [helper.make_tensor_value_info('out', 1, [1, 16, 9, 9])]),
        opset_imports=[helper.make_opsetid('', 17), helper.make_opsetid(DOMAIN, 1)],
        ir_version=8,
    )
    rows = dict(read=Codes(5 / 255, 51, 0, 255), written=Codes(60 / 255, 0, 0, 255))
    store = WeightStore()
    lowered = lower(model, ExportableModel(None, quantizers=rows, weights=dict(conv=weight)), store)
    graph = with_weights(lowered, store.weights).SerializeToString()
    values = fake(x, rows['read'])
    y = F.conv2d(values, weight.codes * weight.scale[:, None, None, None], padding=1).relu()
    wanted = fake(torch.cat([y, x2.expand(1, 8, 9, 9)], 1), rows['written']).numpy()
    for runtime in RUNTIMES:
        pytest.importorskip(runtime)
        session = ALL_RUNTIMES[runtime](graph, 1, exact_kernels(runtime))
        gap = np.abs(session.run(dict(x=x.numpy(), x2=x2.numpy()))['out'] - wanted) / (60 / 255)
        assert gap.max() < 1.01 and (gap < 0.01).mean() >= 0.999
        wanted_kind = 'float' if exact_kernels(runtime) == 'float' else 'integer'
        assert [product.how for product in session.products(graph)] == [wanted_kind]


def fake(x, row):
    return (
        quantize(x, torch.tensor(row.scale), torch.tensor(row.zero_point, dtype=torch.int32), row.low, row.high)
        - row.zero_point
    ) * row.scale
