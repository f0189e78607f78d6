# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Parsers of command lines: how help texts are laid out, ``--version``, and options whose parsing needs MMEngine.

Nothing here imports PyTorch or MMEngine before an option needs it, so that ``--help`` answers at once.
"""

import argparse
import itertools
import platform
import textwrap
from importlib import metadata
from typing import Any, Dict, List, Sequence, Tuple

import psaq_mm

__all__ = ['ConfigOptions', 'make_parser', 'version_text']


_PACKAGES: Dict[str, Tuple[str, ...]] = dict(
    torch=('torch',),
    mmengine=('mmengine', 'mmengine-lite', 'onedl-mmengine'),
    mmcv=('mmcv', 'mmcv-lite', 'onedl-mmcv'),
    mmdet=('mmdet', 'onedl-mmdetection'),
    mmseg=('mmsegmentation', 'onedl-mmsegmentation'),
    mmpretrain=('mmpretrain', 'onedl-mmpretrain'),
    timm=('timm',),
    transformers=('transformers',),
    numpy=('numpy',),
    onnx=('onnx',),
    onnxruntime=('onnxruntime', 'onnxruntime-gpu', 'onnxruntime-openvino'),
    openvino=('openvino',),
)
"""Packages of ``--version``, and the distributions that bring each; the maintained forks have names of their own."""


def _version_of(distributions: Sequence[str]) -> str:
    for name in distributions:
        try:
            return metadata.version(name) + (f' ({name})' if name != distributions[0] else '')
        except metadata.PackageNotFoundError:
            continue
    return 'not installed'


def version_text() -> str:
    """Versions of psaq_mm and of what it runs on, one a line. Nothing is imported: the packages' metadata say it."""
    rows = {'psaq_mm': psaq_mm.__version__, 'Python': f'{platform.python_version()}, {platform.platform()}'}
    rows.update({name: _version_of(distributions) for name, distributions in _PACKAGES.items()})
    width = max(map(len, rows)) + 2
    return '\n'.join(f'{name:<{width}}{version}' for name, version in rows.items())


class _Version(argparse.Action):
    """``--version``: looks the versions up when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        """Print them and exit."""
        print(version_text())
        parser.exit()


class ConfigOptions(argparse.Action):
    """``--cfg-options``: MMEngine's ``DictAction``, which is imported when the option is there."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, dest, nargs='+', **kwargs)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        """Parse the values as MMEngine does."""
        from psaq_mm.commands.missing import require_libraries

        require_libraries(parser.prog)
        from mmengine.config import DictAction

        DictAction(self.option_strings, self.dest, nargs='+')(parser, namespace, values, option_string)


class _Layout(argparse.HelpFormatter):
    """Paragraphs are filled; lines that begin with a space, such as those of examples, stay as they are."""

    def _split_lines(self, text: str, width: int) -> List[str]:
        return textwrap.wrap(' '.join(text.split()), width, break_on_hyphens=False) or ['']

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        blocks: List[str] = []
        for kind, lines in itertools.groupby(text.splitlines(), lambda line: 'as it is' if line[:1] in ' ' else 'fill'):
            block = list(lines)
            blocks += block if kind == 'as it is' else self._split_lines(' '.join(block), width)
        return '\n'.join(indent + block for block in blocks)


def make_parser(
    prog: str, usage: str, description: str, examples: Sequence[str] = (), notes: str = ''
) -> argparse.ArgumentParser:
    """A parser with ``--help`` and ``--version``.

    Args:
        prog: How the command was called: ``psaq-test``, or ``psaq test``.
        usage: What follows it in the first line of the help.
        description: One paragraph or more, without markup.
        examples: Command lines without ``prog``; of a long one each line after the first is indented further.
        notes: A paragraph at the end.
    """
    lines = ['examples:', *(f'  {prog} {example}' for example in examples)] if examples else []
    epilog = '\n'.join([*lines, *(['', notes] if notes else [])])
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f'%(prog)s {usage}',
        description=description,
        epilog=epilog.replace('%', '%%') or None,
        formatter_class=_Layout,
        add_help=False,
    )
    general = parser.add_argument_group('help')
    general.add_argument('-h', '--help', action='help', help='show this text and exit')
    general.add_argument(
        '--version', action=_Version, help='show the versions of psaq_mm and of what it runs on, and exit'
    )
    return parser
