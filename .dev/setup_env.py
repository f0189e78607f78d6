#!/usr/bin/env python3
"""Makes the virtual environment of `make demo` and `make test`; does nothing where it is there already.

Standard library only: it runs on a machine that has nothing but Python. Two kinds of environment:

* a stack: torch, mmcv with its compiled ops, mmdet, mmsegmentation, mmpretrain. The reference stack (default) has the
  versions in requirements.txt; a torch from 2.3 on gets numpy 2 (requirements-torch2.13.txt); `--stack onedl` takes the
  maintained forks (requirements-onedl.txt);
* `--core`: PyTorch of any version and the test tools, without OpenMMLab, for the floors that need PyTorch alone.

pip decides where packages come from: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS and pip.conf all apply. On
Linux the default torch brings its CUDA packages (about 2.5 GB) also where there is no GPU. To avoid that, name an index
of CPU builds in those variables.
"""

import argparse
import contextlib
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
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMP = '.psaq-ready.json'
BUILDING = '.psaq-building'
# A change in one of these files may change the environment. This script is one of them.
KEY_FILES = (
    'constraints.txt',
    'constraints-numpy2.txt',
    'requirements.txt',
    'requirements-torch2.13.txt',
    'requirements-onedl.txt',
    'requirements-tools.txt',
    'setup.py',
    'pyproject.toml',
    '.dev/setup_env.py',
)
# Distributions by import name. The forks have the same import names: the two families cannot share an environment.
STACKS = {
    'openmmlab': {
        'mmengine': 'mmengine',
        'mmcv': 'mmcv',
        'mmdet': 'mmdet',
        'mmseg': 'mmsegmentation',
        'mmpretrain': 'mmpretrain',
    },
    'onedl': {
        'mmengine': 'onedl-mmengine',
        'mmcv': 'onedl-mmcv',
        'mmdet': 'onedl-mmdetection',
        'mmseg': 'onedl-mmsegmentation',
        'mmpretrain': 'onedl-mmpretrain',
    },
}
# One compiler process of mmcv's ops takes up to this much memory.
BYTES_PER_JOB = 2 << 30

# Calls an op: the extension of a wheel for another torch can be imported, but not called.
OPS_CHECK = """
import torch
from mmcv.ops import nms
kept = nms(torch.tensor([[0., 0., 9., 9.], [0., 0., 9., 8.], [20., 20., 29., 29.]]), torch.tensor([.9, .8, .7]), .5)[1]
assert kept.tolist() == [0, 2], kept
"""
STACK_CHECK = (
    OPS_CHECK
    + """
import mmdet.models, mmseg.models, numpy
assert torch.from_numpy(numpy.ones(3)).sum() == 3
"""
)
# mmpretrain imports torchvision, which not every torch has.
VISION_CHECK = STACK_CHECK + 'import torchvision.ops, mmpretrain.models\n'


class SetupError(Exception):
    """A set-up that cannot go on; the message says why and what to do."""


def say(text):
    print(f'[setup] {text}', flush=True)


def environment_key(torch_version, core=False, root=ROOT, stack='openmmlab'):
    """Hash of all that the environment depends on. If the stamp holds the same hash, nothing has to be done."""
    digest = hashlib.sha256()
    for name in KEY_FILES:
        digest.update(name.encode() + b'\0' + (root / name).read_bytes() + b'\0')
    digest.update(json.dumps(identity(torch_version, core, root, stack), sort_keys=True).encode())
    return digest.hexdigest()


def identity(torch_version, core=False, root=ROOT, stack='openmmlab'):
    """Properties that an environment cannot change in place: if one differs, it is made anew."""
    # Without a name it is the reference stack: older stamps have none.
    named = {} if stack == 'openmmlab' else {'stack': stack}
    return {
        **named,
        'torch': torch_version,
        'python': '{}.{}'.format(*sys.version_info[:2]),
        'root': str(root),  # an environment does not survive being moved
        'core': bool(core),
    }


def read_stamp(venv):
    """The content of the stamp; None where there is none or it cannot be read."""
    try:
        stamp = json.loads((venv / STAMP).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) else None


def is_ready(venv, key):
    stamp = read_stamp(venv)
    return (
        stamp is not None
        and stamp.get('key') == key
        and not (venv / BUILDING).exists()
        and (venv / 'bin' / 'python').exists()
    )


def write_stamp(venv, key, ident):
    """Write the stamp, last and in one step: an interrupted set-up then leaves no environment that counts as done."""
    draft = venv / (STAMP + '.new')
    draft.write_text(json.dumps({'key': key, **ident}), encoding='utf-8')
    os.replace(draft, venv / STAMP)
    with contextlib.suppress(FileNotFoundError):
        (venv / BUILDING).unlink()


def has_numpy2(torch_version):
    """Whether a torch works with numpy 2: those below 2.3 were built for numpy 1."""
    return tuple(int(part) for part in torch_version.split('.'))[:2] >= (2, 3)


class Stack:
    """A family of packages and the files with its pins."""

    def __init__(self, name='openmmlab', torch_version=None):
        self.name = name
        self.distributions = STACKS[name]
        self.others = sorted(
            set().union(*(family.values() for family in STACKS.values())) - set(self.distributions.values())
        )
        numpy2 = torch_version is not None and has_numpy2(torch_version)
        self.requirements = (
            'requirements-onedl.txt' if name == 'onedl' else f'requirements{"-torch2.13" if numpy2 else ""}.txt'
        )
        self.constraints = f'constraints{"-numpy2" if numpy2 else ""}.txt'

    def pins(self, file=None):
        """The lines of the requirements, with those of the files that they include."""
        lines = []
        for line in (ROOT / (file or self.requirements)).read_text(encoding='utf-8').splitlines():
            line = line.split('#')[0].strip()
            lines += self.pins(line[2:].strip()) if line.startswith('-r') else [line] if line else []
        return lines

    def pinned(self, name):
        """The version that `name` is pinned to."""
        for pin in self.pins():
            if pin.startswith(f'{name}=='):
                return pin.split('==')[1]
        raise SetupError(f'{self.requirements} has no line "{name}==<version>": add it')


def run(command, env=None, **kwargs):
    """Runs a command from the root of the source tree; raises SetupError with the command where it fails."""
    result = subprocess.run([str(part) for part in command], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, **kwargs)
    if result.returncode:
        shown = ' '.join(str(part) for part in command)
        if len(shown) > 300:
            shown = shown[:300] + ' ...'
        raise SetupError(f'this command failed with status {result.returncode} (its messages stand above): {shown}')
    return result


class Environment:
    """A virtual environment and the pip in it."""

    def __init__(self, folder, constraints='constraints.txt'):
        self.folder = folder
        self.python = folder / 'bin' / 'python'
        self.constraints = ['-c', constraints] if constraints else []
        self.quiet = [] if sys.stdout.isatty() else ['-q']

    def pip(self, verb, *args, env=None, **kwargs):
        where = self.constraints if verb in ('install', 'wheel') else []
        return run([self.python, '-m', 'pip', verb, *self.quiet, *where, *args], env=env, **kwargs)

    def works(self, code):
        """Whether `code` runs in the environment; its output is in `last_output`."""
        if not self.python.exists():
            self.last_output = f'{self.python} does not exist'
            return False
        result = subprocess.run(
            [str(self.python), '-W', 'ignore', '-c', code],
            cwd=self.folder,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.last_output = result.stdout
        return result.returncode == 0

    def has(self, name, version=None):
        test = f'import importlib.metadata as m; v = m.version({name!r}); '
        return self.works(test + (f'assert v.split("+")[0] == {version!r}' if version else ''))

    def tell(self, code):
        return run([self.python, '-c', code], stdout=subprocess.PIPE, text=True).stdout.strip()


def make_venv(venv, ident, others=()):
    """Makes a folder with a working Python and pip, or keeps the one that is there if it can be used."""
    stamp, interrupted = read_stamp(venv), (venv / BUILDING).exists()
    if venv.exists() and not (interrupted or stamp):
        # Somebody else made it: packages are added or it is refused, but it is never removed.
        env, want = Environment(venv), ident['python']
        if not env.works(f'import sys, pip; assert "%d.%d" % sys.version_info[:2] == {want!r}'):
            raise SetupError(
                f'{venv} was not made by this Makefile and has no working Python {want} with pip: remove it, or '
                'name another folder with VENV=...'
            )
        if env.has('torch') and not env.has('torch', ident['torch']):
            raise SetupError(
                f'{venv} was not made by this Makefile and holds another torch than {ident["torch"]}: remove it, or '
                'name another folder with VENV=...'
            )
        for name in filter(env.has, others):
            raise SetupError(
                f'{venv} was not made by this Makefile and holds {name}, whose files the packages asked for would '
                'overwrite: remove it, or name another folder with VENV=...'
            )
        return
    # pip takes a package that was unpacked in part for installed: after an interruption it has to start from nothing.
    same = stamp is not None and not interrupted and {k: v for k, v in stamp.items() if k != 'key'} == ident
    if same:
        (venv / BUILDING).touch()
        (venv / STAMP).unlink()
        return
    say(f'{"starting again from an empty" if venv.exists() else "making"} {venv.name} (Python {ident["python"]})')
    if venv.exists():
        (venv / BUILDING).touch()  # first: it marks the folder as ours, also if the removal is interrupted
        for path in venv.iterdir():
            if path.name != BUILDING:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    venv.mkdir(parents=True, exist_ok=True)
    (venv / BUILDING).touch()
    run([sys.executable, '-m', 'venv', venv])


def install_torch(env, torch_version, stack):
    if env.has('torch', torch_version) and env.has('torchvision'):
        return
    vision = f'torchvision=={stack.pinned("torchvision")}' if torch_version == stack.pinned('torch') else 'torchvision'
    say(
        f'torch {torch_version} and torchvision: on Linux up to 2.5 GB with their CUDA packages, several minutes on a '
        f'slow line'
    )
    env.pip('install', f'torch=={torch_version}', vision)


def drop_useless_torchvision(env):
    """Removes a torchvision that this torch cannot load: mmdet and mmseg fail if torchvision is there and broken.

    The default torchvision is built for a CUDA torch. Beside a CPU-only torch from elsewhere it cannot be imported.
    Without it mmpretrain and timm cannot be imported either; their tests are skipped with that reason.
    """
    if env.works('import torchvision.ops'):
        return
    why = env.last_output.strip().splitlines()[-1]
    if not env.works('import torch; assert torch.version.cuda is None'):
        raise SetupError(
            f'torchvision does not work with this torch ({why}): name an index that has both in PIP_EXTRA_INDEX_URL'
        )
    say(
        f'torchvision has no build for this CPU-only torch ({why}): going on without; mmpretrain and timm, which '
        'import it, are not to be used, and their tests are skipped'
    )
    env.pip('uninstall', '-y', 'torchvision')


def wheel_folder(env, torch_version):
    """The folder of wheels that were compiled here: outside the checkout, one for each torch, Python and CUDA."""
    base = os.environ.get('PSAQ_MM_WHEELS')
    if not base:
        cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
        base = Path(cache) / 'psaq_mm' / 'wheels'
    name = 'torch-{}-cp{}{}'.format(torch_version, *sys.version_info[:2])
    if builds_for_gpu(env):
        name += '-cu' + env.tell('import torch; print((torch.version.cuda or "").replace(".", ""))')
    return Path(base).expanduser() / name


def builds_for_gpu(env):
    """Whether mmcv's build compiles for a GPU; the same condition as in its setup.py."""
    return os.environ.get('FORCE_CUDA') == '1' or env.works('import torch; assert torch.cuda.is_available()')


def install_mmcv(env, torch_version, stack):
    """Installs mmcv with its ops: a prebuilt wheel if one works with this torch, else compiled from source."""
    name, mmengine = stack.distributions['mmcv'], stack.distributions['mmengine']
    version = stack.pinned(name)
    if env.has(name, version) and env.works(OPS_CHECK):
        return
    folder = wheel_folder(env, torch_version)
    # pip reads this variable as a list divided by blanks: a path goes in as an address, its blanks escaped.
    links = [os.environ.get('PIP_FIND_LINKS', ''), os.environ.get('MMCV_FIND_LINKS', '')]
    links += [folder.as_uri()] if folder.is_dir() else []
    with_links = {**os.environ, 'PIP_FIND_LINKS': ' '.join(filter(None, links))}
    # What mmcv needs, in the versions of the stack; --no-deps below keeps pip from choosing others.
    env.pip(
        'install',
        'ninja',
        'wheel',
        'setuptools',
        *(f'{need}=={stack.pinned(need)}' for need in (mmengine, 'numpy', 'opencv-python')),
    )
    wanted = ['--no-deps', '--force-reinstall', f'{name}=={version}']
    # A failure here is no error: most machines have no such wheel.
    prebuilt = subprocess.run(
        [str(env.python), '-m', 'pip', 'install', '-q', '--only-binary', name, *wanted],
        cwd=ROOT,
        env=with_links,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    if prebuilt.returncode == 0:
        if env.works(OPS_CHECK):
            say(f'{name} {version}: installed from a prebuilt wheel')
            return
        say(
            f'{name} {version}: a prebuilt wheel was found, but its ops do not run with torch {torch_version} '
            f'({env.last_output.strip().splitlines()[-1]}): compiling instead'
        )
    wheel = compile_mmcv(env, version, torch_version, folder, name)
    env.pip('install', '--no-deps', '--force-reinstall', wheel)
    if not env.works(OPS_CHECK):
        raise SetupError(
            f'{name} {version} was compiled, but its ops do not run with torch {torch_version}: '
            f'{env.last_output.strip()}'
        )


def compile_jobs():
    """How many compilers run at a time: one per core, but no more than fit into memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        cores = min(cores, os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // BYTES_PER_JOB)
    return max(1, cores)


def check_compilers(env):
    compiler = os.environ.get('CXX', 'c++').split()[0]
    if shutil.which(compiler) is None:
        raise SetupError(
            f'mmcv has to be compiled and there is no C++ compiler "{compiler}": install one (Debian: '
            'build-essential), or name a folder or address with a prebuilt wheel in MMCV_FIND_LINKS'
        )
    header = Path(sysconfig.get_paths()['include']) / 'Python.h'
    if not header.is_file():
        raise SetupError(
            f'mmcv has to be compiled and {header} is missing: install the Python headers (Debian: python3-dev)'
        )
    has_nvcc = shutil.which('nvcc') or (Path(os.environ.get('CUDA_HOME', '/usr/local/cuda')) / 'bin' / 'nvcc').is_file()
    if builds_for_gpu(env) and not has_nvcc:
        raise SetupError(
            "a GPU is visible, but there is no nvcc to compile mmcv's ops for it: name OpenMMLab's wheel index for "
            "this torch and CUDA (see MMCV's installation page) in MMCV_FIND_LINKS, or hide the GPU with "
            'CUDA_VISIBLE_DEVICES=""'
        )


def compile_mmcv(env, version, torch_version, folder, distribution='mmcv'):
    """Compiles mmcv with its ops from source. Returns the path of the wheel, which stays in `folder`."""
    check_compilers(env)
    jobs = os.environ.get('MAX_JOBS') or str(compile_jobs())
    python = '{}.{}'.format(*sys.version_info[:2])
    say(
        f'{distribution} {version}: no prebuilt wheel for torch {torch_version} and Python {python} was found, so its '
        'C++ ops (the detectors need them) are compiled now.'
    )
    say(f'    This takes about 20 minutes on two cores ({jobs} at a time here), once: the wheel is kept in {folder}.')
    say('    Quicker: name a folder or index with a wheel in MMCV_FIND_LINKS (or PIP_FIND_LINKS).')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix='.build-', dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        raise SetupError(
            f'the wheel folder {folder} cannot be written ({error.strerror}): name another one in PSAQ_MM_WHEELS'
        ) from error
    with scratch as name:
        log = folder / f'{distribution}-{version}.log'
        # --no-cache-dir and --no-binary: pip's own cache of built wheels knows neither the torch version nor whether
        # ops were built. --no-build-isolation: the ops must be compiled against the torch that stands in this
        # environment.
        command = [
            env.python,
            '-m',
            'pip',
            'wheel',
            '-v',
            '--no-deps',
            '--no-cache-dir',
            '--no-build-isolation',
            '--no-binary',
            distribution,
            *env.constraints,
            '-w',
            name,
            f'{distribution}=={version}',
        ]
        path = f'{env.folder / "bin"}{os.pathsep}{os.environ.get("PATH", "")}'  # for ninja
        # TMPDIR: what a stopped build leaves goes with the scratch folder.
        settings = {**os.environ, 'MMCV_WITH_OPS': '1', 'MAX_JOBS': jobs, 'PATH': path, 'TMPDIR': name}
        if follow_build([str(part) for part in command], settings, log):
            # What pip adds after the build's own messages is its own long command line.
            messages = (
                log.read_text(errors='replace').split('error: subprocess-exited-with-error')[0].rstrip().splitlines()
            )
            told = f'compiling {distribution} failed; all of it stands in {log}, and its end reads:'
            raise SetupError('\n'.join([told, *messages[-30:]]))
        built = next(Path(name).glob(f'{distribution.replace("-", "_")}-*.whl'))
        kept = folder / built.name
        os.replace(built, kept)
    return kept


def follow_build(command, settings, log, every=60):
    """Runs the build with its output in `log`, reports progress once a minute, and ends all compilers when stopped."""
    begun = told = time.monotonic()
    with open(log, 'w') as sink:
        build = subprocess.Popen(
            command,
            cwd=ROOT,
            env=settings,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while build.poll() is None:
                time.sleep(1)
                if time.monotonic() - told >= every:
                    told = time.monotonic()
                    steps = re.findall(r'\[(\d+)/(\d+)\]', log.read_text(errors='replace'))
                    done = '{} of {} files'.format(*steps[-1]) if steps else 'preparing'
                    say(f'    {done}, {(told - begun) / 60:.0f} min')
        finally:
            if build.poll() is None:
                os.killpg(build.pid, signal.SIGTERM)  # its own group: pip, setuptools, ninja and the compilers
                build.wait()
    return build.returncode


def install_stack(env, torch_version, stack):
    env.pip('install', 'setuptools', 'wheel')
    install_torch(env, torch_version, stack)
    install_mmcv(env, torch_version, stack)
    say(f'the other packages of {stack.requirements}')
    # torch and torchvision stand already, perhaps in another version than the pinned one.
    pins = [pin for pin in stack.pins() if not pin.startswith(('torch==', 'torchvision=='))]
    env.pip('install', f'torch=={torch_version}', *pins)
    env.pip('install', '--no-deps', '--no-build-isolation', '-e', '.')
    for name in filter(env.has, stack.others):
        raise SetupError(
            f'{name} came along as a requirement of something else and overwrites files of the packages asked for'
        )
    drop_useless_torchvision(env)
    if not env.works(VISION_CHECK if env.has('torchvision') else STACK_CHECK):
        raise SetupError(f'everything is installed, but the libraries do not import:\n{env.last_output.strip()}')


def install_core(env, torch_version, stack):
    env.pip('install', 'setuptools>=64,<81', 'wheel')
    say(f'torch {torch_version} and the test tools, without OpenMMLab')
    env.pip('install', f'torch=={torch_version}', 'numpy')
    env.pip('install', '--no-build-isolation', f'torch=={torch_version}', '-e', '.[test]')


def set_up(venv, torch_version, core=False, stack='openmmlab'):
    """Makes `venv`, or does nothing where it stands as it should.

    Args:
        venv (Path): folder of the environment.
        torch_version (str): version of torch without a local part, such as '2.1.2'.
        core (bool): torch and the test tools alone.
        stack (str): whose packages: 'openmmlab' (its own) or 'onedl' (the maintained forks).

    Raises:
        SetupError: where it cannot go on, in one sentence.
    """
    if not re.fullmatch(r'\d+\.\d+\.\d+', torch_version):
        raise SetupError(f'TORCH={torch_version} is no version of torch such as {Stack().pinned("torch")}')
    if stack not in STACKS:
        raise SetupError(f'STACK={stack} is no stack: {" or ".join(STACKS)}')
    if stack == 'onedl' and not has_numpy2(torch_version):
        raise SetupError(
            f'STACK=onedl needs numpy 2 and with it torch 2.3 or later, not TORCH={torch_version}: leave TORCH out, or '
            'name a later one'
        )
    # The reference stack's pins have no other Python in common.
    if not core and sys.version_info[:2] != (3, 11):
        raise SetupError(
            'the reference stack needs Python 3.11, and this is Python {}.{}: name a Python 3.11 with '
            'PYTHON=/path/to/python3.11'.format(*sys.version_info[:2])
        )
    # Two makes at once would install over each other: the second one waits, and finds the work done.
    with open(ROOT / 'constraints.txt') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        key, ident = environment_key(torch_version, core, stack=stack), identity(torch_version, core, stack=stack)
        if is_ready(venv, key):
            return
        begun = time.monotonic()
        chosen = Stack(stack, torch_version)
        make_venv(venv, ident, () if core else chosen.others)
        # The core set-up with a newer torch leaves the choice of numpy to pip.
        env = Environment(venv, constraints=None if core and has_numpy2(torch_version) else chosen.constraints)
        (install_core if core else install_stack)(env, torch_version, chosen)
        write_stamp(venv, key, ident)
        say(
            f'{venv.name} is ready after {time.monotonic() - begun:.0f} s; it is used as it stands until its '
            f'requirements change'
        )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--venv', required=True, help='folder of the environment')
    parser.add_argument('--torch', required=True, help='version of torch, such as 2.1.2')
    parser.add_argument('--stack', default='openmmlab', help='whose packages: ' + ' or '.join(STACKS))
    parser.add_argument('--core', action='store_true', help='torch and the test tools alone, without OpenMMLab')
    args = parser.parse_args(argv)

    def stop(signum, frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # so that a build under way is ended with this process
    try:
        set_up((ROOT / args.venv).absolute(), args.torch, args.core, args.stack)
    except SetupError as error:
        print(f'[setup] error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('[setup] interrupted: the next make starts the environment anew', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
