# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""``python -m psaq_mm.commands.inspect CONFIG``: what would be quantized, at which bits, and what stays float, without
running.
"""

import argparse
from typing import Optional, Sequence

from psaq_mm.commands.common import add_config_arguments, add_quant_arguments, load_config, run_command

__all__ = ['main', 'inspect']


def inspect(config, quant: Optional[str] = None) -> str:
    """The table for a loaded config; ``quant`` (a preset) is needed where the config is full-precision."""
    from psaq_mm.engine.building import build_model
    from psaq_mm.engine.config import quantized_model_config
    from psaq_mm.models import report_of

    return report_of(build_model(config, quantized_model_config(config, quant))).to_table()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog='psaq-inspect', description=__doc__)
    add_config_arguments(parser)
    add_quant_arguments(parser)

    def command(args) -> None:
        print(inspect(load_config(args.config, args.cfg_options, args.quant, args.method)))

    return run_command(command, parser, argv)


if __name__ == '__main__':
    raise SystemExit(main())
