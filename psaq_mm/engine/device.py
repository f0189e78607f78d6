# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The device of a run: MMEngine's choice, or the one that a command line names."""

import contextlib
from typing import Iterator

import torch
from mmengine.device import utils
from mmengine.logging import print_log
from torch import nn

from psaq_mm.errors import ConfigError

__all__ = ['checked_device', 'leave_device_without_float64', 'on_device']


def leave_device_without_float64(model: nn.Module) -> None:
    """Move a model from Apple's MPS to the CPU, in place, with one line of log: MPS lacks float64, which ranges need.

    Args:
        model: On any device; others than MPS are left as they are.
    """
    device = next((p.device for p in model.parameters()), None)
    if device is not None and device.type == 'mps':
        print_log("Apple's MPS has no float64, which ranges and rounding need: the run goes on on the CPU", 'current')
        model.to('cpu')


@contextlib.contextmanager
def on_device(name: str) -> Iterator[torch.device]:
    """MMEngine's runners, and with them all of psaq_mm, use a device inside the block.

    MMEngine's own choice is fixed when it is imported; its ``get_device`` gives what is set here.

    Args:
        name: As PyTorch has it: ``'cpu'``, ``'cuda'``, ``'cuda:1'``.

    Raises:
        ConfigError: PyTorch knows no such device, or it is not there.

    Example:
        >>> with on_device('cuda:1'):
        ...     runner.train()
    """
    device = checked_device(name)
    chosen, utils.DEVICE = utils.DEVICE, device.type
    try:
        # The libraries say 'cuda', which is the current one.
        with torch.cuda.device(device) if device.type == 'cuda' else contextlib.nullcontext():
            yield device
    finally:
        utils.DEVICE = chosen


def checked_device(name: str) -> torch.device:
    """A device that is there.

    Raises:
        ConfigError: PyTorch knows no such device, or it is not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f'--device {name} is no name of a device: give cpu, cuda, or cuda:1 and so on') from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [f'cuda:{number}' for number in range(count)]
    if device.type == 'cuda':
        there = (device.index or 0) < count
    else:
        there = device.type in ('cpu', utils.DEVICE) and not device.index
    if not there:
        found = f'PyTorch {torch.__version__} finds {" and ".join(gpus) if gpus else "no GPU"} here'
        raise ConfigError(f'--device {name} is not there ({found}): give {" or ".join([*gpus, "cpu"])}')
    return device
