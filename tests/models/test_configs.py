"""Every leaf config of the repository: it names a checkpoint, and builds a quantized model that still lists its float
parts."""

import functools
import re
from pathlib import Path

import pytest
import torch
from quick_builds import WeightsWithoutMemory, metafiles_read_once

ROOT = Path(__file__).parents[2] / 'configs'
LEAVES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob('*_w?a?.py'), *ROOT.glob('demo/*_w?a?.py')])
COCO = [f'{model}_swin_{size}' for model in ('mask_rcnn', 'cascade_mask_rcnn') for size in 'tsb'] + ['retinanet_swin_t']
ADE20K = [f'upernet_swin_{size}' for size in 'tsb'] + ['upernet_deit_s', 'upernet_deit_b', 'upernet_vit_b']
PRECISIONS = ('w8a8', 'w4a8', 'w6a6', 'w4a4')
METHODS = ('psaq_v1', 'psaq_v2', 'repq', 'repq_v2')


@pytest.fixture(scope='module', autouse=True)
def quick_configs():
    with metafiles_read_once():
        yield


@functools.lru_cache(None)
def leaf_config(leaf):
    """A leaf without its pretrained initialization, under its library's scope."""
    from mmengine.config import Config

    from psaq_mm.engine.config import drop_pretrained

    config = Config.fromfile(ROOT / leaf)
    pytest.importorskip(config.default_scope)
    drop_pretrained(config.model)
    return config


def build(config, model):
    """A model of full size in no memory."""
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(config.default_scope)
    with WeightsWithoutMemory():
        return MODELS.build(model)


@functools.lru_cache(None)
def float_keys(name):
    """State-dict keys of the full-precision model that the leaves of ``name`` quantize."""
    from psaq_mm.engine.config import full_precision_model_config

    config = leaf_config(f'{name}_w8a8.py')
    return set(build(config, full_precision_model_config(config.model)).state_dict())


def test_the_promised_configs_are_there():
    assert {f'{model}_{bits}.py' for model in COCO + ADE20K for bits in PRECISIONS} <= set(LEAVES)


@pytest.mark.parametrize('leaf', LEAVES)
def test_leaf_builds(leaf):
    from psaq_mm.engine.config import sample_size
    from psaq_mm.quantization import is_quantizer_key

    config, (name, label) = leaf_config(leaf), leaf[:-3].rsplit('_', 1)
    assert str(config.load_from).endswith('.pth')
    assert len((ROOT / leaf).read_text().splitlines()) <= 10
    assert min(config.dfq.get('size') or sample_size(config)) >= 28
    model = build(config, config.model)
    assert model.quant_spec.label == label.upper() and model.quant_spec.scope == 'backbone'
    assert {row.w_bits for row in model.quant_report.layers if row.w_bits} == {int(label[1])}
    assert {row.a_bits for row in model.quant_report.layers} == {int(label[3]), 8}, 'the image stays at 8 bits'
    assert all(row.name.startswith('backbone.') for row in model.quant_report.layers)
    assert any(row.reason == 'outside the scope' for row in model.quant_report.floats)
    assert {key for key in model.state_dict() if not is_quantizer_key(key)} == float_keys(name)


@pytest.mark.parametrize('name', COCO + ADE20K)
def test_every_method_at_every_precision(name):
    """As the commands read ``--method`` and ``--quant``; what a method adds to a model is built once each."""
    from psaq_mm.engine.config import apply_method
    from psaq_mm.engine.presets import resolve_dfq
    from psaq_mm.quantization import QuantSpec

    config = leaf_config(f'{name}_w4a4.py')
    for method in METHODS:
        for bits in PRECISIONS:
            changed = apply_method(config, bits, method)
            spec = QuantSpec.parse(changed.model.quant)
            assert (
                spec.label.lower() == bits
                and spec.scope == 'backbone'
                and spec.reparameterize == method.startswith('repq')
            )
            dfq = resolve_dfq(changed.dfq)
            assert (
                dfq['method'] == method
                and dfq['size'] == config.dfq['size']
                and dfq['batch_size'] == config.dfq['batch_size']
            )
    for method in ('psaq_v1', 'repq'):
        model = build(config, apply_method(config, 'w4a4', method).model)
        assert float_keys(name) < set(model.state_dict())
        edges = [row for row in model.quant_report.layers if row.kind == 'activation']
        assert bool(edges) == (method == 'psaq_v1')
        folded = [key for key in model.state_dict() if key.endswith('.folded_bias')]
        assert bool(folded) == (method == 'repq'), 'every LayerNorm before a Linear'


@pytest.mark.parametrize('size', 'tsb')
def test_cascade_has_the_box_heads_of_the_papers(size):
    """Swin's own mmdet 2 config: 4conv1f, SyncBN, a class's own box, GIoU on decoded boxes, and the backbones of
    Swin-T, S and B."""
    config = leaf_config(f'cascade_mask_rcnn_swin_{size}_w8a8.py')
    model = build(config, config.model)
    expected = dict(t=(96, [2, 2, 6, 2]), s=(96, [2, 2, 18, 2]), b=(128, [2, 2, 18, 2]))[size]
    assert (config.model.backbone.embed_dims, config.model.backbone.depths) == expected
    stds = []
    for head in model.roi_head.bbox_head:
        assert [len(head.shared_convs), len(head.shared_fcs)] == [4, 1]
        assert all(isinstance(conv.bn, torch.nn.SyncBatchNorm) for conv in head.shared_convs)
        assert head.fc_reg.out_features == 4 * 80 and head.reg_decoded_bbox
        assert type(head.loss_bbox).__name__ == 'GIoULoss' and head.loss_bbox.loss_weight == 10
        stds.append(tuple(head.bbox_coder.stds))
    assert stds == [(0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)]
    assert config.train_cfg.max_epochs == 36 and config.optim_wrapper.optimizer.type == 'AdamW'


def test_cascade_with_its_synchronized_normalization_runs_on_the_cpu():
    """In eval mode, in which everything here runs, SyncBN wants no process group."""
    from mmengine.config import Config
    from mmengine.registry import MODELS

    from psaq_mm.models import TaskModel
    from psaq_mm.quantization import calibrate

    config = leaf_config('cascade_mask_rcnn_swin_t_w8a8.py')
    model = Config(dict(model=config.model)).model.copy()
    narrow = dict(
        quant=dict(preset='w8a8', scope='full'),
        backbone=dict(embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8]),
        neck=dict(in_channels=[16, 32, 64, 128], out_channels=16),
        rpn_head=dict(in_channels=16, feat_channels=16),
        roi_head=dict(
            bbox_roi_extractor=dict(out_channels=16),
            mask_roi_extractor=dict(out_channels=16),
            mask_head=dict(in_channels=16, conv_out_channels=16),
        ),
    )
    model = Config(dict(model=model))
    model.merge_from_dict(dict(model=narrow))
    for head in model.model.roi_head.bbox_head:
        head.update(in_channels=16, conv_out_channels=16, fc_out_channels=32)
    torch.manual_seed(0)
    built = MODELS.build(model.model).eval()
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in built.modules())
    images = torch.randn(1, 3, 64, 96)
    calibrate(built, lambda: TaskModel(built, max_proposals=8).calibration_forward(images, 'full'))
    assert all(torch.isfinite(level).all() for level in TaskModel(built, ('neck', 'head')).outputs(images))


# ---------------------------------------------------------------------- configs/README.md, docs/reference/papers.md
PAPERS = ROOT.parent / 'docs' / 'reference' / 'papers.md'


def test_the_readme_lists_every_config_and_names_none_that_is_not_there():
    text = (ROOT / 'README.md').read_text()
    for name in COCO + ADE20K:
        assert f'`{name}`' in text, name
    named = set(re.findall(r'configs/([\w/]+\.py)', text + PAPERS.read_text()))
    assert len(named) > 10
    assert not [path for path in sorted(named) if not (ROOT / path).is_file()]


def test_the_readme_has_the_checkpoint_of_every_full_precision_config():
    from mmengine.config import Config

    text = (ROOT / 'README.md').read_text() + PAPERS.read_text()
    for name in COCO + ADE20K:
        source = ROOT / 'full_precision' / f'{name}.py'
        assert Path(Config.fromfile(source).load_from).name in text, name
        for url in re.findall(r'https://github\.com\S+\.pth', source.read_text()):
            assert url in text or url.endswith('window7_224.pth'), (
                f'{url} is neither the checkpoint nor the pretrained backbone'
            )


def test_every_published_number_has_a_command_that_can_be_run():
    """As far as ``tools/compare.py`` plans it without data or checkpoints; the leaves themselves are built above."""
    import argparse
    import shlex

    from psaq_mm.commands.common import merge_options
    from psaq_mm.engine.config import apply_method
    from psaq_mm.engine.data_overlap import check_no_overlap
    from psaq_mm.quantization import QuantSpec

    parser = argparse.ArgumentParser()
    parser.add_argument('config')
    for name in ('--quant', '--method', '--samples', '--cfg-options'):
        parser.add_argument(name)
    rows = re.findall(r'^\| ([^|]+) \| (W\dA\d) \| `(configs/[^`]+)` \|$', PAPERS.read_text(), re.MULTILINE)
    assert len(rows) >= 35
    for published, label, command in rows:
        args = parser.parse_args(shlex.split(command))
        options = dict([args.cfg_options.split('=')]) if args.cfg_options else {}
        config = leaf_config(args.config[len('configs/') :])
        check_no_overlap(config)
        quantized = merge_options(apply_method(config, args.quant, args.method), options)
        assert QuantSpec.parse(quantized.model.quant).label == label, command
        assert quantized.load_from.startswith('checkpoints/') or 'classification/' in command
        assert args.samples in ('generated', 'real')
        if re.search(r' (V1|V2|RepQ)', published):
            assert (
                args.method == dict(V1='psaq_v1', V2='psaq_v2', RepQ='repq')[re.search(r' (V1|V2|RepQ)', published)[1]]
            ), command


# ---------------------------------------------------------------------- classifiers
CLASSIFIERS = sorted(path.stem for path in (ROOT / 'classification').glob('*.py'))


def test_the_promised_classifiers_are_there():
    assert set(CLASSIFIERS) == {
        'vit_tiny',
        'vit_small',
        'vit_base',
        'deit_tiny',
        'deit_small',
        'deit_base',
        'swin_tiny',
        'swin_small',
    }


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('name', CLASSIFIERS)
def test_a_classifier_under_every_method_and_precision(name, method):
    """As the commands read it; the models themselves are built below, once each."""
    from psaq_mm.commands.common import load_config
    from psaq_mm.engine.presets import resolve_dfq
    from psaq_mm.quantization import QuantSpec

    for bits in PRECISIONS:
        config = load_config(str(ROOT / 'classification' / f'{name}.py'), quant=bits, method=method)
        spec = QuantSpec.parse(config.model.quant)
        assert spec.label.lower() == bits and spec.scope == 'full' and spec.reparameterize == method.startswith('repq')
        assert resolve_dfq(config.dfq)['method'] == method
    assert config.load_from == f'https://huggingface.co/timm/{config.model.model_name}/resolve/main/model.safetensors'


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_a_classifier_builds_and_takes_the_statistics_of_its_checkpoint(name):
    pytest.importorskip('mmpretrain')
    timm = pytest.importorskip('timm')
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    from psaq_mm.models import TaskModel

    config = Config.fromfile(ROOT / 'classification' / f'{name}.py')
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    assert {row.reason for row in model.quant_report.floats} == {'left operand left in float'}, (
        'the attention weights alone'
    )
    assert model.quant_spec.label == 'W8A8'
    known, spec = timm.get_pretrained_cfg(config.model.model_name), TaskModel(model).image_spec
    assert spec.mean == pytest.approx([255 * v for v in known.mean]) and spec.std == pytest.approx(
        [255 * v for v in known.std]
    )
    steps = {step['type']: step for step in config.pipeline}
    assert steps['CenterCrop']['crop_size'] == known.input_size[-1]
    assert steps['ResizeEdge']['scale'] == int(known.input_size[-1] / known.crop_pct)
