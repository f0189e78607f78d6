# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Shared parts of all command lines: arguments, reading a config, and reporting a mistake in one sentence."""

import argparse
import contextlib
import errno
import os
import sys
from pathlib import Path
from typing import Callable, ContextManager, Mapping, Optional, Sequence

from psaq_mm.commands.allocator import keep_freed_memory
from psaq_mm.commands.listing import METHOD_NAMES
from psaq_mm.commands.missing import require_libraries
from psaq_mm.commands.parsing import ConfigOptions
from psaq_mm.errors import ConfigError, PsaqError

__all__ = [
    'add_config_arguments',
    'add_config_options',
    'add_device_argument',
    'add_quant_arguments',
    'add_run_arguments',
    'load_config',
    'merge_options',
    'run_command',
    'runnable_config',
]


def add_config_arguments(parser: argparse.ArgumentParser, what: str = 'a config file of mmdet, mmseg or mmpretrain'):
    """Add the arguments of all commands: CONFIG and ``--cfg-options``.

    Args:
        parser: Of the command.
        what: Help of CONFIG.

    Returns:
        The group of the arguments, for what belongs beside them.
    """
    group = parser.add_argument_group('model')
    group.add_argument('config', metavar='CONFIG', help=what)
    add_config_options(group)
    return group


def add_config_options(group) -> None:
    """Add ``--cfg-options`` to a group of arguments."""
    group.add_argument(
        '--cfg-options',
        action=ConfigOptions,
        metavar='KEY=VALUE',
        help='override settings of the config, such as model.quant.w_bits=4',
    )


def add_quant_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--quant`` and ``--method``, which replace the config's precision and method.

    Args:
        parser: Of the command.
    """
    group = parser.add_argument_group('quantization')
    group.add_argument(
        '--quant',
        metavar='PRESET',
        help='bits of weights and activations, such as w8a8 or w4a8 (default: of the config)',
    )
    group.add_argument(
        '--method',
        metavar='NAME',
        help=f'one of {", ".join(METHOD_NAMES)}, or one that the config registers (default: of the config)',
    )


def add_device_argument(group) -> None:
    """Add ``--device`` to a group of arguments."""
    group.add_argument(
        '--device',
        metavar='NAME',
        help='cpu, cuda, or cuda:1 for the second GPU (default: the first GPU where there is one, else the CPU)',
    )


def load_config(
    path: str, options: Optional[Mapping] = None, quant: Optional[str] = None, method: Optional[str] = None
):
    """Read a config file, set its precision or method, and merge ``options`` last.

    Args:
        path: The file.
        options: Of ``--cfg-options``; they take precedence over all else.
        quant: Precision in place of the config's, see :func:`psaq_mm.engine.config.apply_method`.
        method: Method in place of the config's.

    Raises:
        ConfigError: The file or a base of it does not exist or cannot be read, or an option does not fit.
    """
    from psaq_mm.engine.reading import read_config

    config = read_config(path)
    if quant or method:
        from psaq_mm.engine.config import apply_method

        config = apply_method(config, quant, method)
    return merge_options(config, options)


def merge_options(config, options: Optional[Mapping]):
    """Merge ``--cfg-options`` into a loaded config, in place.

    Args:
        config: As MMEngine loads it.
        options: By dotted key.

    Returns:
        The config.

    Raises:
        ConfigError: An option does not fit the config.
    """
    try:
        config.merge_from_dict(dict(options or {}))
    except (KeyError, TypeError, AttributeError, IndexError, AssertionError) as error:
        raise ConfigError(f'--cfg-options do not fit the config {config.filename}: {error}') from error
    return config


def add_run_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of commands that start a runner: ``--work-dir``, ``--device``, ``--launcher``, and what
    launchers add.

    Args:
        parser: Of the command.

    Returns:
        The group of the arguments.
    """
    group = parser.add_argument_group('run')
    group.add_argument(
        '--work-dir',
        metavar='FOLDER',
        help='where logs and results go (default: work_dir of the config, else work_dirs/ and the name of the config)',
    )
    add_device_argument(group)
    group.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes of a run on several GPUs (default: none)',
    )
    group.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return group


def runnable_config(args: argparse.Namespace):
    """The config that parsed arguments name, with launcher and work dir set.

    The work dir is the command line's, else the config's, else ``work_dirs/<name of the config>``, as in the libraries'
    own tools.

    Args:
        args: Of a parser with :func:`add_config_arguments` and :func:`add_run_arguments`.

    Raises:
        ConfigError: The config cannot be read, or a folder cannot be made.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    config = load_config(args.config, args.cfg_options, getattr(args, 'quant', None), getattr(args, 'method', None))
    from psaq_mm.quantization import use_full_float32

    use_full_float32()  # for the full-precision model too, which quantized ones are compared with
    config.launcher = args.launcher
    if args.work_dir:
        config.work_dir = args.work_dir
    elif not config.get('work_dir'):
        config.work_dir = os.path.join('work_dirs', os.path.splitext(os.path.basename(args.config))[0])
    work_dir = Path(config.work_dir)
    file = next((p for p in (work_dir, *work_dir.parents) if p.exists() and not p.is_dir()), None)
    if file is not None:
        raise ConfigError(
            f'the work dir {config.work_dir} cannot be made, as {file} is a file: give another --work-dir'
        )
    if args.launcher != 'none':
        from psaq_mm.engine.ranks import join_ranks

        join_ranks(config)
    return config


_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
"""Errors that mean: this file or folder cannot be written."""


def _sentence(error: BaseException, args: argparse.Namespace) -> Optional[str]:
    """What is wrong and the way out, with the options that the command has; None for an error of another kind."""
    resume = 'go on with --resume' if hasattr(args, 'resume') else ''
    if isinstance(error, KeyboardInterrupt):
        return f'interrupted; {resume or "the same command begins anew"}'
    if isinstance(error, PsaqError):
        lost_rank = getattr(args, 'launcher', 'none') != 'none' and type(error).__name__ == 'RankError'
        return f'{error}; {resume}' if lost_rank and resume else str(error)
    if isinstance(error, OSError) and error.errno in _NOT_WRITTEN:
        other = next((f' or give another --{n.replace("_", "-")}' for n in ('work_dir', 'out') if hasattr(args, n)), '')
        return (
            f'{error.filename or "a file"} cannot be written ({error.strerror}): free some space{other}; what was '
            'saved before is whole'
        )
    if not isinstance(error, (ImportError, RuntimeError, AssertionError, KeyError)):
        return None
    from psaq_mm.engine.missing import missing_from

    return missing_from(error)


def _device_of(args: argparse.Namespace) -> ContextManager:
    """The block runs on the device that the command line names."""
    name = getattr(args, 'device', None)
    if name is None:
        return contextlib.nullcontext()
    if getattr(args, 'launcher', 'none') != 'none':
        raise ConfigError(
            f'--device {name} and --launcher {args.launcher} contradict each other: each process of a launcher has a '
            'device of its own, so leave --device out'
        )
    from psaq_mm.engine.device import on_device

    return on_device(name)


def run_command(
    command: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, argv: Optional[Sequence[str]] = None
) -> int:
    """Parse the arguments, run ``command`` with them, and report a user's mistake in one sentence.

    Args:
        command: Takes the parsed arguments.
        parser: Its ``prog`` stands before the sentence.
        argv: Arguments; None: those of the process.

    Returns:
        0; 1 for a known mistake; 130 when interrupted. Any other error is raised, with its traceback.
    """
    args = parser.parse_args(argv)
    require_libraries(parser.prog)
    keep_freed_memory()
    try:
        with _device_of(args):
            command(args)
        if getattr(args, 'launcher', 'none') != 'none':
            from psaq_mm.ranks import leave

            leave()
    except (Exception, KeyboardInterrupt) as error:
        sentence = _sentence(error, args)
        if sentence is None:
            raise
        print(f'{parser.prog}: {sentence}', file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0
