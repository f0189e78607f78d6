# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The training loop of a data-free run: pictures, ranges and codes first, then the student's steps."""

import contextlib
import copy
import logging
import math
from typing import Any, ContextManager, Dict, Iterator, List, Mapping, Optional, Sequence

import torch
from mmengine.logging import print_log
from mmengine.runner import BaseLoop
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from psaq_mm.calibration import Calibration, StudentTraining, check_size, take_pictures
from psaq_mm.engine.checkpoint import check_finite, file_sha256, is_quantized, load_weights, read_checkpoint
from psaq_mm.engine.device import leave_device_without_float64
from psaq_mm.engine.expected import Expected, expected_agreement, held_back
from psaq_mm.engine.inputs import set_input_
from psaq_mm.engine.optim import follow_schedule
from psaq_mm.engine.presets import current_names
from psaq_mm.engine.runner.clock import RunClock
from psaq_mm.engine.runner.estimate import RunEstimate, parts_of
from psaq_mm.engine.runner.pictures import RunPictures
from psaq_mm.engine.samples import build_source
from psaq_mm.engine.settings import LOOP_GROUPS, named_dfq
from psaq_mm.errors import CheckpointError, ConfigError, DataError
from psaq_mm.models import TaskModel, rotate_model_, spec_of
from psaq_mm.models.rotation import RotationReport
from psaq_mm.pictures import Generated
from psaq_mm.plain import to_plain
from psaq_mm.progress import listening, stage
from psaq_mm.psaq_vit import CoEvolution, Synthesis
from psaq_mm.quantization import QuantSpec, is_quantizer_key, set_mode, update_ranges_, use_full_float32
from psaq_mm.ranks import ranks, sum_gradients_
from psaq_mm.registry import LOOPS, TASK_UTILS
from psaq_mm.settings import read_groups

__all__ = ['DataFreeTrainLoop']


class _PoolDataset(Dataset):
    """What MMEngine asks of a loop's dataset (a length, metainfo); the loop makes its pictures itself."""

    def __init__(self) -> None:
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
    """Calibrates a student on pictures of a source, then trains it, as an iteration loop of MMEngine.

    A run has the parts that it needs: a :class:`Calibration` always, a :class:`StudentTraining` for student steps, a
    :class:`Synthesis` for samples that are synthesized. Training with synthesis is PSAQ-ViT V2's :class:`CoEvolution`.

    In a distributed run each rank works on its part of every batch, and the loop itself reduces what couples the batch:
    statistics of samples, ranges, gradients. The forward of a DistributedDataParallel around the model is not called.

    Args:
        runner: The runner.
        dataloader: Ignored, never built: the inherited one would open the real dataset.
        max_iters: Student steps; 0 calibrates only.
        teacher: ``dict(checkpoint=..., sha256=...)``: the full-precision weights. A key of its own, because resuming
            replaces ``load_from``. ``dict(in_model=dataset_meta)``: the weights of the runner's model.
        generator: Config of the sample generator.
        model_config: The quantized model's config, written into ``student.pth`` for inferencers.
        dropped_hooks: Inherited hooks that were dropped, named in the log.
        val_interval: Student steps between validations, where the config has a validation set; the last step is always
            followed by one.
        **settings: Settings of the groups :data:`psaq_mm.engine.settings.LOOP_GROUPS`.

    Attributes:
        clock: The time of the run.
        teacher: In full precision, frozen; set by :meth:`run`.
        calibration: Of the student; set by :meth:`run`.
        training: Of the student; None without student steps.
        synthesis: None where no picture is synthesized.
        rotated: What was rotated; None where nothing was.
        expected: The student compared with the teacher after the run; None before, and where it is switched off.
    """

    def __init__(
        self,
        runner,
        dataloader=None,
        max_iters: int = 200,
        teacher: Optional[Mapping] = None,
        generator: Optional[Mapping] = None,
        model_config: Optional[Mapping] = None,
        dropped_hooks: Sequence[str] = (),
        val_interval: int = 0,
        **settings,
    ):
        self._pool_dataset = _PoolDataset()
        super().__init__(runner, DataLoader(self._pool_dataset))
        leave_device_without_float64(self.model)  # before the optimizer is built
        self._max_iters, self._iter, self._epoch = int(max_iters), 0, 0
        self._max_epochs = 1
        self.val_begin, self.val_interval = 1, val_interval
        self.stop_training = False
        self.teacher_config, self.generator_config = dict(teacher or {}), dict(generator or {})
        self.model_config = model_config
        with named_dfq():
            groups = read_groups(current_names(settings), *LOOP_GROUPS)
        self.picture_settings, self.calibration_settings, self.training_settings = groups[:3]
        self.synthesis_settings, self.settings = groups[3:]
        self.distil = self.settings.distil
        self._resumed: Optional[Dict[str, Any]] = None
        self.teacher: TaskModel
        self.calibration: Calibration
        self.training: Optional[StudentTraining] = None
        self.synthesis: Optional[Synthesis] = None
        self.labels: Optional[Tensor] = None  # classes that the first pictures were made for, (n,)
        self._first: Optional[Tensor] = None  # the first pictures, unless the run was resumed
        self.rotated: Optional[RotationReport] = None
        self.expected: Optional[Expected] = None
        self.clock = RunClock(self.settings.max_seconds)
        self._rates: List[float] = []
        self._last_round = 0.0  # seconds
        self._failed_validation: Optional[Exception] = None
        if dropped_hooks:
            print_log(f'Dropped inherited hooks that need the real dataset: {", ".join(dropped_hooks)}', 'current')

    # ------------------------------------------------------------------ what MMEngine and the hook read
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

    @property
    def first_pictures(self) -> Optional[Tensor]:
        """The pictures that set the ranges, (n, C, H, W); None in a resumed run."""
        return self._first

    @property
    def newest_pictures(self) -> Optional[Tensor]:
        """The pictures of the last round, else those of the pool, (n, C, H, W); None where there are none."""
        if self.training is None:
            return self._first
        return self.training.pool.samples if self.training.latest is None else self.training.latest

    @property
    def rounds(self) -> int:
        """How often pictures were made so far, the first ones included."""
        if self.training is not None:
            return self.training.rounds
        return int(self._first is not None or self.resumed)

    # ------------------------------------------------------------------ set-up
    def _load_teacher(self) -> nn.Module:
        """A full-precision copy of the student with quantizers off. A new run's student gets its weights too."""
        path, in_model = self.teacher_config.get('checkpoint'), self.teacher_config.get('in_model')
        if not path and in_model is None:
            raise ConfigError(
                'the loop has no teacher: run it through psaq quantize, or set train_cfg.teacher=dict(checkpoint=...)'
            )
        if in_model is not None:
            return self._teacher_of_student(dict(in_model))
        checkpoint = read_checkpoint(path)
        if is_quantized(checkpoint):
            raise CheckpointError(f'{path} is quantized already: the teacher has to be the full-precision checkpoint')
        if '://' not in path:
            digest, expected = file_sha256(path), self.teacher_config.get('sha256')
            if expected and digest != expected:
                raise CheckpointError(
                    f'{path} has changed since the run began (SHA-256 {digest[:12]}, was {expected[:12]}): '
                    'give the checkpoint that it began with'
                )
            self.teacher_config['sha256'] = digest
        if self._resumed is None:
            load_weights(self.model, checkpoint, path)
            self._rotate(self.model)
        self._describe(dict(checkpoint['meta'].get('dataset_meta') or {}))
        teacher = copy.deepcopy(self.model)
        if self._resumed is not None:
            load_weights(teacher, checkpoint, path)  # the copy has the weights of a student that has learned
            self._rotate(teacher)
        return self._frozen(teacher)

    def _teacher_of_student(self, dataset_meta: Dict[str, Any]) -> nn.Module:
        """The teacher of a student that has the full-precision weights already."""
        weights = {name: value for name, value in self.model.state_dict().items() if not is_quantizer_key(name)}
        check_finite(weights, type(self.model).__name__)  # a quantizer has no range yet
        self._rotate(self.model)
        self._describe(dataset_meta)
        return self._frozen(copy.deepcopy(self.model))

    def _describe(self, dataset_meta: Dict[str, Any]) -> None:
        """Keep the classes and the palette of the full-precision model."""
        self.model.psaq_mm_classes = tuple(dataset_meta.get('classes') or ())  # what a language model is asked for
        self._pool_dataset.metainfo = dataset_meta

    @staticmethod
    def _frozen(teacher: nn.Module) -> nn.Module:
        """The same copy of the student with quantizers off."""
        set_mode(teacher, 'off')
        teacher.requires_grad_(False)
        return _tune(teacher)

    def _rotate(self, model: nn.Module) -> None:
        if self.settings.rotate:
            self.rotated = rotate_model_(_tune(model), tuple(self.picture_settings.size), self.settings.seed)
            print_log(f'Rotated {self.rotated}', 'current')

    def _prepare(self, listeners: contextlib.ExitStack) -> None:
        """Make teacher, calibration and, where they are needed, synthesis and training; then calibrate."""
        set_input_(self.model, self.runner.cfg, self.picture_settings.value_range)  # before the teacher is copied
        with named_dfq():  # before weights are rotated, which runs the model
            check_size(TaskModel(self.model, parts=()), self.picture_settings.size)
        models, scope, seed = (self._load_teacher(), _tune(self.model)), spec_of(self.model).scope, self.settings.seed
        with named_dfq():
            self.teacher, student = (TaskModel(m, self.distil, block_stride=self.settings.block_stride) for m in models)
        self.distil = self.teacher.parts
        random = torch.Generator().manual_seed(seed)
        self.calibration = Calibration(student, self.calibration_settings, scope=scope, random=random)
        pictures = RunPictures(self.picture_settings, self.runner.cfg, self.teacher, seed)
        if pictures.synthesized and (self._max_iters or not pictures.saved):
            self.synthesis = self._build_synthesis(random, pictures)
        if self._max_iters:
            self.training = self._build_training(pictures)
        if self._resumed is not None:
            self._resume(self._resumed)
        listeners.enter_context(listening(self._estimate(pictures)))
        if self._resumed is None:
            self._calibrate(pictures)

    def _build_synthesis(self, random: torch.Generator, pictures: RunPictures) -> Synthesis:
        settings = dict(self.generator_config, type=self.generator_config.get('type', 'SampleGenerator'))
        if isinstance(settings.get('init'), (Mapping, list, tuple)):
            settings['init'] = build_source(settings['init'], self.model, self.runner.cfg, self.settings.seed)
        if self.synthesis_settings.classes and self.teacher.num_classes is None and not pictures.saved:
            print_log(f'{type(self.teacher.model).__name__} is no classifier: samples are made class-free', 'current')
        return Synthesis(
            self.teacher,
            TASK_UTILS.build(settings),
            self.picture_settings.size,
            self.synthesis_settings,
            random=random,
            progress=self._log_synthesis,
        )

    def _build_training(self, pictures: RunPictures) -> StudentTraining:
        teacher, calibration, stream, settings = self.teacher, self.calibration, pictures.stream, self.training_settings
        fresh, seed = pictures.fresh(), self.settings.seed
        with named_dfq():
            if self.synthesis is None:
                return StudentTraining(teacher, calibration, stream, settings, fresh=fresh, seed=seed)
            return CoEvolution(teacher, calibration, stream, self.synthesis, settings, fresh=fresh, seed=seed)

    def _resume(self, state: Mapping[str, Any]) -> None:
        self.runner.call_hook('before_samples')
        if self.training is not None:
            if state['evolution'] is None:
                raise CheckpointError(
                    f'the checkpoint to resume from is of a run without student steps and dfq.iters is '
                    f'{self._max_iters}: run without --resume'
                )
            self.training.load_state_dict(state['evolution'])
        self.clock.seconds = dict(state['seconds'])
        print_log(f'Resumed at student step {self._iter} of {self._max_iters}', 'current')

    def _calibrate(self, pictures: RunPictures) -> None:
        """Set ranges and first codes on the first pictures."""
        count = self.calibration_settings.calibration_samples
        saved = pictures.first(count)
        self.runner.call_hook('before_samples')
        if saved is None:
            height, width = self.picture_settings.size
            verb = 'Synthesizing' if pictures.synthesized else 'Taking'
            print_log(f'{verb} {count} pictures of {height} x {width} ({pictures.description})', 'current')
        with self.clock.counted('synthesis'):
            first = None if saved is None else saved.samples
            if self.training is not None:
                self.training.prepare(first)
                first = self.training.latest
            else:
                if first is None and self.synthesis is not None:
                    first = pictures.stream.take(count, self.synthesis.make)
                elif first is None:
                    first = take_pictures(pictures.stream, count)
                self.calibration.run(first)
        self._first = first
        if saved is not None:
            self.labels = saved.labels
        elif self.synthesis is not None and isinstance(pictures.source, Generated):  # in a mixture, a part has classes
            self.labels = self.synthesis.labels
        label, seconds = spec_of(self.model).label, self.clock.seconds['synthesis']
        print_log(f'Calibrated {label} on them in {seconds:.1f} s', 'current')

    def _log_synthesis(self, step: Dict[str, Any]) -> None:
        number, steps = step['step'] + 1, step['steps']
        if number % self.settings.log_interval and number != steps:
            return
        terms = {k: v for k, v in step.items() if k not in ('step', 'steps', 'eta')}
        shown = '  '.join(f'{k}: {v:.4f}' for k, v in terms.items())
        print_log(f'Samples [{number:>4}/{steps}]  eta: {step["eta"]:.0f} s  {shown}', 'current')
        done = len(self.history())
        self.runner.visualizer.add_scalars({f'samples/{k}': v for k, v in terms.items()}, step=done + number)

    # ------------------------------------------------------------------ run
    def run(self) -> nn.Module:
        """Make samples, calibrate, train the student against the teacher."""
        if self.settings.amp == 'float16' and not hasattr(self.runner.optim_wrapper, 'loss_scaler'):
            raise ConfigError(
                "dfq.amp='float16' needs a GPU and optim_wrapper.type='AmpOptimWrapper', which scales the loss: use "
                "dfq.amp='bfloat16'"
            )
        use_full_float32()
        self._check_step()
        self.runner.call_hook('before_train')
        self._start()
        with contextlib.ExitStack() as listeners:
            self._prepare(listeners)
            self.runner.call_hook('before_train_epoch')
            self._train()
        self._expect()
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        if self._failed_validation is not None:
            error = self._failed_validation
            raise DataError(
                f'the validation failed ({type(error).__name__}: {error}), and the student was saved all the same: '
                'check val_dataloader and val_evaluator, or evaluate it with psaq test'
            ) from error
        return self.runner.model

    def _start(self) -> None:
        """Start the clock, and say how the learning rate goes on."""
        budget = self.settings.max_seconds
        self.clock.start(0.0 if budget is None else (self._resumed or {}).get('elapsed', 0.0))
        if budget is not None:
            self.runner.param_schedulers = []
            self._rates = [group.get('initial_lr', group['lr']) for group in self.runner.optim_wrapper.param_groups]
        elif self._resumed is not None:
            follow_schedule(self.runner)

    def _train(self) -> None:
        """The student's steps, each followed by a validation where one is due."""
        over = over_at_once = self._over()
        if over and self.settings.max_seconds is not None and self._iter < self._max_iters:
            print_log(
                f'No time is left for the student: its samples took {self.clock.elapsed:.1f} of '
                f'dfq.max_seconds={self.settings.max_seconds:g}; '
                'its ranges are calibrated',
                'current',
            )
        if self.training is not None and not over:
            with stage('Student', self._max_iters, self._iter) as steps:
                while not over:
                    self._step(self.training)
                    steps.advance()
                    over = self._over()
                    due = self.val_interval and self._iter % self.val_interval == 0
                    if self.runner.val_loop is not None and (over or due):
                        self._validate()
        # nothing to train, or killed between the last step and here
        if over_at_once and self.runner.val_loop is not None:
            self._validate()

    def _estimate(self, pictures: RunPictures) -> RunEstimate:
        """Says in the log how long the run still takes."""
        budget = self.settings.max_seconds

        def bound() -> Optional[float]:
            return None if budget is None else budget - self.clock.elapsed

        parts = parts_of(self, pictures.source, self.resumed)
        return RunEstimate(parts, lambda line: print_log(line, 'current'), bound)

    def _expect(self) -> None:
        """Compare the student with the teacher, on pictures that no run calibrates on. The first rank does."""
        count = self.settings.summary_pictures
        if not count or ranks()[0]:
            return
        with self.paused():
            stream = held_back(self.teacher, self.picture_settings.size, self.settings.seed)
            seconds = max(2.0, 0.05 * self.clock.elapsed)
            self.expected = expected_agreement(self.teacher, self.calibration.student, stream, count, seconds)

    def _validate(self) -> None:
        """Validate. An error is raised at the end of the run, so that the student is not lost.

        On several ranks it is raised at once: the others wait in the evaluator.
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

    def paused(self) -> ContextManager[None]:
        """The block is no part of the run's time: for code that looks at the student in between."""
        return self.clock.paused()

    @property
    def seconds(self) -> Dict[str, float]:
        """Time of the synthesis (calibration included) and of the student's steps."""
        return self.clock.seconds

    @property
    def seconds_paused(self) -> float:
        """Time of all pauses."""
        return self.clock.paused_seconds

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1: of its steps, or of its time where that is further on."""
        steps = self._iter / self._max_iters if self._max_iters else 1.0
        return min(1.0, max(steps, self.clock.share))

    def _over(self) -> bool:
        return self.stop_training or self.progress >= 1

    def _evolve(self, training: StudentTraining) -> None:
        """A round of new pictures, where one is due and the budget has the time that the last one took."""
        if not training.due(self._iter) or not self.clock.has_time_for(self._last_round):
            return
        with self.clock.measured() as lap, self.clock.counted('synthesis'):
            training.evolve()
        self._last_round = lap.seconds

    def _step(self, training: StudentTraining) -> None:
        self._evolve(training)  # before the step, so that a checkpoint never falls between a round and its step
        share = 0.5 * (1 + math.cos(math.pi * self.progress))
        for group, rate in zip(self.runner.optim_wrapper.param_groups, self._rates):
            group['lr'] = rate * share
        self.runner.call_hook('before_train_iter', batch_idx=self._iter, data_batch=None)
        with self.clock.counted('student'):
            wrapper, batches = self.runner.optim_wrapper, self.batches
            losses = training.learn(training.draw(batches), wrapper.backward, batches, self._precision)
            # Not update_params: between its backward and its step the ranks have to add up their gradients.
            sum_gradients_(parameter for group in wrapper.param_groups for parameter in group['params'])
            wrapper.step()
            wrapper.zero_grad()
            update_ranges_(self.model)
        outputs = dict(losses._asdict())
        if self.synthesis is not None:
            outputs['discrepancy_weight'] = self.synthesis.weight.weight
        self.runner.call_hook('after_train_iter', batch_idx=self._iter, data_batch=None, outputs=outputs)
        self._iter += 1

    @property
    def batches(self) -> int:
        """Batches of a student step: the loop's own number, or what a config says of its optimizer wrapper."""
        return max(self.settings.accumulative_counts, getattr(self.runner.optim_wrapper, '_accumulative_counts', 1))

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        with self.runner.optim_wrapper.optim_context(self.runner.model), self._autocast():
            yield

    def _autocast(self) -> ContextManager:
        if self.settings.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.calibration.device.type, getattr(torch, self.settings.amp))

    # ------------------------------------------------------------------ state
    def state_dict(self) -> Dict[str, Any]:
        """What ``iter_N.pth`` carries beside weights, optimizer and schedule."""
        return dict(
            evolution=None if self.training is None else self.training.state_dict(),
            teacher=dict(self.teacher_config),
            seconds=dict(self.clock.seconds),
            elapsed=self.clock.elapsed,
            identity=self._identity(),
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep the state until :meth:`run`: MMEngine sets the random state anew after loading a checkpoint.

        Raises:
            CheckpointError: It is of a run with other settings than this one.
        """
        theirs, ours = dict(state.get('identity') or {}), self._identity()
        # Checkpoints of earlier releases have no identity. A setting of the quantizer that is newer than the checkpoint
        # has its default there.
        if theirs:
            theirs.update(QuantSpec.from_dict(theirs.pop('quant')).to_dict())
            ours.update(ours.pop('quant'))
        odd = [f'{k}={theirs[k]!r}, the config says {ours[k]!r}' for k in ours if k in theirs and theirs[k] != ours[k]]
        if odd:
            raise CheckpointError(
                f'the checkpoint to resume from is of another run ({"; ".join(odd[:3])}): resume with the config '
                'of that run, or give this one a --work-dir of its own'
            )
        self._resumed = dict(state)
        # The file may have moved; its hash tells whether it is the same one.
        settings = {k: v for k, v in self.teacher_config.items() if v}
        self.teacher_config = {**state['teacher'], **settings, 'sha256': state['teacher'].get('sha256')}

    def _identity(self) -> Dict[str, Any]:
        """Settings that make it this run and no other. Its length, batches and intervals are not among them.

        Rates are: MMEngine restores those of the checkpoint, and would pass over the config's without a word.
        """
        wrapper = self.runner.cfg.get('optim_wrapper') or {}
        rates = dict(lr=(wrapper.get('optimizer') or {}).get('lr'), vector_lr=None, range_lr=0.0)
        rates.update({k: v for k, v in (wrapper.get('paramwise_cfg') or {}).items() if k in rates})
        return dict(
            rates,
            quant=spec_of(self.model).to_dict(),
            seed=self.settings.seed,
            size=list(self.picture_settings.size),
            rotate=self.settings.rotate,
        )

    def _check_step(self) -> None:
        if self._resumed is not None and self._iter > self._max_iters:
            raise CheckpointError(
                f'the checkpoint to resume from has {self._iter} student steps, dfq.iters={self._max_iters} asks for '
                'fewer: give at least as many, or run without --resume'
            )

    def summary(self) -> Dict[str, Any]:
        """JSON types only: how ``student.pth`` was made."""
        groups = (
            self.picture_settings,
            self.calibration_settings,
            self.training_settings,
            self.synthesis_settings,
            self.settings,
        )
        settings = {name: to_plain(value) for group in groups for name, value in group.to_dict().items()}
        if self._first is not None:
            settings['calibration_samples'] = len(self._first)
        return dict(
            settings,
            max_iters=self._max_iters,
            steps=self._iter,
            fresh_samples=self.training.fresh_samples if self.training else 0,
            distil=list(self.distil or ()),
            ranks=ranks()[1],
            accumulative_counts=self.batches,
            generator=self._generator_summary(),
            seconds={k: round(v, 2) for k, v in self.clock.seconds.items()},
            rounds=self.rounds,
        )

    def _generator_summary(self) -> Dict[str, Any]:
        """Settings of the synthesis, with what the model chose in place of None; empty without synthesis."""
        if self.synthesis is None:
            return {}
        generator = self.synthesis.generator
        settings = to_plain(generator.settings())
        if settings['drop_tokens'] is None:
            settings['drop_tokens'] = self.teacher.prefix_tokens
        return dict(settings, lr=generator.rate_for(self.teacher.model))

    def history(self) -> List[Dict[str, float]]:
        """Every synthesis step's terms so far."""
        return self.synthesis.history if self.synthesis else []
