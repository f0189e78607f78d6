# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Observers of the same quantizers on several ranks become one."""

from typing import Optional, Sequence

import torch

from psaq_mm.ranks import maximum_, ranks


def reduce_observers(observers: Sequence[Optional[object]]) -> None:
    """Make every observer know what its namesakes on the other ranks saw, as if one had seen all.

    Args:
        observers: In one order on all ranks; None, and those that never can be reduced (``reduce`` is missing), are passed over.
    """
    if ranks()[1] == 1:
        return
    observers = [o for o in observers if hasattr(o, 'reduce')]
    # A rank may have seen nothing, such as a mask head without a box: it then learns from the others how many channels there are.
    sizes = maximum_(torch.tensor([o.channels for o in observers], dtype=torch.int64))
    for observer, channels in zip(observers, sizes.tolist()):
        if channels >= 0:
            observer.reduce(channels)
