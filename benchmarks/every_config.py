# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which configs of mmdet, mmseg and mmpretrain can be quantized: all that have a transformer or ConvNeXt backbone.

    python benchmarks/every_config.py --library mmseg --json work_dirs/mmseg.json
    python benchmarks/every_config.py --library mmpretrain --filter beit
    python benchmarks/every_config.py --merge work_dirs/*.json --json docs/results/every_config.json

Every config in the installed package's ``.mim/configs`` is read. Its model is made small (``benchmarks/shrinking.py``),
built with random weights, quantized under ``scope='backbone'`` and again under ``scope='full'``, calibrated on one
picture of noise and run. Configs that give one model after shrinking are tried once. Nothing is downloaded: a language
model is left out or replaced by a stand-in, and where the rest cannot be built without it, the image tower is tried
alone.

A result is ``quantized``, ``refused`` (psaq_mm says in a sentence why) or ``failed`` (another error: a defect). A
config that cannot be read, or whose model needs what is not installed, is told apart.
"""

import argparse
import copy
import glob
import importlib
import inspect
import json
import re
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import shrinking  # noqa: E402
from psaq_mm.engine.config import drop_pretrained  # noqa: E402
from psaq_mm.errors import PsaqError  # noqa: E402
from psaq_mm.models import TaskModel, quantize_model_  # noqa: E402
from psaq_mm.models.network import find_backbone, network_of  # noqa: E402
from psaq_mm.quantization import calibrate  # noqa: E402
from psaq_mm.tables import markdown_table  # noqa: E402
from psaq_mm.type_names import type_name  # noqa: E402

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')
SIZE = (64, 128)
"""Height and width of the noise where a network takes any, in pixels."""

NOT_COUNTED = {
    **dict.fromkeys(
        (
            'ResNet ResNetV1c ResNetV1d ResNet_CIFAR ModifiedResNet SparseResNet ResNeXt SEResNet SEResNeXt ResNeSt '
            'Res2Net RegNet TridentResNet DetectoRS_ResNet OFAResNet HRNet UNet ICNet BiSeNetV1 BiSeNetV2 '
            'STDCContextPathNet PIDNet CGNet DDRNet ERFNet FastSCNN VGG SSDVGG RepVGG AlexNet LeNet5 HourglassNet '
            'Darknet CSPDarknet CSPDarkNet CSPResNet CSPResNeXt CSPNeXt InceptionV3 DenseNet EfficientNet '
            'EfficientNetV2 MobileNetV2 MobileNetV3 MobileOne ShuffleNetV1 ShuffleNetV2 ConvMixer RepLKNet VAN HorNet '
            'MSCAN'
        ).split(),
        'a convolutional network',
    ),
    **dict.fromkeys(('MlpMixer', 'RepMLPNet'), 'an MLP over tokens, without attention'),
    **dict.fromkeys(('Vig', 'PyramidVig'), 'a graph network'),
}
"""Backbones that are neither transformers nor ConvNeXt, and why. All others count, PoolFormer and RIFormer too."""

_NEED_MASKS = ('SparK', 'MILAN', 'MFF')
_NOT_TIMM = ('efficientnet', 'resnet')


class Built(NamedTuple):
    """A model at reduced size.

    Attributes:
        model: The float model, or its image tower alone.
        alone: Why it is the tower alone; None where it is the whole model.
        images: Noise that it takes.
        runs: Whether its backbone takes pictures alone: those of SparK and MILAN need what training gives
            them, and MFF's drops patches at random.
    """

    model: nn.Module
    alone: Optional[str]
    images: Tensor
    runs: bool = True


# ---------------------------------------------------------------------- configs
def configs_of(library: str, pattern: str = '') -> Iterator[Tuple[str, Any]]:
    """Path (inside ``.mim/configs``) and model config of each config that has a model; the error where it has none.

    Args:
        library: Name of the package.
        pattern: Text that is in the paths looked at.
    """
    from mmengine.config import Config

    root = Path(importlib.import_module(library).__file__).parent / '.mim' / 'configs'
    for path in sorted(glob.glob(f'{root}/**/*.py', recursive=True)):
        name = str(Path(path).relative_to(root))
        if '_base_' in name or pattern not in name:
            continue
        try:
            model = Config.fromfile(path).get('model')
        except Exception as error:  # a config of the library that does not load is a result
            yield name, error
            continue
        if model is not None:
            yield name, shrinking.plain(model)


def backbone_class(model: Dict) -> Optional[str]:
    """Bare class name of a config's backbone, the name of timm's model with it; None where the config has none."""
    path = shrinking.tower_path(model)
    if path is None:
        return None
    tower = shrinking.part_of(model, path)
    name = type_name(tower)
    if path[-1] == 'module':
        name = f'{type_name(model[path[0]])}({name})'
    return f'{name}({tower["model_name"]})' if 'model_name' in tower else name


def counts(model: Dict) -> bool:
    """Whether the backbone of a config is a transformer or a ConvNeXt."""
    name = backbone_class(model)
    return name is not None and name not in NOT_COUNTED and not any(part in name for part in _NOT_TIMM)


# ---------------------------------------------------------------------- building
def _scoped_build(library: str, config: Dict) -> nn.Module:
    from mmengine.config import ConfigDict
    from mmengine.registry import MODELS, DefaultScope

    with DefaultScope.overwrite_default_scope(library):
        model = MODELS.build(ConfigDict(copy.deepcopy(config)))
    with torch.no_grad():
        for parameter in model.parameters():
            if not (
                parameter.isfinite().all() and parameter.abs().max() < 1e3
            ):  # as memory was: init_weights is not run
                parameter.normal_(std=0.02)
    model.eval()  # returns None in some libraries
    return model


def _class_of(library: str, config: Dict) -> type:
    from mmengine.registry import MODELS, DefaultScope

    kind = config['type']
    with DefaultScope.overwrite_default_scope(library), MODELS.switch_scope_and_registry(library) as registry:
        found = kind if isinstance(kind, type) else registry.get(kind)
    if found is None:
        raise KeyError(f'{type_name(config)} is not registered: its package is not installed')
    return found


def images_for(model: nn.Module, tower: Dict) -> Tensor:
    """Noise (1, C, H, W) of a size that a model takes."""
    side = tower.get('img_size') or shrinking.image_side(type(network_of(model)))
    size = (side, side) if isinstance(side, int) else tuple(side) if side else SIZE
    channels = next((part.in_channels for part in model.modules() if isinstance(part, nn.Conv2d)), 3)
    return torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))


def run_backbone(model: nn.Module, images: Tensor) -> List[Tensor]:
    """Outputs of a model's backbone; those of a backbone in pretraining without a mask."""
    backbone = find_backbone(model)
    unmasked = (None,) if 'mask' in inspect.signature(backbone.forward).parameters else ()
    with torch.no_grad():
        return tensors(backbone(images, *unmasked))


def tensors(outputs: Any) -> List[Tensor]:
    """The tensors of floating point in nested outputs, in order."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, dict):
        outputs = outputs.values()
    return [tensor for one in outputs for tensor in tensors(one)] if hasattr(outputs, '__iter__') else []


def _widths(outputs: Sequence[Tensor]) -> List[int]:
    return [output.shape[1 if output.dim() == 4 else -1] for output in outputs]


def _build(library: str, config: Dict, widths: bool) -> Built:
    """Build a model at reduced size, or its image tower where the rest cannot be built."""
    config = copy.deepcopy(config)
    path = shrinking.tower_path(config)
    tower = shrinking.part_of(config, path)
    cls = _class_of(library, tower)
    arch, settings = shrinking.shrink_tower(tower, cls, widths)
    shrinking.shrink_others(config)
    shrinking.drop_training_parts(config)
    shrinking.replace_text(config)
    with shrinking.table_entry(cls, arch, settings), shrinking.no_downloads():
        part = _scoped_build(library, tower)
        images = images_for(part, tower)
        runs = type_name(config) not in _NEED_MASKS
        if widths and runs:
            shrinking.follow_widths(config, _widths(run_backbone(part, images)))
        try:
            whole = _scoped_build(library, config)
        except Exception as error:  # what the rest needs is told; the tower can be tried all the same
            return Built(part, _one_line(error), images, runs)
    if find_backbone(whole) is whole:  # the tower has another name in this model
        return Built(part, f'{type(whole).__name__} keeps its image tower under another name', images, runs)
    return Built(whole, None, images, runs)


def build_small(library: str, config: Dict) -> Built:
    """A model at reduced size that runs in floating point: with reduced widths where the heads can follow.

    Raises:
        Exception: What the backbone raises with its own widths.
    """
    candidates: List[Built] = []
    for widths in (True, False):
        try:
            built = _build(library, config, widths)
            candidates.append(built)
            if built.alone is None and _full_runs(built):
                return built
        except Exception:
            if not widths and not candidates:
                raise
    whole = [built for built in candidates if built.alone is None]
    return (whole or candidates)[-1]


def _full_runs(built: Built) -> bool:
    try:
        TaskModel(built.model).calibration_forward(built.images, 'full')
    except Exception:  # of any kind: a mask is missing, a width does not fit
        return False
    return True


# ---------------------------------------------------------------------- quantizing
def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not isinstance(error, PsaqError):
        # A path names this machine: what is left of it begins at the package.
        text = re.sub(r'[^\s\'"]*/site-packages/', '', ' '.join(lines[:2]))
        return f'{type(error).__name__}: {text}'[:200]
    return ' '.join(lines).partition(': use one of')[0]  # of all supported backbones: the same in all sentences


def _outcome(attempt: Callable[[], Dict]) -> Dict:
    """What an attempt gives, or why it did not."""
    try:
        return dict(result='quantized', **attempt())
    except PsaqError as error:
        return dict(result='refused', reason=_one_line(error))
    except Exception as error:  # a defect, to be shown among the results
        return dict(result='failed', reason=_one_line(error))


def quantize_backbone(built: Built) -> Dict:
    """Quantize, calibrate and run the backbone: the relative error of its outputs at W8A8, and why it is alone."""
    model = copy.deepcopy(built.model)
    if not built.runs:
        quantize_model_(model, dict(w_bits=8, a_bits=8, scope='backbone'))
        return dict(error=None, alone=built.alone)
    expected = run_backbone(built.model, built.images)
    quantize_model_(model, dict(w_bits=8, a_bits=8, scope='backbone'))
    calibrate(model, lambda: run_backbone(model, built.images), allow_unseen=find_backbone(model) is model)
    results = run_backbone(model, built.images)
    error = float(max((a - b).norm() / b.norm().clamp_min(1e-9) for a, b in zip(results, expected)))
    return dict(error=error, alone=built.alone)


def quantize_all(built: Built) -> Dict:
    """Quantize and calibrate backbone, neck and heads."""
    model = copy.deepcopy(built.model)
    quantize_model_(model, dict(w_bits=8, a_bits=8, scope='full'))
    calibrate(model, lambda: TaskModel(model).calibration_forward(built.images, 'full'))
    return {}


def try_model(library: str, config: Dict) -> Dict:
    """Both scopes for a model config."""
    config = copy.deepcopy(config)
    drop_pretrained(config)
    try:
        built = build_small(library, config)
    except Exception as error:  # the library's own, with no code of psaq_mm
        return dict(backbone_scope=dict(result='not built', reason=_one_line(error)), full_scope=None)
    backbone = _outcome(lambda: quantize_backbone(built))
    if built.alone:
        full = dict(result='not built', reason=built.alone)
    elif backbone['result'] != 'quantized':
        full = backbone
    else:
        full = _outcome(lambda: quantize_all(built))
    return dict(backbone_scope=backbone, full_scope=full)


def survey(library: str, pattern: str = '') -> List[Dict]:
    """A row for each config that counts, and for each that cannot be read."""
    importlib.import_module(f'{library}.models')
    if library == 'mmdet':
        shrinking.register_tiny_text()
    rows, tried = [], {}
    for name, model in configs_of(library, pattern):
        if isinstance(model, Exception):
            rows.append(dict(library=library, config=name, backbone=None, unread=_one_line(model)))
            continue
        if not counts(model):
            continue
        key = _key(library, model)
        if key not in tried:
            tried[key] = try_model(library, model)
            done = tried[key]['backbone_scope']
            print(f'{library} {name}: {done["result"]} {done.get("reason", "")}', flush=True)
        rows.append(
            dict(library=library, config=name, model=type_name(model), backbone=backbone_class(model), **tried[key])
        )
    return rows


def _key(library: str, model: Dict) -> str:
    """Equal for configs that give one model after shrinking: widths, schedules and file names of weights differ."""
    model = copy.deepcopy(model)
    path = shrinking.tower_path(model)
    tower = shrinking.part_of(model, path)
    try:
        _, settings = shrinking.shrink_tower(tower, _class_of(library, tower), True)
    except KeyError:  # a class that is not installed
        return json.dumps(model, sort_keys=True, default=str)
    if settings:
        tower['arch'] = settings
    shrinking.shrink_others(model)
    return json.dumps(_bare(model), sort_keys=True, default=str)


_NO_STRUCTURE = ('cfg', 'data_preprocessor', 'pretrained', 'drop_path_rate', 'prompt', 'in_channels', 'num_classes')
"""Keys of a model's config that end in these change nothing of what is quantized, but for widths."""


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        kept = (
            'norm_cfg',
            'act_cfg',
            'conv_cfg',
            'attn_cfg',
            'layer_cfg',
            'self_attn_cfg',
            'cross_attn_cfg',
            'ffn_cfg',
        )
        return {
            key: _bare(one)
            for key, one in value.items()
            if (key in kept or not key.endswith(_NO_STRUCTURE)) and not key.startswith('loss')
        }
    return [_bare(one) for one in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------- reporting
def _result(row: Dict, scope: str) -> str:
    return (row.get(scope) or {}).get('result', '')


def counted(rows: Iterable[Dict]) -> List[Dict]:
    """The rows of configs that were read."""
    return [row for row in rows if row['backbone']]


def by_backbone(rows: Iterable[Dict]) -> str:
    """Markdown: configs by library and backbone, how many are quantized under each scope."""
    groups: Dict[Tuple[str, str], List[Dict]] = {}
    for row in counted(rows):
        groups.setdefault((row['library'], row['backbone']), []).append(row)
    cells = [
        (
            library,
            backbone,
            len(group),
            *(sum(_result(row, scope) == 'quantized' for row in group) for scope in ('backbone_scope', 'full_scope')),
        )
        for (library, backbone), group in sorted(groups.items(), key=lambda one: (one[0][0], -len(one[1]), one[0][1]))
    ]
    return markdown_table(('library', 'backbone', 'configs', "quantized, scope='backbone'", "scope='full'"), cells)


def summary(rows: Sequence[Dict]) -> str:
    """Counts in a few lines: configs that count, quantized, refused, failed, not built, not read."""
    tried = counted(rows)
    lines = []
    for scope in ('backbone', 'full'):
        numbers = Counter(_result(row, f'{scope}_scope') or 'not built' for row in tried)
        refused = len(tried) - numbers['quantized']
        told = ', '.join(f'{number} {name}' for name, number in numbers.most_common())
        share = 100 * refused / max(len(tried), 1)
        lines.append(f"- `scope='{scope}'`, {len(tried)} configs: {told}; not quantized {share:.1f} %")
    alone = sum(bool(row['backbone_scope'].get('alone')) for row in tried)
    lines.append(f'- of the quantized ones under `backbone`, {alone} are the image tower alone')
    reasons = Counter((row['library'], row['unread'].partition(':')[0]) for row in rows if 'unread' in row)
    lines += [
        f'- {number} configs of {library} cannot be read: {error}' for (library, error), number in reasons.items()
    ]
    return '\n'.join(lines)


def left_out(rows: Iterable[Dict], scope: str) -> str:
    """Markdown: what is not quantized under a scope and why, the most frequent first."""
    groups: Dict[Tuple[str, ...], List[str]] = {}
    for row in counted(rows):
        outcome = row.get(scope) or {}
        if outcome.get('result') == 'quantized':
            continue
        part = row['backbone'] if scope == 'backbone_scope' else f'{row["model"]}, {row["backbone"]}'
        key = (row['library'], part, outcome.get('result', 'not built'), outcome.get('reason', ''))
        groups.setdefault(key, []).append(row['config'])
    cells = [(len(names), *key) for key, names in sorted(groups.items(), key=lambda one: (-len(one[1]), one[0]))]
    return markdown_table(('configs', 'library', 'part', 'result', 'reason'), cells) if cells else 'none.'


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--library', choices=LIBRARIES, nargs='+', default=())
    parser.add_argument('--filter', default='', help='text that is in the paths of the configs to try')
    parser.add_argument('--json', type=Path, help='where the rows are written')
    parser.add_argument(
        '--merge',
        type=Path,
        nargs='+',
        default=(),
        help='files of rows that are read, not tried; of a config that is in several, the last row counts',
    )
    args = parser.parse_args(argv)
    warnings.simplefilter('ignore')
    torch.manual_seed(0)
    rows = [row for path in args.merge for row in json.loads(path.read_text(encoding='utf-8'))]
    for library in args.library:
        begun = time.perf_counter()
        rows += survey(library, args.filter)
        print(f'{library}: {time.perf_counter() - begun:.0f} s')
    rows = list({(row['library'], row['config']): row for row in rows}.values())  # the last of each
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        lines = ',\n'.join(json.dumps(row) for row in rows)
        args.json.write_text(f'[\n{lines}\n]\n', encoding='utf-8')
    print(f'\n{by_backbone(rows)}\n\n{summary(rows)}')
    for scope in ('backbone_scope', 'full_scope'):
        print(f'\nnot quantized, {scope}:\n\n{left_out(rows, scope)}')
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
