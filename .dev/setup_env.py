#!/usr/bin/env python3
"""Makes the virtual environment of `make demo` and `make test`; does nothing where it is there already.

Standard library only: it runs on a machine that has nothing but Python. Two kinds of environment:

* a stack: torch, mmcv with its compiled ops, mmdet, mmsegmentation, mmpretrain. The reference stack (default) has the
  versions in requirements.txt; a torch from 2.3 on gets numpy 2 (requirements-torch2.13.txt); `--stack onedl` takes the
  maintained forks (requirements-onedl.txt);
* `--core`: PyTorch of any version and the test tools, without OpenMMLab, for the floors that need PyTorch alone.

pip does the work, and decides where packages come from: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS and pip.conf
apply (uv reads none of them). On Linux the default torch brings its CUDA packages (about 2.5 GB) also where there is no
GPU. To avoid that, name an index of CPU builds in those variables.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = '{}.{}'.format(*sys.version_info[:2])
STAMP = '.psaq-ready.json'
# A change in one of these files may change the environment. This script is one of them.
PINNED = sorted(path.name for kind in ('constraints*.txt', 'requirements*.txt') for path in ROOT.glob(kind))
KEY_FILES = (*PINNED, 'setup.py', 'pyproject.toml', '.dev/setup_env.py')
# The forks have the same import names as the originals: an environment holds those of one stack. Core has neither.
PACKAGES = {
    'openmmlab': ('mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'mmpretrain'),
    'onedl': ('onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmsegmentation', 'onedl-mmpretrain'),
    'core': (),
}
OTHERS = {'openmmlab': 'onedl', 'onedl': 'openmmlab', 'core': 'core'}
GIB = 1 << 30

# Calls an op: the extension of a wheel for another torch can be imported, but not called.
OPS_CHECK = """
import torch
from mmcv.ops import nms
kept = nms(torch.tensor([[0., 0., 9., 9.], [0., 0., 9., 8.], [20., 20., 29., 29.]]), torch.tensor([.9, .8, .7]), .5)[1]
assert kept.tolist() == [0, 2], kept
"""
# mmpretrain imports torchvision, which not every torch has.
STACK_CHECK = """
import importlib.util, mmdet.models, mmseg.models, numpy
assert torch.from_numpy(numpy.ones(3)).sum() == 3
if importlib.util.find_spec('torchvision'):
    import torchvision.ops, mmpretrain.models
"""


class SetupError(Exception):
    """A set-up that cannot go on; the message says why and what to do."""


def say(text):
    print(f'[setup] {text}', flush=True)


def wanted(torch, stack='openmmlab', root=ROOT):
    """The stamp of an environment as it should be. What is not in `key` cannot be changed in place, nor can it move."""
    digest = hashlib.sha256(b'\0'.join(name.encode() + b'\0' + (root / name).read_bytes() for name in KEY_FILES))
    stamp = {'key': digest.hexdigest(), 'torch': torch, 'python': PYTHON, 'root': str(root), 'core': stack == 'core'}
    # Without a name it is the reference stack: older stamps have none.
    return {**stamp, 'stack': stack} if stack == 'onedl' else stamp


def read_stamp(venv):
    """What an environment was made as: None where it is not this script's, {} where it was not finished."""
    try:
        stamp = json.loads((venv / STAMP).read_text(encoding='utf-8'))
    except FileNotFoundError:
        return None
    except ValueError:
        stamp = {}
    return stamp if isinstance(stamp, dict) else {}


def requirements_of(stack, numpy2):
    return f'requirements{"-onedl" if stack == "onedl" else "-torch2.13" * numpy2}.txt'


def pins_of(file):
    """Name and version of everything in a file of requirements and in those that it includes."""
    pins = {}
    for line in (ROOT / file).read_text(encoding='utf-8').splitlines():
        if line.startswith('-r'):
            pins.update(pins_of(line[2:].strip()))
        elif '==' in line and not line.startswith('#'):
            pins.update([line.strip().split('==')])
    return pins


class Environment:
    """A virtual environment and the pip in it."""

    def __init__(self, folder, constraints=()):
        self.folder, self.python, self.constraints = folder, folder / 'bin' / 'python', constraints

    def works(self, code):
        """Whether `code` runs in the environment; its output is in `output`."""
        command = [str(self.python), '-W', 'ignore', '-c', code]
        try:
            done = subprocess.run(command, cwd=self.folder, text=True, stdin=subprocess.DEVNULL, capture_output=True)
        except OSError as error:
            self.output = str(error)
            return False
        self.output = (done.stdout + done.stderr).strip()
        return done.returncode == 0

    def versions(self, *names):
        """The versions, without their local parts, of those of these distributions that are installed."""
        listed = '{name: m.version(name).split("+")[0] for name in %r if [*m.Distribution.discover(name=name)]}' % (
            names,
        )
        works = self.works(f'import importlib.metadata as m, json; print(json.dumps({listed}))')
        return json.loads(self.output) if works else {}

    def pip(self, verb, *args, silent=False, explain=None, **settings):
        """Run pip; all that it starts ends with this process. A failure is explained where nothing else does so."""
        options = [*([] if sys.stdout.isatty() else ['-q']), *(self.constraints if verb == 'install' else [])]
        command = [str(part) for part in (self.python, '-m', 'pip', verb, *options, *args)]
        # What a stopped pip leaves in TMPDIR goes with the environment.
        (self.folder / 'tmp').mkdir(exist_ok=True)
        env, sink = {**os.environ, 'TMPDIR': f'{self.folder}/tmp', **settings}, subprocess.DEVNULL if silent else None
        pipes = {'stdin': subprocess.DEVNULL, 'stdout': sink, 'stderr': sink}
        process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)
        try:
            if process.wait() == 0:
                return
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
        shown, free = ' '.join(command[1:]), shutil.disk_usage(self.folder).free
        why = 'without a network, name a folder of packages in PIP_FIND_LINKS and set PIP_NO_INDEX=1'
        why = f'the disk has {free >> 20} MB left: make room there' if free < GIB else explain and explain(self) or why
        raise SetupError(f'python {shown[:200]}{" ..." * (len(shown) > 200)}: failed with the messages above; {why}')


def make_venv(env, stamp, others=()):
    """Makes a folder with a working Python and pip, or keeps the one that is there if it can be used."""
    folder, old = env.folder, read_stamp(env.folder)
    if old is None and folder.exists():
        # Somebody else made it: packages are added or it is refused, but it is never removed.
        holds = [*env.versions(*others)]
        if env.versions('torch').get('torch', stamp['torch']) != stamp['torch']:
            holds += [f'another torch than {stamp["torch"]}']
        fault = f'holds {holds[0]}, which the packages asked for would overwrite' if holds else None
        if not env.works(f'import sys, pip; assert "%d.%d" % sys.version_info[:2] == {PYTHON!r}'):
            fault = f'has no working Python {PYTHON} with pip'
        if fault:
            raise SetupError(f'{folder} was not made by make and {fault}: remove it, or name another in VENV=...')
        return
    # pip takes a package that was unpacked in part for installed: after an interruption it has to start from nothing.
    keep = old and {**old, 'key': stamp['key']} == stamp and env.works('import pip')
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STAMP).write_text('{}')
    if not keep:
        say(f'{"making" if old is None else "starting again from an empty"} {folder.name} (Python {PYTHON})')
        for path in folder.iterdir():
            if path.name != STAMP:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if subprocess.run([sys.executable, '-m', 'venv', str(folder)]).returncode:
            raise SetupError(f'{sys.executable} makes no virtual environment, its message stands above')


def sees_gpu(env):
    """Whether mmcv's build compiles for a GPU; the same condition as in its setup.py."""
    return os.environ.get('FORCE_CUDA') == '1' or env.works('import torch; assert torch.cuda.is_available()')


def why_no_build(env):
    """What a machine lacks to compile mmcv; None where that is not the reason."""
    compiler, header = os.environ.get('CXX', 'c++').split()[0], Path(sysconfig.get_paths()['include']) / 'Python.h'
    quicker = 'or name a folder or index with a prebuilt wheel in MMCV_FIND_LINKS'
    if shutil.which(compiler) is None:
        return f'there is no C++ compiler "{compiler}": install one (Debian: build-essential), {quicker}'
    if not header.is_file():
        return f'{header} is missing: install the Python headers (Debian: python3-dev), {quicker}'
    cuda = os.environ.get('CUDA_HOME', '/usr/local/cuda')
    if sees_gpu(env) and not (shutil.which('nvcc') or shutil.which('nvcc', path=f'{cuda}/bin')):
        return f'a GPU is visible and there is no nvcc: hide the GPU with CUDA_VISIBLE_DEVICES="", {quicker}'
    return None


def wheel_folder(env, torch):
    """Where pip keeps what is compiled here: outside the checkout, one folder for each torch, Python and CUDA."""
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    name = f'torch-{torch}-cp{PYTHON.replace(".", "")}'
    if sees_gpu(env) and env.works('import torch; print((torch.version.cuda or "").replace(".", ""))'):
        name += f'-cu{env.output}'
    return Path(os.environ.get('PSAQ_MM_WHEELS') or cache / 'psaq_mm' / 'wheels').expanduser() / name


def install_mmcv(env, torch, name, version):
    """Installs mmcv with its ops: a prebuilt wheel if one works with this torch, else compiled from source."""
    if env.versions(name) == {name: version} and env.works(OPS_CHECK):
        return
    folder = wheel_folder(env, torch)
    # Wheels that lie in the folder itself are found too.
    links = [f'--find-links={link}' for link in (*os.environ.get('MMCV_FIND_LINKS', '').split(), folder)]
    mmcv = ['--no-deps', '--force-reinstall', f'{name}=={version}']
    try:
        env.pip('install', *links, '--only-binary', name, *mmcv, silent=True)
    except SetupError:
        found = 'no prebuilt wheel was found'
    else:
        if env.works(OPS_CHECK):
            return
        found = f'the ops of the prebuilt wheel do not run ({env.output.splitlines()[-1]})'
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    jobs = os.environ.get('MAX_JOBS') or str(max(1, min(os.cpu_count() or 1, memory // (2 * GIB))))
    say(f'{name} {version} for torch {torch} and Python {PYTHON}: {found}, so it is compiled')
    say(f'    This takes about 20 minutes on two cores, once: what was compiled is kept in {folder}.')
    say('    Quicker: name a folder or index with a wheel in MMCV_FIND_LINKS (or PIP_FIND_LINKS).')
    # No build environment of its own, which would have another torch; PATH is for ninja.
    build = ['--no-build-isolation', '--no-binary', name, '--cache-dir', folder]
    path = f'{env.python.parent}{os.pathsep}{os.environ.get("PATH", "")}'
    env.pip('install', *build, *mmcv, explain=why_no_build, MMCV_WITH_OPS='1', MAX_JOBS=jobs, PATH=path)
    if not env.works(OPS_CHECK):
        raise SetupError(f'{name} was compiled, but its ops do not run with torch {torch}: {env.output}')


def drop_useless_torchvision(env):
    """Removes a torchvision that a CPU-only torch cannot load: mmdet and mmseg work without, not with a broken one."""
    if env.works('import torchvision.ops'):
        return
    why = env.output.splitlines()[-1]
    if not env.works('import torch; assert torch.version.cuda is None'):
        raise SetupError(
            f'torchvision does not work with this torch ({why}): name an index that has both in PIP_EXTRA_INDEX_URL'
        )
    say(f'torchvision has no build for this CPU-only torch ({why}): going on without')
    say('    mmpretrain and timm, which import it, are not to be used, and their tests are skipped')
    env.pip('uninstall', '-y', 'torchvision')


def install(env, torch, stack, pins):
    if stack == 'core':
        say(f'torch {torch} and the test tools, without OpenMMLab')
        env.pip('install', 'setuptools>=64,<81', 'wheel', f'torch=={torch}', 'numpy')
        return env.pip('install', '--no-build-isolation', f'torch=={torch}', '-e', '.[test]')
    engine, mmcv, *_ = PACKAGES[stack]
    say(f'torch {torch} and torchvision: on Linux up to 2.5 GB with their CUDA packages, minutes on a slow line')
    # And what mmcv is built with, in the versions of the stack.
    exact = [f'{name}=={pins[name]}' for name in ('numpy', 'opencv-python', engine)]
    vision = f'torchvision=={pins["torchvision"]}' if torch == pins['torch'] else 'torchvision'
    env.pip('install', 'setuptools', 'wheel', 'ninja', f'torch=={torch}', vision, *exact)
    install_mmcv(env, torch, mmcv, pins[mmcv])
    say('the other packages')
    rest = [f'{name}=={version}' for name, version in pins.items() if name not in ('torch', 'torchvision')]
    env.pip('install', f'torch=={torch}', *rest)
    env.pip('install', '--no-deps', '--no-build-isolation', '-e', '.')
    drop_useless_torchvision(env)
    if not env.works(OPS_CHECK + STACK_CHECK):
        raise SetupError(f'everything is installed, but the libraries do not import:\n{env.output}')


def set_up(venv, torch, stack='openmmlab'):
    """Makes `venv` with a torch such as '2.1.2', or does nothing where it stands as it should."""
    if not re.fullmatch(r'\d+\.\d+\.\d+', torch):
        raise SetupError(f'TORCH={torch} is no version of torch such as 2.1.2')
    if stack not in PACKAGES:
        raise SetupError(f'STACK={stack} is no stack: openmmlab or onedl')
    numpy2 = tuple(int(part) for part in torch.split('.')) >= (2, 3)  # an earlier torch was built for numpy 1
    if stack == 'onedl' and not numpy2:
        raise SetupError(f'STACK=onedl needs numpy 2 and so torch 2.3 or later, not TORCH={torch}: leave TORCH out')
    # The reference stack's pins have no other Python in common.
    if stack != 'core' and PYTHON != '3.11':
        raise SetupError(f'the reference stack needs Python 3.11, and this is {PYTHON}: name one with PYTHON=...')
    # Two makes at once would install over each other: the second one waits, and finds the work done.
    with open(ROOT / 'constraints.txt') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp, begun = wanted(torch, stack), time.monotonic()
        if read_stamp(venv) == stamp and (venv / 'bin' / 'python').exists():
            return
        # The core set-up with a newer torch leaves the choice of numpy to pip.
        constraints = [] if stack == 'core' and numpy2 else ['-c', f'constraints{"-numpy2" * numpy2}.txt']
        env, others = Environment(venv, constraints), PACKAGES[OTHERS[stack]]
        make_venv(env, stamp, others)
        install(env, torch, stack, pins_of(requirements_of(stack, numpy2)))
        for name in env.versions(*others):
            raise SetupError(f'{name} came along as a requirement and overwrites files of the packages asked for')
        shutil.rmtree(venv / 'tmp', ignore_errors=True)
        (venv / STAMP).write_text(json.dumps(stamp), encoding='utf-8')
        say(f'{venv.name} is ready after {time.monotonic() - begun:.0f} s; it stands until its requirements change')


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--venv', required=True, help='folder of the environment')
    parser.add_argument('--torch', required=True, help='version of torch, such as 2.1.2')
    parser.add_argument('--stack', default='openmmlab', help='openmmlab, onedl, or core: no OpenMMLab')
    args = parser.parse_args(argv)
    # As Ctrl-C: a build under way is ended with this process.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        set_up((ROOT / args.venv).absolute(), args.torch, args.stack)
    except (SetupError, OSError) as error:
        sys.exit(f'[setup] error: {error}')
    except KeyboardInterrupt:
        print('[setup] interrupted: the next make starts the environment anew', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
