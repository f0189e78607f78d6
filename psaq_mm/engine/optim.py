# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The student's optimizer, with one learning rate for each kind of parameter."""

import math
from typing import Any, Dict, List, Mapping, Optional

from mmengine.device import get_device
from mmengine.optim import AmpOptimWrapper, DefaultOptimWrapperConstructor, OptimWrapper, ReduceOnPlateauParamScheduler
from mmengine.runner import Runner
from torch import Tensor, nn

from psaq_mm.errors import ConfigError
from psaq_mm.quantization import learn_ranges_
from psaq_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS

__all__ = ['Float16OptimWrapper', 'StudentOptimWrapperConstructor', 'follow_schedule', 'parameter_groups']


@OPTIM_WRAPPERS.register_module()
def Float16OptimWrapper(**settings: Any) -> OptimWrapper:
    """The optimizer wrapper of ``dfq.amp='float16'``: on a GPU MMEngine's ``AmpOptimWrapper``, which scales the loss.

    Without a GPU it is a plain wrapper, so that the config can be built there. The loop then refuses to train.
    """
    if get_device() in ('cpu', 'mps'):
        return OptimWrapper(**settings)
    return AmpOptimWrapper(**settings, dtype='float16')


def parameter_groups(
    model: nn.Module, lr: float, vector_lr: Optional[float] = None, range_lr: float = 0.0
) -> List[Dict[str, Any]]:
    """Parameters of a quantized model by kind, each kind with its learning rate. A kind whose rate is 0 is frozen.

    Rounded weights are half a quantization step away from another code, so small updates change nothing in them. Gains
    and offsets of normalization layers and biases are a few thousand numbers that restore the statistics of every layer
    (norm tweaking, Li et al., arXiv 2309.02784).

    Args:
        model: A whole quantized model: ``requires_grad`` of frozen parameters is set to False.
        lr: Rate of parameters with two or more dimensions: weights, tables of position embeddings and biases.
        vector_lr: Rate of those with one dimension: biases, gains and offsets of normalization layers. None: as ``lr``.
        range_lr: Rate of the logarithms of the activations' scales (:func:`psaq_mm.quantization.learn_ranges_`). 0:
            ranges stay as calibrated.

    Returns:
        Groups for an optimizer; none for frozen kinds.

    Raises:
        ConfigError: A rate is negative or not finite.
    """
    rates = dict(lr=lr, vector_lr=lr if vector_lr is None else vector_lr, range_lr=range_lr)
    for name, rate in rates.items():
        if not 0 <= rate < math.inf:
            raise ConfigError(f'dfq.{name}={rate} must be 0 (frozen) or more')
    kinds: Dict[str, List[Tensor]] = dict(lr=[], vector_lr=[], range_lr=learn_ranges_(model) if range_lr else [])
    for parameter in model.parameters():
        if parameter.requires_grad:
            kinds['lr' if parameter.dim() > 1 else 'vector_lr'].append(parameter)
    for name, parameters in kinds.items():
        for parameter in parameters if not rates[name] else ():
            parameter.requires_grad_(False)
    return [dict(params=parameters, lr=rates[name]) for name, parameters in kinds.items() if parameters and rates[name]]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class StudentOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Builds the optimizer of a data-free run, see :func:`parameter_groups`.

    Args:
        optim_wrapper_cfg: As for MMEngine's constructor; the optimizer's ``lr`` is the rate of the weights.
        paramwise_cfg: ``dict(vector_lr=None, range_lr=0.)``.

    Raises:
        ConfigError: A key of ``paramwise_cfg`` is not known, or nothing is left to learn.
    """

    def __init__(self, optim_wrapper_cfg: Mapping, paramwise_cfg: Optional[Mapping] = None) -> None:
        rates = dict(vector_lr=None, range_lr=0.0)
        unknown = set(paramwise_cfg or {}) - set(rates)
        if unknown:
            raise ConfigError(f'paramwise_cfg.{sorted(unknown)[0]} is not known: use vector_lr or range_lr')
        super().__init__(optim_wrapper_cfg, {**rates, **(paramwise_cfg or {})})

    def add_params(self, params: List[Dict[str, Any]], module: nn.Module, **kwargs: Any) -> None:
        """Add the model's groups to ``params``. MMEngine calls it once, with the whole model."""
        params.extend(parameter_groups(module, self.base_lr, **self.paramwise_cfg))
        if not params:
            raise ConfigError(
                'dfq.lr, dfq.vector_lr and dfq.range_lr are all 0: nothing is left to learn; set dfq.iters=0 to '
                'calibrate only'
            )


def follow_schedule(runner: Runner) -> None:
    """Set the learning-rate schedules of a resumed run to the values of an uninterrupted run of the config's length.

    MMEngine restores schedules with the length that they were saved with. A run that is resumed with more steps would
    stay at the end of the old schedule, and a cosine would rise again. So schedules are built anew from the config and
    stepped as often as the run has steps. The values are those of an uninterrupted run bit for bit, as they follow from
    the first rates and the number of steps alone. If a schedule follows metrics, all stay as MMEngine restored them.

    Args:
        runner: After it loaded the checkpoint to resume from.
    """
    settings, wrapper, step = runner.cfg.get('param_scheduler'), runner.optim_wrapper, runner.iter
    if not isinstance(runner.param_schedulers, list) or not settings:
        return
    if any(isinstance(schedule, ReduceOnPlateauParamScheduler) for schedule in runner.param_schedulers):
        return
    for name in {schedule.param_name for schedule in runner.param_schedulers}:
        for group in wrapper.param_groups:
            group[name] = group.get(f'initial_{name}', group[name])
    runner.param_schedulers = runner.build_param_scheduler(settings)
    wrapper._global_step = step  # else each schedule warns of being stepped before the optimizer
    for _ in range(step):
        for schedule in runner.param_schedulers:
            if not schedule.by_epoch:
                schedule.step()
