# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The list of all commands. ``psaq --help``, the entry points of ``setup.py`` and ``docs/reference/commands.md`` follow
from it. It imports the standard library alone: ``setup.py`` reads it where nothing else is installed.
"""

from typing import List, NamedTuple, Tuple

__all__ = ['COMMANDS', 'DISPATCHER', 'METHOD_NAMES', 'RUNTIME_NAMES', 'SOURCE_NAMES', 'Command', 'entry_points']


class Command(NamedTuple):
    """One command.

    Attributes:
        name: After ``psaq``.
        script: Name of the single command, which does the same.
        module: Of :mod:`psaq_mm.commands`; its ``main(argv, prog)`` runs the command, its ``build_parser(prog)`` gives
            the parser.
        summary: One line.
        aliases: Other names after ``psaq``.
    """

    name: str
    script: str
    module: str
    summary: str
    aliases: Tuple[str, ...] = ()


COMMANDS = (
    Command(
        'quantize',
        'psaq-dfq-train',
        'dfq_train',
        'quantize a model without data; writes student.pth',
        ('train', 'dfq-train'),
    ),
    Command('test', 'psaq-test', 'test', 'evaluate a student or an exported model on a test set'),
    Command('export', 'psaq-export', 'export', 'write a student as ONNX files with integer weights'),
    Command('predict', 'psaq-predict', 'predict', 'draw predictions onto pictures and folders of pictures'),
    Command('inspect', 'psaq-inspect', 'inspect', 'show which layers would be quantized, and run nothing'),
    Command('sensitivity', 'psaq-sensitivity', 'sensitivity', 'rank the layers by the error of quantizing them'),
    Command('compare', 'psaq-compare', 'compare', 'compare methods and sources of samples on a test set'),
    Command(
        'convert-checkpoint',
        'psaq-convert-checkpoint',
        'convert_checkpoint',
        'convert a Swin checkpoint of another release',
    ),
)

DISPATCHER = 'psaq', 'psaq_mm.commands.main:main'

METHOD_NAMES = ('psaq_v1', 'psaq_v2', 'repq', 'repq_v2', 'fast', 'best', 'gaussian', 'calibrate')
"""Of :data:`psaq_mm.engine.methods.METHODS`: a help text must not wait for PyTorch. A test compares these three."""

SOURCE_NAMES = ('gaussian', 'pink', 'dead_leaves', 'mixture', 'generated', 'scenes', 'real')
"""Of :func:`psaq_mm.pictures.source_names`."""

RUNTIME_NAMES = ('onnxruntime', 'openvino')
"""Of :data:`psaq_mm.runtime.RUNTIMES`."""


def entry_points() -> List[str]:
    """The lines of ``console_scripts``."""
    single = [f'{command.script} = psaq_mm.commands.{command.module}:main' for command in COMMANDS]
    return [' = '.join(DISPATCHER), *single]
