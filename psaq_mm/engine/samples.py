# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Sources of a run: the function that builds them, and those that read files (``dfq.samples=PATH``)."""

import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from psaq_mm.engine.checkpoint import load_restricted, save_atomic
from psaq_mm.engine.data_overlap import check_folder
from psaq_mm.engine.real_images import TrainingImages
from psaq_mm.errors import ConfigError, DataError
from psaq_mm.models.task import reads_rgb
from psaq_mm.pictures import SOURCES, Generated, ImageSpec, Source, SourceConfig, register_source, source_of
from psaq_mm.pictures.base import Make, checked_size, mixed
from psaq_mm.pictures.image_spec import EIGHT_BITS
from psaq_mm.registry import TASK_UTILS
from psaq_mm.visualization import write_png

__all__ = [
    'Folder',
    'Saved',
    'SavedSamples',
    'build_source',
    'is_named',
    'load_samples',
    'reads_training_set',
    'samples_of',
    'save_samples',
]

_SHEET = re.compile(r'round_\d+_step_\d+\.png')
"""Sample sheets, which a run writes into the same folder."""

_KEYS = {'samples', 'image_spec', 'size', 'rgb'}


class SavedSamples(NamedTuple):
    """Samples that were read.

    Attributes:
        samples: (n, C, H, W), float32, in the model's units.
        labels: Classes that they were made for, (n,), or None.
    """

    samples: Tensor
    labels: Optional[Tensor]


def save_samples(
    folder,
    samples: Tensor,
    model: nn.Module,
    image_spec: ImageSpec,
    *,
    labels: Optional[Tensor] = None,
    seed: int = 0,
    settings: Optional[Mapping] = None,
) -> Path:
    """Write ``samples.pt``, exact, and beside it ``samples/NNNN.png``, rounded to 8 bits for the eye.

    Args:
        folder: The work dir.
        samples: (n, C, H, W) in the model's units; kept as float32, so that ranges calibrated on them are the same
            again.
        model: Whose ``data_preprocessor`` tells the order of the channels.
        image_spec: Of the model.
        labels: Classes that they were made for, (n,).
        seed: Of the run.
        settings: How they were made, JSON types only.

    Returns:
        Path of ``samples.pt``.
    """
    folder, rgb = Path(folder), reads_rgb(model)
    samples = samples.detach().cpu().float()
    spec = dict(
        mean=list(image_spec.mean),
        std=list(image_spec.std),
        channels=image_spec.channels,
        max_value=_plain_value(image_spec.max_value),
    )
    if image_spec.min_value:
        spec['min_value'] = _plain_value(image_spec.min_value)
    save_atomic(
        dict(
            samples=samples.clone(),
            labels=None if labels is None else labels.detach().cpu().clone(),
            image_spec=spec,
            size=list(samples.shape[-2:]),
            rgb=rgb,
            seed=seed,
            settings=dict(settings or {}),
        ),
        folder / 'samples.pt',
    )
    if image_spec.channels in (1, 3):  # other numbers are no picture
        for number, picture in enumerate(image_spec.to_bytes(samples).round().to(torch.uint8)):
            picture = picture if rgb else picture.flip(0)
            array = picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)
            write_png(array.numpy(), folder / 'samples' / f'{number:04d}.png')
    return folder / 'samples.pt'


def load_samples(path, size: Tuple[int, int], model: nn.Module, image_spec: ImageSpec) -> SavedSamples:
    """Read ``samples.pt``, or every image of a folder, for a model.

    Samples that were made for another normalization, or another order of the channels, are converted. Images of a
    folder are sorted by name, made as large as covers ``size``, and cropped to it at the centre.

    Args:
        path: A ``samples.pt``, or a folder of images in any format that Pillow reads.
        size: (height, width) of the run.
        model: Whose ``data_preprocessor`` tells the order of the channels.
        image_spec: Of the model.

    Raises:
        ConfigError: Nothing is there, or the samples have another size or number of channels.
        DataError: The folder has no images, or a file is damaged or none of ours.
        CheckpointError: The file would run code.
    """
    return _load(Path(path), tuple(size), image_spec, reads_rgb(model))


def _load(path: Path, size: Tuple[int, int], image_spec: ImageSpec, rgb: bool) -> SavedSamples:
    if path.is_dir():
        files, mode = _images_of(path, image_spec)
        return SavedSamples(_read_pictures(files, size, mode, image_spec, rgb), None)
    if not path.is_file():
        raise ConfigError(f'dfq.samples={path} does not exist: give a samples.pt or a folder of images')
    content = load_restricted(path)
    if not isinstance(content, dict) or not _KEYS <= set(content) or not isinstance(content['samples'], Tensor):
        raise DataError(
            f'dfq.samples={path} holds no samples: give a samples.pt that dfq.save_samples=True wrote, or a folder '
            'of images'
        )
    samples, labels = content['samples'].float(), content.get('labels')
    if samples.dim() != 4 or not len(samples) or not torch.isfinite(samples).all():
        raise DataError(
            f'dfq.samples={path} is damaged: its samples are of shape {tuple(samples.shape)} or not finite; make '
            'them again'
        )
    made_for = ImageSpec(**content['image_spec'])
    if samples.shape[1] != image_spec.channels:
        raise ConfigError(
            f'dfq.samples={path} has {samples.shape[1]} channels and the model takes {image_spec.channels}: make '
            'samples with this model'
        )
    if tuple(samples.shape[-2:]) != tuple(size):
        raise ConfigError(
            f'dfq.samples={path} has samples of {tuple(samples.shape[-2:])} and dfq.size is {tuple(size)}: set '
            f'dfq.size={tuple(samples.shape[-2:])}, or make samples of that size'
        )
    turned = content['rgb'] != rgb and samples.shape[1] == 3
    if made_for != image_spec or turned:
        pictures = made_for.to_unit(samples)
        samples = image_spec.from_unit(pictures.flip(1) if turned else pictures)
    return SavedSamples(samples, labels)


def _plain_value(value: Union[float, Tuple[float, ...]]) -> Union[float, List[float]]:
    return list(value) if isinstance(value, tuple) else value


def _read_pictures(files: Sequence[Path], size: Tuple[int, int], mode: str, image_spec: ImageSpec, rgb: bool) -> Tensor:
    """Pictures (n, C, H, W) in the model's units."""
    pictures = torch.stack([_read_picture(file, size, mode, image_spec) for file in files])
    return image_spec.from_unit(pictures if rgb else pictures.flip(1))


def _images_of(folder: Path, image_spec: ImageSpec) -> Tuple[List[Path], str]:
    """Images of a folder in the order of their names, and Pillow's mode that they are read in."""
    modes = {1: 'L', 3: 'RGB'}
    if image_spec.channels not in modes:
        raise ConfigError(
            f'dfq.samples={folder} is a folder of images, and the model takes {image_spec.channels} channels: '
            'give a samples.pt'
        )
    known = Image.registered_extensions()
    files: List[Path] = sorted(
        p for p in folder.iterdir() if p.suffix.lower() in known and not _SHEET.fullmatch(p.name)
    )
    if not files:
        raise DataError(f'dfq.samples={folder} has no images: give a folder of pictures, or a samples.pt')
    return files, modes[image_spec.channels]


def _read_picture(file: Path, size: Tuple[int, int], mode: str, image_spec: ImageSpec) -> Tensor:
    """(C, H, W), 0 .. 1: the centre of a picture made as large as covers ``size``.

    Grey pictures of 16 bits or of floats hold raw values where the model's range is not that of 8 bits; under a model
    of 8 bits those of 16 bits are made as bright as their 8-bit form.
    """
    try:
        with Image.open(file) as opened:
            kind, depth = opened.mode, str(opened.tile[0][3]) if opened.tile else ''
            deep = kind == 'F' or kind.startswith('I')
            picture = opened.convert('F' if deep else mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f'the image {file} cannot be read ({error}): remove it or save it again') from error
    if not deep and '16' in depth and image_spec.max_value not in (EIGHT_BITS[1], 65535.0):
        raise DataError(
            f'the image {file} has 16 bits a colour, of which 8 are read, and the model takes values up to '
            f'{image_spec.max_value}: give a samples.pt'
        )
    height, width = size
    scale = max(height / picture.height, width / picture.width)
    if scale != 1:
        wanted = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
        picture = picture.resize(wanted, Image.Resampling.BICUBIC)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    array = np.array(picture.crop((left, top, left + width, top + height)), dtype=np.float32)
    if not deep:
        return torch.from_numpy(array / 255.0).reshape(height, width, -1).permute(2, 0, 1)
    raw = torch.from_numpy(array).expand(image_spec.channels, height, width)
    if kind != 'F' and (image_spec.min_value, image_spec.max_value) == EIGHT_BITS:
        return (raw / 65535.0).clamp(0, 1)
    return ImageSpec(
        channels=image_spec.channels, max_value=image_spec.max_value, min_value=image_spec.min_value
    ).to_unit(raw)


# ---------------------------------------------------------------------- sources
class _Files(Source):
    """A source that reads a folder of images, or a ``samples.pt``."""

    def __init__(self, path: str, rgb: Optional[bool] = None, seed: int = 0) -> None:
        super().__init__(seed)
        self.path, self.rgb = str(path), rgb
        if not Path(path).exists():
            raise ConfigError(f'the folder of samples {path} does not exist: check the path')

    @property
    def paths(self) -> List[str]:
        """See :attr:`psaq_mm.pictures.Source.paths`."""
        return [self.path]

    def open(self, model: nn.Module, config: Mapping, seed: int) -> None:
        """See :meth:`psaq_mm.pictures.Source.open`.

        Raises:
            ConfigError: A set that is evaluated reads the folder.
        """
        check_folder(config, self.path)
        if self.rgb is None:
            self.rgb = reads_rgb(model)


@register_source()
@TASK_UTILS.register_module()
class Folder(_Files):
    """All pictures of a folder or a ``samples.pt``, in a random order for each seed; then again in another order.

    Images are read when their number comes. Of an image larger than the samples, the centre is taken, as
    :func:`load_samples` does.

    Args:
        path: A folder of images in any format that Pillow reads, or a file that ``dfq.save_samples=True`` wrote.
        rgb: Whether the model takes its channels as RGB. Defaults to None: :meth:`open` asks the model.
        seed: As for :class:`~psaq_mm.pictures.Source`.

    Raises:
        ConfigError: Nothing is there.
    """

    def __init__(self, path: str, rgb: Optional[bool] = None, seed: int = 0) -> None:
        super().__init__(path, rgb, seed)
        self._read: Dict[Tuple, Any] = {}

    def draw(
        self,
        numbers: Sequence[int],
        size: Tuple[int, int],
        image_spec: ImageSpec,
        seed: int = 0,
        generated: Optional[Make] = None,
    ) -> Tensor:
        """See :meth:`psaq_mm.pictures.Source.draw`."""
        size, rgb = checked_size(len(numbers), size), self.rgb is not False
        if Path(self.path).is_dir():
            files, mode = self._once((image_spec.channels,), lambda: _images_of(Path(self.path), image_spec))
            places = self._places(numbers, len(files), seed)
            return _read_pictures([files[place] for place in places], size, mode, image_spec, rgb)
        samples = self._once((size, image_spec), lambda: _load(Path(self.path), size, image_spec, rgb).samples)
        return samples[self._places(numbers, len(samples), seed)]

    def _once(self, key: Tuple, read) -> Any:
        if key not in self._read:
            self._read = {key: read()}
        return self._read[key]

    def _places(self, numbers: Sequence[int], count: int, seed: int) -> List[int]:
        """Index of the image of each number: every image once in each turn of ``count`` numbers."""
        places, orders = [], {}
        for number in numbers:
            turn = number // count
            if turn not in orders:
                generator = torch.Generator().manual_seed(mixed(seed, self.seed, turn) % 2**32)
                orders[turn] = torch.randperm(count, generator=generator).tolist()
            places.append(orders[turn][number % count])
        return places


@register_source()
@TASK_UTILS.register_module()
class Saved(_Files, Generated):
    """The samples of a file or folder as the first ones of a run, in their order; later ones are synthesized.

    Args:
        path: As for :class:`Folder`.
        rgb: As for :class:`Folder`.
        seed: As for :class:`~psaq_mm.pictures.Source`.

    Raises:
        ConfigError: Nothing is there.
    """

    def read(self, size: Tuple[int, int], image_spec: ImageSpec) -> SavedSamples:
        """All samples of the file or folder, as :func:`load_samples`."""
        return _load(Path(self.path), tuple(size), image_spec, self.rgb is not False)


def is_named(config: SourceConfig) -> bool:
    """Whether a config of a source is the name of one; any other string is a path."""
    return isinstance(config, str) and config in SOURCES


def build_source(
    config: SourceConfig,
    model: Optional[nn.Module] = None,
    run: Optional[Mapping] = None,
    seed: int = 0,
) -> Source:
    """Build the source that a config names, and open it for a run.

    Args:
        config: As for :func:`psaq_mm.pictures.source_of`; a type may also be registered in
            :data:`psaq_mm.registry.TASK_UTILS`.
        model: The network that gets the pictures. Defaults to None: the source is not opened.
        run: The run's config.
        seed: The run's seed.

    Raises:
        ConfigError: It is no source, a type or a setting is unknown, or it reads pictures that are evaluated.
        DataError: A setting is out of range, or files cannot be read.
    """
    source = source_of(config, TASK_UTILS.get)
    if model is not None:
        source.open(model, run or {}, seed)
    return source


def reads_training_set(config: SourceConfig) -> bool:
    """Whether a config of a source takes images of the training set, in a mixture too."""
    if isinstance(config, str) and not is_named(config):
        return False
    source = build_source(config)
    return any(isinstance(member, TrainingImages) for member in getattr(source, 'sources', [source]))


def samples_of(config: SourceConfig, model: nn.Module, run: Mapping, seed: int = 0) -> Source:
    """The source that ``dfq.samples`` names: as :func:`build_source`, but a path gives the first samples alone."""
    saved = isinstance(config, str) and not is_named(config) and Path(config).exists()
    return build_source(dict(type=Saved, path=config) if saved else config, model, run, seed)
