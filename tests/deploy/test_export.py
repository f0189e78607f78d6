"""Exported models against the fake-quantized ones they were made of: codes layer by layer, outputs, size, and what is
refused."""

import numpy as np
import pytest
import torch
from swin_models import build_backbone
from vit_models import build as build_other

from psaq_mm.commands.evaluation import check_spec
from psaq_mm.deploy import export_model, load
from psaq_mm.deploy.report import execution, sizes_of, summary
from psaq_mm.deploy.verify import LayerAgreement, Verification, verify, wrong_weights
from psaq_mm.errors import CheckpointError, ConfigError, DataError, NotCalibratedError, PsaqError, UnsupportedModelError
from psaq_mm.models import quantize_model_, spec_of
from psaq_mm.quantization import calibrate
from psaq_mm.runtime.bundle import read_manifest, read_weights

RUNTIMES = ('onnxruntime', 'openvino')
SIZE = (57, 75)  # pads the image, the windows of each stage and the patches to be merged
SWIN = dict(depths=[2, 1], num_heads=[1, 2], strides=(4, 2), out_indices=(0, 1))


ONE_STAGE = dict(depths=[2], num_heads=[1], strides=(4,), out_indices=(0,))
"""Two blocks, of which one shifts its windows: exports take most of the time here."""


def calibrated(model, quant, size, batch=2):
    images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(2))
    quantize_model_(model, quant)
    calibrate(model, lambda: model(images))
    return model, images


@pytest.fixture(scope='module')
def swin(tmp_path_factory):
    """A small Swin for two sizes, padded both, and its images."""
    model, images = calibrated(build_backbone('mmdet', **SWIN), 'w8a8', SIZE)
    return model, images, export_model(model, tmp_path_factory.mktemp('swin') / 'out', [SIZE, (28, 28)])


def check_codes(model, exported, images, runtime):
    pytest.importorskip(runtime)
    found = verify(model, exported, images, runtime, threads=1)
    assert found.good, found.to_table()
    return found


# ---------------------------------------------------------------------- exactness
@pytest.mark.parametrize('runtime', RUNTIMES)
def test_codes_of_every_layer_are_those_of_the_fake_quantized_model(swin, runtime):
    model, images, exported = swin
    found = check_codes(model, exported, images, runtime)
    names = {n for n, m in model.named_modules() if n.endswith(('input_quantizer', 'lhs_quantizer', 'rhs_quantizer'))}
    assert {layer.name for layer in found.layers} == names
    assert all(output.error < 0.05 for output in found.outputs)


def test_a_student_from_before_a_setting_has_its_default(swin):
    model, _, _ = swin
    made = spec_of(model).to_dict()
    del made['symmetric_attention']
    check_spec(model, dict(meta=dict(psaq_mm=dict(quant=made))), 'student.pth')
    made['symmetric_attention'] = True
    with pytest.raises(CheckpointError, match='symmetric_attention=True, the config False'):
        check_spec(model, dict(meta=dict(psaq_mm=dict(quant=made))), 'student.pth')


def test_verification_tells_a_wrong_scale_and_a_wrong_weight(swin):
    pytest.importorskip('onnxruntime')
    model, images, exported = swin
    name = 'stages.0.blocks.0.ffn.layers.1'
    layer = dict(model.named_modules())[name]
    scale, weight = layer.input_quantizer.scale.clone(), layer.weight.detach().clone()
    try:
        layer.input_quantizer.scale.mul_(1.02)
        found = verify(model, exported, images[:1], 'onnxruntime', 1)
        assert [row.name for row in found.layers if not row.good] == [f'{name}.input_quantizer']
        assert 'too far' in found.to_table()
        with torch.no_grad():
            layer.weight[0, 0] += 3 * layer.weight_quantizer.scale[0]
        assert wrong_weights(model, exported) == [name]
    finally:
        layer.input_quantizer.scale.copy_(scale)
        with torch.no_grad():
            layer.weight.copy_(weight)


def test_a_layer_passes_with_ties_and_with_nothing_further_off():
    name, elements = 'stages.0.qkv', 1000
    good = LayerAgreement(name, elements, 0.9991, 1, 0.3)
    ties = LayerAgreement(name, elements, 0.99, 1, 4e-4)
    assert good.good and not good.ties and ties.good and ties.ties
    for share, step, edge in ((0.99, 1, 0.01), (0.9999, 2, 0.5), (0.99, 2, 4e-4)):
        bad = LayerAgreement(name, elements, share, step, edge)
        assert not bad.good and 'too far' in Verification('openvino', [bad], [], []).to_table()
    many = LayerAgreement('stages.1.qkv', 100 * elements, 1.0, 0, 0.0)
    assert (
        Verification('openvino', [ties, many], [], []).good
        and 'ties' in Verification('openvino', [ties, many], [], []).to_table()
    )
    assert not Verification('openvino', [ties], [], []).good, 'all in all 99.9 % all the same'


CASES = {
    'repq': ('mmdet', 'repq_w4a4', SWIN),  # logarithmic softmax, folded LayerNorm, fill of padded windows
    'every edge': ('mmseg', 'psaq_v1_w8a8', SWIN),
    'mmpretrain': (
        'mmpretrain',
        'w4a8',
        dict(arch=dict(embed_dims=16, depths=[2, 1], num_heads=[1, 2]), out_indices=(0, 1)),
    ),
}


@pytest.mark.parametrize('case', CASES)
def test_other_quantizers_and_libraries(case, tmp_path):
    library, quant, more = CASES[case]
    model, images = calibrated(build_backbone(library, **more), quant, SIZE)
    exported = export_model(model, tmp_path / 'out', [SIZE])
    assert wrong_weights(model, exported) == []
    for runtime in RUNTIMES:
        pytest.importorskip(runtime)
        found = verify(model, exported, images[:1], runtime, 1)
        # So few elements a layer that one at a tie may be more than a thousandth of them.
        assert found.equal >= 0.999 and max(layer.step for layer in found.layers) <= 1, found.to_table()


OTHERS = ('timm-vit', 'timm-swin', 'mmpretrain-vit', 'mmseg-vit')


@pytest.mark.parametrize('name', OTHERS)
def test_other_backbones(name, tmp_path):
    pytest.importorskip('onnxruntime')
    model = build_other(name)
    size = (56, 72) if name == 'timm-swin' else (32, 32)
    model, images = calibrated(model, 'w8a8', size)
    exported = export_model(model, tmp_path / 'out', [size])
    assert exported.manifest['task'] == ('classification' if name.startswith('timm') else 'backbone')
    check_codes(model, exported, images, 'onnxruntime')


@pytest.mark.parametrize('quant', ['w8a8', 'w4a4'])
@pytest.mark.parametrize('name', ['mmdet', 'timm-swin'])
def test_symmetric_queries_and_values_leave_nothing_to_correct(name, quant, tmp_path):
    size = SIZE if name == 'mmdet' else (56, 72)
    model = build_backbone('mmdet', **ONE_STAGE) if name == 'mmdet' else build_other(name)
    model, images = calibrated(model, dict(preset=quant, symmetric_attention=True), size)
    exported = export_model(model, tmp_path / 'out', [size])
    assert not any(label.endswith('key_sums') for label in exported.exportable.weights)
    rows = {row['name']: row['type'] for row in exported.manifest['tensors'] if row['kind'] == 'activation'}
    values = [name for name in rows if name.endswith('matmul_av.rhs_quantizer')]
    assert values and {rows[name] for name in values} == {'int8'}
    for runtime in RUNTIMES:
        pytest.importorskip(runtime)
        found = verify(model, exported, images[:1], runtime, 1)
        assert found.equal >= 0.999 and max(layer.step for layer in found.layers) <= 1, found.to_table()


# ---------------------------------------------------------------------- one graph for every size
@pytest.fixture(scope='module')
def dynamic(tmp_path_factory):
    model, images = calibrated(build_backbone('mmdet', **SWIN), 'repq_w8a8', (64, 96))
    return model, images, export_model(model, tmp_path_factory.mktemp('dynamic') / 'out', [(64, 90)], dynamic=True)


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_one_graph_runs_every_size(dynamic, runtime):
    model, images, exported = dynamic
    check_codes(model, exported, images[:1], runtime)
    assert exported.manifest['graphs'][0]['size'] == [64, 96]
    deployed = load(exported.directory, runtime, 1)
    for size in ((64, 96), (32, 32), (160, 128), (90, 70)):
        image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(size[0]))
        found = deployed.run(image.numpy())
        with torch.no_grad():
            wanted = model(torch.nn.functional.pad(image, (0, -size[1] % 32, 0, -size[0] % 32)))
        for i, level in enumerate(wanted):
            height, width = (-(-s // (4 * 2**i)) for s in size)
            assert found[f'level_{i}'].shape[2:] == (height, width)
            level = level[..., :height, :width].numpy()
            assert np.linalg.norm(found[f'level_{i}'] - level) < 0.03 * np.linalg.norm(level)


def test_a_dynamic_size_is_refused_where_it_is_not_right(swin, tmp_path):
    other, _ = calibrated(build_other('mmpretrain-vit'), 'w8a8', (32, 32))
    with pytest.raises(UnsupportedModelError, match='does not export with a dynamic size'):
        export_model(other, tmp_path / 'out', [(32, 32)], dynamic=True)
    edges, _ = calibrated(build_backbone('mmdet', **SWIN), 'psaq_v1_w8a8', (64, 64))
    with pytest.raises(UnsupportedModelError, match='points=.all. does not export with a dynamic size'):
        export_model(edges, tmp_path / 'out', [(64, 64)], dynamic=True)


# ---------------------------------------------------------------------- running it
@pytest.mark.parametrize('runtime', RUNTIMES)
def test_products_are_integer(swin, runtime):
    pytest.importorskip(runtime)
    model, _, exported = swin
    # on processors where it would not be chosen, too
    deployed = load(exported.directory, runtime, 1, kernels='integer')
    told = execution(deployed, SIZE)
    linears = sum(1 for row in exported.manifest['tensors'] if row['kind'] == 'weight')
    # the patch embedding is the runtime's own choice
    assert int(told.split(': ')[1].split(' of ')[0]) >= linears - 1, told
    assert 'qkv' not in told and 'ffn' not in told


def test_gain_and_offset_of_a_normalization_are_merged_with_the_quantizer_of_windows(swin):
    """In OpenVINO, where nothing stands between the two; else a float32 map is written and read once more."""
    pytest.importorskip('openvino')
    _, _, exported = swin
    graph = load(exported.directory, 'openvino', 1, kernels='integer').session(SIZE).compiled.get_runtime_model()
    merged = [node.get_rt_info()['originalLayersNames'].astype(str) for node in graph.get_ordered_ops()]
    merged = [names for names in merged if 'qkv.input_quantizer.codes' in names]
    assert len(merged) == sum(SWIN['depths']) and all('norm1' in names for names in merged), merged


@pytest.mark.parametrize('w_bits', [4, 7])
def test_asymmetric_weights_of_few_bits_are_signed_bytes_without_zero_points(w_bits, tmp_path):
    model, images = calibrated(build_backbone('mmdet', **SWIN), f'psaq_v2_w{w_bits}a8', SIZE)
    assert model.get_submodule('stages.0.blocks.0.attn.w_msa.qkv').weight_quantizer.zero_point.any()
    exported = export_model(model, tmp_path / 'out', [SIZE])
    assert wrong_weights(model, exported) == []
    manifest, codes = (
        read_manifest(exported.directory),
        read_weights(exported.directory, read_manifest(exported.directory)),
    )
    kept = {name: weight for name, weight in exported.exportable.weights.items() if weight.layer}
    assert kept and not any(weight.apart or weight.zero_point.any() for weight in kept.values())
    assert any(f'{name}.weight.codes' in codes for name in kept), 'small ones stay in the graph'
    for name, weight in kept.items():
        assert np.array_equal(codes.get(f'{name}.weight.codes', weight.codes.numpy()), weight.codes.numpy())
        assert int(weight.codes.max()) - int(weight.codes.min()) > 2**w_bits - 1, 'channels have ranges of their own'
    packed = manifest['weights']['packed']
    assert bool(packed) == (w_bits <= 4)
    for runtime in RUNTIMES:
        pytest.importorskip(runtime)
        found = verify(model, exported, images[:1], runtime, 1)
        assert found.equal >= 0.999 and max(layer.step for layer in found.layers) <= 1, found.to_table()


@pytest.fixture(scope='module')
def asymmetric(tmp_path_factory):
    model, _ = calibrated(build_backbone('mmdet', **SWIN), 'repq_w8a8', SIZE)
    return model, export_model(model, tmp_path_factory.mktemp('asymmetric') / 'out', [SIZE])


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_products_with_asymmetric_weights_are_integer(asymmetric, runtime):
    pytest.importorskip(runtime)
    model, exported = asymmetric
    assert any(weight.apart for weight in exported.exportable.weights.values()) and not wrong_weights(model, exported)
    told = execution(load(exported.directory, runtime, 1, kernels='integer'), SIZE)
    linears = sum(
        1 for row in exported.manifest['tensors'] if row['kind'] == 'weight' and not row['name'].startswith('ones.')
    )
    assert int(told.split(': ')[1].split(' of ')[0]) >= linears - 1, told
    assert 'qkv' not in told and 'ffn' not in told


def test_a_smaller_image_is_padded_as_the_libraries_pad_a_batch(swin):
    pytest.importorskip('onnxruntime')
    model, images, exported = swin
    deployed = load(exported.directory, 'onnxruntime', 1)
    small = images[:, :, :50, :70]
    found = deployed.run(small.numpy())
    with torch.no_grad():
        wanted = model(torch.nn.functional.pad(small, (0, 5, 0, 7)))
    for i, (height, width) in enumerate([(13, 18), (7, 9)]):
        assert found[f'level_{i}'].shape[2:] == (height, width)
        error = np.abs(found[f'level_{i}'] - wanted[i][..., :height, :width].numpy())
        assert error.mean() < 0.01 * wanted[i].abs().mean()


def test_an_image_that_is_too_large_is_refused_in_one_sentence(swin):
    pytest.importorskip('onnxruntime')
    deployed = load(swin[2].directory, 'onnxruntime', 1)
    with pytest.raises(
        DataError, match='an image of 58 x 70 is larger than what the model was exported for .28 x 28, 57 x 75.'
    ):
        deployed.run(np.zeros((1, 3, 58, 70), np.float32))


def test_the_sizes_share_their_weights(swin):
    manifest = read_manifest(swin[2].directory)
    assert [g['size'] for g in manifest['graphs']] == [list(SIZE), [28, 28]]
    names = [{n for n in g['weights'] if n.endswith('.codes')} for g in manifest['graphs']]
    assert names[0] == names[1] and names[0]


def test_the_report_tells_every_tensor(swin):
    model, _, exported = swin
    rows = exported.manifest['tensors']
    weights = {row['name']: row['type'] for row in rows if row['kind'] == 'weight'}
    layers = {row.name for row in model.quant_report.layers if row.w_bits}
    assert weights == {f'{name}.weight': 'int8' for name in layers}
    assert all(row['type'] in ('uint8', 'int8') or row.get('reason') for row in rows if row['kind'] == 'activation')
    assert 'float: ' in summary(rows)


def test_what_stays_float_has_a_reason(tmp_path):
    model, _ = calibrated(
        build_backbone('mmdet', **SWIN),
        dict(preset='w8a8', quantize_softmax=False, overrides=[dict(pattern='*.reduction', float=True)]),
        (28, 28),
    )
    exported = export_model(model, tmp_path / 'out', [(28, 28)])
    reasons = {row['name']: row['reason'] for row in exported.manifest['tensors'] if 'reason' in row}
    assert reasons['stages.0.downsample.reduction'] == 'override'
    assert sum('left operand is not quantized' in reason for reason in reasons.values()) == 3  # softmax times v


def test_the_graph_has_no_control_flow_and_each_normalization_once(swin):
    kinds = [node.op_type for node in swin[2].graphs[SIZE].model.graph.node]
    assert kinds.count('LayerNormalization') == len([m for m in swin[0].modules() if isinstance(m, torch.nn.LayerNorm)])
    assert not {'If', 'Loop', 'Scan', 'NonZero', 'ScatterND', 'GatherND'} & set(kinds)


# ---------------------------------------------------------------------- size
@pytest.mark.parametrize('quant, most', [('w8a8', 0.27), ('w4a8', 0.15)])
def test_size_beside_float32(quant, most, tmp_path):
    # Wide enough for the weights to outweigh scales and graph, as in a real model: the last stages of Swin-T.
    wide = dict(embed_dims=96, depths=[1, 1, 1, 1], num_heads=[3, 6, 12, 24], strides=(4, 2, 2, 2), out_indices=(3,))
    model, _ = calibrated(build_backbone('mmdet', **wide), quant, (56, 56), batch=1)
    on_disk, float32 = sizes_of(model, export_model(model, tmp_path / 'out', [(56, 56)]))
    assert on_disk / float32 <= most


# ---------------------------------------------------------------------- bad input
def test_an_old_opset_is_refused(swin, tmp_path):
    with pytest.raises(ConfigError, match='opset=11 is too old'):
        export_model(swin[0], tmp_path / 'out', [SIZE], opset=11)
    with pytest.raises(ConfigError, match='opset=99 is newer'):
        export_model(swin[0], tmp_path / 'out', [SIZE], opset=99)


def test_a_model_without_ranges_or_quantizers_is_refused(tmp_path):
    model = build_backbone('mmdet', **SWIN)
    with pytest.raises(UnsupportedModelError, match='is not quantized'):
        export_model(model, tmp_path / 'out', [SIZE])
    quantize_model_(model, 'w8a8')
    with pytest.raises(NotCalibratedError, match='has no range'):
        export_model(model, tmp_path / 'out', [SIZE])
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('size', [(0, 32), (32,)])
def test_a_size_that_is_none_is_refused(swin, size, tmp_path):
    with pytest.raises(ConfigError, match='is no image size'):
        export_model(swin[0], tmp_path / 'out', [size])


def test_a_size_that_the_position_embedding_does_not_take_is_refused(tmp_path):
    model = build_other('timm-vit')
    model, _ = calibrated(model, 'w8a8', (32, 32))
    with pytest.raises(ConfigError, match='takes 32 x 32 alone'):
        export_model(model, tmp_path / 'out', [(64, 64)])


def test_the_exported_model_is_not_changed(swin):
    model, images, _ = swin
    with torch.no_grad():
        before = model(images)
        after = build_backbone('mmdet', **SWIN)
        quantize_model_(after, 'w8a8')
        after.load_state_dict(model.state_dict())
        after.eval()
        assert all(torch.equal(a, b) for a, b in zip(before, after(images)))
    assert 'forward' not in vars(model.stages[0].blocks[0].attn.w_msa.qkv)


# ---------------------------------------------------------------------- every size is verified
def scaled(graph, factor):
    """A graph with the scales of its activations times ``factor``."""
    from onnx import numpy_helper

    for tensor in graph.model.graph.initializer:
        if tensor.name.endswith('qkv.input_quantizer.scale'):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))


def test_every_exported_size_is_verified(capsys, tmp_path):
    pytest.importorskip('onnxruntime')
    from psaq_mm.engine.exporting import verified_sizes, verify_export

    model, _ = calibrated(build_backbone('mmdet', **ONE_STAGE), 'w8a8', SIZE)
    sizes = [(56, 56), (112, 84), (28, 28)]
    exported = export_model(model, tmp_path / 'out', sizes)
    assert verified_sizes(exported) == sizes
    scaled(exported.graphs[sizes[1]], 1.5)
    with pytest.raises(PsaqError, match='the integer codes in onnxruntime at 112 x 84 are further'):
        verify_export(model, exported, ['onnxruntime'], 1)
    tables = capsys.readouterr().out.split('codes in onnxruntime, ')[1:]
    assert [table.split('  ')[0] for table in tables] == ['56 x 56', '112 x 84', '28 x 28']
    assert ['too far' in table for table in tables] == [False, True, False]
    assert ['patch_embed' in table for table in tables] == [True, False, False], (
        'good layers of the later sizes are left out'
    )


def test_a_graph_for_every_size_is_verified_at_one_that_it_was_not_traced_with(dynamic):
    pytest.importorskip('onnxruntime')
    from psaq_mm.engine.exporting import verified_sizes

    model, _, exported = dynamic
    assert verified_sizes(exported) == [(64, 96), (96, 160)]
    found = verify(
        model, exported, torch.randn(1, 3, 96, 160, generator=torch.Generator().manual_seed(0)), 'onnxruntime', 1
    )
    assert not found.layers and found.good and all(output.error < 0.05 for output in found.outputs)
    assert 'codes in onnxruntime, 96 x 160' in found.to_table()
