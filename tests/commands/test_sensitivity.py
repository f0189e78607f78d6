"""Which layers suffer most from quantization, and what more bits for them bring."""

import json

import pytest
import torch

pytest.importorskip('mmpretrain')
from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS, init_default_scope  # noqa: E402
from tiny_classifier import ClassifierProject  # noqa: E402

from psaq_mm.commands.sensitivity import main as sensitivity_command  # noqa: E402
from psaq_mm.errors import ConfigError  # noqa: E402
from psaq_mm.models import report_of  # noqa: E402
from psaq_mm.models.sensitivity import LayerError, choose_bits, layer_quantizers, measure_layers  # noqa: E402
from psaq_mm.quantization import calibrate, quantizers  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')

BLOCK = 'backbone.stages.0.blocks.1.'
HURT = BLOCK + 'ffn.layers.0.0'


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    """A classifier of which one layer cannot stand 4 bits.

    A column of its weight is a hundred times as large as the others, and what it would multiply is always 0: in full
    precision the column counts for nothing, and the scale of every row of the weight is made by it alone.
    """
    project = ClassifierProject(tmp_path_factory.mktemp('classifier'))
    content = torch.load(project.checkpoint)
    state = content['state_dict']
    state[f'{HURT}.weight'][:, 3] = 100 * state[f'{HURT}.weight'].abs().max()
    for kind in ('weight', 'bias'):
        state[f'{BLOCK}norm2.{kind}'][3] = 0
    torch.save(content, project.checkpoint)
    project.path = project.config(quant='w4a8', name='w4a8.py', size=(32, 32))
    return project


def run(project, *arguments, path=None, name='work'):
    """Run the command on few samples; its work dir and what it wrote."""
    work_dir = project.folder / name
    assert (
        sensitivity_command(
            [
                str(a)
                for a in (
                    path or project.path,
                    project.checkpoint,
                    '--number',
                    4,
                    '--batch-size',
                    4,
                    '--work-dir',
                    work_dir,
                    *arguments,
                )
            ]
        )
        == 0
    )
    return work_dir, json.loads((work_dir / 'sensitivity.json').read_text())


@pytest.fixture(scope='module')
def ranked(project):
    """One run with a budget; the data set cannot be opened, for it is elsewhere."""
    data = project.folder / 'data'
    data.rename(project.folder / 'elsewhere')
    try:
        return run(project, '--budget', 5)
    finally:
        (project.folder / 'elsewhere').rename(data)


def built(path):
    config = Config.fromfile(path)
    init_default_scope(config.default_scope)
    return MODELS.build(config.model)


def test_the_layer_that_was_made_sensitive_comes_first(ranked):
    layers = ranked[1]['layers']
    assert layers[0]['name'] == HURT and layers[0]['error'] > 1.5 * layers[1]['error']
    assert [layer['rank'] for layer in layers] == list(range(1, len(layers) + 1))
    assert [layer['error'] for layer in layers] == sorted((layer['error'] for layer in layers), reverse=True)
    assert layers[0]['bits'] == dict(weights=4, activations=8) and layers[0]['elements'] == dict(
        weights=16 * 64, activations=64 * 16
    )
    assert layers[0]['parts']['weights'] == pytest.approx(layers[0]['error'], rel=0.1), 'its input has 8 bits'


def test_every_quantized_layer_has_a_row(ranked, project):
    rows = {layer['name']: layer for layer in ranked[1]['layers']}
    report = report_of(built(project.path))
    assert set(rows) == {row.name for row in report.layers}
    assert sorted(layer['position'] for layer in rows.values()) == list(range(len(rows)))
    assert all(('weights' in layer['bits']) == ('weights' in layer['parts']) for layer in rows.values())
    product = rows['backbone.stages.0.blocks.0.attn.w_msa.matmul_qk']
    assert product['bits'] == dict(activations=8) and product['elements'] == dict(activations=2 * 64 * 16)


def test_the_overrides_load_and_lower_the_error_within_the_budget(ranked, project):
    work_dir, report = ranked
    mixed = report['mixed_precision']
    before, after = mixed['average']['weights']
    assert before == 4 and 4 < after <= 5
    assert mixed['error'] < 0.7 * report['error']
    bits = {row.name: row.w_bits for row in report_of(built(work_dir / 'mixed_precision.py')).layers if row.w_bits}
    raised = {override['pattern'] for override in mixed['overrides']}
    assert HURT in raised and bits[HURT] == 8
    assert {name for name, own in bits.items() if own == 8} == raised and set(bits.values()) == {4, 8}
    weights = {
        layer['name']: layer['elements']['weights'] for layer in report['layers'] if 'weights' in layer['elements']
    }
    assert sum(bits[name] * count for name, count in weights.items()) / sum(weights.values()) == pytest.approx(after)


def test_the_mixed_precision_config_is_quantized_like_any_other(ranked, project):
    from psaq_mm.commands.dfq_train import main as dfq_train

    work_dir, _ = ranked
    options = ['--cfg-options', 'dfq.preset=gaussian', 'dfq.iters=0', 'dfq.evolve_every=0']
    assert dfq_train([str(work_dir / 'mixed_precision.py'), '--work-dir', str(project.folder / 'mixed'), *options]) == 0
    state = torch.load(project.folder / 'mixed' / 'student.pth')['state_dict']
    scale, weight = state[f'{HURT}.weight_quantizer.scale'], state[f'{HURT}.weight']
    assert torch.allclose(scale.flatten(), weight.abs().amax(1) / 127)


def test_the_page_plots_and_marks(ranked):
    page = (ranked[0] / 'sensitivity.html').read_text()
    assert '<svg' in page and 'the layer alone' in page and f'<code>{HURT}</code>' in page
    assert page.count('<tr class="mark">') == len(ranked[1]['mixed_precision']['overrides'])


def test_both_budgets(project):
    """W4A4: products of activations have no weights, and are raised on the activations' own account."""
    work_dir, report = run(project, '--quant', 'w4a4', '--budget', 4.5, '--activation-budget', 6, name='both')
    mixed = report['mixed_precision']
    assert mixed['average']['weights'][1] <= 4.5 and mixed['average']['activations'][1] <= 6
    assert any(set(override) == {'pattern', 'a_bits'} for override in mixed['overrides'])
    assert mixed['error'] < report['error']
    model = built(work_dir / 'mixed_precision.py')
    assert model.quant_spec.label == 'W4A4' and len(model.quant_spec.overrides) == len(mixed['overrides'])


def test_metrics_of_the_most_sensitive_layers(project, capsys):
    _, report = run(project, '--metric', 2, name='metric')
    key = 'accuracy/top1'
    assert [key in layer['metrics'] for layer in report['layers'][:3]] == [True, True, False]
    from psaq_mm.commands.evaluation import evaluate
    from psaq_mm.engine.checkpoint import read_checkpoint

    config = Config.fromfile(project.path)
    config.work_dir = str(project.folder / 'evaluated')
    expected = evaluate(config, read_checkpoint(project.checkpoint), 'full precision', full_precision=True)
    assert report['metrics']['full_precision'] == pytest.approx(expected)
    assert key in report['metrics']['quantized'] and 'full_precision: accuracy/top1' in capsys.readouterr().out


def test_a_full_precision_config_and_a_preset(project):
    work_dir, report = run(
        project,
        '--quant',
        'psaq_v2_w4a8',
        '--budget',
        6,
        '--cfg-options',
        'dfq.size=(32,32)',
        path=project.base,
        name='plain',
    )
    model = built(work_dir / 'mixed_precision.py')
    assert (
        model.quant_spec.label == 'W4A8'
        and not model.quant_spec.quantize_softmax
        and model.quant_spec.w_observer == 'mse'
    )
    assert len(model.quant_spec.overrides) == len(report['mixed_precision']['overrides'])


def test_a_config_that_overrides_only_the_backbones_type(project):
    """There the names are the backbone's own."""
    path = project.folder / 'backbone_type.py'
    path.write_text(
        f"_base_ = ['{project.base.name}']\nmodel = dict(backbone=dict(type='psaq_mm.QuantSwinTransformer', "
        f"quant='w4a8'))\n"
        'dfq = dict(size=(32, 32))\n'
    )
    work_dir, report = run(project, '--budget', 5, path=path, name='backbone_type')
    assert report['layers'][0]['name'] == HURT[len('backbone.') :]
    bits = {row.name: row.w_bits for row in built(work_dir / 'mixed_precision.py').backbone.quant_report.layers}
    assert bits[HURT[len('backbone.') :]] == 8


def test_a_spec_that_a_method_brings(project):
    """RepQ-ViT folds scales into LayerNorms, PSAQ-ViT V1 has edges beside its layers: each edge is a row under the name
    that overrides use."""
    _, repq = run(project, '--method', 'repq', '--quant', 'w4a4', name='repq')
    work_dir, first = run(
        project, '--method', 'psaq_v1', '--quant', 'w4a4', '--budget', 5, '--activation-budget', 5, name='psaq_v1'
    )
    assert repq['quant']['reparameterize'] and repq['error'] > 0
    edges = [layer for layer in first['layers'] if layer['kind'] == 'activation']
    assert any(layer['name'].endswith('residual1') for layer in edges)
    assert first['mixed_precision']['error'] < first['error']
    model = built(work_dir / 'mixed_precision.py')
    raised = {o['pattern'] for o in first['mixed_precision']['overrides'] if 'a_bits' in o}
    assert raised and raised <= {row.name for row in report_of(model).layers if row.a_bits == 8}


@pytest.fixture(scope='module')
def detector():
    """Mask R-CNN with everything quantized, calibrated."""
    pytest.importorskip('mmdet')
    from tiny import DETECTOR, build_full_precision

    from psaq_mm.models import TaskModel, quantize_model_

    model = build_full_precision(Config.fromstring(DETECTOR, '.py'))
    quantize_model_(model, dict(preset='w4a8', scope='full'))
    images = torch.randn(1, 3, 64, 96)
    calibrate(model, lambda: TaskModel(model, max_proposals=5).calibration_forward(images, 'full'))
    return model, images


def test_roi_heads_are_seen_and_modes_are_as_before(detector):
    model, images = detector
    modes = {name: quantizer.mode for name, quantizer in quantizers(model)}
    rows, whole = measure_layers(model, [images])
    assert {name: quantizer.mode for name, quantizer in quantizers(model)} == modes
    errors = {row.name: row.error for row in rows}
    for name in (
        'backbone.patch_embed.projection',
        'neck.lateral_convs.0.conv',
        'rpn_head.rpn_cls',
        'roi_head.bbox_head.fc_cls',
        'roi_head.mask_head.conv_logits',
    ):
        assert 0 < errors[name] < whole, name
    assert set(errors) == set(layer_quantizers(model))


# ---------------------------------------------------------------------- the choice itself
def row(name, error, weights, bits=4):
    return LayerError(name, 0, 'Linear', dict(weights=bits), dict(weights=weights), error, dict(weights=error), {})


def test_the_choice_is_by_error_a_bit():
    rows = [row('large', 1.0, 100), row('small', 0.5, 10), row('tiny', 0.1, 5), row('done', 9.0, 5, bits=8)]
    choice = choose_bits(rows, dict(weights=5.2))
    # 120 weights, (115 * 4 + 5 * 8) / 120 = 4.17 bits; room for 124 bits: 'small' takes 40, 'large' would take 400,
    # 'tiny' takes 20.
    assert [override.to_dict() for override in choice.overrides] == [
        dict(pattern='small', w_bits=8),
        dict(pattern='tiny', w_bits=8),
    ]
    assert choice.average['weights'] == pytest.approx((500 / 120, 560 / 120))
    assert [o.pattern for o in choose_bits(rows, dict(weights=8)).overrides] == ['large', 'small', 'tiny']
    assert choose_bits(rows, dict(weights=500 / 120)).overrides == ()


def test_names_with_wildcards_match_themselves_alone():
    from fnmatch import fnmatchcase

    pattern = choose_bits([row('odd[1]*', 1.0, 1), row('odd1x', 0.0, 1)], dict(weights=8)).overrides[0].pattern
    assert fnmatchcase('odd[1]*', pattern) and not fnmatchcase('odd1x', pattern)


@pytest.mark.parametrize('budget', [3, 8.5])
def test_budgets_that_cannot_be_had(budget):
    with pytest.raises(ConfigError, match=rf'--budget {budget:g} .*4.00 bits on average now and at most 8'):
        choose_bits([row('only', 1.0, 1)], dict(weights=budget))


def test_mistakes_on_the_command_line(project, capsys):
    def fails(*arguments):
        assert sensitivity_command([str(a) for a in (*arguments, '--work-dir', project.folder / 'refused')]) == 1
        return capsys.readouterr().err

    assert 'no source of samples' in fails(project.path, project.checkpoint, '--samples', 'brown')
    assert 'must be at least 1' in fails(project.path, project.checkpoint, '--number', 0)
    assert 'is full-precision' in fails(project.base, project.checkpoint)
    assert 'there is no checkpoint' in fails(project.path, project.folder / 'none.pth')
    assert 'smaller than one attention window' in fails(
        project.path, project.checkpoint, '--cfg-options', 'dfq.size=(8,8)'
    )
    content = torch.load(project.checkpoint)
    content['state_dict']['backbone.x.input_quantizer.scale'] = torch.ones(1)
    torch.save(content, project.folder / 'student.pth')
    assert 'is quantized: give the full-precision checkpoint' in fails(project.path, project.folder / 'student.pth')
    assert not (project.folder / 'refused').exists()
