# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which pictures are meant: files, folders of them, arrays."""

import os
from pathlib import Path
from typing import Any, List, NamedTuple, Sequence, Union

import numpy as np

from psaq_mm.errors import DataError, first_of
from psaq_mm.runtime.preparation import Picture

__all__ = ['Shown', 'listed', 'pictures_in']

ENDINGS = ('.bmp', '.jpeg', '.jpg', '.jp2', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
"""Of files in folders that are read. A file that is named itself may have any ending."""


class Shown(NamedTuple):
    """A picture, and where it goes.

    Attributes:
        path: Of its file.
        place: Of the drawn one in ``--out``: as in the folder that was named.
    """

    path: Path
    place: Path


def pictures_in(paths: Sequence[str]) -> List[Shown]:
    """Picture files, and those in folders and the folders inside them, sorted.

    Raises:
        DataError: A path does not exist, or there is no picture in any of them.
    """
    found: List[Shown] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            files = sorted(p for p in path.rglob('*') if p.suffix.lower() in ENDINGS and p.is_file())
            found += [Shown(file, file.relative_to(path)) for file in files]
        elif path.is_file():
            found.append(Shown(path, Path(path.name)))
        else:
            raise DataError(f'there is no picture and no folder {name}: check the path')
    if not found:
        raise DataError(
            f'there is no picture in {first_of(list(paths))}: name a folder with files that end in {", ".join(ENDINGS)}'
        )
    return _with_places(found)


def _with_places(pictures: Sequence[Shown]) -> List[Shown]:
    """The same pictures, each with a place of its own: two folders may hold files of one name."""
    used, placed = set(), []
    for path, place in pictures:
        unique, number = place, 0
        while str(unique).lower() in used:  # not every file system tells a from A
            number += 1
            unique = Path(str(number)) / place
        used.add(str(unique).lower())
        placed.append(Shown(path, unique))
    return placed


def listed(pictures: Union[Picture, Sequence[Picture]]) -> List[Any]:
    """Pictures one by one: paths of files, and arrays as they are.

    Args:
        pictures: The path of a file or a folder, an array (H, W, C) or (N, H, W, C), or a list of such.

    Raises:
        DataError: A path does not exist, or there is no picture in what is given.

    Example:
        >>> listed(['street.jpg', np.zeros((8, 8, 3), np.uint8)])
        [PosixPath('street.jpg'), array(...)]
    """
    if isinstance(pictures, (str, os.PathLike)):
        return [shown.path for shown in pictures_in([os.fspath(pictures)])]
    if isinstance(pictures, np.ndarray) and pictures.ndim != 4:
        return [pictures]
    if not len(pictures):
        raise DataError('there is no picture in what is given: give at least one')
    return [one for picture in pictures for one in listed(picture)]
