"""Products in float32 where a GPU would shorten their factors on its own.

NVIDIA's cards since Ampere multiply float32 as TF32, with 10 binary digits after the point in place of 23; PyTorch
allows it to convolutions unless it is told otherwise (``torch.backends.cudnn.allow_tf32``), and to products of matrices
on request. A quantized weight is a code of up to 8 bits times a float32 scale, and so is an activation. Such a number
has more than 10 digits, so TF32 would round it once more, and the model would no longer compute what its integer form
does.

So TF32 is switched off when a model is quantized, once, for the whole process. A switch around each layer's forward
would not cover its backward, and would not be safe: PyTorch has one switch for all threads, so a thread that leaves a
layer would allow TF32 in another thread that is still inside one.
"""

import contextlib
import warnings
from typing import Iterator, Tuple

import torch


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Hides the advice of PyTorch 2.9 and later to use fp32_precision in place of allow_tf32.

    The advice is not taken: once fp32_precision was set, reading allow_tf32 is an error, and some libraries read it.
    Setting allow_tf32 sets both.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def _allowed() -> Tuple[bool, str]:
    """Whether convolutions may use TF32, and the precision of products of matrices."""
    try:
        with _without_advice():
            return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # PyTorch 2.9 and later, when both interfaces were used: the state is not known
        return True, 'high'


def _allow(convolutions: bool, matmul: str) -> None:
    with _without_advice():
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(matmul)


def use_full_float32() -> bool:
    """Switch TF32 off for convolutions and products of matrices, in the whole process, forward and backward.

    Returns:
        Whether either was allowed before.
    """
    allowed = _allowed() != (False, 'highest')
    if allowed:
        _allow(False, 'highest')
    return allowed


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """As :func:`use_full_float32` inside the ``with`` block, as before afterwards.

    The switch is PyTorch's own, one for all threads.
    """
    before = _allowed()
    try:
        use_full_float32()
        yield
    finally:
        _allow(*before)
