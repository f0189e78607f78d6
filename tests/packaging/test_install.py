"""What another project gets from `pip install`: the package, its configs and tools, its commands, and no hard OpenMMLab
requirement."""

import ast
import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import psaq_mm

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    'psaq': 'psaq_mm.commands.main:main',
    'psaq-dfq-train': 'psaq_mm.commands.dfq_train:main',
    'psaq-test': 'psaq_mm.commands.test:main',
    'psaq-compare': 'psaq_mm.commands.compare:main',
    'psaq-inspect': 'psaq_mm.commands.inspect:main',
    'psaq-convert-checkpoint': 'psaq_mm.commands.convert_checkpoint:main',
    'psaq-sensitivity': 'psaq_mm.commands.sensitivity:main',
    'psaq-export': 'psaq_mm.commands.export:main',
    'psaq-predict': 'psaq_mm.commands.predict:main',
}
MODULES = sorted((ROOT / 'psaq_mm').rglob('*.py'))
TEMPLATES = sorted(path for path in (ROOT / 'psaq_mm').rglob('templates/*') if path.is_file())
# Files that only this test puts into its copy of the tree: one of each kind that must travel, and one of each that must
# not.
PROBES = {
    'configs/_base_/probe.py': 'wheel',
    'configs/probe/README.md': 'wheel',
    'tools/probe.py': 'wheel',
    'configs/probe/__pycache__/probe.cpython-311.pyc': None,
    'configs/probe/weights.pth': None,
    'tests/probe.py': None,
}


def run(*command, cwd, **environment):
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def build_wheel(source, target):
    run(
        sys.executable,
        '-m',
        'pip',
        'wheel',
        '--no-deps',
        '--no-build-isolation',
        '--no-index',
        '-w',
        target,
        '.',
        cwd=source,
    )
    (built,) = target.glob('*.whl')
    return built


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy of the source tree to build in, so that a build leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp('source') / 'psaq_mm'
    copy.mkdir()
    for name in ('psaq_mm', 'configs', 'tools'):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns('__pycache__', '.mim', 'work_dirs'))
    for name in ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE', 'model-index.yml'):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, copy / name)
    for name in PROBES:
        path = copy / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('')
    return copy


@pytest.fixture(scope='module')
def wheel(source, tmp_path_factory):
    return build_wheel(source, tmp_path_factory.mktemp('wheel'))


@pytest.fixture(scope='module')
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    """The wheel installed into a folder of its own, as another project would have it."""
    target = tmp_path_factory.mktemp('site')
    run(sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-index', '--target', target, wheel, cwd=target)
    return target


def read(wheel, ending):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith('.dist-info/' + ending)]
        return archive.read(name).decode()


def test_wheel_holds_every_module_and_template(names):
    assert {path.suffix for path in TEMPLATES} == {'.css', '.html'}
    assert {path.relative_to(ROOT).as_posix() for path in (*MODULES, *TEMPLATES)} <= set(names)


def test_wheel_says_that_the_package_has_type_hints(names):
    assert 'psaq_mm/py.typed' in names


def test_wheel_holds_configs_and_tools_as_mim_expects_them(source, names):
    expected = {
        f'psaq_mm/.mim/{path.relative_to(source).as_posix()}'
        for folder in ('configs', 'tools')
        for path in (source / folder).rglob('*.py')
    }
    expected |= {f'psaq_mm/.mim/{name}' for name, place in PROBES.items() if place == 'wheel'}
    assert expected <= set(names)


def test_wheel_holds_nothing_else(names):
    assert {name.split('/')[0] for name in names} == {'psaq_mm', f'psaq_mm-{psaq_mm.__version__}.dist-info'}
    unwanted = [name for name in names if '__pycache__' in name or name.endswith(('.pyc', '.pth', '.log'))]
    assert unwanted == []
    assert len(names) == len(set(names))


def test_record_knows_every_file_so_that_uninstalling_takes_all(wheel, names):
    recorded = {line.split(',')[0] for line in read(wheel, 'RECORD').splitlines()}
    assert recorded == set(names)


def test_build_puts_no_second_copy_of_the_configs_into_the_source_tree(source, wheel):
    assert not (source / 'psaq_mm' / '.mim').exists()


def test_metadata(wheel):
    metadata = email.message_from_string(read(wheel, 'METADATA'))
    assert metadata['Version'] == psaq_mm.__version__
    assert metadata['License'] == 'Apache-2.0'
    assert 'Apache License' in read_license(wheel)
    hard = {re.match(r'[\w.-]+', line).group() for line in metadata.get_all('Requires-Dist') if 'extra ==' not in line}
    # An OpenMMLab library here would be installed over a maintained fork of the same import name.
    # And PyTorch would come to everybody who runs an exported model.
    assert hard == {'numpy', 'safetensors'}
    assert set(metadata.get_all('Provides-Extra')) == {
        'all',
        'deploy',
        'docs',
        'mmdet',
        'mmpretrain',
        'mmseg',
        'onedl',
        'runtime',
        'runtime-onnxruntime',
        'test',
        'timm',
        'torch',
        'transformers',
    }


def test_extras_that_need_pytorch_bring_it_and_those_of_exported_models_do_not(wheel):
    requirement = pytest.importorskip('packaging.requirements').Requirement
    metadata = email.message_from_string(read(wheel, 'METADATA'))
    lines = [requirement(line) for line in metadata.get_all('Requires-Dist')]

    def brought(extra):
        return {line.name for line in lines if line.marker is None or line.marker.evaluate(dict(extra=extra))}

    assert all('torch' in brought(extra) for extra in ('torch', 'mmdet', 'mmseg', 'mmpretrain', 'timm', 'test', 'all'))
    assert brought('runtime') == {'numpy', 'safetensors', 'opencv-python-headless', 'openvino'}
    assert brought('runtime-onnxruntime') == brought('runtime') - {'openvino'} | {'onnxruntime'}
    assert 'opencv-python-headless' not in brought('all')


def read_license(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith('/LICENSE')]
        return archive.read(name).decode()


def test_license_is_the_full_text():
    lines = (ROOT / 'LICENSE').read_text().splitlines()
    assert lines[0].strip() == 'Apache License'
    assert 'END OF TERMS AND CONDITIONS' in {line.strip() for line in lines}
    assert len(lines) > 195


def test_commands_are_declared(wheel):
    parser = configparser.ConfigParser()
    parser.optionxform = str
    parser.read_string(read(wheel, 'entry_points.txt'))
    assert dict(parser['console_scripts']) == COMMANDS


@pytest.mark.parametrize('target', sorted(COMMANDS.values()))
def test_command_leads_to_a_function(wheel, target):
    module, function = target.split(':')
    with zipfile.ZipFile(wheel) as archive:
        tree = ast.parse(archive.read(module.replace('.', '/') + '.py'))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_imports_from_a_foreign_folder(installed, tmp_path):
    code = (
        f'import sys; sys.path.insert(0, {str(installed)!r}); import psaq_mm; print(psaq_mm.__version__, '
        f'psaq_mm.__file__); '
        'print(sorted({"mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain", "timm"} & set(sys.modules)))'
    )
    first, loaded = run(sys.executable, '-c', code, cwd=tmp_path).strip().splitlines()
    version, file = first.split(' ', 1)
    assert version == psaq_mm.__version__
    assert Path(file) == installed / 'psaq_mm' / '__init__.py'
    assert loaded == '[]', f'importing the package alone loads {loaded}'
    assert (installed / 'psaq_mm' / '.mim' / 'configs' / '_base_' / 'probe.py').is_file()


def test_sdist_builds_the_same_wheel(source, names, tmp_path):
    code = 'import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])'
    run(sys.executable, '-c', code, tmp_path, cwd=source)
    (packed,) = tmp_path.glob('*.tar.gz')
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path / 'unpacked')
    (unpacked,) = (tmp_path / 'unpacked').iterdir()
    with zipfile.ZipFile(build_wheel(unpacked, tmp_path / 'wheel')) as archive:
        assert sorted(archive.namelist()) == sorted(names)


def test_weights_get_an_address_where_one_is_given(source, tmp_path, monkeypatch):
    """`mim download` fetches addresses alone; in the repository they are paths, which are true everywhere."""
    code = 'import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])'
    run(sys.executable, '-c', code, tmp_path, cwd=source, PSAQ_MM_WEIGHTS_URL='https://example.org/v1/')
    (built,) = tmp_path.glob('*.whl')
    with zipfile.ZipFile(built) as archive:
        metafile = archive.read('psaq_mm/.mim/configs/demo/metafile.yml').decode()
    given = re.findall(r'^ +Weights: (.*)$', metafile, re.MULTILINE)
    plain = re.findall(r'^ +Weights: (.*)$', (source / 'configs/demo/metafile.yml').read_text(), re.MULTILINE)
    assert len(plain) == 2 and given == [f'https://example.org/v1/{path}' for path in plain]


def test_changelog_begins_with_this_version():
    text = (ROOT / 'CHANGELOG.md').read_text()
    assert re.findall(r'^## \[(\d.*?)\]', text, re.MULTILINE)[0] == psaq_mm.__version__
    assert f'\nversion: {psaq_mm.__version__}\n' in (ROOT / 'CITATION.cff').read_text()


def test_manifest_names_what_is_there():
    for line in (ROOT / 'MANIFEST.in').read_text().splitlines():
        command, *names = line.split()
        if command in ('include', 'graft'):
            assert all(list(ROOT.glob(name)) for name in names), line


def test_an_editable_installation_is_found_by_mim(source, tmp_path):
    """mim and MMEngine find the folder of a package with the same lines of code."""
    pytest.importorskip('mmengine')
    code = 'import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])'
    run(sys.executable, '-c', code, tmp_path, cwd=source)
    (built,) = tmp_path.glob('*.whl')
    site = tmp_path / 'site'
    with zipfile.ZipFile(built) as archive:
        archive.extractall(site)
    assert (next(site.glob('*.dist-info')) / 'top_level.txt').read_text().split() == [str(source), 'psaq_mm']
    code = 'from mmengine.utils import get_installed_path; print(get_installed_path("psaq_mm"))'
    found = run(sys.executable, '-c', code, cwd=tmp_path, PYTHONPATH=str(site)).splitlines()[-1]
    # Of .mim/tools, tools, .mim/demo and demo `mim run` takes the first; without .mim it reads model-index.yml beside
    # them.
    assert Path(found) == source and not (source / '.mim').exists()
    assert {path.stem for path in (Path(found) / 'tools').glob('*.py')} >= {'dfq_train', 'test', 'export'}
    assert (Path(found) / 'model-index.yml').is_file() and (Path(found) / 'configs').is_dir()
    # And what is imported is the package, as before.
    (finder,) = site.glob('__editable__*finder.py')
    assert f"'psaq_mm': '{source / 'psaq_mm'}'" in finder.read_text()


@pytest.mark.parametrize(
    'files',
    [
        ('constraints.txt', 'requirements.txt'),
        ('constraints-numpy2.txt', 'requirements-torch2.13.txt'),
        ('constraints-numpy2.txt', 'requirements-onedl.txt'),
    ],
    ids=lambda files: files[1],
)
def test_pins_do_not_contradict_the_bounds(files):
    """pip would find it out too, minutes later and in several paragraphs."""
    requirement = pytest.importorskip('packaging.requirements').Requirement
    read_lines = [
        line.split('#')[0].strip()
        for name in (*files, 'requirements-tools.txt')
        for line in (ROOT / name).read_text().splitlines()
        if not line.startswith('-r')
    ]
    bounds = {}
    for line in filter(None, read_lines):
        bounds.setdefault(requirement(line).name, []).append(requirement(line).specifier)
    pins = {name: str(spec)[2:] for name, specs in bounds.items() for spec in specs if str(spec).startswith('==')}
    assert 'numpy' in pins and 'opencv-python' in pins
    for name, version in pins.items():
        assert all(version in spec for spec in bounds[name]), f'{name}=={version} against {bounds[name]}'


def test_versions_of_the_checks_are_the_same_everywhere():
    pins = dict(line.split('==') for line in (ROOT / 'requirements-tools.txt').read_text().splitlines() if '==' in line)
    setup, hooks = (ROOT / 'setup.py').read_text(), (ROOT / '.pre-commit-config.yaml').read_text()
    assert f"'ruff=={pins['ruff']}'" in setup and f"'mypy=={pins['mypy']}; python_version" in setup
    assert f'ruff-pre-commit\n    rev: v{pins["ruff"]}\n' in hooks


def floor_of_python():
    text = (ROOT / 'setup.py').read_text()
    return tuple(int(part) for part in re.search(r"python_requires='>=(\d+)\.(\d+)'", text).groups())


def test_pythons_are_named_alike_everywhere(wheel):
    metadata = email.message_from_string(read(wheel, 'METADATA'))
    oldest = '.'.join(map(str, floor_of_python()))
    assert metadata['Requires-Python'] == f'>={oldest}'
    named = re.findall(r'Programming Language :: Python :: (3\.\d+)', '\n'.join(metadata.get_all('Classifier')))
    assert named == ['3.9', '3.10', '3.11', '3.12'] and named[0] == oldest
    ruff = re.search(r'^target-version = "py(\d)(\d+)"$', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)
    assert tuple(map(int, ruff.groups())) == floor_of_python()


# What Python 3.9 does not have, of the modules that code like this uses.
NEWER = {
    'typing': {'Concatenate', 'Never', 'NotRequired', 'ParamSpec', 'Required', 'Self', 'TypeAlias'}
    | {'TypeGuard', 'TypeVarTuple', 'Unpack', 'assert_never', 'override', 'reveal_type'},
    'itertools': {'pairwise', 'batched'},
    'enum': {'StrEnum'},
    'contextlib': {'aclosing', 'chdir'},
    'datetime': {'UTC'},
    'types': {'NoneType', 'EllipsisType', 'UnionType'},
    'tomllib': {'*'},
}
NEWER_ARGUMENTS = {'zip': {'strict'}, 'dataclass': {'slots', 'kw_only'}, 'bisect': {'key'}, 'bisect_left': {'key'}}


def newer_than_the_oldest(code):
    """What a module uses that Python 3.9 lacks: syntax, names, and annotations like `int | None` that it evaluates."""
    tree = ast.parse(code, feature_version=floor_of_python())
    found, postponed, notes = [], False, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Match):
            found.append(f'line {node.lineno}: match')
        elif isinstance(node, ast.ImportFrom):
            names = {name.name for name in node.names}
            postponed |= node.module == '__future__' and 'annotations' in names
            newer = NEWER.get(node.module, set())
            found += [f'line {node.lineno}: {name}' for name in names if name in newer or '*' in newer]
        elif isinstance(node, ast.Import):
            found += [f'line {node.lineno}: {name.name}' for name in node.names if '*' in NEWER.get(name.name, ())]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in NEWER.get(node.value.id, ()):
                found.append(f'line {node.lineno}: {node.value.id}.{node.attr}')
        elif isinstance(node, ast.Call):
            called = getattr(node.func, 'id', getattr(node.func, 'attr', None))
            newer = {word.arg for word in node.keywords} & NEWER_ARGUMENTS.get(called, set())
            found += [f'line {node.lineno}: {called}({word}=)' for word in newer]
        notes += [note for note in (getattr(node, 'annotation', None), getattr(node, 'returns', None)) if note]
    unions = [] if postponed else [part for note in notes for part in ast.walk(note) if isinstance(part, ast.BinOp)]
    return found + [f'line {union.lineno}: add "from __future__ import annotations"' for union in unions]


def test_every_module_is_of_the_oldest_python():
    assert floor_of_python() == (3, 9), 'NEWER is of this one'
    files = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8') for path in (*MODULES, ROOT / 'setup.py')
    }
    found = {name: newer_than_the_oldest(code) for name, code in files.items()}
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    'code',
    [
        'match x:\n    case 1: pass',
        'def f(x: int | None): pass',
        'from typing import TypeAlias',
        'import tomllib',
        'import itertools\nitertools.pairwise(x)',
        'zip(a, b, strict=True)',
        '@dataclass(slots=True)\nclass A: pass',
    ],
)
def test_newer_code_is_noticed(code):
    try:
        assert newer_than_the_oldest(code)
    except SyntaxError:
        pass
