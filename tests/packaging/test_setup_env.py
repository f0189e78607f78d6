"""When an environment counts as done, when it is filled up, and when it is made anew; and how a compiled mmcv is kept.

Nothing here installs packages: an environment is a bare folder, and mmcv a source package of two lines.
"""

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCH = '2.1.2'


def load(script):
    spec = importlib.util.spec_from_file_location('psaq_setup_env', script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup_env(tmp_path, monkeypatch):
    """The set-up script of a copy of the tree's requirement files, with the installing left out and counted."""
    root = tmp_path / 'checkout'
    root.mkdir()
    module = load(ROOT / '.dev' / 'setup_env.py')
    for name in module.KEY_FILES:
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    module = load(root / '.dev' / 'setup_env.py')
    module.installed = []

    def install(env, torch_version, stack):
        module.installed.append(torch_version)

    def make_python(command, *args, run=module.run, **kwargs):
        if list(command[1:3]) != ['-m', 'venv']:
            return run(command, *args, **kwargs)
        python = Path(command[3]) / 'bin' / 'python'
        python.parent.mkdir()
        python.symlink_to(sys.executable)

    monkeypatch.setattr(module, 'install_stack', install)
    monkeypatch.setattr(module, 'install_core', install)
    monkeypatch.setattr(module, 'run', make_python)
    # The tests run on any Python; the check of the version has a test of its own.
    monkeypatch.setattr(module.sys, 'version_info', (3, 11, 9))
    return module


@pytest.fixture
def venv(setup_env):
    """An environment that is set up."""
    folder = setup_env.ROOT / '.venv'
    setup_env.set_up(folder, TORCH)
    assert setup_env.installed == [TORCH]
    setup_env.installed.clear()
    (folder / 'witness').touch()
    return folder


def test_ready_environment_is_left_alone(setup_env, venv):
    before = (venv / setup_env.STAMP).stat().st_mtime_ns
    setup_env.set_up(venv, TORCH)
    assert setup_env.installed == []
    assert (venv / setup_env.STAMP).stat().st_mtime_ns == before


def test_new_file_times_alone_change_nothing(setup_env, venv):
    for name in setup_env.KEY_FILES:
        os.utime(setup_env.ROOT / name)
    setup_env.set_up(venv, TORCH)
    assert setup_env.installed == []


@pytest.mark.parametrize(
    'name', ['constraints.txt', 'requirements.txt', 'requirements-tools.txt', 'requirements-onedl.txt', 'setup.py']
)
def test_changed_requirements_fill_the_same_environment_up(setup_env, venv, name):
    with open(setup_env.ROOT / name, 'a') as file:
        file.write('\n# changed\n')
    setup_env.set_up(venv, TORCH)
    assert setup_env.installed == [TORCH]
    assert (venv / 'witness').exists()
    assert not (venv / setup_env.BUILDING).exists()


def test_another_torch_starts_from_nothing(setup_env, venv):
    setup_env.set_up(venv, '2.0.1')
    assert setup_env.installed == ['2.0.1']
    assert not (venv / 'witness').exists()


def test_other_packages_start_from_nothing_in_both_directions(setup_env, venv):
    """A fork installs the same import names: over the originals it would leave files of both."""
    newer = '2.13.0'
    setup_env.set_up(venv, newer)
    for stack in ('onedl', 'openmmlab'):
        (venv / 'witness').touch()
        setup_env.set_up(venv, newer, stack=stack)
        assert not (venv / 'witness').exists()
        setup_env.installed.clear()
        setup_env.set_up(venv, newer, stack=stack)
        assert setup_env.installed == []


def test_environment_from_before_there_was_a_choice_is_the_reference_one(setup_env, venv):
    stamp = json.loads((venv / setup_env.STAMP).read_text())
    assert set(stamp) == {'key', 'torch', 'python', 'root', 'core'}
    (venv / setup_env.STAMP).write_text(json.dumps({**stamp, 'key': 'of older requirements'}))
    setup_env.set_up(venv, TORCH)
    assert (venv / 'witness').exists(), 'filled up, not made anew'


def test_another_python_starts_from_nothing(setup_env, venv, monkeypatch):
    setup_env.set_up(venv, TORCH, core=True)
    (venv / 'witness').touch()
    monkeypatch.setattr(setup_env.sys, 'version_info', (3, 12, 1))
    setup_env.set_up(venv, TORCH, core=True)
    assert not (venv / 'witness').exists()


def test_moved_checkout_starts_from_nothing(setup_env, venv, tmp_path):
    moved = tmp_path / 'elsewhere'
    shutil.copytree(setup_env.ROOT, moved, symlinks=True)
    stamp = json.loads((moved / '.venv' / setup_env.STAMP).read_text())
    assert setup_env.environment_key(TORCH) == stamp['key']
    assert setup_env.environment_key(TORCH, root=moved) != stamp['key']


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_interrupted_set_up_does_not_count_as_done(setup_env, monkeypatch, error):
    venv = setup_env.ROOT / '.venv'
    install = setup_env.install_stack

    def stopped(env, torch_version, stack):
        (env.folder / 'half a package').touch()
        raise error

    monkeypatch.setattr(setup_env, 'install_stack', stopped)
    with pytest.raises(error):
        setup_env.set_up(venv, TORCH)
    assert not setup_env.is_ready(venv, setup_env.environment_key(TORCH))

    monkeypatch.setattr(setup_env, 'install_stack', install)
    setup_env.set_up(venv, TORCH)
    assert setup_env.installed == [TORCH]
    assert not (venv / 'half a package').exists()
    assert setup_env.is_ready(venv, setup_env.environment_key(TORCH))


def test_interrupted_update_does_not_count_as_done(setup_env, venv, monkeypatch):
    def stopped(env, torch_version, stack):
        raise KeyboardInterrupt

    content = (setup_env.ROOT / 'requirements.txt').read_text()
    (setup_env.ROOT / 'requirements.txt').write_text(content + '\n# changed\n')
    monkeypatch.setattr(setup_env, 'install_stack', stopped)
    with pytest.raises(KeyboardInterrupt):
        setup_env.set_up(venv, TORCH)
    (setup_env.ROOT / 'requirements.txt').write_text(content)
    assert not setup_env.is_ready(venv, setup_env.environment_key(TORCH))


@pytest.mark.parametrize('content', ['', '{', '[]', '{"key": 1}'])
def test_damaged_stamp_is_no_stamp(setup_env, venv, content):
    (venv / setup_env.STAMP).write_text(content)
    assert not setup_env.is_ready(venv, setup_env.environment_key(TORCH))


def test_environment_whose_python_is_gone_is_not_ready(setup_env, venv):
    (venv / 'bin' / 'python').unlink()
    (venv / 'bin' / 'python').symlink_to(venv / 'removed')
    assert not setup_env.is_ready(venv, setup_env.environment_key(TORCH))


def test_environment_made_by_hand_is_not_wiped(setup_env, monkeypatch):
    venv = setup_env.ROOT / '.venv'
    (venv / 'bin').mkdir(parents=True)
    (venv / 'witness').touch()
    with pytest.raises(setup_env.SetupError, match='was not made by this Makefile and has no working Python'):
        setup_env.set_up(venv, TORCH)
    assert (venv / 'witness').exists()
    # One with a Python that serves is filled up.
    monkeypatch.setattr(setup_env.Environment, 'works', lambda self, code: 'metadata' not in code)
    setup_env.set_up(venv, TORCH)
    assert setup_env.installed == [TORCH]
    assert (venv / 'witness').exists()


def test_environment_made_by_hand_with_the_other_family_is_refused(setup_env, monkeypatch):
    venv = setup_env.ROOT / '.venv'
    (venv / 'bin').mkdir(parents=True)
    monkeypatch.setattr(
        setup_env.Environment,
        'works',
        lambda self, code: 'metadata' not in code or 'torch' in code or "m.version('mmcv')" in code,
    )
    with pytest.raises(
        setup_env.SetupError, match='holds mmcv, whose files the packages asked for would overwrite: remove it, or'
    ):
        setup_env.set_up(venv, '2.13.0', stack='onedl')
    assert setup_env.installed == []
    setup_env.set_up(venv, '2.13.0')  # its own family
    assert setup_env.installed == ['2.13.0']


@pytest.mark.parametrize('stack', ['', 'mmlab', 'onedl openmmlab'])
def test_unusable_stack_is_named(setup_env, stack):
    with pytest.raises(setup_env.SetupError, match=f'STACK={stack} is no stack: openmmlab or onedl'):
        setup_env.set_up(setup_env.ROOT / '.venv', TORCH, stack=stack)


def test_forks_refuse_a_torch_of_numpy_1(setup_env):
    with pytest.raises(
        setup_env.SetupError,
        match=r'STACK=onedl needs numpy 2 and with it torch 2\.3 or later, not TORCH=2\.1\.2: leave',
    ):
        setup_env.set_up(setup_env.ROOT / '.venv', TORCH, stack='onedl')


@pytest.mark.parametrize(
    'stack,torch,requirements,constraints',
    [
        ('openmmlab', '2.1.2', 'requirements.txt', 'constraints.txt'),
        ('openmmlab', '2.2.2', 'requirements.txt', 'constraints.txt'),
        ('openmmlab', '2.3.0', 'requirements-torch2.13.txt', 'constraints-numpy2.txt'),
        ('openmmlab', '2.13.0', 'requirements-torch2.13.txt', 'constraints-numpy2.txt'),
        ('onedl', '2.13.0', 'requirements-onedl.txt', 'constraints-numpy2.txt'),
    ],
)
def test_pins_of_a_stack(setup_env, stack, torch, requirements, constraints):
    chosen = setup_env.Stack(stack, torch)
    assert (chosen.requirements, chosen.constraints) == (requirements, constraints)
    names = {pin.split('==')[0] for pin in chosen.pins()}
    assert {'numpy', 'timm', 'pytest', *chosen.distributions.values()} <= names
    assert not names & set(chosen.others), 'a family is pinned alone'
    assert int(chosen.pinned('numpy').split('.')[0]) == (1 if constraints == 'constraints.txt' else 2)
    with pytest.raises(setup_env.SetupError, match=f'{requirements} has no line "absent==<version>": add it'):
        chosen.pinned('absent')


class TestTorchvision:
    """What becomes of a torchvision that was installed beside a torch it was not built for."""

    class Env:
        def __init__(self, vision, cpu_only):
            self.answers, self.done, self.last_output = {'torchvision': vision, 'torch': cpu_only}, [], ''

        def works(self, code):
            self.last_output = 'Traceback\nRuntimeError: operator torchvision::nms does not exist\n'
            return self.answers['torchvision' if 'torchvision' in code else 'torch']

        def pip(self, *args):
            self.done.append(args)

    def test_one_that_works_stays(self, setup_env, capsys):
        env = self.Env(vision=True, cpu_only=True)
        setup_env.drop_useless_torchvision(env)
        assert env.done == [] and capsys.readouterr().out == ''

    def test_one_without_a_cpu_build_goes_and_it_is_said(self, setup_env, capsys):
        env = self.Env(vision=False, cpu_only=True)
        setup_env.drop_useless_torchvision(env)
        assert env.done == [('uninstall', '-y', 'torchvision')]
        said = capsys.readouterr().out
        assert (
            'no build for this CPU-only torch' in said
            and 'torchvision::nms does not exist' in said
            and 'skipped' in said
        )

    def test_elsewhere_it_is_an_error(self, setup_env):
        with pytest.raises(
            setup_env.SetupError, match='torchvision does not work with this torch .*nms does not exist'
        ):
            setup_env.drop_useless_torchvision(self.Env(vision=False, cpu_only=False))


@pytest.mark.parametrize('torch', ['2', 'newest', '2.1.2+cpu', ''])
def test_unusable_torch_is_named(setup_env, torch):
    with pytest.raises(setup_env.SetupError, match=r'TORCH=.* is no version of torch such as 2\.1\.2'):
        setup_env.set_up(setup_env.ROOT / '.venv', torch)


def test_unusable_python_is_named(setup_env, monkeypatch):
    monkeypatch.setattr(setup_env.sys, 'version_info', (3, 13, 0))
    with pytest.raises(setup_env.SetupError, match=r'needs Python 3\.11, and this is Python 3\.13'):
        setup_env.set_up(setup_env.ROOT / '.venv', TORCH)


class TestCompiledWheel:
    """`compile_mmcv` on a source package that only says how it was built."""

    @pytest.fixture
    def script(self):
        return load(ROOT / '.dev' / 'setup_env.py')

    @pytest.fixture
    def env(self, script, monkeypatch):
        env = script.Environment(Path(sys.prefix))
        monkeypatch.setattr(script, 'check_compilers', lambda env: None)
        return env

    @pytest.fixture
    def source(self, tmp_path, monkeypatch):
        """Puts an `mmcv` source package with this setup.py where pip looks, and nothing else."""

        def make(setup_py, name='mmcv'):
            folder = tmp_path / 'links'
            folder.mkdir()
            # As today's source packages are named: their blanks and dashes are underscores.
            stem = f'{name.replace("-", "_")}-9.9'
            with tarfile.open(folder / f'{stem}.tar.gz', 'w:gz') as archive:
                for file, text in {
                    'setup.py': setup_py,
                    'PKG-INFO': f'Metadata-Version: 1.0\nName: {name}\nVersion: 9.9\n',
                }.items():
                    info = tarfile.TarInfo(f'{stem}/{file}')
                    info.size = len(text)
                    archive.addfile(info, io.BytesIO(text.encode()))
            monkeypatch.setenv('PIP_NO_INDEX', '1')
            monkeypatch.setenv('PIP_FIND_LINKS', folder.as_uri())
            # pip.conf of this machine may name indexes and folders of its own.
            monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)

        return make

    def test_wheel_is_kept_and_its_build_is_told_what_matters(self, script, env, source, tmp_path, monkeypatch):
        source(
            'import os, sys, setuptools\n'
            'print("OPS", os.environ["MMCV_WITH_OPS"], "JOBS", os.environ["MAX_JOBS"], "PREFIX", sys.prefix)\n'
            'setuptools.setup(name="mmcv", version="9.9", py_modules=[])\n'
        )
        monkeypatch.setenv('MAX_JOBS', '5')
        folder = tmp_path / 'kept wheels' / 'torch'
        wheel = script.compile_mmcv(env, '9.9', TORCH, folder)
        assert wheel.parent == folder and wheel.name.startswith('mmcv-9.9') and wheel.is_file()
        # In this environment (no isolated one with another torch), with the ops, and as many jobs as asked for.
        assert f'OPS 1 JOBS 5 PREFIX {sys.prefix}' in (folder / 'mmcv-9.9.log').read_text()
        # Nothing else stays: the build's own folder is gone.
        assert {path.name for path in folder.iterdir()} == {'mmcv-9.9.log', wheel.name}

    def test_wheel_of_a_fork_is_found_under_its_own_name(self, script, env, source, tmp_path):
        source(
            'import setuptools; setuptools.setup(name="onedl-mmcv", version="9.9", py_modules=[])\n', name='onedl-mmcv'
        )
        wheel = script.compile_mmcv(env, '9.9', '2.13.0', tmp_path / 'wheels', 'onedl-mmcv')
        assert wheel.name.startswith('onedl_mmcv-9.9')
        assert (tmp_path / 'wheels' / 'onedl-mmcv-9.9.log').is_file()

    def test_failure_shows_the_end_of_the_log(self, script, env, source, tmp_path):
        source('raise SystemExit("the compiler is on strike")\n')
        with pytest.raises(script.SetupError, match='compiling mmcv failed(.|\n)*the compiler is on strike$'):
            script.compile_mmcv(env, '9.9', TORCH, tmp_path / 'wheels')
        assert not list((tmp_path / 'wheels').glob('*.whl'))

    def test_unwritable_wheel_folder_is_named(self, script, env, tmp_path):
        (tmp_path / 'file').touch()
        with pytest.raises(script.SetupError, match='cannot be written .* PSAQ_MM_WHEELS'):
            script.compile_mmcv(env, '9.9', TORCH, tmp_path / 'file' / 'wheels')

    def test_stopped_build_leaves_no_process(self, script, tmp_path, monkeypatch):
        """The build's own children too: a compiler left behind would keep a core busy for minutes."""
        pids = tmp_path / 'pids'
        code = (
            f'import subprocess, sys, time\nchild = subprocess.Popen(["sleep", "100"])\n'
            f'open({str(pids)!r}, "w").write(str(child.pid))\ntime.sleep(100)\n'
        )

        def stop_once_running(seconds, sleep=time.sleep):
            for _ in range(200):
                if pids.exists() and pids.read_text():
                    raise KeyboardInterrupt
                sleep(0.05)

        monkeypatch.setattr(script.time, 'sleep', stop_once_running)
        with pytest.raises(KeyboardInterrupt):
            script.follow_build([sys.executable, '-c', code], dict(os.environ), tmp_path / 'log')
        monkeypatch.undo()
        child = int(pids.read_text())
        for _ in range(100):
            if not alive(child):
                break
            time.sleep(0.05)
        assert not alive(child)


def alive(pid):
    """Whether a process runs; one that ended and waits to be collected does not."""
    shown = subprocess.run(['ps', '-o', 'stat=', '-p', str(pid)], stdout=subprocess.PIPE, text=True).stdout.strip()
    return bool(shown) and not shown.startswith('Z')


def test_wheels_are_kept_apart_by_torch_and_python(tmp_path, monkeypatch):
    script = load(ROOT / '.dev' / 'setup_env.py')
    monkeypatch.setattr(script, 'builds_for_gpu', lambda env: False)
    monkeypatch.delenv('PSAQ_MM_WHEELS', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    tag = 'cp{}{}'.format(*sys.version_info[:2])
    assert script.wheel_folder(None, '2.1.2') == tmp_path / 'psaq_mm' / 'wheels' / f'torch-2.1.2-{tag}'
    assert script.wheel_folder(None, '2.3.1') == tmp_path / 'psaq_mm' / 'wheels' / f'torch-2.3.1-{tag}'
    monkeypatch.setenv('PSAQ_MM_WHEELS', str(tmp_path / 'mine'))
    assert script.wheel_folder(None, '2.1.2').parent == tmp_path / 'mine'
