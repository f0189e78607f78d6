# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What every floor may ask of a file; the standard library alone, as an exported model is read without PyTorch."""
import hashlib
import os
from typing import Union

__all__ = ['file_sha256']


def file_sha256(path: Union[str, os.PathLike]) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()
