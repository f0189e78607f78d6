# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Files of a data-free run: checkpoints to resume from, sample sheets, ``student.pth``, and its samples if asked."""

import re
from pathlib import Path
from typing import List, Mapping, Union

from mmengine.config import Config
from mmengine.dist import is_main_process, master_only
from mmengine.hooks import Hook
from mmengine.logging import print_log

from psaq_mm.engine.checkpoint import save_atomic, student_checkpoint
from psaq_mm.engine.run_summary import as_text, rows_of, run_summary, write_summary
from psaq_mm.engine.samples import save_samples
from psaq_mm.engine.settings import HookSettings
from psaq_mm.files import whole_file, write_whole
from psaq_mm.ranks import barrier
from psaq_mm.registry import HOOKS
from psaq_mm.visualization import sample_sheet, write_png

__all__ = ['DataFreeQuantHook', 'checkpoints_in', 'student_config']

_NAME = re.compile(r'iter_\d+\.pth')

_STUDENT_KEYS = ('custom_imports', 'test_pipeline', 'test_dataloader', 'in_memory')
"""Keys of the run's config that ``student.pth`` holds beside the model. Without ``custom_imports`` an inferencer that
builds from the checkpoint alone would not find classes of the user's project. ``in_memory`` names the class of a model
that was built without a config."""


def student_config(config: Mapping, model: Mapping) -> Config:
    """The config that ``student.pth`` holds.

    Args:
        config: A whole config.
        model: The quantized model's.
    """
    kept = {key: config[key] for key in _STUDENT_KEYS if config.get(key)}
    return Config(dict(default_scope=config.get('default_scope'), model=model, **kept))


def checkpoints_in(work_dir: Union[str, Path]) -> List[Path]:
    """``iter_N.pth`` of a folder, oldest first."""
    return sorted((p for p in Path(work_dir).glob('iter_*.pth') if _NAME.fullmatch(p.name)), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.partition('_')[2])


@HOOKS.register_module()
class DataFreeQuantHook(Hook):
    """Writes checkpoints, each as a whole, and draws sample sheets.

    MMEngine's CheckpointHook removes the old checkpoint before it writes the new one, and writes in place: a run killed
    in between has none. Here the new one is moved into place as a whole, and only then is an old one removed. In a
    distributed run rank 0 writes, and the others wait.

    Files of an earlier run in the same work dir (``iter_N.pth`` and sheets) are moved to ``earlier/<time>`` in it, once
    the new run's settings are known to be right. They are neither counted as this run's checkpoints nor resumed.
    ``student.pth`` stays until the new one takes its place.

    Args:
        **settings: See :class:`psaq_mm.engine.settings.HookSettings`. With student steps, ``iter_0.pth`` is written
            after calibration.
    """

    priority = 'VERY_LOW'

    def __init__(self, **settings):
        self.settings = HookSettings.from_dict(settings)

    # ------------------------------------------------------------------ state
    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Add the pool of samples, random state and teacher to ``iter_N.pth``."""
        checkpoint['psaq_mm'] = runner.train_loop.state_dict()

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Give them back to the loop when a run resumes."""
        if 'psaq_mm' in checkpoint and getattr(runner, '_train_loop', None) is not None:
            runner.train_loop.load_state_dict(checkpoint['psaq_mm'])

    # ------------------------------------------------------------------ steps
    @master_only
    def before_train(self, runner) -> None:
        """Remove half-written files of a run that was killed."""
        for name in ('iter_*.pth', 'student.pth', 'samples.pt', 'last_checkpoint'):
            for partial in Path(runner.work_dir).glob(f'.{name}.*.partial'):
                partial.unlink(missing_ok=True)

    @master_only
    def before_samples(self, runner) -> None:
        """Move files of an earlier run aside: all, or in a resumed run those newer than its checkpoint."""
        folder, step = Path(runner.work_dir), runner.iter if runner.train_loop.resumed else -1
        old = [path for path in checkpoints_in(folder) if _step_of(path) > step]
        sheets = [
            path for path in (folder / 'samples').glob('round_*_step_*.png') if int(path.stem.rpartition('_')[2]) > step
        ]
        if not old and not sheets:
            return
        last = folder / 'last_checkpoint'
        if step < 0:
            last.unlink(missing_ok=True)  # before the file that it names
        elif (folder / f'iter_{step}.pth').is_file():
            self._name_last(folder / f'iter_{step}.pth')
        aside = folder / 'earlier' / runner.timestamp
        for path in (*old, *sheets):
            target = aside / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        if old:
            print_log(
                f'{folder} holds {len(old)} checkpoints that are not of this run '
                f'({", ".join(p.name for p in old[:3])}): they are in '
                f'{aside} now, which you may delete',
                'current',
            )

    def before_train_epoch(self, runner) -> None:
        """Draw and save the samples that set the ranges; write ``iter_0.pth``."""
        self._draw_sheet(runner)
        loop = runner.train_loop
        if loop.picture_settings.save_samples and loop.first_pictures is not None:  # a resumed run has none of its own
            self._save_samples(runner)
        if self.settings.checkpoint_interval and loop.max_iters and not loop.resumed:
            self._save(runner, 0)
        barrier()

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Write a checkpoint and a sheet where one is due."""
        step, sheet, checkpoint = runner.iter + 1, self.settings.sheet_interval, self.settings.checkpoint_interval
        if sheet and step % sheet == 0:
            self._draw_sheet(runner)
        if checkpoint and (step % checkpoint == 0 or step == runner.max_iters):
            self._save(runner, step)
            barrier()

    def after_train(self, runner) -> None:
        """Write ``student.pth`` and ``summary.json``, and print the summary."""
        if is_main_process():
            self._save_student(runner)
        barrier()

    # ------------------------------------------------------------------ parts
    def _save_student(self, runner) -> None:
        loop = runner.train_loop
        config = student_config(runner.cfg, loop.model_config)
        teacher = (loop.teacher_config['checkpoint'] or '', loop.teacher_config.get('sha256') or '')
        path, summary = Path(runner.work_dir) / 'student.pth', run_summary(loop)
        save_atomic(
            student_checkpoint(
                loop.model, config.pretty_text, loop.dataloader.dataset.metainfo, teacher, loop.summary(), summary
            ),
            path,
        )
        print_log(f'Saved the quantized model to {path}', 'current')
        whole = write_summary(summary, path.parent, getattr(runner.cfg, 'filename', None))
        print_log(as_text(f'Summary of {summary["label"]}', rows_of(whole)), 'current')

    @master_only
    def _draw_sheet(self, runner) -> None:
        loop = runner.train_loop
        pictures = loop.newest_pictures
        if pictures is None:
            return
        path = Path(runner.work_dir) / 'samples' / f'round_{loop.rounds:03d}_step_{runner.iter:06d}.png'
        sheet = sample_sheet(pictures[:32], loop.teacher.image_spec)
        write_png(sheet, path)
        runner.visualizer.add_image('samples', sheet, step=runner.iter)

    @master_only
    def _save_samples(self, runner) -> None:
        loop = runner.train_loop
        path = save_samples(
            runner.work_dir,
            loop.first_pictures,
            loop.model,
            loop.teacher.image_spec,
            labels=loop.labels,
            seed=loop.settings.seed,
            settings=loop.summary(),
        )
        print_log(f'Saved {len(loop.first_pictures)} samples to {path}', 'current')

    @master_only
    def _save(self, runner, step: int) -> None:
        final = Path(runner.work_dir) / f'iter_{step}.pth'
        with whole_file(final) as partial:
            runner.save_checkpoint(runner.work_dir, partial.name, by_epoch=False, meta=dict(iter=step))
        self._name_last(final)
        written = [path for path in checkpoints_in(runner.work_dir) if _step_of(path) <= step]
        for old in written[: -max(1, self.settings.keep_checkpoints)]:
            old.unlink()

    @staticmethod
    def _name_last(checkpoint: Path) -> None:
        """Write the file that ``--resume`` of the libraries' own tools reads."""
        write_whole(checkpoint.with_name('last_checkpoint'), str(checkpoint))
