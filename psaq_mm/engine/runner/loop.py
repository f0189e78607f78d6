# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The training loop whose data are samples that it makes itself."""

import contextlib
import copy
import logging
import math
import time
from typing import Any, ContextManager, Dict, Iterator, List, Mapping, Optional, Sequence, Union

import torch
from mmengine.logging import print_log
from mmengine.runner import BaseLoop
from torch import nn
from torch.utils.data import DataLoader, Dataset

from psaq_mm.engine.checkpoint import file_sha256, is_quantized, load_weights, read_checkpoint
from psaq_mm.engine.data_overlap import check_folder
from psaq_mm.engine.device import leave_device_without_float64
from psaq_mm.engine.inputs import set_input_
from psaq_mm.engine.optim import follow_schedule
from psaq_mm.engine.presets import Fresh
from psaq_mm.engine.real_images import TrainingImages, training_images
from psaq_mm.engine.samples import SavedSamples, build_source, folders_in, load_samples, procedural_of, takes_rgb
from psaq_mm.errors import CheckpointError, ConfigError, DataError
from psaq_mm.models import TaskModel, rotate_model_, spec_of
from psaq_mm.pictures import SampleStream, Source
from psaq_mm.plain import to_plain
from psaq_mm.psaq_vit import CoEvolution, CoEvolutionSettings, FreshPool, SourcedEvolution
from psaq_mm.quantization import QuantSpec, set_mode, update_ranges_, use_full_float32
from psaq_mm.ranks import broadcast_, ranks, sum_gradients_
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


def _kinds(source: Source) -> List[str]:
    return [type(one).__name__ for one in getattr(source, 'sources', [source])]


@LOOPS.register_module()
class DataFreeTrainLoop(BaseLoop):
    """PSAQ-ViT V2 as an iteration loop: synthesis and calibration first, then student steps with synthesis between.

    In a distributed run each rank works on its part of every batch, and the loop itself reduces what couples the batch:
    statistics of samples, ranges, gradients. The forward of a DistributedDataParallel around the model is not called.

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
        samples: A ``samples.pt`` or a folder of images, see :func:`psaq_mm.engine.samples.load_samples`: the first
            samples. Of more than ``calibration_samples`` the first are taken; of fewer all, which the log says. Or a
            dict, or a list of dicts, that :func:`psaq_mm.engine.samples.build_source` builds: the source of all
            samples.
        fresh: Share of each of the student's batches that is made for it, instead of drawn from the pool, by what of
            the source needs no synthesis; or ``dict(share=..., samples=...)`` with a source of its own. 0: every batch
            comes from the pool.
        max_seconds: Wall time of the run, samples included. The student's steps end with it, or with ``max_iters`` if
            that is sooner, and their learning rate falls as a cosine to 0 on the way there, in place of the runner's
            own schedule. A round of synthesis that would last longer than what is left is left out. None: no bound.
        save_samples: Whether :class:`~psaq_mm.engine.hooks.DataFreeQuantHook` keeps the first samples.
        seed: Seed of the samples and of their order.
        val_interval: Student steps between validations, where the config has a validation set; the last step is always
            followed by one.
        log_interval: Synthesis steps between two lines of the log.
        accumulative_counts: Batches of ``batch_size`` that one student step is made of, for a device that cannot hold
            them at once; as many times as large a batch gives the same step.
        rotate: Whether the weights are rotated first, by rotations drawn from ``seed``:
            :func:`psaq_mm.models.rotate_model_`. Teacher and student are the same function as before, and both are
            rotated.
        amp: ``'bfloat16'`` or ``'float16'`` runs teacher and student under autocast in the student's steps; synthesis,
            calibration and all quantizers stay in float32. float16 needs an ``AmpOptimWrapper``, which scales the loss.
        value_range: Least and greatest value of pictures as they are loaded, see
            :func:`psaq_mm.engine.inputs.set_input_`.
        **settings: Fields of :class:`psaq_mm.psaq_vit.CoEvolutionSettings`.
    """

    def __init__(
        self,
        runner,
        dataloader=None,
        max_iters: int = 200,
        teacher: Optional[Mapping] = None,
        generator: Optional[Mapping] = None,
        distil: Optional[Sequence[str]] = None,
        block_stride: int = 3,
        model_config: Optional[Mapping] = None,
        dropped_hooks: Sequence[str] = (),
        samples: Union[None, str, Mapping, Sequence] = None,
        save_samples: bool = False,
        seed: int = 0,
        val_interval: int = 0,
        log_interval: int = 10,
        fresh: Union[float, Mapping] = 0.0,
        max_seconds: Optional[float] = None,
        accumulative_counts: int = 1,
        amp: Optional[str] = None,
        rotate: bool = False,
        value_range: Optional[Sequence] = None,
        **settings,
    ):
        self._pool_dataset = _PoolDataset()
        super().__init__(runner, DataLoader(self._pool_dataset))
        leave_device_without_float64(self.model)  # before the optimizer is built
        self._max_iters, self._iter, self._epoch = int(max_iters), 0, 0
        self._max_epochs = 1
        self.val_begin, self.val_interval = 1, val_interval
        self.stop_training = False
        self.teacher_config = dict(teacher or {})
        self.generator = self._build_generator(generator or {})
        self.settings_given, self.block_stride = settings, block_stride
        self.distil = None if distil is None else tuple(distil)
        self.source_config = samples if isinstance(samples, (Mapping, list, tuple)) else None
        self.samples_path = samples if self.source_config is None else None
        self.fresh, self.max_seconds, self.save_samples = Fresh.parse(fresh), max_seconds, save_samples
        if max_seconds is not None and not max_seconds > 0:
            raise ConfigError(f'dfq.max_seconds={max_seconds} must be above 0, or None for no bound')
        if amp not in (None, 'bfloat16', 'float16'):
            raise ConfigError(f'dfq.amp={amp!r} is not known: use bfloat16, float16, or None for float32 throughout')
        if accumulative_counts < 1:
            raise ConfigError(f'dfq.accumulative_counts={accumulative_counts} must be at least 1')
        if not isinstance(rotate, bool):
            raise ConfigError(f'dfq.rotate={rotate!r} must be True or False')
        self.amp, self.accumulative_counts, self.rotate = amp, int(accumulative_counts), rotate
        self.value_range = value_range
        self.model_config, self.seed, self.log_interval = model_config, seed, log_interval
        self._resumed: Optional[Dict[str, Any]] = None
        self.evolution: Optional[CoEvolution] = None
        self.seconds: Dict[str, float] = dict(synthesis=0.0, student=0.0)
        self._begun, self._rates = time.perf_counter(), []
        self._last_round = 0.0  # seconds
        self._stopped: Optional[float] = None
        self.seconds_paused = 0.0
        self._failed_validation: Optional[Exception] = None
        if dropped_hooks:
            print_log(f'Dropped inherited hooks that need the real dataset: {", ".join(dropped_hooks)}', 'current')

    # ------------------------------------------------------------------ what MMEngine reads
    max_iters = property(lambda self: self._max_iters)
    max_epochs = property(lambda self: self._max_epochs)
    iter = property(lambda self: self._iter)
    epoch = property(lambda self: self._epoch)

    @property
    def resumed(self) -> bool:
        """Whether the run goes on from a checkpoint of its own."""
        return self._resumed is not None

    @property
    def model(self) -> nn.Module:
        """The student, unwrapped."""
        return getattr(self.runner.model, 'module', self.runner.model)

    # ------------------------------------------------------------------ set-up
    def _load_teacher(self) -> nn.Module:
        """Full-precision weights into a copy of the student whose quantizers are off; into the student too, when
        fresh.
        """
        path = self.teacher_config.get('checkpoint')
        if not path:
            raise ConfigError(
                'the loop has no teacher: run it through tools/dfq_train.py, or set '
                'train_cfg.teacher=dict(checkpoint=...)'
            )
        checkpoint = read_checkpoint(path)
        if is_quantized(checkpoint):
            raise CheckpointError(f'{path} is quantized already: the teacher has to be the full-precision checkpoint')
        if '://' not in path:
            found, expected = file_sha256(path), self.teacher_config.get('sha256')
            if expected and found != expected:
                raise CheckpointError(
                    f'{path} has changed since the run began (SHA-256 {found[:12]}, was {expected[:12]}): '
                    'give the checkpoint that it began with'
                )
            self.teacher_config['sha256'] = found
        if self._resumed is None:
            load_weights(self.model, checkpoint, path)
            self._rotate(self.model)
        teacher = copy.deepcopy(self.model)
        if self._resumed is not None:
            load_weights(teacher, checkpoint, path)  # the copy has the weights of a student that has learned
            self._rotate(teacher)
        set_mode(teacher, 'off')
        teacher.requires_grad_(False)
        self._pool_dataset.metainfo = dict(checkpoint['meta'].get('dataset_meta') or {})
        return _tune(teacher)

    def _rotate(self, model: nn.Module) -> None:
        if self.rotate:
            print_log(
                f'Rotated {rotate_model_(_tune(model), tuple(self.settings_given["size"]), self.seed)}', 'current'
            )

    def _prepare(self) -> None:
        set_input_(self.model, self.runner.cfg, self.value_range)  # before the teacher is copied from it
        teacher, student = self._load_teacher(), _tune(self.model)
        spec = spec_of(student)
        settings = CoEvolutionSettings(
            scope=spec.scope, **{**self.settings_given, 'size': tuple(self.settings_given['size'])}
        )
        given = self.source_config if self.samples_path is None else self.samples_path
        if given is not None and settings.source != 'generated':
            raise ConfigError(
                f'dfq.samples={given} and dfq.source={settings.source!r} contradict each other: leave one of them out'
            )
        source = None if self.source_config is None else self._build_source(self.source_config)
        real = None
        if settings.source == 'real':
            real = training_images(self.runner.cfg, student, settings.size, self.seed)
        teacher, student = (TaskModel(m, self.distil, block_stride=self.block_stride) for m in (teacher, student))
        self.distil = teacher.parts
        made_here = (
            settings.source == 'generated' and self.samples_path is None and (source is None or not source.procedural)
        )
        if made_here and settings.classes is not None and teacher.num_classes is None:
            print_log(f'{type(teacher.model).__name__} is no classifier: samples are made class-free', 'current')
        arguments = (teacher, student, self.generator, settings)
        options = dict(seed=self.seed, real_source=real, progress=self._log_synthesis)
        if source is None:
            self.evolution = CoEvolution(*arguments, **options)
        else:
            stream = SampleStream(source, settings.size, teacher.image_spec, self.seed)
            self.evolution = SourcedEvolution(stream, *arguments, **options)
        if self.fresh.share and self._max_iters:
            stream = self._fresh_stream(source, settings, real)
            self.evolution.pool = FreshPool(
                settings.pool_size, stream, self.fresh.share, replace='random', seed=self.seed
            )
        if self._resumed is not None:
            self.runner.call_hook('before_samples')
            self.evolution.load_state_dict(self._resumed['evolution'])
            self.seconds = dict(self._resumed['seconds'])
            print_log(f'Resumed at student step {self._iter} of {self._max_iters}', 'current')
            return
        given = self._given_samples(teacher, settings)
        self.runner.call_hook('before_samples')
        if given is None:
            shown = settings.source if source is None else ', '.join(_kinds(source))
            print_log(
                f'Synthesizing {settings.calibration_samples} samples of {settings.size[0]} x {settings.size[1]} '
                f'({shown})',
                'current',
            )
        with self._clock('synthesis'):
            self.evolution.prepare(*given or ())
        print_log(f'Calibrated {spec.label} on them in {self.seconds["synthesis"]:.1f} s', 'current')

    def _build_generator(self, config: Mapping) -> Any:
        settings = dict(config, type=config.get('type', 'SampleGenerator'))
        if isinstance(settings.get('init'), (Mapping, list, tuple)):
            settings['init'] = self._build_source(settings['init'])
        return TASK_UTILS.build(settings)

    def _build_source(self, config: Any) -> Source:
        """A source out of a config, or of a name; it may read no picture that is evaluated."""
        for folder in [] if isinstance(config, str) else folders_in(config):
            check_folder(self.runner.cfg, folder)
        return build_source(config, takes_rgb(self.model))

    def _fresh_stream(
        self, source: Optional[Source], settings: CoEvolutionSettings, real: Optional[TrainingImages]
    ) -> Union[SampleStream, TrainingImages]:
        """What the fresh part of the student's batches comes from."""
        if self.fresh.samples is not None:
            found = self._build_source(self.fresh.samples)
        elif real is not None:
            return real
        else:
            found = self._build_source(settings.source) if source is None else source
        found = procedural_of(found)
        if found is None:
            raise ConfigError(
                f'dfq.fresh={self.fresh.share:g} has nothing to make samples of for each batch, as synthesized ones '
                f'take '
                "too long: name a source, such as dfq.fresh=dict(share=0.5, samples=dict(type='psaq_mm.PinkNoise'))"
            )
        return SampleStream(found, settings.size, self.evolution.teacher.image_spec, self.seed, name='fresh')

    def _given_samples(self, teacher: TaskModel, settings: CoEvolutionSettings) -> Optional[SavedSamples]:
        """The samples that the config names, as many as the ranges are set on."""
        if self.samples_path is None:
            return None
        found = load_samples(self.samples_path, settings.size, teacher.model, teacher.image_spec)
        wanted = settings.calibration_samples
        taken = SavedSamples(found.samples[:wanted], None if found.labels is None else found.labels[:wanted])
        self.settings_given['calibration_samples'] = len(taken.samples)
        few = f'; dfq.calibration_samples asks for {wanted}' if len(taken.samples) < wanted else ''
        print_log(
            f'Using {len(taken.samples)} of the {len(found.samples)} samples in {self.samples_path}{few}', 'current'
        )
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
        visualizer.add_scalars(
            {f'samples/{k}': v for k, v in step.items() if k not in ('step', 'steps', 'eta')}, step=done + number
        )

    # ------------------------------------------------------------------ run
    def run(self) -> nn.Module:
        """Make samples, calibrate, train the student against the teacher."""
        if self.amp == 'float16' and not hasattr(self.runner.optim_wrapper, 'loss_scaler'):
            raise ConfigError(
                "dfq.amp='float16' needs a GPU and optim_wrapper.type='AmpOptimWrapper', which scales the loss: use "
                "dfq.amp='bfloat16'"
            )
        use_full_float32()
        self._check_step()
        self.runner.call_hook('before_train')
        self._begun = time.perf_counter()
        if self.max_seconds is not None:
            self._begun -= (self._resumed or {}).get('elapsed', 0.0)
            self.runner.param_schedulers = []
            self._rates = [group.get('initial_lr', group['lr']) for group in self.runner.optim_wrapper.param_groups]
        elif self._resumed is not None:
            follow_schedule(self.runner)
        self._prepare()
        self.runner.call_hook('before_train_epoch')
        over = over_at_once = self._over()
        if over and self.max_seconds is not None and self._iter < self._max_iters:
            print_log(
                f'No time is left for the student: its samples took {self.elapsed:.1f} of '
                f'dfq.max_seconds={self.max_seconds:g}; '
                'its ranges are calibrated',
                'current',
            )
        while not over:
            self._step()
            over = self._over()
            due = self.val_interval and self._iter % self.val_interval == 0
            if self.runner.val_loop is not None and (over or due):
                self._validate()
        # nothing to train, or killed between the last step and here
        if over_at_once and self.runner.val_loop is not None:
            self._validate()
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        if self._failed_validation is not None:
            error = self._failed_validation
            raise DataError(
                f'the validation failed ({type(error).__name__}: {error}), and the student was saved all the same: '
                f'check '
                'val_dataloader and val_evaluator, or evaluate it with tools/test.py'
            ) from error
        return self.runner.model

    def _validate(self) -> None:
        """Validate; what fails there is told at the end, so that the student is not lost. Ranks wait for each other in
        an evaluator: of several a failure is one at once.
        """
        with self.paused():
            try:
                self.runner.val_loop.run()
            except Exception as error:  # a metric's own code may raise anything
                if ranks()[1] > 1:
                    raise
                self._failed_validation = error
                print_log(f'The validation failed: {type(error).__name__}: {error}', 'current', logging.ERROR)
            _tune(self.model)

    @property
    def elapsed(self) -> float:
        """Seconds of the run so far, samples included, what was :meth:`paused` left out."""
        return (time.perf_counter() if self._stopped is None else self._stopped) - self._begun

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not the run's own: for whoever looks at the student in between."""
        self._stopped = time.perf_counter()
        yield
        pause, self._stopped = time.perf_counter() - self._stopped, None
        self._begun += pause
        self.seconds_paused += pause

    @property
    def progress(self) -> float:
        """How much of the run is done, 0 to 1: of its steps, or of its time where that is further on."""
        steps = self._iter / self._max_iters if self._max_iters else 1.0
        return min(1.0, steps if self.max_seconds is None else max(steps, self._agreed / self.max_seconds))

    @property
    def _agreed(self) -> float:
        """The seconds of the run by the clock of rank 0: ranks that went by their own would not end at the same
        step.
        """
        return float(broadcast_(torch.tensor(self.elapsed, dtype=torch.float64)))

    def _over(self) -> bool:
        return self.stop_training or self.progress >= 1

    def _round_is_due(self) -> bool:
        if not self.evolution.due(self._iter):
            return False
        return self.max_seconds is None or self._agreed + self._last_round < self.max_seconds

    def _step(self) -> None:
        evolution = self.evolution
        if self._round_is_due():  # before the step, so that a checkpoint never falls between a round and its step
            begun = time.perf_counter()
            with self._clock('synthesis'):
                evolution.evolve()
            self._last_round = float(broadcast_(torch.tensor(time.perf_counter() - begun, dtype=torch.float64)))
        share = 0.5 * (1 + math.cos(math.pi * self.progress))
        for group, rate in zip(self.runner.optim_wrapper.param_groups, self._rates):
            group['lr'] = rate * share
        self.runner.call_hook('before_train_iter', batch_idx=self._iter, data_batch=None)
        with self._clock('student'):
            wrapper, batches = self.runner.optim_wrapper, self._batches
            loss = evolution.learn(evolution.draw(batches), wrapper.backward, batches, self._precision)
            # Not update_params: between its backward and its step the ranks have to add up their gradients.
            sum_gradients_(parameter for group in wrapper.param_groups for parameter in group['params'])
            wrapper.step()
            wrapper.zero_grad()
            update_ranges_(self.model)
        outputs = dict(loss=loss, discrepancy=loss, discrepancy_weight=evolution.weight.weight)
        self.runner.call_hook('after_train_iter', batch_idx=self._iter, data_batch=None, outputs=outputs)
        self._iter += 1

    @property
    def _batches(self) -> int:
        """Batches of a student step: the loop's own number, or what a config says of its optimizer wrapper."""
        return max(self.accumulative_counts, getattr(self.runner.optim_wrapper, '_accumulative_counts', 1))

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        with self.runner.optim_wrapper.optim_context(self.runner.model), self._autocast():
            yield

    def _autocast(self) -> ContextManager:
        if self.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.evolution.device.type, getattr(torch, self.amp))

    # ------------------------------------------------------------------ state
    def state_dict(self) -> Dict[str, Any]:
        """What ``iter_N.pth`` carries beside weights, optimizer and schedule."""
        return dict(
            evolution=self.evolution.state_dict(),
            teacher=dict(self.teacher_config),
            seconds=dict(self.seconds),
            elapsed=self.elapsed,
            identity=self._identity(),
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Kept until :meth:`run`: MMEngine sets the random state anew after loading a checkpoint.

        Raises:
            CheckpointError: It is of a run with other settings than this one.
        """
        made, wanted = dict(state.get('identity') or {}), self._identity()
        # checkpoints of earlier releases do not tell; a setting of the quantizer that came later has its default there
        if made:
            made.update(QuantSpec.from_dict(made.pop('quant')).to_dict())
            wanted.update(wanted.pop('quant'))
        odd = [f'{k}={made[k]!r}, the config says {wanted[k]!r}' for k in wanted if k in made and made[k] != wanted[k]]
        if odd:
            raise CheckpointError(
                f'the checkpoint to resume from is of another run ({"; ".join(odd[:3])}): resume with the config '
                'of that run, or give this one a --work-dir of its own'
            )
        self._resumed = dict(state)
        # The file may have moved: whether it is the same one, its hash tells.
        given = {k: v for k, v in self.teacher_config.items() if v}
        self.teacher_config = {**state['teacher'], **given, 'sha256': state['teacher'].get('sha256')}

    def _identity(self) -> Dict[str, Any]:
        """Settings without which a run is another one. Its length, batches and intervals are not among them.

        Rates are: MMEngine restores those of the checkpoint, and would pass over the config's without a word.
        """
        wrapper = self.runner.cfg.get('optim_wrapper') or {}
        rates = dict(lr=(wrapper.get('optimizer') or {}).get('lr'), vector_lr=None, range_lr=0.0)
        rates.update({k: v for k, v in (wrapper.get('paramwise_cfg') or {}).items() if k in rates})
        return dict(
            rates,
            quant=spec_of(self.model).to_dict(),
            seed=self.seed,
            size=list(self.settings_given['size']),
            rotate=self.rotate,
        )

    def _check_step(self) -> None:
        if self._resumed is not None and self._iter > self._max_iters:
            raise CheckpointError(
                f'the checkpoint to resume from has {self._iter} student steps, dfq.iters={self._max_iters} asks for '
                'fewer: give at least as many, or run without --resume'
            )

    def summary(self) -> Dict[str, Any]:
        """JSON types only: what ``student.pth`` says of how it was made."""
        settings: Dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in self.settings_given.items()}
        return dict(
            settings,
            samples=to_plain(self.source_config) if self.samples_path is None else str(self.samples_path),
            max_iters=self._max_iters,
            steps=self._iter,
            max_seconds=self.max_seconds,
            fresh=self.fresh.share if self.fresh.samples is None else to_plain(self.fresh._asdict()),
            fresh_samples=getattr(self.evolution.pool, 'made', 0) if self.evolution else 0,
            seed=self.seed,
            distil=list(self.distil or ()),
            block_stride=self.block_stride,
            value_range=to_plain(self.value_range),
            ranks=ranks()[1],
            accumulative_counts=self._batches,
            amp=self.amp,
            generator=self._generator_summary(),
            seconds={k: round(v, 2) for k, v in self.seconds.items()},
            rounds=self.evolution.rounds if self.evolution else 0,
        )

    def _generator_summary(self) -> Dict[str, Any]:
        """The generator's settings, with what was chosen by the model in place of None."""
        found = {
            k: list(v) if isinstance(v, tuple) else v
            for k, v in vars(self.generator).items()
            if not k.startswith('_') and isinstance(v, (int, float, str, tuple, list, type(None)))
        }
        if isinstance(self.generator.__dict__.get('init'), Source):
            found['init'] = repr(self.generator.init)
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
