# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The training loop whose data are samples that it makes itself."""
import contextlib
import copy
import time
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence

import torch
from mmengine.logging import print_log
from mmengine.runner import BaseLoop
from torch import nn
from torch.utils.data import DataLoader, Dataset

from psaq_mm.distillation import CoEvolution, CoEvolutionSettings
from psaq_mm.engine.checkpoint import file_sha256, is_quantized, load_weights, read_checkpoint
from psaq_mm.engine.real_images import training_images
from psaq_mm.engine.samples import SavedSamples, load_samples
from psaq_mm.errors import CheckpointError, ConfigError
from psaq_mm.models import TaskModel, spec_of
from psaq_mm.quantization import set_mode
from psaq_mm.registry import LOOPS, TASK_UTILS

__all__ = ['DataFreeTrainLoop']


class _PoolDataset(Dataset):
    """What MMEngine asks of a loop's dataset (a length, metainfo), over samples that live in the pool."""

    def __init__(self):
        self.metainfo: Dict[str, Any] = {}

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return index


def _tune(model: nn.Module) -> nn.Module:
    """Eval mode throughout: no DropPath, no BatchNorm updates; gradients flow all the same."""
    model.eval()  # returns None in the libraries' backbones
    return model


@LOOPS.register_module()
class DataFreeTrainLoop(BaseLoop):
    """PSAQ-ViT V2 as an iteration loop: synthesis and calibration first, then student steps with synthesis between.

    Args:
        runner: The runner.
        dataloader: Ignored, never built: the inherited one would open the real dataset.
        max_iters: Student steps; 0 calibrates only.
        teacher: ``dict(checkpoint=..., sha256=...)``: the full-precision weights. A key of its own, because resuming
            replaces ``load_from``.
        generator: Config of the sample generator.
        distil: Which outputs are compared, see :data:`psaq_mm.models.task.PARTS`; None leaves it to
            :func:`psaq_mm.models.task.default_parts`.
        block_stride: Of the part ``blocks``: every how many transformer blocks.
        model_config: The quantized model's config, written into ``student.pth`` for inferencers.
        dropped_hooks: Inherited hooks that were dropped, named in the log.
        samples: A ``samples.pt`` or a folder of images, see :func:`psaq_mm.engine.samples.load_samples`: the first samples.
            Of more than ``calibration_samples`` the first are taken; of fewer all, which the log says.
        save_samples: Whether :class:`~psaq_mm.engine.hooks.DataFreeQuantHook` keeps the first samples.
        seed: Seed of the samples and of their order.
        val_interval: Student steps between validations, where the config has a validation set; the last step is always
            followed by one.
        log_interval: Synthesis steps between two lines of the log.
        **settings: Fields of :class:`psaq_mm.distillation.CoEvolutionSettings`.
    """

    def __init__(self, runner, dataloader=None, max_iters: int = 200, teacher: Optional[Mapping] = None,
                 generator: Optional[Mapping] = None, distil: Optional[Sequence[str]] = None,
                 block_stride: int = 3, model_config: Optional[Mapping] = None, dropped_hooks: Sequence[str] = (),
                 samples: Optional[str] = None, save_samples: bool = False, seed: int = 0, val_interval: int = 0,
                 log_interval: int = 10, **settings):
        self._pool_dataset = _PoolDataset()
        super().__init__(runner, DataLoader(self._pool_dataset))
        self._max_iters, self._iter, self._epoch = int(max_iters), 0, 0
        self._max_epochs = 1
        self.val_begin, self.val_interval = 1, val_interval
        self.stop_training = False
        self.teacher_config = dict(teacher or {})
        self.generator = TASK_UTILS.build(dict(generator or {}, type=(generator or {}).get('type', 'SampleGenerator')))
        self.settings_given, self.block_stride = settings, block_stride
        self.distil = None if distil is None else tuple(distil)
        self.samples_path, self.save_samples = samples, save_samples
        self.model_config, self.seed, self.log_interval = model_config, seed, log_interval
        self._resumed: Optional[Dict[str, Any]] = None
        self.evolution: Optional[CoEvolution] = None
        self.seconds: Dict[str, float] = dict(synthesis=0., student=0.)
        if dropped_hooks:
            print_log(f'Dropped inherited hooks that need the real dataset: {", ".join(dropped_hooks)}', 'current')

    # ------------------------------------------------------------------ what MMEngine reads
    max_iters = property(lambda self: self._max_iters)
    max_epochs = property(lambda self: self._max_epochs)
    iter = property(lambda self: self._iter)
    epoch = property(lambda self: self._epoch)

    @property
    def model(self) -> nn.Module:
        """The student, unwrapped."""
        return getattr(self.runner.model, 'module', self.runner.model)

    # ------------------------------------------------------------------ set-up
    def _load_teacher(self) -> nn.Module:
        """Full-precision weights into a copy of the student whose quantizers are off; into the student too, when fresh."""
        path = self.teacher_config.get('checkpoint')
        if not path:
            raise ConfigError('the loop has no teacher: run it through tools/dfq_train.py, or set '
                              'train_cfg.teacher=dict(checkpoint=...)')
        checkpoint = read_checkpoint(path)
        if is_quantized(checkpoint):
            raise CheckpointError(f'{path} is quantized already: the teacher has to be the full-precision checkpoint')
        if '://' not in path:
            found, expected = file_sha256(path), self.teacher_config.get('sha256')
            if expected and found != expected:
                raise CheckpointError(f'{path} has changed since the run began (SHA-256 {found[:12]}, was {expected[:12]}): '
                                      'give the checkpoint that it began with')
            self.teacher_config['sha256'] = found
        if self._resumed is None:
            load_weights(self.model, checkpoint, path)
        teacher = copy.deepcopy(self.model)
        if self._resumed is not None:
            load_weights(teacher, checkpoint, path)  # the copy has the weights of a student that has learned
        set_mode(teacher, 'off')
        teacher.requires_grad_(False)
        self._pool_dataset.metainfo = dict(checkpoint['meta'].get('dataset_meta') or {})
        return _tune(teacher)

    def _prepare(self) -> None:
        teacher, student = self._load_teacher(), _tune(self.model)
        spec = spec_of(student)
        settings = CoEvolutionSettings(scope=spec.scope, **{**self.settings_given, 'size': tuple(self.settings_given['size'])})
        if self.samples_path is not None and settings.source != 'generated':
            raise ConfigError(f'dfq.samples={self.samples_path} and dfq.source={settings.source!r} contradict each other: '
                              'leave one of them out')
        real = None
        if settings.source == 'real':
            real = training_images(self.runner.cfg, student, settings.size, self.seed)
        teacher, student = (TaskModel(m, self.distil, block_stride=self.block_stride) for m in (teacher, student))
        self.distil = teacher.parts
        made_here = settings.source == 'generated' and self.samples_path is None
        if made_here and settings.classes is not None and teacher.num_classes is None:
            print_log(f'{type(teacher.model).__name__} is no classifier: samples are made class-free', 'current')
        self.evolution = CoEvolution(teacher, student, self.generator, settings,
                                     seed=self.seed, real_source=real, progress=self._log_synthesis)
        if self._resumed is not None:
            self.evolution.load_state_dict(self._resumed['evolution'])
            self.seconds = dict(self._resumed['seconds'])
            print_log(f'Resumed at student step {self._iter} of {self._max_iters}', 'current')
            return
        given = self._given_samples(teacher, settings)
        if given is None:
            print_log(f'Synthesizing {settings.calibration_samples} samples of {settings.size[0]} x {settings.size[1]} '
                      f'({settings.source})', 'current')
        with self._clock('synthesis'):
            self.evolution.prepare(*given or ())
        print_log(f'Calibrated {spec.label} on them in {self.seconds["synthesis"]:.1f} s', 'current')

    def _given_samples(self, teacher: TaskModel, settings: CoEvolutionSettings) -> Optional[SavedSamples]:
        """The samples that the config names, as many as the ranges are set on."""
        if self.samples_path is None:
            return None
        found = load_samples(self.samples_path, settings.size, teacher.model, teacher.image_spec)
        wanted = settings.calibration_samples
        taken = SavedSamples(found.samples[:wanted], None if found.labels is None else found.labels[:wanted])
        self.settings_given['calibration_samples'] = len(taken.samples)
        few = f'; dfq.calibration_samples asks for {wanted}' if len(taken.samples) < wanted else ''
        print_log(f'Using {len(taken.samples)} of the {len(found.samples)} samples in {self.samples_path}{few}', 'current')
        return taken

    @contextlib.contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begun

    def _log_synthesis(self, step: Dict[str, Any]) -> None:
        number, steps = step['step'] + 1, step['steps']
        if number % self.log_interval and number != steps:
            return
        shown = '  '.join(f'{k}: {v:.4f}' for k, v in step.items() if k not in ('step', 'steps', 'eta'))
        print_log(f'Samples [{number:>4}/{steps}]  eta: {step["eta"]:.0f} s  {shown}', 'current')
        visualizer = self.runner.visualizer
        done = len(self.evolution.history) if self.evolution else 0
        visualizer.add_scalars({f'samples/{k}': v for k, v in step.items() if k not in ('step', 'steps', 'eta')},
                               step=done + number)

    # ------------------------------------------------------------------ run
    def run(self) -> nn.Module:
        """Make samples, calibrate, train the student against the teacher."""
        self.runner.call_hook('before_train')
        self._prepare()
        self.runner.call_hook('before_train_epoch')
        while self._iter < self._max_iters and not self.stop_training:
            self._step()
            last = self._iter >= self._max_iters
            due = self.val_interval and self._iter % self.val_interval == 0
            if self.runner.val_loop is not None and (last or due):
                self.runner.val_loop.run()
                _tune(self.model)
        if self._max_iters == 0 and self.runner.val_loop is not None:
            self.runner.val_loop.run()
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model

    def _step(self) -> None:
        evolution = self.evolution
        if evolution.due(self._iter):  # before the step, so that a checkpoint never falls between a round and its step
            with self._clock('synthesis'):
                evolution.evolve()
        self.runner.call_hook('before_train_iter', batch_idx=self._iter, data_batch=None)
        with self._clock('student'):
            images = evolution.draw()
            with self.runner.optim_wrapper.optim_context(self.runner.model):
                loss = evolution.loss(images)
            self.runner.optim_wrapper.update_params(loss)
        outputs = dict(loss=loss.detach(), discrepancy=loss.detach(), discrepancy_weight=evolution.weight.weight)
        self.runner.call_hook('after_train_iter', batch_idx=self._iter, data_batch=None, outputs=outputs)
        self._iter += 1

    # ------------------------------------------------------------------ state
    def state_dict(self) -> Dict[str, Any]:
        """What ``iter_N.pth`` carries beside weights, optimizer and schedule."""
        return dict(evolution=self.evolution.state_dict(), teacher=dict(self.teacher_config), seconds=dict(self.seconds))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Kept until :meth:`run`: MMEngine sets the random state anew after loading a checkpoint."""
        self._resumed = dict(state)
        self.teacher_config = {**self.teacher_config, **{k: v for k, v in state['teacher'].items() if v}}

    def summary(self) -> Dict[str, Any]:
        """JSON types only: what ``student.pth`` says of how it was made."""
        settings: Dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in self.settings_given.items()}
        return dict(settings, samples=None if self.samples_path is None else str(self.samples_path), max_iters=self._max_iters,
                    seed=self.seed, distil=list(self.distil or ()), block_stride=self.block_stride,
                    generator=self._generator_summary(),
                    seconds={k: round(v, 2) for k, v in self.seconds.items()},
                    rounds=self.evolution.rounds if self.evolution else 0)

    def _generator_summary(self) -> Dict[str, Any]:
        """The generator's settings, with what was chosen by the model in place of None."""
        found = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self.generator).items()
                 if not k.startswith('_') and isinstance(v, (int, float, str, tuple, list, type(None)))}
        if self.evolution is not None:
            teacher = self.evolution.teacher
            if found.get('drop_tokens') is None:
                found['drop_tokens'] = teacher.prefix_tokens
            if found.get('lr') is None and hasattr(self.generator, 'rate_for'):
                found['lr'] = self.generator.rate_for(teacher.model)
        return found

    def history(self) -> List[Dict[str, float]]:
        """Every synthesis step's terms so far."""
        return self.evolution.history if self.evolution else []
