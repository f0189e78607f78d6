"""Two processes that find each other through gloo, and tools in processes of their own."""

import datetime
import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def _rank(rank, file, name, folder, arguments):
    os.environ['GLOO_SOCKET_IFNAME'] = 'lo'
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo',
        init_method=f'file://{folder}/store',
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=120),
    )
    # By file: a test module has no name that another process could import it by.
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name)(*arguments)
    torch.save(found, Path(folder) / f'rank{rank}.pt')
    # All is said and written. Taking gloo's connections down waits for the other rank, now and then for ever where that
    # is gone already.
    os._exit(0)


def on_two_ranks(function, folder, *arguments):
    """Run a function of a test module on two ranks.

    Args:
        function: Of a module's top level: each process imports it anew.
        folder: Empty, for what they leave.
        *arguments: Of the function.

    Returns:
        What it returned on rank 0 and on rank 1.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    mp.spawn(_rank, (function.__code__.co_filename, function.__name__, str(folder), arguments), nprocs=WORLD)
    return [torch.load(Path(folder) / f'rank{rank}.pt', weights_only=False) for rank in range(WORLD)]


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


def tool(name, arguments, folder, **environment):
    """A command line of ``tools/`` in a process of its own, whose output goes to ``<folder>/output<RANK>.txt``.

    Args:
        name: Such as ``'dfq_train'``, or a list of arguments for Python.
        arguments: Of the tool.
        folder: Also on the path of modules, for what a config imports.
        **environment: Beside that of this process.
    """
    root = Path(__file__).parent.parent
    begin = [str(root / 'tools' / f'{name}.py')] if isinstance(name, str) else list(name)
    output = Path(folder) / f'output{environment.get("RANK", "")}.txt'
    path = os.pathsep.join([str(root), str(folder)])
    with open(output, 'wb') as file:
        return subprocess.Popen(
            [sys.executable, *begin, *map(str, arguments)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path, 'GLOO_SOCKET_IFNAME': 'lo', **environment},
        )


def ranks_of_tool(name, arguments, folder, **environment):
    """The processes of :func:`tool` on two ranks, without a launcher that watches over them."""
    shared = dict(WORLD_SIZE=str(WORLD), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
    return [
        tool(
            name,
            [*arguments, '--launcher', 'pytorch'],
            folder,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            **shared,
            **environment,
        )
        for rank in range(WORLD)
    ]


SPY = '''
"""Tells a test of a run: each step, a digest of all weights and ranges; and kills the run at a given moment."""
import hashlib
import logging
import os
import signal
import sys

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from psaq_mm.ranks import ranks

MOMENT = os.environ.get('SPY_KILL', '')


def reached(moment):
    if moment == MOMENT and os.environ.get('SPY_RANK', '0') == str(ranks()[0]):
        os.kill(os.getpid(), signal.SIGKILL)


def audit(event, args):
    name = MOMENT.partition(' ')[2]
    if event == 'open' and f'.{name}.' in str(args[0]) and str(args[0]).endswith('.partial') and '+' in str(args[1]):
        os.truncate(args[0], os.path.getsize(args[0]) // 2)  # what the disk holds in the midst of a write
        reached(f'writing {name}')


if MOMENT.startswith('writing'):
    sys.addaudithook(audit)


class Lines(logging.Handler):
    count = 0

    def emit(self, record):
        if record.getMessage().startswith('Samples ['):
            self.count += 1
            reached(f'samples {self.count}')


@HOOKS.register_module()
class Spy(Hook):
    priority = 'LOWEST'

    def before_train(self, runner):
        if MOMENT:
            runner.logger.addHandler(Lines())

    def after_train_iter(self, runner, **kwargs):
        digest = hashlib.sha256()
        for name, value in sorted(runner.train_loop.model.state_dict().items()):
            digest.update(value.numpy().tobytes())
        with open(os.path.join(os.path.dirname(__file__), f'digests{ranks()[0]}.txt'), 'a') as file:
            print(runner.iter, digest.hexdigest(), file=file)
        reached(f'step {runner.iter}')

    def after_val_iter(self, runner, **kwargs):
        reached('validation')
'''


def spied(config):
    """Add the spy to a config file; returns the file of digests of a rank."""
    (config.parent / 'spy.py').write_text(SPY)
    config.write_text(
        config.read_text() + "custom_imports = dict(imports=['spy'], allow_failed_imports=False)\n"
        "custom_hooks = [dict(type='Spy')]\n"
    )
    return lambda rank=0: config.parent / f'digests{rank}.txt'
