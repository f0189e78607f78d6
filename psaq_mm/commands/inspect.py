# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""``psaq inspect CONFIG``: what would be quantized, at which bits, and what stays float, without
running.

Behind the table of layers stands what the model computes in floating point all the same, and what works with
this backbone beyond quantization.
"""

import argparse
import re
from typing import Dict, List, Optional, Sequence, Tuple

from psaq_mm.commands.common import add_config_arguments, add_quant_arguments, load_config, run_command
from psaq_mm.commands.parsing import make_parser

__all__ = ['build_parser', 'main', 'inspect']

_TITLES = dict(
    folding='RepQ folding', rotation='rotation', similarity='patch similarity', dynamic='export with a dynamic size'
)
_LEAST_SIDE = 64
"""Of the noise, in pixels, where a model takes any size."""


def inspect(config, quant: Optional[str] = None) -> str:
    """The text for a loaded config; ``quant`` (a preset) is needed where the config is full-precision."""
    from psaq_mm.engine.building import build_model
    from psaq_mm.engine.config import quantized_model_config
    from psaq_mm.models import report_of
    from psaq_mm.models.capabilities import capabilities

    model = build_model(config, quantized_model_config(config, quant))
    model.eval()
    works = [f'{_TITLES[name]}: {one.text}' for name, one in capabilities(model).items()]
    return '\n'.join([report_of(model).to_table(), '', *_float_operations(model, _sizes(model, config)), '', *works])


def _sizes(model, config) -> List[Tuple[int, int]]:
    """Sizes of noise to try, the least first."""
    from psaq_mm.engine.config import sample_size
    from psaq_mm.errors import ConfigError
    from psaq_mm.models import TaskModel

    view = TaskModel(model, ())
    if view.fixed_size:
        return [view.fixed_size]
    side = -(-_LEAST_SIDE // view.min_size) * view.min_size
    try:
        return [(side, side), sample_size(config)]
    except ConfigError:  # of a size that the config does not give
        return [(side, side)]


def _float_operations(model, sizes: Sequence[Tuple[int, int]]) -> List[str]:
    """Lines on what runs in floating point inside the scope. What cannot be run is said as well."""
    from psaq_mm.models.uncovered import uncovered

    for size in sizes:
        try:
            rows = uncovered(model, size)
        except Exception as error:  # of any model code: this command must not fail at it
            failure = f'a pass on noise of {size[0]} x {size[1]} failed, so products in floating point are not known: '
            failure += f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'
            continue
        if not rows:
            return ['on noise: every product of two activations inside the scope is one of the rows above']
        groups: Dict[Tuple[str, str, str], List[str]] = {}
        for row in rows:
            groups.setdefault((re.sub(r'\d+', '*', row.module), row.kind, row.operation), []).append(row.module)
        lines = [
            f'  {operation}: {names[0]}{f" and {len(names) - 1} more" if len(names) > 1 else ""} ({kind})'
            for (_, kind, operation), names in groups.items()
        ]
        return ['on noise: in floating point inside the scope, in no row above', *lines]
    return [failure]


def build_parser(prog: str = 'psaq-inspect') -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = make_parser(
        prog,
        'CONFIG [--quant PRESET] [options]',
        'Show what would be quantized, at which bits, and what stays in floating point. The model is built with random '
        'weights: no checkpoint and no data set is read.',
        ['mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py --quant w4a8', 'configs/quantized.py'],
    )
    add_config_arguments(parser)
    add_quant_arguments(parser)
    return parser


def main(argv: Optional[Sequence[str]] = None, prog: str = 'psaq-inspect') -> int:
    """Command line; returns the exit status."""

    def command(args) -> None:
        print(inspect(load_config(args.config, args.cfg_options, args.quant, args.method)))

    return run_command(command, build_parser(prog), argv)


if __name__ == '__main__':
    raise SystemExit(main())
