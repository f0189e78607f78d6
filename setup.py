"""Build description of psaq_mm: metadata, entry points, and the configs and tools that travel inside the package."""

import os
import re
import runpy
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.editable_wheel import editable_wheel
# before 64, which is what mim's own requirements leave in an environment: editable installations of another kind
except ImportError:
    editable_wheel = object

ROOT = Path(__file__).resolve().parent

# What is copied into the package, and which files of it. OpenMMLab's tools look for `<package>/.mim/`.
SHIPPED = {
    'configs': ('.py', '.yml', '.yaml', '.md'),
    'tools': ('.py', '.sh'),
}
SHIPPED_FILES = ('model-index.yml',)
# Where this repository's files lie for everybody, such as https://example.org/psaq_mm/v0.2.0: `Weights` of the shipped
# metafiles then become addresses under it, which `mim download` fetches. Without it they stay paths in the repository.
WEIGHTS_URL = os.environ.get('PSAQ_MM_WEIGHTS_URL', '').rstrip('/')


def read_version():
    """The version, read as text: importing the package would need torch at build time."""
    text = (ROOT / 'psaq_mm' / '__init__.py').read_text(encoding='utf-8')
    match = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    if match is None:
        raise RuntimeError("psaq_mm/__init__.py has no line of the form __version__ = '1.2.3'; add it")
    return match.group(1)


def read_readme():
    """The README as the package index shows it; a tree without one (a partial copy) still builds."""
    path = ROOT / 'README.md'
    return path.read_text(encoding='utf-8') if path.is_file() else ''


def console_scripts():
    """The entry points, from the list of commands, which imports the standard library alone."""
    return runpy.run_path(str(ROOT / 'psaq_mm' / 'commands' / 'listing.py'))['entry_points']()


def shipped_files():
    """Paths, relative to the source tree, that belong into `psaq_mm/.mim/`."""
    names = [name for name in SHIPPED_FILES if (ROOT / name).is_file()]
    for folder, endings in SHIPPED.items():
        for path in sorted((ROOT / folder).rglob('*')):
            if path.is_file() and path.suffix in endings and '__pycache__' not in path.parts:
                names.append(path.relative_to(ROOT).as_posix())
    return names


class BuildWithConfigs(build_py):
    """`build_py` that also lays configs and tools into the package as `psaq_mm/.mim/`.

    They are copied into the build folder alone: no links and no second copy in the source tree, so a wheel, an sdist
    and an installation from another project all carry them, and an editable one reads the source tree's.
    """

    def run(self):
        """Build the package, then copy configs and tools."""
        super().run()
        if getattr(self, 'editable_mode', False):
            return
        for source, target in self._pairs():
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copyfile(source, target)
            if WEIGHTS_URL and target.endswith('metafile.yml'):
                text = Path(source).read_text(encoding='utf-8')
                text = re.sub(r'^( *Weights: )(?!\w+://)', rf'\g<1>{WEIGHTS_URL}/', text, flags=re.MULTILINE)
                Path(target).write_text(text, encoding='utf-8')

    def get_outputs(self, include_bytecode=1):
        """Paths of everything that is built, for the wheel's record."""
        outputs = super().get_outputs(include_bytecode)
        if getattr(self, 'editable_mode', False):
            return outputs
        return outputs + [target for _, target in self._pairs()]

    def _pairs(self):
        base = os.path.join(self.build_lib, 'psaq_mm', '.mim')
        return [(str(ROOT / name), os.path.join(base, *name.split('/'))) for name in shipped_files()]


class EditableForMim(editable_wheel):
    """`pip install -e .`, found by `mim run psaq_mm ...` too.

    mim and MMEngine look for a package beside its metadata, and where it is not there, beside it under the name that
    stands first in `top_level.txt`. An editable installation has its metadata alone there; so that name is the path of
    the source tree, whose `tools`, `configs` and `model-index.yml` they find as they stand.
    """

    def _ensure_dist_info(self):
        super()._ensure_dist_info()
        (Path(self.dist_info_dir) / 'top_level.txt').write_text(f'{ROOT}\npsaq_mm\n', encoding='utf-8')


# The OpenMMLab libraries stand in extras, not in install_requires: their maintained forks have the same import names
# under other distribution names, and a hard requirement would install the originals over them.
# PyTorch stands there too: an exported model runs without it.
TORCH = ['torch>=2.1', 'filelock', 'jinja2>=3', 'matplotlib>=3.6', 'pillow', 'rich>=12.3']
ENGINE = [*TORCH, 'mmengine>=0.10.7,<1']
MM = [*ENGINE, 'mmcv>=2.0.0,<2.2.0']
# What an exported model needs beside a runtime. Not opencv-python: the headless one needs no libraries of a desktop.
PICTURES = ['opencv-python-headless>=4.5,<5']
ONNXRUNTIME, OPENVINO = 'onnxruntime>=1.18', 'openvino>=2024.4'
# Another version formats differently: the same as in requirements-tools.txt.
CHECKS = ['ruff==0.17.6', 'mypy==2.4.1; python_version >= "3.10"']
EXTRAS = {
    'torch': TORCH,
    'mmdet': [*MM, 'mmdet>=3.3.0,<4'],
    # mmsegmentation imports ftfy and regex without requiring them.
    'mmseg': [*MM, 'mmsegmentation>=1.2.2,<2', 'ftfy', 'regex'],
    'mmpretrain': [*MM, 'mmpretrain>=1.2.0,<2'],
    # The maintained forks, in place of the three above. mmseg's asks for numpy 2, and with it torch 2.3 or later.
    'onedl': [*TORCH, 'onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmsegmentation', 'onedl-mmpretrain'],
    # Without an OpenMMLab library: MMEngine alone, which is pure Python, runs the quantization.
    'timm': [*ENGINE, 'timm>=1.0'],
    'transformers': [*ENGINE, 'transformers>=4.46,<4.47'],
    'deploy': ['onnx>=1.15', ONNXRUNTIME, OPENVINO],
    # To run an exported model, where neither PyTorch nor OpenMMLab is installed.
    'runtime': [*PICTURES, OPENVINO],
    'runtime-onnxruntime': [*PICTURES, ONNXRUNTIME],
    # The site; Read the Docs and `make docs` take the versions in requirements-docs.txt.
    'docs': ['sphinx>=7.4', 'myst-parser>=3', 'sphinx-book-theme>=1.1', 'sphinx-copybutton', 'griffe>=1'],
    'test': [*TORCH, 'pytest>=7', 'pytest-xdist', 'hypothesis', 'onnx', 'onnxruntime', 'openvino', *CHECKS],
}
# Not what contradicts the rest: the forks, a second OpenCV beside that of OpenMMLab, and transformers, which wants an
# older huggingface_hub than the others.
APART = ('onedl', 'transformers', 'docs', 'test', 'runtime', 'runtime-onnxruntime')
EXTRAS['all'] = sorted({line for name, lines in EXTRAS.items() if name not in APART for line in lines})

setup(
    name='psaq_mm',
    version=read_version(),
    description='Data-free quantization of Swin, DeiT and ViT detectors, segmentors and classifiers for OpenMMLab',
    long_description=read_readme(),
    long_description_content_type='text/markdown',
    author='The psaq_mm authors',
    license='Apache-2.0',
    keywords='quantization, data-free, vision transformer, Swin, object detection, segmentation, OpenMMLab, ONNX',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'License :: OSI Approved :: Apache Software License',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3 :: Only',
        'Programming Language :: Python :: 3.9',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
        'Typing :: Typed',
    ],
    python_requires='>=3.9',
    packages=find_packages(include=['psaq_mm', 'psaq_mm.*']),
    # Only files that stand inside the package; configs and tools are laid in by BuildWithConfigs.
    package_data={'psaq_mm': ['py.typed', '**/*.json', '**/*.html', '**/*.css', '**/*.js']},
    include_package_data=False,
    install_requires=['numpy', 'safetensors>=0.4'],
    extras_require=EXTRAS,
    entry_points={'console_scripts': console_scripts()},
    cmdclass={'build_py': BuildWithConfigs, **({} if editable_wheel is object else {'editable_wheel': EditableForMim})},
    zip_safe=False,
)
