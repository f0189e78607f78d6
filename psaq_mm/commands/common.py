# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What every command line shares: reading a config, and turning a mistake into one sentence and an exit status."""

import argparse
import errno
import os
import sys
from pathlib import Path
from typing import Callable, Mapping, Optional, Sequence

from psaq_mm.commands.allocator import keep_freed_memory
from psaq_mm.commands.missing import missing_from
from psaq_mm.errors import ConfigError, PsaqError

__all__ = [
    'add_config_arguments',
    'add_quant_arguments',
    'add_run_arguments',
    'load_config',
    'merge_options',
    'run_command',
    'runnable_config',
]


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that all commands take: CONFIG and ``--cfg-options``."""
    from mmengine.config import DictAction

    parser.add_argument('config', help='an mmdet, mmseg or mmpretrain config file')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override settings of the config, e.g. model.quant.w_bits=4',
    )


def add_quant_arguments(parser: argparse.ArgumentParser) -> None:
    """``--quant`` and ``--method``: another precision, or another method, than the config's own."""
    from psaq_mm.engine.methods import METHODS

    parser.add_argument(
        '--quant',
        metavar='PRESET',
        help="such as w4a8: quantizes a full-precision config, or takes the place of the config's own; the scope stays",
    )
    parser.add_argument(
        '--method',
        metavar='NAME',
        help=f"a method in place of the config's own: {', '.join(METHODS)}, or one that the config registers",
    )


def load_config(
    path: str, options: Optional[Mapping] = None, quant: Optional[str] = None, method: Optional[str] = None
):
    """Read a config file, put another precision or method into it, and merge ``options`` last.

    Args:
        path: The file.
        options: As ``--cfg-options`` gives them; they win over everything.
        quant, method: See :func:`psaq_mm.engine.config.apply_method`.

    Raises:
        ConfigError: No such file, a base that does not exist, or an option that has no place.
    """
    from mmengine.config import Config

    from psaq_mm.engine.pure_python import with_named_types

    if not os.path.isfile(path):
        raise ConfigError(f'there is no config file {path}: check the path')
    try:
        config = with_named_types(Config.fromfile(path))
    except (OSError, KeyError, TypeError, AttributeError, SyntaxError, ImportError, RuntimeError) as error:
        raise ConfigError(f'the config {path} cannot be read: {_why_unreadable(error)}') from error
    if quant or method:
        from psaq_mm.engine.config import apply_method

        config = apply_method(config, quant, method)
    return merge_options(config, options)


def _why_unreadable(error: Exception) -> str:
    message = ' '.join(str(error).split())
    if 'lazy_import' in message:  # MMEngine's word for it
        return (
            'it and one of its bases are of two kinds, and a pure-Python config is inherited by a pure-Python one '
            'alone: write `with '
            "read_base(): from .BASE import *`, then model.update(type='psaq_mm.Quantized', base_type=model.type, "
            "quant='w8a8')"
        )
    return missing_from(error) or message


def merge_options(config, options: Optional[Mapping]):
    """Merge ``--cfg-options`` into a loaded config, in place; the config.

    Raises:
        ConfigError: An option has no place.
    """
    try:
        config.merge_from_dict(dict(options or {}))
    except (KeyError, TypeError, AttributeError, IndexError, AssertionError) as error:
        raise ConfigError(f'--cfg-options do not fit the config {config.filename}: {error}') from error
    return config


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of commands that start a runner: ``--work-dir``, ``--launcher`` and what launchers add."""
    parser.add_argument('--work-dir', help='where logs and results go; defaults to work_dirs/<name of the config>')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def runnable_config(args: argparse.Namespace):
    """The config of parsed arguments, with launcher and work dir set.

    The work dir is the command line's, else the config's, else ``work_dirs/<name of the config>``, as in the libraries'
    own tools.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    config = load_config(args.config, args.cfg_options, getattr(args, 'quant', None), getattr(args, 'method', None))
    from psaq_mm.quantization import use_full_float32

    use_full_float32()  # the full-precision model too: it is what a quantized one is compared with
    config.launcher = args.launcher
    if args.work_dir:
        config.work_dir = args.work_dir
    elif not config.get('work_dir'):
        config.work_dir = os.path.join('work_dirs', os.path.splitext(os.path.basename(args.config))[0])
    file = next(
        (p for p in (Path(config.work_dir), *Path(config.work_dir).parents) if p.exists() and not p.is_dir()), None
    )
    if file is not None:
        raise ConfigError(
            f'the work dir {config.work_dir} cannot be made, as {file} is a file: give another --work-dir'
        )
    if args.launcher != 'none':
        from psaq_mm.engine.ranks import join_ranks

        join_ranks(config)
    return config


def run_command(
    command: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, argv: Optional[Sequence[str]] = None
) -> int:
    """Parse, run, and report a user's mistake in one sentence.

    Returns:
        0; 1 for a mistake that is named; 130 when interrupted. What is not a known mistake keeps its traceback.
    """
    args = parser.parse_args(argv)
    keep_freed_memory()
    try:
        command(args)
        if getattr(args, 'launcher', 'none') != 'none':
            from psaq_mm.ranks import leave

            leave()
    except PsaqError as error:
        print(f'{parser.prog}: {error}', file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        elsewhere = next(
            (f' or give another --{name.replace("_", "-")}' for name in ('work_dir', 'out') if hasattr(args, name)), ''
        )
        print(
            f'{parser.prog}: {error.filename or "a file"} cannot be written ({error.strerror}): free some '
            f'space{elsewhere}; what was '
            'saved before is whole',
            file=sys.stderr,
        )
        return 1
    except (ImportError, RuntimeError, AssertionError, KeyError) as error:
        missing = missing_from(error)
        if missing is None:
            raise
        print(f'{parser.prog}: {missing}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = 'go on with --resume' if hasattr(args, 'resume') else 'the same command begins anew'
        print(f'{parser.prog}: interrupted; {again}', file=sys.stderr)
        return 130
    return 0
