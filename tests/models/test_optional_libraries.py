"""A user with one of the libraries needs none of the others."""

import importlib.util
import subprocess
import sys
from pathlib import Path

ALONE = """
import os
import sys

class Block:
    names = {libraries!r}
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in self.names:
            raise ModuleNotFoundError(f'{{name}} is blocked')

sys.meta_path.insert(0, Block())
import psaq_mm, psaq_mm.models, psaq_mm.engine.runner, psaq_mm.engine.hooks
import torch
from mmengine.registry import MODELS, init_default_scope
from psaq_mm.quantization import set_mode

torch.set_num_threads(1)

def build(library, arguments):
    # timm is an optional import of mmpretrain's own.
    Block.names = Block.names - ({{library, 'timm'}} if library == 'mmpretrain' else {{library}})
    init_default_scope(library)
    model = MODELS.build(dict(type='psaq_mm.QuantSwinTransformer', quant='w8a8', **arguments))
    set_mode(model, 'off')
    assert len(model(torch.randn(1, 3, 64, 64))) == 2
    assert not [m for m in sys.modules if m.split('.')[0] in Block.names]

for library, arguments in {arguments!r}.items():
    child = os.fork()  # each library in a process of its own, which has the rest imported
    if not child:
        status = 1
        try:
            build(library, arguments)
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)
    if not os.waitpid(child, 0)[1]:
        print(library)
"""
IMPORTS = """
import sys
def there(*may_be):
    names = {libraries!r} - set(may_be)
    found = sorted(names & {{m.split('.')[0] for m in sys.modules}})
    assert not found, found
import psaq_mm
there()
import psaq_mm.quantization, psaq_mm.pictures, psaq_mm.calibration, psaq_mm.psaq_vit, psaq_mm.visualization
import psaq_mm.runtime
there()
import psaq_mm.registry, psaq_mm.models, psaq_mm.engine, psaq_mm.engine.hooks, psaq_mm.engine.runner, psaq_mm.commands
there('mmengine')
"""
ROOT = Path(__file__).parents[2]
SWIN = dict(embed_dims=16, depths=[1, 1], num_heads=[1, 2], strides=(4, 2), out_indices=(0, 1))
ARGUMENTS = dict(
    mmdet=SWIN,
    mmseg=SWIN,
    mmpretrain=dict(arch=dict(embed_dims=16, depths=[1, 1], num_heads=[1, 2]), out_indices=(0, 1), pad_small_map=True),
)


def run(code):
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def installed(library):
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:  # tests/conftest.py, of one that needs what is not there
        return False


def test_one_library_alone():
    there = {library: arguments for library, arguments in ARGUMENTS.items() if installed(library)}
    done = run(ALONE.format(libraries={*ARGUMENTS, 'timm'}, arguments=there))
    assert done.stdout.split() == list(there) and there, done.stderr[-2000:]


def test_a_library_is_imported_when_a_config_asks_for_it_and_not_before():
    run(IMPORTS.format(libraries={'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'timm'}))
