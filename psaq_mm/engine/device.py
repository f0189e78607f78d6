# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a run needs of the device that MMEngine chose."""

from mmengine.logging import print_log
from torch import nn

__all__ = ['leave_device_without_float64']


def leave_device_without_float64(model: nn.Module) -> None:
    """Move a model off Apple's MPS, to the CPU, in place, with one line of log: ranges are found in float64, which MPS
    does not have.
    """
    device = next((p.device for p in model.parameters()), None)
    if device is not None and device.type == 'mps':
        print_log("Apple's MPS has no float64, which ranges and rounding need: the run goes on on the CPU", 'current')
        model.to('cpu')
