# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What ``tools/test.py`` of mmdet, mmseg and mmpretrain gives beside metrics: drawn predictions, written ones, and
test-time augmentation. Each library's own hooks, evaluators and models do it.
"""

import contextlib
import dataclasses
import inspect
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional

from psaq_mm.errors import ConfigError
from psaq_mm.files import whole_file

__all__ = ['EvaluationOptions', 'writable_folder']

_HOOKS = dict(mmdet='DetVisualizationHook', mmseg='SegVisualizationHook', mmpretrain='VisualizationHook')
_VISUALIZERS = dict(mmdet='DetLocalVisualizer', mmseg='SegLocalVisualizer', mmpretrain='UniversalVisualizer')
_TTA_MODELS: Dict[str, Dict[str, Any]] = dict(
    # Not mmdet.DetTTAModel: mmdet registers it in MMEngine's own registry.
    mmdet=dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)),
    mmpretrain=dict(type='mmpretrain.AverageClsScoreTTA'),
)
"""Where a config has none. mmseg's tool takes none but the config's."""

_PICKLES = ('.pkl', '.pickle')


def writable_folder(path: str, option: str) -> Path:
    """Make a folder, and see that a file can be written there: before a model runs for hours.

    Args:
        path: Of the folder.
        option: That names it, for the message.

    Raises:
        ConfigError: It cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f'{option} {path} cannot be written ({error.strerror}): give another folder') from error
    return folder


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation.

    Args:
        show_dir: Folder of drawn predictions; None: none are drawn.
        show: Whether they are shown in a window.
        wait_time: Seconds that a window stays.
        out: Of a detector or a classifier, the pickle file of predictions; of a segmentor, the folder of label maps.
        tta: Whether test-time augmentation is done.
    """

    show_dir: Optional[str] = None
    show: bool = False
    wait_time: float = 2.0
    out: Optional[str] = None
    tta: bool = False

    def check(self) -> None:
        """Refuse what cannot be written or shown, before anything runs.

        Raises:
            ConfigError: A folder cannot be written, or there is no screen.
        """
        if self.show and self.show_dir:
            raise ConfigError('--show and --show-dir do not go together: give one of them')
        if (
            self.show
            and sys.platform == 'linux'
            and not (os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY'))
        ):
            raise ConfigError('--show needs a screen, and DISPLAY is not set: give --show-dir FOLDER')
        if self.show_dir:
            writable_folder(self.show_dir, '--show-dir')
        if self.out:
            pickled = self.out.endswith(_PICKLES)
            writable_folder(os.path.dirname(self.out) or '.' if pickled else self.out, '--out')

    def part(self, name: str) -> 'EvaluationOptions':
        """The same options with files of their own, where one command evaluates several models."""
        show_dir, out = self.show_dir, self.out
        if show_dir:
            show_dir = os.path.join(show_dir, name)
        if out:
            stem, ending = os.path.splitext(out)
            out = f'{stem}_{name}{ending}' if ending in _PICKLES else os.path.join(out, name)
        return dataclasses.replace(self, show_dir=show_dir, out=out)

    def prepare_(self, config) -> None:
        """Set a config, in place, before its runner is built.

        Args:
            config: Whole; its scope is set.

        Raises:
            ConfigError: The library of the model or the config has no such option.
        """
        if not (self.show_dir or self.show or self.out or self.tta):
            return
        from psaq_mm.engine.building import library_of

        library = library_of(config.model)
        if self.show_dir or self.show:
            self._show_(config, library)
        if self.out:
            self._write_(config, library)
        if self.tta:
            _augment_(config, library)

    def _show_(self, config, library: str) -> None:
        if library not in _HOOKS:
            raise ConfigError(
                f'--show-dir and --show draw what models of {", ".join(_HOOKS)} predict, and this one is of {library}: '
                'leave them out'
            )
        if self.tta and library == 'mmpretrain':
            raise ConfigError('mmpretrain draws no pictures under test-time augmentation: give --tta or --show-dir')
        folder = os.path.abspath(self.show_dir) if self.show_dir else None  # mmdet's hook puts others into the work dir
        # A name of its own: MMEngine would give this runner the visualizer of an earlier one, and its folder.
        visualizer = dict(config.get('visualizer') or {}, name=f'shown_{time.time_ns()}')
        if visualizer.get('type', 'Visualizer') == 'Visualizer':
            visualizer['type'] = f'{library}.{_VISUALIZERS[library]}'
        hooks = dict(config.get('default_hooks') or {})
        hook = dict(hooks.get('visualization') or dict(type=f'{library}.{_HOOKS[library]}'), show=self.show)
        hook['wait_time'] = self.wait_time
        if library == 'mmpretrain':
            hook.update(enable=True, interval=1, out_dir=folder)
        elif library == 'mmdet':
            hook.update(draw=True, test_out_dir=folder)
        else:
            hook.update(draw=True, interval=1)  # mmseg's default is every 50th batch
            if folder:
                # The hook knows no folder, the backend does. It also keeps the config, which goes to the work dir.
                logs = os.path.abspath(config.work_dir)
                visualizer['vis_backends'] = [
                    dict(
                        type='LocalVisBackend',
                        save_dir=folder,
                        img_save_dir='.',
                        config_save_file=os.path.join(logs, 'shown_config.py'),
                        scalar_save_file=os.path.join(logs, 'shown_scalars.json'),
                    )
                ]
        config.visualizer = visualizer
        config.default_hooks = dict(hooks, visualization=hook)

    def _write_(self, config, library: str) -> None:
        if library not in _HOOKS:
            raise ConfigError(
                f'--out writes what models of {", ".join(_HOOKS)} predict, and this one is of {library}: leave it out'
            )
        if library != 'mmseg':
            if not str(self.out).endswith(_PICKLES):
                raise ConfigError(f'--out {self.out} is a pickle file for models of {library}: let it end with .pkl')
            return
        if str(self.out).endswith(_PICKLES):
            raise ConfigError(f'--out {self.out} is a folder of label maps for a segmentor, as in mmseg: name a folder')
        given = config.test_evaluator
        evaluators = [given] if isinstance(given, Mapping) else list(given)
        writing = [evaluator for evaluator in evaluators if _writes_maps(evaluator)]
        if not writing:
            raise ConfigError(
                f'--out {self.out} needs an evaluator that writes label maps, such as IoUMetric: the config has '
                f'{", ".join(str(evaluator.get("type")) for evaluator in evaluators)}'
            )
        writing[0]['output_dir'] = self.out

    @contextlib.contextmanager
    def written_by(self, runner) -> Iterator[None]:
        """Write the predictions of a runner's test that runs in the block, whole or not at all.

        Raises:
            ConfigError: The library's test-time augmentation cannot do this model.
        """
        with contextlib.ExitStack() as stack:
            if self.out and self.out.endswith(_PICKLES):
                from psaq_mm.engine.building import library_of

                stack.enter_context(_pickled(runner, self.out, library_of(_plain(runner.cfg.model))))
            try:
                yield
            except AssertionError as error:
                if not (self.tta and 'TTA of instance segmentation' in str(error)):
                    raise
                raise ConfigError(
                    "mmdet's test-time augmentation merges boxes and no masks, and this model gives masks: leave --tta "
                    'out'
                ) from error

    def told(self) -> List[str]:
        """Lines on what was written."""
        shown = [f'drawn predictions are in {self.show_dir}'] if self.show_dir else []
        return shown + ([f'predictions are in {self.out}'] if self.out else [])


def _plain(model: Mapping) -> Mapping:
    """The config of a model inside that of test-time augmentation."""
    return model.get('module') or model


def _writes_maps(evaluator: Mapping) -> bool:
    from mmengine.registry import METRICS

    kind = evaluator.get('type')
    if isinstance(kind, str):
        with METRICS.switch_scope_and_registry(None) as registry:
            kind = registry.get(kind)
    return kind is not None and 'output_dir' in inspect.signature(kind).parameters


@contextlib.contextmanager
def _pickled(runner, out: str, library: str) -> Iterator[None]:
    """The library's own evaluator writes the pickle, and it is moved to its place at the end."""
    from mmengine.evaluator import DumpResults

    from psaq_mm.ranks import ranks

    kind: Any = DumpResults
    if library == 'mmdet':
        from mmdet.evaluation import DumpDetResults as kind  # masks as run lengths
    folder = os.path.dirname(os.path.abspath(out))
    with tempfile.TemporaryDirectory(dir=folder, prefix='.out.') as temporary:
        partial = os.path.join(temporary, 'predictions.pkl')
        runner.test_loop.evaluator.metrics.append(kind(out_file_path=partial))
        yield
        if not ranks()[0]:
            with whole_file(out) as whole:
                os.replace(partial, whole)


def _augment_(config, library: str) -> None:
    """The model and pipeline of test-time augmentation, in place; as the libraries' tools do it."""
    from psaq_mm.engine.data_overlap import dataset_leaves

    model = config.get('tta_model') or _TTA_MODELS.get(library)
    pipeline = config.get('tta_pipeline')
    absent = [name for name, value in (('tta_model', model), ('tta_pipeline', pipeline)) if not value]
    if 'tta_model' in absent or (absent and library not in _TTA_MODELS):
        raise ConfigError(
            f'--tta needs {" and ".join(absent)}, and the config {config.filename} has none: set '
            f'{"it" if len(absent) == 1 else "them"} as the configs of mmseg do, or leave --tta out'
        )
    for dataset in dataset_leaves(config.test_dataloader.dataset):
        dataset['pipeline'] = pipeline or _flipped(dataset.get('pipeline') or config.get('test_pipeline') or ())
    config.model = dict(model, module=config.model)


def _flipped(pipeline) -> List[Dict[str, Any]]:
    """A test pipeline that gives each picture as it is and flipped. As it is comes first: of the two, an evaluator that
    reads annotations from samples reads those of the first.
    """
    steps = [dict(step) for step in pipeline]
    if not steps:
        raise ConfigError('--tta needs test_dataloader.dataset.pipeline, and the config has none: set tta_pipeline')
    pack = steps[-1]
    keys = pack.get('meta_keys') or ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
    pack['meta_keys'] = tuple(dict.fromkeys((*keys, 'flip', 'flip_direction')))
    flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
    return [*steps[:-1], dict(type='TestTimeAug', transforms=[flips, [pack]])]
