# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Starts several ranks on a machine without a GPU. MMEngine's own set-up needs GPUs."""

import datetime
import os

import torch
import torch.distributed as dist
from mmengine.config import Config

from psaq_mm.errors import ConfigError

__all__ = ['join_ranks']

TIMEOUT = 1800
"""Seconds that a rank waits for another by default, as in PyTorch for gloo; ``env_cfg.dist_cfg.timeout`` sets it."""


def join_ranks(config: Config) -> None:
    """Join the process group where there is no GPU, with gloo; with a GPU MMEngine's runner does that.

    Args:
        config: Changed in place: the model's wrapper gets no device ids.

    Raises:
        ConfigError: No launcher started this process, or there is no GPU and the launcher is not torchrun.
    """
    if config.get('launcher', 'none') == 'none' or torch.cuda.is_available():
        return
    if config.launcher != 'pytorch':
        raise ConfigError(
            f'--launcher {config.launcher} needs GPUs: start CPU processes with torchrun and --launcher pytorch'
        )
    absent = [name for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT') if name not in os.environ]
    if absent:
        raise ConfigError(
            f'--launcher pytorch without {absent[0]} in the environment: start with torchrun --nproc-per-node N'
        )
    config.merge_from_dict(dict(model_wrapper_cfg=dict(device_ids=None)))
    if not dist.is_initialized():
        seconds = ((config.get('env_cfg') or {}).get('dist_cfg') or {}).get('timeout', TIMEOUT)
        dist.init_process_group('gloo', timeout=datetime.timedelta(seconds=seconds))
