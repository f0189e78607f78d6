# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Samples kept after a run, and used again by another: ``dfq.save_samples=True`` and ``dfq.samples=PATH``."""
import re
from pathlib import Path
from typing import Any, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from psaq_mm.engine.checkpoint import load_restricted, save_atomic
from psaq_mm.errors import ConfigError, DataError
from psaq_mm.synthesis import ImageSpec
from psaq_mm.visualization import write_png

__all__ = ['SavedSamples', 'load_samples', 'reads_rgb', 'save_samples']

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


def reads_rgb(preprocessor: Any) -> bool:
    """Whether a model takes its channels as RGB: the libraries load BGR, and their preprocessors turn it, or do not.

    Args:
        preprocessor: The model's ``data_preprocessor``; RGB where it says nothing.
    """
    for name in ('_channel_conversion', 'channel_conversion', 'to_rgb'):
        if hasattr(preprocessor, name):
            return bool(getattr(preprocessor, name))
    return True


def save_samples(folder, samples: Tensor, model: nn.Module, image_spec: ImageSpec, *, labels: Optional[Tensor] = None,
                 seed: int = 0, settings: Optional[Mapping] = None) -> Path:
    """Write ``samples.pt``, exact, and beside it ``samples/NNNN.png``, rounded to 8 bits for the eye.

    Args:
        folder: The work dir.
        samples: (n, C, H, W) in the model's units; kept as float32, so that ranges calibrated on them are the same again.
        model: Whose ``data_preprocessor`` tells the order of the channels.
        image_spec: Of the model.
        labels: Classes that they were made for, (n,).
        seed: Of the run.
        settings: How they were made, JSON types only.

    Returns:
        Path of ``samples.pt``.
    """
    folder, rgb = Path(folder), reads_rgb(getattr(model, 'data_preprocessor', None))
    samples = samples.detach().cpu().float()
    spec = dict(mean=list(image_spec.mean), std=list(image_spec.std), channels=image_spec.channels,
                max_value=image_spec.max_value)
    save_atomic(dict(samples=samples.clone(), labels=None if labels is None else labels.detach().cpu().clone(), image_spec=spec,
                     size=list(samples.shape[-2:]), rgb=rgb, seed=seed, settings=dict(settings or {})), folder / 'samples.pt')
    if image_spec.channels in (1, 3):  # other numbers are no picture
        raw = image_spec.to_raw(samples) * (255. / image_spec.max_value)
        for number, picture in enumerate(raw.round().to(torch.uint8)):
            picture = picture if rgb else picture.flip(0)
            array = picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)
            write_png(array.numpy(), folder / 'samples' / f'{number:04d}.png')
    return folder / 'samples.pt'


def load_samples(path, size: Tuple[int, int], model: nn.Module, image_spec: ImageSpec) -> SavedSamples:
    """Read ``samples.pt``, or every image of a folder, for a model.

    Samples that were made for another normalization, or another order of the channels, are converted. Images of a folder are
    sorted by name, made as large as covers ``size``, and cropped to it at the centre.

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
    path = Path(path)
    rgb = reads_rgb(getattr(model, 'data_preprocessor', None))
    if path.is_dir():
        return SavedSamples(_read_folder(path, tuple(size), image_spec, rgb), None)
    if not path.is_file():
        raise ConfigError(f'dfq.samples={path} does not exist: give a samples.pt or a folder of images')
    content = load_restricted(path)
    if not isinstance(content, dict) or not _KEYS <= set(content) or not isinstance(content['samples'], Tensor):
        raise DataError(f'dfq.samples={path} holds no samples: give a samples.pt that dfq.save_samples=True wrote, or a folder '
                        'of images')
    samples, labels = content['samples'].float(), content.get('labels')
    if samples.dim() != 4 or not len(samples) or not torch.isfinite(samples).all():
        raise DataError(f'dfq.samples={path} is damaged: its samples are of shape {tuple(samples.shape)} or not finite; make '
                        'them again')
    made_for = ImageSpec(**content['image_spec'])
    if samples.shape[1] != image_spec.channels:
        raise ConfigError(f'dfq.samples={path} has {samples.shape[1]} channels and the model takes {image_spec.channels}: make '
                          'samples with this model')
    if tuple(samples.shape[-2:]) != tuple(size):
        raise ConfigError(f'dfq.samples={path} has samples of {tuple(samples.shape[-2:])} and dfq.size is {tuple(size)}: set '
                          f'dfq.size={tuple(samples.shape[-2:])}, or make samples of that size')
    turned = content['rgb'] != rgb and samples.shape[1] == 3
    if made_for != image_spec or turned:
        pictures = made_for.to_raw(samples) / made_for.max_value
        samples = _from_unit(pictures.flip(1) if turned else pictures, image_spec)
    return SavedSamples(samples, labels)


def _from_unit(images: Tensor, image_spec: ImageSpec) -> Tensor:
    """Pictures (n, C, H, W) with values 0 .. 1 to the model's units."""
    low, high = (torch.tensor(v).view(-1, 1, 1) for v in (image_spec.low, image_spec.high))
    return low + images * (high - low)


def _read_folder(folder: Path, size: Tuple[int, int], image_spec: ImageSpec, rgb: bool) -> Tensor:
    modes = {1: 'L', 3: 'RGB'}
    if image_spec.channels not in modes:
        raise ConfigError(f'dfq.samples={folder} is a folder of images, and the model takes {image_spec.channels} channels: '
                          'give a samples.pt')
    known = Image.registered_extensions()
    files: List[Path] = sorted(p for p in folder.iterdir() if p.suffix.lower() in known and not _SHEET.fullmatch(p.name))
    if not files:
        raise DataError(f'dfq.samples={folder} has no images: give a folder of pictures, or a samples.pt')
    pictures = torch.stack([_read_picture(file, size, modes[image_spec.channels]) for file in files])
    return _from_unit(pictures if rgb else pictures.flip(1), image_spec)


def _read_picture(file: Path, size: Tuple[int, int], mode: str) -> Tensor:
    """(C, H, W), 0 .. 1: the centre of a picture made as large as covers ``size``."""
    try:
        with Image.open(file) as opened:
            picture = opened.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f'the image {file} cannot be read ({error}): remove it or save it again') from error
    height, width = size
    scale = max(height / picture.height, width / picture.width)
    if scale != 1:
        wanted = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
        picture = picture.resize(wanted, Image.Resampling.BICUBIC)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    array = np.array(picture.crop((left, top, left + width, top + height)), dtype=np.float32)
    return torch.from_numpy(array / 255.).reshape(height, width, -1).permute(2, 0, 1)
