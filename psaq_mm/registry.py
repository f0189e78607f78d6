# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Child registries of MMEngine's root ones, in the scope ``psaq_mm``.

``type='psaq_mm.Quantized'`` resolves from any OpenMMLab config without ``custom_imports``: MMEngine imports
``psaq_mm.registry`` when it meets the prefix and, on the first look-up, the module named in ``locations``. Those
modules import no model library themselves, so somebody with mmdet alone needs no mmseg.
"""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import TASK_UTILS as MMENGINE_TASK_UTILS
from mmengine.registry import Registry

__all__ = ['MODELS', 'HOOKS', 'LOOPS', 'OPTIM_WRAPPERS', 'OPTIM_WRAPPER_CONSTRUCTORS', 'TASK_UTILS']

MODELS = Registry(
    'model', parent=MMENGINE_MODELS, scope='psaq_mm', locations=['psaq_mm.models', 'psaq_mm.deploy.serving']
)
"""Builders of quantized models and backbones."""

HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='psaq_mm', locations=['psaq_mm.engine.hooks'])
"""Runner hooks: checkpoints and sample sheets of a data-free run."""

LOOPS = Registry('loop', parent=MMENGINE_LOOPS, scope='psaq_mm', locations=['psaq_mm.engine.runner'])
"""The data-free training loop."""

OPTIM_WRAPPERS = Registry(
    'optim wrapper', parent=MMENGINE_OPTIM_WRAPPERS, scope='psaq_mm', locations=['psaq_mm.engine.optim']
)
"""Wrappers of the student's optimizer."""

OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='psaq_mm',
    locations=['psaq_mm.engine.optim'],
)
"""Builders of the student's optimizer."""

TASK_UTILS = Registry('task util', parent=MMENGINE_TASK_UTILS, scope='psaq_mm', locations=['psaq_mm.models'])
"""Sample generators and other sources of samples."""
