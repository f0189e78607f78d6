# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Checks of the device that MMEngine chose."""

from mmengine.logging import print_log
from torch import nn

__all__ = ['leave_device_without_float64']


def leave_device_without_float64(model: nn.Module) -> None:
    """Move a model from Apple's MPS to the CPU, in place, with one line of log: MPS lacks float64, which ranges need.

    Args:
        model: On any device; others than MPS are left as they are.
    """
    device = next((p.device for p in model.parameters()), None)
    if device is not None and device.type == 'mps':
        print_log("Apple's MPS has no float64, which ranges and rounding need: the run goes on on the CPU", 'current')
        model.to('cpu')
