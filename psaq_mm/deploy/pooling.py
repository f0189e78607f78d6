# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Adaptive average pooling as two matrix products: ONNX has it only where the cells are equal."""

from typing import Tuple, Union

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ['LinearPooling', 'pooling_matrix']


def pooling_matrix(size: int, cells: int) -> Tensor:
    """The averages of adaptive pooling along one axis.

    Cell i covers the positions ``floor(i * size / cells)`` to ``ceil((i + 1) * size / cells) - 1``, as PyTorch's
    ``adaptive_avg_pool2d``; cells may overlap.

    Returns:
        float32 (cells, size); each row sums to 1.
    """
    matrix = np.zeros((cells, size))  # of NumPy: a trace has one constant of it, not how it is filled
    for i in range(cells):
        begin, end = i * size // cells, -(-(i + 1) * size // cells)
        matrix[i, begin:end] = 1 / (end - begin)
    return torch.from_numpy(matrix.astype(np.float32))


def _traced_matrix(size: Tensor, cells: int) -> Tensor:
    """:func:`pooling_matrix` of a size that the graph finds out when it runs."""
    i = torch.arange(cells)
    begin = torch.div(i * size, cells, rounding_mode='floor').unsqueeze(1)
    end = torch.div((i + 1) * size + cells - 1, cells, rounding_mode='floor').unsqueeze(1)
    places = torch.arange(size).unsqueeze(0)
    return ((places >= begin) & (places < end)).float() / (end - begin).float()


class LinearPooling(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as an exact linear map.

    Args:
        output_size: As the pooling has it; None in one axis keeps its size.
        tracing: Tells whether the input's size is left to the graph. Defaults to None: it is known.
    """

    def __init__(self, output_size: Union[int, Tuple], tracing=None):
        super().__init__()
        self.tracing = tracing
        self.output_size = tuple(output_size) if isinstance(output_size, (tuple, list)) else (output_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, h, w)."""
        dynamic = self.tracing is not None and self.tracing.dynamic
        height, width = x.shape[-2:] if dynamic else (int(s) for s in x.shape[-2:])
        matrix = _traced_matrix if dynamic else pooling_matrix
        rows, columns = self.output_size
        if rows == columns == 1:
            return x.mean((2, 3), keepdim=True)
        if rows is not None:
            x = torch.matmul(matrix(height, rows).to(x.device), x)
        if columns is not None:
            x = torch.matmul(x, matrix(width, columns).t().contiguous().to(x.device))
        return x
