"""A user with one of the libraries needs none of the others."""

import subprocess
import sys
from pathlib import Path

import pytest

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {others!r}:
            raise ModuleNotFoundError(f'{{name}} is blocked')
sys.meta_path.insert(0, Block())
import psaq_mm, psaq_mm.models, psaq_mm.engine.runner, psaq_mm.engine.hooks
from mmengine.registry import MODELS, init_default_scope
import torch
init_default_scope({library!r})
model = MODELS.build(dict(type='psaq_mm.QuantSwinTransformer', quant='w8a8', **{arguments!r}))
from psaq_mm.quantization import set_mode
set_mode(model, 'off')
print(len(model(torch.randn(1, 3, 64, 64))))
assert not [m for m in sys.modules if m.split('.')[0] in {others!r}]
"""
SWIN = dict(embed_dims=16, depths=[1, 1], num_heads=[1, 2], strides=(4, 2), out_indices=(0, 1))
ARGUMENTS = dict(
    mmdet=SWIN,
    mmseg=SWIN,
    mmpretrain=dict(arch=dict(embed_dims=16, depths=[1, 1], num_heads=[1, 2]), out_indices=(0, 1), pad_small_map=True),
)


@pytest.mark.parametrize('library', ['mmdet', 'mmseg', 'mmpretrain'])
def test_one_library_alone(library):
    pytest.importorskip(library)
    others = {'mmdet', 'mmseg', 'mmpretrain', 'timm'} - {library}
    if library == 'mmpretrain':
        others.discard('timm')  # its own optional import
    code = BLOCKED.format(others=others, library=library, arguments=ARGUMENTS[library])
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == '2'


@pytest.mark.parametrize(
    'modules,may_be_there',
    [
        ('psaq_mm', ()),
        (
            'psaq_mm.quantization, psaq_mm.pictures, psaq_mm.calibration, psaq_mm.psaq_vit, psaq_mm.visualization, '
            'psaq_mm.runtime',
            (),
        ),
        (
            'psaq_mm.registry, psaq_mm.models, psaq_mm.engine, psaq_mm.engine.hooks, psaq_mm.engine.runner, '
            'psaq_mm.commands',
            ('mmengine',),
        ),
    ],
)
def test_a_library_is_imported_when_a_config_asks_for_it_and_not_before(modules, may_be_there):
    libraries = {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'timm'} - set(may_be_there)
    code = f"import sys\nimport {modules}\nprint(sorted({libraries!r} & {{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == '[]'
