"""When an environment counts as done, when it is filled up, and when it is made anew; how a compiled mmcv is kept, and
what is said where a package cannot be installed.

Nothing here installs packages but a source package of two lines: an environment is a bare folder, or has pip alone.
"""

import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
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
    make = subprocess.run

    def make_python(command, **kwargs):
        if list(command[1:3]) != ['-m', 'venv']:
            return make(command, **kwargs)
        python = Path(command[3]) / 'bin' / 'python'
        python.parent.mkdir()
        python.symlink_to(sys.executable)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(module, 'install', lambda env, torch, stack, pins: module.installed.append(torch))
    monkeypatch.setattr(module.subprocess, 'run', make_python)
    # The tests run on any Python; the check of the version has a test of its own.
    monkeypatch.setattr(module, 'PYTHON', '3.11')
    return module


def is_ready(setup_env, venv):
    return setup_env.read_stamp(venv) == setup_env.wanted(TORCH)


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
    assert is_ready(setup_env, venv)


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
    setup_env.set_up(venv, TORCH, stack='core')
    (venv / 'witness').touch()
    monkeypatch.setattr(setup_env, 'PYTHON', '3.12')
    setup_env.set_up(venv, TORCH, stack='core')
    assert not (venv / 'witness').exists()


def test_moved_checkout_starts_from_nothing(setup_env, venv, tmp_path):
    moved = tmp_path / 'elsewhere'
    shutil.copytree(setup_env.ROOT, moved, symlinks=True)
    stamp = json.loads((moved / '.venv' / setup_env.STAMP).read_text())
    assert setup_env.wanted(TORCH) == stamp
    assert setup_env.wanted(TORCH, root=moved)['root'] != stamp['root']


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_interrupted_set_up_does_not_count_as_done(setup_env, monkeypatch, error):
    venv = setup_env.ROOT / '.venv'
    install = setup_env.install

    def stopped(env, torch, stack, pins):
        (env.folder / 'half a package').touch()
        raise error

    monkeypatch.setattr(setup_env, 'install', stopped)
    with pytest.raises(error):
        setup_env.set_up(venv, TORCH)
    assert not is_ready(setup_env, venv)

    monkeypatch.setattr(setup_env, 'install', install)
    setup_env.set_up(venv, TORCH)
    assert setup_env.installed == [TORCH]
    assert not (venv / 'half a package').exists()
    assert is_ready(setup_env, venv)


def test_interrupted_update_does_not_count_as_done(setup_env, venv, monkeypatch):
    def stopped(env, torch, stack, pins):
        raise KeyboardInterrupt

    content = (setup_env.ROOT / 'requirements.txt').read_text()
    (setup_env.ROOT / 'requirements.txt').write_text(content + '\n# changed\n')
    monkeypatch.setattr(setup_env, 'install', stopped)
    with pytest.raises(KeyboardInterrupt):
        setup_env.set_up(venv, TORCH)
    (setup_env.ROOT / 'requirements.txt').write_text(content)
    assert not is_ready(setup_env, venv)


@pytest.mark.parametrize('content', ['', '{', '[]', '{"key": 1}'])
def test_environment_with_a_damaged_stamp_is_made_anew(setup_env, venv, content):
    (venv / setup_env.STAMP).write_text(content)
    setup_env.set_up(venv, TORCH)
    assert setup_env.installed == [TORCH]
    assert not (venv / 'witness').exists()


@pytest.mark.parametrize('changed', [False, True])
def test_environment_whose_python_is_gone_is_made_anew(setup_env, venv, changed):
    (venv / 'bin' / 'python').unlink()
    (venv / 'bin' / 'python').symlink_to(venv / 'removed')
    if changed:
        (setup_env.ROOT / 'requirements.txt').write_text('# changed\n')
    setup_env.set_up(venv, TORCH)
    assert setup_env.installed == [TORCH]
    assert not (venv / 'witness').exists() and (venv / 'bin' / 'python').exists()


def test_environment_made_by_hand_is_not_wiped(setup_env, monkeypatch):
    venv = setup_env.ROOT / '.venv'
    (venv / 'bin').mkdir(parents=True)
    (venv / 'witness').touch()
    with pytest.raises(setup_env.SetupError, match='was not made by make and has no working Python'):
        setup_env.set_up(venv, TORCH)
    assert (venv / 'witness').exists()
    # One with a Python that serves is filled up.
    monkeypatch.setattr(setup_env.Environment, 'versions', lambda self, *names: {})
    monkeypatch.setattr(setup_env.Environment, 'works', lambda self, code: True)
    setup_env.set_up(venv, TORCH)
    assert setup_env.installed == [TORCH]
    assert (venv / 'witness').exists()


def test_environment_made_by_hand_with_the_other_family_is_refused(setup_env, monkeypatch):
    venv = setup_env.ROOT / '.venv'
    (venv / 'bin').mkdir(parents=True)
    held = {'torch': '2.13.0', 'mmcv': '2.1.0'}
    monkeypatch.setattr(
        setup_env.Environment, 'versions', lambda self, *names: {name: held[name] for name in names if name in held}
    )
    monkeypatch.setattr(setup_env.Environment, 'works', lambda self, code: True)
    with pytest.raises(
        setup_env.SetupError, match='holds mmcv, which the packages asked for would overwrite: remove it, or'
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
        match=r'STACK=onedl needs numpy 2 and so torch 2\.3 or later, not TORCH=2\.1\.2: leave',
    ):
        setup_env.set_up(setup_env.ROOT / '.venv', TORCH, stack='onedl')


@pytest.mark.parametrize(
    'stack,torch,constraints',
    [
        ('openmmlab', '2.1.2', 'constraints.txt'),
        ('openmmlab', '2.2.2', 'constraints.txt'),
        ('openmmlab', '2.3.0', 'constraints-numpy2.txt'),
        ('openmmlab', '2.13.0', 'constraints-numpy2.txt'),
        ('onedl', '2.13.0', 'constraints-numpy2.txt'),
    ],
)
def test_pins_of_a_stack(setup_env, monkeypatch, stack, torch, constraints):
    seen = {}
    monkeypatch.setattr(setup_env, 'install', lambda env, torch, stack, pins: seen.update(env=env, pins=pins))
    setup_env.set_up(setup_env.ROOT / '.venv', torch, stack)
    assert seen['env'].constraints == ['-c', constraints]
    assert {'torch', 'numpy', 'timm', 'pytest', *setup_env.PACKAGES[stack]} <= set(seen['pins'])
    assert not set(seen['pins']) & set(setup_env.PACKAGES[setup_env.OTHERS[stack]]), 'a family is pinned alone'
    assert int(seen['pins']['numpy'].split('.')[0]) == (1 if constraints == 'constraints.txt' else 2)


class TestTorchvision:
    """What becomes of a torchvision that was installed beside a torch it was not built for."""

    class Env:
        def __init__(self, vision, cpu_only):
            self.answers, self.done, self.output = {'torchvision': vision, 'torch': cpu_only}, [], ''

        def works(self, code):
            self.output = 'Traceback\nRuntimeError: operator torchvision::nms does not exist\n'
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
    monkeypatch.setattr(setup_env, 'PYTHON', '3.13')
    with pytest.raises(setup_env.SetupError, match=r'needs Python 3\.11, and this is 3\.13: name one with PYTHON='):
        setup_env.set_up(setup_env.ROOT / '.venv', TORCH)


class TestCompiled:
    """`install_mmcv` in an environment of its own, on a source package that only says how it was built."""

    @pytest.fixture(scope='class')
    def folder(self, tmp_path_factory):
        """An environment that has pip, and setuptools of this one: nothing is fetched."""
        folder = tmp_path_factory.mktemp('environment') / 'a venv'
        subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder], check=True)
        (site,) = folder.glob('lib/python*/site-packages')
        (site / 'tools.pth').write_text(str(Path(pytest.__file__).parents[1]))
        return folder

    @pytest.fixture
    def script(self, monkeypatch, tmp_path):
        script = load(ROOT / '.dev' / 'setup_env.py')
        monkeypatch.setattr(script, 'OPS_CHECK', 'import mmcv_ops')
        monkeypatch.setattr(script, 'sees_gpu', lambda env: False)
        monkeypatch.setenv('PSAQ_MM_WHEELS', str(tmp_path / 'kept wheels'))
        monkeypatch.delenv('MMCV_FIND_LINKS', raising=False)
        monkeypatch.setenv('PIP_NO_INDEX', '1')
        # pip.conf of this machine may name indexes and folders of its own.
        monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
        return script

    @pytest.fixture
    def env(self, script, folder):
        yield script.Environment(folder)
        for path in folder.glob('lib/python*/site-packages/*mmcv*'):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    @pytest.fixture
    def source(self, tmp_path, monkeypatch):
        """Puts an `mmcv` source package with this setup.py where pip looks, and nothing else."""

        def make(setup_py, name='mmcv'):
            folder = tmp_path / 'some links'
            folder.mkdir(exist_ok=True)
            # As today's source packages are named: their blanks and dashes are underscores.
            stem = f'{name.replace("-", "_")}-9.9'
            files = {
                'setup.py': setup_py,
                'mmcv_ops.py': '',
                'PKG-INFO': f'Metadata-Version: 1.0\nName: {name}\nVersion: 9.9\n',
            }
            with tarfile.open(folder / f'{stem}.tar.gz', 'w:gz') as archive:
                for file, text in files.items():
                    info = tarfile.TarInfo(f'{stem}/{file}')
                    info.size = len(text)
                    archive.addfile(info, io.BytesIO(text.encode()))
            # An address: pip divides this variable at blanks.
            monkeypatch.setenv('PIP_FIND_LINKS', folder.as_uri())
            return folder / f'{stem}.tar.gz'

        return make

    def test_is_kept_and_its_build_is_told_what_matters(self, script, env, source, tmp_path, monkeypatch, capfd):
        log = tmp_path / 'log'
        archive = source(
            'import os, sys, setuptools\n'
            f'print(os.environ["MMCV_WITH_OPS"], os.environ["MAX_JOBS"], sys.prefix, file=open({str(log)!r}, "a"))\n'
            'setuptools.setup(name="mmcv", version="9.9", py_modules=["mmcv_ops"])\n'
        )
        monkeypatch.setenv('MAX_JOBS', '5')
        script.install_mmcv(env, TORCH, 'mmcv', '9.9')
        # In this environment (no isolated one with another torch), with the ops, and as many jobs as asked for.
        assert set(log.read_text().splitlines()) == {f'1 5 {env.folder}'}
        said = capfd.readouterr().out
        assert 'no prebuilt wheel was found' in said and str(tmp_path / 'kept wheels') in said

        # Another environment of the same torch takes what was compiled.
        log.unlink()
        env.pip('uninstall', '-y', 'mmcv')
        script.install_mmcv(env, TORCH, 'mmcv', '9.9')
        assert env.works('import mmcv_ops') and not log.exists()
        # One that works is left alone, without any source of it.
        archive.unlink()
        script.install_mmcv(env, TORCH, 'mmcv', '9.9')

    def test_prebuilt_wheel_in_the_folder_is_taken(self, script, env, source, tmp_path, capfd):
        archive = source(
            'import setuptools; setuptools.setup(name="onedl-mmcv", version="9.9", py_modules=["mmcv_ops"])\n'
        )
        archive = archive.rename(archive.with_name('onedl_mmcv-9.9.tar.gz'))
        env.pip('wheel', '--no-build-isolation', '--no-deps', '-w', script.wheel_folder(env, TORCH), archive)
        archive.unlink()
        script.install_mmcv(env, TORCH, 'onedl-mmcv', '9.9')
        assert env.versions('onedl-mmcv') == {'onedl-mmcv': '9.9'}
        assert 'compiled' not in capfd.readouterr().out

    def test_prebuilt_wheel_that_does_not_work_is_compiled_instead(
        self, script, env, source, tmp_path, capfd, monkeypatch
    ):
        archive = source('import setuptools; setuptools.setup(name="mmcv", version="9.9", py_modules=[])\n')
        monkeypatch.setenv('MMCV_FIND_LINKS', str(tmp_path / 'prebuilt'))
        env.pip('wheel', '--no-build-isolation', '--no-deps', '--no-cache-dir', '-w', tmp_path / 'prebuilt', archive)
        source('import setuptools; setuptools.setup(name="mmcv", version="9.9", py_modules=["mmcv_ops"])\n')
        script.install_mmcv(env, TORCH, 'mmcv', '9.9')
        assert env.works('import mmcv_ops')
        assert "the ops of the prebuilt wheel do not run (ModuleNotFoundError: No module named 'mmcv_ops')" in (
            capfd.readouterr().out
        )

    def test_failure_is_shown_and_what_the_machine_lacks(self, script, env, source, capfd, monkeypatch):
        source('raise SystemExit("the compiler is on strike")\n')
        with pytest.raises(script.SetupError, match='pip install .*: failed with the messages above'):
            script.install_mmcv(env, TORCH, 'mmcv', '9.9')
        assert 'the compiler is on strike' in capfd.readouterr().err

        monkeypatch.setenv('CXX', 'no-such-compiler')
        assert script.why_no_build(env).startswith('there is no C++ compiler "no-such-compiler": install one')
        monkeypatch.setenv('CXX', sys.executable)
        monkeypatch.setattr(script.sysconfig, 'get_paths', lambda: {'include': '/no/headers'})
        assert script.why_no_build(env).startswith('/no/headers/Python.h is missing: install the Python headers')

    def test_full_disk_is_named(self, script, env, monkeypatch):
        monkeypatch.setattr(script.shutil, 'disk_usage', lambda folder: shutil._ntuple_diskusage(9 << 30, 0, 7 << 20))
        with pytest.raises(script.SetupError, match='no-such-package: failed .* the disk has 7 MB left: make room'):
            env.pip('install', 'no-such-package', silent=True)

    def test_missing_network_has_a_way_out(self, script, env):
        with pytest.raises(
            script.SetupError, match='no-such-package: failed .* in PIP_FIND_LINKS and set PIP_NO_INDEX'
        ):
            env.pip('install', 'no-such-package', silent=True)

    def test_stopped_build_leaves_no_process(self, script, env, source, tmp_path):
        """The build's own children too: a compiler left behind would keep a core busy for minutes."""
        pids = tmp_path / 'pids'
        source(
            'import subprocess, time\nchild = subprocess.Popen(["sleep", "100"])\n'
            f'open({str(pids)!r}, "w").write(str(child.pid))\ntime.sleep(100)\n'
        )

        def stop_once_running():
            for _ in range(4000):
                if pids.exists() and pids.read_text():
                    return signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
                time.sleep(0.05)

        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            threading.Thread(target=stop_once_running).start()
            with pytest.raises(KeyboardInterrupt):
                script.install_mmcv(env, TORCH, 'mmcv', '9.9')
        finally:
            signal.signal(signal.SIGTERM, before)
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
    monkeypatch.setattr(script, 'sees_gpu', lambda env: False)
    monkeypatch.delenv('PSAQ_MM_WHEELS', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    tag = 'cp{}{}'.format(*sys.version_info[:2])
    assert script.wheel_folder(None, '2.1.2') == tmp_path / 'psaq_mm' / 'wheels' / f'torch-2.1.2-{tag}'
    assert script.wheel_folder(None, '2.3.1') == tmp_path / 'psaq_mm' / 'wheels' / f'torch-2.3.1-{tag}'
    monkeypatch.setenv('PSAQ_MM_WHEELS', str(tmp_path / 'mine'))
    assert script.wheel_folder(None, '2.1.2').parent == tmp_path / 'mine'
