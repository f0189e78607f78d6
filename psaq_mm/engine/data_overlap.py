# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Refuses samples that are pictures of the test set, as far as the config tells without opening a dataset."""

import os
from typing import Any, Iterator, List, Mapping, NamedTuple

from psaq_mm.errors import ConfigError

__all__ = ['check_folder', 'check_no_overlap', 'dataset_leaves']


class _Files(NamedTuple):
    """What a dataset reads: annotation file and image folder, absolute or empty, and the name of a split of them."""

    annotations: str
    images: str
    split: str


def dataset_leaves(dataset: Any) -> Iterator[Mapping]:
    """The dataset configs inside wrappers such as ``RepeatDataset``; without a wrapper the config itself."""
    if isinstance(dataset, (list, tuple)):
        for member in dataset:
            yield from dataset_leaves(member)
    elif isinstance(dataset, Mapping):
        inner = dataset.get('dataset') or dataset.get('datasets')
        if isinstance(inner, (Mapping, list, tuple)):
            yield from dataset_leaves(inner)
        else:
            yield dataset


def _path(root: str, name: Any) -> str:
    name = name if isinstance(name, str) else ''
    path = os.path.join(root, name)
    return path if not path or '://' in path else os.path.realpath(path)


def _files(leaf: Mapping) -> _Files:
    root = leaf.get('data_root') or ''
    prefix = leaf.get('data_prefix') or ''
    if isinstance(prefix, Mapping):  # mmdet says img, mmseg and mmpretrain img_path
        prefix = prefix.get('img_path') or prefix.get('img') or ''
    annotations = _path(root, leaf['ann_file']) if leaf.get('ann_file') else ''
    return _Files(annotations, _path(root, prefix), str(leaf.get('split') or ''))


def _inside(folder: str, other: str) -> bool:
    return folder == other or folder.startswith(other.rstrip(os.sep) + os.sep)


def _same(one: _Files, other: _Files) -> bool:
    if one.split != other.split:
        return False
    if one.annotations and other.annotations:
        return one.annotations == other.annotations and one.images == other.images
    if not one.images or not other.images:
        return False
    # Without an annotation file every picture below the folder is read.
    return (not other.annotations and _inside(one.images, other.images)) or (
        not one.annotations and _inside(other.images, one.images)
    )


def check_no_overlap(config: Mapping) -> None:
    """Refuse real images from a training set that is the test or validation set under another name.

    Annotation files and image folders are compared (symbolic links followed), inside dataset wrappers too. Without an
    annotation file a dataset reads every picture below its folder, so a folder overlaps with all folders inside it.

    Args:
        config: A config with ``train_dataloader``, and ``test_dataloader`` or ``val_dataloader``; the others may be
            absent.

    Raises:
        ConfigError: Both read the same files.
    """
    training: List[_Files] = [
        _files(leaf) for leaf in dataset_leaves((config.get('train_dataloader') or {}).get('dataset'))
    ]
    for loader in ('test_dataloader', 'val_dataloader'):
        for leaf in dataset_leaves((config.get(loader) or {}).get('dataset')):
            shared = next((files for files in training if _same(files, _files(leaf))), None)
            if shared is not None:
                raise ConfigError(
                    'real images would come from the set that is evaluated: train_dataloader and '
                    f'{loader} both read {shared.annotations or shared.images}; point train_dataloader.dataset '
                    "at training images, or leave out the source 'real'"
                )


def check_folder(config: Mapping, folder: Any) -> None:
    """Refuse a folder of images that a config's test or validation set reads.

    A folder inside that of a set is refused too, even with an annotation file: the config does not tell which pictures
    the file lists.

    Args:
        config: A config with ``test_dataloader`` or ``val_dataloader``; both may be absent.
        folder: The folder; a file has no overlap.

    Raises:
        ConfigError: A set that is evaluated reads its pictures.
    """
    if not os.path.isdir(folder):
        return
    samples = os.path.realpath(folder)
    for loader in ('test_dataloader', 'val_dataloader'):
        for leaf in dataset_leaves((config.get(loader) or {}).get('dataset')):
            read = _files(leaf).images
            if read and _inside(samples, read):
                raise ConfigError(
                    f'the samples in {folder} would come from the set that is evaluated: {loader} reads its pictures '
                    f'in {read}; give a folder that is not inside it'
                )
