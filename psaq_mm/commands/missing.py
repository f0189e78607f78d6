# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What commands need before they import anything else."""

import importlib.util

__all__ = ['require_libraries']


def require_libraries(prog: str) -> None:
    """End the process with one sentence where PyTorch or MMEngine is not installed, before a command imports them.

    Args:
        prog: Name of the command, for the sentence.

    Raises:
        SystemExit: One is not.
    """
    titles = dict(torch='PyTorch', mmengine='MMEngine')
    absent = [title for module, title in titles.items() if importlib.util.find_spec(module) is None]
    if absent:
        raise SystemExit(
            f'{prog}: {" and ".join(absent)} {"are" if len(absent) > 1 else "is"} not installed: pip install '
            "'psaq_mm[mmdet]', or [mmseg] or [mmpretrain]; an exported model runs without, with psaq-predict"
        )
