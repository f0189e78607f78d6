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
