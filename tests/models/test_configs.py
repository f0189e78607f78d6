"""Every leaf config of the repository: it names a checkpoint, and builds a quantized model that still lists its float parts."""
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / 'configs'
LEAVES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob('*_w?a?.py'), *ROOT.glob('demo/*_w?a?.py')])


def test_the_promised_configs_are_there():
    promised = {f'{model}_swin_{size}_{bits}.py' for model in ('mask_rcnn', 'upernet') for size in 't s'.split()
                for bits in ('w8a8', 'w4a8')}
    assert promised <= set(LEAVES)


@pytest.mark.parametrize('leaf', LEAVES)
def test_leaf_builds(leaf):
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    from psaq_mm.engine.config import drop_pretrained, sample_size
    config = Config.fromfile(ROOT / leaf)
    pytest.importorskip(config.default_scope)
    assert str(config.load_from).endswith('.pth')
    assert len((ROOT / leaf).read_text().splitlines()) <= 10
    assert min(config.dfq.get('size') or sample_size(config)) >= 28
    drop_pretrained(config.model)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    label = leaf.rsplit('_', 1)[1][:-3].upper()
    assert model.quant_spec.label == label
    bits = {row.w_bits for row in model.quant_report.layers if row.w_bits}
    assert bits == {int(label[1])}
    assert all(row.name.startswith('backbone.') for row in model.quant_report.layers)
    assert any(row.reason == 'outside the scope' for row in model.quant_report.floats)


CLASSIFIERS = sorted(path.stem for path in (ROOT / 'classification').glob('*.py'))


def test_the_promised_classifiers_are_there():
    assert set(CLASSIFIERS) == {'vit_small', 'vit_base', 'deit_tiny', 'deit_small', 'deit_base', 'swin_tiny', 'swin_small'}


@pytest.mark.parametrize('method', ['psaq_v1', 'psaq_v2', 'repq', 'repq_v2'])
@pytest.mark.parametrize('name', CLASSIFIERS)
def test_a_classifier_under_every_method_and_precision(name, method):
    """As the commands read it; the models themselves are built below, once each."""
    from psaq_mm.commands.common import load_config
    from psaq_mm.engine.presets import resolve_dfq
    from psaq_mm.quantization import QuantSpec
    for bits in ('w8a8', 'w4a8', 'w6a6', 'w4a4'):
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
    assert {row.reason for row in model.quant_report.floats} == {'left operand left in float'}, 'the attention weights alone'
    assert model.quant_spec.label == 'W8A8'
    known, spec = timm.get_pretrained_cfg(config.model.model_name), TaskModel(model).image_spec
    assert spec.mean == pytest.approx([255 * v for v in known.mean]) and spec.std == pytest.approx([255 * v for v in known.std])
    steps = {step['type']: step for step in config.pipeline}
    assert steps['CenterCrop']['crop_size'] == known.input_size[-1]
    assert steps['ResizeEdge']['scale'] == int(known.input_size[-1] / known.crop_pct)
