"""Students for TensorRT: their graphs keep its rules and give the codes of the fake-quantized model, and the check of
the rules finds what breaks them."""

import numpy as np
import onnx
import pytest
import torch
from head_models import SIZE, student
from onnx import TensorProto, helper, numpy_helper
from swin_models import build_backbone
from tiny import DETECTOR, SEGMENTOR, build_full_precision
from vit_models import build as build_vit

from psaq_mm.deploy import export_model
from psaq_mm.deploy.lowering import with_weights
from psaq_mm.deploy.tensorrt import violations
from psaq_mm.deploy.verify import verify, wrong_weights
from psaq_mm.errors import UnsupportedModelError
from psaq_mm.models import quantize_model_
from psaq_mm.quantization import calibrate
from psaq_mm.runtime.registry import start

RUNTIMES = ('onnxruntime', 'openvino')
SMALL = dict(depths=[2, 1], num_heads=[1, 2], strides=(4, 2), out_indices=(0, 1))
ODD = (57, 75)  # pads the image, the windows of each stage and the patches to be merged
pytestmark = pytest.mark.filterwarnings('ignore')


def quant_of(preset='w8a8', **more):
    return dict(preset=preset, target='tensorrt', **more)


def calibrated(model, quant, size):
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    quantize_model_(model, quant)
    calibrate(model, lambda: model(images))
    return model, images


def whole(exported):
    """The first dense graph of an export, with its weights."""
    return with_weights(next(iter(exported.graphs.values())), exported.weights)


def check(model, exported, images, runtimes=RUNTIMES):
    """The rules, and codes and outputs in runtimes."""
    graphs = [whole(exported), *(with_weights(head.graph, exported.weights) for head in exported.heads)]
    assert [problem for graph in graphs for problem in violations(graph)] == [] and wrong_weights(model, exported) == []
    for runtime in runtimes:
        pytest.importorskip(runtime)
        found = verify(model, exported, images[:1], runtime, 1)
        assert found.layers and all(layer.good for layer in found.layers) and found.equal >= 0.999, found.to_table()
        assert np.median([output.error for output in found.outputs]) < 0.1, found.to_table()


# ---------------------------------------------------------------------- what is exported
@pytest.fixture(scope='module')
def swin(tmp_path_factory):
    model, images = calibrated(build_backbone('mmdet', **SMALL), quant_of('psaq_v2_w4a8'), ODD)
    return model, images, export_model(model, tmp_path_factory.mktemp('swin') / 'out', [ODD])


def test_a_swin_keeps_the_rules_and_the_codes(swin):
    model, images, exported = swin
    check(model, exported, images)
    assert exported.manifest['label'] == 'W4A8 (TensorRT)' and exported.manifest['quant']['target'] == 'tensorrt'


def test_attention_is_the_pattern_that_fusions_know(swin):
    """Two products a block, each of Q and DQ straight before it, the first after the scale and the transpose, the
    second after softmax; nothing else multiplies two activations."""
    graph = whole(swin[2]).graph
    producer = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    products = []
    for node in graph.node:
        if node.op_type == 'MatMul':
            sides = [producer[name] for name in node.input]
            assert [side.op_type for side in sides] == ['DequantizeLinear'] * 2, node.name
            if sides[1].input[0] not in constants:
                products.append([producer[producer[side.input[0]].input[0]].op_type for side in sides])
    assert products == [['Transpose', 'Transpose'], ['Softmax', 'Transpose']] * 3


def test_folded_normalizations(tmp_path):
    """RepQ's, here with signed codes and zero point 0."""
    model, images = calibrated(build_backbone('mmseg', **SMALL), quant_of('repq_w8a8'), ODD)
    check(model, export_model(model, tmp_path / 'out', [ODD]), images)


def test_every_edge(tmp_path):
    """PSAQ-ViT's quantizer: also inputs of residual sums, which TensorRT fuses with the product before."""
    model, images = calibrated(build_backbone('mmdet', **SMALL), quant_of('psaq_v1_w8a8'), ODD)
    exported = export_model(model, tmp_path / 'out', [ODD])
    check(model, exported, images, RUNTIMES[:1])
    graph = whole(exported).graph
    producer = {output: node.op_type for node in graph.node for output in node.output}
    sides = [[producer.get(name) for name in node.input] for node in graph.node if node.op_type == 'Add']
    assert ['DequantizeLinear'] * 2 in sides


def test_a_dynamic_size(tmp_path):
    model, _ = calibrated(build_backbone('mmdet', **SMALL), quant_of(), (64, 96))
    assert violations(whole(export_model(model, tmp_path / 'out', [(64, 96)], dynamic=True))) == []


def test_a_classifier_without_windows(tmp_path):
    model, images = calibrated(build_vit('timm-vit'), quant_of(), (32, 32))
    check(model, export_model(model, tmp_path / 'out', [(32, 32)]), images)


@pytest.mark.parametrize(
    'library, config, runtime', [('mmseg', SEGMENTOR, 'openvino'), ('mmdet', DETECTOR, 'onnxruntime')]
)
def test_heads(library, config, runtime, tmp_path):
    """UperNet, and Mask R-CNN with the graphs of its box and mask heads, whose features are float32."""
    pytest.importorskip(library)
    from mmengine.config import Config

    (tmp_path / 'config.py').write_text(config.replace('depths=[2, 2, 1, 1]', 'depths=[1, 1, 1, 1]'))
    model = build_full_precision(Config.fromfile(tmp_path / 'config.py'))
    images = student(model, quant_of(scope='full'))
    exported = export_model(model, tmp_path / 'out', [SIZE])
    check(model, exported, images, [runtime])
    assert [head.place.kind for head in exported.heads] == (['box', 'mask'] if library == 'mmdet' else [])
    assert all(head.entry['input']['quantizer'] is None for head in exported.heads)


def test_signed_codes_behind_a_concatenation(tmp_path):
    """OpenVINO moves their quantizer before the concatenation and multiplies wrong codes, if it is let."""
    rng = np.random.default_rng(0)
    tensors = dict(
        w=rng.integers(-127, 128, (6, 16, 1, 1)).astype(np.int8),
        ws=rng.uniform(1e-3, 2e-3, 6).astype(np.float32),
        wz=np.zeros(6, np.int8),
        s=np.float32(0.03),
        z=np.int8(0),
    )
    nodes = [
        helper.make_node('Concat', ['a', 'b'], ['x'], axis=1),
        helper.make_node('QuantizeLinear', ['x', 's', 'z'], ['q']),
        helper.make_node('DequantizeLinear', ['q', 's', 'z'], ['d']),
        helper.make_node('DequantizeLinear', ['w', 'ws', 'wz'], ['v'], axis=0),
        helper.make_node('Conv', ['d', 'v'], ['y']),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8, 4, 4]) for name in 'ab']
    out = helper.make_tensor_value_info('y', TensorProto.FLOAT, None)
    arrays = [numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()]
    graph = helper.make_model(
        helper.make_graph(nodes, 'g', ends, [out], arrays), opset_imports=[helper.make_opsetid('', 17)], ir_version=8
    )
    assert violations(graph) == []
    inputs = {name: rng.normal(0, 1, (1, 8, 4, 4)).astype(np.float32) for name in 'ab'}
    codes = np.clip(np.rint(np.concatenate([inputs['a'], inputs['b']], 1) / tensors['s']), -128, 127)
    weight = tensors['w'][:, :, 0, 0] * tensors['ws'][:, None]
    wanted = np.einsum('oc,nchw->nohw', weight, codes * tensors['s'])
    for runtime in RUNTIMES:
        pytest.importorskip(runtime)
        found = start(graph.SerializeToString(), runtime, 1, 'auto').run(inputs)['y']
        assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max(), runtime


# ---------------------------------------------------------------------- the rules
def test_the_default_target_breaks_many(tmp_path):
    model, _ = calibrated(build_backbone('mmdet', **SMALL), 'w8a8', ODD)
    found = '\n'.join(violations(whole(export_model(model, tmp_path / 'out', [ODD]))))
    for problem in ('uint8: only int8', 'zero point is not 0', 'codes are read by', 'come neither from'):
        assert problem in found, problem


def first(model, kind):
    return next(node for node in model.graph.node if node.op_type == kind)


def put(model, name, array):
    """Give an initializer other content; a new one if there is none."""
    kept = [tensor for tensor in model.graph.initializer if tensor.name != name]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, numpy_helper.from_array(np.asarray(array), name)])
    return name


def insert(model, node):
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([node, *nodes])


def weight_of(model, kind):
    """The DequantizeLinear of the weight of the first product of a kind."""
    name = first(model, kind).input[1]
    return next(node for node in model.graph.node if name in node.output)


def no_zero_point(model):
    del first(model, 'QuantizeLinear').input[2]


def shifted(model):
    first(model, 'QuantizeLinear').input[2] = put(model, 'shifted', np.int8(3))


def many_scales(model):
    first(model, 'QuantizeLinear').input[1] = put(model, 'many', np.ones(3, np.float32))


def other_scale(model):
    node = first(model, 'QuantizeLinear')
    reader = next(n for n in model.graph.node if node.output[0] in n.input)
    reader.input[1] = put(model, 'other', np.float32(7))


def moved_codes(model):
    node = first(model, 'QuantizeLinear')
    reader = next(n for n in model.graph.node if node.output[0] in n.input)
    reader.input[0] = 'moved'
    insert(model, helper.make_node('Identity', [node.output[0]], ['moved'], name='mover'))


def other_axis(model):
    weight_of(model, 'MatMul').attribute[0].i = 0


def transposed_weight(model):
    node = first(model, 'MatMul')
    weight, node.input[1] = node.input[1], 'turned'
    insert(model, helper.make_node('Transpose', [weight], ['turned'], name='turn', perm=[1, 0]))


def quantized_bias(model):
    put(model, 'b8', np.zeros(16, np.int8))
    put(model, 'bs', np.float32(1))
    first(model, 'Conv').input[2] = 'b'
    insert(model, helper.make_node('DequantizeLinear', ['b8', 'bs'], ['b'], name='bias'))


def own_operator(model):
    first(model, 'Softmax').domain = 'mine'


def no_operator(model):
    first(model, 'Softmax').op_type = 'NegativeLogLikelihoodLoss'


def bytes_in_the_network(model):
    node = first(model, 'Softmax')
    insert(model, helper.make_node('Cast', [node.input[0]], ['bytes'], name='narrow', to=TensorProto.UINT8))


def long_top(model):
    put(model, 'k', np.array([4000], np.int64))
    insert(model, helper.make_node('TopK', [first(model, 'Softmax').input[0], 'k'], ['v', 'i'], name='top'))


def cubic(model):
    insert(model, helper.make_node('Resize', [first(model, 'Softmax').input[0]], ['r'], name='r', mode='cubic'))


PLANTED = {
    no_zero_point: 'without a zero point its codes are uint8',
    shifted: 'its zero point is not 0',
    many_scales: 'an activation has 3 scales',
    other_scale: 'reads its codes with another scale',
    moved_codes: 'its codes are read by Identity',
    other_axis: 'its scales lie along axis 0, those of MatMul along axis 1',
    transposed_weight: 'Transpose turn reads its weight',
    quantized_bias: 'a bias is float',
    own_operator: 'TensorRT does not have this operator',
    no_operator: 'TensorRT does not have this operator',
    bytes_in_the_network: 'it casts to uint8',
    long_top: 'its K is 4000',
    cubic: "mode=b'cubic' is not supported",
}


@pytest.mark.parametrize('plant', PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_violation_is_found(swin, plant):
    model = whole(swin[2])
    plant(model)
    found = violations(model)
    assert any(PLANTED[plant] in problem for problem in found), found


def test_what_tensorrt_does_not_have_ends_the_export(tmp_path):
    """A downstream project's operation that ONNX has, and TensorRT has not."""

    class Hidden(torch.nn.Module):
        def forward(self, x):
            return x + torch.det(torch.eye(3) * x.mean())

    model = build_backbone('mmdet', **SMALL)
    model.drop_after_pos = Hidden()
    model, _ = calibrated(model, quant_of(), ODD)
    with pytest.raises(UnsupportedModelError, match="no graph for target='tensorrt'.*Det .*TensorRT does not have"):
        export_model(model, tmp_path / 'out', [ODD])
    assert not (tmp_path / 'out').exists()


def test_onnx_accepts_the_graph(swin):
    onnx.checker.check_model(whole(swin[2]), full_check=True)
