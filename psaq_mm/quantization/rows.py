"""Row masks: which rows of a tensor are tokens of an image, and which are padding."""

from contextlib import contextmanager
from typing import Any, Iterator, Optional, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.contexts import replaced
from psaq_mm.errors import DataError

__all__ = ['RowMask', 'padded', 'row_mask_given', 'row_mask_of', 'valid_rows_of']


class RowMask:
    """Marks the rows of a tensor that are valid. A row is one vector of the last dimension.

    The mask may cover one image of a batch. It is then repeated along the first dimension: a mask ``(windows, tokens)``
    fits a tensor ``(images * windows, tokens, D)``.

    Args:
        valid: bool, False for padding.

    Raises:
        DataError: The dtype is not bool.
    """

    def __init__(self, valid: Tensor) -> None:
        if valid.dtype != torch.bool:
            raise DataError(f'The row mask has dtype {valid.dtype}: give a bool tensor, True for rows that take part.')
        self.valid = valid

    def rows(self, x: Tensor) -> Tensor:
        """The mask for each row of ``x``, shape ``x.shape[:-1]``.

        Raises:
            DataError: The mask does not fit, even when it is repeated.
        """
        shape, valid = x.shape[:-1], self.valid.to(x.device)
        if valid.dim() == len(shape) > 0 and 1 < len(valid) < shape[0] and shape[0] % len(valid) == 0:
            valid = valid.repeat(shape[0] // len(valid), *[1] * (valid.dim() - 1))
        try:
            return valid.expand(shape)
        except RuntimeError as error:
            raise DataError(
                f'A row mask of shape {tuple(valid.shape)} does not fit the rows {tuple(shape)} of the '
                'tensor: it must broadcast to them.'
            ) from error


def valid_rows_of(x: Tensor, valid: Optional[Tensor]) -> Tensor:
    """Rows of ``x`` that take part.

    Args:
        x: ``(..., D)``.
        valid: None, or a mask as :class:`RowMask` takes it.

    Returns:
        ``x`` itself without a mask, else ``(rows, D)``.

    Raises:
        DataError: The mask is not bool or does not fit.
    """
    return x if valid is None else x.reshape(-1, x.shape[-1])[RowMask(valid).rows(x).reshape(-1)]


@contextmanager
def padded(attention: nn.Module, valid: Optional[Tensor]) -> Iterator[None]:
    """Inside the block the input of ``attention`` is padded as ``valid`` says; None: it is not padded.

    The attention has the mask only inside the block, so a later call with another input cannot see it.
    """
    with replaced(attention, 'row_mask', None if valid is None else RowMask(valid)):
        yield


def row_mask_of(attention: nn.Module) -> Optional[RowMask]:
    """The mask of the current forward pass of an attention module; None without padding, and outside of a pass."""
    return getattr(attention, 'row_mask', None)


def row_mask_given(args: Tuple[Any, ...]) -> Optional[Tensor]:
    """The mask among the arguments of a quantizer or quantized layer, as a hook gets them."""
    return args[1] if len(args) > 1 else None
