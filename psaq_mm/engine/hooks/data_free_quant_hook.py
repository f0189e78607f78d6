# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a data-free run leaves behind: checkpoints to resume from, sample sheets, ``student.pth``; its samples, if
asked.
"""

import re
from pathlib import Path
from typing import List

from mmengine.config import Config
from mmengine.dist import is_main_process, master_only
from mmengine.hooks import Hook
from mmengine.logging import print_log

from psaq_mm.engine.checkpoint import save_atomic, student_checkpoint
from psaq_mm.engine.samples import save_samples
from psaq_mm.engine.settings import HookSettings
from psaq_mm.files import whole_file
from psaq_mm.ranks import barrier
from psaq_mm.registry import HOOKS
from psaq_mm.visualization import sample_sheet, write_png

__all__ = ['DataFreeQuantHook', 'checkpoints_in']

_NAME = re.compile(r'iter_(\d+)\.pth')


_OF_A_STUDENT = ('custom_imports', 'test_pipeline', 'test_dataloader')
"""What of a run's config goes into ``student.pth`` beside the model: without its ``custom_imports``, a class of a
project of its own is not found by an inferencer that builds from the checkpoint alone."""


def checkpoints_in(work_dir: str) -> List[Path]:
    """``iter_N.pth`` of a folder, oldest first."""
    return sorted((p for p in Path(work_dir).glob('iter_*.pth') if _NAME.fullmatch(p.name)), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(_NAME.fullmatch(checkpoint.name).group(1))


@HOOKS.register_module()
class DataFreeQuantHook(Hook):
    """Saves atomically, and draws the samples.

    MMEngine's CheckpointHook removes the old checkpoint before it writes the new one, and writes in place: a run killed
    in between has none. Here the new one is moved into place whole, and only then does an old one go. In a distributed
    run rank 0 writes, and the others wait.

    What an earlier run left in the same work dir (``iter_N.pth`` and sheets) is moved to ``earlier/<time>`` in it once
    the new run's settings have proved right: it is neither counted among the run's own checkpoints nor resumed.
    ``student.pth`` stays until the new one takes its place.

    Args:
        **settings: See :class:`psaq_mm.engine.settings.HookSettings`. ``iter_0.pth`` comes once samples and ranges are
            there.
    """

    priority = 'VERY_LOW'

    def __init__(self, **settings):
        self.settings = HookSettings.from_dict(settings)

    # ------------------------------------------------------------------ state
    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Add the pool of samples, random state and teacher to ``iter_N.pth``."""
        checkpoint['psaq_mm'] = runner.train_loop.state_dict()

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Hand them back to the loop when a run resumes."""
        if 'psaq_mm' in checkpoint and getattr(runner, '_train_loop', None) is not None:
            runner.train_loop.load_state_dict(checkpoint['psaq_mm'])

    # ------------------------------------------------------------------ steps
    @master_only
    def before_train(self, runner) -> None:
        """What a run left that was killed while it wrote goes."""
        for name in ('iter_*.pth', 'student.pth', 'samples.pt', 'last_checkpoint'):
            for partial in Path(runner.work_dir).glob(f'.{name}.*.partial'):
                partial.unlink(missing_ok=True)

    @master_only
    def before_samples(self, runner) -> None:
        """What an earlier run left goes aside: of a resumed run what is newer than the checkpoint it goes on from, else
        all.
        """
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
        """The samples that set the ranges."""
        self._draw_sheet(runner)
        loop = runner.train_loop
        if loop.picture_settings.save_samples and loop.first_pictures is not None:  # a resumed run has none of its own
            self._save_samples(runner)
        if self.settings.checkpoint_interval and loop.max_iters and not loop.resumed:
            self._save(runner, 0)
        barrier()

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Checkpoint and sheet, when due."""
        step = runner.iter + 1
        if self.settings.sheet_interval and step % self.settings.sheet_interval == 0:
            self._draw_sheet(runner)
        if self.settings.checkpoint_interval and (
            step % self.settings.checkpoint_interval == 0 or step == runner.max_iters
        ):
            self._save(runner, step)
            barrier()

    def after_train(self, runner) -> None:
        """``student.pth``."""
        if is_main_process():
            self._save_student(runner)
        barrier()

    # ------------------------------------------------------------------ parts
    def _save_student(self, runner) -> None:
        loop = runner.train_loop
        config = Config(
            dict(
                default_scope=runner.cfg.get('default_scope'),
                model=loop.model_config,
                **{k: runner.cfg[k] for k in _OF_A_STUDENT if runner.cfg.get(k)},
            )
        )
        teacher = (loop.teacher_config['checkpoint'], loop.teacher_config.get('sha256') or '')
        path = Path(runner.work_dir) / 'student.pth'
        save_atomic(
            student_checkpoint(
                loop.model, config.pretty_text, loop.dataloader.dataset.metainfo, teacher, loop.summary()
            ),
            path,
        )
        print_log(f'Saved the quantized model to {path}', 'current')

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
        for old in [path for path in checkpoints_in(runner.work_dir) if _step_of(path) <= step][
            : -max(1, self.settings.keep_checkpoints)
        ]:
            old.unlink()

    @staticmethod
    def _name_last(checkpoint: Path) -> None:
        """What ``--resume`` of the libraries' own tools reads."""
        with whole_file(checkpoint.with_name('last_checkpoint')) as partial:
            partial.write_text(str(checkpoint))
