"""The order of the floors: which part of the package may import which, and which libraries each one needs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'psaq_mm'

FLOORS = (
    'base',
    'runtime',
    'quantization',
    'pictures',
    'calibration',
    'psaq_vit',
    'visualization',
    'models',
    'deploy',
    'engine',
    'api',
    'commands',
)
"""From the lowest to the highest. ``base`` is the files of the package itself, but for ``registry.py`` and ``api``."""

FILES = ('base', 'api')
"""Floors that are no folders."""

OPENMMLAB = {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'timm'}
TORCH = {'torch', 'torchvision'}
REGISTRY = 'models'
"""``registry.py`` needs MMEngine: it belongs to the lowest floor that does."""


def floor_of(module: str) -> str:
    """The floor of a module of the package, such as ``psaq_mm.deploy.export``."""
    parts = module.split('.')[1:]
    if parts and parts[0] == 'registry':
        return REGISTRY
    if parts and parts[0] == 'api':
        return 'api'
    return parts[0] if parts and (PACKAGE / parts[0]).is_dir() else 'base'


def imports_of(path: Path) -> set:
    """Names of the modules that a file imports, also inside of functions."""
    names = set()
    tree = ast.parse(path.read_text(encoding='utf-8'))
    if path == PACKAGE / '__init__.py':  # it tells type checkers what it looks up when it is asked for
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and node.test.id == 'TYPE_CHECKING')]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{path}: imports are absolute here'
            # `from psaq_mm import ranks` names a module, `from psaq_mm.ranks import own_part` does too.
            package = node.module == 'psaq_mm'
            names |= {f'psaq_mm.{alias.name}' for alias in node.names} if package else {node.module}
    return names


def modules() -> list:
    return sorted(path for path in PACKAGE.rglob('*.py'))


def name_of(path: Path) -> str:
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


def arrows() -> dict:
    """The floors that each floor imports, itself left out."""
    found = {floor: set() for floor in FLOORS}
    for path in modules():
        for name in imports_of(path):
            if name.split('.')[0] == 'psaq_mm':
                found[floor_of(name_of(path))].add(floor_of(name))
    return {floor: others - {floor} for floor, others in found.items()}


def test_every_folder_is_a_floor():
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in modules() if path.parent != PACKAGE}
    assert folders == set(FLOORS) - set(FILES)


@pytest.mark.parametrize('floor', FLOORS)
def test_a_floor_imports_only_floors_below_it(floor):
    upward = {other for other in arrows()[floor] if FLOORS.index(other) > FLOORS.index(floor)}
    assert not upward, f'{floor} imports {sorted(upward)}, which are above it'


@pytest.mark.parametrize('path', modules(), ids=name_of)
def test_a_floor_needs_no_more_libraries_than_it_says(path):
    floor = floor_of(name_of(path))
    libraries = {name.split('.')[0] for name in imports_of(path)}
    if FLOORS.index(floor) < FLOORS.index(REGISTRY):
        assert not libraries & OPENMMLAB, 'only the floors from models on need OpenMMLab or timm'
    if floor == 'runtime':
        assert not libraries & TORCH, 'an export runs without PyTorch'


@pytest.mark.parametrize(
    ('imported', 'absent'),
    [
        ('psaq_mm', ('numpy', 'psaq_mm.api')),
        ('psaq_mm.api', ('numpy', 'torch', 'mmengine')),
        ('psaq_mm.runtime', ('torch', 'mmengine', 'onnx')),
        ('psaq_mm.calibration', ('psaq_mm.psaq_vit', 'mmengine')),
        ('psaq_mm.psaq_vit', ('mmengine', 'timm')),
    ],
)
def test_what_an_import_leaves_out(imported, absent):
    """In a process of its own: modules that other tests imported would hide it."""
    code = f'import sys, {imported}; print(*[name for name in {absent!r} if name in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_page_of_the_architecture_shows_these_arrows():
    page = (ROOT / 'docs' / 'reference' / 'architecture.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| `(\w+)` \|[^|]*\|([^|]*)\|[^|]*\|$', page, re.MULTILINE)
    shown = {floor: set(re.findall(r'\w+', others)) - {'nothing'} for floor, others in rows}
    assert tuple(reversed([floor for floor, _ in rows])) == FLOORS, 'the table has one row a floor, the highest first'
    assert shown == arrows()


def test_every_path_that_the_page_names_exists():
    page = (ROOT / 'docs' / 'reference' / 'architecture.md').read_text(encoding='utf-8')
    paths = re.findall(r'`((?:psaq_mm|tests|configs|benchmarks|tools|docs|demo)/[\w./]*)`', page)
    assert paths
    assert not [path for path in paths if not (ROOT / path).exists()]
