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

    def install(env, torch_version):
        module.installed.append(torch_version)

    def make_python(command, *args, run=module.run, **kwargs):
        if list(command[1:3]) != ['-m', 'venv']:
            return run(command, *args, **kwargs)
        python = Path(command[3]) / 'bin' / 'python'
        python.parent.mkdir()
        python.symlink_to(sys.executable)

    monkeypatch.setattr(module, 'install_reference', install)
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


@pytest.mark.parametrize('name', ['constraints.txt', 'requirements.txt', 'setup.py'])
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
    install = setup_env.install_reference

    def stopped(env, torch_version):
        (env.folder / 'half a package').touch()
        raise error

    monkeypatch.setattr(setup_env, 'install_reference', stopped)
    with pytest.raises(error):
        setup_env.set_up(venv, TORCH)
    assert not setup_env.is_ready(venv, setup_env.environment_key(TORCH))

    monkeypatch.setattr(setup_env, 'install_reference', install)
    setup_env.set_up(venv, TORCH)
    assert setup_env.installed == [TORCH]
    assert not (venv / 'half a package').exists()
    assert setup_env.is_ready(venv, setup_env.environment_key(TORCH))


def test_interrupted_update_does_not_count_as_done(setup_env, venv, monkeypatch):
    def stopped(env, torch_version):
        raise KeyboardInterrupt

    content = (setup_env.ROOT / 'requirements.txt').read_text()
    (setup_env.ROOT / 'requirements.txt').write_text(content + '\n# changed\n')
    monkeypatch.setattr(setup_env, 'install_reference', stopped)
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

        def make(setup_py):
            folder = tmp_path / 'links'
            folder.mkdir()
            with tarfile.open(folder / 'mmcv-9.9.tar.gz', 'w:gz') as archive:
                for name, text in {'setup.py': setup_py, 'PKG-INFO': 'Metadata-Version: 1.0\nName: mmcv\nVersion: 9.9\n'}.items():
                    info = tarfile.TarInfo(f'mmcv-9.9/{name}')
                    info.size = len(text)
                    archive.addfile(info, io.BytesIO(text.encode()))
            monkeypatch.setenv('PIP_NO_INDEX', '1')
            monkeypatch.setenv('PIP_FIND_LINKS', folder.as_uri())
            # pip.conf of this machine may name indexes and folders of its own.
            monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)

        return make

    def test_wheel_is_kept_and_its_build_is_told_what_matters(self, script, env, source, tmp_path, monkeypatch):
        source('import os, sys, setuptools\n'
               'print("OPS", os.environ["MMCV_WITH_OPS"], "JOBS", os.environ["MAX_JOBS"], "PREFIX", sys.prefix)\n'
               'setuptools.setup(name="mmcv", version="9.9", py_modules=[])\n')
        monkeypatch.setenv('MAX_JOBS', '5')
        folder = tmp_path / 'kept wheels' / 'torch'
        wheel = script.compile_mmcv(env, '9.9', TORCH, folder)
        assert wheel.parent == folder and wheel.name.startswith('mmcv-9.9') and wheel.is_file()
        # In this environment (no isolated one with another torch), with the ops, and as many jobs as asked for.
        assert f'OPS 1 JOBS 5 PREFIX {sys.prefix}' in (folder / 'mmcv-9.9.log').read_text()
        # Nothing else stays: the build's own folder is gone.
        assert {path.name for path in folder.iterdir()} == {'mmcv-9.9.log', wheel.name}

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
        code = (f'import subprocess, sys, time\nchild = subprocess.Popen(["sleep", "100"])\n'
                f'open({str(pids)!r}, "w").write(str(child.pid))\ntime.sleep(100)\n')

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
